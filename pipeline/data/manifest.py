"""The table every stage shares: one row a video or still image, with pseudonymous patient, label, counts and warnings.

Schema 3, UTF-8 CSV sorted by the bytes of `path`, texts shielded against spreadsheets (`files.shield`). Reading is strict: a wrong cell is
named by file, row and column.
"""

from __future__ import annotations

import csv
import hmac
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pipeline.errors import DataError
from pipeline.files import atomic_write, csv_text, hash_bytes, read_json, unshield, write_json

__all__ = ["SCHEMA", "Manifest", "VideoRow", "merge_identical", "pseudonym", "read_hints", "write_hints"]

SCHEMA = 3
_VIDEO_ID = re.compile(r"[0-9a-f]{16}")
_CHOICES = {
    "kind": ("video", "image", "frames", "stretch"),
    "fps_source": (
        "container", "table", "assumed", "none", "FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate",
    ),
    "channels": ("1", "3"),
    "mask": ("", "kept", "convex", "phased", "linear", "free", "box"),
}
_OPTIONAL_NUMBERS = ("fps", "frames_claimed", "mask_confidence", "mask_share")


@dataclass(frozen=True)
class VideoRow:
    """One video, still image (1 frame) or frame folder of the store. Sizes in pixels; `bytes` is the tar's size."""

    video: str
    """First 16 hex digits of `sha256`; names the files of the store."""
    source: str
    path: str
    """Relative to the source folder. Local knowledge: never sent to tracking."""
    sha256: str
    patient: str
    """Pseudonym, or empty when unknown."""
    label: str
    """Empty when unlabelled."""
    kind: str
    """`video`, `image`, `frames` (a folder of pictures), or `stretch`: the part of a video with one label of `data.frame_labels`."""
    frames: int
    """Frames in the store."""
    frames_decoded: int
    frames_claimed: int | None
    fps: float | None
    fps_source: str
    width: int
    height: int
    stored_width: int
    stored_height: int
    channels: int
    bytes: int
    warnings: str = ""
    """Separated by `; `."""
    study: str = ""
    """Pseudonym of the DICOM study, or empty."""
    mask: str = ""
    """Geometry of the mask; `kept` where nothing was cut, empty where none was looked for."""
    mask_confidence: float | None = None
    mask_share: float | None = None
    """Share of the picture that is kept."""
    schema: int = SCHEMA


COLUMNS = ("schema", *(field.name for field in fields(VideoRow) if field.name != "schema"))


def pseudonym(name: str, key: str, letter: str = "P") -> str:
    """`letter` and 10 hex digits of HMAC-SHA256 of a patient (P) or study (S) id; an empty id (unknown) stays empty."""
    if not name:
        return ""
    return letter + hmac.new(key.encode("utf-8"), name.encode("utf-8"), "sha256").hexdigest()[:10]


def merge_identical(rows: list[VideoRow]) -> list[VideoRow]:
    """One row for each content: files with equal bytes are one video, whatever they are called.

    A contradiction is never decided silently: differing labels leave the row unlabelled, differing patients keep the
    smaller pseudonym, and `warnings` says so (naming both pseudonyms). Unknown labels and patients contradict nothing.
    """
    by_video: dict[str, list[VideoRow]] = {}
    for row in sorted(rows, key=lambda item: os.fsencode(item.path)):
        by_video.setdefault(row.video, []).append(row)
    merged = []
    for group in by_video.values():
        first = group[0]
        if len(group) > 1:
            labels = sorted({row.label for row in group} - {""})
            patients = sorted({row.patient for row in group} - {""})
            notes = [first.warnings] if first.warnings else []
            notes.append(f"same content in {len(group)} files")
            if len(labels) > 1:
                notes.append(f"same content under two labels: {' '.join(labels)}")
            if len(patients) > 1:
                notes.append(f"same content under two patients: {' '.join(patients)}")
            first = replace(
                first, label=labels[0] if len(labels) == 1 else "", patient=patients[0] if patients else "",
                warnings="; ".join(notes),
            )
        merged.append(first)
    return merged


