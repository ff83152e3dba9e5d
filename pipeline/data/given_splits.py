"""A split made elsewhere (`split.file`): parsed, its entries resolved to videos, every problem named.

Forms, all JSON with one item a fold under `folds`: `{"test": [entry, ...]}`, where `test_videos`, `test_paths` or
`test_patients` may stand for `test`, and `train` and `inner` (`[{"validation": [...]}, ...]`) may be added, as
splits.json itself has them. An entry is a path of the manifest, a video id, a patient id of the labels table, or its
pseudonym.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.manifest import Manifest, pseudonym
from pipeline.errors import DataError
from pipeline.files import read_json

__all__ = ["GivenFold", "GivenSplit", "read_given_split"]

TEST_KEYS = ("test", "test_videos", "test_paths", "test_patients")
SHOWN = 8


@dataclass(frozen=True)
class GivenFold:
    """Entries of one fold as written; `train` is None where the file leaves it to the other folds."""

    test: list[str]
    train: list[str] | None = None
    validation: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class GivenSplit:
    """A parsed split file."""

    path: Path
    folds: list[GivenFold]
    classes: list[str]
    """Classes named by the file, or []."""

    def resolve(
        self, manifest: Manifest, labels: Mapping[str, str], left_out: Mapping[str, str], key: str
    ) -> tuple[list[GivenFold], list[str]]:
        """Entries to video ids.

        Args:
            manifest: of the main source.
            labels: class of every labelled video in use.
            left_out: reason by video id, for labelled videos whose class is not in use; entries of them are dropped.
            key: `data.pseudonym_key`, which turns patient ids of the table into pseudonyms.

        Returns:
            The folds with sorted video ids in place of entries, and the ids of the dropped videos.

        Raises:
            DataError: unknown entries (the nearest known one beside each), entries without a label, empty folds, or
                labelled videos that no fold tests.
        """
        resolver = _Resolver(manifest, labels, left_out, key)
        folds = [
            GivenFold(
                test=resolver.videos(fold.test, f"fold {number} test"),
                train=None if fold.train is None else resolver.videos(fold.train, f"fold {number} train"),
                validation=[resolver.videos(part, f"fold {number} inner validation") for part in fold.validation],
            )
            for number, fold in enumerate(self.folds)
        ]
        if resolver.problems:
            more = len(resolver.problems) - SHOWN
            lines = resolver.problems[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
            raise DataError(
                f"{self.path}: {len(resolver.problems)} entries cannot be used\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\n  Allowed: paths of manifest.csv, video ids, patient ids of the labels table, pseudonyms."
            )
        empty = [number for number, fold in enumerate(folds) if not fold.test]
        if empty:
            raise DataError(
                f"{self.path}: fold {', '.join(map(str, empty))} has no labelled test video. Every fold needs some; "
                "remove the "
                "fold or fill it."
            )
        tested = {video for fold in folds for video in fold.test}
        missing = [row for row in manifest.rows if row.video in labels and row.video not in tested]
        # One fold alone is a fixed division: what it does not test is trained on.
        if missing and len(folds) > 1:
            names = ", ".join(f"{row.path} ({row.label})" for row in missing[:SHOWN])
            raise DataError(
                f"{self.path}: {len(missing)} of {len(labels)} labelled videos are in no test fold: {names}"
                f"{', ...' if len(missing) > SHOWN else ''}. Add them, or leave them out with data.classes, "
                "data.include or "
                "data.media."
            )
        return folds, sorted(resolver.dropped)


class _Resolver:
    """Looks entries up and collects problems, so that all are reported at once."""

    def __init__(self, manifest: Manifest, labels: Mapping[str, str], left_out: Mapping[str, str], key: str) -> None:
        self.labels, self.left_out, self.key = labels, left_out, key
        self.by_path = {row.path: row.video for row in manifest.rows}
        self.ids = {row.video for row in manifest.rows}
        self.by_patient: dict[str, list[str]] = {}
        for row in manifest.rows:
            if row.patient:
                self.by_patient.setdefault(row.patient, []).append(row.video)
        self.problems: list[str] = []
        self.dropped: set[str] = set()

    def _find(self, entry: str) -> list[str] | None:
        path = str(PurePosixPath(entry))
        if path in self.by_path:
            return [self.by_path[path]]
        if entry in self.ids:
            return [entry]
        for patient in (entry, pseudonym(entry, self.key)):
            if patient in self.by_patient:
                # Unlabelled clips of a listed patient are no mistake of the list; they simply are not tested.
                listed = self.by_patient[patient]
                return [video for video in listed if video in self.labels] or listed
        return None

    def videos(self, entries: Sequence[str], where: str) -> list[str]:
        """Sorted video ids of the entries that can be used."""
        found: set[str] = set()
        for entry in entries:
            videos = self._find(entry)
            if videos is None:
                near = difflib.get_close_matches(entry, list(self.by_path), n=1, cutoff=0.6)
                self.problems.append(
                    f"{where}: {entry!r} is unknown." + (f" Did you mean {near[0]!r}?" if near else "")
                )
                continue
            for video in videos:
                if video in self.labels:
                    found.add(video)
                elif video in self.left_out:
                    self.dropped.add(video)
                else:
                    self.problems.append(f"{where}: {entry!r} has no label")
                    break
        return sorted(found)


def _entries(path: Path, value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(
        isinstance(entry, str | int) and not isinstance(entry, bool) for entry in value
    ):
        raise DataError(
            f"{path}: {where} must be a list of paths, video ids or patient ids; found {type(value).__name__}"
        )
    return [str(entry) for entry in value]


def _fold(path: Path, number: int, value: Any) -> GivenFold:
    where = f"folds[{number}]"
    key = next((name for name in TEST_KEYS if isinstance(value, dict) and name in value), None)
    if key is None:
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path}: {where} needs one of the keys {', '.join(TEST_KEYS)}; found: {found}")
    inner = value.get("inner", [])
    if not isinstance(inner, list) or not all(isinstance(part, dict) and "validation" in part for part in inner):
        raise DataError(f'{path}: {where}.inner must be a list of {{"validation": [...]}}')
    return GivenFold(
        test=_entries(path, value[key], f"{where}.{key}"),
        train=_entries(path, value["train"], f"{where}.train") if "train" in value else None,
        validation=[_entries(path, part["validation"], f"{where}.inner") for part in inner],
    )


def read_given_split(path: Path, folds: int) -> GivenSplit:
    """Parse a split file; entries are looked up later by `GivenSplit.resolve`.

    Args:
        path: of the JSON file.
        folds: number of folds that params.yaml asks for.

    Raises:
        DataError: missing or unreadable file, wrong form, or another number of folds than `split.folds`.
    """
    path = Path(path)
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise DataError(f"split.file: {path} not found; the path is relative to the project folder") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of thousands of digits
        raise DataError(f"split.file: {path} is not readable JSON ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("folds"), list):
        raise DataError(f'split.file: {path} must look like {{"folds": [{{"test": ["path or id", ...]}}, ...]}}')
    if len(raw["folds"]) != folds:
        raise DataError(
            f"split.file: {path} has {len(raw['folds'])} folds and split.folds has {folds}; "
            f"set split.folds to {list(range(len(raw['folds'])))}"
        )
    classes = raw.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"split.file: {path}: classes must be a list of labels; found {classes!r}")
    return GivenSplit(path, [_fold(path, number, value) for number, value in enumerate(raw["folds"])], classes)
