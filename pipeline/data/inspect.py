"""`sonoscope inspect`: everything that is in a folder of media and everything that is wrong with it, before any computation.

Each file is looked at in a process of its own (`inspect_file`); then files are compared with one another and with the
labels table. `inspect_report.py` shows the result.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from pipeline.data.duplicates import FRAMES, VideoPrint, find_near_duplicates, join_pairs, print_video
from pipeline.data.labels import Label, survey_labels
from pipeline.data.limits import watched
from pipeline.data.manifest import pseudonym
from pipeline.data.pool import CRASHED, run_isolated, usable_cores
from pipeline.data.probe import Header, read_header
from pipeline.data.trouble import CUT_TURN, KINDS, REPEAT, Finding, FrameWatch, check_cuts, check_frames, check_picture, check_times, detail, tint, turn
from pipeline.data.video import Media, content_hash
from pipeline.errors import DataError
from pipeline.files import hash_file, is_full
from pipeline.parameters import DataParams
from pipeline.registry import METHODS

__all__ = ["FileReport", "Inspection", "inspect_file", "inspect_folder", "shortcuts"]

PRINT_SIDE = 160
THUMB = 144
"""Pixels of the long side of what is compared between files, and of the pictures on the page."""
SHORT = 32
"""Only clips with fewer frames are held against what the methods need."""
FOLDS = 5
_KNOWN = ("DICOMDIR", "Thumbs.db")
PURE, PURE_FILES, GAIN = 0.85, 5, 0.15
"""A shortcut: a property whose files (at least so many, of several patients) are nearly all of one class, or by which classes
are told this much better than by guessing."""


@dataclass(frozen=True)
class Look:
    """One medium to look at. `quick`: headers only."""

    media: Media
    quick: bool
    key: str = ""


@dataclass
class FileReport:
    """What one file is, and what is wrong with it."""

    path: str
    kind: str
    bytes: int = 0
    header: Header = field(default_factory=Header)
    frames: int | None = None
    """Decoded; in quick mode what the header claims."""
    repeated: float | None = None
    """Share of neighbours that are almost equal."""
    tint: tuple[float, float] = (0.0, 0.0)
    label: str = ""
    patient: str = ""
    """Pseudonym."""
    findings: list[Finding] = field(default_factory=list)
    pictures: list[tuple[int, bytes]] = field(default_factory=list)
    """Frame numbers and JPEGs that show the findings."""
    print: VideoPrint | None = None

    @property
    def readable(self) -> bool:
        """Whether extraction will read it."""
        return not any(finding.code == "unreadable" for finding in self.findings)

    def has(self, code: str) -> bool:
        """Whether there is a finding of this kind."""
        return any(finding.code == code for finding in self.findings)


@dataclass
class Inspection:
    """The whole picture. `findings` are those of the folder; those of a file stand in its report."""

    folder: Path
    quick: bool
    files: list[FileReport] = field(default_factory=list)
    others: list[tuple[str, Finding]] = field(default_factory=list)
    """Paths that are not media, and why they are listed."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def all_findings(self) -> list[tuple[str, Finding]]:
        """Every finding with the path it belongs to (empty for the folder), most serious kinds first."""
        found = [("", finding) for finding in self.findings] + self.others
        found += [(report.path, finding) for report in self.files for finding in report.findings]
        place = {code: index for index, code in enumerate(KINDS)}
        weight = {"error": 0, "warning": 1, "note": 2}
        return sorted(found, key=lambda item: (weight[KINDS[item[1].code].severity], place[item[1].code], item[0]))


# --- one file ---------------------------------------------------------------------------------------------------------


