"""Patient-grouped, stratified outer and inner folds (splits.json, schema 1), and the check that nothing leaks.

The group is what may never be divided: a patient, joined with every patient whose videos are the same recording. Which
group a video of any source belongs to is decided here once, and all later stages ask this file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline.config import Config
from pipeline.data.folds import assign_folds
from pipeline.data.given_splits import GivenSplit, read_given_split
from pipeline.data.grouping import group_videos
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, DataError, LeakageError
from pipeline.files import read_json, write_json
from pipeline.registry import did_you_mean

__all__ = ["SCHEMA", "Fold", "InnerFold", "Splits", "make_splits"]

SCHEMA = 1


@dataclass(frozen=True)
class InnerFold:
    """One division of a training part; video ids."""

    train: list[str]
    validation: list[str]


@dataclass(frozen=True)
class Fold:
    """One outer fold; video ids, labelled videos only."""

    fold: int
    test: list[str]
    train: list[str]
    inner: list[InnerFold]
    """Empty when the training part has too few patients for a validation part; `Splits.warnings` says so then."""


@dataclass(frozen=True)
class Splits:
    """All folds of one experiment. Lists of videos are sorted; ids are those of the manifest."""

    seed: int
    group: str
    """`patient` or `video`: the unit that is never divided."""
    manifest_digest: str
    classes: list[str]
    excluded_classes: dict[str, str]
    """Label and reason; the videos of these labels count as unlabelled."""
    warnings: list[str]
    groups: dict[str, str]
    """Group of every video of every source."""
    labels: dict[str, str]
    """Class of every labelled video of the main source."""
    folds: list[Fold]
    unlabelled: list[str]
    """All other videos of the main source."""
    unlabelled_blocked: list[str]
    """Those of `unlabelled` without a known patient: they might show a test patient, so no fold's encoder sees them."""
    extra_sources: dict[str, list[str]] = field(default_factory=dict)
    """Videos of every further source, by its name."""
    schema: int = SCHEMA

    @classmethod
    def read(cls, path: Path) -> Splits:
        """Read and `check` a splits.json. DataError names file and first wrong key; LeakageError as in `check`."""
        path = Path(path)
        try:
            raw = read_json(path)
        except FileNotFoundError:
            raise DataError(f"{path}: not found. Run the split stage first (dvc repro split).") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: not readable JSON ({error})") from None
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise DataError(f"{path}: schema is {found!r}, this version reads {SCHEMA}. Run the split stage again.")
        try:
            splits = TypeAdapter(cls).validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"{path}: {where}: {first['msg'].lower()}. Run the split stage again.") from None
        splits.check()
        return splits

    def write(self, path: Path) -> None:
        """Write as JSON, atomically, `schema` first."""
        values = asdict(self)
        write_json(path, {"schema": values.pop("schema"), **values})

    def fold(self, number: int) -> Fold:
        """The outer fold of that number; ConfigError if there is none."""
        for fold in self.folds:
            if fold.fold == number:
                return fold
        raise ConfigError(f"fold: got {number}; allowed: {', '.join(str(fold.fold) for fold in self.folds)}")

    def groups_of(self, videos: Iterable[str]) -> list[str]:
        """Sorted groups of some videos; KeyError for a video that no source has."""
        return sorted({self.groups[video] for video in videos})

    def pretraining_videos(self, fold: int | None, source: str = "main") -> list[str]:
        """Sorted ids of the videos an encoder may see.

        Args:
            fold: an outer fold, or None for all videos of the source (transductive).
            source: `main` or the name of a further source. For a fold, videos of its test groups are left out of every
                source, and so are videos in `unlabelled_blocked`.
        """
        if source == "main":
            videos = [*self.labels, *self.unlabelled]
        elif source in self.extra_sources:
            videos = self.extra_sources[source]
        else:
            known = ", ".join(["main", *self.extra_sources])
            raise ConfigError(f"pretrain.sources: '{source}' was not split; known: {known}. Run the split stage again.")
        if fold is None:
            return sorted(videos)
        closed = {self.groups[video] for video in self.fold(fold).test}
        blocked = set(self.unlabelled_blocked)
        return sorted(video for video in videos if self.groups[video] not in closed and video not in blocked)

    def check(self) -> None:
        """Prove that no group is on two sides anywhere.

        Raises:
            LeakageError: naming group, videos and folds.
            DataError: a fold is empty, a video has no label or group, or a labelled video is not tested exactly once.
        """
        tested = Counter(video for fold in self.folds for video in fold.test)
        for fold in self.folds:
            if not fold.test or not fold.train:
                raise DataError(f"split: fold {fold.fold} has an empty {'test' if not fold.test else 'training'} part")
            inner = [video for part in fold.inner for video in (*part.train, *part.validation)]
            for video in (*fold.test, *fold.train, *inner):
                if video not in self.groups or self.labels.get(video) not in self.classes:
                    raise DataError(
                        f"split: fold {fold.fold}: video {video} has no group, or no label among the classes"
                    )
        missing = sorted(set(self.labels) - set(tested))
        if missing and len(self.folds) > 1:
            raise DataError(f"split: labelled video {missing[0]} is in no test fold ({len(missing)} such videos)")
        numbers = [fold.fold for fold in self.folds]
        if numbers != list(range(len(numbers))) or (not numbers and self.labels):
            raise DataError(
                f"split: folds are numbered {numbers}; expected 0, 1, ... and at least 1"
            )
        homeless = sorted(
            {*self.unlabelled, *(v for ids in self.extra_sources.values() for v in ids)} - set(self.groups)
        )
        if homeless:
            raise DataError(f"split: video {homeless[0]} has no group ({len(homeless)} such videos)")
        for position, fold in enumerate(self.folds):
            if len(set(fold.test)) < len(fold.test) or len(set(fold.train)) < len(fold.train):
                raise DataError(f"split: fold {fold.fold} lists a video twice")
            self._apart(f"test of fold {fold.fold}", fold.test, f"training of fold {fold.fold}", fold.train)
            for other in self.folds[:position]:
                self._apart(f"test of fold {other.fold}", other.test, f"test of fold {fold.fold}", fold.test)
            for number, part in enumerate(fold.inner):
                name = f"inner fold {number} of fold {fold.fold}"
                self._apart(f"validation of {name}", part.validation, f"training of {name}", part.train)
                both = [*part.train, *part.validation]
                self._apart(f"test of fold {fold.fold}", fold.test, name, both)
                if not part.validation or not part.train or not set(both) <= set(fold.train):
                    raise DataError(f"split: {name} has an empty part, or videos that are not in the training part")

    def _apart(self, first_name: str, first: Sequence[str], second_name: str, second: Sequence[str]) -> None:
        shared = {self.groups[video] for video in first} & {self.groups[video] for video in second}
        if shared:
            group = min(shared)
            left, right = ([video for video in part if self.groups[video] == group] for part in (first, second))
            what = "patient" if group.startswith("P") else "group"
            raise LeakageError(
                f"split: {what} {group} is on two sides: {first_name} ({_some(left)}) and {second_name} "
                f"({_some(right)}); "
                f"{len(shared)} such groups. Videos of one patient, and copies of one recording, must stay together."
            )


