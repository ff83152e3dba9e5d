"""Labels of single frames: annotation files, stretches in the store, phase metrics, label fractions, and the way to the report."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from sample_media import number, write_frame_folder, write_video
from sample_phases import PHASES, RATE, write_phase_videos
from training_kit import make_config

from pipeline.config import Config
from pipeline.data.extract import extract_source
from pipeline.data.frame_labels import read_frame_labels
from pipeline.data.splits import Splits
from pipeline.data.splitting import make_splits
from pipeline.data.store import FrameStore
from pipeline.data.thinning import source_frames
from pipeline.data.video import MediaReader, find_media
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.evaluate import evaluate, headline_metrics
from pipeline.evaluation.phases import macro_scores, phase_metrics
from pipeline.parameters import ExtractParams, SplitParams
from pipeline.training.finetune import subset_by_patient

PATTERN = "phase_annotations/{stem}-phase.txt"


def project(folder: Path, monkeypatch: pytest.MonkeyPatch, videos: int = 6, **changes: object) -> tuple[Config, list[list[int]]]:
    truth = write_phase_videos(folder / "data/endoscopy", videos)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    values = {
        "data__source": "data/endoscopy", "data__frame_labels": PATTERN, "data__frame_label_stride": RATE, "extract__color": "rgb",
        "extract__workers": 1, "data__classes": list(PHASES), "finetune__eval_frames_per_video": 1000, **changes,
    }
    return make_config(folder, **values), truth


# --- annotation files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["Frame\tPhase\n0\ta\n1\tb\n", "Frame\tPhase\r\n0\ta\r\n1\tb", "\ufeffframe,label\n0,a\n\n1, b \n\n", "0;a\n1;b"],
)
def test_read_frame_labels__any_line_end_and_separator(tmp_path: Path, text: str) -> None:
    (tmp_path / "v.txt").write_bytes(text.encode())
    labels = read_frame_labels(tmp_path / "v.txt")
    assert labels.frames.tolist() == [0, 1]
    assert labels.names == ("a", "b")


def test_frame_labels__hold_until_the_next_row_and_not_beyond_the_last(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("25,a\n50,b\n75,a\n")
    labels = read_frame_labels(tmp_path / "v.csv")
    assert labels.at([0, 24, 25, 49, 50, 74, 75, 99, 100]) == ["", "", "a", "a", "b", "b", "a", "a", ""]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0\ta\n1\n", "v.txt, line 2: found '1'; expected a frame number and a label"),
        ("0\ta\nx\tb\n", "v.txt, line 2: found 'x\tb'"),
        ("0\ta\n1\t\n", "v.txt, line 2: found '1\t'"),
        ("Frame\tPhase\n5\ta\n5\tb\n", "v.txt, line 3: frame 5 follows frame 5; frame numbers must rise"),
        ("Frame\tPhase\n", "v.txt: holds no row"),
        (b"\xff\xfe0\x00", "v.txt: cannot be read as UTF-8 text"),
    ],
)
def test_read_frame_labels__names_file_and_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    (tmp_path / "v.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as found:
        read_frame_labels(tmp_path / "v.txt")
    assert str(found.value).startswith(says)


@pytest.mark.parametrize(("rate", "most"), [(None, None), (4.0, None), (None, 5), (4.0, 3), (None, 1)])
def test_source_frames__are_those_the_reader_keeps(tmp_path: Path, rate: float | None, most: int | None) -> None:
    write_video(tmp_path / "a.avi", 41, fps=10.0)
    params = ExtractParams(frames_per_second=rate, max_frames=most, short_side=48)
    (media,) = find_media(tmp_path).media
    reader = MediaReader(media, params)
    shown = [number(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)) for jpeg in reader.jpegs()]
    assert source_frames(reader.facts.frames_decoded, reader.facts.fps, params) == shown


def test_find_media__frames_named_after_their_folder(tmp_path: Path) -> None:
    write_frame_folder(tmp_path / "video01", 11, "video01_{:d}.png")
    write_frame_folder(tmp_path / "others", 3, "patient_{:d}.png")
    media = {item.path: item.kind for item in find_media(tmp_path).media}
    assert media["video01"] == "frames"
    assert media["others/patient_0.png"] == "image", "another name in front may tell patients apart"


# --- extraction and splits ------------------------------------------------------------------------------------------


def test_extract__one_video_a_stretch_with_its_frames_and_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, truth = project(tmp_path, monkeypatch, videos=3)
    metrics = extract_source("main", config, Path("data/frames/main"), Path("reports"))
    store = FrameStore(Path("data/frames/main"))
    assert metrics["stretches"] == len(store.manifest.rows) == 4 + 3 + 4
    assert metrics["merged_copies"] == 0
    for video, phases in enumerate(truth, start=1):
        rows = [row for row in store.manifest.rows if row.path.startswith(f"frames/video{video:02d}#")]
        assert [name for row in rows for name in [row.label] * row.frames] == [PHASES[phase] for phase in phases]
        assert len({row.patient for row in rows}) == 1
        colours = [store.frame(row.video, 0)[24, 36] for row in rows]
        assert [int(colour[::-1].argmax()) for colour in colours] == [2 - PHASES.index(row.label) for row in rows], "BGR order of COLOURS"
    assert len({row.patient for row in store.manifest.rows}) == 3
    before = {path.name: path.stat().st_ino for path in Path("data/frames/main").glob("*.tar")}
    extract_source("main", config, Path("data/frames/main"), Path("reports"))
    assert {path.name: path.stat().st_ino for path in Path("data/frames/main").glob("*.tar")} == before, "not written twice"


def test_extract__annotation_problems_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = project(tmp_path, monkeypatch, videos=3)
    for video in (1, 2):
        (tmp_path / f"data/endoscopy/phase_annotations/video0{video}-phase.txt").write_text("0\ta\n0\tb\n")
    with pytest.raises(DataError, match="2 annotation files cannot be used") as found:
        extract_source("main", config, Path("data/frames/main"), Path("reports"))
    assert str(found.value).count("line 2: frame 0 follows frame 0") == 2
    for path in (tmp_path / "data/endoscopy/phase_annotations").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no video has an annotation file; for frames/video01 it would be .*video01-phase\.txt"):
        extract_source("main", config, Path("data/frames/main"), Path("reports"))


def test_cut_videos__follow_a_decision_about_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A box that a person decides on for a whole video is black outside in its stretches, although these lie finished in scratch."""
    config, _ = project(tmp_path, monkeypatch, videos=1, extract__mask={"mode": "sector"})
    output = Path("data/frames/main")
    extract_source("main", config, output, Path("reports"))
    before = {row.video: FrameStore(output).frame(row.video, 0) for row in FrameStore(output).manifest.rows}
    (tmp_path / "review.csv").write_text("path,decision,x0,y0,x1,y1\nframes/video01,box,30,10,42,30\n", encoding="utf-8")
    decided = config.extract.mask.model_copy(update={"review": "review.csv"})
    config = config.model_copy(update={"extract": config.extract.model_copy(update={"mask": decided})})
    extract_source("main", config, output, Path("reports"))
    store = FrameStore(output)
    assert {row.video for row in store.manifest.rows} == set(before)
    for video, frame in before.items():
        after = store.frame(video, 0)
        assert after.shape == frame.shape
        assert after[:, : frame.shape[1] // 3].max() < 30 < frame[:, : frame.shape[1] // 3].max()
    tars = {video: (output / f"{video}.tar").stat().st_ino for video in before}
    extract_source("main", config, output, Path("reports"))
    assert {video: (output / f"{video}.tar").stat().st_ino for video in before} == tars, "nothing new, nothing written again"


def test_splits__one_given_fold_is_a_fixed_division(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training 1-3, validation 4, test 5-6, by the names of the videos; nothing of a whole video lies on two sides."""
    names = [f"video{n:02d}" for n in range(1, 7)]
    (tmp_path / "official.json").write_text(json.dumps(
        {"folds": [{"test_patients": names[4:], "train": names[:4], "inner": [{"validation": [names[3]]}]}]}
    ))
    config, _ = project(tmp_path, monkeypatch, split__folds=[0], split__file="official.json")
    extract_source("main", config, Path("data/frames/main"), Path("reports"))
    manifest = FrameStore(Path("data/frames/main")).manifest
    splits = make_splits(manifest, config)
    where = {row.video: row.path.split("#")[0].removeprefix("frames/") for row in manifest.rows}
    (fold,) = splits.folds
    assert {where[v] for v in fold.test} == {"video05", "video06"}
    assert {where[v] for v in fold.inner[0].train} == {"video01", "video02", "video03"}
    assert {where[v] for v in fold.inner[0].validation} == {"video04"}
    splits.write(Path("data/splits.json"))
    assert Splits.read(Path("data/splits.json")).folds == splits.folds
    with pytest.raises(ValueError, match=r"split\.file must give"):
        SplitParams(folds=[0])
    with pytest.raises(ConfigError, match=r"split\.file must give"):
        make_config(tmp_path / "other", split__folds=[0])


# --- label fractions ------------------------------------------------------------------------------------------------


def test_subset__whole_videos_nested_with_every_phase() -> None:
    """40 videos of 7 phases, one phase in two videos only: 5, 10, 20, 40 of them, or as few more as that phase needs."""
    groups, labels = [], []
    for video in range(40):
        for phase in range(7 if video in (3, 17) else 6):
            groups.append(f"P{video:02d}")
            labels.append(phase)
    everything = list(range(len(labels)))
    for seed in range(5):
        before: set[str] = set()
        for fraction, least in ((0.125, 5), (0.25, 10), (0.5, 20), (1.0, 40)):
            kept = subset_by_patient(everything, np.array(labels), groups, fraction, seed, joint=True)
            videos = {groups[v] for v in kept}
            assert len(videos) >= least
            assert before <= videos, "a larger share contains a smaller one"
            assert {labels[v] for v in kept} == set(range(7))
            assert all((v in kept) == (groups[v] in videos) for v in everything), "whole videos"
            before = videos
    assert subset_by_patient([], np.array(labels), groups, 0.5, 0, joint=True) == []
    plain = subset_by_patient([v for v in everything if labels[v] < 6], np.array(labels), groups, 0.125, 0, joint=True)
    assert len({groups[v] for v in plain}) == 5


# --- metrics --------------------------------------------------------------------------------------------------------


def test_phase_metrics__hand_made() -> None:
    """Video a is right but for one false alarm of an absent phase; video b is all right."""
    videos = np.array(["a"] * 4 + ["b"] * 2)
    labels, predicted = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 2, 1, 1])
    found = phase_metrics(videos, labels, predicted, ["x", "y", "z"])
    f1 = {"union": ((1 + 2 / 3 + 0) / 3 + 1) / 2, "gt": ((1 + 2 / 3) / 2 + 1) / 2, "all": ((1 + 2 / 3) / 3 + 1 / 3) / 2}
    assert found["f1_by_convention"] == pytest.approx(f1)
    assert (found["convention"], found["f1"]) == ("union", pytest.approx(f1["union"]))
    assert found["accuracy"] == pytest.approx((0.75 + 1) / 2)
    assert found["pooled"]["accuracy"] == pytest.approx(5 / 6)
    assert found["per_phase"]["z"] == {"precision": None, "recall": None, "f1": None, "videos": 0}
    assert found["per_phase"]["y"]["videos"] == 2
    assert json.dumps(found)


def test_macro_scores__refuses_nothing_and_the_unknown() -> None:
    with pytest.raises(DataError, match="0 labels and 0 predictions"):
        macro_scores(np.array([], int), np.array([], int), 3, "union")
    with pytest.raises(DataError, match="'some' is unknown; allowed: union, gt, all"):
        macro_scores(np.array([1]), np.array([1]), 3, "some")


# --- end to end -----------------------------------------------------------------------------------------------------


def test_stages__from_annotations_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tune the untrained network on frames with labels of their own, and judge whole videos."""
    from pipeline.training.finetune_stage import run_finetune_stage

    config, truth = project(
        tmp_path, monkeypatch, split__folds=[0, 1], split__inner_folds=2, finetune__initialisations=["random"], finetune__epochs=6,
        finetune__trainable="all", finetune__optimizer={"name": "adam", "lr": 0.002}, evaluate__bootstrap=100,
        finetune__label_fraction=0.9,
    )
    extract_source("main", config, Path("data/frames/main"), Path("reports/extract"))
    store = FrameStore(Path("data/frames/main"))
    splits = make_splits(store.manifest, config)
    splits.write(Path("data/splits.json"))
    assert splits.classes == list(PHASES)
    for fold in splits.folds:
        run_finetune_stage(config, "random", 0, fold.fold)
    output = Path("reports/evaluate")
    metrics = evaluate(config, [Path(f"models/finetuned/random-seed0-fold{k}") for k in (0, 1)], splits, store, output)
    found = metrics["phases"]["random"]
    assert (found["convention"], found["videos"]) == ("union", 6)
    assert found["frames"] == found["frames_stored"] == sum(map(len, truth))
    assert found["f1"] > 0.8, "the colours tell the phases"
    assert json.loads((output / "metrics.json").read_text())["phases"]["random"]["f1"] == pytest.approx(found["f1"])
    assert headline_metrics(metrics)["phases.random.f1"] == found["f1"]
    assert metrics["features"]["random"]["same_patient"] is None, "stretches of one video say nothing of patients"
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Phases of whole videos" in page
    assert "a video of these tables is a stretch of one label" in page
