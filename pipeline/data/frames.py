"""Frames of many videos at working size, decoded once into memory when they fit, else when asked for.

Everything downstream (pretraining, fine-tuning, monitors) reads pixels through `FrameCache`; only this module knows
whether they come from memory or from the frame store.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.data.manifest import VideoRow
from pipeline.data.transforms import resize_frame

if TYPE_CHECKING:
    from pipeline.data.store import FrameStore

__all__ = ["FrameCache", "VideoRef", "gather_videos"]


@dataclass(frozen=True)
class VideoRef:
    """One video of one store."""

    store: FrameStore
    row: VideoRow

    @property
    def video(self) -> str:
        """Video id, 16 hex digits."""
        return self.row.video

    @property
    def number(self) -> int:
        """The id as a non-negative int64: the same on every machine and process."""
        return int(self.row.video[:15], 16)


def gather_videos(stores: Sequence[FrameStore], wanted: Sequence[str] | None = None) -> list[VideoRef]:
    """Videos of several stores in order of id; a video found in two stores is taken once. `wanted`: only these ids."""
    keep = None if wanted is None else set(wanted)
    found: dict[str, VideoRef] = {}
    for store in stores:
        for row in store.manifest.rows:
            if keep is None or row.video in keep:
                found.setdefault(row.video, VideoRef(store, row))
    return [found[video] for video in sorted(found)]


class FrameCache:
    """uint8 frames by (video number in the list, frame number).

    Args:
        videos: what can be asked for. size: short side (or both sides for mode `square`) of the returned frames in pixels.
        budget_mb: decoded frames are held in memory if all of them fit, else every request decodes.
        threads: decoding threads while filling; OpenCV releases the GIL.
    """

    def __init__(self, videos: Sequence[VideoRef], size: int, *, mode: str = "short_side", budget_mb: int = 4096, threads: int = 2) -> None:
        self.videos, self.size, self.mode = list(videos), size, mode
        self.channels = 3 if any(ref.row.channels == 3 for ref in self.videos) else 1
        self.cached = sum(self._bytes(ref.row) for ref in self.videos) <= budget_mb * 2**20
        self._held: list[list[np.ndarray]] = []
        if self.cached:
            with ThreadPoolExecutor(max(1, threads)) as pool:
                self._held = list(pool.map(self._decode_all, range(len(self.videos))))

    def _bytes(self, row: VideoRow) -> int:
        scale = self.size / max(1, min(row.stored_width, row.stored_height))
        wide = 1.0 if self.mode == "square" else max(row.stored_width, row.stored_height) * scale / self.size
        return int(row.frames * self.size * self.size * wide * self.channels)

    def _prepare(self, frame: np.ndarray) -> np.ndarray:
        if self.channels == 3 and frame.ndim == 2:
            frame = cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB)
        return resize_frame(frame, self.size, self.mode)

    def _decode_all(self, index: int) -> list[np.ndarray]:
        ref = self.videos[index]
        return [self._prepare(frame) for frame in ref.store.frames(ref.video, range(ref.row.frames))]

    def __len__(self) -> int:
        return len(self.videos)

    def num_frames(self, index: int) -> int:
        """Stored frames of a video."""
        return self.videos[index].row.frames

    def frame(self, index: int, number: int) -> np.ndarray:
        """One frame at working size: uint8 [H, W] or [H, W, 3]. Do not write into it."""
        if self.cached:
            return self._held[index][number]
        ref = self.videos[index]
        return self._prepare(ref.store.frame(ref.video, number))

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Trailing shape of a view: () for grey, (3,) for colour."""
        return (3,) if self.channels == 3 else ()
