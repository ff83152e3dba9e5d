"""Labels tables: which file has which label and patient, checked against the folder, all problems reported at once.

Without a table, class folders (`<class>/<file>`) give the labels. Patient ids leave this module as the table has them;
`extract.py` replaces them by pseudonyms.
"""

from __future__ import annotations

import csv
import difflib
import io
import posixpath
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.numbered import clips_or_stills
from pipeline.data.video import Media, Survey, find_media
from pipeline.errors import ConfigError, DataError, some
from pipeline.files import is_odd, shield, unshield
from pipeline.parameters import DataParams
from pipeline.registry import did_you_mean

__all__ = ["Label", "LabelledMedia", "read_labelled_media", "survey_labels"]

COLUMN_NAMES = {
    "path": ("path", "file", "filename", "video", "image", "name"),
    "label": ("label", "class", "diagnosis", "target"),
    "patient": ("patient", "patient_id", "subject", "subject_id", "case"),
}
"""Recognised column names, the first that exists wins; upper and lower case are equal."""
_SHOWN = 20
"""Problems listed in one error; the rest is counted."""


@dataclass(frozen=True)
class Label:
    """What is said of one file: label and patient id, empty when unknown; frames per second, None when unknown."""

    label: str = ""
    patient: str = ""
    fps: float | None = None


@dataclass
class LabelledMedia:
    """The media of one source with their labels, in path order, and notes on everything left out or unlabelled."""

    media: list[Media]
    labels: dict[str, Label]
    notes: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    """Those of the notes that are about tables without labels."""
    doubtful: list[str] = field(default_factory=list)
    """Those of the notes that warn of folders of numbered pictures."""
    columns: list[str] = field(default_factory=list)
    """Columns of the tables, without those of paths and patients."""
    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    """What the tables say of a path in these columns."""
    by_folder: bool = False
    """Whether the labels are nothing but names of folders."""
    hints: dict[str, str] = field(default_factory=dict)
    """Of the main source, by role (label, patient): which column is missing or empty, and how to name it."""


@dataclass
class _Row:
    """One row of a table: where it stands, the path as written, what it says, and all its cells for `data.include`."""

    where: str
    path: str
    said: Label
    cells: dict[str, str]


@dataclass
class _Seen:
    """One table that was looked into: its columns, and which of them was taken for a role (path, label, patient)."""

    name: str
    columns: list[str]
    chosen: dict[str, str]


