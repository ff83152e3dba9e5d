"""How folds are made: groups, classes in use, outer folds drawn or given, inner folds, and every doubt as a warning.

What comes out is checked (`Splits.check`) before anybody sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.data.folds import assign_folds
from pipeline.data.given_splits import GivenSplit, read_given_split
from pipeline.data.grouping import group_videos
from pipeline.data.manifest import Manifest
from pipeline.data.splits import Fold, InnerFold, Splits
from pipeline.errors import DataError, some
from pipeline.registry import did_you_mean

__all__ = ["NO_PATIENT", "make_splits"]

NO_PATIENT = "labelled videos have no patient and count as a patient each"
"""In the warning that every number may be too good."""


@dataclass
class _Draft:
    """What the steps of `make_splits` hand on."""

    classes: list[str]
    groups: dict[str, str]
    labels: dict[str, str]
    warnings: list[str]
    word: str

    def table(self, videos: Iterable[str]) -> tuple[list[str], np.ndarray]:
        """Sorted groups of the videos, and their videos per class: int64 [G, C]."""
        videos = list(videos)
        names = sorted({self.groups[video] for video in videos})
        place = {name: row for row, name in enumerate(names)}
        counts = np.zeros((len(names), len(self.classes)), np.int64)
        for video in videos:
            counts[place[self.groups[video]], self.classes.index(self.labels[video])] += 1
        return names, counts


def make_splits(
    manifest: Manifest,
    config: Config,
    near_duplicates: Iterable[tuple[str, str]] = (),
    extra: Mapping[str, Manifest] | None = None,
    hints: Mapping[str, str] | None = None,
) -> Splits:
    """Outer and inner folds of the main source, and the group of every video of every source.

    Args:
        manifest: of the main source.
        config: sections `data` and `split` are used.
        near_duplicates: pairs of video ids that show one recording, within or across sources.
        extra: manifests of further sources by name; they are never split, only grouped.
        hints: what extraction said of missing columns (`manifest.read_hints`), repeated where no video has a label.

    Returns:
        Checked splits; everything doubtful is in `warnings`, which name pseudonyms and video ids only.

    Raises:
        DataError: no usable labels, a class with too few patients under `rare_classes: fail`, or a bad split file.
        LeakageError: a given split puts one group on two sides.
    """
    extra = dict(extra or {})
    by_frame, by_patient = config.data.group == "frame", config.data.group == "patient"
    warnings: list[str] = []
    # A split by frame divides everything; its groups are only what is resampled for intervals, and that is patients.
    groups = group_videos(manifest, extra, config.data.group != "video", near_duplicates, warnings)
    if by_frame:
        _frames_can_be_dealt(manifest, config, warnings)
    if config.pretrain.scope == "all" and not any(row.label for row in manifest.rows):
        warnings.append("no video has a label: no folds; an encoder can be pretrained and exported, not evaluated")
        every = sorted(row.video for row in manifest.rows)
        return _without_labels(manifest, config, groups, extra, warnings, every)
    given = read_given_split(Path(config.split.file), len(config.split.folds), config.split.repeats) if config.split.file else None
    if not any(row.label for row in manifest.rows):
        raise DataError(_nothing_labelled(manifest, config, dict(hints or {}).get("label", "")))
    classes, excluded = _choose_classes(manifest, config, given, groups, warnings)
    labels = {row.video: row.label for row in manifest.rows if row.label in classes}
    draft = _Draft(classes, groups, dict(sorted(labels.items())), warnings, config.data.group)
    stored = {row.video: row.frames for row in manifest.rows}
    unlabelled = sorted(row.video for row in manifest.rows if row.video not in labels)
    blocked = (
        sorted(row.video for row in manifest.rows if row.video not in labels and not row.patient) if by_patient else []
    )
    _warn_unknown_patients(manifest, extra, labels, blocked, by_patient, warnings)
    if by_frame:
        folds = _frame_folds(draft, config, stored)
    else:
        folds = _given_folds(given, manifest, config, draft) if given else _drawn_folds(draft, config)
    _warn_missing_classes(folds, draft)
    _warn_equal_repeats(folds, draft)
    divided = 0 if config.data.group != "video" else _divided_patients(folds, manifest)
    if divided:
        warnings.append(
            f"{divided} known patients have videos on both sides of a fold (data.group: video), so every number is too good; this is "
            "for reproducing published splits only"
        )
    splits = Splits(
        seed=config.split.seed,
        group=config.data.group,
        manifest_digest=manifest.digest(),
        classes=classes,
        excluded_classes=excluded,
        warnings=warnings,
        groups=groups,
        labels=draft.labels,
        folds=folds,
        unlabelled=unlabelled,
        unlabelled_blocked=blocked,
        extra_sources={name: sorted(row.video for row in table.rows) for name, table in sorted(extra.items())},
        divided_patients=divided,
    )
    splits.check()
    return splits


def _without_labels(
    manifest: Manifest, config: Config, groups: dict[str, str], extra: Mapping[str, Manifest], warnings: list[str],
    every: list[str],
) -> Splits:
    """Splits of a corpus that only serves pretraining: all videos, no folds."""
    return Splits(
        seed=config.split.seed, group=config.data.group, manifest_digest=manifest.digest(), classes=[],
        excluded_classes={}, warnings=warnings, groups=groups, labels={}, folds=[], unlabelled=every,
        unlabelled_blocked=[],
        extra_sources={name: sorted(row.video for row in table.rows) for name, table in sorted(extra.items())},
    )


def _frames_can_be_dealt(manifest: Manifest, config: Config, warnings: list[str]) -> None:
    """Refuse what a split by frame cannot be made of, and say what it is."""
    if config.split.file is not None:
        raise DataError("data.group: frame deals single frames to the folds, and split.file divides videos; set one of them back")
    if any(row.kind == "stretch" for row in manifest.rows):
        raise DataError(
            "data.group: frame is for videos with one label each; with labels of frames (data.frame_labels) use data.group: video to "
            "see what a split inside recordings does"
        )
    warnings.append(
        "data.group is frame: frames of one video are on both sides of every fold, and pretraining sees all videos. The numbers "
        "say how well frames are recognised among their neighbours; they are for reproducing published splits only. A video counts "
        "once a fold, by the frames that fold tests"
    )


def _frame_folds(draft: _Draft, config: Config, stored: Mapping[str, int]) -> list[Fold]:
    """Folds of a split by frame: a part lists the videos that have frames in it."""
    per_repeat, inner = config.split.per_repeat, [InnerFold([], [])] * config.split.inner_folds
    empty = [Fold(number, [], [], inner, number // per_repeat) for number in config.split.folds]
    deal = Splits(
        seed=config.split.seed, group="frame", manifest_digest="", classes=draft.classes, excluded_classes={}, warnings=[],
        groups=draft.groups, labels=draft.labels, folds=empty, unlabelled=[], unlabelled_blocked=[],
    )

    def videos(fold: Fold, part: str, inner: int | None) -> list[str]:
        return [video for video in draft.labels if deal.frames_of(fold, part, video, stored[video], inner)]

    return [
        Fold(
            fold.fold, videos(fold, "test", None), videos(fold, "train", None),
            [InnerFold(videos(fold, "train", part), videos(fold, "validation", part)) for part in range(len(inner))], fold.repeat,
        )
        for fold in empty
    ]


def _divided_patients(folds: Sequence[Fold], manifest: Manifest) -> int:
    """Known patients with labelled videos in the test and in the training part of some fold."""
    patient = {row.video: row.patient for row in manifest.rows if row.patient}
    both: set[str] = set()
    for fold in folds:
        test, train = ({patient[video] for video in part if video in patient} for part in (fold.test, fold.train))
        both |= test & train
    return len(both)


def _warn_equal_repeats(folds: Sequence[Fold], draft: _Draft) -> None:
    """A repeat that divides as an earlier one did brings no new division."""
    divisions: dict[int, set[frozenset[str]]] = {}
    for fold in folds:
        divisions.setdefault(fold.repeat, set()).add(frozenset(fold.test))
    seen: list[set[frozenset[str]]] = []
    for repeat, division in divisions.items():
        if division in seen:
            draft.warnings.append(
                f"repeat {repeat} divides the videos as repeat {seen.index(division)} does: with so few {draft.word}s there are few even "
                "divisions, and this one adds nothing but another inner division"
            )
        seen.append(division)


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _nothing_labelled(manifest: Manifest, config: Config, hint: str) -> str:
    """What to do where there is nothing to divide."""
    return (
        f"no video of {config.data.source} has a label, so there is nothing to evaluate. {hint + '. ' if hint else ''}Check data.labels, "
        f"data.label_column and data.include (data/frames/main/manifest.csv has {len(manifest.rows)} videos). To pretrain without labels, set "
        "pretrain.scope: all and run `dvc repro pretrain@0`."
    )


def _choose_classes(
    manifest: Manifest, config: Config, given: GivenSplit | None, groups: Mapping[str, str], warnings: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Classes in use, in order, and the excluded labels with reasons."""
    unit, folds = config.data.group, config.split.per_repeat
    held: dict[str, set[str]] = {}
    for row in manifest.rows:
        if row.label:
            held.setdefault(row.label, set()).update(
                (f"{row.video} {frame}" for frame in range(row.frames)) if unit == "frame" else [groups[row.video]]
            )
    members = {name: len(units) for name, units in held.items()}
    counts = ", ".join(f"{name}: {_count(members[name], unit)}" for name in sorted(members))
    key = "data.classes" if config.data.classes or not given else "classes of split.file"
    wanted = list(dict.fromkeys(config.data.classes or (given.classes if given else []) or sorted(members)))
    for name in wanted:
        if name not in members:
            raise DataError(f"{key}: no video has label '{name}'. Found: {counts}.{did_you_mean(name, members)}")
    excluded = {name: "not in the chosen classes" for name in sorted(set(members) - set(wanted))}
    rare = {
        name: f"{_count(members[name], unit)} < {folds} folds" for name in wanted if members[name] < folds
    }
    if rare and config.split.rare_classes == "fail":
        raise DataError(
            f"class {', '.join(f'{name} ({reason})' for name, reason in rare.items())}: too few {unit}s for every "
            "fold to test "
            f"one. Found: {counts}. Use fewer split.folds, leave the class out of data.classes, or set "
            "split.rare_classes: exclude."
        )
    warnings += [
        f"class {name} is excluded ({reason}); its videos count as unlabelled" for name, reason in rare.items()
    ]
    usable = [name for name in wanted if name not in rare]
    if len(usable) < 2:
        raise DataError(
            f"classification needs 2 classes with at least {folds} {unit}s each (one a fold); usable: "
            f"{', '.join(usable) or 'none'}. Found: {counts}. Use fewer split.folds (at least 2), or more data."
        )
    return usable, excluded | rare


