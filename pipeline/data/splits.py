"""Outer and inner folds of one experiment (splits.json, schema 1), and the check that nothing leaks.

The group is what may never be divided: a patient, joined with every patient whose videos are the same recording. Which
group a video of any source belongs to is decided once (`pipeline.data.splitting`), and all later stages ask this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError, DataError, LeakageError, some
from pipeline.files import read_json, write_json

__all__ = ["FRAME_LEVEL", "OPTIMISTIC", "SCHEMA", "VIDEO_LEVEL", "Fold", "InnerFold", "Splits"]

SCHEMA = 1
FRAME_LEVEL = "frame-level split (frames of one video on both sides)"
VIDEO_LEVEL = "video-level split (patients on both sides)"
OPTIMISTIC = "optimistic (selected on test)"
"""Stamp of results whose epoch was chosen on the tested part, which a later stage finds out."""


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
    repeat: int = 0
    """Which of the repeated divisions it belongs to; in each one every video is tested once."""


@dataclass(frozen=True)
class Splits:
    """All folds of one experiment. Lists of videos are sorted; ids are those of the manifest."""

    seed: int
    group: str
    """`patient` or `video`: the unit that is never divided; `frame`: nothing is whole (see `frames_of`)."""
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
    divided_patients: int = 0
    """Known patients with labelled videos on both sides of some fold; only `group: video` allows them."""
    schema: int = SCHEMA

    @classmethod
    def read(cls, path: Path) -> Splits:
        """Read and `check` a splits.json. DataError names file and first wrong key; LeakageError as in `check`."""
        path = Path(path)
        try:
            raw = read_json(path)
        except FileNotFoundError:
            raise DataError(f"{path}: not found. Run the split stage first (dvc repro split).") from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of thousands of digits
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

    @property
    def repeats(self) -> int:
        """How often everything was divided."""
        return max((fold.repeat for fold in self.folds), default=0) + 1

    @property
    def folds_per_repeat(self) -> int:
        """Folds of one division."""
        return len(self.folds) // self.repeats

    @property
    def by_frame(self) -> bool:
        """Whether frames of one video lie on both sides of every fold."""
        return self.group == "frame"

    @property
    def unit(self) -> str:
        """What the independent units are called: `patient`, or `group` where not every labelled video's patient is known."""
        # `V<video>` is the group of a video whose patient is not known.
        known = self.group != "video" and not any(self.groups[video].startswith("V") for video in self.labels)
        return "patient" if known else "group"

    @property
    def stamp(self) -> str:
        """What has to stand beside every number because of how the data were divided, or ""."""
        return FRAME_LEVEL if self.by_frame else VIDEO_LEVEL if self.divided_patients else ""

    @property
    def words(self) -> str:
        """`5 folds`, or `5 folds × 3 repeats`."""
        folds = f"{self.folds_per_repeat} fold{'' if self.folds_per_repeat == 1 else 's'}"
        return folds if self.repeats == 1 else f"{folds} × {self.repeats} repeats"

    def frames_of(self, fold: Fold, part: str, video: str, count: int, inner: int | None = 0) -> list[int]:
        """Frames of a video that a part of a fold may use, of `count` frames in all.

        Args:
            part: `train`, `validation` or `test`.
            inner: the inner fold whose validation part is held back from training; None holds nothing back.
        """
        if not self.by_frame:
            return list(range(count))
        return [frame for frame in range(count) if self.part_of_frame(fold, video, frame, inner) == part]

    def part_of_frame(self, fold: Fold, video: str, frame: int, inner: int | None = 0) -> str:
        """`train`, `validation` or `test`: where a split by frame puts one frame. Frames are dealt by a seeded hash."""
        drawn = int.from_bytes(hashlib.sha256(f"{self.seed} {fold.repeat} {video} {frame}".encode()).digest()[:8], "big")
        turn, place = divmod(drawn, self.folds_per_repeat)
        if place == fold.fold % self.folds_per_repeat:
            return "test"
        held = inner is not None and bool(fold.inner) and turn % len(fold.inner) == inner
        return "validation" if held else "train"

    def groups_of(self, videos: Iterable[str]) -> list[str]:
        """Sorted groups of some videos; KeyError for a video that no source has."""
        return sorted({self.groups[video] for video in videos})

    def pretraining_videos(self, fold: int | None, source: str = "main") -> list[str]:
        """Sorted ids of the videos an encoder may see.

        Args:
            fold: an outer fold, or None for all videos of the source (transductive; always so in a split by frame).
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
        if fold is None or self.by_frame:
            return sorted(videos)
        closed = {self.groups[video] for video in self.fold(fold).test}
        blocked = set(self.unlabelled_blocked)
        return sorted(video for video in videos if self.groups[video] not in closed and video not in blocked)

    def check(self) -> None:
        """Prove that no group is on two sides anywhere (frames are looked at where they are used).

        Raises:
            LeakageError: naming group, videos and folds.
            DataError: a fold is empty, a video has no label or group, or a labelled video is not tested exactly once a repeat.
        """
        for fold in self.folds:
            self._check_videos(fold)
        self._check_tested_once()
        numbers = [fold.fold for fold in self.folds]
        if numbers != list(range(len(numbers))) or (not numbers and self.labels):
            raise DataError(f"split: folds are numbered {numbers}; expected 0, 1, ... and at least 1")
        repeats = [fold.repeat for fold in self.folds]
        if repeats != [number // max(self.folds_per_repeat, 1) for number in numbers]:
            raise DataError(f"split: the folds belong to repeats {repeats}; expected equally many a repeat, one repeat after another")
        homeless = sorted({*self.unlabelled, *(v for ids in self.extra_sources.values() for v in ids)} - set(self.groups))
        if homeless:
            raise DataError(f"split: video {homeless[0]} has no group ({len(homeless)} such videos)")
        for fold in [] if self.by_frame else self.folds:
            name = f"fold {fold.fold}"
            self._apart(f"test of {name}", fold.test, f"training of {name}", fold.train)
            for other in self.folds[: fold.fold]:
                if other.repeat == fold.repeat:
                    self._apart(f"test of fold {other.fold}", other.test, f"test of {name}", fold.test)
            for number, part in enumerate(fold.inner):
                inner = f"inner fold {number} of {name}"
                self._apart(f"validation of {inner}", part.validation, f"training of {inner}", part.train)
                self._apart(f"test of {name}", fold.test, inner, [*part.train, *part.validation])
        for fold in self.folds:
            for number, part in enumerate(fold.inner):
                if not part.validation or not part.train or not {*part.train, *part.validation} <= set(fold.train):
                    raise DataError(
                        f"split: inner fold {number} of fold {fold.fold} has an empty part, or videos that are not in the training part"
                    )

    def _check_videos(self, fold: Fold) -> None:
        """Parts that are not empty, of known videos, each listed once."""
        if not fold.test or not fold.train:
            raise DataError(f"split: fold {fold.fold} has an empty {'test' if not fold.test else 'training'} part")
        inner = [video for part in fold.inner for video in (*part.train, *part.validation)]
        for video in (*fold.test, *fold.train, *inner):
            if video not in self.groups or self.labels.get(video) not in self.classes:
                raise DataError(f"split: fold {fold.fold}: video {video} has no group, or no label among the classes")
        if len(set(fold.test)) < len(fold.test) or len(set(fold.train)) < len(fold.train):
            raise DataError(f"split: fold {fold.fold} lists a video twice")

    def _check_tested_once(self) -> None:
        """Every labelled video in exactly one test part of each repeat; a single fold is a fixed division and may leave some out."""
        for repeat in range(self.repeats if self.folds else 0):
            own = [fold for fold in self.folds if fold.repeat == repeat]
            missing = sorted(set(self.labels).difference(*(fold.test for fold in own)))
            if missing and len(own) > 1:
                where = f" of repeat {repeat}" if self.repeats > 1 else ""
                raise DataError(f"split: labelled video {missing[0]} is in no test fold{where} ({len(missing)} such videos)")

    def _apart(self, first_name: str, first: Sequence[str], second_name: str, second: Sequence[str]) -> None:
        shared = {self.groups[video] for video in first} & {self.groups[video] for video in second}
        if shared:
            group = min(shared)
            left, right = ([video for video in part if self.groups[video] == group] for part in (first, second))
            what = "patient" if group.startswith("P") else "group"
            raise LeakageError(
                f"split: {what} {group} is on two sides: {first_name} ({some(left)}) and {second_name} "
                f"({some(right)}); "
                f"{len(shared)} such groups. Videos of one patient, and copies of one recording, must stay together."
            )