@dataclass
class _Tables:
    """All rows read, the columns seen, and problems that do not stop the reading."""

    rows: list[_Row] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    identifying: set[str] = field(default_factory=set)
    """Columns of paths and patients."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    seen: list[_Seen] = field(default_factory=list)


def read_labelled_media(source: str, params: DataParams) -> LabelledMedia:
    """Find the media of a source and attach labels, patients and filters.

    `data.include` and `data.media` choose among the main source only; extra sources are taken whole.

    Args:
        source: `main`, or a key of `data.extra_sources`.
        params: The `data` section.

    Raises:
        ConfigError: An `include` filter names a column or value that does not exist.
        DataError: Missing folder or table, missing columns, or any disagreement between table and files; the message
            lists all of them.
    """
    main = source == "main"
    root = Path(params.source if main else params.extra_sources[source].path)
    setting = params.labels if main else params.extra_sources[source].labels
    include, framed = (params.include, bool(params.frame_labels)) if main else ({}, False)
    if not root.is_dir():
        key = "data.source" if main else f"data.extra_sources.{source}.path"
        raise DataError(f"{key}: folder '{root}' does not exist. Name the folder that holds the videos.")
    found, tables = _gather(root, setting, params, strict=main)
    if tables.files:
        if tables.problems:
            raise DataError(_listing(f"{root}: the labels table and the files disagree", tables.problems))
        if include:
            _filter(found, tables, include)
    elif tables.problems:
        raise DataError(_listing(f"{root}: the labels tables cannot be used", tables.problems))
    else:
        if include:
            raise ConfigError(f"data.include: needs a labels table; none was found in {root} (data.labels: {setting})")
        if setting == "auto" and not framed:
            _label_by_folder(found)
    if main and params.media != "all":
        found.media = [item for item in found.media if (item.kind == "image") == (params.media == "image")]
    if not found.media:
        told = "".join(f"\n  {note}" for note in found.notes)
        raise DataError(f"{root}: no video or image to read is left (data.media: {params.media}){told}")
    unlabelled = sum(not found.labels.get(item.path, Label()).label for item in found.media)
    if framed:
        found.notes.append(f"labels come from the annotation file of each video (data.frame_labels: {params.frame_labels})")
    elif unlabelled:
        found.notes.append(f"{unlabelled} of {len(found.media)} files have no label and serve pretraining only")
    found.labels = {item.path: found.labels.get(item.path, Label()) for item in found.media}
    if main and tables.seen and not framed and not any(said.label for said in found.labels.values()):
        found.hints["label"] = _hint("label", tables.seen, root)
    if main and any((framed or said.label) and not said.patient for said in found.labels.values()):
        found.hints["patient"] = _hint("patient", tables.seen, root)
    return found


def _hint(role: str, seen: list[_Seen], root: Path) -> str:
    """Why no table gives the label or the patient (`role`), and what to do: columns found, and the setting that names one of them."""
    tables = [table for table in seen if "label" in table.chosen] or seen
    if not tables:
        return f"no labels table names a {role}. Put a CSV table with the columns path, label and patient into {root}"
    said = []
    for name, columns, chosen in ((table.name, table.columns, table.chosen) for table in tables[:3]):
        if role in chosen and "path" in chosen:
            said.append(f"{name}: column {chosen[role]} is empty there. Fill it")
            continue
        missing = [item for item in ("path", role) if item not in chosen]
        # Where no column has a known name, the first line may be no header but hold somebody's name.
        shown = f"columns found: {some(columns, 20)}" if chosen else "its first line is no known header"
        text = f"{name}: no column is taken for the {' or the '.join(missing)} ({shown})"
        free = [column for column in columns if column and column not in chosen.values() and column.lower() != "fps"]
        if chosen and free and missing == [role]:
            which = free[0] if len(free) == 1 else f"one of {some(free, 20)}"
            example = "" if len(free) == 1 else ", for example"
            text += f". If {which} is the {role}: -S {shlex.quote(f'data.{role}_column={free[0]}')}{example}"
        else:
            text += f". Name {'it' if len(missing) == 1 else 'them'} with {' and '.join(f'data.{item}_column' for item in missing)}, or add the column"
        said.append(text)
    return "; ".join(said)


def _gather(root: Path, setting: str, params: DataParams, strict: bool) -> tuple[LabelledMedia, _Tables]:
    """Media and tables of a folder, matched; disagreements stand in the tables' problems."""
    tables = _read_tables(root, setting, params, strict)
    escaping = [row for row in tables.rows if _escapes(row)]
    tables.problems += [f"{row.where}: path '{row.path}' leads out of the folder" for row in escaping]
    tables.rows = [row for row in tables.rows if not _escapes(row)]
    survey = find_media(root, {row.path for row in tables.rows})
    found = LabelledMedia(survey.media, {}, survey.notes + tables.notes, tables.notes)
    if tables.files:
        _attach(found, tables, survey)
    elif not (strict and params.frame_labels):
        found.media, said, doubtful = clips_or_stills(survey.media)
        found.notes += [said] if said else []
        found.doubtful += [said] if doubtful else []
    return found, tables


def survey_labels(root: Path, setting: str, params: DataParams) -> tuple[LabelledMedia, list[str]]:
    """All media of a folder with the labels they have, and what is wrong with the tables, one line a problem.

    Unlike `read_labelled_media` nothing is filtered and a disagreement stops nothing. `setting` is that of `data.labels`.

    Raises:
        DataError: The folder, or a table named by `setting`, does not exist.
    """
    found, tables = _gather(root, setting, params, strict=True)
    if not tables.files and setting == "auto":
        _label_by_folder(found)
    found.labels = {item.path: found.labels.get(item.path, Label()) for item in found.media}
    return found, tables.problems


def _listing(title: str, problems: list[str]) -> str:
    """Title and one line a problem, shortened after `_SHOWN`."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"{title}: {count}", *(f"  {text}" for text in problems[:_SHOWN])]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    return "\n".join(lines)


def _escapes(row: _Row) -> bool:
    """Whether a path is absolute or climbs out of the folder."""
    return row.path.startswith(("/", "../")) or row.path == ".." or (len(row.path) > 1 and row.path[1] == ":")


def _read_tables(root: Path, setting: str, params: DataParams, strict: bool) -> _Tables:
    """Read the tables `setting` names: none, all `*.csv` at the top of `root` (auto), or one file in `root` or elsewhere."""
    tables = _Tables()
    if setting == "none":
        return tables
    if setting == "auto":
        paths = sorted(path for path in root.iterdir() if path.suffix.lower() == ".csv" and path.name[0] != "." and not is_odd(path))
    else:
        path = root / setting
        outside = not path.resolve().is_relative_to(root.resolve())
        if (outside or not path.is_file()) and Path(setting).is_file():
            path, outside = Path(setting), False
        if outside:
            raise DataError(f"labels table '{setting}': must lie inside the source folder {root}, or be the path of a file from the project's folder")
        if not path.is_file():
            near = did_you_mean(setting, [item.name for item in root.glob("*.csv")])
            raise DataError(
                f"labels table '{setting}': not found in {root}.{near} Use auto, none, or a file name there."
            )
        paths = [path]
    for path in paths:
        _read_table(path, params, tables, required=setting != "auto", strict=strict)
    return tables


def _read_table(path: Path, params: DataParams, tables: _Tables, required: bool, strict: bool) -> None:
    """Append one table; without `required` (auto), a CSV file without usable columns is noted and skipped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        tables.problems.append(f"{path.name}: not readable as UTF-8 text; save it as UTF-8 CSV")
        return
    header = text.splitlines()[0] if text.strip() else ""
    # Spreadsheets write semicolons in many countries.
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        chosen = _choose_columns(path.name, columns, params, tables, required, strict)
        if chosen is None:
            return
        tables.files += 1
        tables.columns += [name for name in columns if name not in tables.columns]
        tables.identifying |= {column for role, column in chosen.items() if role != "label"}
        for cells in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in cells or None in cells.values():
                tables.problems.append(f"{where}: does not have {len(columns)} cells like the header")
                continue
            _append_row(where, {name: unshield(cell.strip()) for name, cell in cells.items()}, chosen, tables)
    except csv.Error as error:
        tables.problems.append(f"{path.name} line {reader.line_num}: not CSV ({error})")