def write_hints(store: Path, hints: Mapping[str, str]) -> None:
    """Keep beside the manifest what extraction had to say of missing columns, by role (`label`, `patient`), for the stages behind it."""
    write_json(store / "hints.json", dict(hints))


def read_hints(store: Path) -> dict[str, str]:
    """What `write_hints` kept in the folder of a frame store; empty for a store without (of an older version, or written by hand)."""
    try:
        found = read_json(store / "hints.json")
    except (OSError, ValueError):
        return {}
    return {str(role): str(text) for role, text in found.items()} if isinstance(found, dict) else {}


class Manifest:
    """All rows of one source, sorted by the bytes of `path`."""

    def __init__(self, rows: list[VideoRow]) -> None:
        self.rows = sorted(rows, key=lambda row: os.fsencode(row.path))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Parse and check a manifest.

        Raises:
            DataError: Naming file, row and column of the first wrong cell, or the missing columns.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(f"{path}: not found. Run the extract stage first (dvc repro extract).") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        reader = csv.DictReader(io.StringIO(text, newline=""))
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            found = ", ".join(reader.fieldnames or [])
            raise DataError(
                f"{path}: columns missing: {', '.join(missing)}. Found: {found}. A manifest of an older version? Run the extract stage "
                f"again (dvc repro extract)."
            )
        try:
            rows = [_parse(path, number, cells) for number, cells in enumerate(reader, start=2)]
        except csv.Error as error:
            raise DataError(f"{path}: row {reader.line_num}: not CSV ({error})") from None
        seen: set[str] = set()
        for number, row in enumerate(rows, start=2):
            if row.video in seen:
                raise DataError(f"{path}: row {number}, column video: {row.video} appears twice")
            seen.add(row.video)
        return cls(rows)

    def write(self, path: Path) -> None:
        """Write the table atomically."""
        atomic_write(path, csv_text(COLUMNS, ([getattr(row, name) for name in COLUMNS] for row in self.rows)))

    def digest(self) -> str:
        """SHA-256 over the rows in order, independent of CSV quoting; 64 hex digits."""
        return hash_bytes(*(json.dumps(asdict(row), sort_keys=True) for row in self.rows))


def _number(path: Path, row: int, column: str, cell: str, kind: type[int] | type[float]) -> int | float:
    try:
        value = kind(cell)
        finite = math.isfinite(value)
    except (ValueError, OverflowError):  # no number, or more digits than a float has room for
        value, finite = 0, False
    if not finite or value < 0:
        raise DataError(f"{path}: row {row}, column {column}: found {cell!r}, expected a number of at least 0")
    return value


def _parse(path: Path, row: int, cells: dict[str | None, str | None]) -> VideoRow:
    """One checked row of the CSV file; `row` is its line number for messages."""
    if None in cells or any(cells[name] is None for name in COLUMNS):
        raise DataError(f"{path}: row {row}: more or fewer cells than the {len(COLUMNS)} columns")
    if cells["schema"] != str(SCHEMA):
        raise DataError(
            f"{path}: row {row}, column schema: found {cells['schema']!r}, this version reads {SCHEMA}. Run the extract stage "
            f"again (dvc repro extract)."
        )
    if not _VIDEO_ID.fullmatch(cells["video"] or ""):
        # The id becomes a file name, so nothing but hex digits may pass.
        raise DataError(f"{path}: row {row}, column video: found {cells['video']!r}, expected 16 hex digits")
    for column, allowed in _CHOICES.items():
        if cells[column] not in allowed:
            raise DataError(
                f"{path}: row {row}, column {column}: found {cells[column]!r}, allowed: {', '.join(allowed)}"
            )
    values: dict[str, str | int | float | None] = {}
    for item in fields(VideoRow):
        cell = cells[item.name] or ""
        if item.name in _OPTIONAL_NUMBERS and cell == "":
            values[item.name] = None
        elif item.type.startswith("str"):
            values[item.name] = unshield(cell)
        else:
            values[item.name] = _number(path, row, item.name, cell, float if item.type.startswith("float") else int)
    return VideoRow(**values)
