"""Repeated divisions, splits by frame, divided patients: each is what it says, and says what it is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_splits import SMALL, SPEC, config, groups_apart, row, small_tests, table, video_id, write_split

from pipeline.data.manifest import Manifest, pseudonym
from pipeline.data.split_report import balance_rows, describe_folds, split_metrics, write_balance_plot
from pipeline.data.splits import FRAME_LEVEL, VIDEO_LEVEL, Fold, Splits
from pipeline.data.splitting import make_splits
from pipeline.errors import DataError, LeakageError
from pipeline.parameters import SplitParams


def repeated(folds: int = 3, repeats: int = 2, data: dict[str, Any] | None = None, **split: Any) -> Any:
    return config(folds * repeats, data, repeats=repeats, **split)


def only(splits: Splits, repeat: int) -> Splits:
    """One repeat as a split of its own."""
    own = [fold for fold in splits.folds if fold.repeat == repeat]
    return replace(splits, folds=[replace(fold, fold=number, repeat=0) for number, fold in enumerate(own)])


# --- repeats -------------------------------------------------------------------------------------------------------------


def test_repeats__each_is_a_full_division_of_its_own() -> None:
    splits = make_splits(table(SPEC), repeated(3, 3))
    assert (splits.repeats, splits.folds_per_repeat, splits.words) == (3, 3, "3 folds × 3 repeats")
    assert [fold.repeat for fold in splits.folds] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    divisions = set()
    for repeat in range(3):
        one = only(splits, repeat)
        one.check()
        groups_apart(one)
        divisions.add(frozenset(frozenset(fold.test) for fold in one.folds))
        assert all({splits.labels[video] for video in fold.test} == set(SPEC) for fold in one.folds)
    assert len(divisions) == 3
    assert Counter(video for fold in splits.folds for video in fold.test) == dict.fromkeys(splits.labels, 3)
    # The first repeat is what there is without repeats: results stay comparable and cached.
    assert only(splits, 0).folds == make_splits(table(SPEC), config(3)).folds


def test_repeats__written_read_and_given_back(tmp_path: Path) -> None:
    drawn = make_splits(table(SPEC), repeated())
    drawn.write(tmp_path / "splits.json")
    assert Splits.read(tmp_path / "splits.json") == drawn
    assert make_splits(table(SPEC), repeated(file=str(tmp_path / "splits.json"))).folds == drawn.folds
    raw = json.loads((tmp_path / "splits.json").read_text())
    for fold in raw["folds"]:
        del fold["repeat"]
    del raw["divided_patients"]
    (tmp_path / "old.json").write_text(json.dumps({**raw, "folds": raw["folds"][:3]}))
    old = Splits.read(tmp_path / "old.json")
    assert (old.repeats, old.stamp) == (1, "") and old.folds == only(drawn, 0).folds


def test_repeats__planted_faults_are_found() -> None:
    splits = make_splits(table(SPEC), repeated())
    doubled = [*splits.folds[:4], replace(splits.folds[3], fold=4), splits.folds[5]]
    with pytest.raises(DataError, match="is in no test fold of repeat 1"):
        replace(splits, folds=doubled).check()
    with pytest.raises(DataError, match=r"belong to repeats \[1, 1, 1, 0, 0, 0\]"):
        turned = [*splits.folds[3:], *splits.folds[:3]]
        replace(splits, folds=[replace(fold, fold=number) for number, fold in enumerate(turned)]).check()
    with pytest.raises(LeakageError, match="test of fold 3 .* test of fold 4"):
        more = replace(splits.folds[4], test=[*splits.folds[4].test, splits.folds[3].test[0]])
        more = replace(more, train=[video for video in more.train if splits.groups[video] != splits.groups[more.test[-1]]], inner=[])
        replace(splits, folds=[*splits.folds[:4], more, splits.folds[5]]).check()


@pytest.mark.parametrize(
    ("count", "repeats", "wanted"), [(5, 3, list(range(15))), (14, 3, list(range(15))), (3, 3, list(range(9))), (7, 2, list(range(8)))]
)
def test_repeats__the_error_says_the_right_list(count: int, repeats: int, wanted: list[int]) -> None:
    with pytest.raises(ValidationError) as error:
        SplitParams(folds=list(range(count)), repeats=repeats)
    assert f"write folds: {wanted}" in str(error.value) and f"it has {count}" in str(error.value)
    assert SplitParams(folds=wanted, repeats=repeats).per_repeat == len(wanted) // repeats


def test_repeats__equal_divisions_are_said() -> None:
    """Two patients a class in two folds: there are only two ways to divide them."""
    splits = make_splits(table({"a": [1, 1], "b": [1, 1]}), repeated(2, 4))
    assert any("divides the videos as repeat" in warning for warning in splits.warnings)
    assert not any("divides the videos as repeat" in warning for warning in make_splits(table(SPEC), repeated()).warnings)


def test_repeats__rare_classes_count_folds_of_one_repeat() -> None:
    splits = make_splits(table({**SPEC, "viral": [2, 1]}), repeated(2, 3))
    assert "viral" in splits.classes
    assert make_splits(table({**SPEC, "viral": [2, 1]}), repeated(3, 2)).excluded_classes == {"viral": "2 patients < 3 folds"}


def test_repeats__tables_picture_and_words_of_the_split_stage(tmp_path: Path) -> None:
    splits = make_splits(table(SPEC), repeated())
    rows = balance_rows(splits, dict.fromkeys(splits.groups, 10))
    assert {(r["fold"], r["repeat"]) for r in rows} == {(n, n // 3) for n in range(6)}
    metrics = split_metrics(splits, rows, 0)
    assert (metrics["folds"], metrics["repeats"], metrics["videos"], metrics["frames"]) == (3, 2, len(splits.labels), 10 * len(splits.labels))
    assert len(metrics["test"]) == 6
    assert "fold 5 (repeat 1): test" in describe_folds(splits, metrics) and "3 folds × 2 repeats" in describe_folds(splits, metrics)
    write_balance_plot(tmp_path / "balance.png", rows, splits.classes, "patient")
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")


# --- given splits --------------------------------------------------------------------------------------------------------


def test_given__repeats_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    other = [["a-0-0.mp4", "b1"], ["a1", "b-2-0.mp4"], ["a2", "b-0-0.mp4"]]
    path = write_split(tmp_path / "s.json", [{"test": entries} for entries in [*small_tests(), *other]])
    splits = make_splits(table(SMALL), repeated(file=path))
    assert [fold.repeat for fold in splits.folds] == [0, 0, 0, 1, 1, 1] and all(fold.inner for fold in splits.folds)
    groups_apart(only(splits, 1))
    with pytest.raises(DataError, match=r"has 6 folds and split.folds has 3; set split.folds to \[0, 1, 2, 3, 4, 5\]"):
        make_splits(table(SMALL), config(3, file=path))
    with pytest.raises(DataError, match=r"tested more than once of repeat 1: .*b-1-0.mp4 \(folds 3, 4\)"):
        other[1][1] = "b1"
        make_splits(table(SMALL), repeated(file=write_split(tmp_path / "t.json", [{"test": e} for e in [*small_tests(), *other]])))
    told = [{"test": entries, "repeat": 0} for entries in [*small_tests(), *other]]
    with pytest.raises(DataError, match=r"say that they belong to repeats \[0, 0, 0, 0, 0, 0\], and split.repeats is 2"):
        make_splits(table(SMALL), repeated(file=write_split(tmp_path / "u.json", told)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: (t[2].clear(), t[2].extend(["b2", "a-2-0.mp4"]), t[0].append("a-2-1.mp4")), LeakageError, pseudonym("a2", "")),
        (lambda t: t[0].remove("a-0-0.mp4"), DataError, r"1 of 7 labelled videos are in no test fold: a-0-0.mp4 \(a\)"),
        (lambda t: t[1].append("a-0-0.mp4"), DataError, r"1 videos are tested more than once: a-0-0.mp4 \(folds 0, 1\)"),
        (lambda t: t[0].append("a-0-0.mp4"), DataError, "fold 0 test: 'a-0-0.mp4' is listed twice"),
        (lambda t: t[0].append("a-7-0.mp4"), DataError, "'a-7-0.mp4' is unknown. Did you mean 'a-"),
    ],
    ids=["divides a patient", "misses a video", "tests a video twice", "lists a video twice", "names an unknown one"],
)
def test_given__each_mistake_is_refused_with_names(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    tests = small_tests()
    change(tests)
    with pytest.raises(error, match=message):
        make_splits(table(SMALL), config(3, file=write_split(tmp_path / "s.json", [{"test": entries} for entries in tests])))


def test_given__fixed_division_with_a_validation_part(tmp_path: Path) -> None:
    """The form of official splits such as Cholec80's 40/8/32: one fold, its validation part as the inner fold."""
    train, held, test = (["a0", "a1", "b0", "b1"], ["a2", "b2"], ["a3", "b3"])
    manifest = table({"a": [1, 2, 1, 1], "b": [1, 1, 1, 2]})
    path = write_split(tmp_path / "s.json", [{"test_patients": test, "train": [*train, *held], "inner": [{"validation": held}]}])
    splits = make_splits(manifest, config(1, file=path))
    fold, = splits.folds
    assert splits.groups_of(fold.test) == sorted(pseudonym(name, "") for name in test)
    part, = fold.inner
    assert splits.groups_of(part.validation) == sorted(pseudonym(name, "") for name in held)
    assert splits.groups_of(part.train) == sorted(pseudonym(name, "") for name in train)
    with pytest.raises(LeakageError, match="inner fold 0 of fold 0|training of fold 0"):
        bad = [{"test_patients": test, "train": [*train, *held], "inner": [{"validation": ["a3"]}]}]
        make_splits(manifest, config(1, file=write_split(tmp_path / "t.json", bad)))


