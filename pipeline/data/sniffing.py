"""What a file is, by its first bytes and whatever its name: container, DICOM or not, and whether a DICOM header claims a cine.

Nothing is parsed and little is read, so that a folder of hostile files is listed as fast as any: this runs in the main process,
outside the limits that readers have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

__all__ = ["DEFLATED", "EXTENSIONS", "claims_several", "is_dicom", "magic_of", "sniff"]

EXTENSIONS = frozenset({".dcm", ".dicom", ".ima"})
"""Names of DICOM files."""
_STILL_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*")
"""How JPEG, PNG, BMP and TIFF files begin, whatever they are called."""
_MAGIC = (
    ("gif", 0, b"GIF8"), ("avi", 8, b"AVI "), ("matroska", 0, b"\x1a\x45\xdf\xa3"), ("mpeg", 0, b"\x00\x00\x01\xba"),
    ("mpeg", 0, b"\x00\x00\x01\xb3"), ("asf", 0, b"\x30\x26\xb2\x75"), ("flv", 0, b"FLV"), ("ogg", 0, b"OggS"), ("jpeg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG"), ("bmp", 0, b"BM"), ("tiff", 0, b"II*\x00"), ("tiff", 0, b"MM\x00*"),
    *(("mp4", 4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
)
_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
"""Types whose length takes four bytes, after two that are empty."""
DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax of files that are packed as a whole."""
# NumberOfFrames, and Rows, which follows it: with explicit types, with implicit ones, and with explicit ones of reversed order.
_FRAMES = re.compile(
    rb"(?:\x28\x00\x08\x00(?:IS[\x00-\x10]\x00|[\x00-\x10]\x00\x00\x00)|\x00\x28\x00\x08IS\x00[\x00-\x10])([ +0-9]{0,16})", re.DOTALL
)
_ROWS = re.compile(rb"\x28\x00\x10\x00(?:US\x02\x00|\x02\x00\x00\x00)|\x00\x28\x00\x10US\x00\x02", re.DOTALL)
_LOOKS = (1 << 14, 1 << 18)
"""Bytes in which those are looked for, at first and at most."""


def magic_of(head: bytes) -> str:
    """The kind of container by the first 16 bytes of a file (gif, mp4, jpeg, ...); empty for all others, DICOM among them."""
    return next((name for name, place, magic in _MAGIC if head[place:].startswith(magic)), "")


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its magic word, by its first elements where the preamble was left out, or else by its extension.

    At most 132 bytes are read. Whatever begins like another picture or video is none, whatever its name.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(132)
    except OSError:
        return False
    if head[128:] == b"DICM" or _begins_with_elements(head):
        return True
    return path.suffix.lower() in EXTENSIONS and not magic_of(head)


def _begins_with_elements(head: bytes) -> bool:
    """Whether the first two elements belong to group 0002 or 0008, in ascending order: explicit (both byte orders) or implicit types."""
    if head[:4] not in (b"\x02\x00\x00\x00", b"\x02\x00\x01\x00") and head[:2] != b"\x08\x00" and head[:2] != b"\x00\x08":
        return False
    order: Literal["little", "big"] = "big" if head[0] == 0 else "little"
    explicit, place, before = head[4:6] in _VRS, 0, -1
    for _ in range(2):
        group, element = (int.from_bytes(head[place + start : place + start + 2], order) for start in (0, 2))
        if group != head[order == "big"] or element <= before or (explicit and head[place + 4 : place + 6] not in _VRS):
            return False
        long = explicit and head[place + 4 : place + 6] in _LONG_VRS
        size = head[place + 8 : place + 12] if long else head[place + 6 : place + 8] if explicit else head[place + 4 : place + 8]
        place, before = place + (12 if long else 8) + int.from_bytes(size, order), element
        if place > len(head):
            return explicit and long  # a long value, or a sequence, in a well-formed first element
    return True


def claims_several(path: Path) -> bool:
    """Whether a DICOM header seems to claim several frames. A guess for lists: reading the file shows how many there are.

    At most 256 KiB are read. A deflated file counts as several: its header cannot be read without unpacking all of it.
    """
    head = b""
    try:
        with open(path, "rb") as handle:
            for size in _LOOKS:
                head += handle.read(size - len(head))
                if DEFLATED.encode() in head[:2048]:
                    return True
                if (rows := _ROWS.search(head)) is not None:
                    head = head[: rows.start()]
                    break
    except OSError:
        return False
    found = _FRAMES.search(head)
    number = found[1].strip(b" +") if found else b""
    return number.isdigit() and int(number) > 1


def sniff(path: Path) -> str:
    """`image` or `video`, by the first bytes; unreadable files count as video and fail when opened, with a reason.

    Of DICOM this is what the header seems to claim; its reader goes by the frames that are there.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(16)
    except OSError:
        return "video"
    if is_dicom(path):
        return "video" if claims_several(path) else "image"
    return "image" if head.startswith(_STILL_MAGIC) else "video"
