"""The frame store: deterministic tars that plain tar reads, and clear errors for everything missing or cut off."""

from __future__ import annotations

import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data import store as store_module
from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.store import FrameStore, write_video
from pipeline.errors import DataError

ROW = VideoRow(
    video="0" * 16, source="main", path="a.mp4", sha256="0" * 64, patient="", label="", kind="video", frames=1,
    frames_decoded=1, frames_claimed=1, fps=10.0, fps_source="container", width=40, height=30, stored_width=40,
    stored_height=30, channels=1, bytes=1,
)


def jpegs(count: int, seed: int, channels: int = 1) -> list[bytes]:
    """Noise frames of 30 x 40 as JPEG."""
    rng = np.random.default_rng(seed)
    shape = (30, 40) if channels == 1 else (30, 40, channels)
    return [cv2.imencode(".jpg", rng.integers(0, 255, shape, np.uint8))[1].tobytes() for _ in range(count)]


def make(folder: Path, counts: dict[str, int], channels: int = 1) -> FrameStore:
    """A store whose video ids are given by their first letters; frames are seeded by that text."""
    rows = []
    for place, (name, count) in enumerate(counts.items()):
        video = name.ljust(16, "0")
        write_video(folder, video, jpegs(count, int(name, 16), channels))
        size = (folder / f"{video}.tar").stat().st_size
        rows.append(replace(ROW, video=video, path=f"{place}.mp4", frames=count, bytes=size, channels=channels))
    Manifest(rows).write(folder / "manifest.csv")
    return FrameStore(folder)


def test_frame__equals_the_jpeg(tmp_path: Path) -> None:
    store = make(tmp_path, {"a": 5, "b": 3})
    for index, raw in enumerate(jpegs(5, 0xA)):
        expected = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_UNCHANGED)
        frame = store.frame("a".ljust(16, "0"), index)
        assert frame.dtype == np.uint8 and frame.shape == (30, 40)
        np.testing.assert_array_equal(frame, expected)
    several = store.frames("a".ljust(16, "0"), [4, 0, np.int64(4)])
    np.testing.assert_array_equal(several[0], several[2])
    store.close()
    assert store.frame("b".ljust(16, "0"), 2).shape == (30, 40), "a closed store opens again"


def test_frame__color_is_rgb(tmp_path: Path) -> None:
    blue = np.zeros((16, 16, 3), np.uint8)
    blue[..., 0] = 255  # OpenCV's order
    write_video(tmp_path, "c" * 16, [cv2.imencode(".jpg", blue)[1].tobytes()])
    size = (tmp_path / f"{'c' * 16}.tar").stat().st_size
    Manifest([replace(ROW, video="c" * 16, bytes=size, channels=3)]).write(tmp_path / "manifest.csv")
    frame = FrameStore(tmp_path).frame("c" * 16, 0)
    assert frame.shape == (16, 16, 3) and frame[8, 8, 2] > 200 and frame[8, 8, 0] < 50


def test_write__same_frames_give_same_bytes_and_tar_reads_them(tmp_path: Path) -> None:
    raw = jpegs(3, 1)
    assert write_video(tmp_path / "x", "d" * 16, raw) == write_video(tmp_path / "y", "d" * 16, iter(raw)) == 3
    for suffix in (".tar", ".idx.npy"):
        one, two = (tmp_path / name / f"{'d' * 16}{suffix}" for name in "xy")
        assert one.read_bytes() == two.read_bytes()
    with tarfile.open(tmp_path / "x" / f"{'d' * 16}.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == ["00000.jpg", "00001.jpg", "00002.jpg"]
        owners = {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members}
        assert owners == {(0, 0, 0, "", "")}
        assert [tar.extractfile(member).read() for member in members] == raw
        index = np.load(tmp_path / "x" / f"{'d' * 16}.idx.npy")
        assert index.dtype == np.int64 and index.tolist() == [[member.offset_data, member.size] for member in members]


def test_write__failure_leaves_nothing(tmp_path: Path) -> None:
    def breaks() -> Iterator[bytes]:
        yield jpegs(1, 0)[0]
        raise DataError("a.mp4: decoding failed")

    with pytest.raises(DataError, match="decoding failed"):
        write_video(tmp_path, "e" * 16, breaks())
    with pytest.raises(DataError, match="no frames"):
        write_video(tmp_path, "e" * 16, [])
    with pytest.raises(DataError, match="expected hex"):
        write_video(tmp_path, "../e", jpegs(1, 0))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("index", [-1, 5, 10**9])
def test_frame__index_outside(tmp_path: Path, index: int) -> None:
    with pytest.raises(DataError, match="has frames 0 to 4"):
        make(tmp_path, {"a": 5}).frame("a".ljust(16, "0"), index)


def test_frame__unknown_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no video 'f+'"):
        make(tmp_path, {"a": 1}).frame("f" * 16, 0)


@pytest.mark.parametrize(
    "damage", ["tar missing", "index missing", "tar cut", "tar empty", "index cut", "index of another video"]
)
def test_frame__damaged_store(tmp_path: Path, damage: str) -> None:
    store = make(tmp_path, {"a": 5, "b": 3})
    tar, index = tmp_path / f"{'a'.ljust(16, '0')}.tar", tmp_path / f"{'a'.ljust(16, '0')}.idx.npy"
    path = tar if damage.startswith("tar") else index
    if damage.endswith("missing"):
        path.unlink()
    elif damage == "index of another video":
        index.write_bytes((tmp_path / f"{'b'.ljust(16, '0')}.idx.npy").read_bytes())
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[: 0 if damage.endswith("empty") else len(raw) // 2])
    with pytest.raises(DataError, match=r"(missing|cannot be read|cut off or foreign|the manifest says)"):
        store.frame("a".ljust(16, "0"), 0)


def test_frame__index_that_points_outside_or_is_a_pickle(tmp_path: Path) -> None:
    store = make(tmp_path, {"a": 1})
    index = tmp_path / f"{'a'.ljust(16, '0')}.idx.npy"
    np.save(index, np.array([[2**62, 2**62]]))
    with pytest.raises(DataError, match="cut off or foreign"):
        store.frame("a".ljust(16, "0"), 0)
    np.save(index, np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        store.frame("a".ljust(16, "0"), 0)


def test_store__threads_and_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_OPEN_FILES", 2)
    names = [f"{value:x}" for value in range(1, 7)]
    store = make(tmp_path, {name: 4 for name in names})
    expected = {(name, index): store.frame(name.ljust(16, "0"), index) for name in names for index in range(4)}
    wrong: list[tuple[str, int]] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            name, index = names[rng.integers(6)], int(rng.integers(4))
            if not np.array_equal(store.frame(name.ljust(16, "0"), index), expected[name, index]):
                wrong.append((name, index))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(store._opened) <= 2


def test_store__travels_to_another_process(tmp_path: Path) -> None:
    store = make(tmp_path, {"a": 2})
    before = store.frame("a".ljust(16, "0"), 1)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).frame("a".ljust(16, "0"), 1), before)