# --- frames and divided patients -----------------------------------------------------------------------------------------


def by_frame(folds: int = 3, repeats: int = 1, **more: Any) -> Any:
    return config(folds * repeats, {"group": "frame", **more}, repeats=repeats)


def test_frame__every_frame_is_tested_once_a_repeat_and_never_trained_on_there() -> None:
    splits = make_splits(table(SPEC, frames=30), by_frame(3, 2))
    assert splits.stamp == FRAME_LEVEL and splits.by_frame and "data.group is frame" in "".join(splits.warnings)
    for video in list(splits.labels)[:5]:
        for repeat in range(2):
            tested: list[int] = []
            for fold in splits.folds[3 * repeat : 3 * repeat + 3]:
                parts = {part: splits.frames_of(fold, part, video, 30) for part in ("train", "validation", "test")}
                assert sorted(sum(parts.values(), [])) == list(range(30))
                assert sorted([*parts["train"], *parts["validation"]]) == splits.frames_of(fold, "train", video, 30, None)
                assert splits.frames_of(fold, "validation", video, 30, None) == []
                tested += parts["test"]
            assert sorted(tested) == list(range(30))
    counts = Counter(splits.part_of_frame(splits.folds[0], video, frame) for video in splits.labels for frame in range(30))
    assert 0.28 < counts["test"] / counts.total() < 0.39, "a third, give or take the dealing"
    first, second = (splits.frames_of(splits.folds[number], "test", min(splits.labels), 30) for number in (0, 3))
    assert first != second, "another repeat deals anew"
    other = make_splits(table(SPEC, frames=30), by_frame(3, 2).model_copy(update={"split": by_frame(3, 2).split.model_copy(update={"seed": 1})}))
    assert other.frames_of(other.folds[0], "test", min(splits.labels), 30) != first


