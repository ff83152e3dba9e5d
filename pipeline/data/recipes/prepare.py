"""What the pipeline reads of a scanned data set: a labels table, the official split, boxes; media stay where they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.recipes.base import Recipe, Row, Scan
from pipeline.errors import DataError
from pipeline.files import atomic_write, csv_text, write_json

__all__ = ["Prepared", "official_folds", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What was written, and the parameters by dotted key that use it."""

    files: tuple[Path, ...]
    settings: dict[str, Any]
    changed: bool
    """Whether a table or split of an earlier call was replaced by another one: DVC does not see that."""


def official_folds(recipe: Recipe, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Folds in the form of `split.file`; [] where the data set has no official split.

    `fold k` rows are tested by fold k. Otherwise one fold: `test`, everything else `train`, and validation as its inner part.
    Rows without a label are left out, unless labels of frames stand in other files.
    """
    used = [row for row in rows if row.split and (row.label or recipe.split_by == "patient")]

    def entries(*splits: str) -> list[str]:
        return list(dict.fromkeys(row.patient if recipe.split_by == "patient" else row.path for row in used if row.split in splits))

    numbered = sorted({row.split for row in used if row.split.startswith("fold ")}, key=lambda name: int(name.removeprefix("fold ")))
    if numbered:
        return [{"test_paths": entries(name)} for name in numbered]
    if not entries("test") or not entries("train"):
        return []
    key = "test_patients" if recipe.split_by == "patient" else "test_paths"
    fold: dict[str, Any] = {key: entries("test"), "train": entries("train", "validation")}
    return [fold | ({"inner": [{"validation": entries("validation")}]} if entries("validation") else {})]


def prepare(recipe: Recipe, scan: Scan, out: Path) -> Prepared:
    """Write `labels.csv`, and `split.json` and `boxes.csv` where there is something to write, into `out`.

    Returns:
        The files, and the settings of recipe and copy, with absolute paths as queued experiments need them.

    Raises:
        DataError: `out` lies in the data set's folder, or cannot be written.
    """
    out = Path(out)
    if out.resolve().is_relative_to(scan.root.resolve()):
        raise DataError(f"--out {out}: lies in the data set's own folder; choose another one, so that the data stay as they came")
    extra = list(dict.fromkeys(name for row in scan.rows for name in row.extra))
    cells = (
        [row.path, row.label, row.patient, row.split, row.kind, recipe.name, *(row.extra.get(name, "") for name in extra)] for row in scan.rows
    )
    table = csv_text(["path", "label", "patient", "split", "kind", "dataset", *extra], cells)
    folds = official_folds(recipe, scan.rows)
    written: dict[Path, str] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        labels, split = out / "labels.csv", out / "split.json"
        before = {path: path.read_text(encoding="utf-8") for path in (labels, split) if path.is_file()}
        atomic_write(labels, table)
        written[labels] = table
        if folds:
            write_json(split, {"description": f"{recipe.title}: official split", "folds": folds})
            written[split] = split.read_text(encoding="utf-8")
        else:
            split.unlink(missing_ok=True)
        if scan.boxes:
            boxes = out / "boxes.csv"
            atomic_write(boxes, csv_text(["path", "label", "x_min", "y_min", "x_max", "y_max"], scan.boxes))
            written[boxes] = ""
    except (OSError, UnicodeError) as error:
        raise DataError(f"{out}: cannot be written ({error})") from None
    settings: dict[str, Any] = {"data.source": str(scan.root.resolve()), "data.labels": str(labels.resolve())}
    settings |= dict(recipe.settings) | scan.settings
    # Media without a row (masks, films of another kind) are left out by this.
    settings["data.include"] = {"dataset": [recipe.name]} | settings.get("data.include", {})
    if folds:
        settings |= {"split.file": str(split.resolve()), "split.folds": list(range(len(folds)))}
    return Prepared(tuple(written), settings, any(written.get(path) != text for path, text in before.items()))
