"""The extract stage: a folder of media becomes a frame store, a manifest, metrics and contact sheets.

Videos are decoded by several processes and kept, one by one, in a scratch folder keyed by content and parameters; the
output is linked from there. A killed run, or one video added, repeats no finished work although DVC empties the output.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
from tqdm import tqdm

from pipeline.config import Config, fingerprint
from pipeline.data.attributes import check_columns, write_attributes
from pipeline.data.contact_sheet import write_contact_sheets
from pipeline.data.dicom import read_identity
from pipeline.data.frame_labels import cut_videos
from pipeline.data.labels import LabelledMedia, read_labelled_media
from pipeline.data.limits import watched
from pipeline.data.manifest import Manifest, VideoRow, merge_identical, pseudonym, write_hints
from pipeline.data.mask_report import write_mask_report
from pipeline.data.masking import (
    Decision,
    Masker,
    MaskReport,
    decision_for,
    read_review,
    rows_without_file,
)
from pipeline.data.pool import CRASHED, run_isolated, usable_cores
from pipeline.data.sniffing import is_dicom
from pipeline.data.store import FrameStore, write_video
from pipeline.data.video import Facts, Media, MediaReader, content_hash
from pipeline.errors import ConfigError, DataError, loud
from pipeline.files import (
    atomic_write,
    csv_text,
    hash_file,
    is_full,
    read_json,
    scratch_folder,
    write_json,
)
from pipeline.parameters import ExtractParams

__all__ = ["Extracted", "Task", "extract_media", "extract_one", "extract_source", "extraction_fingerprint"]

FORMAT = 1
"""Raised when the same file and parameters would give other frames, so that old scratch results are not reused."""
_STORE_FILE = re.compile(r"[0-9a-f]{16}\.(tar|idx\.npy|mask\.png)")


@dataclass(frozen=True)
class Task:
    """One medium to extract into the scratch folder.

    `table_fps` is the labels table's frame rate, if it has one; `decisions`: a person's, by path or video id.
    """

    media: Media
    params: ExtractParams
    table_fps: float | None
    scratch: Path
    pseudonym_key: str = ""
    decisions: Mapping[str, Decision] = field(default_factory=dict)


@dataclass
class Extracted:
    """The result of one task: facts and content hash, or the reason why there are none."""

    path: str
    sha256: str = ""
    patient: str = ""
    """Pseudonym of the patient a DICOM header names, or of the study where it names none."""
    study: str = ""
    facts: Facts = field(default_factory=Facts)
    bytes: int = 0
    """Size of the tar."""
    mask: MaskReport | None = None
    """What the mask was found to be; None where none was looked for."""
    reused: bool = False
    cpu_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """Warnings about who is shown, beside those of `facts`."""
    reason: str = ""
    """Why the medium cannot be read; empty on success."""
    fatal: str = ""
    """Why nothing can be written any more; empty normally."""

    @property
    def video(self) -> str:
        """The video id, 16 hex digits."""
        return self.sha256[:16]


def extraction_fingerprint(params: ExtractParams) -> str:
    """16 hex digits over all that decides the stored bytes: parameters, format, the code that reads, and OpenCV's version."""
    names = ["video.py", "sniffing.py", "dicom.py", "dicom_pixels.py", "trouble.py", "integrity.py", "thinning.py", "store.py"]
    decisive = params.model_dump(include={"frames_per_second", "max_frames", "short_side", "color", "jpeg_quality"})
    if params.mask.mode != "none":
        names += ["outline.py", "sector.py", "masking.py"]
        # A decision of the review counts for its video alone, see `_reuse`.
        decisive["mask"] = params.mask.model_dump(exclude={"review"})
    code = [hash_file(Path(__file__).with_name(name)) for name in names]
    return fingerprint({"format": FORMAT, "code": code, "opencv": cv2.__version__, **decisive})


def extract_one(task: Task) -> Extracted:
    """Extract one medium, or find it done in the scratch folder. Never raises for a bad file or a full disk."""
    result = Extracted(task.media.path)
    started = time.process_time()
    try:
        result.sha256 = content_hash(task.media)
        with watched():
            _identify(task, result)
            if not _reuse(task, result):
                _extract(task, result)
    except DataError as error:
        result.reason = str(error).removeprefix(f"{task.media.path}: ")
    except OSError as error:
        result.fatal = _write_problem(error, task.scratch)
    result.cpu_seconds = time.process_time() - started
    return result