def _warn_unknown_patients(
    manifest: Manifest,
    extra: Mapping[str, Manifest],
    labels: Mapping[str, str],
    blocked: Sequence[str],
    by_patient: bool,
    warnings: list[str],
) -> None:
    if not by_patient:
        return
    alone = sorted(row.video for row in manifest.rows if row.video in labels and not row.patient)
    if alone:
        warnings.append(
            f"{len(alone)} of {len(labels)} {NO_PATIENT}, so that clips of one "
            f"person may lie on both sides of a fold: {some(alone)}. Fill data.patient_column."
        )
    if blocked:
        warnings.append(
            f"{len(blocked)} unlabelled videos have no patient and are left out of pretraining under pretrain.scope: "
            "fold"
        )
    main_patients = {row.patient for row in manifest.rows if row.patient}
    for name, table in sorted(extra.items()):
        unknown = sum(not row.patient for row in table.rows)
        if unknown:
            warnings.append(
                f"source {name}: {unknown} of {len(table.rows)} videos have no patient; only near-duplicates of test "
                "videos "
                "can be kept out of pretraining"
            )
        shared = len(main_patients & {row.patient for row in table.rows})
        if shared:
            warnings.append(
                f"source {name}: {shared} patient ids occur in the main source too and are taken for the same persons"
            )


