"""The contract of a data set recipe, and the careful reading of folders and tables that every recipe needs.

A recipe says what a data set is and what its authors published about it; `scan` reads a copy on this disk, `check` names
every difference. Nothing here copies, changes or downloads a file.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.video import Media, find_media
from pipeline.errors import DataError

__all__ = ["Expect", "Recipe", "Row", "Scan", "TableRow", "below", "inside", "listing", "media_below", "raise_all", "read_table"]

SHOWN = 20
"""Lines of one message; the rest is counted."""
MAX_TABLE_BYTES = 64 << 20
MAX_CELL = 1000
"""Characters of a path, label or patient id; longer ones are no such thing."""
# What a spreadsheet would compute when somebody opens the table. A path may well begin with + or -.
_FORMULA = re.compile(r"[=@]|[+-].*[(!|]", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Row:
    """One medium. `path` is relative to the folder scanned; `kind` is video, image or frames; empty text means unknown."""

    path: str
    kind: str
    label: str = ""
    patient: str = ""
    split: str = ""
    """`train`, `validation`, `test`, or `fold 0`, `fold 1`, ... for the fold that tests it; empty without an official split."""
    frames: int = 0
    """Pictures of a frame folder; 0 where only decoding would tell."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """More columns of the labels table."""


@dataclass
class Scan:
    """What a recipe found in a folder."""

    root: Path
    rows: list[Row] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    """Differences from the layout: `missing: ...`, `surplus: ...`, `wrong: ...`."""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Parameters by dotted key that this copy needs, beside those of the recipe."""
    boxes: list[tuple[str, str, int, int, int, int]] = field(default_factory=list)
    """Annotated boxes: picture, label, and x_min, y_min, x_max, y_max in pixels."""
    form: str = ""
    """Which of the layouts a recipe knows was found; empty where there is one."""


@dataclass(frozen=True)
class Expect:
    """A published count: `number` of `what` (files, videos, images, frames, patients) among rows of that label and split."""

    what: str
    number: int
    label: str = ""
    split: str = ""

    def found(self, rows: Iterable[Row]) -> int | None:
        """The count among `rows`; None where it cannot be told without decoding."""
        rows = [row for row in rows if self.label in ("", row.label) and self.split in ("", row.split)]
        if self.what == "patients":
            return len({row.patient for row in rows} - {""})
        if self.what == "frames":
            counts = [1 if row.kind == "image" else row.frames for row in rows]
            return None if 0 in counts else sum(counts)
        if self.what == "files":
            return len(rows)
        return sum((row.kind == "image") == (self.what == "images") for row in rows)

    def deviation(self, rows: Iterable[Row]) -> str | None:
        """One line if `rows` do not have the published count."""
        found = self.found(rows)
        if found is None or found == self.number:
            return None
        where = "".join([f", label {self.label}" if self.label else "", f", split {self.split}" if self.split else ""])
        gap = self.number - found
        says = f"{gap} missing" if gap > 0 else f"{-gap} surplus"
        return f"count of {self.what}{where}: {found} found, {self.number} published ({says})"


