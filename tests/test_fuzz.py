"""Damaged and hostile files: a thousand drawn cases for every reader, and by name what fuzzing has found."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pydicom = pytest.importorskip("pydicom", reason='needs pip install "sonoscope[dicom]"')

import fuzz_readers  # noqa: E402
import sample_dicom  # noqa: E402
import sample_media as sample  # noqa: E402

from pipeline.config import load_config  # noqa: E402
from pipeline.data import dicom  # noqa: E402
from pipeline.data.extract import Task, extract_one  # noqa: E402
from pipeline.data.labels import read_labelled_media  # noqa: E402
from pipeline.data.manifest import Manifest, VideoRow  # noqa: E402
from pipeline.data.store import FrameStore, write_video  # noqa: E402
from pipeline.data.video import MediaReader, find_media  # noqa: E402
from pipeline.errors import ConfigError, DataError  # noqa: E402
from pipeline.parameters import DataParams, ExtractParams  # noqa: E402

CASES = 1000


def test_fuzz__a_thousand_cases_for_every_reader() -> None:
    """No crash, hang or flood of memory; frames, or an error that names the file. More: `make fuzz`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # pytest's own folder is closed to others
        os.chmod(name, 0o777)
        outcomes = list(fuzz_readers.fuzz(list(range(CASES)), 0, 2, Path(name)))
    wrong = [f"case {item.case} ({item.what}): {item.detail[:1000]}" for item in outcomes if item.end == "wrong"]
    assert not wrong, "\n".join(wrong)
    ends = Counter(item.end for item in outcomes)
    assert sorted(item.case for item in outcomes) == list(range(CASES))
    assert ends["read"] > 50 and ends["refused"] > 500 and ends["lost"] < 10, ends


def test_fuzz__notices_a_bad_reader(tmp_path: Path) -> None:
    """The judge itself: messages without a name, with a secret, or too long are complained of."""
    assert fuzz_readers._complaint("a.mp4: damaged", ["a.mp4"], []) == ""
    for text in ("damaged", "a.mp4: patient HOSP-4711", "a.mp4: Traceback (most recent call last)", "a.mp4: \x1b[2J", "a.mp4: " + "x" * 9000):
        assert fuzz_readers._complaint(text, ["a.mp4"], []), text


# --- what fuzzing has found, by name ---------------------------------------------------------------------------------


