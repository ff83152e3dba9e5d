"""Folds: nothing leaks, classes are spread as evenly as they can be, and every mistake is named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.data.folds import assign_folds, imbalance
from pipeline.data.manifest import Manifest, VideoRow, pseudonym, write_hints
from pipeline.data.split_report import balance_rows, describe_warnings
from pipeline.data.splits import Fold, InnerFold, Splits
from pipeline.data.splitting import make_splits
from pipeline.errors import ConfigError, DataError, LeakageError
from pipeline.evaluation.content import data_tables


def video_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def row(
    name: str, patient: str = "", label: str = "", frames: int = 10, warnings: str = "", source: str = "main"
) -> VideoRow:
    """One manifest row; `patient` is the id of the labels table."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return VideoRow(
        video=digest[:16],
        source=source,
        path=f"{name}.mp4",
        sha256=digest,
        patient=pseudonym(patient, ""),
        label=label,
        kind="video",
        frames=frames,
        frames_decoded=frames,
        frames_claimed=frames,
        fps=10.0,
        fps_source="container",
        width=64,
        height=64,
        stored_width=64,
        stored_height=64,
        channels=1,
        bytes=1,
        warnings=warnings,
    )


def table(spec: dict[str, list[int]], **more: Any) -> Manifest:
    """`{class: [videos of patient 0, videos of patient 1, ...]}`; no person has two classes."""
    return Manifest(
        [
            row(f"{label}-{patient}-{number}", f"{label}{patient}", label, **more)
            for label, counts in spec.items()
            for patient, count in enumerate(counts)
            for number in range(count)
        ]
    )


def config(folds: int = 3, data: dict[str, Any] | None = None, **split: Any) -> Config:
    return Config.model_validate({"data": data or {}, "split": {"folds": list(range(folds)), **split}})


SPEC = {"covid": [3, 1, 2, 1, 4], "pneumonia": [1] * 9, "regular": [2, 5, 1, 1, 3, 1, 2]}


def groups_apart(splits: Splits) -> None:
    """The slow, obvious check, independent of `Splits.check`."""
    for fold in splits.folds:
        test, train = ({splits.groups[video] for video in part} for part in (fold.test, fold.train))
        assert not test & train and sorted([*fold.test, *fold.train]) == sorted(splits.labels)
        assert not test & {splits.groups[video] for video in splits.pretraining_videos(fold.fold)}
        for inner in fold.inner:
            assert not {splits.groups[v] for v in inner.train} & {splits.groups[v] for v in inner.validation}
            assert sorted([*inner.train, *inner.validation]) == sorted(fold.train)
    tested = sorted(video for fold in splits.folds for video in fold.test)
    assert tested == sorted(splits.labels)


@pytest.mark.parametrize("seed", range(3))
def test_make_splits__every_class_everywhere_and_nothing_shared(seed: int) -> None:
    splits = make_splits(table(SPEC), config(5, seed=seed))
    groups_apart(splits)
    for fold in splits.folds:
        parts = [fold.test, fold.train, *[part for inner in fold.inner for part in (inner.train, inner.validation)]]
        assert all({splits.labels[video] for video in part} == set(SPEC) for part in parts)
    # 9 pneumonia patients over 5 folds: 2 2 2 2 1; 5 covid patients: one each.
    rows = balance_rows(splits, dict.fromkeys(splits.groups, 10))
    counts = {name: sorted(r["patients"] for r in rows if r["part"] == "test" and r["class"] == name) for name in SPEC}
    assert counts == {"covid": [1] * 5, "pneumonia": [1, 2, 2, 2, 2], "regular": [1, 1, 1, 2, 2]}
    assert sum(r["frames"] for r in rows if r["part"] == "test") == 10 * len(splits.labels)
    assert splits.warnings == [] or all("inner" in warning for warning in splits.warnings)


def test_make_splits__deterministic_by_seed_and_independent_of_row_order() -> None:
    manifest = table(SPEC)
    one, again = make_splits(manifest, config(3)), make_splits(Manifest(manifest.rows[::-1]), config(3))
    assert one == again
    assert one.folds != make_splits(manifest, config(3, seed=1)).folds


def test_make_splits__patient_with_two_classes_stays_whole() -> None:
    manifest = Manifest([*table(SPEC).rows, *[row(f"both-{n}", "covid0", "regular") for n in range(3)]])
    splits = make_splits(manifest, config(3))
    groups_apart(splits)
    home = [
        fold.fold for fold in splits.folds for video in fold.test if splits.groups[video] == pseudonym("covid0", "")
    ]
    assert len(home) == 6 and len(set(home)) == 1


