"""The finetune stage: files as agreed, reuse, leaks and foreign encoders refused, stamps written down."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from training_kit import make_config, make_project, make_run

from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore
from pipeline.embed import embed, open_encoder
from pipeline.errors import CheckpointError, DataError, LeakageError
from pipeline.evaluation.neighbors import read_features
from pipeline.training.finetune_stage import run_finetune_stage

def write_encoder(folder: Path, config, splits: Splits, fold: int = 0, **card: Any) -> None:
    """An encoder as the pretrain stage leaves it, untrained, for the training patients of a fold."""
    run = make_run(config, FrameStore(folder / "data/frames/main"), folder / ".scratch/unused")
    target = folder / f"models/encoders/fold{fold}"
    run.export(target)
    path = target / "card.json"
    facts = {"groups": splits.groups_of(splits.fold(fold).train), "scope": "fold", **card}
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


SETTINGS = {"pretrain__method": "random", "finetune__epochs": 2}


def test_stage__files_as_agreed(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    write_encoder(project, config, splits)
    assert run_finetune_stage(config, "pretrained", 0, 0) == (
        "finetune pretrained fold 0 seed 0: done; predictions in models/finetuned/pretrained-seed0-fold0"
    )
    folder = project / "models/finetuned/pretrained-seed0-fold0"
    table = pd.read_csv(folder / "predictions.csv", dtype=str)
    assert list(table.columns) == ["init", "seed", "fold", "part", "video", "patient", "frame", "label", "p_a", "p_b"]
    fold = splits.fold(0)
    assert set(table[table.part == "test"].video) == set(fold.test)
    assert set(table[table.part == "validation"].video) == set(fold.inner[0].validation)
    assert set(table.part) == {"test", "validation"}
    assert (table.groupby(["part", "video"]).size() == 2).all()
    probabilities = table[["p_a", "p_b"]].astype(float)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    for column in ("p_a", "p_b"):
        text = table[column]
        assert (text.astype(float).map(lambda x: float(np.float32(x))) == text.astype(float)).all(), (
            "full float32 precision"
        )
    assert (table.patient == table.video.map(splits.groups)).all()
    assert (table.label == table.video.map(splits.labels)).all()
    card = json.loads((folder / "card.json").read_text())
    assert card["test_groups"] == splits.groups_of(fold.test)
    assert card["validation_groups"] == splits.groups_of(fold.inner[0].validation)
    assert card["train_groups"] == splits.groups_of(fold.inner[0].train)
    assert card["pretrain_groups"] == splits.groups_of(fold.train)
    assert (card["stamp"], card["selection"], card["pretrain_scope"], card["seed"]) == (None, "inner", "fold", 0)
    assert len(list(csv.DictReader((folder / "curves.csv").open()))) == 2
    weights = load_file(str(folder / "model.safetensors"))
    encoder = load_file(str(project / "models/encoders/fold0/encoder.safetensors"))
    assert torch.equal(weights["backbone.conv1.weight"], encoder["conv1.weight"])
    assert weights["head.weight"].shape == (2, 512)
    assert (
        json.loads((project / "reports/runs/finetune-pretrained-seed0-fold0.json").read_text())["fingerprint"]
        == card["fingerprint"]
    )


def test_stage__random_needs_no_encoder_and_results_are_reused(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    assert ": done;" in run_finetune_stage(config, "random", 0, 1)
    folder = project / "models/finetuned/random-seed0-fold1"
    first = (folder / "predictions.csv").read_bytes()
    (folder / "predictions.csv").unlink()
    assert ": finished result reused;" in run_finetune_stage(config, "random", 0, 1)
    assert (folder / "predictions.csv").read_bytes() == first
    assert ": done;" in run_finetune_stage(config, "random", 1, 1)
    other = pd.read_csv(project / "models/finetuned/random-seed1-fold1/predictions.csv")
    assert not np.allclose(other.p_a, pd.read_csv(folder / "predictions.csv").p_a), "another seed, another result"
    features = [project / f"models/finetuned/random-seed{seed}-fold1/features.npz" for seed in (0, 1)]
    assert features[0].read_bytes() == features[1].read_bytes(), "taken before training, which alone depends on the seed"
    found = read_features(features[0], splits.fold(1), splits)
    assert found is not None and sorted(v for v, test in zip(found.videos, found.is_test, strict=True) if test) == sorted(splits.fold(1).test)
    changed = make_config(project, **{**SETTINGS, "methods__ucl__temperature": 0.5, "pretrain__epochs": 9})
    assert "reused" in run_finetune_stage(changed, "random", 0, 1), "pretraining does not concern the untrained network"
    card = json.loads((folder / "card.json").read_text())
    assert (card["pretrain_groups"], card["pretrain_scope"], card["method"]) == ([], "none", "random")


def test_stage__features_are_those_of_embed_whatever_fine_tuning_does(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The encoder's own working size and statistics: a SimCLR encoder holds frames at 40 pixels, this fine-tuning at 32."""
    own = {"crop": "center", "normalization": "uscl"}
    config, splits = make_project(project, pretrain__method="simclr", finetune__epochs=1, finetune__augmentation=own)
    write_encoder(project, config, splits)
    run_finetune_stage(config, "pretrained", 0, 0)
    said = capsys.readouterr().err
    assert "finetune.augmentation.normalization is uscl, but the encoder was pretrained with imagenet" in said
    found = read_features(project / "models/finetuned/pretrained-seed0-fold0/features.npz", splits.fold(0), splits)
    embed(project / "data/frames/main", open_encoder(project / "models/encoders/fold0"), project / "out", frames_per_video=4)
    table, vectors = pd.read_csv(project / "out/frames.csv", dtype=str), np.load(project / "out/frames.npy")
    wanted = {(v, int(n)): row / np.linalg.norm(row) for v, n, row in zip(table["video"], table["frame"], vectors, strict=True)}
    for owner, frame, vector in zip(found.owner, found.frame, found.vectors, strict=True):
        np.testing.assert_allclose(vector, wanted[found.videos[owner], int(frame)], atol=2e-3)
    card = project / "models/encoders/fold0/card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"normalization": "uscl"}))
    assert ": done;" in run_finetune_stage(config, "pretrained", 0, 0), "other statistics, other features"
    assert "warning" not in capsys.readouterr().err