def _extract(task: Task, result: Extracted) -> None:
    """Read the medium and write frames, mask and record, the record last."""
    decision = decision_for(task.decisions, task.media.path, result.video)
    reader = MediaReader(task.media, task.params, task.table_fps, decision)
    write_video(task.scratch, result.video, reader.jpegs())
    result.facts = reader.facts
    result.bytes = (task.scratch / f"{result.video}.tar").stat().st_size
    record = {"table_fps": task.table_fps, "bytes": result.bytes, "facts": asdict(result.facts), "mask": None, "decision": None}
    if reader.masker is not None:
        result.mask = reader.masker.report
        _write_mask(task.scratch, result.video, reader.masker)
        record |= {"mask": asdict(result.mask), "decision": _plain(decision)}
    write_json(task.scratch / f"{result.video}.json", record)


def _plain(decision: Decision | None) -> list[object] | None:
    """A decision as JSON gives it back."""
    return None if decision is None else [decision.action, list(decision.box) if decision.box else None]


def _write_mask(scratch: Path, video: str, masker: Masker) -> None:
    """The mask as it fits the stored frames (where anything is cut), and the picture for the contact sheet."""
    mask = scratch / f"{video}.mask.png"
    if masker.mask is not None:
        atomic_write(mask, cv2.imencode(".png", masker.mask)[1].tobytes())
    else:
        mask.unlink(missing_ok=True)
    if masker.preview is not None:
        # It shows what is written beside the picture. Later runs draw their sheets from it, so it stays, for this user alone.
        preview = scratch / f"{video}.preview.png"
        preview.touch(0o600)
        preview.chmod(0o600)
        preview.write_bytes(cv2.imencode(".png", masker.preview)[1].tobytes())


def _identify(task: Task, result: Extracted) -> None:
    """Fill in whom a DICOM file shows, hashed at once. Read anew each time, so that no store of results depends on the key."""
    if task.media.kind == "frames" or not is_dicom(task.media.location):
        return
    identity = read_identity(task.media.location, task.media.path)
    result.study = pseudonym(identity.study, task.pseudonym_key, "S")
    result.patient = pseudonym(identity.patient or identity.study, task.pseudonym_key)
    if not identity.patient:
        result.notes.append("no usable PatientID: the study stands for the patient")


def _reuse(task: Task, result: Extracted) -> bool:
    """Fill `result` from the scratch folder if this content was finished there under the same conditions."""
    tar, index = (task.scratch / f"{result.video}{suffix}" for suffix in (".tar", ".idx.npy"))
    try:
        record = read_json(task.scratch / f"{result.video}.json")
        facts = Facts(**record["facts"])
        same_rate = facts.fps_source not in ("table", "assumed", "none") or record["table_fps"] == task.table_fps
        decision = decision_for(task.decisions, task.media.path, result.video)
        if task.params.mask.mode != "none":
            if record["decision"] != _plain(decision):
                return False
            result.mask = MaskReport(**record["mask"])
            if _has_mask(facts) and not (task.scratch / f"{result.video}.mask.png").stat().st_size:
                return False
        if not same_rate or tar.stat().st_size != record["bytes"] or not index.stat().st_size:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    result.facts, result.bytes, result.reused = facts, record["bytes"], True
    return True


def _has_mask(item: Facts | VideoRow) -> bool:
    """Whether anything was cut, so that there is a mask to keep."""
    return item.mask not in ("", "kept") and (item.mask_share or 0) < 1


def _write_problem(error: OSError, folder: Path) -> str:
    """What to tell when a frame store, or a stream on its way there, cannot be written."""
    if is_full(error):
        # Of streams that are unpacked the error names the folder.
        where = Path(error.filename or folder)
        free = shutil.disk_usage(where).free / 1e6
        return f"{where}: the disk is full ({free:.0f} MB free). Make room and start again; finished videos are kept."
    return f"{folder}: cannot be written ({error.strerror or error})"


