"""Evaluation: exact numbers on hand-made predictions, stamps, baseline, files for DVC."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_experiment import FakeExperiment
from sklearn.metrics import auc

from pipeline.data.manifest import Manifest
from pipeline.data.store import FrameStore
from pipeline.errors import DataError
from pipeline.evaluation.evaluate import evaluate, headline_metrics, log_results
from pipeline.evaluation.records import parent_metrics
from pipeline.tracking import NullTracker


@pytest.fixture
def fake(tmp_path):
    return FakeExperiment(tmp_path)


def with_answers(fake: FakeExperiment, init: str, answers) -> None:
    """Overwrite the probabilities of one initialisation by `answers(row) -> list of C numbers`."""
    columns = [f"p_{name}" for name in fake.classes]

    def change(table):
        table[columns] = [answers(row) for row in table.to_dict("records")]
        return table

    for fold in fake.splits.folds:
        for seed in fake.seeds:
            fake.edit_table(f"{init}-seed{seed}-fold{fold.fold}", change)


def run(fake: FakeExperiment, **changes):
    config = fake.config.model_copy(update={"finetune": fake.config.finetune.model_copy(update=changes)})
    return evaluate(config, fake.folders, fake.splits, None, fake.root / "reports/evaluate")


def test_evaluate__nothing_to_judge(fake):
    with pytest.raises(DataError, match="no fine-tuned models"):
        evaluate(fake.config, [], fake.splits, None, fake.root / "out")


@pytest.mark.parametrize(
    ("method", "init", "words"),
    [
        ("random", "imagenet", "nothing was pretrained (pretrain.method: random): `pretrained` stands for the ImageNet weights as they are"),
        ("random", "random", "`pretrained` stands for the random weights as they are"),
        ("ucl", "imagenet", "pretraining started from ImageNet weights, the comparison network from random ones"),
        ("ucl", "random", None),
    ],
)
def test_report__says_what_the_encoder_started_from(fake, method, init, words):
    config = fake.config.model_copy(update={"pretrain": fake.config.pretrain.model_copy(update={"method": method, "init": init})})
    evaluate(config, fake.folders, fake.splits, None, fake.root / "reports/evaluate")
    page = html.unescape((fake.root / "reports/evaluate/report.html").read_text(encoding="utf-8"))
    assert ("started from" in page or "nothing was pretrained" in page) is (words is not None)
    assert words is None or words in page
    assert ("learned on unlabelled video" in page) is (method == "ucl")
    network, column = {("random", "imagenet"): ("network from ImageNet weights", "ImageNet weights − random"), ("random", "random"): (
        "network from scratch", "From scratch − random")}.get((method, init), ("pretrained network", "Pretrained − random"))
    assert f"Balanced accuracy per video, {network}" in page and column in page and ("Pretrained − random" in page) is (method == "ucl")
    card = (fake.root / "reports/evaluate/model_card.md").read_text(encoding="utf-8")
    assert f"| Per video | {column.split(' −')[0]} | random |".lower() in card.lower() and "pretrained by random" not in card


# numbers


def test_numbers__hand_made_case(fake):
    """12 patients (6 a, 6 b) with 2 videos: `pretrained` errs on both videos of one patient of class a only."""
    lost = next(fake.groups[video] for video in fake.labels if fake.labels[video] == "a")

    def pretrained(row):
        right = row["patient"] != lost
        truth_first = (row["label"] == "a") == right
        return [0.75, 0.25] if truth_first else [0.25, 0.75]

    with_answers(fake, "pretrained", pretrained)
    with_answers(fake, "random", lambda row: [0.75, 0.25])
    metrics = run(fake)
    for level in ("frame", "video", "patient"):
        got = metrics["pretrained"][level]
        assert got["balanced_accuracy"] == pytest.approx((5 / 6 + 1) / 2)
        assert got["accuracy"] == pytest.approx(11 / 12)
        assert got["per_class"]["a"]["recall"] == pytest.approx(5 / 6)
        assert got["per_class"]["b"]["precision"] == pytest.approx(6 / 7)
        # 30 of 36 pairs ordered rightly, the 6 pairs (lost patient, b) tie with nothing but b: half credit.
        assert got["per_class"]["a"]["auroc"] == pytest.approx((5 * 6 + 0.5 * 6) / 36)
        assert got["balanced_accuracy_low"] <= got["balanced_accuracy"] <= got["balanced_accuracy_high"]
        assert metrics["random"][level]["balanced_accuracy"] == 0.5
        assert metrics["random"][level]["per_class"]["b"]["precision"] is None
        assert metrics["majority"][level] == {
            "balanced_accuracy": 0.5,
            "accuracy": 0.5,
            "macro_f1": pytest.approx(1 / 3),
        }
    assert metrics["pretrained"]["video"]["confusion"] == [[10, 2], [0, 12]]
    assert metrics["difference"]["video"]["balanced_accuracy"] == pytest.approx(5 / 12)
    assert 0 < metrics["difference"]["video"]["balanced_accuracy_p"] <= 1
    assert metrics["pretraining_gain"] == metrics["difference"]["video"]["balanced_accuracy"]
    values = [fold["balanced_accuracy"] for fold in metrics["pretrained"]["folds"].values()]
    assert sorted(values) == pytest.approx([0.75, 1, 1])
    assert metrics["pretrained"]["fold_mean"]["balanced_accuracy"] == pytest.approx(np.mean(values))
    assert metrics["pretrained"]["fold_mean"]["balanced_accuracy_sd"] == pytest.approx(np.std(values, ddof=1))
    assert metrics["headline"].startswith("Balanced accuracy per video 0.92 (95\u00a0% interval ")
    assert metrics["headline"].endswith("12 patients, 24 videos, 3 folds")


def test_numbers__no_error_gives_no_interval_of_width_zero(fake):
    with_answers(fake, "pretrained", lambda row: [1.0, 0.0] if row["label"] == "a" else [0.0, 1.0])
    metrics = run(fake)
    video = metrics["pretrained"]["video"]
    assert video["balanced_accuracy"] == 1 and video["balanced_accuracy_low"] is None
    assert "no interval: all patients gave the same result" in metrics["headline"]


def test_numbers__class_absent_in_a_fold(tmp_path):
    """Only fold 0 tests class b: the other folds score what they have, the pooled value counts both classes."""
    fake = FakeExperiment(tmp_path, classes=["a", "b"], patients=12)
    folds = fake.splits.folds
    only = [video for video in fake.labels if fake.labels[video] == "b"]
    parts = [[v for v in fold.test if fake.labels[v] == "a"] for fold in folds]
    parts[0] += only
    for number, test in enumerate(parts):
        folds[number] = type(folds[0])(number, sorted(test), sorted(set(fake.labels) - set(test)), [])
    fake.root = tmp_path / "again"
    fake.folders = fake._items()
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")
    fold = metrics["pretrained"]["folds"]["1"]
    assert fold["macro_auroc"] is None and math.isfinite(fold["balanced_accuracy"])
    assert metrics["pretrained"]["fold_mean"]["macro_auroc_folds"] == 1
    assert metrics["pretrained"]["video"]["per_class"]["b"]["support"] == len(only)
    assert "Fold 1 has no test video of b" in (tmp_path / "out/report.html").read_text()


def test_numbers__a_fixed_division_counts_those_it_tests(tmp_path):
    whole = FakeExperiment(tmp_path / "whole", patients=12, clips=2)
    given = replace(whole.splits, folds=whole.splits.folds[:1])
    fake = FakeExperiment(tmp_path / "fixed", given=given, params={"split": {"file": "official.json"}})
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")
    assert (metrics["patients"], metrics["videos"]) == (4, 8)
    assert "4 patients, 8 videos, 1 fold" in metrics["headline"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "mean ± SD" not in page and "All folds are pooled" not in page
    assert "A fixed division has one test part" in page and "Each fold tests other" not in page
    assert "one fixed division into training and test" in (tmp_path / "out/checklist.md").read_text(encoding="utf-8")


def test_numbers__seeds_are_averaged_and_their_spread_is_shown(tmp_path):
    fake = FakeExperiment(tmp_path, seeds=[0, 1])

    def answers(row):
        right = row["seed"] == 0
        return [1.0, 0.0] if (row["label"] == "a") == right else [0.0, 1.0]

    with_answers(fake, "pretrained", answers)
    metrics = run(fake)
    video = metrics["pretrained"]["video"]
    assert video["balanced_accuracy"] == 0.5
    assert video["balanced_accuracy_seed_sd"] == pytest.approx(np.std([0, 1], ddof=1))
    assert video["confusion"] == [[6, 6], [6, 6]]
    assert "mean of 2 seeds" in metrics["headline"]


def test_numbers__repeats_and_seeds_in_every_part_of_the_report(tmp_path):
    fake = FakeExperiment(
        tmp_path, patients=24, repeats=2, seeds=[0, 1], params={"evaluate": {"bootstrap": 200, "subgroups": ["short_side", "frames"], "explanations": 0}}
    )
    store = fake.store()
    low = {row.video for place, row in enumerate(store.manifest.rows) if place // 4 % 2}  # whole patients, both classes
    odd = {row.video for place, row in enumerate(store.manifest.rows) if place % 2}  # one video of every patient
    Manifest([
        replace(row, height=48 if row.video in low else 64, frames_decoded=5 if row.video in odd else 4) for row in store.manifest.rows
    ]).write(store.folder / "manifest.csv")
    out = tmp_path / "out"
    metrics = evaluate(fake.config, fake.folders, fake.splits, FrameStore(store.folder), out)
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))

    # Everything again from the rows that fine-tuning wrote: frames to videos, four judgements of every video, their means.
    frames = pd.concat([
        pd.read_csv(folder / "predictions.csv", dtype={"video": str}).query("init == 'pretrained' and part == 'test'") for folder in fake.folders
    ])
    frames["repeat"] = frames["fold"] // 3
    videos = frames.groupby(["seed", "repeat", "video", "label"], as_index=False)[["p_a", "p_b"]].mean()
    assert len(videos) == 4 * 48
    videos["right"] = np.where(videos["p_a"] >= videos["p_b"], "a", "b") == videos["label"]

    def mean_recall(part):
        runs = [run.groupby("label")["right"].mean().mean() for _, run in part.groupby(["seed", "repeat"])]
        return pytest.approx(np.mean(runs))

    assert metrics["pretrained"]["video"]["balanced_accuracy"] == mean_recall(videos)
    levels = metrics["subgroups"]["short_side"]["levels"]
    assert {name: (one["patients"], one["videos"]) for name, one in levels.items()} == {"48": (12, 24), "64": (12, 24)}
    assert levels["48"]["balanced_accuracy"] == mean_recall(videos[videos["video"].isin(low)])
    gap = levels["48"]["balanced_accuracy"] - levels["64"]["balanced_accuracy"]
    assert levels["48"]["comparison"]["difference"] == pytest.approx(gap)
    brier = ((videos["p_a"] - (videos["label"] == "a")) ** 2 + (videos["p_b"] - (videos["label"] == "b")) ** 2).mean()
    assert metrics["calibration"]["pretrained"]["before"]["brier"] == pytest.approx(brier)
    assert metrics["calibration"]["pretrained"]["items_calibrated"] == 12
    for values in (one for state in ("before", "after") for one in metrics["calibration"]["random"][state]["per_class"].values()):
        assert values["slope_low"] < values["slope"] < values["slope_high"] and values["intercept_low"] < values["intercept"] < values["intercept_high"]

    assert "3 folds × 2 repeats, mean of 2 seeds" in page
    assert "number of videos (mean of 2 seeds × 2 repeats)" in page and "in the group, all 2 seeds × 2 repeats counted" in page
    # Every patient has a video of either length, so nobody can change sides.
    reason = "no p value, because no two patients of the same classes lie wholly on different sides"
    assert [one["comparison"]["reason"] for one in metrics["subgroups"]["frames"]["levels"].values()] == [reason, reason]
    assert f"No value where there is a dash: 4, 5: {reason}." in page and "1 comparison could be tested" in page


def test_numbers__same_bytes_twice(fake):
    run(fake)
    names = ("metrics.json", "details.json", "predictions_video.csv", "pictures/curves_1_a.png")
    first = [(fake.root / "reports/evaluate" / name).read_bytes() for name in names]
    run(fake)
    assert [(fake.root / "reports/evaluate" / name).read_bytes() for name in names] == first


def test_numbers__one_initialisation_has_no_difference(tmp_path):
    fake = FakeExperiment(tmp_path, skill={"random": 1.0})
    metrics = run(fake)
    assert metrics["headline_init"] == "random" and "difference" not in metrics
    assert "Not asked" in (tmp_path / "reports/evaluate/report.html").read_text()


# stamps


def test_stamp__selected_on_test_is_on_every_number(fake):
    for folder in fake.folders:
        fake.edit_card(folder.name, selection="best_on_test", stamp="optimistic (selected on test)")
    metrics = run(fake)
    assert metrics["stamp"] == "optimistic (selected on test)" and "optimistic" in metrics["headline"]
    places = [
        metrics["pretrained"],
        metrics["pretrained"]["video"],
        metrics["pretrained"]["folds"]["0"],
        metrics["pretrained"]["fold_mean"],
        metrics["random"]["frame"],
        metrics["difference"]["video"],
    ]
    assert {place["stamp"] for place in places} == {"optimistic (selected on test)"}
    table = pd.read_csv(fake.root / "reports/evaluate/predictions_video.csv")
    assert set(table["stamp"]) == {"optimistic (selected on test)"}
    output = fake.root / "reports/evaluate"
    whole, short = (json.loads((output / name).read_text()) for name in ("details.json", "metrics.json"))
    assert {whole[part]["stamp"] for part in ("curves", "calibration", "shortcuts", "checklist")} == {short["calibration"]["stamp"]} == set(table["stamp"])
    # Files for `dvc plots` travel alone.
    found = {path.name: pd.read_csv(path) for path in output.glob("*.csv")}
    assert {"confusion.csv", "folds.csv", "roc.csv", "pr.csv", "calibration.csv", "calibration_all.csv", "decision_curve.csv"} <= set(found)
    assert all(set(one["stamp"]) == set(table["stamp"]) for one in found.values())


def test_stamp__transductive_touches_pretrained_only(fake):
    everyone = sorted(set(fake.groups.values()))
    for fold in fake.splits.folds:
        fake.edit_card(f"pretrained-seed0-fold{fold.fold}", pretrain_scope="all", pretrain_groups=everyone)
    metrics = run(fake)
    assert metrics["pretrained"]["stamp"] == metrics["difference"]["video"]["stamp"] == "transductive pretraining"
    assert metrics["random"]["stamp"] == ""
    assert "Transductive pretraining: the encoder has seen" in (fake.root / "reports/evaluate/report.html").read_text()


def test_stamp__pretraining_on_strangers_is_not_transductive(fake):
    for fold in fake.splits.folds:
        fake.edit_card(f"pretrained-seed0-fold{fold.fold}", pretrain_scope="all", pretrain_groups=["Pstranger"])
    assert run(fake)["stamp"] == ""


# files


def test_files__left_over_items_are_named_and_left_out(fake):
    fake.config = fake.config.model_copy(
        update={"finetune": fake.config.finetune.model_copy(update={"initialisations": ["random"]})}
    )
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, fake.root / "out")
    assert "pretrained" not in metrics
    assert "pretrained-seed0-fold0 is not asked for" in (fake.root / "out/report.html").read_text()


def test_files__tables_for_dvc(fake):
    metrics = run(fake)
    output = fake.root / "reports/evaluate"
    confusion = pd.read_csv(output / "confusion.csv")
    assert list(confusion.columns) == ["actual", "predicted", "stamp"]
    counts = pd.crosstab(confusion["actual"], confusion["predicted"]).to_numpy().tolist()
    assert counts == metrics["pretrained"]["video"]["confusion"]
    roc = pd.read_csv(output / "roc.csv")
    area = roc[(roc["init"] == "pretrained") & (roc["class"] == "a")]
    assert auc(area["fpr"], area["tpr"]) == pytest.approx(metrics["pretrained"]["video"]["per_class"]["a"]["auroc"])
    folds = pd.read_csv(output / "folds.csv")
    assert len(folds) == 6 and {"init", "fold", "balanced_accuracy", "balanced_accuracy_low"} <= set(folds.columns)
    assert len(pd.read_csv(output / "predictions.csv")) == 2 * 24 * 4
    assert json.loads((output / "details.json").read_text()) == metrics
    short = json.loads((output / "metrics.json").read_text())
    assert (
        short["pretrained"]["video"]["balanced_accuracy_low"] == metrics["pretrained"]["video"]["balanced_accuracy_low"]
    )
    assert short["pretraining_gain"] == metrics["pretraining_gain"] and "per_class" not in short["pretrained"]["video"]
    assert {path.name for path in (output / "pictures").iterdir()} >= {
        "comparison.png",
        "confusion_pretrained.png",
        "confusion_random.png",
        "folds.png",
        "curves_1_a.png",
    }


def test_files__hostile_numbers_of_class_name(tmp_path):
    fake = FakeExperiment(tmp_path, classes=["$\\frac{", "NA", "a,b"])
    metrics = run(fake)
    assert set(metrics["pretrained"]["video"]["per_class"]) == {"$\\frac{", "NA", "a,b"}


def test_tracking__headline_on_the_parent_and_folds_as_steps(fake):
    metrics = run(fake)
    calls = []

    class Recorder(NullTracker):
        def log_metrics(self, metrics, step=None):
            calls.append(("run", dict(metrics), step))

        def log_parent_metrics(self, metrics, step=None):
            calls.append(("parent", dict(metrics), step))

    log_results(Recorder("evaluate"), metrics, fake.root / "reports/evaluate")
    parent = next(values for place, values, _ in calls if place == "parent")
    own = next(values for place, values, _ in calls if place == "run")
    assert own == headline_metrics(metrics) and parent == parent_metrics(metrics)
    assert own["pretrained.video.balanced_accuracy"] == metrics["balanced_accuracy"] == pytest.approx(parent["balanced_accuracy"], abs=5e-5)
    steps = [step for place, values, step in calls if place == "run" and "fold.pretrained.balanced_accuracy" in values]
    assert steps == [0, 1, 2]


def test_tracking__phases_and_their_convention(fake):
    metrics = run(fake) | {"phases": {"random": {"convention": "union", "f1": 0.4, "pooled": {"macro_f1": 0.6}}}}
    tags = {}

    class Recorder(NullTracker):
        def set_parent_tags(self, values):
            tags.update(values)

    log_results(Recorder("evaluate"), metrics, fake.root / "reports/evaluate")
    assert tags["phases.convention"] == "union"
    found = headline_metrics(metrics)
    assert (found["phases.random.f1"], found["phases.random.pooled_macro_f1"]) == (0.4, 0.6)
    assert not any(name.startswith("phases") for name in headline_metrics({**metrics, "phases": {}}))
