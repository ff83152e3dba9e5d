"""Facts by which videos can be put into sub-groups: columns of the manifest, and chosen columns of the labels table.

Extraction carries only the columns that `evaluate.subgroups` names, already grouped, into a small table beside its report;
exact ages, paths and patients stay behind.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.data.manifest import VideoRow
from pipeline.errors import ConfigError, DataError
from pipeline.files import atomic_write, csv_text, unshield
from pipeline.registry import did_you_mean

__all__ = ["MANIFEST", "check_columns", "from_manifest", "grouped", "read_attributes", "write_attributes"]

KEY = "evaluate.subgroups"
MANIFEST = (
    "source", "kind", "extension", "frames", "seconds", "fps", "width", "height", "short_side", "channels", "mask", "mask_confidence",
    "mask_share",
)
"""What is known of every video; `short_side` is the smaller of width and height, `mask` the geometry of the scan area."""
MOST_LEVELS, MOST_NUMBERS, BINS = 20, 6, 4
"""Values a text column may have; different numbers shown as they are; groups that more numbers become."""


def check_columns(names: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """The columns to take from the labels table: name in `evaluate.subgroups` to name in the table.

    A column of the table goes before one of the manifest of the same name; upper and lower case are equal.

    Args:
        columns: those of the labels table, without paths and patients.

    Raises:
        ConfigError: a name is in neither, or is the column of paths or patients.
    """
    lower = {column.lower(): column for column in reversed(columns)}
    chosen, problems = {}, []
    for name in names:
        column = name if name in columns else lower.get(name.lower())
        if column is not None:
            chosen[name] = column
        elif name not in MANIFEST:
            near = did_you_mean(name, [*columns, *MANIFEST])
            problems.append(
                f"{KEY}: no column '{name}'.{near} Of the labels table (without paths and patients, which identify): "
                f"{', '.join(columns) or 'none'}; of every video: {', '.join(MANIFEST)}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return chosen


def from_manifest(rows: Sequence[VideoRow], name: str) -> dict[str, str]:
    """One column of `MANIFEST` as levels, by video id; empty where unknown."""
    values = {
        "extension": lambda row: PurePosixPath(row.path.rpartition("#")[0] or row.path).suffix.lower() or "none",
        "seconds": lambda row: row.frames_decoded / row.fps if row.fps else None,
        "short_side": lambda row: min(row.width, row.height),
        "frames": lambda row: row.frames_decoded,
        "mask": lambda row: row.mask or "none",
    }
    read = values.get(name, lambda row: getattr(row, name))
    return grouped(name, {row.video: "" if (value := read(row)) is None else str(value) for row in rows})


def grouped(name: str, values: Mapping[str, str]) -> dict[str, str]:
    """Values as levels: many different numbers become up to four groups of about equal size; empty stays empty.

    Raises:
        DataError: more than 20 different texts, which are no groups.
    """
    known = {value for value in values.values() if value}
    numbers = {value: number for value in known if (number := _number(value)) is not None}
    if len(numbers) == len(known) > MOST_NUMBERS:
        return _binned(values, numbers)
    if len(known) > MOST_LEVELS:
        raise DataError(
            f"{KEY}: column '{name}' has {len(known)} different texts; allowed are {MOST_LEVELS}, or numbers, which are put into groups. "
            "Join values into fewer groups in the labels table."
        )
    return dict(values)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _binned(values: Mapping[str, str], numbers: Mapping[str, float]) -> dict[str, str]:
    """Numbers as `below 30`, `30 to below 45`, `45 and above`."""
    every = np.array([numbers[value] for value in values.values() if value])
    edges = np.unique(np.quantile(every, np.linspace(0, 1, BINS + 1)[1:-1], method="inverted_cdf"))
    # Where one value is very frequent, it is a group of its own.
    edges = edges[edges > every.min()] if edges[-1] > every.min() else every[every > every.min()].min(keepdims=True)
    shown = [f"{edge:.4g}" for edge in edges]
    names = [f"below {shown[0]}", *(f"{low} to below {high}" for low, high in pairwise(shown)), f"{shown[-1]} and above"]
    return {video: names[int(np.searchsorted(edges, numbers[value], side="right"))] if value else "" for video, value in values.items()}


def write_attributes(
    path: Path, columns: Mapping[str, str], rows: Sequence[VideoRow], cells: Mapping[str, Mapping[str, str]]
) -> None:
    """Write the chosen columns of the labels table as levels by video id; a table without columns when none were chosen.

    Args:
        columns: what `check_columns` gave.
        cells: what the labels table says of a path, by column.

    Raises:
        DataError: too many different texts, or every value belongs to one patient and so is a name for him.
    """
    table: dict[str, dict[str, str]] = {}
    for name, column in columns.items():
        values = {row.video: cells.get(row.path.rpartition("#")[0] or row.path, {}).get(column, "") for row in rows}
        levels = table[name] = grouped(name, values)
        people: dict[str, set[str]] = {}
        for row in rows:
            if levels[row.video]:
                people.setdefault(levels[row.video], set()).add(row.patient or row.video)
        if len(people) > 2 and all(len(group) == 1 for group in people.values()):
            raise DataError(f"{KEY}: in column '{name}' every value belongs to one patient alone; it names patients and makes no groups")
    atomic_write(path, csv_text(["video", *table], ([row.video, *(levels[row.video] for levels in table.values())] for row in rows)))


def read_attributes(path: Path) -> dict[str, dict[str, str]]:
    """Levels by column and video id, as `write_attributes` wrote them; {} without the file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        rows, names = list(reader), [name for name in reader.fieldnames or [] if name != "video"]
        return {unshield(name): {row["video"]: unshield(row[name]) for row in rows} for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        raise DataError(f"{path}: damaged. Run the extract stage again (dvc repro extract).") from None