def _drawn_folds(draft: _Draft, config: Config) -> list[Fold]:
    """Each repeat is a division of its own, drawn with another seed."""
    names, counts = draft.table(draft.labels)
    size, seed = config.split.per_repeat, config.split.seed
    folds = []
    for repeat in range(config.split.repeats):
        home = assign_folds(counts, size, seed if repeat == 0 else (seed, 0, repeat))
        place = dict(zip(names, home.tolist(), strict=True))
        for fold in range(repeat * size, (repeat + 1) * size):
            test = [video for video in draft.labels if place[draft.groups[video]] == fold % size]
            train = [video for video in draft.labels if place[draft.groups[video]] != fold % size]
            folds.append(Fold(fold, test, train, _inner_folds(draft, train, fold, config), repeat))
    return folds


def _given_folds(given: GivenSplit, manifest: Manifest, config: Config, draft: _Draft) -> list[Fold]:
    left_out = {row.video: "class not in use" for row in manifest.rows if row.label and row.video not in draft.labels}
    resolved, dropped = given.resolve(manifest, draft.labels, left_out, config.data.pseudonym_key)
    if dropped:
        draft.warnings.append(f"{len(dropped)} videos of split.file have a class that is not in use: {some(dropped)}")
    folds, size = [], config.split.per_repeat
    for number, part in enumerate(resolved):
        tested = set(part.test)
        train = part.train if part.train is not None else [video for video in draft.labels if video not in tested]
        inner = []
        for validation in part.validation:
            held = set(validation)
            inner.append(InnerFold([video for video in train if video not in held], validation))
        # Inner folds are drawn only once the outer ones are known to be apart: leaks must be named as what they are.
        folds.append(Fold(number, part.test, train, inner, number // size))
    probe = Splits(
        seed=0,
        group=config.data.group,
        manifest_digest="",
        classes=draft.classes,
        excluded_classes={},
        warnings=[],
        groups=draft.groups,
        labels=draft.labels,
        folds=folds,
        unlabelled=[],
        unlabelled_blocked=[],
    )
    probe.check()
    return [
        Fold(fold.fold, fold.test, fold.train, fold.inner or _inner_folds(draft, fold.train, fold.fold, config), fold.repeat)
        for fold in folds
    ]


def _inner_folds(draft: _Draft, train: Sequence[str], fold: int, config: Config) -> list[InnerFold]:
    """Divide a training part; a group that alone carries a class always stays on the training side."""
    names, counts = draft.table(train)
    carriers = (counts > 0).sum(0)
    sole = ((counts > 0) & (carriers == 1)).any(1)
    movable = [name for name, kept in zip(names, sole, strict=True) if not kept]
    free = counts[~sole]
    per_class = (free > 0).sum(0)
    parts = min(config.split.inner_folds, max(2, int(min(per_class[per_class > 0], default=0))))
    if len(movable) < 2:
        draft.warnings.append(
            f"fold {fold}: too few training {draft.word}s for a validation part, so no epoch can be selected on it; "
            "use "
            "finetune.selection: last, fewer classes or more data"
        )
        return []
    if parts < config.split.inner_folds:
        scarce = draft.classes[int(np.argmin(np.where(carriers > 0, carriers, np.iinfo(np.int64).max)))]
        draft.warnings.append(
            f"fold {fold}: {parts} inner folds instead of {config.split.inner_folds}, because class {scarce} has only "
            f"{int(carriers[draft.classes.index(scarce)])} training {draft.word}s"
        )
    number = dict(zip(movable, assign_folds(free, parts, (config.split.seed, fold + 1)).tolist(), strict=True))
    inner = []
    for part in range(parts):
        held = {name for name, place in number.items() if place == part}
        inner.append(
            InnerFold(
                [video for video in train if draft.groups[video] not in held],
                [video for video in train if draft.groups[video] in held],
            )
        )
    lacking = sorted(
        {name for part in inner for name in set(draft.classes) - {draft.labels[v] for v in part.validation}}
    )
    if lacking:
        draft.warnings.append(
            f"fold {fold}: class {', '.join(lacking)} is absent from the validation part of an inner fold"
        )
    return inner


def _warn_missing_classes(folds: Sequence[Fold], draft: _Draft) -> None:
    for fold in folds:
        for name, videos in (("test", fold.test), ("training", fold.train)):
            lacking = [label for label in draft.classes if label not in {draft.labels[video] for video in videos}]
            if lacking:
                draft.warnings.append(f"fold {fold.fold}: class {', '.join(lacking)} is absent from the {name} part")
