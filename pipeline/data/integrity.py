"""Whether the bytes of a still image are all there; decoders fill what is missing and say nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["is_whole", "overruns"]

_ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82"}


def overruns(raw: np.ndarray) -> bool:
    """Whether a PNG declares a part longer than the file; OpenCV takes that much memory before it looks."""
    place = 8 if raw[:4].tobytes() == b"\x89PNG" else len(raw)
    while place < len(raw) and raw[place + 4: place + 8].tobytes() != b"IEND":  # what follows the end is not read
        place += 12 + int.from_bytes(raw[place: place + 4].tobytes(), "big")
    return place > len(raw) + 12


def is_whole(path: Path, raw: np.ndarray) -> bool:
    """Whether an image is not cut off. OpenCV fills what is missing with grey and says nothing.

    JPEG and PNG have an end mark; a file without it is decoded once more by Pillow, which does complain.
    """
    tail = raw[-64:].tobytes()
    for start, end in _ENDINGS.items():
        if raw[: len(start)].tobytes() == start and end in tail:
            return True
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # damaged files fail in a dozen ways inside Pillow
        return False
    return True
