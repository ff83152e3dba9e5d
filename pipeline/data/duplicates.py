"""Recordings that occur twice under different bytes: re-encoded, rescaled or cropped copies of one clip.

Two checks must agree. A 64-bit perceptual hash of the mean frame proposes pairs. Then the detail of one clip is
searched in the other over position and scale, and must correlate, and so must what *moves* there: two views of one
patient share anatomy and one machine's clips share their frame, but only a copy shares the motion of its speckle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.data.store import FrameStore

__all__ = ["NearDuplicate", "VideoPrint", "find_near_duplicates", "print_video", "read_prints"]

FRAMES = 9
SIDE = 64
COARSE_SIDE = 48
MAX_HASH_DISTANCE = 24
"""Of 64 bits. Unrelated clips lie near 32; a copy cropped by 18 % was measured at 14."""
NEAREST = 20
"""Pairs compared in full, per video: keeps the cost linear in the number of videos."""
COARSE_SIMILARITY = 0.6
MIN_SIMILARITY = 0.7
MIN_MOTION = 0.65
"""On 96 lung clips: the two known copies reach 0.93 and 0.77, the best of 6 000 other pairs 0.56."""
MIN_STILL_SIMILARITY = 0.9
MAX_STILL_HASH_DISTANCE = 10
"""Stills have no motion to check; different stills of one machine were measured up to 0.69."""
MOVING = 1.0
"""Root mean square of the change over time, in grey levels, below which a clip counts as still."""
WINDOW = 0.7
SCALES = (0.8, 0.86, 0.93, 1.0, 1.07, 1.15, 1.25)
FINE_SCALES = (0.95, 0.965, 0.98, 1.0, 1.02, 1.035, 1.05)


@dataclass(frozen=True)
class VideoPrint:
    """What is compared: `hash` bool [64]; `frames` uint8 [9, 64, 64], or [1, 64, 64] for a still or unmoving clip."""

    video: str
    hash: np.ndarray
    frames: np.ndarray


@dataclass(frozen=True)
class NearDuplicate:
    """A pair of video ids (first < second) and what was measured; `motion` is None for stills."""

    first: str
    second: str
    hash_distance: int
    similarity: float
    motion: float | None


def _grey(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if frame.ndim == 3 else frame


def _trim(frames: np.ndarray) -> np.ndarray:
    """Cut black margins, which copies often lose. [T, H, W] to [T, h, w]; left alone when hardly anything remains."""
    mean = frames.mean(0)
    rows, columns = np.flatnonzero(mean.mean(1) > 4), np.flatnonzero(mean.mean(0) > 4)
    if len(rows) <= 16 or len(columns) <= 16:
        return frames
    return frames[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resize(frame: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA)


def print_video(video: str, frames: Sequence[np.ndarray]) -> VideoPrint:
    """The print of one video from evenly spaced frames, uint8 [H, W] or RGB [H, W, 3] of one size.

    The hash is the sign of the 8x8 lowest DCT coefficients of the 32x32 mean frame against their median (pHash).
    """
    trimmed = _trim(np.stack([_grey(frame) for frame in frames]).astype(np.float32))
    low = cv2.dct(_resize(trimmed.mean(0), 32))[:8, :8].ravel()
    small = np.stack([_resize(frame, SIDE) for frame in trimmed])
    if float(np.sqrt(((small - small.mean(0)) ** 2).mean())) < MOVING:
        small = small.mean(0, keepdims=True)
    # Bytes, because prints of all videos are held at once; rounding is far below the differences that count.
    return VideoPrint(video, low > np.median(low[1:]), np.rint(small).astype(np.uint8))


def read_prints(store: FrameStore) -> dict[str, VideoPrint]:
    """Prints of all videos of a store, by video id; nine frames a video are decoded, one of a still."""
    prints = {}
    for row in store.manifest.rows:
        count = FRAMES if row.frames > 1 else 1
        indices = [int((position + 0.5) * row.frames / count) for position in range(count)]
        prints[row.video] = print_video(row.video, store.frames(row.video, indices))
    return prints


def _details(frames: np.ndarray, side: int) -> list[np.ndarray]:
    """Frames without their broad shading: the sector shape alone must not count as similarity."""
    if frames.shape[1] != side:
        frames = np.stack([_resize(frame, side) for frame in frames])
    return [frame - cv2.GaussianBlur(frame, (0, 0), side / 16) for frame in frames]


def _search(first: Sequence[np.ndarray], second: Sequence[np.ndarray], scales: Sequence[float]) -> tuple[float, float]:
    """Best mean correlation of the middle of `first` inside `second`, and its scale; one position for all frames."""
    side = first[0].shape[0]
    window = int(side * WINDOW)
    start = (side - window) // 2
    best, best_scale = -1.0, 1.0
    for scale in scales:
        size = round(window * scale)
        if not 8 <= size <= side:
            continue
        found = np.zeros((side - size + 1, side - size + 1), np.float32)
        for left, right in zip(first, second, strict=True):
            patch = cv2.resize(left[start : start + window, start : start + window], (size, size))
            match = cv2.matchTemplate(right, patch, cv2.TM_CCOEFF_NORMED)
            # A patch without any detail has no correlation; OpenCV reports infinities or ones for it.
            found += np.where(np.isfinite(match), match, 0.0) if patch.std() > 0.1 else 0.0
        value = float(found.max()) / len(first)
        if value > best:
            best, best_scale = value, scale
    return best, best_scale


def _compare(first: VideoPrint, second: VideoPrint, distance: int) -> NearDuplicate | None:
    left, right = first.frames.astype(np.float32), second.frames.astype(np.float32)
    if len(left) != len(right):
        return None  # a still cut out of a clip is another kind of kinship, and no motion could confirm it
    some = slice(1, None, 3) if len(left) == FRAMES else slice(None)
    similarity, scale = _search(_details(left[some], COARSE_SIDE), _details(right[some], COARSE_SIDE), SCALES)
    if similarity < COARSE_SIMILARITY:
        return None
    similarity, scale = _search(_details(left, SIDE), _details(right, SIDE), [scale * factor for factor in FINE_SCALES])
    if len(left) == 1:
        if similarity < MIN_STILL_SIMILARITY or distance > MAX_STILL_HASH_DISTANCE:
            return None
        return NearDuplicate(first.video, second.video, distance, similarity, None)
    if similarity < MIN_SIMILARITY:
        return None
    motion, _ = _search(_details(left - left.mean(0), SIDE), _details(right - right.mean(0), SIDE), [scale])
    return NearDuplicate(first.video, second.video, distance, similarity, motion) if motion >= MIN_MOTION else None


def find_near_duplicates(prints: Mapping[str, VideoPrint]) -> list[NearDuplicate]:
    """Pairs of prints that show the same recording, sorted by id.

    Finds copies that were re-encoded, rescaled, or cropped by up to about a quarter a side. Does not find copies that
    were mirrored, cut in time or changed in speed, nor a still taken from a clip.
    """
    videos = sorted(prints)
    if len(videos) < 2:
        return []
    hashes = np.stack([prints[video].hash for video in videos])
    pairs: dict[tuple[int, int], int] = {}
    for row, own in enumerate(hashes):
        distances = (hashes != own).sum(1)
        distances[row] = len(own) + 1
        nearest = np.argsort(distances, kind="stable")[:NEAREST]
        for other in nearest[distances[nearest] <= MAX_HASH_DISTANCE].tolist():
            pairs[min(row, other), max(row, other)] = int(distances[other])
    found = (_compare(prints[videos[i]], prints[videos[j]], distance) for (i, j), distance in sorted(pairs.items()))
    return [pair for pair in found if pair is not None]
