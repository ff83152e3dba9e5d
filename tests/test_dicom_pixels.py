"""DICOM pixels that are not what the header says: colours of JPEG pictures, halved native colours, numbers of frames."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason='needs pip install "sonoscope[dicom]"')

import sample_dicom as sample  # noqa: E402
from pydicom import uid  # noqa: E402

from pipeline.data.dicom import DicomFrames  # noqa: E402
from pipeline.data.dicom_pixels import codestream_colours, expand_422, likely_frames  # noqa: E402
from pipeline.data.inspect import Look, inspect_file  # noqa: E402
from pipeline.data.sniffing import sniff  # noqa: E402
from pipeline.data.video import Media, MediaReader, find_media  # noqa: E402
from pipeline.errors import DataError  # noqa: E402
from pipeline.parameters import ExtractParams  # noqa: E402


def coloured(frames: int = 3, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """uint8 [T, H, W, 3] RGB: flat patches of strong colours, brighter from frame to frame."""
    found = np.zeros((frames, size[1], size[0], 3), np.uint8)
    found[:, :, : size[0] // 2], found[:, :, size[0] // 2 :] = (200, 30, 30), (30, 60, 180)
    return found + (10 * np.arange(frames, dtype=np.uint8))[:, None, None, None]


def frames_of(path: Path) -> tuple[np.ndarray, DicomFrames]:
    """Frames as RGB [T, H, W, 3], and their reader."""
    reader, found = DicomFrames(path, path.name, 10**7), []
    while reader.grab():
        found.append(reader.retrieve()[..., ::-1].copy())
    return np.stack(found), reader


def read(path: Path, **params: object) -> MediaReader:
    (item,) = find_media(path.parent).media
    reader = MediaReader(item, ExtractParams(short_side=48, **params))
    list(reader.jpegs())
    return reader


@pytest.mark.parametrize(
    ("label", "stored", "said"),
    [
        ("RGB", {"halved": True}, "YBR"),
        ("RGB", {}, "YBR"),
        ("RGB", {"adobe": 1, "names": b"\0\1\2"}, "YBR"),
        ("RGB", {"halved": True, "names": b"\0\1\2"}, "YBR"),
        ("YBR_FULL_422", {"rgb": True, "adobe": 0}, "RGB"),
        ("YBR_FULL_422", {"rgb": True, "names": b"RGB"}, "RGB"),
        ("RGB", {"rgb": True, "names": b"\0\1\2"}, ""),
        ("RGB", {"rgb": True, "names": b"RGB"}, ""),
        ("YBR_FULL_422", {"names": b"\0\1\2"}, ""),
        ("YBR_FULL", {}, ""),
    ],
)
def test_jpeg__colours_as_stored_not_as_labelled(label: str, stored: dict, said: str, tmp_path: Path) -> None:
    """`said`: what the note of the manifest calls them; empty where the header is right, or the picture does not say."""
    source = coloured()
    path = sample.write_codestreams(tmp_path / "a.dcm", [sample.codestream(frame, **stored) for frame in source], label, 3)
    got, _ = frames_of(path)
    assert np.median(np.abs(got.astype(int) - source)) <= 3
    notes = [text for text in read(path).facts.warnings if "header says" in text]
    assert notes == ([f"the header says {label}, and the JPEG pictures are {said}: read as that"] if said else [])


def test_jpeg__stored_grey_is_the_true_grey(tmp_path: Path) -> None:
    """What goes into the store; white was once stored as grey 157, and black as 86."""
    source = np.zeros((2, 48, 64, 3), np.uint8)
    source[:, :, 32:] = 255
    path = sample.write_codestreams(tmp_path / "a.dcm", [sample.codestream(frame, halved=True) for frame in source], "RGB", 2)
    (item,) = find_media(tmp_path).media
    first = next(iter(MediaReader(item, ExtractParams(short_side=48)).jpegs()))
    grey = cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert grey[:, :28].max() < 5 and grey[:, 36:].min() > 250, path


def test_jpeg__colours_that_change_inside_are_refused(tmp_path: Path) -> None:
    pictures = [sample.codestream(coloured()[0], halved=True), sample.codestream(coloured()[1], rgb=True, adobe=0)]
    with pytest.raises(DataError, match="a.dcm: some frames are stored as RGB and others as YBR"):
        frames_of(sample.write_codestreams(tmp_path / "a.dcm", pictures, "RGB", 2))


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 99, b"\xff\xd8\xff\xe0\0\0" * 9, b"\xff\xd8\xff\xc0\0\5\10"])
def test_codestream__damaged_ones_say_nothing(raw: bytes) -> None:
    assert codestream_colours(raw) == ""


@pytest.mark.parametrize("size", [(64, 48), (63, 48), (63, 47)], ids=["even", "odd-width", "odd"])
@pytest.mark.parametrize("name", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"])
def test_halved__native_frames_of_every_number(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """pydicom looks for the second frame and all others at wrong places."""
    for count in (1, 2, 5):
        source = coloured(count, (size[0] // 2 * 2, size[1]))[:, :, : size[0]]
        stored = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]] for frame in source])
        got, reader = frames_of(sample.write_halved(tmp_path / f"{count}.dcm", stored, getattr(uid, name)))
        assert got.shape == source.shape and reader.still == (count == 1)
        # At a border between two colours a pair may lie on both sides.
        assert np.median(np.abs(got.astype(int) - source)) <= 2 and (np.abs(got.astype(int) - source) > 3).mean() < 0.03


def test_halved__one_frame_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample.write_halved(tmp_path / "a.dcm", coloured(40), uid.ExplicitVRLittleEndian)
    reader, sizes = DicomFrames(path, "a.dcm", 10**7), []
    real = np.frombuffer
    monkeypatch.setattr(np, "frombuffer", lambda raw, *rest: sizes.append(len(raw)) or real(raw, *rest))
    while reader.grab():
        pass
    assert sizes == [2 * 64 * 48] * 40


@pytest.mark.parametrize("count", [1, 3, 4])
def test_halved__label_of_pixels_that_are_whole_is_refused(count: int, tmp_path: Path) -> None:
    """Programs that decompress a picture and leave its label: nothing says what the colours are."""
    path = sample.write(tmp_path / "a.dcm", sample.cine(count), PhotometricInterpretation="YBR_FULL_422")
    with pytest.raises(DataError, match="a.dcm: the header says YBR_FULL_422, and the pixel data do not take two bytes a pixel"):
        frames_of(path)


def test_expand__pairs_share_their_colour() -> None:
    assert expand_422(bytes([1, 2, 8, 9, 3, 4, 6, 7]), 2, 2).tolist() == [[[1, 8, 9], [2, 8, 9]], [[3, 6, 7], [4, 6, 7]]]
    assert expand_422(bytes([1, 2, 8, 9, 3, 0]), 3, 1).tolist() == [[[1, 8, 9], [2, 8, 9], [3, 8, 9]]]


@pytest.mark.parametrize("claimed", [None, 0, 1, 5, 45])
@pytest.mark.parametrize("kind", ["jpeg", "jpeg without table", "rle", "rle without table", "native", "deflated"])
def test_number__counted_so_that_rate_and_sampling_stay(kind: str, claimed: int | None, tmp_path: Path) -> None:
    """A header that claimed one frame, or none, lost the frame rate, and with it `extract.frames_per_second`."""
    path, source, table = tmp_path / "a.dcm", coloured(30), "without" not in kind
    if kind.startswith("jpeg"):
        sample.write_codestreams(path, [sample.codestream(frame) for frame in source], "YBR_FULL", claimed, table=table)
    elif kind.startswith("rle"):
        packed = pydicom.dcmread(sample.write(path, source, uid.RLELossless))
        pictures = list(pydicom.encaps.generate_frames(packed.PixelData, number_of_frames=30))
        sample.write_codestreams(path, pictures, "RGB", claimed, uid.RLELossless, table=table)
    else:
        syntax = {"native": uid.ExplicitVRLittleEndian, "deflated": uid.DeflatedExplicitVRLittleEndian}[kind]
        dataset = pydicom.dcmread(sample.write(path, source, syntax))
        dataset.NumberOfFrames = claimed
        dataset.save_as(path)
    reader = read(path, frames_per_second=5)
    assert (reader.facts.frames_decoded, reader.facts.frames, reader.facts.fps) == (30, 6, 25.0)
    assert any(f"decoded 30 frames where the header claims {claimed or 1}" in text for text in reader.facts.warnings)
    report = inspect_file(Look(Media("a.dcm", sniff(path), path), False))
    assert (report.kind, report.frames, report.header.fps) == ("video", 30, 25.0)


def test_number__stills_have_no_rate_and_pieces_are_joined(tmp_path: Path) -> None:
    (frame,) = coloured(1)
    path = sample.write_codestreams(tmp_path / "a.dcm", [sample.codestream(frame)], "YBR_FULL", 1)
    facts = read(path, frames_per_second=5).facts
    assert (facts.fps, facts.fps_source, facts.frames, facts.warnings) == (None, "none", 1, [])
    whole = sample.codestream(frame)
    for pieces in (2, 3):
        data = pydicom.encaps.encapsulate([whole] * 4, fragments_per_frame=pieces, has_bot=False)
        assert likely_frames(pydicom.encaps, data, 1, split=True) == 4
        assert likely_frames(pydicom.encaps, data, 1, split=False) == 4 * pieces
    assert likely_frames(pydicom.encaps, pydicom.encaps.encapsulate([b"no picture"] * 3, has_bot=False), 7, split=True) == 7