def _some(values: Sequence[str], shown: int = 4) -> str:
    return ", ".join(values[:shown]) + (f" and {len(values) - shown} more" if len(values) > shown else "")


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
) -> Splits:
    """Outer and inner folds of the main source, and the group of every video of every source.

    Args:
        manifest: of the main source.
        config: sections `data` and `split` are used.
        near_duplicates: pairs of video ids that show one recording, within or across sources.
        extra: manifests of further sources by name; they are never split, only grouped.

    Returns:
        Checked splits; everything doubtful is in `warnings`, which name pseudonyms and video ids only.

    Raises:
        DataError: no usable labels, a class with too few patients under `rare_classes: fail`, or a bad split file.
        LeakageError: a given split puts one group on two sides.
    """
    extra = dict(extra or {})
    by_patient = config.data.group == "patient"
    warnings: list[str] = []
    groups = group_videos(manifest, extra, by_patient, near_duplicates, warnings)
    if config.pretrain.scope == "all" and not any(row.label for row in manifest.rows):
        warnings.append("no video has a label: no folds; an encoder can be pretrained and exported, not evaluated")
        every = sorted(row.video for row in manifest.rows)
        return _without_labels(manifest, config, groups, extra, warnings, every)
    given = read_given_split(Path(config.split.file), len(config.split.folds)) if config.split.file else None
    classes, excluded = _choose_classes(manifest, config, given, groups, warnings)
    labels = {row.video: row.label for row in manifest.rows if row.label in classes}
    draft = _Draft(classes, groups, dict(sorted(labels.items())), warnings, config.data.group)
    unlabelled = sorted(row.video for row in manifest.rows if row.video not in labels)
    blocked = (
        sorted(row.video for row in manifest.rows if row.video not in labels and not row.patient) if by_patient else []
    )
    _warn_unknown_patients(manifest, extra, labels, blocked, by_patient, warnings)
    folds = _given_folds(given, manifest, config, draft) if given else _drawn_folds(draft, config)
    _warn_missing_classes(folds, draft)
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


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _choose_classes(
    manifest: Manifest, config: Config, given: GivenSplit | None, groups: Mapping[str, str], warnings: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Classes in use, in order, and the excluded labels with reasons."""
    members: dict[str, set[str]] = {}
    for row in manifest.rows:
        if row.label:
            members.setdefault(row.label, set()).add(groups[row.video])
    unit, folds = config.data.group, len(config.split.folds)
    counts = ", ".join(f"{name}: {_count(len(members[name]), unit)}" for name in sorted(members)) or "none"
    if not members:
        raise DataError(
            f"no video of {config.data.source} has a label, so there is nothing to evaluate. Check data.labels, "
            f"data.label_column and data.include (the manifest has {len(manifest.rows)} videos). To pretrain without "
            "labels, set pretrain.scope: all and run `dvc repro pretrain@0`."
        )
    key = "data.classes" if config.data.classes or not given else "classes of split.file"
    wanted = list(dict.fromkeys(config.data.classes or (given.classes if given else []) or sorted(members)))
    for name in wanted:
        if name not in members:
            raise DataError(f"{key}: no video has label '{name}'. Found: {counts}.{did_you_mean(name, members)}")
    excluded = {name: "not in the chosen classes" for name in sorted(set(members) - set(wanted))}
    rare = {
        name: f"{_count(len(members[name]), unit)} < {folds} folds" for name in wanted if len(members[name]) < folds
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
            f"{len(alone)} of {len(labels)} labelled videos have no patient and count as a patient each, so that "
            "clips of one "
            f"person may lie on both sides of a fold: {_some(alone)}. Fill data.patient_column."
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
    names, counts = draft.table(draft.labels)
    number = dict(zip(names, assign_folds(counts, len(config.split.folds), config.split.seed).tolist(), strict=True))
    folds = []
    for fold in config.split.folds:
        test = [video for video in draft.labels if number[draft.groups[video]] == fold]
        train = [video for video in draft.labels if number[draft.groups[video]] != fold]
        folds.append(Fold(fold, test, train, _inner_folds(draft, train, fold, config)))
    return folds


def _given_folds(given: GivenSplit, manifest: Manifest, config: Config, draft: _Draft) -> list[Fold]:
    left_out = {row.video: "class not in use" for row in manifest.rows if row.label and row.video not in draft.labels}
    resolved, dropped = given.resolve(manifest, draft.labels, left_out, config.data.pseudonym_key)
    if dropped:
        draft.warnings.append(f"{len(dropped)} videos of split.file have a class that is not in use: {_some(dropped)}")
    folds = []
    for number, part in enumerate(resolved):
        tested = set(part.test)
        train = part.train if part.train is not None else [video for video in draft.labels if video not in tested]
        inner = []
        for validation in part.validation:
            held = set(validation)
            inner.append(InnerFold([video for video in train if video not in held], validation))
        # Inner folds are drawn only once the outer ones are known to be apart: leaks must be named as what they are.
        folds.append(Fold(number, part.test, train, inner))
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
        Fold(fold.fold, fold.test, fold.train, fold.inner or _inner_folds(draft, fold.train, fold.fold, config))
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