def test_assign_folds__beats_random_and_is_optimal_on_an_easy_case() -> None:
    assert imbalance(np.eye(2, dtype=int).repeat(6, 0), assign_folds(np.eye(2, dtype=int).repeat(6, 0), 3, 0), 3) < 1e-9
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 4, (40, 3)) + np.eye(3, dtype=int)[rng.integers(0, 3, 40)]
    ours = imbalance(videos, assign_folds(videos, 5, 0), 5)
    assert ours < min(imbalance(videos, rng.integers(0, 5, 40), 5) for _ in range(500)) / 5


def test_assign_folds__sole_carriers_spread_although_large_groups_pull() -> None:
    videos = np.array([[50, 0], [1, 0], [1, 0], [0, 1], [0, 40], [0, 1], [0, 2]])
    fold_of = assign_folds(videos, 3, 0)
    for fold in range(3):
        assert (videos[fold_of == fold].sum(0) > 0).all()


def test_rare_class__excluded_with_reason_or_refused_with_counts() -> None:
    manifest = table({**SPEC, "viral": [2, 1]})
    splits = make_splits(manifest, config(3))
    assert splits.excluded_classes == {"viral": "2 patients < 3 folds"}
    assert any("viral is excluded" in warning for warning in splits.warnings)
    assert set(splits.unlabelled) == {r.video for r in manifest.rows if r.label == "viral"}
    # Excluded videos still serve pretraining, wherever their patient is not tested.
    assert set(splits.unlabelled) <= set(splits.pretraining_videos(0))
    with pytest.raises(DataError, match=r"viral \(2 patients < 3 folds\).*covid: 5 patients.*fewer split.folds"):
        make_splits(manifest, config(3, rare_classes="fail"))


def test_classes__chosen_unknown_too_few_or_no_labels() -> None:
    splits = make_splits(table(SPEC), config(3, {"classes": ["regular", "covid"]}))
    assert splits.classes == ["regular", "covid"] and splits.excluded_classes == {
        "pneumonia": "not in the chosen classes"
    }
    with pytest.raises(DataError, match="data.classes: no video has label 'covd'.*Did you mean 'covid'"):
        make_splits(table(SPEC), config(3, {"classes": ["covd", "regular"]}))
    with pytest.raises(
        DataError, match="2 classes with at least 3 patients each.*usable: regular.*regular: 4 patients"
    ):
        make_splits(table({"regular": [1] * 4}), config(3))
    with pytest.raises(DataError, match="usable: none.*Found: covid: 1 patient, regular: 2 patients"):
        make_splits(table({"regular": [1] * 2, "covid": [7]}), config(3))
    with pytest.raises(DataError, match="no video of .* has a label"):
        make_splits(Manifest([row("a", "p"), row("b")]), config(3))


def test_inner_folds__fewer_with_warning_pinned_carrier_and_none_at_all() -> None:
    splits = make_splits(table({"a": [1] * 3, "b": [1] * 9}), config(3, inner_folds=3))
    assert all(len(fold.inner) == 2 for fold in splits.folds)
    assert any("2 inner folds instead of 3, because class a has only 2 training patients" in w for w in splits.warnings)
    # With two folds a class of two patients has one on each side: it must train, and validation does without.
    pinned = make_splits(table({"a": [1] * 2, "b": [1] * 8}), config(2, inner_folds=2))
    for fold in pinned.folds:
        assert all("a" in {pinned.labels[video] for video in inner.train} for inner in fold.inner)
    assert any("class a is absent from the validation part" in warning for warning in pinned.warnings)
    bare = make_splits(table({"a": [1] * 2, "b": [1] * 2}), config(2))
    assert all(fold.inner == [] for fold in bare.folds)
    assert any("finetune.selection: last" in warning for warning in bare.warnings)


def test_unknown_patients__own_group_for_labelled_blocked_for_unlabelled() -> None:
    manifest = Manifest([*table(SPEC).rows, row("lonely", "", "covid"), row("stray"), row("known", "covid1")])
    splits = make_splits(manifest, config(3))
    assert splits.groups[video_id("lonely")] == "V" + video_id("lonely")
    assert splits.unlabelled_blocked == [video_id("stray")]
    assert any("1 of 36 labelled videos have no patient" in w and video_id("lonely") in w for w in splits.warnings)
    for fold in splits.folds:
        seen = splits.pretraining_videos(fold.fold)
        tested = pseudonym("covid1", "") in splits.groups_of(fold.test)
        assert video_id("stray") not in seen and (video_id("known") in seen) != tested
    assert video_id("stray") in splits.pretraining_videos(None)