def test_frame__written_read_and_patients_are_what_is_resampled(tmp_path: Path) -> None:
    splits = make_splits(table(SPEC, frames=30), by_frame())
    splits.write(tmp_path / "splits.json")
    again = Splits.read(tmp_path / "splits.json")
    assert again == splits and again.stamp == FRAME_LEVEL
    assert set(splits.groups.values()) == set(make_splits(table(SPEC), config(3)).groups.values())
    assert splits.pretraining_videos(0) == splits.pretraining_videos(None), "pretraining sees all videos, test ones too"


def test_frame__stills_are_dealt_whole() -> None:
    splits = make_splits(table({"a": [40], "b": [40]}, frames=1), by_frame(2))
    tests = [set(fold.test) for fold in splits.folds]
    assert not tests[0] & tests[1] and tests[0] | tests[1] == set(splits.labels)
    assert all(set(fold.train) == set(splits.labels) - set(fold.test) for fold in splits.folds)


def test_frame__refused_for_stretches_given_splits_and_one_frame_too_few(tmp_path: Path) -> None:
    stretch = Manifest([replace(one, kind="stretch") for one in table(SPEC).rows])
    with pytest.raises(DataError, match="data.group: frame is for videos with one label each"):
        make_splits(stretch, by_frame())
    path = write_split(tmp_path / "s.json", [{"test": entries} for entries in small_tests()])
    both = by_frame().model_copy(update={"split": by_frame().split.model_copy(update={"file": path})})
    with pytest.raises(DataError, match="split.file divides videos"):
        make_splits(table(SMALL), both)
    with pytest.raises(DataError, match=r"at least 3 frames each \(one a fold\); usable: b"):
        make_splits(table({"a": [1], "b": [9]}, frames=2), by_frame())


