"""Feature vectors on the command line, their neighbours and the picture: equal to the pipeline's, atomic, plain words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_media import write_frame_folder, write_image, write_video
from training_kit import CPU, make_config, make_run, make_store

from pipeline.cli import main
from pipeline.config import Config
from pipeline.data.extract import extract_source
from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.manifest import pseudonym
from pipeline.data.store import FrameStore
from pipeline.embed import embed, open_encoder
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluation.features import embed_frames, evenly_spaced
from pipeline.models.backbones import build_backbone
from pipeline.retrieval import Embedding, similar

EXTRACT = {"short_side": 40, "color": "rgb", "frames_per_second": 5.0}


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the project's params.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as the pretrain stage exports it, of frames in colour, five a second; SimCLR holds frames larger than it shows them."""
    folder = tmp_path_factory.mktemp("encoder")
    config = make_config(folder, pretrain__method="simclr", extract=EXTRACT)
    run = make_run(config, make_store(folder / "store", patients=3, frames=6), folder)
    run.export(folder / "fold0")
    return folder / "fold0"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of patient one, a still and a frame folder of patient two, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.avi", 20, seed=1)
    write_video(folder / "b.avi", 12, seed=2)
    write_image(folder / "c.png", 9, seed=3)
    write_frame_folder(folder / "d", 4)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    rows = ["path,label,patient", "a.avi,ill,one", "b.avi,well,one", "c.png,well,two", "d,ill,two"]
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path, clips: Path) -> Path:
    output = tmp_path_factory.mktemp("embedded") / "deeper" / "out"
    embed(clips, open_encoder(encoder_folder), output, frames_per_video=3, batch=2, params=Path("absent.yaml"))
    return output