class _ClipWatch(FrameWatch):
    """Also remembers likeness to the frame before, times, tints, copies to compare files by, and the telling frames."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[float] = []
        self.times: list[float] = []
        self.tints: list[tuple[float, float]] = []
        self.copies: list[tuple[int, np.ndarray]] = []
        self.sizes: set[tuple[int, int]] = set()
        self.told: dict[str, tuple[int, np.ndarray]] = {}
        self._stride, self._small, self._last = 1, None, None

    def look(self, frame: np.ndarray, milliseconds: float | None) -> None:
        """Take the next frame, uint8 grey or BGR, and its presentation time."""
        index = len(self.levels)
        self.see(frame)
        small = detail(self.grid)
        if self._small is not None:
            self.turns.append(turn(small, self._small))
        self._small = small
        self.sizes.add((frame.shape[1], frame.shape[0]))
        if milliseconds is not None:
            self.times.append(milliseconds)
        if index % 16 == 0:
            self.tints.append(tint(frame))
        if "dark" not in self.told or self.levels[-1] < self.levels[self.told["dark"][0]]:
            self.told["dark"] = index, _shrink(frame, THUMB)
        jump = self._last is not None and self.turns[-1] > CUT_TURN
        if jump and ("after" not in self.told or self.steps[-1] > self.steps[self.told["after"][0] - 1]):
            self.told |= {"before": (index - 1, _shrink(self._last, THUMB)), "after": (index, _shrink(frame, THUMB))}
        self._last = frame
        if index % self._stride == 0:
            self.copies.append((index, _shrink(frame, PRINT_SIDE)))
            if len(self.copies) >= 4 * FRAMES:
                self.copies, self._stride = self.copies[::2], 2 * self._stride


def _shrink(frame: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(frame.shape[:2])
    if scale >= 1:
        return frame.copy()
    size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def _size(media: Media) -> int:
    try:
        paths = media.location.iterdir() if media.kind == "frames" else [media.location]
        return sum(path.stat().st_size for path in paths)
    except OSError:
        return 0


def inspect_file(task: Look) -> FileReport:
    """Look at one medium. Never raises for a bad file; DataError where the disk of temporary files is full."""
    media = task.media
    report = FileReport(media.path, media.kind, _size(media))
    try:
        with watched():
            report.header, frames = read_header(media, task.key)
            if media.kind == "image" and not frames.still:
                report.kind = "video"  # a DICOM header that does not say so
            report.findings += report.header.findings
            report.frames = report.header.frames
            try:
                if not task.quick:
                    _decode(report, frames)
            finally:
                frames.close()
    except DataError as error:
        report.findings.append(Finding("unreadable", str(error).removeprefix(f"{media.path}: ")))
    except (cv2.error, MemoryError) as error:
        report.findings.append(Finding("unreadable", f"decoding failed ({type(error).__name__})"))
    except OSError as error:
        if is_full(error):
            raise DataError(f"{error.filename}: the disk is full. Make room, or set TMPDIR to another folder, and start again.") from None
        report.findings.append(Finding("unreadable", f"cannot be read ({error.strerror or 'not an image that can be opened'})"))
    if not report.readable:
        # What its header says of the picture is of no use, and it is no reason to look at the file.
        report.findings = [finding for finding in report.findings if finding.code in ("unreadable", "cut-off", "extension")]
    return report


def _decode(report: FileReport, frames: object) -> None:
    """Look at every frame."""
    watch, capture = _ClipWatch(), getattr(frames, "capture", None)
    while frames.grab():
        watch.look(frames.retrieve(), capture.get(cv2.CAP_PROP_POS_MSEC) if capture is not None else None)
    report.frames = len(watch.levels)
    if not report.frames:
        raise DataError("no frame could be decoded (empty, damaged or cut off)")
    header, found = report.header, report.findings
    if not header.width:
        header.width, header.height = min(watch.sizes)
        found += check_picture(header.width, header.height, (0.0, 0.0), subsampled=False)
    report.tint = tuple(float(value) for value in np.mean(watch.tints, axis=0))
    found += [finding for finding in check_picture(header.width, header.height, report.tint) if finding.code == "tint"]
    if header.frames is not None and header.frames != report.frames:
        found.append(Finding("count", f"{report.frames} frames where the header claims {header.frames}"))
    if len(watch.sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for width, height in sorted(watch.sizes)[:4])
        found.append(Finding("size-changes", shown))
    if report.kind != "image":
        levels, steps = np.asarray(watch.levels), np.asarray(watch.steps)
        report.repeated = float((steps < REPEAT).mean()) if len(steps) else None
        found += check_frames(levels, steps) + check_cuts(levels, steps, np.asarray(watch.turns)) + check_times(watch.times)
    report.pictures = _pictures(report, watch)
    count = FRAMES if report.frames > 1 else 1
    chosen = [watch.copies[int((place + 0.5) * len(watch.copies) / count)][1] for place in range(count)]
    if len(watch.sizes) == 1:
        report.print = print_video(report.path, [copy if copy.ndim == 2 else copy[:, :, 1] for copy in chosen])


def _pictures(report: FileReport, watch: _ClipWatch) -> list[tuple[int, bytes]]:
    """JPEGs of the frames that show what was found: the cut's two sides, the darkest, the middle."""
    shown = [(watch.copies[len(watch.copies) // 2])]
    if report.has("cut") and "after" in watch.told:
        shown = [watch.told["before"], watch.told["after"]]
    elif any(report.has(f"black{part}") for part in ("", "-start", "-end", "-inside")):
        shown.append(watch.told["dark"])
    out = []
    for index, picture in shown:
        done, jpeg = cv2.imencode(".jpg", _shrink(picture, THUMB), [cv2.IMWRITE_JPEG_QUALITY, 80])
        if done:
            out.append((index, jpeg.tobytes()))
    return out


# --- the folder -------------------------------------------------------------------------------------------------------


def inspect_folder(
    folder: Path, *, labels: str = "auto", data: DataParams | None = None, quick: bool = False, workers: int | None = None,
    ignore: Path | None = None,
) -> Inspection:
    """Look at all media of `folder`, with a progress bar on stderr.

    Args:
        labels: as `data.labels`: auto, none, or a table in the folder. data: column names and key of the pseudonyms.
        quick: read headers only. workers: processes; by default as many as there are cores. ignore: a folder not to look into.

    Raises:
        DataError: the folder, or a table named by `labels`, does not exist, or there is nothing to look at.
    """
    data = data or DataParams()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Name the folder that holds the videos.")
    found, problems = survey_labels(folder, labels, data)
    if not found.media:
        raise DataError(f"{folder}: no video, picture or DICOM file is in it. " + " ".join(f"{note}." for note in found.notes))
    # What stands among the findings is not said twice.
    said = ("files of other types", *found.passed_over, *found.doubtful)
    notes = [note for note in found.notes if not note.startswith(said) and " links lead out " not in note]
    result = Inspection(folder, quick, notes=notes)
    result.findings += [Finding("labels", text) for text in problems] + [Finding("no-table", text) for text in found.passed_over]
    result.findings += [Finding("numbered", text) for text in found.doubtful]
    result.files = _look_at_all([Look(item, quick, data.pseudonym_key) for item in found.media], workers)
    _say_labels(result, found.labels, data.pseudonym_key)
    result.others = _walk(folder, found.media, ignore)
    _check_names(result.files, {item.path: item for item in found.media}, folder)
    _check_copies(result.files, {item.path: item for item in found.media}, "folders" if found.by_folder else "labels")
    _check_lengths(result.files)
    result.findings += _check_classes(result.files) + shortcuts(result.files)
    return result


def _look_at_all(tasks: list[Look], workers: int | None) -> list[FileReport]:
    """Reports in path order. Largest files first, so that no process works alone at the end."""
    if not tasks:
        return []
    sizes = {task.media.path: _size(task.media) for task in tasks}
    order = sorted(tasks, key=lambda task: -sizes[task.media.path])

    def crashed(task: Look) -> FileReport:
        return FileReport(task.media.path, task.media.kind, sizes[task.media.path], findings=[Finding("unreadable", CRASHED)])

    quiet = not sys.stderr.isatty()
    reports = []
    with tqdm(total=len(order), unit="file", desc="inspect", mininterval=30.0 if quiet else 0.2, miniters=1) as bar:
        for report in run_isolated(inspect_file, order, min(workers or usable_cores(), len(order)), crashed):
            reports.append(report)
            bar.update()
    return sorted(reports, key=lambda report: os.fsencode(report.path))


def _say_labels(result: Inspection, labels: dict[str, Label], key: str) -> None:
    """Labels and patients from the table, patients of DICOM headers where it names none."""
    for report in result.files:
        said = labels[report.path]
        report.label, report.patient = said.label, pseudonym(said.patient, key) or report.header.patient
    some = any(report.label for report in result.files)
    for report in result.files:
        if some and not report.label:
            report.findings.append(Finding("no-label", "not in the labels table"))
        if report.label and not report.patient:
            report.findings.append(Finding("no-patient", "labelled, but of nobody"))


def _walk(folder: Path, media: Sequence[Media], ignore: Path | None) -> list[tuple[str, Finding]]:
    """Paths that are no media: files nobody reads, links that lead out, folders that cannot be opened."""
    home, read = folder.resolve(), {item.location for item in media}
    ignored = ignore.resolve() if ignore is not None else None
    found: list[tuple[str, Finding]] = []

    def locked(error: OSError) -> None:
        found.append((_shown(Path(error.filename), folder), Finding("locked", error.strerror or "unreadable")))

    for current, folders, names in os.walk(folder, onerror=locked):
        here = Path(current)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != ignored)
        for name in [*folders, *sorted(names)]:
            path = here / name
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                found.append((_shown(path, folder), Finding("link-outside", "not followed")))
            elif name in names and name[0] != "." and not {here, path} & read and name not in _KNOWN and path.suffix.lower() != ".csv":
                found.append((_shown(path, folder), Finding("not-read", path.suffix.lower() or "no extension")))
    return found


def _shown(path: Path, folder: Path) -> str:
    text = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def _check_names(files: list[FileReport], media: dict[str, Media], folder: Path) -> None:
    """Names that other systems stumble over, and one name in several folders."""
    same: dict[str, list[FileReport]] = defaultdict(list)
    for report in files:
        raw = media[report.path].location.relative_to(folder).as_posix()
        if raw != report.path or not report.path.isprintable():
            report.findings.append(Finding("not-printable", "control characters, or bytes that are not UTF-8"))
        elif not report.path.isascii():
            report.findings.append(Finding("not-ascii", "letters outside ASCII"))
        same[unicodedata.normalize("NFC", report.path.rsplit("/", 1)[-1]).casefold()].append(report)
    for group in same.values():
        for report in group if len(group) > 1 else ():
            report.findings.append(Finding("same-name", f"as {_others(group, report)}", again=report is not group[0]))


def _others(group: Sequence[FileReport], report: FileReport, limit: int = 3) -> str:
    """The first of the others in the group and how many more there are, in the same time for any size of it."""
    names, more = [other.path for other in group[: limit + 1] if other is not report][:limit], len(group) - 1 - limit
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _check_copies(files: list[FileReport], media: dict[str, Media], origin: str) -> None:
    """Equal contents (among files of equal size), and recordings encoded twice. `origin` of the classes: labels or folders."""
    sizes: dict[tuple[str, int], list[FileReport]] = defaultdict(list)
    for report in files:
        if report.bytes:
            sizes["frames" if report.kind == "frames" else "", report.bytes].append(report)
    groups: dict[str, list[FileReport]] = defaultdict(list)
    for reports in sizes.values():
        for report in reports if len(reports) > 1 else ():
            groups[_digest(media[report.path])].append(report)
    copies = set()
    for digest, group in groups.items():
        if digest and len(group) > 1:
            copies |= {report.path for report in group[1:]}
            _say_pairs("same-content", group, "", origin)
    prints = {report.path: report.print for report in files if report.print is not None and report.path not in copies}
    by_path = {report.path: report for report in files}
    for group, pairs in join_pairs(find_near_duplicates(prints)):
        moved = [pair.motion for pair in pairs if pair.motion is not None]
        least = "at least " if len(pairs) > 1 else ""
        how = f" (likeness {least}{min(pair.similarity for pair in pairs):.2f}{f', motion {least}{min(moved):.2f}' if moved else ''})"
        _say_pairs("near-duplicate", [by_path[path] for path in group], how, origin)


def _digest(media: Media) -> str:
    try:
        return content_hash(media) if media.kind == "frames" else hash_file(media.location)
    except (OSError, DataError):
        return ""


def _say_pairs(code: str, group: list[FileReport], how: str, origin: str = "labels") -> None:
    """A finding for each of a group of copies, more serious where labels or patients disagree."""
    labels, patients = (sorted({getattr(report, key) for report in group} - {""}) for key in ("label", "patient"))
    for report in group:
        others, again = _others(group, report), report is not group[0]
        apart = "; other patient" if len(patients) > 1 and code == "near-duplicate" else ""
        report.findings.append(Finding(code, f"as {others}{how}{apart}", again=again))
        if len(labels) > 1:
            report.findings.append(Finding(f"{code}-{origin}", f"{' and '.join(labels[:3])}: as {others}", again=again))
        if len(patients) > 1 and code == "same-content":
            report.findings.append(Finding("same-content-patients", f"{' and '.join(patients[:3])}: as {others}", again=again))


def _check_lengths(files: list[FileReport]) -> None:
    """Clips shorter than a method samples from, with that method's default parameters."""
    brief = [report for report in files if report.readable and report.kind != "image" and report.frames is not None and report.frames < SHORT]
    if not brief:
        return
    needs = {name: METHODS.get(name).min_frames(METHODS.get(name).Params()) for name in METHODS.names()}
    for report in brief:
        lacking = {name: need for name, need in needs.items() if need > max(report.frames or 0, 1)}
        if lacking:
            said = ", ".join(f"{name} needs {need}" for name, need in sorted(lacking.items(), key=lambda item: item[1]))
            report.findings.append(Finding("short", f"{report.frames} frames: {said}"))


def _check_classes(files: list[FileReport]) -> list[Finding]:
    """Classes with fewer patients than folds."""
    patients: dict[str, set[str]] = defaultdict(set)
    for report in files:
        if report.label and report.patient:
            patients[report.label].add(report.patient)
    few = {label: len(names) for label, names in sorted(patients.items()) if len(names) < FOLDS}
    return [Finding("few-patients", f"{label}: {count} patient{'s' if count > 1 else ''}") for label, count in few.items()]


# --- shortcuts --------------------------------------------------------------------------------------------------------


def shortcuts(files: Sequence[FileReport]) -> list[Finding]:
    """Properties of a file that give its class away: extension, size, rate, length, tint.

    A class is guessed for each file by what most files of *other* patients with the same property are; how often that is right,
    averaged over the classes, is held against guessing. Groups of one class only are named.
    """
    known = [report for report in files if report.label and report.readable and report.kind != "image"]
    classes = Counter(report.label for report in known)
    if len(classes) < 2 or len(known) < 10:
        return []
    found = []
    for name, values in _properties(known).items():
        if len(set(values)) < 2:
            continue
        score, chance = _guessed(known, values), 1 / len(classes)
        pure = sorted(_one_sided(known, values, classes), reverse=True)
        if score < chance + GAIN and not pure:
            continue
        said = "; ".join(f"{f'all {size}' if own == size else f'{own} of {size}'} with {value} are {label}" for own, size, value, label in pure[:3])
        text = f"{name} alone tells {100 * score:.0f} % of the classes right (guessing: {100 * chance:.0f} %)"
        found.append(Finding("shortcut", text + (f"; {said}" if said else "")))
    return found


def _one_sided(files: Sequence[FileReport], values: Sequence[str], classes: Counter[str]) -> Iterable[tuple[int, int, str, str]]:
    """Groups that share a property and nearly always a class: files of that class, files, property, class."""
    groups: dict[str, list[FileReport]] = defaultdict(list)
    for report, value in zip(files, values, strict=True):
        groups[value].append(report)
    for value, group in groups.items():
        label, own = Counter(report.label for report in group).most_common(1)[0]
        several = len({report.patient or report.path for report in group}) > 1
        # A class that nearly everything belongs to is no surprise.
        if len(group) >= PURE_FILES and several and own >= max(PURE, 1.2 * classes[label] / len(files)) * len(group):
            yield own, len(group), value, label


def _properties(files: Sequence[FileReport]) -> dict[str, list[str]]:
    def rate(report: FileReport) -> str:
        return "no rate" if report.header.fps is None else f"{report.header.fps:.1f} per second"

    def colour(report: FileReport) -> str:
        return f"tint {max(report.tint):.0f}"

    properties = {
        "extension": [Path(report.path).suffix.lower() or "none" for report in files],
        "size": [f"{report.header.width} x {report.header.height}" for report in files],
        "frame rate": [rate(report) for report in files],
        "codec": [report.header.codec or report.header.container for report in files],
    }
    if any(report.tint != (0.0, 0.0) for report in files):
        properties["colour tint"] = [colour(report) for report in files]
    return properties


def _guessed(files: Sequence[FileReport], values: Sequence[str]) -> float:
    """Balanced share of right guesses from the property, patients left out in turn."""
    people = [report.patient or report.path for report in files]
    with_value: dict[str, Counter[str]] = defaultdict(Counter)
    of_person: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for report, person, value in zip(files, people, values, strict=True):
        with_value[value][report.label] += 1
        of_person[person, value][report.label] += 1
        of_person[person, ""][report.label] += 1
    everybody = Counter(report.label for report in files)
    right: dict[str, list[bool]] = defaultdict(list)
    for report, person, value in zip(files, people, values, strict=True):
        votes = with_value[value] - of_person[person, value] or everybody - of_person[person, ""]
        right[report.label].append(bool(votes) and votes.most_common(1)[0][0] == report.label)
    return float(np.mean([np.mean(flags) for flags in right.values()]))