def test_group_patient__edited_to_frame_in_the_file_is_stamped(tmp_path: Path) -> None:
    """What a split by frame says of itself cannot be taken off without the split being checked as one of patients."""
    splits = make_splits(table(SPEC, frames=30), by_frame())
    with pytest.raises(LeakageError, match="two sides"):
        replace(splits, group="patient").check()
    assert replace(make_splits(table(SPEC), config(3)), group="frame").stamp == FRAME_LEVEL


def test_group_video__stamped_only_where_known_patients_are_divided() -> None:
    divided = make_splits(table({"a": [6], "b": [6]}), config(3, {"group": "video"}))
    assert divided.stamp == VIDEO_LEVEL and divided.divided_patients == 2
    assert any("2 known patients have videos on both sides" in warning for warning in divided.warnings)
    unknown = Manifest([row(f"{label}{n}", "", label) for label in "ab" for n in range(6)])
    alone = make_splits(unknown, config(3, {"group": "video"}))
    assert alone.stamp == "" and "data.group is video" in alone.warnings[0]
    single = make_splits(table({"a": [1] * 6, "b": [1] * 6}), config(3, {"group": "video"}))
    assert single.stamp == "", "one video a patient: nobody is divided"
    assert make_splits(table(SPEC), config(3)).stamp == ""


# --- bad input -----------------------------------------------------------------------------------------------------------


def test_one_patient_classes__are_left_out_or_named() -> None:
    manifest = table({**SPEC, "lonely": [7]})
    splits = make_splits(manifest, config(3))
    assert splits.excluded_classes == {"lonely": "1 patient < 3 folds"} and "lonely" not in splits.labels.values()
    with pytest.raises(DataError, match=r"class lonely \(1 patient < 3 folds\): too few patients for every fold"):
        make_splits(manifest, config(3, rare_classes="fail"))
    with pytest.raises(DataError, match="classification needs 2 classes"):
        make_splits(table({"a": [9], "b": [9]}), config(3))


def test_class_absent_from_a_given_fold__is_said(tmp_path: Path) -> None:
    manifest = table({"a": [1] * 4, "b": [1] * 4})
    path = write_split(tmp_path / "s.json", [{"test": ["a0", "a1"]}, {"test": ["a2", "b0", "b1"]}, {"test": ["a3", "b2", "b3"]}])
    splits = make_splits(manifest, config(3, file=path))
    assert "fold 0: class b is absent from the test part" in splits.warnings
    assert video_id("b-0-0") in splits.folds[0].train and isinstance(splits.folds[0], Fold)
