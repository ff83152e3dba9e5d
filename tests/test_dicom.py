"""DICOM: every transfer syntax gives the same frames, rates name their tag, and nobody's name leaves the file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason='needs pip install "sonoscope[dicom]"')

import sample_dicom as sample  # noqa: E402
import sample_media  # noqa: E402
from pydicom import uid  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

from pipeline.config import Config  # noqa: E402
from pipeline.data import dicom  # noqa: E402
from pipeline.data.extract import Task, extract_one, extract_source  # noqa: E402
from pipeline.data.manifest import Manifest, pseudonym  # noqa: E402
from pipeline.data.video import MediaReader, find_media  # noqa: E402
from pipeline.errors import DataError  # noqa: E402
from pipeline.parameters import DataParams, ExtractParams, MaskParams  # noqa: E402

SYNTAXES = {
    "implicit": uid.ImplicitVRLittleEndian, "explicit": uid.ExplicitVRLittleEndian, "big_endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian, "jpeg": uid.JPEGBaseline8Bit, "jpeg_ls": uid.JPEGLSLossless,
    "jpeg2000": uid.JPEG2000Lossless, "rle": uid.RLELossless,
}


def frames_of(path: Path) -> list[np.ndarray]:
    reader = dicom.DicomFrames(path, path.name, 10**7)
    found = []
    while reader.grab():
        found.append(reader.retrieve().copy())
    return found


def read(path: Path, **params: object) -> tuple[MediaReader, list[bytes]]:
    (item,) = find_media(path.parent).media
    reader = MediaReader(item, ExtractParams(short_side=48, **params))
    return reader, list(reader.jpegs())


@pytest.mark.parametrize("colour", [True, False], ids=["rgb", "grey"])
@pytest.mark.parametrize("name", SYNTAXES)
def test_frames__equal_in_every_transfer_syntax(name: str, colour: bool, tmp_path: Path) -> None:
    """Lossless ones exactly, JPEG nearly; colour comes out as BGR, with red where red was (not the chroma of YBR)."""
    source = sample.cine()
    source[..., 0] = np.minimum(source[..., 0].astype(int) + 60, 255).astype(np.uint8)
    source = source if colour else np.ascontiguousarray(source[..., 1])
    got = frames_of(sample.write(tmp_path / "a.dcm", source, SYNTAXES[name]))
    want = source[..., ::-1] if colour else source
    assert len(got) == len(source)
    # JPEG halves the chroma's resolution, so edges of colour differ; the flat parts must not.
    assert np.median(np.abs(np.stack(got).astype(int) - want)) <= (2 if name == "jpeg" else 0)
    assert np.abs(np.stack(got).astype(int) - want).max() <= (60 if name == "jpeg" else 0)


def test_frames__real_files(shared: Path) -> None:
    """Palette colours, 16-bit palettes, JPEG lossless, JPEG 2000, a cine; the three spellings of one file are equal."""
    folder = shared / "data/extra/dicom"
    if not folder.is_dir():
        pytest.skip("the shared folder has no data/extra")
    one = frames_of(folder / "OBXXXX1A_2frame.dcm")
    for other in ("OBXXXX1A_rle_2frame.dcm", "OBXXXX1A_expb_2frame.dcm"):
        assert np.array_equal(one, frames_of(folder / other)), other
    corner = one[0][:8, 200:400].reshape(-1, 3).mean(0)
    assert corner[0] > 1.5 * corner[2], "the title bar is blue"
    assert len(frames_of(folder / "color3d_jpeg_baseline.dcm")) == 120
    assert frames_of(folder / "JPGLosslessP14SV1_1s_1f_8b.dcm")[0].shape == (768, 1024)
    assert frames_of(folder / "gdcm-US-ALOKA-16.dcm")[0].std() > 10
    doppler = frames_of(folder / "US1_J2KR.dcm")[0].astype(int)
    assert (doppler[..., 2] - doppler[..., 0] > 80).sum() > 1000, "the flow is red and yellow"
    with pytest.raises(DataError, match="too_short.dcm: the pixel data are cut off"):
        frames_of(folder / "emri_small_jpeg_2k_lossless_too_short.dcm")


@pytest.mark.parametrize(
    ("tags", "fps", "source"),
    [
        ({"FrameTime": "40"}, 25.0, "FrameTime"),
        ({"FrameTime": None, "FrameTimeVector": [0, 50, 50, 50, 50, 50]}, 20.0, "FrameTimeVector"),
        ({"FrameTime": None, "CineRate": "30", "RecommendedDisplayFrameRate": "15"}, 30.0, "CineRate"),
        ({"FrameTime": "0", "RecommendedDisplayFrameRate": "15"}, 15.0, "RecommendedDisplayFrameRate"),
        ({"FrameTime": "0.0001"}, None, "none"),
        ({"FrameTime": None}, None, "none"),
    ],
)
def test_rate__first_believable_tag_is_named(tags: dict, fps: float | None, source: str, tmp_path: Path) -> None:
    reader, jpegs = read(sample.write(tmp_path / "a.dcm", **tags))
    assert (reader.facts.fps, reader.facts.fps_source, len(jpegs)) == (fps, source, 6)
    half, kept = read(tmp_path / "a.dcm", frames_per_second=12.5)
    assert len(kept) == (3 if fps == 25.0 else len(kept))
    assert half.facts.frames_decoded == 6


@pytest.mark.parametrize(("time", "used"), [(None, "the mean of FrameTimeVector"), ("40", "FrameTime")])
def test_rate__steps_of_different_length_are_noted_with_what_is_used(time: str | None, used: str, tmp_path: Path) -> None:
    reader, _ = read(sample.write(tmp_path / "a.dcm", FrameTime=time, FrameTimeVector=[0, 20, 80, 20, 80, 20]))
    assert f"variable frame rate: {used} is used" in reader.facts.warnings
    still, _ = read(sample.write(tmp_path / "a.dcm", sample.cine(1), FrameTime=time, FrameTimeVector=[0, 20, 80]))
    assert still.facts.warnings == [], "of one frame the steps say nothing"


def test_regions__clipped_to_the_picture_and_nonsense_dropped(tmp_path: Path) -> None:
    path = sample.write(tmp_path / "a.dcm", SequenceOfUltrasoundRegions=sample.region(10, 5, 500, 30, 1, 2))
    assert dicom.DicomFrames(path, "a", 10**7).regions == [dicom.Region(10, 5, 64, 31, 1, 2)]
    path = sample.write(tmp_path / "b.dcm", SequenceOfUltrasoundRegions=sample.region(70, 5, 90, 30))
    assert dicom.DicomFrames(path, "b", 10**7).regions == []


def test_deep_pixels__windowed_by_one_rule_for_all_frames(tmp_path: Path) -> None:
    deep = (np.arange(4 * 48 * 64).reshape(4, 48, 64) % 4096).astype(np.uint16)
    path = sample.write(tmp_path / "a.dcm", deep, WindowCenter="2048", WindowWidth="4096")
    first = frames_of(path)[0]
    assert first.dtype == np.uint8
    assert abs(int(first[10, 10]) - int(deep[0, 10, 10]) * 255 // 4096) <= 1
    reader = dicom.DicomFrames(path, "a", 10**7)
    reader.grab()
    assert any("16 bits a pixel: brought to 8 by the header's window" in note for note in reader.notes)
    assert reader.notes[0] in read(path)[0].facts.warnings, "found while decoding, and in the manifest all the same"


def test_inverted_grey__white_is_white(tmp_path: Path) -> None:
    frames = np.full((2, 48, 64), 10, np.uint8)
    path = sample.write(tmp_path / "a.dcm", frames, PhotometricInterpretation="MONOCHROME1")
    assert frames_of(path)[0][0, 0] == 245


def test_stream__video_syntaxes_are_decoded_as_video(tmp_path: Path) -> None:
    video = sample_media.write_video(tmp_path / "in.mp4", 6)
    (tmp_path / "dcm").mkdir()
    reader, jpegs = read(sample.write_stream(tmp_path / "dcm/a.dcm", video))
    assert len(jpegs) == 6
    assert (reader.facts.fps, reader.facts.fps_source) == (10.0, "container")
    assert reader.facts.warnings == []
    reader, _ = read(sample.write_stream(tmp_path / "dcm/a.dcm", video, FrameTime="20"))
    assert (reader.facts.fps, reader.facts.fps_source) == (50.0, "FrameTime")


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes, Path]:
    """A video wrapped as DICOM, its bytes, and the folder of temporary files."""
    video = sample_media.write_video(tmp_path / "in.mp4", 6)
    for name in ("dcm", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(dicom.tempfile, "tempdir", str(tmp_path / "tmp"))
    return sample.write_stream(tmp_path / "dcm/a.dcm", video), video.read_bytes(), tmp_path / "tmp"


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd here")
def test_stream__unpacked_without_a_name(wrapped: tuple[Path, bytes, Path]) -> None:
    """Whatever ends the process, nothing of the patient's video lies in the temporary folder."""
    path, video, folder = wrapped
    before = len(os.listdir("/dev/fd"))
    with dicom.stream_of(path, "a.dcm") as stream:
        assert stream is not None and os.listdir(folder) == []
        assert stream.read_bytes()[: len(video)] == video
        assert os.fstat(int(stream.name)).st_mode & 0o077 == 0
    assert len(os.listdir("/dev/fd")) == before
    assert len(read(path)[1]) == 6