def bounded(seconds: int, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code that might hang."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_find__pipes_and_devices_are_passed_over(tmp_path: Path) -> None:
    """Opening a pipe waits for a writer for ever, also where its name makes it a table or a frame of a folder."""
    sample.write_frame_folder(tmp_path / "clip", 3)
    for name in ("a.mp4", "b.png", "labels.csv", "scan.dcm", "IM_0001", "clip/00009.jpg"):
        os.mkfifo(tmp_path / name)
    script = """
import sys
from pipeline.data.labels import read_labelled_media
from pipeline.data.video import content_hash
from pipeline.parameters import DataParams
found = read_labelled_media("main", DataParams(source=sys.argv[1]))
print([(item.path, item.kind, len(content_hash(item))) for item in found.media], found.notes[0])
"""
    done = bounded(60, script, tmp_path)
    assert done.stdout.startswith("[('clip', 'frames', 64)] 6 pipes, devices or sockets were skipped"), done.stderr


def test_find__links_in_circles_are_named(tmp_path: Path) -> None:
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    (tmp_path / "up").symlink_to("..")
    sample.write_image(tmp_path / "good.png")
    found = find_media(tmp_path)
    assert [item.path for item in found.media] == ["good.png", "self.mp4"]
    assert "too many levels" in extract_one(Task(found.media[1], ExtractParams(), None, tmp_path / "s")).reason.lower()


def test_find__deeper_than_a_path_may_be(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(50):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
    finally:
        os.chdir(here)
    sample.write_image(tmp_path / "good.png")
    found = find_media(tmp_path)
    assert [item.path for item in found.media] == ["good.png"] and "1 folders cannot be opened" in found.notes[0]
    shutil.rmtree(tmp_path / ("d" * 100), ignore_errors=True)


def test_find__closed_folders_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.write_image(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "closed").mkdir()
    real = os.scandir

    def refuse(path: os.PathLike[str] | str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_media(tmp_path / "in").notes == ["1 folders cannot be opened and were skipped: closed"]


def test_read__video_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """OpenCV crashes on such a name."""
    made = sample.write_video(tmp_path / "a.avi", 3)
    os.rename(made, os.fsencode(tmp_path) + b"/byte\xff.avi")
    (media,) = find_media(tmp_path).media
    assert media.path == "byte\\xff.avi"
    assert len(list(MediaReader(media, ExtractParams()).jpegs())) == 3


def test_dicom__damaged_stream_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken fragment length ended the copying half-way, and the temporary file of the patient's video stayed."""
    path = sample_dicom.write_stream(tmp_path / "a.dcm", sample.write_video(tmp_path / "a.mp4", 6))
    raw = path.read_bytes()
    place = raw.index(b"\xfe\xff\x00\xe0", raw.index(b"\xfe\xff\x00\xe0") + 4)
    path.write_bytes(raw[:place] + raw[place:].replace(b"\xfe\xff\xdd\xe0", b"\xfe\xff\x77\xe0"))
    monkeypatch.setattr(dicom.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(DataError, match="a.dcm: the video inside the DICOM file cannot be read"):
        with dicom.stream_of(path, "a.dcm"):
            pass
    assert os.listdir(tmp_path / "tmp") == []


def hostile_headers(folder: Path) -> list[Path]:
    """DICOM files whose headers cost the parser minutes and gigabytes; each takes at most 16 MB of disk."""
    good = sample_dicom.write(folder / "good.dcm").read_bytes()
    start, found = good[: good.index(b"\x08\x00\x16\x00")], []
    count, regions, empty = b"\x28\x00\x08\x00", b"\x18\x00\x11\x60SQ\0\0\xff\xff\xff\xff", b"\xfe\xff\x00\xe0\0\0\0\0"
    for name, raw, size in (
        ("zeros", start + count + b"UN\0\0\xff\xff\xff\xff", 4 << 20), ("sparse", start + count + b"OB\0\0\xf0\xff\xff\x7f", 1 << 31),
        ("items", start + regions + empty * (1 << 21), 0), ("meta", good[:132] + b"\x02\x00\x10\x00OB\0\0\xf0\xff\xff\x7f", 1 << 31),
        ("deep", start + (regions + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 50_000, 0),
    ):
        found.append(folder / f"{name}.dcm")
        found[-1].write_bytes(raw)
        os.truncate(found[-1], size or len(raw))
    return found


def test_find__hostile_dicom_headers_cost_nothing(tmp_path: Path) -> None:
    """They are listed in the main process, which has no limits: parsing these took minutes and 4 GB before any file was read."""
    hostile_headers(tmp_path)
    script = """
import resource, sys, time
from pathlib import Path
from pipeline.data.video import find_media
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
found = find_media(Path(sys.argv[1])).media
print([(item.path, item.kind) for item in found if item.kind == "video"], len(found), file=sys.stderr)
print(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = bounded(60, script, tmp_path)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 1 and kilobytes < 20_000, done.stdout
    assert done.stderr.strip() == "[('good.dcm', 'video')] 6"


def test_read__hostile_dicom_headers_end_by_the_limits(tmp_path: Path) -> None:
    """Refused with the file's name, or the process is ended, and the pool names the file."""
    files = hostile_headers(tmp_path)
    script = """
import sys
from pathlib import Path
from pipeline.data.limits import limit_process, watched
from pipeline.data.video import Media, MediaReader
from pipeline.errors import DataError
from pipeline.parameters import ExtractParams
limit_process(memory=1 << 29, stall_seconds=2)
try:
    with watched():
        list(MediaReader(Media("a.dcm", "video", Path(sys.argv[1])), ExtractParams()).jpegs())
except DataError as error:
    print(error)
"""
    for path in files:
        done = bounded(60, script, path)
        assert done.returncode == -signal.SIGALRM or (done.stdout.startswith("a.dcm: ") and "cannot be read" in done.stdout), (path.name, done)


def test_still__tiff_whose_second_page_is_damaged(tmp_path: Path) -> None:
    """Counting its pages raised a TypeError inside Pillow."""
    from PIL import Image

    pages = [Image.fromarray(sample.picture(index)) for index in range(2)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    raw = bytearray((tmp_path / "a.tiff").read_bytes())
    second = raw.rindex(b"\x00\x01\x04\x00\x01\x00\x00\x00")
    raw[second: second + 2] = b"\x77\x01"
    (tmp_path / "a.tiff").write_bytes(raw)
    (media,) = find_media(tmp_path).media
    with pytest.raises(DataError, match="^a.tiff: not an image"):
        list(MediaReader(media, ExtractParams()).jpegs())


def test_still__png_part_longer_than_the_file(tmp_path: Path) -> None:
    """OpenCV took 2 GiB for it."""
    raw = bytearray(sample.write_image(tmp_path / "a.png").read_bytes())
    place = raw.index(b"IDAT")
    raw[place - 4: place] = b"\x7f\xff\xff\xff"
    (tmp_path / "a.png").write_bytes(raw)
    (media,) = find_media(tmp_path).media
    with pytest.raises(DataError, match="^a.png: the image cannot be decoded"):
        list(MediaReader(media, ExtractParams()).jpegs())


def small_store(folder: Path) -> VideoRow:
    """A store of one grey video; returns its row."""
    import cv2

    jpegs = [cv2.imencode(".jpg", sample.picture(index, (40, 30))[..., 0])[1].tobytes() for index in range(3)]
    write_video(folder, "ab" * 8, jpegs)
    row = VideoRow(
        video="ab" * 8, source="main", path="a.mp4", sha256="ab" * 32, patient="", label="", kind="video", frames=3, frames_decoded=3,
        frames_claimed=3, fps=None, fps_source="none", width=40, height=30, stored_width=40, stored_height=30, channels=1,
        bytes=(folder / f"{'ab' * 8}.tar").stat().st_size,
    )
    Manifest([row]).write(folder / "manifest.csv")
    return row


@pytest.mark.parametrize("header", [b"{'descr': '<i8', 'fortran_order': (", b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999, 2), }", b"PK"])
def test_store__index_with_a_hostile_header(tmp_path: Path, header: bytes) -> None:
    """NumPy raised TokenError, MemoryError or BadZipFile."""
    row = small_store(tmp_path)
    index = tmp_path / f"{row.video}.idx.npy"
    body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header if header != b"PK" else b"PK\x03\x04 no archive"
    index.write_bytes(body)
    with pytest.raises(DataError, match=f"{row.video}.tar: cannot be read"):
        FrameStore(tmp_path).frame(row.video, 0)


def test_store__frame_that_declares_a_huge_picture(tmp_path: Path) -> None:
    """OpenCV raised its own error where it refuses a size."""
    row = small_store(tmp_path)
    tar = tmp_path / f"{row.video}.tar"
    raw = bytearray(tar.read_bytes())
    place = raw.index(b"\xff\xc0") + 5
    raw[place: place + 4] = b"\xff\xdc\xff\xdc"
    tar.write_bytes(raw)
    with pytest.raises(DataError, match="frame 0 of video .* is damaged"):
        FrameStore(tmp_path).frame(row.video, 0)


@pytest.mark.parametrize("cell", ["9" * 400, "1e999", "nan", "9" * 5000])
def test_manifest__numbers_beyond_all_bounds(tmp_path: Path, cell: str) -> None:
    small_store(tmp_path)
    path = tmp_path / "manifest.csv"
    path.write_text(path.read_text().replace(",40,30,", f",{cell},30,", 1))
    with pytest.raises(DataError, match="row 2, column width: found ") as caught:
        Manifest.read(path)
    assert len(str(caught.value)) < 4000


def test_params__aliases_that_stand_for_a_billion_words(tmp_path: Path) -> None:
    """Quoting the value in the message filled the memory."""
    lines = ["a0: &a0 [" + ", ".join("x" * 10) + "]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "params.yaml"
    path.write_text("\n".join([*lines, "data: {source: *a9}"]))
    with pytest.raises(ConfigError, match="11 problems") as caught:
        load_config(path)
    assert len(str(caught.value)) < 10_000


def test_errors__foreign_text_does_not_steer_the_terminal(tmp_path: Path) -> None:
    sample.write_image(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("path,label\n\x1b[2Jb.png,x\n")
    with pytest.raises(DataError) as caught:
        read_labelled_media("main", DataParams(source=str(tmp_path)))
    assert "\x1b" not in str(caught.value) and "\\x1b[2Jb.png" in str(caught.value)


# --- limits of a worker ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("waits", "ends"), [("[0.5] * 6", 0), ("[0.5, 60]", -signal.SIGALRM)])
def test_limits__a_file_without_progress_ends_its_process(waits: str, ends: int) -> None:
    """Slow with progress is well; a decoder that never comes back is ended, and the pool then finds its file."""
    script = f"""
import time
from pipeline.data.limits import limit_process, tick, watched
limit_process(stall_seconds=2)
time.sleep(3)
with watched():
    for wait in {waits}:
        tick()
        time.sleep(wait)
"""
    assert bounded(50, script).returncode == ends


def test_limits__memory_is_refused_not_taken() -> None:
    script = """
import numpy
from pipeline.data.limits import MEMORY, limit_process
limit_process()
print(len(numpy.ones(1 << 20, numpy.uint8)))
try:
    numpy.ones(MEMORY + (1 << 20), numpy.uint8)
except MemoryError:
    print("refused")
"""
    assert bounded(50, script).stdout.split() == ["1048576", "refused"]
