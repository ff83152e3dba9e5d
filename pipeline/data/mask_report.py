"""What a person looks at after masking: all masks as a table, a review list to fill in, and sheets of before and after.

The sheets show frames as they were, with whatever is written in them. They are never sent to tracking, but lie in a DVC output.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.masking import THUMB, MaskReport
from pipeline.files import atomic_write, csv_text

__all__ = ["write_mask_report"]

Item = tuple[str, str, str, MaskReport]
"""Video id, path, label, and what was found."""
CAPTION, GAP = 16, 6
COLUMNS, LINES = 4, 8
MAX_PAGES = 12
_COLUMNS = ("video", "label", "geometry", "confidence", "share", "action", "panes", "doppler", "grown", "reviewed", "review", "reasons")


def write_mask_report(items: Sequence[Item], scratch: Path, folder: Path) -> list[Path]:
    """Write masks.csv, review.csv and masks_1.png, ... into `folder`; earlier ones are removed, and none are written without masks.

    What a person should look at comes first, the least sure on top; review.csv has empty columns for the decision and is, filled
    in and kept elsewhere, what `extract.mask.review` reads. scratch: holds `<video>.preview.png`.

    Returns:
        Paths of the sheets.
    """
    for old in (*folder.glob("masks_*.png"), folder / "masks.csv", folder / "review.csv"):
        old.unlink(missing_ok=True)
    if not items:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    unique = {item[0]: item for item in items}
    items = sorted(unique.values(), key=lambda item: (not item[3].review, item[3].confidence or 0.0, item[0]))
    page_of = {item[0]: place // (COLUMNS * LINES) + 1 for place, item in enumerate(items)}
    atomic_write(folder / "masks.csv", _table(_COLUMNS, [_cells(item) for item in items]))
    sheets = {video: f"masks_{page}.png" for video, page in page_of.items() if page <= MAX_PAGES}
    wanted = [{**_cells(item), "sheet": sheets.get(item[0], "")} for item in items if item[3].review]
    columns = ("path", "video", "decision", "x0", "y0", "x1", "y1", "sheet", "geometry", "confidence", "action", "reasons")
    atomic_write(folder / "review.csv", _table(columns, wanted))
    paths = []
    for page in range(min(MAX_PAGES, -(-len(items) // (COLUMNS * LINES)))):
        out = io.BytesIO()
        _page(items[page * COLUMNS * LINES : (page + 1) * COLUMNS * LINES], scratch).save(out, "PNG", optimize=True)
        paths.append(folder / f"masks_{page + 1}.png")
        atomic_write(paths[-1], out.getvalue())
    return paths


def _cells(item: Item) -> dict[str, Any]:
    video, path, label, report = item
    reasons = [*report.reasons, *["two pictures side by side"] * (report.panes > 1), *["colour Doppler"] * report.doppler]
    known = {name: getattr(report, name) for name in ("geometry", "share", "action", "panes", "grown", "reviewed")}
    confidence = "" if report.confidence is None else report.confidence
    return {
        **known, "video": video, "path": path, "label": label, "confidence": confidence, "doppler": int(report.doppler), "review": int(report.review),
        "reasons": "; ".join(reasons),
    }


def _table(columns: Sequence[str], rows: list[dict[str, Any]]) -> str:
    return csv_text(columns, ([row.get(name, "") for name in columns] for row in rows))


def _page(items: Sequence[Item], scratch: Path) -> Image.Image:
    """One sheet as an RGB picture: for each video the frame with the outline, and what is left of it."""
    lines = -(-len(items) // COLUMNS)
    cell_width, cell_height = 2 * THUMB + 2 * GAP, THUMB + CAPTION + GAP
    page = Image.new("RGB", (COLUMNS * cell_width + GAP, lines * cell_height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for place, (video, _, label, report) in enumerate(items):
        left, top = GAP + place % COLUMNS * cell_width, GAP + place // COLUMNS * cell_height
        sure = "" if report.confidence is None else f" {report.confidence:.2f}"
        text = f"{video} {label[:16] or 'unlabelled'} {report.geometry or report.action}{sure}"
        draw.text((left, top), text.encode("latin-1", "replace").decode("latin-1"), fill="red" if report.review else "black", font=font)
        picture = cv2.imread(str(scratch / f"{video}.preview.png"), cv2.IMREAD_COLOR)
        if picture is not None:
            page.paste(Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)), (left, top + CAPTION))
    return page