def test_stream__elsewhere_a_private_file_that_is_deleted(wrapped: tuple[Path, bytes, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, folder = wrapped
    monkeypatch.setattr(dicom.os.path, "isdir", lambda _: False)
    with pytest.raises(KeyError), dicom.stream_of(path, "a.dcm") as stream:
        assert stream is not None and [stream] == list(folder.iterdir()) and stream.stat().st_mode & 0o077 == 0
        raise KeyError
    assert os.listdir(folder) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_stream__full_disk_is_not_the_fault_of_the_file(wrapped: tuple[Path, bytes, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, folder = wrapped
    monkeypatch.setattr(dicom.tempfile, "TemporaryFile", lambda: open("/dev/full", "wb"))
    (media,) = find_media(path.parent).media
    result = extract_one(Task(media, ExtractParams(), None, folder))
    assert result.reason == "" and result.fatal.startswith(f"{folder}: the disk is full ("), result
    assert os.listdir(folder) == []


def test_stream__regions_and_rate_of_the_header_around_it(tmp_path: Path) -> None:
    """In pixels of the picture, right and bottom exclusive, clipped; the rate with its tag; both reach the reader and the mask."""
    video = sample_media.write_video(tmp_path / "in.mp4", 6)
    (tmp_path / "dcm").mkdir()
    regions = Sequence([*sample.region(4, 2, 99, 39), *sample.region(0, 40, 63, 47, spatial=3), *sample.region(9, 9, 2, 2)])
    path = sample.write_stream(tmp_path / "dcm/a.dcm", video, FrameTime="20", SequenceOfUltrasoundRegions=regions)
    found = [dicom.Region(4, 2, 64, 40, 1, 1), dicom.Region(0, 40, 64, 48, 3, 1)]
    assert dicom.stream_header(path, "a.dcm") == (50.0, "FrameTime", found)
    reader, _ = read(path)
    opened = reader.open()
    assert (opened.regions, opened.fps, opened.fps_source) == (found, 50.0, "FrameTime")
    opened.close()
    reader, _ = read(path, mask=MaskParams(mode="sector"))
    assert reader.masker is not None and list(reader.masker._boxes) == [(4, 2, 64, 40)], "two-dimensional regions alone"
    path.write_bytes(b"no header" * 50)
    with pytest.raises(DataError, match="b.dcm: (not a DICOM file|the DICOM header cannot be read)"):
        dicom.stream_header(path, "b.dcm")


@pytest.mark.parametrize("claimed", [1, 3, 9])
def test_frames__those_that_are_there_whatever_the_header_claims(claimed: int, tmp_path: Path) -> None:
    path = sample.write(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames = claimed
    dataset.save_as(path)
    reader, jpegs = read(path)
    assert len(jpegs) == 6
    assert any(f"decoded 6 frames where the header claims {claimed}" in text for text in reader.facts.warnings)


def test_grey__rescaled_before_the_window_and_few_bits_stretched(tmp_path: Path) -> None:
    deep = np.full((2, 48, 64), 100, np.uint16)
    path = sample.write(tmp_path / "a.dcm", deep, RescaleSlope="2", RescaleIntercept="-100", WindowCenter="100", WindowWidth="200")
    assert abs(int(frames_of(path)[0][0, 0]) - 127) <= 1, "100 is 2 * 100 - 100 = 100, the middle of the window"
    path = sample.write(tmp_path / "b.dcm", np.full((2, 48, 64), 63, np.uint8))
    dataset = pydicom.dcmread(path)
    dataset.BitsStored, dataset.HighBit = 6, 5
    dataset.save_as(path)
    assert frames_of(path)[0][0, 0] == 255


@pytest.mark.parametrize("name", SYNTAXES)
def test_find__headers_are_not_parsed_while_walking(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where pydicom is missing: only processes with limits may read a foreign header, or unpack a deflated one."""
    sample.write(tmp_path / "a.dcm", None, SYNTAXES[name])
    sample.write(tmp_path / "b.dcm", sample.cine(1), SYNTAXES[name])
    monkeypatch.setattr(dicom, "_header", lambda *_: pytest.fail("parsed"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert [item.kind for item in find_media(tmp_path).media] == ["video", "video" if name == "deflated" else "image"]


def test_find__by_magic_word_whatever_the_name_and_no_table_of_contents(tmp_path: Path) -> None:
    sample.write(tmp_path / "IM_0001")
    sample.write(tmp_path / "1.2.840.99")
    sample.write(tmp_path / "DICOMDIR")
    sample.write(tmp_path / "still", sample.cine(1))
    assert [(item.path, item.kind) for item in find_media(tmp_path).media] == [
        ("1.2.840.99", "video"), ("IM_0001", "video"), ("still", "image"),
    ]


BARE = ("implicit", "explicit", "big_endian")


@pytest.mark.parametrize("meta", [True, False], ids=["meta", "bare"])
@pytest.mark.parametrize("name", SYNTAXES)
def test_find__without_preamble_and_extension(name: str, meta: bool, tmp_path: Path) -> None:
    """By the first elements; read like the whole file. Without transfer syntax only what is not compressed."""
    raw = sample.write(tmp_path / "whole/a.dcm", sample.cine(), SYNTAXES[name]).read_bytes()
    start = 132 if meta else 144 + pydicom.filereader.read_file_meta_info(tmp_path / "whole/a.dcm").FileMetaInformationGroupLength
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/IM.0001").write_bytes(raw[start:])
    if not meta and name == "deflated":
        assert find_media(tmp_path / "cut").media == [], "nothing tells it from any packed bytes"
        return
    (media,) = find_media(tmp_path / "cut").media
    assert media.kind == "video"
    if not meta and name not in BARE:
        with pytest.raises(DataError, match="IM.0001: the header does not say how the pixels are compressed"):
            read(media.location)
        return
    assert read(media.location)[1] == read(tmp_path / "whole/a.dcm")[1]


def test_find__foreign_files_are_no_dicom(tmp_path: Path) -> None:
    """Chance beginnings of other formats, random ones that start like the group included: at most one in thousands."""
    rng = np.random.default_rng(0)
    for number in range(300):
        head = b"\x08\x00" if number % 2 else b""
        (tmp_path / f"{number}.bin").write_bytes(head + rng.bytes(200))
    for number, text in enumerate((b"", b"\x08\x00", b"\x02\x00\x00\x00", b"\x08\x00\x05\x00CS", b"\x00\x08" * 99, b"\x08\x00\x00\x00" * 60, b"PK\x03\x04")):
        (tmp_path / f"text{number}").write_bytes(text)
    survey = find_media(tmp_path)
    assert survey.media == [] and "300 .bin" in survey.notes[0]


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tif"])
def test_still__named_dcm_is_read_by_its_content(ending: str, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(sample.cine(1)[0]).save(tmp_path / f"a.{ending}")
    (tmp_path / f"a.{ending}").rename(tmp_path / "a.dcm")
    (media,) = find_media(tmp_path).media
    assert media.kind == "image"
    reader, jpegs = read(media.location)
    assert len(jpegs) == 1 and reader.facts.warnings == ["named like DICOM, but a still image inside: read as that"]


@pytest.mark.parametrize("ending", ["mp4", "avi", "gif"])
def test_video__named_dcm_is_read_by_its_content(ending: str, tmp_path: Path) -> None:
    made = (sample_media.write_gif if ending == "gif" else sample_media.write_video)(tmp_path / f"a.{ending}", 6)
    (media,) = find_media(made.rename(tmp_path / "a.dcm").parent).media
    reader, jpegs = read(media.location)
    assert (media.kind, len(jpegs), reader.facts.fps_source) == ("video", 6, "container")
    assert reader.facts.warnings == ["named like DICOM, but a video inside: read as that"]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str = "k") -> Manifest:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(folder)
    config = Config(data=DataParams(source="in", pseudonym_key=key), extract=ExtractParams(short_side=32, workers=1))
    extract_source("main", config, Path("frames"), Path("report"))
    return Manifest.read(Path("frames/manifest.csv"))


def test_kind__follows_the_frames_not_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, claimed in (("absent", None), ("wrong", 1)):
        dataset = pydicom.dcmread(sample.write(tmp_path / f"in/{name}.dcm", sample.cine(4), StudyInstanceUID=f"1.2.{claimed or 2}"))
        dataset.NumberOfFrames = claimed
        dataset.save_as(tmp_path / f"in/{name}.dcm")
    sample.write(tmp_path / "in/still.dcm", sample.cine(1), StudyInstanceUID="1.2.3")
    rows = {row.path: (row.kind, row.frames) for row in run(tmp_path, monkeypatch).rows}
    assert rows == {"absent.dcm": ("video", 4), "wrong.dcm": ("video", 4), "still.dcm": ("image", 1)}


def test_identity__hashes_join_files_of_a_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.write(tmp_path / "in/1", sample.cine(2), StudyInstanceUID="1.2.1")
    sample.write(tmp_path / "in/2", sample.cine(3), StudyInstanceUID="1.2.2")
    sample.write(tmp_path / "in/3", sample.cine(4), StudyInstanceUID="1.2.2", PatientID="--")
    rows = {row.path: row for row in run(tmp_path, monkeypatch).rows}
    assert rows["1"].patient == rows["2"].patient == pseudonym("HOSP-4711", "k")
    assert rows["2"].study == rows["3"].study == pseudonym("1.2.2", "k", "S") != rows["1"].study
    assert rows["3"].patient == pseudonym("1.2.2", "k")
    assert "the study stands for the patient" in rows["3"].warnings
    again = {row.path: row for row in run(tmp_path, monkeypatch, "another key").rows}
    assert again["1"].patient == pseudonym("HOSP-4711", "another key"), "finished frames are reused, names are not"


@pytest.mark.parametrize(
    "name",
    [
        "", "0", "0000", "000-00-0000", "XXXX", "--", "?", "***", "anon", "ANON", "Anonymous", "ANONYMIZED", "anonymised", "anonymus", "Anonym", "anonimo",
        "De-Identified", "deidentified", "^Anonymous^", "Anonymous Patient", "UNKNOWN", "unknown name", "None", "N/A", "not available", "Test", "TEST PATIENT",
        "no id", "removed",
    ],
)
def test_identity__names_of_nobody(name: str, tmp_path: Path) -> None:
    assert dicom.read_identity(sample.write(tmp_path / "a.dcm", PatientID=name), "a.dcm").patient == ""


@pytest.mark.parametrize(
    "name",
    [
        "ANON0001", "anon_17", "Anonymized0042", "ANON-00012", "ANON-B", "deidentified_3", "TEST1", "PATIENT 12", "patient0", "unknown-2", "000123", "0x1F",
        "1", "9999", "Anona", "Testa", "NAN", "患者", "anonim" * 200 + "é",
    ],
)
def test_identity__a_digit_or_letter_of_its_own_makes_an_id(name: str, tmp_path: Path) -> None:
    """One patient with two studies was taken for two where an id began with `anon`."""
    path = sample.write(tmp_path / "a.dcm", SpecificCharacterSet="ISO_IR 192", PatientID=name)
    assert dicom.read_identity(path, "a.dcm").patient == name


def test_identity__an_empty_key_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    for number in (1, 2):
        sample.write(tmp_path / f"in/{number}", sample.cine(1 + number))
    run(tmp_path, monkeypatch)
    assert "pseudonym_key" not in capfd.readouterr().err
    run(tmp_path, monkeypatch, "")
    assert capfd.readouterr().err.count("note: data.pseudonym_key is empty: pseudonyms can be guessed by trying ids") == 1


def test_identity__a_table_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.write(tmp_path / "in/a.dcm")
    (tmp_path / "in/labels.csv").write_text("path,label,patient\na.dcm,sick,Anna\n", encoding="utf-8")
    (row,) = run(tmp_path, monkeypatch).rows
    assert (row.patient, row.label) == (pseudonym("Anna", "k"), "sick")


def test_privacy__no_header_value_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Neither in the store, the manifest, scratch results and reports nor in what is printed, damaged files included."""
    good = sample.write(tmp_path / "in/good.dcm")
    whole = good.read_bytes()
    (tmp_path / "in/cut.dcm").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/header.dcm").write_bytes(whole[:700])
    (tmp_path / "in/bad.dcm").write_bytes(whole.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00QQ"))
    sample.write(tmp_path / "in/syntax.dcm")
    rows = run(tmp_path, monkeypatch).rows
    assert "good.dcm" in [row.path for row in rows]
    printed = "".join(capfd.readouterr())
    for secret in sample.SECRETS:
        assert secret not in printed
        for path in tmp_path.rglob("*"):
            if path.is_file() and not path.is_relative_to(tmp_path / "in"):
                assert secret.encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Rows": 0}, "holds no picture"),
        ({"Rows": 60000, "Columns": 60000}, "more than extract.max_pixels"),
        ({"Rows": 480}, "the pixel data are cut off"),
    ],
)
def test_hostile__declared_sizes(changes: dict, message: str, tmp_path: Path) -> None:
    path = sample.write(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    for name, value in changes.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    with pytest.raises(DataError, match=message):
        list(MediaReader(find_media(tmp_path).media[0], ExtractParams()).jpegs())


def test_hostile__deflated_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample.write(tmp_path / "a.dcm", np.zeros((40, 200, 200), np.uint8), uid.DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 20_000
    assert len(frames_of(path)) == 40
    monkeypatch.setattr(dicom, "MAX_INFLATED", 1 << 20)
    with pytest.raises(DataError, match="a.dcm: unpacks to more than 1 MiB; refused"):
        frames_of(path)


def test_missing__package_is_named_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample.write(tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r'pydicom is not installed: pip install "sonoscope\[dicom\]"'):
        frames_of(path)


def test_not_dicom__whatever_the_extension_says(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"hello world" * 50)
    with pytest.raises(DataError, match="a.dcm: "):
        frames_of(tmp_path / "a.dcm")