def _append_row(where: str, cells: dict[str, str], chosen: dict[str, str], tables: _Tables) -> None:
    """Append one row; wholly empty rows (spreadsheets leave them at the end) are passed over."""
    if not any(cells.values()):
        return
    written = cells[chosen["path"]]
    if not written:
        tables.problems.append(f"{where}: column {chosen['path']} is empty")
        return
    fps = None
    named = next((name for name in cells if name.lower() == "fps"), None)
    if named and cells[named]:
        try:
            fps = float(cells[named])
        except ValueError:
            fps = -1.0
        if not 1 <= fps <= 1000:
            tables.problems.append(
                f"{where}: column {named}: found '{cells[named]}', expected frames per second, 1 to 1000"
            )
            return
    said = Label(cells.get(chosen.get("label", ""), ""), cells.get(chosen.get("patient", ""), ""), fps)
    tables.rows.append(_Row(where, posixpath.normpath(written.replace("\\", "/")), said, cells))


def _choose_columns(
    name: str, columns: list[str], params: DataParams, tables: _Tables, required: bool, strict: bool
) -> dict[str, str] | None:
    """The column of each role (path, label, patient); None when the table is skipped, or wrong (a problem is added)."""
    by_lower = {column.lower(): column for column in reversed(columns)}
    chosen: dict[str, str] = {}
    settings = {"path": params.path_column, "label": params.label_column, "patient": params.patient_column}
    for role, setting in settings.items():
        known = COLUMN_NAMES[role] if setting == "auto" else (setting.lower(),)
        column = next((by_lower[item] for item in known if item in by_lower), None)
        if column is not None:
            chosen[role] = column
        elif setting != "auto" and strict:
            near = did_you_mean(setting, columns)
            tables.problems.append(
                f"data.{role}_column: {name} has no column '{setting}'.{near} Found: {', '.join(columns)}"
            )
            return None
    tables.seen.append(_Seen(name, columns, chosen))
    missing = [role for role in ("path", "label") if role not in chosen]
    if not missing:
        return chosen
    nearest = {role: _nearest(role, columns) for role in missing}
    slips = [f"'{found}' looks like a {role} column" for role, found in nearest.items() if found]
    says = "; ".join(f"no {role} column (recognised: {', '.join(COLUMN_NAMES[role])})" for role in missing)
    text = f"{name}: {says}. Found: {', '.join(columns) or 'nothing'}"
    if "path" in chosen and "patient" in chosen and not required and not slips:
        framed = strict and params.frame_labels
        tables.notes.append(f"{text}; " + ("it gives the patients" if framed else "its files stay unlabelled"))
        return chosen
    if required or ("path" in chosen and slips):
        hint = f"; {' and '.join(slips)}" if slips else ""
        keys = " and ".join(f"data.{role}_column" for role in missing)
        tables.problems.append(f"{text}{hint}. Rename it or set {keys}")
    else:
        tables.notes.append(f"{text}; the table was not used")
    return None


def _nearest(role: str, columns: list[str]) -> str | None:
    """A column whose name is nearly a recognised one, such as `diagnose` for `diagnosis`."""
    for column in columns:
        if difflib.get_close_matches(column.lower(), COLUMN_NAMES[role], n=1, cutoff=0.75):
            return column
    return None


