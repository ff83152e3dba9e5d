"""The frame store: one uncompressed tar of JPEG files a video, with an offset index beside it.

Few files, random access, and readable without this project: `tar xf` gives 00000.jpg, 00001.jpg and so on.
"""

from __future__ import annotations

import mmap
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.data.manifest import Manifest, VideoRow
from pipeline.errors import DataError

__all__ = ["FrameStore", "write_video"]

_BLOCK = 512
_OPEN_FILES = 128
"""Mapped tars kept open; every mapping holds a file descriptor, and the usual limit of a process is 1024."""
_NAME = re.compile(r"[0-9a-z-]+")


def write_video(folder: Path, video: str, jpegs: Iterable[bytes]) -> int:
    """Write `<video>.tar` and `<video>.idx.npy` (int64 [T, 2]: offset and length in bytes) into `folder`.

    The bytes depend on the frames alone (USTAR, time, user and group 0). Both files appear complete or not at all, and
    the tar comes last, so that a tar always has its index.

    Returns:
        The number of frames T.

    Raises:
        DataError: `jpegs` gave no frame; whatever `jpegs` raises passes through, and nothing is left behind.
    """
    if not _NAME.fullmatch(video):
        raise DataError(f"video id {video!r}: expected hex digits")
    folder.mkdir(parents=True, exist_ok=True)
    # The process number keeps two workers apart that happen to meet the same content under two names.
    part, index_part = folder / f".{video}.{os.getpid()}.tar.part", folder / f".{video}.{os.getpid()}.npy.part"
    entries: list[tuple[int, int]] = []
    try:
        with open(part, "wb") as out:
            for jpeg in jpegs:
                info = tarfile.TarInfo(f"{len(entries):05d}.jpg")
                info.size = len(jpeg)
                out.write(info.tobuf(tarfile.USTAR_FORMAT))
                entries.append((out.tell(), len(jpeg)))
                out.write(jpeg)
                out.write(bytes(-len(jpeg) % _BLOCK))
            out.write(bytes(2 * _BLOCK))
            out.write(bytes(-out.tell() % tarfile.RECORDSIZE))
        if not entries:
            raise DataError(f"{video}: no frames to store")
        with open(index_part, "wb") as out:
            np.save(out, np.asarray(entries, np.int64), allow_pickle=False)
        os.replace(index_part, folder / f"{video}.idx.npy")
        os.replace(part, folder / f"{video}.tar")
    finally:
        part.unlink(missing_ok=True)
        index_part.unlink(missing_ok=True)
    return len(entries)


class _Opened:
    """One mapped tar and its index. The mapping closes when the last array that views it is gone."""

    def __init__(self, folder: Path, row: VideoRow) -> None:
        tar, index = folder / f"{row.video}.tar", folder / f"{row.video}.idx.npy"
        try:
            with open(tar, "rb") as handle:
                self.data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self.index = np.load(index, allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: missing. Run the extract stage again (dvc repro extract).") from None
        except Exception as error:  # a damaged index fails in a dozen ways inside NumPy
            raise DataError(f"{tar}: cannot be read ({str(error)[:200] or type(error).__name__}). Delete it and run the extract stage again.") from None
        if not isinstance(self.index, np.ndarray) or self.index.dtype != np.int64 or self.index.shape != (row.frames, 2) or row.frames < 1:
            raise DataError(
                f"{index}: holds {self.index.dtype} {list(self.index.shape)}, the manifest says int64 [{row.frames}, 2]"
            )
        offsets, lengths = self.index[:, 0], self.index[:, 1]
        outside = offsets.min() < 0 or lengths.min() < 1 or (offsets > len(self.data) - lengths).any()
        if len(self.data) != row.bytes or outside:
            raise DataError(
                f"{tar}: {len(self.data)} bytes where the manifest says {row.bytes} (cut off or foreign). "
                f"Delete it and run the extract stage again."
            )


class FrameStore:
    """Random access to stored frames by video id and index; safe to share between threads and to send to processes."""

    def __init__(self, folder: Path) -> None:
        """Read `folder`/manifest.csv. DataError if it is missing or wrong; the tars are opened when first needed."""
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder / "manifest.csv")
        self._rows = {row.video: row for row in self.manifest.rows}
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, _Opened] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A mapping and a lock cannot travel to another process; both are made again there.
        return {**self.__dict__, "_lock": None, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._opened = threading.Lock(), OrderedDict()

    def _open(self, video: str) -> _Opened:
        with self._lock:
            opened = self._opened.get(video)
            if opened is None:
                if video not in self._rows:
                    raise DataError(f"{self.folder}: no video {video!r} in the manifest ({len(self._rows)} videos)")
                opened = self._opened[video] = _Opened(self.folder, self._rows[video])
                while len(self._opened) > _OPEN_FILES:
                    # Dropped, not closed: another thread may be decoding from it.
                    self._opened.popitem(last=False)
            else:
                self._opened.move_to_end(video)
            return opened

    def frame(self, video: str, index: int) -> np.ndarray:
        """One frame: uint8 [H, W] for a grey store, [H, W, 3] in RGB order otherwise.

        Raises:
            DataError: Unknown video, index outside 0 .. frames - 1, missing, cut off or damaged file.
        """
        opened = self._open(video)
        if not 0 <= index < len(opened.index):
            raise DataError(f"{self.folder}: video {video} has frames 0 to {len(opened.index) - 1}; asked for {index}")
        offset, length = (int(value) for value in opened.index[index])
        raw = np.frombuffer(opened.data, np.uint8, length, offset)
        grey = self._rows[video].channels == 1
        try:
            frame = cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR)
        except cv2.error:  # a size that OpenCV refuses
            frame = None
        if frame is None:
            raise DataError(f"{self.folder}: frame {index} of video {video} is damaged. Run the extract stage again.")
        return frame if grey else cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def frames(self, video: str, indices: Sequence[int]) -> list[np.ndarray]:
        """Several frames of one video, in the order asked for; see `frame`."""
        return [self.frame(video, int(index)) for index in indices]

    def mask(self, video: str) -> np.ndarray | None:
        """bool [H, W], what extraction kept of every frame of a video; None where nothing was cut. DataError: missing or damaged."""
        row = self._rows.get(video)
        if row is None or row.mask in ("", "kept") or row.mask_share == 1:
            return None
        path = self.folder / f"{video}.mask.png"
        raw = np.frombuffer(path.read_bytes(), np.uint8) if path.is_file() else np.zeros(0, np.uint8)
        mask = cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE) if len(raw) else None
        if mask is None or mask.shape != (row.stored_height, row.stored_width):
            raise DataError(f"{path}: missing, damaged or of another size. Run the extract stage again (dvc repro extract).")
        return mask > 127

    def close(self) -> None:
        """Forget all mappings; they close once no array uses them. The store can be used again afterwards."""
        with self._lock:
            self._opened.clear()
