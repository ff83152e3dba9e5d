"""A split made elsewhere (`split.file`): parsed, its entries resolved to videos, every problem named.

Forms, all JSON with one item a fold under `folds`: `{"test": [entry, ...]}`, where `test_videos`, `test_paths` or
`test_patients` may stand for `test`, and `train`, `inner` (`[{"validation": [...]}, ...]`) and `repeat` may be added, as
splits.json itself has them; with `split.repeats` the folds of one repeat stand before those of the next. Numbers and words about a fold
(`fold`, `name`, `description`, `remark`, `comment`, `n_...`, `..._per_class`) are passed over, any other key is refused. An entry is a path of
the manifest, a video id, a patient id of the labels table, or its pseudonym.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.manifest import Manifest, pseudonym
from pipeline.errors import DataError
from pipeline.files import read_json
from pipeline.registry import did_you_mean

__all__ = ["GivenFold", "GivenSplit", "read_given_split"]

TEST_KEYS = ("test", "test_videos", "test_paths", "test_patients")
FOLD_KEYS = (*TEST_KEYS, "train", "inner", "repeat")
INNER_KEYS = ("validation", "train")
FACTS = ("fold", "name", "description", "remark", "comment")
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
    repeats: int = 1
    """In how many equal rows the folds come; each row tests every video once."""

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
                labelled videos that a repeat tests not at all or twice.
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
                + "\n  Allowed: paths of data/frames/main/manifest.csv, video ids, patient ids of the labels table, pseudonyms."
            )
        empty = [number for number, fold in enumerate(folds) if not fold.test]
        if empty:
            raise DataError(
                f"{self.path}: fold {', '.join(map(str, empty))} has no labelled test video. Every fold needs some; "
                "remove the "
                "fold or fill it."
            )
        size = len(folds) // self.repeats
        for first in range(0, len(folds), size):
            where = f" of repeat {first // size}" if self.repeats > 1 else ""
            self._check_tested_once(manifest, labels, folds[first : first + size], first, where)
        return folds, sorted(resolver.dropped)

    def _check_tested_once(
        self, manifest: Manifest, labels: Mapping[str, str], folds: Sequence[GivenFold], first: int, where: str
    ) -> None:
        """Each labelled video in one test part of a repeat; its folds are numbered from `first`."""
        tested: dict[str, list[int]] = {}
        for number, fold in enumerate(folds, start=first):
            for video in fold.test:
                tested.setdefault(video, []).append(number)
        used = [row for row in manifest.rows if row.video in labels]
        twice = [f"{row.path} (folds {', '.join(map(str, tested[row.video]))})" for row in used if len(tested.get(row.video, ())) > 1]
        if twice:
            raise DataError(
                f"{self.path}: {len(twice)} videos are tested more than once{where}: {', '.join(twice[:SHOWN])}"
                f"{', ...' if len(twice) > SHOWN else ''}. Every video is a test video of one fold; for a repeated cross-validation set "
                "split.repeats."
            )
        missing = [f"{row.path} ({row.label})" for row in used if row.video not in tested]
        # One fold alone is a fixed division: what it does not test is trained on.
        if missing and len(folds) > 1:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(labels)} labelled videos are in no test fold{where}: {', '.join(missing[:SHOWN])}"
                f"{', ...' if len(missing) > SHOWN else ''}. Add them, or leave them out with data.classes, data.include or data.media."
            )


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
        self.problems += [f"{where}: {entry!r} is listed twice" for entry, count in Counter(entries).items() if count > 1]
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


def _check_keys(path: Path, where: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a key that nothing reads: a misspelt one, or a part of the division that would be ignored."""
    for name in value if isinstance(value, dict) else ():
        if name not in (*allowed, *FACTS) and not name.startswith("n_") and not name.endswith("_per_class"):
            # Nearer in letters to test_patients, but meant is another part.
            meant = {"train": " Did you mean 'train'?", "val": " Did you mean 'inner': [{'validation': [...]}]?"}
            hint = next((text for start, text in meant.items() if name.startswith(start)), did_you_mean(name, allowed))
            raise DataError(
                f"split.file: {path}: {where}: unknown key '{name}'.{hint} Allowed: {', '.join(allowed)}; each list takes "
                f"paths, video ids and patient ids. Notes may stand under {', '.join(FACTS)}, n_..., ..._per_class"
            )


def _fold(path: Path, number: int, value: Any) -> GivenFold:
    where = f"folds[{number}]"
    _check_keys(path, where, value, FOLD_KEYS)
    key = next((name for name in TEST_KEYS if isinstance(value, dict) and name in value), None)
    if key is None:
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path}: {where} needs one of the keys {', '.join(TEST_KEYS)}; found: {found}")
    inner = value.get("inner", [])
    if not isinstance(inner, list) or not all(isinstance(part, dict) and "validation" in part for part in inner):
        raise DataError(f'{path}: {where}.inner must be a list of {{"validation": [...]}}')
    for place, part in enumerate(inner):
        _check_keys(path, f"{where}.inner[{place}]", part, INNER_KEYS)
    return GivenFold(
        test=_entries(path, value[key], f"{where}.{key}"),
        train=_entries(path, value["train"], f"{where}.train") if "train" in value else None,
        validation=[_entries(path, part["validation"], f"{where}.inner") for part in inner],
    )


def read_given_split(path: Path, folds: int, repeats: int = 1) -> GivenSplit:
    """Parse a split file; entries are looked up later by `GivenSplit.resolve`.

    Args:
        path: of the JSON file.
        folds: number of folds that params.yaml asks for, over all repeats.
        repeats: `split.repeats`.

    Raises:
        DataError: missing or unreadable file, wrong form, another number of folds than `split.folds`, or folds that say they
            belong to another repeat.
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
    said = [fold.get("repeat", number * repeats // folds) if isinstance(fold, dict) else 0 for number, fold in enumerate(raw["folds"])]
    if len(said) != folds:
        raise DataError(
            f"split.file: {path} has {len(said)} folds and split.folds has {folds}; set split.folds to {list(range(len(said)))}"
            + (" and split.repeats to as many as the file has" if any(said) else "")
        )
    if said != [number * repeats // folds for number in range(folds)]:
        raise DataError(
            f"split.file: {path}: its {folds} folds say that they belong to repeats {said}, and split.repeats is {repeats}. Set "
            "split.repeats to the number of repeats, or take `repeat` out of the file."
        )
    classes = raw.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"split.file: {path}: classes must be a list of labels; found {classes!r}")
    return GivenSplit(path, [_fold(path, number, value) for number, value in enumerate(raw["folds"])], classes, repeats)
