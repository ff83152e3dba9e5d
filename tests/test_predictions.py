"""Predictions that are refused, each by its message: leaks, missing or double videos, wrong labels, no probability."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from fake_experiment import FakeExperiment

from pipeline.errors import DataError, LeakageError
from pipeline.evaluation import predictions
from pipeline.evaluation.predictions import check_items, read_items

FIRST = "pretrained-seed0-fold0"


@pytest.fixture
def fake(tmp_path):
    return FakeExperiment(tmp_path)


def check(fake: FakeExperiment) -> None:
    """Read and check all items without computing anything."""
    folders = [folder for folder in fake.folders if folder.is_dir()]
    check_items(read_items(folders), fake.splits, fake.config.finetune.initialisations, fake.config.finetune.seeds)


def rows_of(fake: FakeExperiment) -> pd.DataFrame:
    """All test rows, as the evaluation takes them."""
    return predictions.test_rows(read_items(fake.folders), fake.splits)


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
        extra = (
            table[table["part"] == "test"]
            .iloc[:1]
            .assign(video=foreign, label=fake.labels[foreign], patient=fake.groups[foreign], frame=99)
        )
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
    fake.folders = [
        folder for folder in fake.folders if not folder.name.endswith(("random-seed1-fold2", "pretrained-seed0-fold1"))
    ]
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


# repeats and splits by frame


def test_repeats__a_video_is_tested_once_in_each(tmp_path):
    fake = FakeExperiment(tmp_path, repeats=2)
    check(fake)
    rows = rows_of(fake)
    assert list(rows.columns[:5]) == ["init", "seed", "fold", "repeat", "part"]
    assert (rows["repeat"] == rows["fold"] // 3).all() and set(rows["repeat"]) == {0, 1}
    assert (rows.groupby(["init", "repeat", "video"])["fold"].nunique() == 1).all()


def test_repeats__a_fold_that_tests_what_another_of_its_repeat_tests(tmp_path):
    fake = FakeExperiment(tmp_path, repeats=2)
    folds = fake.splits.folds
    folds[4] = type(folds[4])(4, folds[3].test, folds[3].train, folds[3].inner, 1)
    source, target = fake.folder("pretrained-seed0-fold3"), fake.folder("pretrained-seed0-fold4")
    for name in ("predictions.csv", "card.json"):
        (target / name).write_text((source / name).read_text())
    fake.edit_card(target.name, fold=4)
    fake.edit_table(target.name, lambda table: table.assign(fold=4))
    chosen = [folder for folder in fake.folders if folder.name.startswith("pretrained") and not folder.name.endswith("fold5")]
    with pytest.raises(DataError, match=r"pretrained-seed0-fold4: video .* was already predicted by pretrained-seed0-fold3; .* repeat"):
        check_items(read_items(chosen), replace(fake.splits, folds=folds[:5]), ["pretrained"], [0])


def test_repeats__missing_fold_of_a_later_repeat_is_named(tmp_path):
    fake = FakeExperiment(tmp_path, repeats=2)
    fake.folders = [folder for folder in fake.folders if folder.name != "random-seed0-fold5"]
    with pytest.raises(DataError, match="1 of 12 items .*random-seed0-fold5"):
        check(fake)


def test_frames__are_predicted_where_they_were_dealt_to_and_nowhere_else(tmp_path):
    fake = FakeExperiment(tmp_path, group="frame", frames=24)
    check(fake)
    rows = rows_of(fake)
    assert len(rows) == 2 * 24 * 24 and not rows.duplicated(["init", "video", "frame"]).any()

    def change(table):
        return table.assign(part=table["part"].where(table.index != 5, "validation"))

    fake.edit_table(FIRST, change)
    with pytest.raises(LeakageError, match=rf"{FIRST}, fold 0: frame \d+ of video \w+ is predicted as validation, but the split deals it to the test"):
        check(fake)
    fake.edit_table(FIRST, lambda table: table.assign(part=table["part"].where(table.index != len(table) - 1, "test")).drop(index=5))
    with pytest.raises(LeakageError, match="is predicted as test, but the split deals it to training"):
        check(fake)


def test_frames__only_a_split_by_frame_may_have_groups_on_both_sides(tmp_path):
    fake = FakeExperiment(tmp_path, group="frame", frames=24)
    with pytest.raises(LeakageError, match="test groups were seen in"):
        check_items(read_items(fake.folders), replace(fake.splits, group="patient"), ["pretrained", "random"], [0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "probabilities"),
        ("nan", "probabilities"),
        ("inf", "probabilities"),
        (-0.5, "probabilities"),
        (1.5, "probabilities"),
        (0.2, "sum to"),
    ],
)
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
    with pytest.raises(
        DataError, match=rf"fold 0: video {video} is labelled '.', but the split says '{fake.labels[video]}'"
    ):
        check(fake)


def test_refused__group_disagrees_with_the_split(fake):
    fake.edit_table(FIRST, lambda table: table.assign(patient="Pother"))
    with pytest.raises(DataError, match="is given to group 'Pother'"):
        check(fake)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("init", "random", "card.json says 'pretrained'"),
        ("seed", 5, "column seed: got '5'"),
        ("fold", 2, "column fold: got '2'"),
        ("frame", "-1", "column frame: got '-1'"),
        ("part", "train", "allowed: test, validation"),
    ],
)
def test_refused__rows_of_another_item(fake, column, value, message):
    fake.edit_table(FIRST, lambda table: table.assign(**{column: value}))
    with pytest.raises(DataError, match=message):
        check(fake)


def test_refused__different_recipes(fake):
    for folder in fake.folders:
        fake.edit_card(folder.name, backbone="resnet18" if folder.name == FIRST else "resnet10")
    with pytest.raises(DataError, match=rf'different backbone: "resnet18" \({FIRST}\), "resnet10"'):
        check(fake)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable card"),
        ("[]", "expected an object"),
        ('{"schema": 2}', "card.json: "),
    ],
)
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