def table(folder: Path, level: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{level}.csv", dtype=str, keep_default_na=False)


# embed


def test_embed__vectors_are_those_of_the_pipeline(tmp_path, encoder_folder, clips, embedded):
    """Extracted by the stage and embedded through the frame store, every frame gives the same vector."""
    raw = {"data": {"source": str(clips)}, "extract": EXTRACT}
    extract_source("main", Config.model_validate(raw), tmp_path / "store", tmp_path / "report")
    refs = gather_videos([FrameStore(tmp_path / "store")])
    encoder = open_encoder(encoder_folder)
    assert (encoder.working, encoder.size, encoder.extract.color) == (40, 32, "rgb")
    network, _ = build_backbone("resnet10", image_size=32)
    network.load_state_dict(load_file(encoder_folder / "encoder.safetensors"))
    items = [(v, n) for v, ref in enumerate(refs) for n in evenly_spaced(ref.row.frames, 3)]
    wanted = embed_frames(network, FrameCache(refs, 40), items, size=32, device=CPU, normalization="imagenet").numpy()
    got = table(embedded, "frames")
    assert list(zip(got["video"], got["frame"].astype(int), strict=True)) == [(refs[v].video, n) for v, n in items]
    np.testing.assert_allclose(np.load(embedded / "frames.npy"), wanted, atol=1e-5)
    assert np.load(embedded / "frames.npy").dtype == np.float32
    assert np.abs(wanted[0] - wanted[-1]).max() > 1e-3


def test_embed__tables_fit_the_arrays_and_are_means(embedded):
    frames, videos, patients = (table(embedded, level) for level in ("frames", "videos", "patients"))
    arrays = {level: np.load(embedded / f"{level}.npy") for level in ("frames", "videos", "patients")}
    assert [len(arrays[level]) for level in arrays] == [len(frames), len(videos), len(patients)] == [3 + 3 + 1 + 3, 4, 2]
    for row, video in enumerate(videos["video"]):
        own = arrays["frames"][frames["video"] == video]
        np.testing.assert_allclose(arrays["videos"][row], own.mean(0), atol=1e-6)
    for row, patient in enumerate(patients["patient"]):
        own = arrays["videos"][videos["patient"] == patient]
        np.testing.assert_allclose(arrays["patients"][row], own.mean(0), atol=1e-6)
    assert set(patients["label"]) == {"ill; well"} and set(videos["label"]) == {"ill", "well"}
    info = json.loads((embedded / "embedding.json").read_text())
    assert (info["frames"], info["videos"], info["patients"], info["unreadable"]) == (10, 4, 2, 1)
    assert info["encoder"]["method"] == "simclr" and info["features"] == arrays["frames"].shape[1] == 512


def test_embed__a_bad_file_is_listed_and_patients_are_pseudonyms(embedded):
    bad = table(embedded, "quarantine")
    assert list(bad["path"]) == ["broken.mp4"] and "not a video" in bad["reason"][0]
    assert set(table(embedded, "patients")["patient"]) == {pseudonym("one", ""), pseudonym("two", "")}
    assert set(table(embedded, "files")["path"]) == {"a.avi", "b.avi", "c.png", "d"}
    # The encoder saw other patients.
    assert set(table(embedded, "videos")["seen"]) == {"no"}


def test_embed__a_frame_store_keeps_its_ids_and_says_whom_the_encoder_has_seen(tmp_path, encoder_folder):
    store = make_store(tmp_path / "store", patients=4, frames=5)
    info = embed(store.folder, open_encoder(encoder_folder), tmp_path / "out", frames_per_video=None)
    assert (info["frames"], info["videos"], info["frames_per_video"]) == (20, 4, "all")
    videos = table(tmp_path / "out", "videos")
    assert list(videos["video"]) == sorted(row.video for row in store.manifest.rows)
    assert sorted(videos["seen"]) == ["no", "yes", "yes", "yes"]


def test_embed__one_file_on_the_command_line(tmp_path, capsys, encoder_folder, clips):
    assert main(["embed", str(clips / "a.avi"), "--encoder", str(encoder_folder), "--frames-per-video", "all"]) == 0
    said = capsys.readouterr()
    assert "10 frames, 1 videos, 0 patients as vectors of 512 numbers in embeddings" in said.out
    assert not (tmp_path / "embeddings/patients.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"], "nothing is left behind"
    assert main(["embed", str(clips / "b.avi"), "--encoder", str(encoder_folder)]) == 0, "an earlier result is replaced"
    assert len(table(tmp_path / "embeddings", "frames")) == 6


def test_embed__pseudonyms_have_the_key_of_params(tmp_path, encoder_folder, clips):
    params = tmp_path / "params.yaml"
    params.write_text('data: {pseudonym_key: "k"}\nlaunch: {device: cpu, threads: 1}\n')
    embed(clips, open_encoder(encoder_folder), tmp_path / "out", frames_per_video=1, params=params)
    assert set(table(tmp_path / "out", "patients")["patient"]) == {pseudonym("one", "k"), pseudonym("two", "k")}


def test_embed__a_failure_leaves_the_earlier_result(tmp_path, monkeypatch, encoder_folder, clips):
    out = tmp_path / "out"
    embed(clips / "c.png", open_encoder(encoder_folder), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("pipeline.embed.write_video", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(clips / "a.avi", open_encoder(encoder_folder), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("source", "encoder", "out", "words"),
    [
        ("clips", "nowhere", "new", "nowhere has no encoder.safetensors and no card.json"),
        ("clips", "models", "new", "It holds fold0: choose one of them"),
        ("clps", "models/fold0", "new", "clps: does not exist. Did you mean 'clips'?"),
        ("empty", "models/fold0", "new", "no video or image to read"),
        ("clips/broken.mp4", "models/fold0", "new", "none of 1 files can be read.\n  broken.mp4: not a video"),
        ("clips", "models/fold0", "models", "models holds other files"),
    ],
)
def test_embed__mistakes_are_said_before_any_work(tmp_path, capsys, encoder_folder, clips, source, encoder, out, words):
    os.symlink(clips, "clips")
    Path("empty").mkdir()
    shutil.copytree(encoder_folder, "models/fold0")
    assert main(["embed", source, "--encoder", encoder, "--out", out]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_embed__nothing_readable_says_what_was_left_out_too(tmp_path, capsys, encoder_folder, clips):
    Path("mixed").mkdir()
    shutil.copy(clips / "broken.mp4", "mixed/broken.mp4")
    for name in ("a.avi", "b.avi"):
        os.symlink(clips / name, f"mixed/{name}")
    assert main(["embed", "mixed", "--encoder", str(encoder_folder)]) == 2
    said = capsys.readouterr().err
    assert "none of 1 files can be read.\n  broken.mp4: not a video" in said
    assert "\n  2 links lead out of the source folder and were skipped" in said


def test_embed__damaged_cards_and_weights(tmp_path, encoder_folder, clips):
    folder = tmp_path / "fold0"
    shutil.copytree(encoder_folder, folder)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "backbone": "resnet18"}))
    with pytest.raises(CheckpointError, match="--encoder"):
        embed(clips / "c.png", open_encoder(folder), tmp_path / "out")
    for broken in ("[]", "{}", "{", json.dumps({**card, "extract": {"short_side": "wide"}}), json.dumps({**card, "image_size": None})):
        (folder / "card.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"card\.json cannot be used"):
            open_encoder(folder)
    old = {key: value for key, value in card.items() if key not in ("extract", "working_size")}
    (folder / "card.json").write_text(json.dumps(old))
    assert "does not say how its frames were extracted" in open_encoder(folder).notes[0]
    save_file({k: v * float("nan") for k, v in load_file(folder / "encoder.safetensors").items()}, folder / "encoder.safetensors")
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="not finite"):
        embed(clips / "c.png", open_encoder(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--frames-per-video", "0"], ["--batch", "none"], ["--frames-per-video", "-3"]])
def test_embed__numbers_are_checked(words, capsys):
    with pytest.raises(SystemExit):
        main(["embed", "x", "--encoder", "y", *words])
    assert "whole numbers from 1 on" in capsys.readouterr().err


# similar


def test_similar__order_patients_and_picture(embedded, tmp_path):
    known = Embedding.read(embedded)
    video = known.files.loc[known.files["path"] == "a.avi", "video"].iloc[0]
    text = similar(video[:8], embedded, picture=tmp_path / "a.png")
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    shown = [row[-1] for row in rows if row[0] in "1234"]
    vectors = known.video_vectors / np.linalg.norm(known.video_vectors, axis=1, keepdims=True)
    place = list(known.videos["video"]).index(video)
    cosine = vectors @ vectors[place]
    order = [row for row in np.argsort(-cosine) if row != place]
    assert shown[:3] == [known.path_of(known.videos["video"][row]) for row in order]
    assert [float(row[1]) for row in rows[:3]] == pytest.approx(sorted(np.delete(cosine, place), reverse=True), abs=2e-3)
    assert "same patient" in text and "2 other patient" not in text
    assert "labelled neighbours have the query's label" in text
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 200
    others = similar("a.avi", embedded, other_patients=True)
    assert "same patient" not in others and "b.avi" not in others and "c.png" in others
    assert (embedded / f"similar-{video}.png").is_file()


def test_similar__frames_are_one_a_video(embedded):
    text = similar("a.avi:9", embedded, top=9)
    assert "frame 8" in text.splitlines()[0], "the embedded frame next to it"
    found = [line.split()[-1] for line in text.splitlines()[1:] if line[0].isdigit() and "neighbours" not in line]
    assert sorted(found) == ["b.avi", "c.png", "d"]


def test_similar__a_file_that_was_not_embedded(embedded, encoder_folder, clips, tmp_path):
    extra = write_image(tmp_path / "new.bmp", 9, seed=3)
    info = (embedded / "embedding.json").read_text()
    assert json.loads(info)["encoder_folder"] == "fold0" and str(encoder_folder.parent) not in info, "the name alone"
    with pytest.raises(CheckpointError, match="models/encoders/fold0 has no"):
        similar(str(extra), embedded)
    shutil.copytree(encoder_folder, "models/encoders/fold0")
    text = similar(str(extra), embedded, top=1, picture=tmp_path / "x.png")
    assert "patient unknown" in text and "c.png" in text, "the same picture in another format"
    assert "label ill" in similar(str(clips / "a.avi"), embedded, top=1), "known content is not embedded again"


def test_similar__mistakes_are_explained(embedded, encoder_folder, tmp_path, capsys):
    assert main(["similar", "x", "--in", str(tmp_path)]) == 2
    assert "no folder of embeddings" in capsys.readouterr().err
    assert main(["similar", "a.avx", "--in", str(embedded)]) == 2
    assert "Did you mean 'a.avi'?" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(encoder_folder, other)
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps({**card, "fingerprint": "f" * 16}))
    image = write_image(tmp_path / "unknown.png", 3, seed=9)
    with pytest.raises(DataError, match="different encoders cannot be compared"):
        similar(str(image), embedded, encoder=other)
    with pytest.raises(DataError, match="patient .* is not known"):
        similar(str(image), embedded, encoder=encoder_folder, other_patients=True)
    broken = tmp_path / "broken"
    shutil.copytree(embedded, broken)
    (broken / "pictures.tar").unlink()
    assert "picture:" in similar("a.avi", broken, top=2), "cards without pictures"
    np.save(broken / "videos.npy", np.ones((1, 512), np.float32))
    with pytest.raises(DataError, match="number of rows"):
        similar("a.avi", broken)
    (broken / "frames.csv").write_text("video\n")
    with pytest.raises(DataError, match="damaged"):
        similar("a.avi", broken)