def _run_tasks(tasks: list[Task], workers: int) -> Iterator[Extracted]:
    """Results in the order they come, each from a process that may die with its file."""
    yield from run_isolated(extract_one, tasks, workers, lambda task: Extracted(task.media.path, reason=CRASHED))


def _size(media: Media) -> int:
    """Bytes of a medium, 0 if it cannot be told; only for the order of work."""
    try:
        if media.kind == "frames":
            return sum(item.stat().st_size for item in media.location.iterdir())
        return media.location.stat().st_size
    except OSError:
        return 0


def _extract_all(tasks: list[Task], workers: int) -> list[Extracted]:
    """Run all tasks with a progress bar; largest files first, so that no process works alone at the end."""
    tasks = sorted(tasks, key=lambda task: -_size(task.media))
    quiet = not sys.stderr.isatty()
    results, frames = [], 0
    with tqdm(total=len(tasks), unit="file", desc="extract", mininterval=30.0 if quiet else 0.2, miniters=1) as bar:
        for result in _run_tasks(tasks, workers):
            if result.fatal:
                raise DataError(result.fatal)
            results.append(result)
            frames += result.facts.frames
            bar.set_postfix(frames=frames, refresh=False)
            bar.update()
    return sorted(results, key=lambda result: os.fsencode(result.path))


