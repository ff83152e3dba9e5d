"""What the pixel data of a DICOM file really hold, where headers are often wrong: colours and number of compressed pictures.

And native pictures whose colours are kept at half width, which pydicom reads from wrong places. For `dicom.py`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

__all__ = ["codestream_colours", "expand_422", "likely_frames"]

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers in front of a JPEG picture's size and components."""
_STARTS = (b"\xff\xd8", b"\xff\x4f\xff\x51")
"""How JPEG and JPEG-LS, and JPEG 2000 codestreams begin. Inside one the first cannot occur, and the second hardly."""


def codestream_colours(codestream: bytes) -> str:
    """In which colours a JPEG picture of three components is stored: `RGB`, `YBR`, or empty where it does not say.

    JFIF stands for YBR, Adobe's mark says it in words, so do components named R, G and B. Without them components of different
    size can only be YBR, and 1, 2 and 3 are the names that libjpeg gives to YBR alone.
    """
    place, jfif, adobe = 2, False, None
    while codestream[place : place + 1] == b"\xff" and place + 4 <= len(codestream):
        kind, size = codestream[place + 1], int.from_bytes(codestream[place + 2 : place + 4], "big")
        if kind == 0xFF:  # a byte that fills
            place += 1
            continue
        body = codestream[place + 4 : place + 2 + size]
        jfif = jfif or (kind == 0xE0 and body.startswith(b"JFIF"))
        if kind == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        if kind in _SOF:
            names, sizes = body[6:15:3], body[7:15:3]
            if body[5:6] != b"\x03" or len(names) < 3:
                return ""
            if jfif or adobe is not None:
                return "YBR" if jfif or adobe else "RGB"
            if names.upper() == b"RGB":
                return "RGB"
            return "YBR" if len(set(sizes)) > 1 or names == b"\x01\x02\x03" else ""
        if size < 2:
            return ""
        place += 2 + size
    return ""


def likely_frames(encaps: Any, pixel_data: bytes, claimed: int, *, split: bool) -> int:
    """Frames of encapsulated pixel data whose bounds no table gives; `claimed` where nothing better is known.

    Args:
        encaps: the module of pydicom. split: pictures are JPEG of any kind and may lie in pieces; others take one fragment each.
    """
    buffer = io.BytesIO(pixel_data)
    if encaps.parse_basic_offsets(buffer):
        return claimed
    count, places = encaps.parse_fragments(buffer)
    if split:
        count = sum(pixel_data[place + 8 : place + 12].startswith(_STARTS) for place in places)
    return count or claimed


def expand_422(raw: bytes, width: int, height: int) -> np.ndarray:
    """A native YBR_FULL_422 picture as YBR_FULL, uint8 [height, width, 3]. raw: Y1 Y2 Cb Cr for every two pixels, 2 bytes a pixel."""
    stored, count = np.frombuffer(raw, np.uint8), width * height
    pairs = stored[: count // 2 * 4].reshape(-1, 4)
    out = np.empty((count, 3), np.uint8)
    out[: 2 * len(pairs), 0] = pairs[:, :2].reshape(-1)
    out[: 2 * len(pairs), 1:] = np.repeat(pairs[:, 2:], 2, axis=0)
    if count % 2:  # a last pixel alone has no room for its colour
        out[-1] = stored[-2], *out[-2, 1:]
    return out.reshape(height, width, 3)
