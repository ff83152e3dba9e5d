"""Contact sheets: what was extracted at a glance, four frames a video, captioned with video id and label only.

Burnt-in names, wrong crops, black clips and mixed-up labels are seen here before any training.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.manifest import VideoRow
from pipeline.data.store import FrameStore
from pipeline.files import atomic_write

__all__ = ["write_contact_sheets"]

VIDEOS_A_PAGE, COLUMNS, FRAMES = 24, 3, 4
THUMB, CAPTION, GAP = 96, 16, 6
"""Pixels: side of a thumbnail, height of a caption, space between videos."""


def write_contact_sheets(store: FrameStore, folder: Path, max_pages: int = 4) -> list[Path]:
    """Write contact_sheet_1.png, ... into `folder`, replacing earlier ones, and return their paths.

    Videos come sorted by label; of more than fit on `max_pages`, an evenly spaced choice is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("contact_sheet_*.png"):
        old.unlink()
    rows = sorted(store.manifest.rows, key=lambda row: (row.label == "", row.label, row.video))
    room = VIDEOS_A_PAGE * max_pages
    if len(rows) > room:
        rows = [rows[index] for index in np.linspace(0, len(rows) - 1, room).round().astype(int)]
    paths = []
    for start in range(0, len(rows), VIDEOS_A_PAGE):
        page = _page(rows[start:start + VIDEOS_A_PAGE], store.frame)
        out = io.BytesIO()
        page.save(out, "PNG", optimize=True)
        paths.append(folder / f"contact_sheet_{len(paths) + 1}.png")
        atomic_write(paths[-1], out.getvalue())
    return paths


def _page(rows: list[VideoRow], frame: Callable[[str, int], np.ndarray]) -> Image.Image:
    """One sheet of up to `VIDEOS_A_PAGE` videos as an RGB picture."""
    lines = -(-len(rows) // COLUMNS)
    cell_width, cell_height = FRAMES * THUMB + GAP, THUMB + CAPTION + GAP
    page = Image.new("RGB", (COLUMNS * cell_width + GAP, lines * cell_height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for place, row in enumerate(rows):
        left, top = GAP + place % COLUMNS * cell_width, GAP + place // COLUMNS * cell_height
        draw.text((left, top), _caption(row), fill="black", font=font)
        # The ends of clips are often black or frozen, so frames are taken from the middles of equal parts.
        indices = dict.fromkeys(int((part + 0.5) * row.frames / FRAMES) for part in range(FRAMES))
        for column, index in enumerate(indices):
            picture = Image.fromarray(frame(row.video, index)).convert("RGB")
            picture.thumbnail((THUMB, THUMB))
            page.paste(picture, (left + column * THUMB, top + CAPTION))
    return page


def _caption(row: VideoRow) -> str:
    label = row.label or "unlabelled"
    # The built-in font may lack letters outside Latin-1; a replaced letter is better than a failed report.
    return f"{row.video}  {label[:40]}".encode("latin-1", "replace").decode("latin-1")