def test_stage__card_holds_the_recipe_which_changes_no_reuse(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    write_encoder(project, config, splits, label_groups=["P1"], labelled_videos={"a": 1, "b": 0})
    run_finetune_stage(config, "pretrained", 0, 0)
    path = project / "models/finetuned/pretrained-seed0-fold0/card.json"
    card = json.loads(path.read_text())
    assert (card["finetune"]["epochs"], card["finetune"]["optimizer"]["name"], "seeds" in card["finetune"]) == (2, "adam", False)
    assert (card["pretrain_label_groups"], card["pretrain_labelled_videos"]) == (["P1"], {"a": 1, "b": 0})
    beside = project / "models/encoders/fold0/card.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"pretrain": {"epochs": 7}}))
    assert "reused" in run_finetune_stage(config, "pretrained", 0, 0), "what else a card says determines nothing"


def test_stage__selection_on_test_is_stamped(project: Path) -> None:
    config, _ = make_project(project, **SETTINGS, finetune__selection="best_on_test")
    run_finetune_stage(config, "random", 0, 0)
    card = json.loads((project / "models/finetuned/random-seed0-fold0/card.json").read_text())
    assert card["stamp"] == "optimistic (selected on test)"


def test_stage__encoder_that_saw_test_patients_is_refused(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    leaked = splits.groups_of(splits.fold(0).test)
    write_encoder(project, config, splits, groups=[*splits.groups_of(splits.fold(0).train), leaked[0]])
    with pytest.raises(LeakageError) as refused:
        run_finetune_stage(config, "pretrained", 0, 0)
    assert str(refused.value) == (
        f"models/encoders/fold0: this encoder was pretrained on 1 test patients of fold 0, for example {leaked[0]}. "
        f"Run the pretrain stage again with pretrain.scope: fold."
    )
    assert not (project / "models/finetuned").exists()
    write_encoder(project, config, splits, groups=sorted(set(splits.groups.values())), scope="all")
    run_finetune_stage(config, "pretrained", 0, 0)
    card = json.loads((project / "models/finetuned/pretrained-seed0-fold0/card.json").read_text())
    assert card["pretrain_scope"] == "all", "transductive by request, and said in the card"


def test_stage__missing_foreign_and_damaged_encoders(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    with pytest.raises(
        CheckpointError,
        match=r"^models/encoders/fold0: no encoder\. Run the pretrain stage first \(dvc repro pretrain@0\)\.$",
    ):
        run_finetune_stage(config, "pretrained", 0, 0)
    write_encoder(project, config, splits)
    other = make_config(project, **SETTINGS, pretrain__backbone="resnet18")
    with pytest.raises(
        CheckpointError, match=r"does not fit this backbone: \d+ tensors are missing.*It fits pretrain\.backbone: resnet10\."
    ):
        run_finetune_stage(other, "pretrained", 0, 0)
    (project / "models/encoders/fold0/encoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"models/encoders: encoder\.safetensors is not a readable weights file"):
        run_finetune_stage(config, "pretrained", 0, 0)
    (project / "models/encoders/fold0/card.json").write_text('{"groups": []}')
    with pytest.raises(
        CheckpointError, match=r"card\.json: lacks scope, method, fingerprint\. Run the pretrain stage again"
    ):
        run_finetune_stage(config, "pretrained", 0, 0)


def test_stage__inner_selection_without_inner_patients(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    replace(splits, folds=[replace(fold, inner=[]) for fold in splits.folds]).write(project / "data/splits.json")
    with pytest.raises(
        DataError,
        match=r"finetune\.selection: inner needs inner validation patients, but fold 0 has too few\. Use sel",
    ):
        run_finetune_stage(config, "random", 0, 0)
    last = make_config(project, **SETTINGS, finetune__selection="last")
    run_finetune_stage(last, "random", 0, 0)
    card = json.loads((project / "models/finetuned/random-seed0-fold0/card.json").read_text())
    assert (card["validation_groups"], card["selected_epoch"]) == ([], 1)


def test_stage__split_by_frame_uses_each_frame_in_one_part_and_is_stamped(project: Path) -> None:
    config, splits = make_project(project, frames=24, **SETTINGS, data__group="frame", finetune__eval_frames_per_video=50)
    videos = sorted(splits.labels)
    tables = {}
    for number in (0, 1):
        assert ": done;" in run_finetune_stage(config, "random", 0, number), "the same videos, other frames: another result"
        folder = project / f"models/finetuned/random-seed0-fold{number}"
        table, fold = pd.read_csv(folder / "predictions.csv", dtype={"video": str}), splits.fold(number)
        for part in ("test", "validation"):
            wanted = {(video, frame) for video in videos for frame in splits.frames_of(fold, part, video, 24)}
            assert set(table.loc[table.part == part, ["video", "frame"]].itertuples(index=False, name=None)) == wanted
        card = json.loads((folder / "card.json").read_text())
        assert card["stamp"] == "frame-level split (frames of one video on both sides)"
        tables[number] = set(table.loc[table.part == "test", ["video", "frame"]].itertuples(index=False, name=None))
    assert not tables[0] & tables[1]
    nested = make_config(project, **SETTINGS, data__group="frame", finetune__selection="nested")
    with pytest.raises(DataError, match="nested divides patients and data.group: frame divides nothing by patient"):
        run_finetune_stage(nested, "random", 0, 0)


def test_stage__split_by_frame_trains_on_no_test_or_validation_frame(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training.finetune import Finetuning

    config, splits = make_project(project, frames=24, **SETTINGS, data__group="frame", finetune__frames_per_video=50, finetune__cached_views=0)
    drawn: set[tuple[str, int]] = set()
    original = Finetuning._training_frames

    def watched(self: Any, epoch: int) -> list[tuple[int, int]]:
        found = original(self, epoch)
        drawn.update((self.data.frames.videos[video].video, frame) for video, frame in found)
        return found

    monkeypatch.setattr(Finetuning, "_training_frames", watched)
    run_finetune_stage(config, "random", 0, 2)
    fold = splits.fold(2)
    assert drawn == {(video, frame) for video in splits.labels for frame in splits.frames_of(fold, "train", video, 24)}
    held = {(video, frame) for video in splits.labels for part in ("test", "validation") for frame in splits.frames_of(fold, part, video, 24)}
    assert held and not drawn & held


def test_stage__divided_patients_are_stamped_beside_what_the_recipe_says(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS, finetune__selection="best_on_test")
    replace(splits, group="video", divided_patients=3).write(project / "data/splits.json")
    run_finetune_stage(config, "random", 0, 0)
    card = project / "models/finetuned/random-seed0-fold0/card.json"
    assert json.loads(card.read_text())["stamp"] == "video-level split (patients on both sides), optimistic (selected on test)"
    splits.write(project / "data/splits.json")
    assert "reused" in run_finetune_stage(config, "random", 0, 0), "equal videos, equal result"
    assert json.loads(card.read_text())["stamp"] == "optimistic (selected on test)", "what a split is called belongs to the run that asks"


def test_stage__label_fraction_is_written_down(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS, finetune__label_fraction=0.5)
    run_finetune_stage(config, "random", 0, 0)
    card = json.loads((project / "models/finetuned/random-seed0-fold0/card.json").read_text())
    assert set(card["train_groups"]) < set(splits.groups_of(splits.fold(0).inner[0].train))
    assert card["label_fraction"] == 0.5


def test_stage__output_linked_into_a_cache_is_replaced_not_written_into(project: Path) -> None:
    config, _ = make_project(project, **SETTINGS)
    run_finetune_stage(config, "random", 0, 0)
    folder, cache = project / "models/finetuned/random-seed0-fold0", project / "cache"
    cache.mkdir()
    for path in folder.iterdir():
        path.write_bytes(b"another experiment's object")
        os.link(path, cache / path.name)
        path.chmod(0o444)
    assert "reused" in run_finetune_stage(config, "random", 0, 0)
    assert all(path.read_bytes() == b"another experiment's object" for path in cache.iterdir())
    assert b"random,0,0,test" in (folder / "predictions.csv").read_bytes()


def test_stage__class_names_with_commas_and_quotes_survive(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    odd = {"a": 'B-lines, "few"', "b": "c, d"}
    raw = json.loads((project / "data/splits.json").read_text())
    raw["classes"] = [odd[name] for name in raw["classes"]]
    raw["labels"] = {video: odd[name] for video, name in raw["labels"].items()}
    (project / "data/splits.json").write_text(json.dumps(raw))
    run_finetune_stage(config, "random", 0, 0)
    with open(project / "models/finetuned/random-seed0-fold0/predictions.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["label"] for row in rows} == set(odd.values())
    assert abs(sum(float(rows[0][f"p_{name}"]) for name in odd.values()) - 1) < 1e-6


def test_stage__reused_result_says_where_this_runs_encoder_comes_from(project: Path) -> None:
    config, splits = make_project(project, **SETTINGS)
    write_encoder(project, config, splits)
    run_finetune_stage(config, "pretrained", 0, 0)
    write_encoder(project, config, splits, scope="all", groups=sorted(set(splits.groups.values())))
    assert "reused" in run_finetune_stage(config, "pretrained", 0, 0)
    card = json.loads((project / "models/finetuned/pretrained-seed0-fold0/card.json").read_text())
    assert card["pretrain_scope"] == "all" and card["pretrain_groups"] == sorted(set(splits.groups.values()))
