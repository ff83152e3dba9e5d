"""Small DICOM files made on the spot: any transfer syntax, colour space and frame-rate tag, with a name in every header."""

from __future__ import annotations

import datetime
import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import sample_media as sample
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGBaseline8Bit, UltrasoundMultiFrameImageStorage, generate_uid

SECRETS = ("Doe", "Jane", "HOSP-4711", "19530421", "Mercy General", "Dr Strange", "ACC-99")
"""What must never be found outside the file itself."""


def cine(frames: int = 6, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """uint8 [T, H, W, 3] of numbered frames (`sample_media.picture`)."""
    return np.stack([sample.picture(index, size) for index in range(frames)])


def header(**changes: Any) -> Dataset:
    """A header full of identifying values."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.SOPClassUID = UltrasoundMultiFrameImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Doe^Jane", "HOSP-4711", "19530421"
    dataset.InstitutionName, dataset.ReferringPhysicianName, dataset.AccessionNumber = "Mercy General", "Dr Strange", "ACC-99"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.3680043.77.1", generate_uid()
    dataset.StudyDate, dataset.Modality = datetime.date(2020, 1, 2).strftime("%Y%m%d"), "US"
    for name, value in changes.items():
        setattr(dataset, name, value)
    return dataset


def write(path: Path, frames: np.ndarray | None = None, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **changes: Any) -> Path:
    """Frames [T, H, W] (grey) or [T, H, W, 3] (RGB) as a DICOM file of a transfer syntax pydicom can write."""
    frames = cine() if frames is None else frames
    dataset = header(**{"FrameTime": "40", **changes})
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.NumberOfFrames = len(frames)
    dataset.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    dataset.setdefault("PhotometricInterpretation", "RGB" if frames.ndim == 4 else "MONOCHROME2")
    if frames.ndim == 4:
        dataset.PlanarConfiguration = 0
    bits = 8 * frames.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits, bits - 1, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = pydicom.uid.UID(syntax)
    little = uid != pydicom.uid.ExplicitVRBigEndian
    if uid == JPEGBaseline8Bit:
        dataset.PixelData = encapsulate([_jpeg(frame) for frame in frames])
        dataset["PixelData"].VR = "OB"
        dataset.PhotometricInterpretation = "YBR_FULL_422" if frames.ndim == 4 else "MONOCHROME2"
    else:
        dataset.PixelData = frames.tobytes()
        dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    if uid.is_encapsulated and uid != JPEGBaseline8Bit:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.compress(uid)
    dataset.file_meta.TransferSyntaxUID = uid
    dataset.save_as(path, enforce_file_format=True, little_endian=little, implicit_vr=uid == pydicom.uid.ImplicitVRLittleEndian)
    return path


def _jpeg(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=95, subsampling=1)
    return out.getvalue()


def codestream(frame: np.ndarray, *, rgb: bool = False, halved: bool = False, names: bytes = b"\1\2\3", adobe: int | None = None) -> bytes:
    """A JPEG picture without JFIF and Adobe marks. rgb: stored as that. names: of its components. adobe: a mark of this transform."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=95, subsampling=1 if halved else 0, keep_rgb=rgb)
    raw = bytearray(out.getvalue())
    while raw[3] in (0xE0, 0xEE):
        del raw[2 : 4 + int.from_bytes(raw[4:6], "big")]
    size, scan = raw.index(b"\xff\xc0") + 10, raw.index(b"\xff\xda") + 5
    for index, name in enumerate(names):
        raw[size + 3 * index] = raw[scan + 2 * index] = name
    return bytes(raw[:2] + (b"" if adobe is None else b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00" + bytes([adobe])) + raw[2:])


def write_codestreams(
    path: Path, codestreams: list[bytes], label: str = "RGB", claimed: int | None = None, syntax: str = JPEGBaseline8Bit, *, table: bool = True, **changes: Any
) -> Path:
    """Compressed pictures of 64 x 48 pixels as they are. claimed: number in the header; table: of where they begin."""
    dataset = header(Rows=48, Columns=64, SamplesPerPixel=3, BitsAllocated=8, BitsStored=8, HighBit=7, **{"FrameTime": "40", **changes})
    dataset.PixelRepresentation, dataset.PlanarConfiguration, dataset.PhotometricInterpretation = 0, 0, label
    dataset.NumberOfFrames = claimed
    dataset.PixelData = encapsulate(codestreams, has_bot=table)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True, little_endian=True, implicit_vr=False)
    return path


def write_halved(path: Path, frames: np.ndarray, syntax: str, claimed: int | None = None) -> Path:
    """Frames [T, H, W, 3] (YBR) as native YBR_FULL_422: Y1 Y2 Cb Cr, the colours of the first of each two pixels."""
    count, height, width, _ = frames.shape
    pixels = frames.reshape(count, -1, 3)
    pairs = np.stack([pixels[:, : height * width // 2 * 2 : 2, 0], pixels[:, 1::2, 0], *(pixels[:, : height * width // 2 * 2 : 2, c] for c in (1, 2))], axis=-1)
    raw = pairs.reshape(count, -1)
    if height * width % 2:
        raw = np.concatenate([raw, pixels[:, -1, :2]], axis=1)
    dataset = header(Rows=height, Columns=width, SamplesPerPixel=3, BitsAllocated=8, BitsStored=8, HighBit=7, FrameTime="40")
    dataset.PixelRepresentation, dataset.PlanarConfiguration, dataset.PhotometricInterpretation = 0, 0, "YBR_FULL_422"
    dataset.NumberOfFrames = claimed or count
    uid = pydicom.uid.UID(syntax)
    data, dataset.file_meta.TransferSyntaxUID = raw.tobytes(), uid
    big = not uid.is_little_endian  # in words, and so each two bytes change their places
    dataset.PixelData = np.frombuffer(data, np.uint16).byteswap().tobytes() if big else data
    dataset["PixelData"].VR = "OW" if big or uid.is_implicit_VR else "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True, little_endian=uid.is_little_endian, implicit_vr=uid.is_implicit_VR)
    return path


def write_stream(path: Path, video: Path, **changes: Any) -> Path:
    """A video file wrapped as MPEG-4 DICOM."""
    dataset = header(Rows=48, Columns=64, NumberOfFrames=6, SamplesPerPixel=3, BitsAllocated=8, BitsStored=8, HighBit=7, **changes)
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = 0, "YBR_PARTIAL_420"
    dataset.PixelData = encapsulate([video.read_bytes()])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    dataset.save_as(path, enforce_file_format=True, little_endian=True, implicit_vr=False)
    return path


def region(left: int, top: int, right: int, bottom: int, spatial: int = 1, data: int = 1) -> Sequence:
    """One calibrated region, as a sequence of one item."""
    item = Dataset()
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    item.RegionSpatialFormat, item.RegionDataType = spatial, data
    return Sequence([item])
