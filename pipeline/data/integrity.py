"""Whether the bytes of a still image or a GIF are all there; decoders fill or leave out what is missing and say nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["is_whole", "lacks_end", "overruns"]

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


def lacks_end(path: Path) -> bool:
    """Whether a GIF stops before its end mark; False for anything else. Its blocks are walked through, since bytes may follow the mark."""
    with open(path, "rb") as handle:
        head = handle.read(13)
        if not head.startswith(b"GIF8") or len(head) < 13:
            return head.startswith(b"GIF8")
        handle.seek(_colours(head[10]), 1)
        while (kind := handle.read(1)) in (b",", b"!", b"\0"):  # a picture, an extension; zeros, which some programs leave between
            if kind == b",":
                handle.seek(_colours((handle.read(9) or b"\0")[-1]), 1)
            if kind != b"\0":
                handle.seek(1, 1)
                while size := int.from_bytes(handle.read(1), "big"):
                    handle.seek(size, 1)
    return not kind


def _colours(flags: int) -> int:
    """Bytes of the colour table whose size the flags of a GIF give; 0 without one."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