class _Finder:
    """Finds the file a table means: by its path, or by a bare name or stem if that fits exactly one file."""

    def __init__(self, media: Iterable[Media]) -> None:
        self._exact: dict[str, str] = {}
        self._loose: dict[str, list[str]] = {}
        for item in media:
            # Unicode spells an accented letter in two ways; file systems and spreadsheets differ in which they use.
            self._exact[unicodedata.normalize("NFC", item.path)] = item.path
            name = posixpath.basename(item.path)
            keys = {item.path, name, posixpath.splitext(item.path)[0], posixpath.splitext(name)[0]}
            for key in {unicodedata.normalize("NFC", key) for key in keys}:
                self._loose.setdefault(key, []).append(item.path)

    def find(self, written: str) -> list[str]:
        """All paths a table entry may mean; one if it is clear."""
        key = unicodedata.normalize("NFC", written)
        return [self._exact[key]] if key in self._exact else self._loose.get(key, [])

    def hint(self, written: str) -> str:
        """` Did you mean ...?` for a near path."""
        return did_you_mean(written, self._exact.values())


def _attach(found: LabelledMedia, tables: _Tables, survey: Survey) -> None:
    """Match rows to files; disagreements are added to `tables.problems`. Sets each row's `path` to the file's."""
    finder = _Finder(survey.media)
    first: dict[str, _Row] = {}
    hints = 0
    for row in tables.rows:
        # A table of another program may hold a name that really begins with an apostrophe.
        matches = finder.find(row.path) or finder.find(shield(row.path))
        if len(matches) != 1:
            what = f"fits several files ({', '.join(matches[:4])}); write the path" if matches else "does not exist"
            # Near names cost a comparison with every file, so only the first few lines get them.
            hint = finder.hint(row.path) if not matches and hints < 5 else ""
            hints += not matches
            tables.problems.append(f"{row.where}: file '{row.path}' {what}.{hint}")
            continue
        row.path = matches[0]
        before = first.setdefault(row.path, row)
        for role in ("label", "patient"):
            old, new = getattr(before.said, role), getattr(row.said, role)
            if old != new:
                tables.problems.append(f"{row.where}: '{row.path}' has {role} '{new}', but '{old}' at {before.where}")
    found.labels = {path: row.said for path, row in first.items()}
    found.columns = [name for name in tables.columns if name not in tables.identifying]
    for row in tables.rows:
        known = found.cells.setdefault(row.path, {})
        known.update({name: cell for name, cell in row.cells.items() if name in found.columns and not known.get(name)})


def _filter(found: LabelledMedia, tables: _Tables, include: dict[str, list[str | int | float]]) -> None:
    """Keep the files with a row that passes every `data.include` entry; files without a row are left out too."""
    problems = []
    lower = {column.lower(): column for column in reversed(tables.columns)}
    keep = {row.path for row in tables.rows}
    for column, wanted in include.items():
        actual = column if column in tables.columns else lower.get(column.lower())
        if actual is None:
            near = did_you_mean(column, tables.columns)
            problems.append(f"data.include.{column}: no such column.{near} Columns: {', '.join(tables.columns)}")
            continue
        counts = Counter(row.cells[actual] for row in tables.rows if actual in row.cells)
        values = {_canonical(value) for value in counts}
        for value in wanted:
            if _canonical(value) not in values:
                near = did_you_mean(str(value), counts)
                shown = ", ".join(f"'{text}' ({count})" for text, count in counts.most_common(12))
                problems.append(f"data.include.{column}: no row has the value '{value}'.{near} Values: {shown}")
        allowed = {_canonical(value) for value in wanted}
        keep &= {row.path for row in tables.rows if actual in row.cells and _canonical(row.cells[actual]) in allowed}
    if problems:
        raise ConfigError(_listing("data.include matches nothing", problems))
    if not keep:
        raise ConfigError("data.include: no row passes all conditions together; each of them alone matches some")
    left_out = len(found.media) - sum(item.path in keep for item in found.media)
    found.media = [item for item in found.media if item.path in keep]
    if left_out:
        found.notes.append(f"data.include leaves out {left_out} files")


def _canonical(value: str | int | float) -> str:
    """Numbers compare as numbers (`1` in params.yaml is `1.0` in a table), everything else as text."""
    try:
        return repr(float(value))
    except ValueError:
        return str(value).strip()


def _label_by_folder(found: LabelledMedia) -> None:
    """`<class>/<file>` for every file and at least two classes; any other layout gives no labels."""
    parts = [item.path.split("/") for item in found.media]
    classes = sorted({part[0] for part in parts if len(part) == 2})
    if len(classes) >= 2 and all(len(part) == 2 for part in parts):
        found.labels = {item.path: Label(label=part[0]) for item, part in zip(found.media, parts, strict=True)}
        found.notes.append(f"no labels table: the folders {', '.join(classes)} give the labels; no table names patients")
        found.by_folder = True
    else:
        found.notes.append("no labels table, and not every file lies in a class folder (<class>/<file>): everything is unlabelled")