def _rows(source: str, found: LabelledMedia, results: list[Extracted], key: str) -> list[VideoRow]:
    """Manifest rows of the readable media; files of equal content are merged."""
    kinds = {item.path: item.kind for item in found.media}
    rows = []
    for result in results:
        if result.reason:
            continue
        label, facts = found.labels[result.path], asdict(result.facts)
        # A DICOM header may claim one frame, or no number, where the file holds more.
        several = kinds[result.path] == "image" and result.facts.frames_decoded > 1
        notes = [] if label.patient else result.notes
        facts["warnings"] = "; ".join([*facts["warnings"], *notes])
        rows.append(VideoRow(
            video=result.video, source=source, path=result.path, sha256=result.sha256, study=result.study,
            patient=pseudonym(label.patient, key) or result.patient, label=label.label,
            kind="video" if several else kinds[result.path], bytes=result.bytes, **facts,
        ))
    return merge_identical(rows)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What cannot be written inside becomes a DataError that says so."""
    try:
        yield
    except OSError as error:
        raise DataError(_write_problem(error, folder)) from None


def _place(scratch: Path, output: Path, name: str) -> None:
    """Give the output folder a finished file: a hard link where possible, a copy across file systems."""
    target = output / name
    target.unlink(missing_ok=True)
    try:
        os.link(scratch / name, target)
    except OSError as error:
        if is_full(error):
            raise
        part = output / f".{name}.part"
        shutil.copyfile(scratch / name, part)
        os.replace(part, target)


def _fill_output(output: Path, scratch: Path, rows: list[VideoRow], quarantined: list[Extracted], hints: Mapping[str, str]) -> Manifest:
    """Link all stored videos, remove those of earlier runs, write hints and the quarantine list, and the manifest last."""
    manifest = Manifest(rows)
    wanted = {f"{row.video}{suffix}" for row in rows for suffix in (".tar", ".idx.npy", ".mask.png")[: 3 if _has_mask(row) else 2]}
    try:
        for name in sorted(wanted):
            _place(scratch, output, name)
        for path in output.iterdir():
            if _STORE_FILE.fullmatch(path.name) and path.name not in wanted:
                path.unlink()
        table = csv_text(["path", "reason"], ([result.path, result.reason] for result in quarantined))
        atomic_write(output / "quarantine.csv", table)
        write_hints(output, hints)
        manifest.write(output / "manifest.csv")
    except OSError as error:
        raise DataError(_write_problem(error, output)) from None
    return manifest


def _metrics(manifest: Manifest, results: list[Extracted], seconds: float) -> dict[str, float]:
    """The numbers of metrics.json."""
    rows = manifest.rows
    fresh = [result for result in results if not result.reason and not result.reused]
    decoded = sum(result.facts.frames_decoded for result in fresh)
    cpu = sum(result.cpu_seconds for result in fresh)
    return {
        "rows": len(rows),
        "videos": sum(row.kind != "image" for row in rows),
        "images": sum(row.kind == "image" for row in rows),
        "frames": sum(row.frames for row in rows),
        "decoded": sum(row.frames_decoded for row in rows),
        "claimed_mismatches": sum(row.frames_claimed not in (None, row.frames_decoded) for row in rows),
        "quarantined": sum(bool(result.reason) for result in results),
        "merged_copies": sum(not result.reason for result in results) - len({r.sha256 for r in results if not r.reason}),
        "stretches": sum(row.kind == "stretch" for row in rows),
        "labelled": sum(row.label != "" for row in rows),
        "patients": len({row.patient for row in rows} - {""}),
        **_mask_metrics([result.mask for result in results if result.mask and not result.reason]),
        "stored_megabytes": round(sum(row.bytes for row in rows) / 1e6, 3),
        "reused": sum(result.reused for result in results),
        "seconds": round(seconds, 3),
        "frames_per_second_processed": round(decoded / seconds, 1) if decoded else 0.0,
        "cpu_ms_per_frame": round(1000 * cpu / decoded, 3) if decoded else 0.0,
    }


def _mask_metrics(reports: list[MaskReport]) -> dict[str, float]:
    """Counts of masks by geometry, and of those a person should look at; empty where masks are off."""
    if not reports:
        return {}
    counts = {f"masks_{name}": sum(report.geometry == name for report in reports) for name in ("convex", "phased", "linear", "free", "box")}
    return counts | {
        "masks_kept": sum(report.action == "kept" for report in reports),
        "masks_review": sum(report.review for report in reports),
        "masks_dual": sum(report.panes > 1 for report in reports),
        "masks_doppler": sum(report.doppler for report in reports),
        "masks_outgrown": sum(report.grown > 0.05 for report in reports),
    }


def _clean_scratch(scratch: Path) -> None:
    """Remove halves that killed runs left a day ago or earlier; younger ones may belong to a run in progress."""
    for part in scratch.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime > 86400:
                part.unlink()
        except FileNotFoundError:
            continue  # another run renamed or removed it in between


def extract_media(
    found: LabelledMedia, params: ExtractParams, scratch: Path, *, source: str, key: str
) -> tuple[list[VideoRow], list[Extracted]]:
    """Extract media into the folder `scratch` with several processes: rows of the readable ones, results of all.

    Args:
        found: gets a note about decisions that match no file. key: of the pseudonyms. source: name of the source in the rows.

    Raises:
        DataError: nothing can be written any more.
    """
    decisions = read_review(Path(params.mask.review)) if params.mask.review and params.mask.mode != "none" else {}
    tasks = [Task(item, params, found.labels[item.path].fps, scratch, key, decisions) for item in found.media]
    wanted = usable_cores() if params.workers == "auto" else max(1, params.workers)
    results = _extract_all(tasks, min(wanted, len(tasks)))
    unused = rows_without_file(decisions, [(result.path, result.video) for result in results])
    if unused:
        rest = ", ..." if len(unused) > 3 else ""
        count = "1 row matches" if len(unused) == 1 else f"{len(unused)} rows match"
        found.notes.append(f"extract.mask.review: {count} no file: {', '.join(unused[:3])}{rest}")
    return _rows(source, found, results, key), results


def extract_source(source: str, config: Config, output: Path, report_folder: Path) -> dict[str, float]:
    """Extract one source into the frame store `output`; metrics.json and contact sheets go to `report_folder`.

    Args:
        source: `main` (data.source), or a key of data.extra_sources.
        config: The whole configuration; `data` and `extract` are used.
        output: The frame store folder; files of earlier runs in it are replaced.
        report_folder: Created when missing.

    Returns:
        The numbers of metrics.json, see `_metrics`.

    Raises:
        ConfigError: An unknown source, or a filter that matches nothing.
        DataError: Disagreeing labels, nothing readable, a full disk, or (with `extract.on_error: fail`) any unreadable
            file, after everything readable was written.
    """
    if source != "main" and source not in config.data.extra_sources:
        raise ConfigError(f"source '{source}': unknown. Allowed: {', '.join(['main', *config.data.extra_sources])}")
    started, params = time.perf_counter(), config.extract
    found = read_labelled_media(source, config.data)
    columns = check_columns(config.evaluate.subgroups, found.columns) if source == "main" else {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "manifest.csv").unlink(missing_ok=True)
        scratch = scratch_folder("extract", extraction_fingerprint(params))
        _clean_scratch(scratch)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror})") from None
    _warn_of_columns(found, config)
    rows, results = extract_media(found, params, scratch, source=source, key=config.data.pseudonym_key)
    quarantined = [result for result in results if result.reason]
    if source == "main" and config.data.frame_labels:
        with _writing(scratch):
            rows, notes = cut_videos(rows, config.data, params, scratch)
        found.notes += notes
    manifest = _fill_output(output, scratch, rows, quarantined, found.hints)
    metrics = _metrics(manifest, results, time.perf_counter() - started)
    with _writing(report_folder):
        write_json(report_folder / "metrics.json", metrics)
        if source == "main":
            write_attributes(report_folder / "attributes.csv", columns, rows, found.cells)
        if rows:
            store = FrameStore(output)
            write_contact_sheets(store, report_folder)
            store.close()
        masks = [
            (result.video, result.path, found.labels[result.path].label, result.mask) for result in results if result.mask and not result.reason
        ]
        write_mask_report(masks, scratch, report_folder)
    _tell(found.notes + _key_notes(results, config.data.pseudonym_key), quarantined, rows, output / "manifest.csv")
    doubtful = len({video for video, _, _, mask in masks if mask.review})
    if doubtful:
        print(
            f"{doubtful} of {len({video for video, *_ in masks})} videos have a doubtful mask; text may remain beside the picture: "
            f"look at {report_folder / 'masks_1.png'} and decide in {report_folder / 'review.csv'}", file=sys.stderr,
        )
    if quarantined and (params.on_error == "fail" or not rows):
        raise DataError(_failures(quarantined, len(results), params.on_error))
    return metrics


def _warn_of_columns(found: LabelledMedia, config: Config) -> None:
    """Say before anything is decoded, which may take hours, that labels or patients are missing because of a table's columns."""
    if hint := found.hints.get("label"):
        print(loud(f"all videos stay unlabelled and serve pretraining only. {hint}"), file=sys.stderr, flush=True)
    if "patient" not in found.hints:
        return
    labelled = [item for item in found.media if found.labels[item.path].label or config.data.frame_labels]
    # A DICOM header names its patient.
    alone = [
        item for item in labelled if not found.labels[item.path].patient and (item.kind == "frames" or not is_dicom(item.location))
    ]
    if alone:
        text = f"{len(alone)} of {len(labelled)} labelled files have no patient, so that clips of one person may be trained on and tested"
        print(loud(f"{text}. {found.hints['patient']}"), file=sys.stderr, flush=True)


