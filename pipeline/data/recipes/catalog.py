"""All recipes by name, and the one for any other folder with class folders or a labels table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.data.labels import read_labelled_media
from pipeline.data.recipes.base import Recipe, Row, Scan
from pipeline.data.recipes.endoscopy import CHOLEC80, POLYPDIAG, POLYPSSET
from pipeline.data.recipes.lung import POCUS
from pipeline.data.recipes.sonography import (
    BUSI,
    BUTTERFLY,
    CLUST,
    GBCU,
    GBUSV,
    LIVER,
    LUSMS,
    US4,
)
from pipeline.errors import DataError
from pipeline.parameters import DataParams
from pipeline.registry import did_you_mean

__all__ = ["FOLDER", "RECIPES", "recipe"]


@dataclass(frozen=True)
class _Folder(Recipe):
    """What the extract stage itself would read."""

    def read(self, root: Path, variant: str) -> Scan:
        found = read_labelled_media("main", DataParams(source=str(root)))
        scan = Scan(root, notes=found.notes)
        for item in found.media:
            label = found.labels[item.path]
            scan.rows.append(Row(item.path, item.kind, label.label, label.patient))
        if not any(row.patient for row in scan.rows):
            scan.notes.append("no patients are known: set data.group video, or add a column patient")
            scan.settings["data.group"] = "video"
        return scan


FOLDER = _Folder(
    name="folder", title="any folder of videos and images", about="Your own data: class folders, or a CSV table with path, label and patient.",
    citation="yours", licence="yours", obtain=("put the files into one folder",),
    layout="healthy/clip1.mp4, ill/clip2.mp4 ...     or labels.csv with columns path, label, patient beside the files",
    labels="the table, else the folder", patients="column patient of the table; unknown without one", certainty="no counts to compare with",
    redistributable=True,
)
RECIPES = {item.name: item for item in (
    POCUS, BUTTERFLY, CLUST, LUSMS, LIVER, US4, GBUSV, GBCU, BUSI, CHOLEC80, POLYPSSET, POLYPDIAG, FOLDER)}


def recipe(name: str) -> Recipe:
    """The recipe of that name; DataError naming the nearest one if there is none."""
    if name not in RECIPES:
        near = did_you_mean(name, RECIPES)
        raise DataError(f"data set '{name}': no recipe of that name.{near} Known: {', '.join(RECIPES)}. 'folder' reads any folder.")
    return RECIPES[name]
