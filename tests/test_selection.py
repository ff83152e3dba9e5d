"""Nested selection: which candidate and epoch win, that test patients play no part, that the refit is plain training; and bad grids."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_finetune_stage import write_encoder
from test_finetuning import make_data
from training_kit import make_config, make_project, make_store

from pipeline.config import Config
from pipeline.data.splits import InnerFold, Splits
from pipeline.errors import ConfigError, DataError, LeakageError
from pipeline.grid import candidates
from pipeline.parameters import FinetuneParams
from pipeline.preflight import check_named_files
from pipeline.training.finetune import Diverged, FinetuneData, Finetuning, Predictions
from pipeline.training.finetune_stage import run_finetune_stage
from pipeline.training.selection import choose, inner_data

GRID = {"optimizer.lr": [0.1, 0.01], "trainable": ["linear", "last_block"]}
RATES = {"optimizer.lr": [0.1, 0.01]}


# --- which wins -----------------------------------------------------------------------------------------------------


class ToldRun:
    """A training whose validation scores are given: [epoch] of its learning rate and inner fold (`data.train[0]`)."""

    def __init__(self, scores: dict[tuple[float, int], list[float]], data: FinetuneData, params: FinetuneParams) -> None:
        self.scores, self.fold, self.rows = scores.get((params.optimizer.lr, data.train[0])), data.train[0], []

    def learn(self, epoch: int) -> dict[str, Any]:
        if self.scores is None:
            raise Diverged("finetune: not finite")
        self.epoch = epoch
        return {"epoch": epoch}

    def predict(self, part: str) -> Predictions:
        return Predictions([(self.fold, self.epoch)], np.array([[1.0, 0.0]], np.float32))

    def judge(self, predicted: Predictions) -> dict[str, float]:
        return {"balanced_accuracy": self.scores[self.epoch], "loss": 1 - self.scores[self.epoch]}


def told(scores: dict[tuple[float, int], list[float]], metric: str = "balanced_accuracy", rates: tuple[float, ...] = (0.1, 0.01)) -> Any:
    params = FinetuneParams(selection="nested", epochs=3, selection_metric=metric, grid={"optimizer.lr": list(rates)})
    parts = [FinetuneData(None, np.zeros(2), [], ["a", "b"], [fold], [fold], []) for fold in (0, 1)]  # type: ignore[arg-type]
    return choose(lambda data, recipe: ToldRun(scores, data, recipe), parts, params, "")  # type: ignore[arg-type,return-value]


def test_choose__best_mean_over_inner_folds_not_best_fold() -> None:
    found = told({(0.1, 0): [0.9, 0.2, 0.2], (0.1, 1): [0.1, 0.2, 0.2], (0.01, 0): [0.5, 0.6, 0.5], (0.01, 1): [0.5, 0.7, 0.5]})
    assert (found.values, found.epoch, found.params.optimizer.lr) == ({"optimizer.lr": 0.01}, 1, 0.01)
    assert found.score == pytest.approx(0.65)
    assert [(row["values"]["optimizer.lr"], row["epoch"]) for row in found.table] == [(0.1, 0), (0.01, 1)]
    assert found.table[1]["inner"] == [0.6, 0.7] and found.table[0]["score"] == pytest.approx(0.5)
    assert found.predictions.items == [(0, 1), (1, 1)], "of the chosen epoch, one network an inner fold"
    assert [row["validation_balanced_accuracy"] for row in found.curve] == pytest.approx([0.5, 0.65, 0.5])


def test_choose__ties_go_to_fewer_epochs_then_to_the_first_listed() -> None:
    same = [0.2, 0.7, 0.7]
    for rates in ((0.1, 0.01), (0.01, 0.1)):
        found = told({(lr, fold): same for lr in rates for fold in (0, 1)}, rates=rates)
        assert (found.epoch, found.params.optimizer.lr) == (1, rates[0])
    sooner = told({(0.1, 0): same, (0.1, 1): same, (0.01, 0): [0.7, 0.1, 0.1], (0.01, 1): [0.7, 0.1, 0.1]})
    assert (sooner.epoch, sooner.params.optimizer.lr) == (0, 0.01)
    # Means that differ in the last digit only are equal: 0.1 + 0.2 and 0.3.
    noisy = told({(0.1, 0): [0.1, 0.0, 0.0], (0.1, 1): [0.2, 0.0, 0.0], (0.01, 0): [0.3, 0.0, 0.0], (0.01, 1): [0.0, 0.0, 0.0]})
    assert noisy.params.optimizer.lr == 0.1


def test_choose__losses_and_candidates_that_diverge() -> None:
    scores = {(0.1, 0): [0.5, 0.9, 0.1], (0.1, 1): [0.5, 0.9, 0.1]}
    found = told(scores, "loss")
    assert (found.epoch, found.score) == (1, pytest.approx(0.1))
    assert found.table[1] == {"values": {"optimizer.lr": 0.01}, "epoch": None, "score": None, "inner": None}
    with pytest.raises(Diverged, match="not finite"):
        told({})


def test_inner_data__no_test_video_whole_patients_and_what_is_refused(tmp_path: Path) -> None:
    data = make_data(make_store(tmp_path, patients=8, frames=3))
    data = replace(data, train=sorted(data.train + data.validation), validation=[])
    names = [data.frames.videos[v].video for v in data.train]
    inner = [InnerFold(names[2:], names[:2]), InnerFold(names[:2] + names[4:], names[2:4]), InnerFold(names[:4], names[4:])]
    parts = inner_data(data, inner)
    assert [part.validation for part in parts] == [data.train[:2], data.train[2:4], data.train[4:]]
    assert all(sorted(part.train + part.validation) == data.train and part.test == [] for part in parts)
    fewer = replace(data, train=data.train[:3])  # what label_fraction leaves: the third part has no patient
    assert [(part.train, part.validation) for part in inner_data(fewer, inner)] == [
        ([data.train[2]], data.train[:2]), (data.train[:2], [data.train[2]]),
    ]
    with pytest.raises(DataError, match=r"nested needs at least two inner folds .*; there are 0\. Use selection: inner or last"):
        inner_data(replace(data, train=data.train[:2]), inner)
    with pytest.raises(DataError, match="validation parts of split.file's inner folds overlap"):
        inner_data(data, [inner[0], InnerFold(names[3:], names[:3])])


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


SETTINGS: dict[str, Any] = {
    "pretrain__method": "random", "finetune__epochs": 3, "finetune__trainable": "linear",
    "finetune__optimizer": {"name": "adam", "lr": 0.01, "schedule": "constant"},
}
NESTED = {**SETTINGS, "finetune__selection": "nested", "finetune__selection_metric": "loss"}


def result(folder: Path, config: Config) -> tuple[str, dict[str, Any], pd.DataFrame]:
    said = run_finetune_stage(config, "random", 0, 0)
    place = folder / "models/finetuned/random-seed0-fold0"
    return said, json.loads((place / "card.json").read_text()), pd.read_csv(place / "predictions.csv")


def test_stage__test_labels_change_nothing_and_every_training_patient_is_validated_once(project: Path) -> None:
    config, splits = make_project(project, **NESTED, finetune__grid=RATES)
    _, card, table = result(project, config)
    fold, raw = splits.fold(0), json.loads((project / "data/splits.json").read_text())
    raw["labels"] |= {video: "ab"[raw["labels"][video] == "a"] for video in fold.test}
    (project / "data/splits.json").write_text(json.dumps(raw))
    said, other, changed = result(project, config)
    assert "done" in said and other["nested"] == card["nested"] and other["selected_epoch"] == card["selected_epoch"]
    assert (changed[["part", "video", "frame", "p_a", "p_b"]] == table[["part", "video", "frame", "p_a", "p_b"]]).all().all()
    assert (changed[changed.part == "test"].label != table[table.part == "test"].label).all()
    held = table[table.part == "validation"]
    assert sorted(held.video.unique()) == sorted(fold.train) and not held.duplicated(["video", "frame"]).any()
    assert card["train_groups"] == card["validation_groups"] == splits.groups_of(fold.train)
    assert (card["selection"], card["grid"], card["stamp"]) == ("nested", RATES, None)
    assert [row["values"] for row in card["nested"]["candidates"]] == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.01}]
    assert card["nested"]["score"] == min(row["score"] for row in card["nested"]["candidates"])


def test_stage__refit_is_plain_training_on_the_whole_part_and_a_rerun_the_same(project: Path) -> None:
    config, splits = make_project(project, **NESTED)
    _, card, table = result(project, config)
    shutil.rmtree(project / ".scratch", ignore_errors=True)
    said, again, same = result(project, config)
    assert "done" in said and again["nested"] == card["nested"] and same.equals(table)
    assert "reused" in run_finetune_stage(config, "random", 0, 0)
    plain = make_config(project, **{**SETTINGS, "finetune__selection": "last", "finetune__epochs": card["selected_epoch"] + 1})
    _, last, alone = result(project, plain)
    assert last["train_groups"] == card["train_groups"]
    tested = table[table.part == "test"].reset_index(drop=True)
    pd.testing.assert_frame_equal(tested, alone[alone.part == "test"].reset_index(drop=True), rtol=0, atol=0)
    # The inner networks are those of `inner` on the same division: selection by the first inner fold alone gives its rows.
    single = make_config(project, **{**SETTINGS, "finetune__selection": "last", "finetune__epochs": card["selected_epoch"] + 1})
    first = replace(splits.fold(0), train=splits.fold(0).inner[0].train)
    replace(splits, folds=[first if fold.fold == 0 else fold for fold in splits.folds]).write(project / "unchecked.json")
    raw = json.loads((project / "unchecked.json").read_text())
    raw["folds"][0] |= {"test": sorted(first.test + splits.fold(0).inner[0].validation), "inner": []}
    raw["folds"] = raw["folds"][:1]
    raw["labels"] = {v: raw["labels"][v] for v in (*raw["folds"][0]["test"], *first.train)}
    (project / "data/splits.json").write_text(json.dumps(raw))
    held = table[(table.part == "validation") & table.video.isin(splits.fold(0).inner[0].validation)].set_index(["video", "frame"])
    own = result(project, single)[2].set_index(["video", "frame"]).loc[held.index]
    np.testing.assert_allclose(held.p_a, own.p_a, atol=1e-5)


def test_stage__frozen_features_are_computed_once_for_all_inner_folds_and_candidates(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, splits = make_project(project, **NESTED, finetune__grid=RATES)
    rendered: list[tuple[int, int, int]] = []
    render_views = Finetuning._render_views

    def counted(run: Finetuning, items: Any, epoch: int) -> np.ndarray:
        rendered.extend((*item, epoch) for item in items)
        return render_views(run, items, epoch)

    monkeypatch.setattr(Finetuning, "_render_views", counted)
    result(project, config)
    videos, turns, frames = len(splits.fold(0).train), config.finetune.cached_views, config.finetune.frames_per_video
    assert len(rendered) == len(set(rendered)) == videos * turns * frames


def test_stage__another_grid_is_another_result_and_says_what_it_chose(project: Path) -> None:
    config, _ = make_project(project, **NESTED, finetune__grid={"trainable": ["linear", "last_block"], "head": ["linear", "mlp"]})
    _, card, _ = result(project, config)
    chosen = card["nested"]["values"]
    assert len(card["nested"]["candidates"]) == 4 and (card["trainable"], card["head"]) == (chosen["trainable"], chosen["head"])
    said, other, _ = result(project, make_config(project, **NESTED, finetune__grid=RATES))
    assert "done" in said and other["fingerprint"] != card["fingerprint"]


def test_stage__labels_told_to_the_encoder_and_label_fraction(project: Path) -> None:
    config, splits = make_project(project, **NESTED, finetune__label_fraction=0.7)
    told_patient = splits.groups_of(splits.fold(0).inner[0].train)[0]
    write_encoder(project, config, splits, label_groups=[told_patient])
    with pytest.raises(LeakageError, match=r"read the labels of 1 inner validation patients of fold 0.* or use finetune\.selection: inner"):
        run_finetune_stage(config, "pretrained", 0, 0)
    inner = make_config(project, **SETTINGS)
    assert "done" in run_finetune_stage(inner, "pretrained", 0, 0), "the first inner fold's validation patients were not told"
    card = result(project, config)[1]
    assert set(card["train_groups"]) < set(splits.groups_of(splits.fold(0).train)) and card["validation_groups"] == card["train_groups"]


# --- the grid -------------------------------------------------------------------------------------------------------


def test_grid__every_combination_in_order_with_values_as_the_model_reads_them(tmp_path: Path) -> None:
    config = make_config(tmp_path, finetune__selection="nested", finetune__grid={"optimizer": {"lr": ["1e-2", 0.001]}, "head": ["linear", "mlp"]})
    found = candidates(config.finetune)
    assert [tuple(values.values()) for values, _ in found] == [(0.01, "linear"), (0.01, "mlp"), (0.001, "linear"), (0.001, "mlp")]
    assert [(recipe.optimizer.lr, recipe.head) for _, recipe in found] == [tuple(values.values()) for values, _ in found]
    assert {recipe.optimizer.name for _, recipe in found} == {config.finetune.optimizer.name} and list(found[0][0]) == ["optimizer.lr", "head"]
    assert candidates(make_config(tmp_path).finetune) == [({}, make_config(tmp_path).finetune)]


@pytest.mark.parametrize(
    ("grid", "selection", "message"),
    [
        (RATES, "inner", "finetune.grid: optimizer.lr to choose from, but finetune.selection is inner. Use selection: nested"),
        ({"optimizer.lrr": [1]}, "nested", "finetune.grid.optimizer.lrr: unknown key 'lrr'. Did you mean 'lr'? Allowed here: name, lr,"),
        ({"optimzer.lr": [1]}, "nested", "finetune.grid.optimzer.lr: unknown key 'optimzer'. Did you mean 'optimizer'?"),
        ({"lora_rank.x": [1]}, "nested", "finetune.grid.lora_rank.x: unknown key 'x'. What stands before the last dot is no section"),
        ({"optimizer.lr": [0.1, -1]}, "nested", "finetune.grid (optimizer.lr=-1): finetune.optimizer.lr: got -1; input should be greater than 0"),
        ({"optimizer.lr": []}, "nested", "finetune.grid.optimizer.lr: got []; at least one value is needed"),
        ({"optimizer.lr": [0.1, 0.1]}, "nested", "finetune.grid.optimizer.lr: got [0.1, 0.1]; every value may stand there once"),
        ({"optimizer.lr": 0.1}, "nested", "finetune.grid.optimizer.lr: got 0.1; input should be a valid list"),
        ([1], "nested", "finetune.grid: got [1]; input should be a valid dictionary"),
        ({"optimizer": [{}]}, "nested", "finetune.grid.optimizer: is a section; name single keys, such as optimizer.name"),
        ({"label_fraction": [0.5, 1]}, "nested", "finetune.grid.label_fraction: cannot be chosen by a grid"),
        ({"augmentation.resize": ["square"]}, "nested", "finetune.grid.augmentation.resize: cannot be chosen by a grid"),
        ({"optimizer.lr": [0.1], "optimizer.min_lr": [0.2]}, "nested", "min_lr (0.2) is above lr (0.1), so the rate would rise"),
        ({"epochs": list(range(1, 18)), "batch_size": list(range(1, 18))}, "nested", "finetune.grid: 289 combinations; allowed: 256."),
    ],
)  # fmt: skip
def test_grid__mistakes_are_said_before_anything_runs(tmp_path: Path, grid: Any, selection: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config(tmp_path, finetune__selection=selection, finetune__grid=grid)
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 2, "one problem, one line"


def test_preflight__parts_and_heads_of_candidates_and_methods_that_read_labels() -> None:
    def problems(**sections: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            check_named_files(Config.model_validate(sections))
        return str(refused.value)

    text = problems(finetune={"selection": "nested", "grid": {"trainable": ["linear", "layer9"], "head": ["linear", "linaer"]}})
    assert "'layer9' is no part of" in text and "unknown head 'linaer'" in text and text.startswith("params.yaml: 2 problems")
    nested = {"selection": "nested"}
    assert "pretrain.method uscl reads the labels of training patients" in problems(pretrain={"method": "uscl"}, finetune=nested)
    assert "data.group is frame" in problems(finetune=nested, data={"group": "frame"})
    for sections in (
        {"pretrain": {"method": "uscl"}, "methods": {"uscl": {}}, "finetune": {"selection": "inner"}},
        {"pretrain": {"method": "uscl"}, "finetune": {**nested, "initialisations": ["random"]}},
        {"pretrain": {"method": "ucl"}, "finetune": nested},
    ):
        check_named_files(Config.model_validate(sections))


def test_splits__stay_valid(tmp_path: Path) -> None:
    """The divisions nested selection relies on: validation parts of the inner folds are apart and make up the training part."""
    _, splits = make_project(tmp_path, **SETTINGS)
    for fold in Splits.read(tmp_path / "data/splits.json").folds:
        assert sorted(video for part in fold.inner for video in part.validation) == sorted(fold.train)
