"""Recipes of lung ultrasound: POCUS in its two forms, and how its upstream repository names things."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.recipes.base import (
    Expect,
    Recipe,
    Row,
    Scan,
    below,
    inside,
    media_below,
    read_table,
)
from pipeline.data.video import Media
from pipeline.errors import DataError
from pipeline.files import read_json

__all__ = ["POCUS", "UPSTREAM_FOLDERS", "UPSTREAM_REVISION", "UPSTREAM_TABLE", "UPSTREAM_URL"]

UPSTREAM_URL = "https://github.com/jannisborn/covid19_ultrasound.git"
UPSTREAM_REVISION = "02cb15b12a285f367f5a01f29297baa5c52b85c1"
"""Of 2024: after the severity scores (October 2022) and all contributed clips."""
UPSTREAM_TABLE = "data/dataset_metadata.csv"
UPSTREAM_FOLDERS = ("data/pocus_videos/convex", "data/pocus_videos/linear", "data/pocus_images")

_TABLES = {"videos.csv": "video", "images.csv": "image"}
_EXTRA = ("probe", "source", "licence")
_LABELS = {"covid": "covid", "bacterial": "pneumonia", "viral": "viral", "regular": "regular", "healthy": "regular"}
_SELECTION = {"covid": 19, "pneumonia": 37, "regular": 56, "viral": 4, "uncertain": 1}
_CLASSES = {"data.classes": ["covid", "pneumonia", "regular"]}
_FRAME_OF_VIDEO = re.compile(r".+\.(gif|mp4|mov|avi|mpe?g)_frame\d+", re.IGNORECASE)
# In the newest upstream table these two rows are shifted by one column: the age, 40, stands in the patient column.
_SHIFTED = {"Reg_liftl_pneucase3_clip1": "7", "Reg_liftl_case3_clip2": "7"}


@dataclass(frozen=True)
class _Pocus(Recipe):
    """Two layouts: the redistributable selection with its own tables, and a clone of the upstream repository."""

    def read(self, root: Path, variant: str) -> Scan:
        if (root / "videos.csv").exists() and (root / "images.csv").exists():
            return _read_selection(root)
        for name in (UPSTREAM_TABLE, PurePosixPath(UPSTREAM_TABLE).name):
            if (prefix := below(root, name)) is not None:
                return _read_upstream(root, prefix + name)
        raise self.foreign(root)

    def expected(self, scan: Scan, variant: str) -> tuple[Expect, ...]:
        return self.published if scan.form == "selection" else ()


def _read_selection(root: Path) -> Scan:
    scan = Scan(root, form="selection")
    tables = [(row, kind) for name, kind in _TABLES.items()
              for row in read_table(root, name, ("path", "label", "patient_id", *_EXTRA), path_column="path")]
    media = media_below(root, named=[row.cells["path"] for row, _ in tables], notes=scan.notes)
    folds = _reference_folds(root, scan)
    for row, kind in tables:
        path, cells = row.cells["path"], row.cells
        if path not in media:
            scan.deviations.append(f"missing: {path} ({row.where})")
            continue
        if (media[path].kind == "image") != (kind == "image"):
            scan.deviations.append(f"wrong: {path} is a {media[path].kind}, {row.where} calls it {kind}")
        scan.rows.append(Row(
            path, media[path].kind, cells["label"], cells["patient_id"], folds.get(path, ""), extra={name: cells[name] for name in _EXTRA},
        ))
    listed = {row.path for row in scan.rows}
    scan.deviations += [f"surplus: {path} stands in no table" for path in media if path not in listed]
    scan.deviations += [f"missing: {path} (cv_reference.json)" for path in folds if path not in listed]
    if folds:
        scan.settings = {"data.include": {"probe": ["convex"]}, "data.media": "video"}
    return scan


def _reference_folds(root: Path, scan: Scan) -> dict[str, str]:
    """Path to `fold k` of the reference split beside the tables; empty without one."""
    if not (root / "cv_reference.json").exists():
        scan.notes.append("no cv_reference.json: folds will be drawn")
        return {}
    try:
        folds = read_json(inside(root, "cv_reference.json"))["folds"]
        listed = [(path, number) for number, fold in enumerate(folds) for path in fold["test_paths"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise DataError('cv_reference.json: must look like {"folds": [{"test_paths": [...]}, ...]}; remove it to have folds drawn') from None
    if not all(isinstance(path, str) for path, _ in listed):
        raise DataError("cv_reference.json: test_paths must be paths; remove the file to have folds drawn")
    return {path: f"fold {number}" for path, number in listed}


def _read_upstream(root: Path, table: str) -> Scan:
    """A clone: files lie in pocus_videos and pocus_images, the table names them without folder and extension."""
    scan = Scan(root, form="upstream")
    columns = ("Filename", "Label", "Type", "InThisRepo", "Patient ID / Name", "License", "Lung Severity Score")
    entries: dict[str, list[Mapping[str, str]]] = {}
    where: dict[str, str] = {}
    for row in read_table(root, table, columns, loose=True):
        stem = _stem(row.cells["Filename"])
        entries.setdefault(stem.casefold(), []).append(row.cells)
        where.setdefault(stem.casefold(), row.where)
    folder = str(PurePosixPath(table).parent / "pocus_").removeprefix("./")
    media = media_below(root, folder, notes=scan.notes)
    cut = [path for path in media if _FRAME_OF_VIDEO.fullmatch(PurePosixPath(path).stem)]
    if cut:
        scan.notes.append(f"{len(cut)} pictures are frames cut from the videos and are left out")
    met = set()
    for path in sorted(set(media) - set(cut)):
        stem = _stem(PurePosixPath(path).name)
        met.add(stem.casefold())
        known = entries.get(stem.casefold(), [])
        if not known:
            scan.deviations.append(f"surplus: {path} has no row in {table}")
        scan.rows.append(_upstream_row(media[path], stem, known, scan))
    for key, cells in entries.items():
        if key not in met and any(entry["InThisRepo"].casefold() == "yes" for entry in cells):
            scan.deviations.append(f"missing: {cells[0]['Filename']} ({where[key]})")
    scan.notes.append(
        "patient numbers are upstream's, which divide one person into several in places (source northumbria): numbers on this form "
        "may be too good; the selection with grouped patients, or one split by source, is safer"
    )
    free = sum(not row.extra["licence"] for row in scan.rows)
    if free:
        scan.notes.append(f"{free} files have no licence: do not hand them on")
    return scan


def _stem(name: str) -> str:
    """A file name without its extension; dots inside a name stay."""
    return re.sub(r"\.(gif|mp4|mov|avi|mpe?g|jpe?g|png)$", "", name.strip(), flags=re.IGNORECASE).strip()


def _upstream_row(media: Media, stem: str, entries: list[Mapping[str, str]], scan: Scan) -> Row:
    labels = {_upstream_label(cells["Label"]) for cells in entries}
    if "label_uncertain" in PurePosixPath(media.path).parts:
        labels = {"uncertain"}
    if len(labels) > 1:
        scan.deviations.append(f"wrong: {media.path} has the labels {', '.join(sorted(labels))}; it stays unlabelled")
    cells = entries[0] if entries else {}
    number = _SHIFTED.get(stem) or cells.get("Patient ID / Name", "")
    licence = cells.get("License", "")
    probe = next((name for name in ("convex", "linear") if name in PurePosixPath(media.path.casefold()).parts), "")
    licence = "" if licence.casefold() in ("none", "n.a.") else licence
    extra = {"probe": probe, "licence": licence, "severity": cells.get("Lung Severity Score", "")}
    patient = "" if number.casefold() in ("", "nd", "n/a", "na") else f"upstream-{number}"
    return Row(media.path, media.kind, labels.pop() if len(labels) == 1 else "", patient, extra=extra)


def _upstream_label(text: str) -> str:
    return next((label for word, label in _LABELS.items() if text.strip().casefold().startswith(word)), "uncertain")


POCUS = _Pocus(
    name="pocus",
    title="POCUS lung ultrasound",
    about="Lung ultrasound clips and stills of COVID-19, bacterial and viral pneumonia and healthy lungs, collected from public sources.",
    citation="Born et al. 2021, Applied Sciences 11(2):672, doi:10.3390/app11020672; severity scores: Gare et al. 2022, arXiv:2201.07357",
    licence="differs by file (column licence): CC BY to CC BY-NC-SA, mostly non-commercial; upstream also holds files without any licence",
    redistributable=True,
    obtain=(
        "sonoscope data fetch pocus --accept-licence   (clones github.com/jannisborn/covid19_ultrasound at a pinned revision)",
        "or the redistributable selection with videos.csv and images.csv, where your group has it",
    ),
    layout="""
the selection                        or a clone of the repository
videos.csv, images.csv               data/dataset_metadata.csv
cv_reference.json (folds)            data/pocus_videos/convex/*.mp4 ...
videos/convex/*.mp4 ...              data/pocus_videos/linear/label_uncertain/
images/linear/*.png ...              data/pocus_images/convex/*.jpg ...
""",
    labels="column label (selection), or column Label of dataset_metadata.csv: covid, pneumonia (bacterial), viral, regular, uncertain",
    patients="selection: column patient_id, groups joined by evidence. Upstream: its own numbers, known to divide one person into several",
    settings=_CLASSES,
    presets=("pocus", "pocus_cpu", "pocus_methods"),
    certainty="selection: confirmed on the files. Upstream: counts are not checked, because its README (October 2020: 162 convex and 20 "
    "linear videos, 59 images) counts files the repository does not hold; the pinned revision was taken from a stored copy of its README",
    published=(
        Expect("videos", 96), Expect("images", 21), Expect("patients", 45),
        *(Expect("files", number, label) for label, number in _SELECTION.items()),
        *(Expect("videos", number, split=f"fold {fold}") for fold, number in enumerate((17, 19, 18, 16, 19))),
    ),
)
