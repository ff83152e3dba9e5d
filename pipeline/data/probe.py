"""What the header of one file says: container by content, codec, size, rate, flags, and the trouble visible without decoding.

Nothing that identifies a person leaves this file: patient and study of a DICOM header are hashed at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
from PIL import Image

from pipeline.data.dicom import DicomFrames, read_identity
from pipeline.data.integrity import lacks_end
from pipeline.data.manifest import pseudonym
from pipeline.data.sniffing import is_dicom, magic_of
from pipeline.data.trouble import Finding, check_picture
from pipeline.data.video import Media, MediaReader
from pipeline.errors import DataError
from pipeline.parameters import ExtractParams

__all__ = ["Header", "container_of", "read_header"]

_EXTENSIONS = {
    "mp4": ".mp4 .m4v .mov .3gp .3g2", "avi": ".avi", "gif": ".gif", "matroska": ".mkv .webm", "mpeg": ".mpeg .mpg .mpe .vob .m2v .dat",
    "asf": ".wmv .asf", "flv": ".flv", "ogg": ".ogv .ogg", "jpeg": ".jpg .jpeg .jpe .jfif", "png": ".png", "bmp": ".bmp", "tiff": ".tif .tiff",
}
_SOUND = {
    "mp4": re.compile(rb"hdlr.{8}soun", re.DOTALL), "avi": re.compile(rb"strh.{4}auds", re.DOTALL),
    "mpeg": re.compile(rb"\x00\x00\x01[\xc0-\xdf]"),
}
_READ = {"avi": 1 << 16, "mpeg": 1 << 20}
"""Bytes from the start in which a sound track shows itself."""
_MOOV = 1 << 26
_TURNS = {3: "180", 4: "180", 5: "90", 6: "90", 7: "270", 8: "270"}
"""EXIF orientation to degrees; 2, 4, 5 and 7 are mirrored as well."""


@dataclass
class Header:
    """Facts of one file. `container`: by content, `unknown` if none is recognised. `fps`: None where nothing states it."""

    container: str = "unknown"
    codec: str = ""
    width: int = 0
    height: int = 0
    fps: float | None = None
    frames: int | None = None
    patient: str = ""
    """Pseudonym of the patient (or study) a DICOM header names."""
    findings: list[Finding] = field(default_factory=list)


def container_of(path: Path) -> str:
    """The kind of container by its first bytes, or `unknown`."""
    if is_dicom(path):
        return "dicom"
    with open(path, "rb") as handle:
        return magic_of(handle.read(16)) or "unknown"


def read_header(media: Media, key: str = "", max_pixels: int | None = None) -> tuple[Header, Any]:
    """The header of a medium, and its opened decoder (`grab`, `retrieve`, `close`).

    Args:
        key: of the pseudonyms.

    Raises:
        DataError: the medium cannot be opened. OSError: it cannot be read.
    """
    limits = {} if max_pixels is None else {"max_pixels": max_pixels}
    reader = MediaReader(media, ExtractParams(**limits))
    if media.kind != "frames" and media.location.stat().st_size == 0:
        raise DataError(f"{media.path}: the file is empty")
    frames = reader.open()
    header = Header(fps=frames.fps, frames=frames.claimed)
    if media.kind == "frames":
        header.container = "frames"
        return header, frames
    header.container = container_of(media.location)
    extensions = _EXTENSIONS.get(header.container, "").split()
    if extensions and media.location.suffix.lower() not in extensions:
        header.findings.append(Finding("extension", f"{header.container} inside, named {media.location.suffix or 'without extension'}"))
    if lacks_end(media.location):
        header.findings.append(Finding("cut-off", f"the {header.container} file stops before its end mark"))
    if header.container == "dicom":
        _read_dicom(media, frames, header, key)
    if hasattr(frames, "capture"):
        _read_video(media, frames.capture, header)
    elif header.container != "dicom":
        _read_still(media.location, header)
    if not frames.still and header.fps is None:
        header.findings.append(Finding("no-rate", "neither container nor header states a rate from 1 to 1000"))
    return header, frames


def _read_video(media: Media, capture: cv2.VideoCapture, header: Header) -> None:
    get, findings = capture.get, header.findings
    header.width, header.height = int(get(cv2.CAP_PROP_FRAME_WIDTH)), int(get(cv2.CAP_PROP_FRAME_HEIGHT))
    header.codec = int(get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("ascii", "replace").strip("\x00 ")
    across, down = get(cv2.CAP_PROP_SAR_NUM), get(cv2.CAP_PROP_SAR_DEN)
    if across > 0 and down > 0 and abs(across / down - 1) > 0.02:
        findings.append(Finding("aspect", f"sample aspect ratio {across:.0f}:{down:.0f}"))
    if turned := int(get(cv2.CAP_PROP_ORIENTATION_META)) % 360:
        applied = "applied" if get(cv2.CAP_PROP_ORIENTATION_AUTO) else "not applied"
        findings.append(Finding("rotated", f"{turned} degrees by the container, {applied}"))
    layout = int(get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)).to_bytes(8, "little", signed=True)[:4]
    if layout[3] in (9, 10, 12, 14, 16):
        findings.append(Finding("deep", f"{layout[3]} bits a sample"))
    if header.container != "gif" and b"A" in layout and layout in (b"BGRA", b"RGBA", b"ARGB", b"ABGR"):
        findings.append(Finding("alpha", "stored with transparency"))
    if _has_sound(media.location, header.container):
        findings.append(Finding("audio", f"in the {header.container} file"))
    findings += check_picture(header.width, header.height, (0.0, 0.0))


def _has_sound(path: Path, container: str) -> bool:
    pattern = _SOUND.get(container)
    if pattern is None:
        return False
    with open(path, "rb") as handle:
        if container != "mp4":
            return pattern.search(handle.read(_READ[container])) is not None
        # Boxes of length and name follow one another; the tracks stand in `moov`, often the last.
        end = path.stat().st_size
        while handle.tell() + 8 <= end:
            start, head = handle.tell(), handle.read(16)
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(head[8:16], "big") if size == 1 else size or end - start
            if head[4:8] == b"moov":
                handle.seek(start)
                return pattern.search(handle.read(min(size, _MOOV))) is not None
            if size < 8:
                return False
            handle.seek(start + size)
    return False


def _read_still(path: Path, header: Header) -> None:
    with Image.open(path) as image:
        (header.width, header.height), mode = image.size, image.mode
        header.codec, turned, pages = mode, image.getexif().get(0x0112, 1), getattr(image, "n_frames", 1)
        if turned in range(2, 9):
            mirrored = ", mirrored" if turned in (2, 4, 5, 7) else ""
            header.findings.append(Finding("rotated", f"EXIF orientation {turned}: {_TURNS.get(turned, '0')} degrees{mirrored}, applied"))
        if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            header.findings.append(Finding("alpha", f"mode {mode}"))
        if mode.startswith(("I", "F")):
            header.findings.append(Finding("deep", f"mode {mode}"))
        if pages > 1:
            header.findings.append(Finding("pages", f"{pages} pages"))
    header.findings += check_picture(header.width, header.height, (0.0, 0.0), subsampled=False)


def _read_dicom(media: Media, frames: Any, header: Header, key: str) -> None:
    identity = read_identity(media.location, media.path)
    header.patient = pseudonym(identity.patient or identity.study, key)
    if not isinstance(frames, DicomFrames):
        return
    findings = header.findings
    header.width, header.height = frames.size
    if frames.bits > 8:
        findings.append(Finding("deep", f"{frames.bits} bits a sample"))
    if len(frames.regions) > 1:
        findings.append(Finding("regions", f"{len(frames.regions)} regions"))
    if frames.burnt_in:
        findings.append(Finding("burnt-in", "BurnedInAnnotation is YES"))
    if frames.colour_flow or any(region.data_type == 2 for region in frames.regions):
        findings.append(Finding("colour-flow", "UltrasoundColorDataPresent, or a region of colour flow"))
    if any("variable" in note for note in frames.notes):
        findings.append(Finding("variable-rate", "by FrameTimeVector"))
    findings += check_picture(header.width, header.height, (0.0, 0.0), subsampled=False)