@dataclass(frozen=True)
class Recipe:
    """One data set. Subclasses say how a copy is read (`read`); the rest is facts."""

    name: str
    title: str
    about: str
    citation: str
    licence: str
    obtain: tuple[str, ...]
    """Steps to get it, one line each."""
    layout: str
    """The tree on disk as it is checked."""
    labels: str
    """Where a label comes from."""
    patients: str
    """How patients are known, and how sure that is."""
    certainty: str
    """What of the above was not confirmed."""
    redistributable: bool = False
    published: tuple[Expect, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Parameters by dotted key to run it with."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Choices by name, each with a phrase; the first is the default."""
    presets: tuple[str, ...] = ()
    """Presets of this project that were made for it."""
    split_by: str = "path"
    """What split.json lists: `path`, or `patient` where media are divided further when frames have labels."""

    def read(self, root: Path, variant: str) -> Scan:
        """Read the tree under `root`, which exists; DataError if it has another layout. Every recipe has its own."""
        raise NotImplementedError

    def scan(self, path: Path, variant: str = "") -> Scan:
        """Read a copy of the data set.

        Args:
            path: its folder. variant: one of `variants`; the first if empty.

        Raises:
            DataError: no such folder or variant, another layout, or tables that cannot be trusted (file and row are named).
        """
        chosen = variant or next(iter(self.variants), "")
        if variant and variant not in self.variants:
            allowed = ", ".join(self.variants) or "none, the recipe has no variants"
            raise DataError(f"{self.name}: unknown variant '{variant}'. Allowed: {allowed}.")
        if not Path(path).is_dir():
            raise DataError(f"{path}: the folder does not exist; 'sonoscope data fetch {self.name}' says how to get {self.title}")
        try:
            scan = self.read(Path(path), chosen)
        except OSError as error:
            raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
        if not scan.rows:
            raise self.foreign(Path(path))
        rule = "no table can hold its name (control letter, backslash, blank at an end); rename it"
        scan.deviations += [f"wrong: {row.path}: {rule}" for row in scan.rows if not _fits_a_table(row.path)]
        scan.rows = [row for row in scan.rows if _fits_a_table(row.path)]
        times = Counter(row.path for row in scan.rows)
        scan.deviations += [f"wrong: {path} is listed {number} times" for path, number in times.items() if number > 1]
        # Names and cells come from outside; escape sequences in them would reach the terminal.
        for lines in (scan.deviations, scan.notes):
            lines[:] = [_CONTROL.sub("?", line) for line in lines]
        scan.rows = sorted({row.path: row for row in reversed(scan.rows)}.values(), key=lambda row: row.path)
        return scan

    def expected(self, scan: Scan, variant: str) -> tuple[Expect, ...]:
        """The published counts that fit what was scanned."""
        return self.published

    def check(self, scan: Scan, variant: str = "") -> list[str]:
        """Every difference from what the authors published, in words; empty if there is none."""
        chosen = variant or next(iter(self.variants), "")
        counts = (expect.deviation(scan.rows) for expect in self.expected(scan, chosen))
        return [*scan.deviations, *(line for line in counts if line)]

    def foreign(self, root: Path) -> DataError:
        """The error for a folder of another layout: what was expected, and what is there."""
        there = sorted(item.name for item in root.iterdir())
        more = f" and {len(there) - 8} more" if len(there) > 8 else ""
        tree = "\n".join(f"    {line}" for line in self.layout.strip("\n").splitlines())
        return DataError(f"{root}: not the layout of {self.title}. Expected:\n{tree}\n  Found: {', '.join(there[:8]) or 'nothing'}{more}.")


def _fits_a_table(path: str) -> bool:
    return "\\" not in path and path == path.strip()


def listing(lines: list[str], shown: int = SHOWN) -> list[str]:
    """The first lines, and how many more there are."""
    return lines if len(lines) <= shown else [*lines[:shown], f"... and {len(lines) - shown} more"]


def raise_all(title: str, problems: list[str]) -> None:
    """DataError with all problems, if there are any."""
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError("\n  ".join([f"{title}: {count}", *listing(problems)]))


def inside(root: Path, name: str) -> Path:
    """`root`/`name`, which must not lead out of `root`, also not by a link.

    Raises:
        DataError: it does, or it is no file.
    """
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{name}: leads out of the folder {root}; put the file itself there")
    if not path.is_file():
        raise DataError(f"{name}: not found in {root}")
    return path


def below(root: Path, *wanted: str) -> str | None:
    """The folder that holds all of `wanted` (files or folders): "" for `root`, `name/` for one folder below; None if none does."""
    for prefix in ("", *(f"{item.name}/" for item in sorted(root.iterdir()) if item.is_dir() and not item.is_symlink())):
        if all((root / prefix / name).exists() for name in wanted):
            return prefix
    return None


def media_below(root: Path, prefix: str = "", named: Iterable[str] = (), notes: list[str] | None = None) -> dict[str, Media]:
    """The media of `root` whose path begins with `prefix`, by path; what was left out (links, other files) goes into `notes`."""
    survey = find_media(root, set(named))
    if notes is not None:
        notes += [note for note in survey.notes if "links lead out" in note]
    return {item.path: item for item in survey.media if item.path.startswith(prefix)}


@dataclass(frozen=True)
class TableRow:
    """One row of a table: where it stands (`videos.csv line 7`), and its stripped cells."""

    where: str
    cells: Mapping[str, str]


def _cell_problem(where: str, column: str, value: str) -> str | None:
    if len(value) > MAX_CELL:
        return f"{where}: column {column} holds {len(value)} characters; at most {MAX_CELL} are allowed"
    if _CONTROL.search(value):
        return f"{where}: column {column} holds a line break or control character: {value[:40]!r}"
    if _FORMULA.match(value):
        return f"{where}: column {column} begins like a spreadsheet formula: {value[:40]!r}; write it as plain text"
    return None


def _path_problem(where: str, value: str) -> str | None:
    path = PurePosixPath(value)
    if not value or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", value):
        return f"{where}: path {value[:80]!r} is empty or leads out of the folder"
    return None


def read_table(
    root: Path, name: str, columns: Iterable[str], path_column: str = "", headers: Iterable[str] = (), loose: bool = False
) -> list[TableRow]:
    """Read a CSV table whose cells are used as paths, labels and names, and distrust it.

    Args:
        root: the data set's folder. name: of the table in it.
        columns: that must be there and are checked; other columns are handed on unchecked.
        path_column: the one of them that names files; backslashes become slashes.
        headers: names of the cells of a table without a header line.
        loose: pass over surplus cells at the end of a row.

    Raises:
        DataError: a table outside the folder, too large, or not CSV; a column that is missing; or, all at once with their
            lines, rows of another length, formulas, huge cells, control characters, and paths that lead out of the folder.
    """
    path, headers = inside(root, name), list(headers)
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise DataError(f"{name}: {path.stat().st_size / 1e6:.0f} MB; a table of at most {MAX_TABLE_BYTES >> 20} MB is expected")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Spreadsheets of western Europe; only comments hold such letters in the tables known.
        text = raw.decode("cp1252", "replace")
    reader = csv.DictReader(io.StringIO(text, newline=""), fieldnames=headers or None)
    rows: list[TableRow] = []
    problems: list[str] = []
    try:
        found = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = found
        lacking = [column for column in columns if column not in found]
        if lacking:
            raise DataError(f"{name}: no column {', '.join(lacking)}. Found: {', '.join(found)[:300] or 'nothing'}")
        for cells in reader:
            where = f"{name} line {reader.line_num}"
            surplus = cells.pop(None, None)
            if (surplus and not loose) or any(cells[column] is None for column in columns):
                problems.append(f"{where}: does not have {len(found)} cells")
                continue
            kept = {column: (cell or "").strip() for column, cell in cells.items()}
            if path_column:
                kept[path_column] = kept[path_column].replace("\\", "/")
            wrong = [problem for column in columns if (problem := _cell_problem(where, column, kept[column]))]
            if path_column and not wrong and (problem := _path_problem(where, kept[path_column])):
                wrong.append(problem)
            problems += wrong
            if not wrong:
                rows.append(TableRow(where, kept))
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num + 1}: not CSV ({error})") from None
    raise_all(str(root / name), problems)
    return rows