def test_unknown_patients__stand_apart_with_the_columns_found(tmp_path: Path) -> None:
    manifest = Manifest([*table(SPEC).rows, row("lonely", "", "covid"), row("stray")])
    splits = make_splits(manifest, config(3))
    assert "\nWARNING: 1 of 36 labelled videos have no patient" in describe_warnings(splits, tmp_path), "a store without hints"
    write_hints(tmp_path, {"patient": "labels.csv: no column is taken for the patient (columns found: path, label, person)"})
    lines = describe_warnings(splits, tmp_path).splitlines()
    (place,) = (place for place, line in enumerate(lines) if line.startswith("WARNING: "))
    assert lines[place].endswith("(columns found: path, label, person)") and lines[place + 1] == ""
    assert any(line.startswith("warning: 1 unlabelled videos have no patient") for line in lines)
    assert not any("labels.csv" in warning for warning in splits.warnings), "what is shared says nothing of the table"


def test_report__says_which_unlabelled_videos_serve_pretraining() -> None:
    """Three of two known patients do; two strays are nobody, and serve only where the encoder may see everything."""
    unlabelled = [row("u0", "covid1"), row("u1", "covid1"), row("u2", "new"), row("s0"), row("s1")]
    splits = make_splits(Manifest([*table(SPEC).rows, *unlabelled]), config(3))
    videos = data_tables(splits, None, "patient")[0]
    assert [line[:3] for line in videos.rows[3:]] == [
        ["without label (pretraining only)", 2, 3], ["without label or patient (left out of pretraining)", "–", 2],
    ]
    assert "might show a test patient" in videos.note
    everything = data_tables(splits, None, "patient", [SimpleNamespace(card=SimpleNamespace(pretrain_scope="all", model_extra={}))])[0]
    assert [line[:3] for line in everything.rows[3:]] == [["without label (pretraining only)", 2, 5]] and everything.note == ""


def test_group_video__divides_patients_and_says_so() -> None:
    splits = make_splits(table({"a": [6], "b": [6]}), config(3, {"group": "video"}))
    assert "data.group is video" in splits.warnings[0] and len(set(splits.groups.values())) == 12
    groups_apart(splits)


def test_near_duplicates__join_patients_chains_and_other_sources() -> None:
    manifest = table(SPEC)
    extra = {
        "wild": Manifest(
            [row("wild-1", source="wild"), row("wild-2", source="wild"), row("pneumonia-0-0", "x9", source="wild")]
        )
    }
    pairs = [
        (video_id("covid-0-0"), video_id("regular-1-0")),
        (video_id("regular-1-1"), video_id("pneumonia-3-0")),
        (video_id("wild-1"), video_id("covid-3-0")),
    ]
    splits = make_splits(manifest, config(3), pairs, extra)
    joined = {splits.groups[video_id(name)] for name in ("covid-0-2", "regular-1-4", "pneumonia-3-0")}
    assert joined == {min(pseudonym(name, "") for name in ("covid0", "regular1", "pneumonia3"))}
    assert sum("near-duplicate videos" in warning for warning in splits.warnings) == 3
    groups_apart(splits)
    # The copy in the other source carries the group of the main one, and the identical file counts once.
    assert splits.groups[video_id("wild-1")] == pseudonym("covid3", "")
    assert splits.groups[video_id("pneumonia-0-0")] == pseudonym("pneumonia0", "")
    for fold in splits.folds:
        wild = splits.pretraining_videos(fold.fold, "wild")
        assert video_id("wild-2") in wild
        assert (video_id("wild-1") in wild) == (video_id("covid-3-0") not in fold.test)
        assert (video_id("pneumonia-0-0") in wild) == (video_id("pneumonia-0-0") not in fold.test)
    with pytest.raises(ConfigError, match="'wold' was not split; known: main, wild"):
        splits.pretraining_videos(0, "wold")


def test_identical_content__under_two_patients_joins_both() -> None:
    first, second = sorted(pseudonym(name, "") for name in ("covid0", "regular0"))
    rows = table(SPEC).rows
    shared = replace(
        row("same", "", "covid"), patient=first, warnings=f"x; same content under two patients: {first} {second}"
    )
    splits = make_splits(Manifest([*rows, shared]), config(3))
    assert splits.groups[video_id("covid-0-0")] == splits.groups[video_id("regular-0-0")] == first


def write_split(path: Path, folds: list[dict[str, Any]], **more: Any) -> str:
    path.write_text(json.dumps({"folds": folds, **more}))
    return str(path)


