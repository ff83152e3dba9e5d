"""Evaluation: every refusal by its message, exact numbers on hand-made predictions, stamps, baseline, files for DVC."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from fake_experiment import FakeExperiment
from sklearn.metrics import auc

from pipeline.errors import DataError, LeakageError
from pipeline.evaluation.evaluate import evaluate, headline_metrics, log_results
from pipeline.evaluation.predictions import check_items, read_items
from pipeline.tracking import NullTracker

FIRST = "pretrained-seed0-fold0"


@pytest.fixture
def fake(tmp_path):
    return FakeExperiment(tmp_path)


def check(fake: FakeExperiment) -> None:
    """Read and check all items without computing anything."""
    folders = [folder for folder in fake.folders if folder.is_dir()]
    check_items(read_items(folders), fake.splits, fake.config.finetune.initialisations, fake.config.finetune.seeds)


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


# refusals


def test_check__accepts_an_honest_experiment(fake):
    check(fake)


def test_leakage__test_group_in_training(fake):
    group = fake.splits.groups_of(fake.splits.folds[0].test)[0]
    fake.edit_card(FIRST, train_groups=[group, "P-other"])
    with pytest.raises(LeakageError, match=rf"{FIRST}, fold 0: test groups were seen in training: {group}"):
        check(fake)


def test_leakage__test_group_in_validation(fake):
    group = fake.splits.groups_of(fake.splits.folds[0].test)[1]
    fake.edit_card(FIRST, validation_groups=[group])
    with pytest.raises(LeakageError, match=rf"{FIRST}, fold 0: test groups were seen in validation: {group}"):
        check(fake)


def test_leakage__test_group_in_fold_scoped_pretraining(fake):
    groups = fake.splits.groups_of(fake.splits.folds[0].test)
    fake.edit_card(FIRST, pretrain_groups=groups)
    with pytest.raises(LeakageError, match=rf"seen in pretraining: {groups[0]}, {groups[1]}"):
        check(fake)


def test_leakage__card_that_hides_its_test_groups_is_found_by_the_split(fake):
    group = fake.splits.groups_of(fake.splits.folds[0].test)[0]
    fake.edit_card(FIRST, test_groups=[], train_groups=[group])
    with pytest.raises(LeakageError, match=group):
        check(fake)


def test_leakage__many_groups_are_cut_short(tmp_path):
    fake = FakeExperiment(tmp_path, patients=60)
    fake.edit_card(FIRST, train_groups=fake.splits.groups_of(fake.splits.folds[0].test))
    with pytest.raises(LeakageError, match="and 12 more"):
        check(fake)


def test_leakage__video_of_another_fold_predicted_as_test(fake):
    foreign = fake.splits.folds[1].test[0]

    def change(table):
        extra = table[table["part"] == "test"].iloc[:1].assign(
            video=foreign, label=fake.labels[foreign], patient=fake.groups[foreign], frame=99)
        return pd.concat([table, extra])

    fake.edit_table(FIRST, change)
    with pytest.raises(LeakageError, match=rf"{FIRST}, fold 0: video {foreign} \(groups {fake.groups[foreign]}\)"):
        check(fake)


def test_leakage__test_group_among_validation_rows(fake):
    def change(table):
        table.loc[(table["part"] == "test") & (table["frame"] == 0), "part"] = "validation"
        return table

    fake.edit_table(FIRST, change)
    with pytest.raises(LeakageError, match="test groups among the validation rows"):
        check(fake)


def test_refused__missing_fold_and_seed(tmp_path):
    fake = FakeExperiment(tmp_path, seeds=[0, 1])
    fake.folders = [folder for folder in fake.folders if not folder.name.endswith(("random-seed1-fold2", "pretrained-seed0-fold1"))]
    with pytest.raises(DataError, match="2 of 12 items .*pretrained-seed0-fold1, random-seed1-fold2"):
        check(fake)


def test_refused__video_missing_from_the_test_part(fake):
    gone = fake.splits.folds[0].test[0]
    fake.edit_table(FIRST, lambda table: table[table["video"] != gone])
    with pytest.raises(DataError, match=rf"{FIRST}, fold 0: no prediction for 1 of 8 test videos: {gone}"):
        check(fake)


def test_refused__video_not_in_the_split(fake):
    def change(table):
        return pd.concat([table, table[table["part"] == "test"].iloc[:1].assign(video="feedfeedfeedfeed")])

    fake.edit_table(FIRST, change)
    with pytest.raises(DataError, match="video feedfeedfeedfeed not in the split"):
        check(fake)


def test_refused__frame_predicted_twice(fake):
    fake.edit_table(FIRST, lambda table: pd.concat([table, table.iloc[:1]]))
    with pytest.raises(DataError, match="is predicted twice"):
        check(fake)


def test_refused__video_twice_in_one_seed(fake):
    folds = fake.splits.folds
    # The same test part under two fold numbers: only the count over folds can see it.
    folds[1] = type(folds[0])(1, folds[0].test, folds[0].train, folds[0].inner)
    source, target = fake.folder(FIRST), fake.folder("pretrained-seed0-fold1")
    for name in ("predictions.csv", "card.json"):
        (target / name).write_text((source / name).read_text())
    fake.edit_card(target.name, fold=1)
    fake.edit_table(target.name, lambda table: table.assign(fold=1))
    with pytest.raises(DataError, match=rf"pretrained-seed0-fold1: video .* was already predicted by {FIRST}"):
        items = read_items([source, target])
        check_items(items, type(fake.splits)(**{**fake.splits.__dict__, "folds": folds[:2]}), ["pretrained"], [0])


@pytest.mark.parametrize(("value", "message"), [("", "probabilities"), ("nan", "probabilities"), ("inf", "probabilities"),
                                                (-0.5, "probabilities"), (1.5, "probabilities"), (0.2, "sum to")])
def test_refused__what_is_no_probability(fake, value, message):
    def change(table):
        table = table.astype({"p_a": object})
        table.loc[2, "p_a"] = value
        table.loc[2, "p_b"] = 0.3
        return table

    fake.edit_table(FIRST, change)
    with pytest.raises(DataError, match=rf"{FIRST}/predictions.csv: row 4: .*{message}"):
        check(fake)


def test_refused__classes_differ_from_the_split(fake):
    fake.edit_card(FIRST, classes=["a", "c"])
    fake.edit_table(FIRST, lambda table: table.rename(columns={"p_b": "p_c"}))
    with pytest.raises(DataError, match=rf"{FIRST}: classes a, c differ from the split's a, b"):
        check(fake)


def test_refused__class_order_differs(fake):
    fake.edit_card(FIRST, classes=["b", "a"])
    with pytest.raises(DataError, match="columns .* wanted"):
        check(fake)


def test_refused__label_disagrees_with_the_split(fake):
    video = fake.splits.folds[0].test[0]

    def change(table):
        table.loc[table["video"] == video, "label"] = "b" if fake.labels[video] == "a" else "a"
        return table

    fake.edit_table(FIRST, change)
    with pytest.raises(DataError, match=rf"fold 0: video {video} is labelled '.', but the split says '{fake.labels[video]}'"):
        check(fake)


def test_refused__group_disagrees_with_the_split(fake):
    fake.edit_table(FIRST, lambda table: table.assign(patient="Pother"))
    with pytest.raises(DataError, match="is given to group 'Pother'"):
        check(fake)


@pytest.mark.parametrize(("column", "value", "message"), [
    ("init", "random", "card.json says 'pretrained'"), ("seed", 5, "column seed: got '5'"), ("fold", 2, "column fold: got '2'"),
    ("frame", "-1", "column frame: got '-1'"), ("part", "train", "allowed: test, validation"),
])
def test_refused__rows_of_another_item(fake, column, value, message):
    fake.edit_table(FIRST, lambda table: table.assign(**{column: value}))
    with pytest.raises(DataError, match=message):
        check(fake)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not a readable card"), ("[]", "expected an object"), ('{"schema": 2}', "card.json: "),
])
def test_refused__broken_card(fake, text, message):
    (fake.folder(FIRST) / "card.json").write_text(text)
    with pytest.raises(DataError, match=message):
        check(fake)


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe\x00", b"init,seed\n", b'a,"b\n'])
def test_refused__broken_table(fake, raw):
    (fake.folder(FIRST) / "predictions.csv").write_bytes(raw)
    with pytest.raises(DataError, match=f"{FIRST}/predictions.csv"):
        check(fake)


def test_refused__renamed_folder(fake):
    fake.folder(FIRST).rename(fake.folder("pretrained-seed0-fold9"))
    with pytest.raises(DataError, match="describes item 'pretrained-seed0-fold0'"):
        read_items([fake.folder("pretrained-seed0-fold9")])


def test_evaluate__nothing_to_judge(fake):
    with pytest.raises(DataError, match="no fine-tuned models"):
        evaluate(fake.config, [], fake.splits, None, fake.root / "out")


# numbers


def test_numbers__hand_made_case(fake):
    """12 patients (6 a, 6 b) with 2 videos: `pretrained` errs on both videos of one patient of class a and is else right."""
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
        assert metrics["majority"][level] == {"balanced_accuracy": 0.5, "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}
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


def test_numbers__same_bytes_twice(fake):
    run(fake)
    first = (fake.root / "reports/evaluate/metrics.json").read_bytes()
    run(fake)
    assert (fake.root / "reports/evaluate/metrics.json").read_bytes() == first


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
    places = [metrics["pretrained"], metrics["pretrained"]["video"], metrics["pretrained"]["folds"]["0"],
              metrics["pretrained"]["fold_mean"], metrics["random"]["frame"], metrics["difference"]["video"]]
    assert {place["stamp"] for place in places} == {"optimistic (selected on test)"}
    table = pd.read_csv(fake.root / "reports/evaluate/predictions_video.csv")
    assert set(table["stamp"]) == {"optimistic (selected on test)"}


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
    fake.config = fake.config.model_copy(update={"finetune": fake.config.finetune.model_copy(update={"initialisations": ["random"]})})
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, fake.root / "out")
    assert "pretrained" not in metrics
    assert "pretrained-seed0-fold0 is not asked for" in (fake.root / "out/report.html").read_text()


def test_files__tables_for_dvc(fake):
    metrics = run(fake)
    output = fake.root / "reports/evaluate"
    confusion = pd.read_csv(output / "confusion.csv")
    assert list(confusion.columns) == ["actual", "predicted"]
    counts = pd.crosstab(confusion["actual"], confusion["predicted"]).to_numpy().tolist()
    assert counts == metrics["pretrained"]["video"]["confusion"]
    roc = pd.read_csv(output / "roc.csv")
    area = roc[(roc["init"] == "pretrained") & (roc["class"] == "a")]
    assert auc(area["fpr"], area["tpr"]) == pytest.approx(metrics["pretrained"]["video"]["per_class"]["a"]["auroc"])
    folds = pd.read_csv(output / "folds.csv")
    assert len(folds) == 6 and {"init", "fold", "balanced_accuracy", "balanced_accuracy_low"} <= set(folds.columns)
    assert len(pd.read_csv(output / "predictions.csv")) == 2 * 24 * 4
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert {path.name for path in (output / "pictures").iterdir()} >= {
        "comparison.png", "confusion_pretrained.png", "confusion_random.png", "folds.png", "roc_pretrained.png"}


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
    assert parent == headline_metrics(metrics)
    assert parent["pretrained.video.balanced_accuracy"] == metrics["balanced_accuracy"]
    steps = [step for place, values, step in calls if place == "run" and "fold.pretrained.balanced_accuracy" in values]
    assert steps == [0, 1, 2]
