"""Folders of numbered pictures without a table: each the frames of one clip, or the stills of a class?

Names do not tell (`benign/1.png`, `clip7/1.png`), pictures do: a frame is like its neighbours, the stills of different patients
are not. One answer for all folders, from a few pairs of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.data.pool import run_isolated, usable_cores
from pipeline.data.trouble import detail, turn
from pipeline.data.video import Media, MediaReader, find_media
from pipeline.errors import DataError
from pipeline.parameters import ExtractParams

__all__ = ["clips_or_stills"]

FOLDERS, PAIRS = 32, 8
"""Folders looked into, evenly chosen, and pairs of neighbours in each."""
UNLIKE = 0.5
"""1 - correlation of details above which neighbours are unlike. Of the neighbours in 95 lung clips 0.6 % are at every third frame
and 19 % at every thirtieth; of stills of different clips, brought to one size, 91 %."""
SURE = 0.25
"""Share of unlike pairs up to which nobody has to be warned that folders are taken as clips."""


def clips_or_stills(media: Sequence[Media]) -> tuple[list[Media], str, bool]:
    """Media in which such folders are clips as before, or their pictures stills; what to say of it; whether that is a warning.

    Asked only where at least two folders of numbered pictures lie directly in the source and nothing else does; in all other cases
    (and where no picture can be read) nothing is changed or said.
    """
    folders = [item for item in media if item.kind == "frames" and "/" not in item.path]
    if len(folders) < 2 or len(folders) < len(media):
        return list(media), "", False
    chosen = [folders[index] for index in np.unique(np.linspace(0, len(folders) - 1, min(FOLDERS, len(folders))).round().astype(int))]
    answers = run_isolated(_neighbours, chosen, min(usable_cores(), len(chosen)), _crashed)
    pairs, unlike = np.sum([(0, 0), *answers], axis=0).tolist()
    if not pairs:
        return list(media), "", False
    seen = f"{unlike} of {pairs} pairs of neighbours looked at are unlike in size or content"
    if unlike <= 0.5 * pairs:
        said = f"{len(folders)} folders of numbered pictures are each taken as one clip ({seen}). If they are stills of classes, give a labels table"
        return list(media), f"{said} that names the pictures", unlike > SURE * pairs
    stills = [Media(f"{folder.path}/{item.path}", item.kind, item.location) for folder in folders for item in find_media(folder.location).media]
    said = f"the pictures in {len(folders)} folders of numbered pictures are each taken as a still ({seen}). If the folders are clips, give a labels table"
    return stills, f"{said} that names the folders", True


def _neighbours(folder: Media) -> tuple[int, int]:
    """Pairs of neighbours looked at in a folder, and how many of them are unlike. Never raises for a bad picture."""
    pairs = unlike = 0
    try:
        frames = MediaReader(folder, ExtractParams()).open()
        count = frames.claimed or 0
        starts = set(np.linspace(0, max(0, count - 2), min(PAIRS, max(0, count - 1))).round().astype(int).tolist())
        before: np.ndarray | None = None
        for index in range(count):
            frames.grab()
            picture = cv2.cvtColor(frames.retrieve(), cv2.COLOR_BGR2GRAY) if {index, index - 1} & starts else None
            if picture is not None and before is not None and index - 1 in starts:
                pairs += 1
                unlike += picture.shape != before.shape or turn(detail(before), detail(picture)) > UNLIKE
            before = picture
        frames.close()
    except (DataError, cv2.error, MemoryError, OSError):
        pass  # extraction tells which picture is damaged
    return pairs, int(unlike)


def _crashed(folder: Media) -> tuple[int, int]:
    return 0, 0