SMALL = {"a": [1, 1, 2], "b": [1, 1, 1]}


def small_tests() -> list[list[str]]:
    """One valid split of SMALL: by path, by video id, and by patient id and pseudonym."""
    return [
        ["a-0-0.mp4", "./b-0-0.mp4"],
        [video_id("a-1-0"), video_id("b-1-0")],
        ["a2", pseudonym("b2", "")],
    ]


def test_split_file__all_kinds_of_entries(tmp_path: Path) -> None:
    path = write_split(tmp_path / "s.json", [{"test": entries} for entries in small_tests()])
    splits = make_splits(table(SMALL), config(3, file=path))
    groups_apart(splits)
    assert [len(fold.test) for fold in splits.folds] == [2, 2, 3] and all(fold.inner for fold in splits.folds)


def test_split_file__own_schema_comes_back_unchanged(tmp_path: Path) -> None:
    drawn = make_splits(table(SPEC), config(3, seed=7))
    drawn.write(tmp_path / "splits.json")
    assert Splits.read(tmp_path / "splits.json") == drawn
    given = make_splits(table(SPEC), config(3, seed=7, file=str(tmp_path / "splits.json")))
    assert given.folds == drawn.folds


def test_split_file__patient_on_two_sides_is_named(tmp_path: Path) -> None:
    tests = small_tests()
    tests[2] = ["b2", "a-2-0.mp4"]
    tests[0].append("a-2-1.mp4")
    path = write_split(tmp_path / "s.json", [{"test": entries} for entries in tests])
    with pytest.raises(LeakageError) as error:
        make_splits(table(SMALL), config(3, file=path))
    for text in (pseudonym("a2", ""), video_id("a-2-0"), video_id("a-2-1"), "fold 0"):
        assert text in str(error.value)


