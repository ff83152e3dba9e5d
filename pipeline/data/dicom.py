"""DICOM files as frames: one picture or a cine, in the transfer syntaxes seen in practice, without any identifying value.

pydicom and its decoders are optional (`pip install "sonoscope[dicom]"`). Nothing of the header leaves this file but sizes, the
frame rate with the tag it came from, the regions of the scan, and hashes of patient and study. Errors never quote header values.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import os
import re
import tempfile
import warnings as python_warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from pipeline.data.dicom_pixels import codestream_colours, expand_422, likely_frames
from pipeline.data.limits import tick
from pipeline.data.sniffing import DEFLATED
from pipeline.errors import DataError
from pipeline.files import is_full

__all__ = ["DicomFrames", "Identity", "Region", "frame_rate", "read_identity", "stream_header", "stream_of"]

INSTALL = 'pip install "sonoscope[dicom]"'
_VIDEO = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.10[0-8](\.1)?")
"""MPEG-2, MPEG-4/H.264 and HEVC inside DICOM: one stream in the pixel data, decoded as a video file."""
_JPEG = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.(5[0-9]|6[0-9]|70|80|81|90|91|92|93)")
"""Codestreams that end with the marker FF D9."""
_RLE = "1.2.840.10008.1.2.5"
_LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
"""JPEG with loss, which alone stores other colours than a header of RGB says."""
MAX_INFLATED = 1 << 28
"""Bytes a deflated file may unpack to."""

_TAGS = [
    "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation", "PlanarConfiguration",
    "PhotometricInterpretation", "FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate", "WindowCenter", "WindowWidth",
    "RescaleSlope", "RescaleIntercept", "SequenceOfUltrasoundRegions", "UltrasoundColorDataPresent", "BurnedInAnnotation", "SpecificCharacterSet",
    *(f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
]
# A patient id that stands for no patient, without its spaces and marks: nothing, zeros, crosses, or what anonymisers write. Any
# other digit makes it an id (ANON0001), and so does a letter that is part of no such word (ANON-B).
_NO_PATIENT = re.compile(
    "[0x]*|((de)?anon([iy]m[a-z]*)?|(de|un)identified|unknown|unnamed|undefined|unspecified|notavailable|none|null|na|noid|noname|nopatient"
    "|removed|deleted|redacted|withheld|blank|empty|hidden|missing|test|dummy|patient)+(id|name)?"
)


@dataclass(frozen=True)
class Region:
    """A calibrated part of the picture, in pixels, right and bottom exclusive, clipped to the picture.

    `spatial_format`: 1 two-dimensional, 2 M-mode, 3 spectral, 4 wave form, 5 graphics; `data_type`: 1 tissue, 2 colour flow, ...
    (DICOM PS3.3 C.8.5.5).
    """

    left: int
    top: int
    right: int
    bottom: int
    spatial_format: int
    data_type: int


@dataclass(frozen=True)
class Identity:
    """Raw patient and study identifiers, to be hashed at once by the caller; empty where absent or a placeholder."""

    patient: str
    study: str

    def __repr__(self) -> str:
        return "Identity(...)"


def _pydicom(name: str) -> Any:
    # pydicom logs what it stumbles over, header values included, and Python prints such lines on the screen.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"a DICOM file, and pydicom is not installed: {INSTALL}") from None


@contextmanager
def _named(path: str, what: str) -> Iterator[None]:
    """Every failure inside becomes a DataError that names the file and no header value (pydicom's texts quote them)."""
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            yield
    except DataError as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except MemoryError:
        raise DataError(f"{path}: {what} (it claims more memory than there is)") from None
    except OSError as error:
        if is_full(error):
            raise  # the disk's fault, not the file's
        raise DataError(f"{path}: {what} ({type(error).__name__})") from None
    except Exception as error:  # damaged headers fail in dozens of ways inside the parser
        raise DataError(f"{path}: {what} ({type(error).__name__})") from None


def _has_magic(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(132)[128:] == b"DICM"


def _header(path: Path, tags: list[str]) -> Any:
    """The named elements, without pixel data. Large values stay on disk until asked for."""
    pydicom = _pydicom("pydicom")
    _refuse_bomb(path, pydicom)
    magic = _has_magic(path)
    dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=not magic)
    if not magic and "Rows" not in dataset and "StudyInstanceUID" not in dataset:
        raise DataError("not a DICOM file, whatever its name says")
    if not magic and "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        uids = pydicom.uid
        plain = uids.ImplicitVRLittleEndian if implicit else uids.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = plain if little else uids.ExplicitVRBigEndian
    return dataset


def _deflated_from(path: Path, pydicom: Any) -> int | None:
    """Where the packed part of a file begins that is deflated as a whole; None for others."""
    with open(path, "rb") as handle:
        handle.seek(132 if _has_magic(path) else 0)
        meta = pydicom.filereader.read_dataset(handle, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        return handle.tell() if meta.get("TransferSyntaxUID") == DEFLATED else None


def _refuse_bomb(path: Path, pydicom: Any) -> None:
    """A deflated file is unpacked as a whole by pydicom: refuse one that unpacks to more than `MAX_INFLATED`."""
    start = _deflated_from(path, pydicom)
    if start is None:
        return
    with open(path, "rb") as handle:
        handle.seek(start)
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflater.eof and (chunk := handle.read(1 << 16)):
            # What follows the end of the stream is never consumed, so its end is asked for each time.
            while chunk and not inflater.eof:
                total += len(inflater.decompress(chunk, 1 << 20))
                chunk = inflater.unconsumed_tail
                if total > MAX_INFLATED:
                    raise DataError(f"unpacks to more than {MAX_INFLATED >> 20} MiB; refused")


def read_identity(path: Path, shown: str) -> Identity:
    """Patient and study of a DICOM file; `shown` names it in errors.

    An id that stands for nobody ("anonymous", "--", "000") counts as absent.
    """
    with _named(shown, "the DICOM header cannot be read"):
        dataset = _header(path, ["PatientID", "StudyInstanceUID", "Rows", "SpecificCharacterSet"])
        patient, study = (str(dataset.get(name, "") or "").strip() for name in ("PatientID", "StudyInstanceUID"))
        words = re.sub(r"[\W_]", "", patient).lower()
        # An id has 64 characters at most; longer ones could keep the pattern busy for ever.
        return Identity("" if len(words) <= 64 and _NO_PATIENT.fullmatch(words) else patient, study)


def frame_rate(dataset: Any) -> tuple[float | None, str]:
    """(frames per second, tag it came from), or (None, "none").

    FrameTime and FrameTimeVector say how the frames were recorded; CineRate and RecommendedDisplayFrameRate only how to show
    them, so they come last. Rates outside 1 to 1000 are not believed.
    """

    def number(name: str) -> float:
        try:
            return float(dataset.get(name) or 0)
        except (TypeError, ValueError):
            return 0.0

    def from_vector() -> float:
        try:
            steps = [float(value) for value in list(dataset.get("FrameTimeVector") or [])[1:]]
        except (TypeError, ValueError):
            return 0.0
        return 1000 * len(steps) / sum(steps) if steps and sum(steps) > 0 else 0.0

    time = number("FrameTime")
    found = {
        "FrameTime": 1000 / time if time > 0 else 0.0, "FrameTimeVector": from_vector(), "CineRate": number("CineRate"),
        "RecommendedDisplayFrameRate": number("RecommendedDisplayFrameRate"),
    }
    return next(((rate, tag) for tag, rate in found.items() if math.isfinite(rate) and 1 <= rate <= 1000), (None, "none"))


def _regions(dataset: Any, width: int, height: int) -> list[Region]:
    """The calibrated regions, clipped to the picture; those that lie outside or say nonsense are dropped."""
    found = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        try:
            box = [int(item.get(f"RegionLocation{name}")) for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
            kinds = [int(item.get(name) or 0) for name in ("RegionSpatialFormat", "RegionDataType")]
        except (TypeError, ValueError):
            continue
        left, top = max(0, box[0]), max(0, box[1])
        right, bottom = min(width, box[2] + 1), min(height, box[3] + 1)
        if right - left > 1 and bottom - top > 1:
            found.append(Region(left, top, right, bottom, *kinds))
    return found


def _variable_rate(dataset: Any) -> bool:
    """Whether the steps of FrameTimeVector differ by more than a tenth of their median."""
    try:
        steps = np.array([float(value) for value in list(dataset.get("FrameTimeVector") or [])[1:]])
    except (TypeError, ValueError):
        return False
    return len(steps) > 1 and float(np.ptp(steps)) > 0.1 * float(np.median(steps))


class DicomFrames:
    """Frames of a DICOM file in order, uint8 [H, W] or BGR [H, W, 3]; one decoded frame in memory at a time.

    Attributes: `claimed` frames of the header; `still`, whether there is one; `size` (width, height); `bits` stored; `fps` and
    `fps_source` (the tag); `regions`; `burnt_in` and `colour_flow`, whether the header says so; `notes` for the manifest.
    """

    def __init__(self, path: Path, shown: str, max_pixels: int) -> None:
        self._path, self._shown = path, shown
        self._frame: np.ndarray | None = None
        self._deep_table: bool | None = None
        self._ybr = False
        self.notes: list[str] = []
        with _named(shown, "the DICOM header cannot be read"):
            dataset = self._dataset = _header(path, _TAGS)
            height, width = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
            if not height or not width:
                raise DataError("holds no picture (a report, a presentation state, or another kind of DICOM object)")
            if width * height > max_pixels:
                raise DataError(
                    f"{width} x {height} pixels are more than extract.max_pixels ({max_pixels}); raise it if this is right"
                )
            self.claimed: int | None = max(1, int(dataset.get("NumberOfFrames") or 1))
            self.regions = _regions(dataset, width, height)
            self.size, self.bits = (width, height), int(dataset.get("BitsStored") or 8)
            self.burnt_in = str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES"
            self.colour_flow = str(dataset.get("UltrasoundColorDataPresent") or "0").strip() == "1"
            self._check_decoder()
            self._source = self._frames()
            # A header that claims one frame, or says nothing, may hold many; of others the number is no matter before they are read.
            self.still = self.claimed == 1 and self._present == 1
            self.fps, self.fps_source = (None, "none") if self.still else frame_rate(dataset)
            if not self.still and _variable_rate(dataset):
                used = {"FrameTimeVector": "the mean of FrameTimeVector", "none": "no rate"}.get(self.fps_source, self.fps_source)
                self.notes.append(f"variable frame rate: {used} is used")

    def _check_decoder(self) -> None:
        uid = self._dataset.file_meta.get("TransferSyntaxUID") if hasattr(self._dataset, "file_meta") else None
        if uid is None:
            raise DataError("the header does not say how the pixels are stored (no transfer syntax)")
        if uid.is_encapsulated and not _VIDEO.fullmatch(uid):
            try:
                decoder = _pydicom("pydicom.pixels").get_decoder(uid)
            except NotImplementedError:
                raise DataError(f"pixels are stored as {uid.name}, which cannot be decoded here") from None
            if not decoder.is_available:
                raise DataError(f"pixels are stored as {uid.name}, and its decoder is not installed: {INSTALL}")

    @cached_property
    def _present(self) -> int:
        """Whole frames that are there. Pictures that are compressed are looked at: ends, and colours."""
        with _named(self._shown, "the pixel data cannot be read"):
            encapsulated = self._dataset.file_meta.TransferSyntaxUID.is_encapsulated
            return self._check_codestreams() if encapsulated else self._native_frames()

    def _frames(self) -> Iterator[np.ndarray]:
        """Decoded frames."""
        pixels, uid = _pydicom("pydicom.pixels"), self._dataset.file_meta.TransferSyntaxUID
        present, lossy = self._present, uid in _LOSSY
        if self._halved:
            for frame in self._halved_frames(present):
                yield self._to_bytes(frame, pixels)
            return
        # A file that is deflated as a whole has to be unpacked first, and one that lacks the transfer syntax has to be completed; of
        # all others one frame at a time is read.
        source = self._path
        if uid == DEFLATED or not _has_magic(self._path):
            source = _pydicom("pydicom").dcmread(self._path, force=True)
            source.file_meta.TransferSyntaxUID = uid
        for frame in pixels.iter_pixels(source, raw=lossy, number_of_frames=present):
            yield self._to_bytes(self._from_ybr(frame) if lossy and self._ybr else frame, pixels)

    def _native_frames(self) -> int:
        """Whole frames the uncompressed pixel data hold."""
        dataset, (width, height) = self._dataset, self.size
        length = self._native_place()[1]
        samples, bits = int(dataset.get("SamplesPerPixel") or 1), int(dataset.get("BitsAllocated") or 8)
        full = width * height * samples * bits
        present = 8 * length // (full // 3 * 2 if self._halved else full)
        if present < 1:
            raise DataError("the pixel data are cut off")
        if self._halved and (bits != 8 or 8 * length - self.claimed * full in (0, 8)):
            raise DataError("the header says YBR_FULL_422, and the pixel data do not take two bytes a pixel; write it again with the right colours")
        return present

    def _native_place(self) -> tuple[int, int]:
        """Where the uncompressed pixel data begin, and how many bytes of them there are; of a deflated file, when unpacked."""
        syntax = self._dataset.file_meta.TransferSyntaxUID
        if syntax == DEFLATED:
            return 0, len(self._unpacked())
        with open(self._path, "rb") as handle:
            # The reader stops in front of the element, whose length follows its tag (and, explicitly, its type).
            _pydicom("pydicom").dcmread(handle, stop_before_pixels=True, specific_tags=["Rows"], force=True)
            place, head = handle.tell(), handle.read(12)
        order: Literal["little", "big"] = "little" if syntax.is_little_endian else "big"
        if not syntax.is_implicit_VR and head[8:12] == b"\xff\xff\xff\xff":
            raise DataError("the header does not say how the pixels are compressed (no transfer syntax)")
        before = 8 if syntax.is_implicit_VR else 12
        length = min(int.from_bytes(head[before - 4 : before], order), self._path.stat().st_size - place - before)
        return place + before, length

    def _unpacked(self) -> bytes:
        """The pixel data of a file that is deflated as a whole."""
        dataset = _pydicom("pydicom").dcmread(self._path, specific_tags=["PixelData"], force=True)
        return dataset.get("PixelData") or b""

    @property
    def _halved(self) -> bool:
        """Whether the header says that native pixels share their colours in pairs."""
        native = not self._dataset.file_meta.TransferSyntaxUID.is_encapsulated
        return native and self._label == "YBR_FULL_422" and self._dataset.get("SamplesPerPixel") == 3

    @property
    def _label(self) -> str:
        return str(self._dataset.get("PhotometricInterpretation") or "")

    def _halved_frames(self, present: int) -> Iterator[np.ndarray]:
        """Native frames whose colours are halved, as RGB; pydicom looks for all but the first at wrong places."""
        (width, height), syntax = self.size, self._dataset.file_meta.TransferSyntaxUID
        with io.BytesIO(self._unpacked()) if syntax == DEFLATED else open(self._path, "rb") as handle:
            place, swapped = self._native_place()[0], False
            if not syntax.is_little_endian:
                handle.seek(place - 8)
                swapped = handle.read(2) == b"OW"
            handle.seek(place)
            for _ in range(present):
                raw = handle.read(2 * width * height)
                if swapped:
                    raw = np.frombuffer(raw, np.uint16).byteswap().tobytes()
                yield self._from_ybr(expand_422(raw, width, height))

    def _from_ybr(self, frame: np.ndarray) -> np.ndarray:
        return _pydicom("pydicom.pixels").convert_color_space(frame, "YBR_FULL", "RGB")

    def _check_codestreams(self) -> int:
        """Count compressed pictures. They are checked for their end, since decoders fill a cut-off one silently, and for their colours."""
        # Read apart from the header, and let go when checked: frames are decoded one by one from the file.
        tables = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
        dataset = _pydicom("pydicom").dcmread(self._path, specific_tags=["PixelData", *tables], force=True)
        if "PixelData" not in dataset:
            raise DataError("the pixel data are cut off")
        encaps, uid = _pydicom("pydicom.encaps"), self._dataset.file_meta.TransferSyntaxUID
        offsets = tuple(dataset[name].value for name in tables) if all(name in dataset for name in tables) else None
        jpeg, number, colours = bool(_JPEG.fullmatch(uid)), -1, set()
        wanted = likely_frames(encaps, dataset.PixelData, self.claimed, split=uid != _RLE)
        for number, codestream in enumerate(encaps.generate_frames(dataset.PixelData, number_of_frames=wanted, extended_offsets=offsets)):
            if jpeg and b"\xff\xd9" not in codestream[-64:]:  # padding may follow the mark
                raise DataError(f"frame {number} of {wanted} is cut off")
            if uid in _LOSSY:
                colours.add(codestream_colours(codestream) or self._label[:3])
        if len(colours) > 1:
            raise DataError("some frames are stored as RGB and others as YBR; write them again in one way")
        self._ybr = "YBR" in colours
        if colours and self._label[:3] in ("RGB", "YBR") and self._label[:3] not in colours:
            self.notes.append(f"the header says {self._label}, and the JPEG pictures are {colours.pop()}: read as that")
        return number + 1

    def _to_bytes(self, frame: np.ndarray, pixels: Any) -> np.ndarray:
        """uint8 grey or BGR of one decoded frame; colour spaces are already RGB or grey here."""
        kind = self._label
        if kind == "PALETTE COLOR":
            frame = self._coloured(frame, pixels)
        elif frame.dtype != np.uint8 or (frame.ndim == 2 and self.bits < 8):
            frame = self._windowed(frame)
        if kind == "MONOCHROME1":
            frame = 255 - frame
        if frame.ndim == 3 and frame.shape[2] >= 3:
            return np.ascontiguousarray(frame[:, :, 2::-1])
        return np.ascontiguousarray(frame.reshape(frame.shape[:2]))

    def _coloured(self, frame: np.ndarray, pixels: Any) -> np.ndarray:
        """Palette indices to uint8 RGB. Some files keep 8-bit colours in the table's 16-bit words, some in the upper half."""
        if self._deep_table is None:
            entries = int(self._dataset.RedPaletteColorLookupTableDescriptor[0]) or 1 << 16
            every = pixels.apply_color_lut(np.arange(entries, dtype=np.uint16)[None], self._dataset)
            self._deep_table = int(every.max()) > 255
        frame = pixels.apply_color_lut(frame, self._dataset)
        return (frame >> 8 if self._deep_table else frame).astype(np.uint8)

    def _windowed(self, frame: np.ndarray) -> np.ndarray:
        """More than 8 bits to 8: by the header's window, else by the bits that are said to be used; one rule for all frames."""
        dataset = self._dataset
        centre, width = (dataset.get(name) for name in ("WindowCenter", "WindowWidth"))
        centre, width = (value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value for value in (centre, width))
        # Slope and intercept bring stored numbers to those the window is given in (PS3.3 C.11.1).
        slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
        bits, signed = int(dataset.get("BitsStored") or 16), int(dataset.get("PixelRepresentation") or 0)
        if centre is not None and width is not None and float(width) > 1:
            low, high = ((float(centre) + side * float(width) / 2 - intercept) / slope for side in (-1, 1))
            rule = "the header's window"
        else:
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            rule = "the range of the stored bits"
        low, high = min(low, high), max(low, high)
        note = f"{bits} bits a pixel: brought to 8 by {rule}"
        if note not in self.notes:
            self.notes.append(note)
        return np.clip((frame.astype(np.float32) - low) * (255 / max(high - low, 1e-6)) + 0.5, 0, 255).astype(np.uint8)

    def grab(self) -> bool:
        """Decode the next frame; False at the end."""
        tick()
        with _named(self._shown, "a frame cannot be decoded"):
            self._frame = next(self._source, None)
        return self._frame is not None

    def retrieve(self) -> np.ndarray:
        """The frame `grab` moved to."""
        if self._frame is None:
            raise DataError(f"{self._shown}: no frame was read")
        return self._frame

    def close(self) -> None:
        """Forget the decoder."""
        self._source, self._frame = iter(()), None


def stream_header(path: Path, shown: str) -> tuple[float | None, str, list[Region]]:
    """(frames per second, its tag, regions) that the header around a video stream states."""
    with _named(shown, "the DICOM header cannot be read"):
        dataset = _header(path, _TAGS)
        return *frame_rate(dataset), _regions(dataset, int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0))


@contextmanager
def stream_of(path: Path, shown: str) -> Iterator[Path | None]:
    """The video stream inside a DICOM file of a video transfer syntax, under a name to open it by inside the block; None for others.

    Pictures of a patient must not lie about: the copy has no name of its own where the system has /dev/fd, so that it is gone
    with this process however that ends. Elsewhere it is a file of this user alone, deleted at the end of the block.

    Raises:
        OSError: naming the temporary folder, where that is full.
    """
    fragments = _fragments(path, shown)
    if fragments is None:
        yield None
        return
    nameless = os.path.isdir("/dev/fd")
    out = tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile(prefix="sonoscope-", suffix=".stream", delete=False)
    try:
        _copy(fragments, out, shown)
        if not nameless:
            out.close()
        yield Path(f"/dev/fd/{out.fileno()}" if nameless else out.name)
    finally:
        out.close()
        if not nameless:
            Path(out.name).unlink()


def _copy(fragments: Iterator[bytes], out: IO[bytes], shown: str) -> None:
    try:
        with _named(shown, "the video inside the DICOM file cannot be read"):
            for fragment in fragments:
                out.write(fragment)
            out.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None


def _fragments(path: Path, shown: str) -> Iterator[bytes] | None:
    """The pieces of the video stream in a DICOM file; None where there is none."""
    with _named(shown, "the video inside the DICOM file cannot be read"):
        dataset = _header(path, ["Rows"])
        uid = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
        if uid is None or not _VIDEO.fullmatch(uid):
            return None
        whole = _pydicom("pydicom").dcmread(path, specific_tags=["PixelData"], force=True)
        fragments = _pydicom("pydicom.encaps").generate_fragments(whole.PixelData)
        next(fragments)  # the basic offset table
        return fragments