def _key_notes(results: list[Extracted], key: str) -> list[str]:
    """What to say where DICOM identities (only those stand in `results`) were hashed without a secret."""
    if key or not any(result.patient or result.study for result in results):
        return []
    return ["data.pseudonym_key is empty: pseudonyms can be guessed by trying ids; set a secret key before anything leaves this machine"]


def _failures(quarantined: list[Extracted], total: int, policy: str) -> str:
    lines = [f"{len(quarantined)} of {total} files cannot be read:"]
    lines += [f"  {result.path}: {result.reason}" for result in quarantined]
    other = ", or set extract.on_error: quarantine to go on without them" if policy == "fail" and len(quarantined) < total else ""
    lines.append(f"Remove or replace them{other}.")
    return "\n".join(lines)


def _tell(notes: list[str], quarantined: list[Extracted], rows: list[VideoRow], manifest: Path) -> None:
    """Notes, warnings (counted by kind; `manifest` has all) and unreadable files, together after the progress bar."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    kinds: dict[str, list[str]] = {}
    for row in rows:
        for text in filter(None, row.warnings.split("; ")):
            # The same warning with other numbers is one kind.
            kinds.setdefault(re.sub(r"\bP?[0-9a-f]*\d[0-9a-f]*\b", "#", text), []).append(text)
    for texts in kinds.values():
        more = "" if len(set(texts)) == 1 else " (the first of them; the others with other numbers)"
        print(f"warning: {len(texts)} of {len(rows)} files: {texts[0]}{more}; see {manifest}", file=sys.stderr)
    for result in quarantined:
        print(f"unreadable: {result.path}: {result.reason}", file=sys.stderr)