def test_split_file__near_duplicates_across_folds_are_leakage(tmp_path: Path) -> None:
    path = write_split(tmp_path / "s.json", [{"test": entries} for entries in small_tests()])
    with pytest.raises(LeakageError, match="two sides"):
        make_splits(table(SMALL), config(3, file=path), [(video_id("a-0-0"), video_id("b-1-0"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[0].append("a-9-0.mp4"),
            r"1 entries cannot be used\n  fold 0 test: 'a-9-0.mp4' is unknown. Did you mean 'a-",
        ),
        (lambda t: t[0].remove("a-0-0.mp4"), r"1 of 7 labelled videos are in no test fold: a-0-0.mp4 \(a\)"),
        (lambda t: t[1].clear(), "fold 1 has no labelled test video"),
        (lambda t: t[0].append("plain.mp4"), "'plain.mp4' has no label"),
        (lambda t: t.pop(), r"has 2 folds and split.folds has 3; set split.folds to \[0, 1\]"),
    ],
)
def test_split_file__mistakes_are_named(tmp_path: Path, change: Any, message: str) -> None:
    tests = small_tests()
    change(tests)
    path = write_split(tmp_path / "s.json", [{"test": entries} for entries in tests])
    with pytest.raises(DataError, match=message):
        make_splits(Manifest([*table(SMALL).rows, row("plain", "a0")]), config(3, file=path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ('{"folds": ' + "9" * 5000 + "}", "not readable JSON|must look like"),
        ("[]", "must look like"),
        ('{"folds": [1, 2, 3]}', "needs one of the keys test"),
        ('{"folds": [{"test": "a"}, {}, {}]}', "must be a list of paths"),
        ('{"folds": [{"test": []}, {"train": []}, {}]}', r"folds\[1\] needs one of the keys"),
        (
            '{"folds": [{"test": []}, {"test_patients": [], "train_patients": []}, {}]}',
            r"split.file: .*s.json: folds\[1\]: unknown key 'train_patients'. Did you mean 'train'\? Allowed: test, .*, train, inner, repeat",
        ),
        ('{"folds": [{"test": [], "validation_patients": []}, {}, {}]}', r"folds\[0\]: unknown key 'validation_patients'. Did you mean 'inner'"),
        ('{"folds": [{"test": [], "iner": []}, {}, {}]}', r"unknown key 'iner'. Did you mean 'inner'\?"),
        ('{"folds": [{"test": [], "inner": [{"validation": [], "tran": []}]}, {}, {}]}', r"folds\[0\].inner\[0\]: unknown key 'tran'. Did you mean 'train'"),
    ],
)
def test_split_file__wrong_form(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(DataError, match=message):
        make_splits(table(SMALL), config(3, file=str(tmp_path / "s.json")))
    with pytest.raises(DataError, match="not found"):
        make_splits(table(SMALL), config(3, file=str(tmp_path / "absent.json")))


def test_split_file__reference_folds_of_the_lung_clips(shared: Path) -> None:
    """The shipped 5-fold split is taken over as it is, and ours is at least as even."""
    import csv

    folder = shared / "data" / "pocus"
    with open(folder / "videos.csv", encoding="utf-8", newline="") as handle:
        rows = [
            replace(row(line["path"], line["patient_id"], line["label"], int(line["n_frames"])), path=line["path"])
            for line in csv.DictReader(handle)
            if line["probe"] == "convex"
        ]
    reference = json.loads((folder / "cv_reference.json").read_text())
    given = make_splits(Manifest(rows), config(5, file=str(folder / "cv_reference.json")))
    groups_apart(given)
    assert given.classes == ["covid", "pneumonia", "regular"]
    by_video = {r.video: r.path for r in rows}
    for fold, expected in zip(given.folds, reference["folds"], strict=True):
        assert sorted(by_video[video] for video in fold.test) == sorted(expected["test_paths"])
    drawn = make_splits(Manifest(rows), config(5))

    def unevenness(splits: Splits) -> float:
        names = sorted(set(splits.groups[video] for video in splits.labels))
        videos, home = np.zeros((len(names), 3), int), np.zeros(len(names), int)
        for fold in splits.folds:
            for video in fold.test:
                place = names.index(splits.groups[video])
                videos[place, splits.classes.index(splits.labels[video])] += 1
                home[place] = fold.fold
        return imbalance(videos, home, 5)

    assert unevenness(drawn) <= unevenness(given)


def tiny_splits() -> Splits:
    return make_splits(table(SMALL), config(3))


def test_check__finds_planted_leaks() -> None:
    splits = tiny_splits()
    first = splits.folds[0]
    leaky = replace(first, train=[*first.train, first.test[0]])
    with pytest.raises(
        LeakageError, match=f"patient {splits.groups[first.test[0]]}.*test of fold 0.*training of fold 0"
    ):
        replace(splits, folds=[leaky, *splits.folds[1:]]).check()
    inner = InnerFold(first.train, first.train[:1])
    with pytest.raises(LeakageError, match="validation of inner fold 0 of fold 0"):
        replace(splits, folds=[replace(first, inner=[inner]), *splits.folds[1:]]).check()
    with pytest.raises(DataError, match="fold 0 has an empty test part"):
        replace(splits, folds=[Fold(0, [], first.train, []), *splits.folds[1:]]).check()
    with pytest.raises(DataError, match="is in no test fold"):
        replace(splits, folds=splits.folds[1:]).check()
    with pytest.raises(DataError, match="fold 0 lists a video twice"):
        replace(splits, folds=[replace(first, test=[*first.test, first.test[0]]), *splits.folds[1:]]).check()
    with pytest.raises(DataError, match=r"numbered \[1, 0, 2\]"):
        replace(splits, folds=[splits.folds[1], first, splits.folds[2]]).check()


def test_read__damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    with pytest.raises(DataError, match="not found. Run the split stage"):
        Splits.read(path)
    path.write_text('{"schema": ' + "9" * 5000 + "}")
    with pytest.raises(DataError, match="not readable JSON"):
        Splits.read(path)
    tiny_splits().write(path)
    raw = json.loads(path.read_text())
    assert list(raw)[0] == "schema"
    for change, message in (
        ({"schema": 2}, "schema is 2"),
        ({"folds": [{"fold": 0}]}, "folds.0.test: field required"),
        ({"classes": "a"}, "classes"),
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(DataError, match=message):
            Splits.read(path)
    with pytest.raises(ConfigError, match="allowed: 0, 1, 2"):
        tiny_splits().fold(3)


def test_unlabelled_corpus__scope_all_gives_splits_without_folds_and_scope_fold_says_how(tmp_path: Path) -> None:
    bare = Manifest([row(f"clip{number}", "ann" if number < 3 else "") for number in range(4)])
    with pytest.raises(DataError, match=r"pretrain.scope: all and run `dvc repro pretrain@0`"):
        make_splits(bare, config())
    free = config().model_copy(update={"pretrain": config().pretrain.model_copy(update={"scope": "all"})})
    splits = make_splits(bare, free)
    splits.write(tmp_path / "splits.json")
    again = Splits.read(tmp_path / "splits.json")
    assert again.folds == [] and len(again.pretraining_videos(None)) == 4
