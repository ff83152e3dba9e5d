"""Recordings that occur twice under different bytes: re-encoded, rescaled or cropped copies of one clip.

Two checks must agree. A 64-bit perceptual hash of the mean frame proposes pairs. Then the detail of one clip is
searched in the other over position and scale, and must correlate, and so must what *moves* there: two views of one
patient share anatomy and one machine's clips share their frame, but only a copy shares the motion of its speckle.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import cv2
import numpy as np
from tqdm import tqdm

from pipeline.data.store import FrameStore

__all__ = ["NearDuplicate", "VideoPrint", "find_near_duplicates", "join_pairs", "print_video", "read_prints"]

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
_BLOCK = 512
"""Hashes compared with all others at once."""


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


@dataclass(frozen=True)
class _Patches:
    """The middle of some frames at one scale, to be searched in others; None for a frame without detail there."""

    scale: float
    size: int
    pictures: tuple[np.ndarray | None, ...]


def _patches(frames: Sequence[np.ndarray], scales: Sequence[float]) -> list[_Patches]:
    """The middles of frames at each scale at which they fit."""
    side = frames[0].shape[0]
    window = int(side * WINDOW)
    start = (side - window) // 2
    found = []
    for scale in scales:
        size = round(window * scale)
        if 8 <= size <= side:
            middles = [cv2.resize(frame[start : start + window, start : start + window], (size, size)) for frame in frames]
            # A patch without any detail has no correlation; OpenCV reports infinities or ones for it.
            found.append(_Patches(scale, size, tuple(middle if middle.std() > 0.1 else None for middle in middles)))
    return found


def _search(first: Sequence[_Patches], second: Sequence[np.ndarray], least: float) -> tuple[float, float]:
    """Best mean correlation of patches inside `second`, and its scale; one position for all frames.

    A scale is given up as soon as it cannot reach `least` or the best one any more, so a result below `least` says only that.
    """
    side, count = second[0].shape[0], len(second)
    best, best_scale = -1.0, 1.0
    for patches in first:
        found = np.zeros((side - patches.size + 1, side - patches.size + 1), np.float32)
        for left, (patch, right) in enumerate(zip(patches.pictures, second, strict=True)):
            # No correlation exceeds 1 by more than rounding.
            if left and float(found.max()) + 1.001 * (count - left) < count * max(best, least):
                break
            if patch is not None:
                match = cv2.matchTemplate(right, patch, cv2.TM_CCOEFF_NORMED)
                found += np.where(np.isfinite(match), match, 0.0)
        else:
            value = float(found.max()) / count
            if value > best:
                best, best_scale = value, patches.scale
    return best, best_scale


def _some(frames: np.ndarray) -> list[np.ndarray]:
    """Details of the few small frames by which nearly all pairs are told apart."""
    return _details(frames[1::3] if len(frames) == FRAMES else frames, COARSE_SIDE)


def _compare(first: VideoPrint, second: VideoPrint, distance: int, coarse: Sequence[_Patches]) -> NearDuplicate | None:
    """What two prints have in common, None for too little. coarse: patches of `_some` frames of the first."""
    left, right = first.frames.astype(np.float32), second.frames.astype(np.float32)
    if len(left) != len(right):
        return None  # a still cut out of a clip is another kind of kinship, and no motion could confirm it
    similarity, scale = _search(coarse, _some(right), COARSE_SIMILARITY)
    if similarity < COARSE_SIMILARITY:
        return None
    least = MIN_STILL_SIMILARITY if len(left) == 1 else MIN_SIMILARITY
    fine = _patches(_details(left, SIDE), [scale * factor for factor in FINE_SCALES])
    similarity, scale = _search(fine, _details(right, SIDE), least)
    if similarity < least:
        return None
    if len(left) == 1:
        return NearDuplicate(first.video, second.video, distance, similarity, None) if distance <= MAX_STILL_HASH_DISTANCE else None
    motion, _ = _search(_patches(_details(left - left.mean(0), SIDE), [scale]), _details(right - right.mean(0), SIDE), MIN_MOTION)
    return NearDuplicate(first.video, second.video, distance, similarity, motion) if motion >= MIN_MOTION else None


def _propose(hashes: np.ndarray) -> dict[tuple[int, int], int]:
    """Pairs of rows (first < second) with their distance: for each row the `NEAREST` that are near enough. bool [N, 64]."""
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    pairs: dict[tuple[int, int], int] = {}
    for start in range(0, len(signs), _BLOCK):
        # The product counts equal bits less unequal ones.
        distances = ((signs.shape[1] - signs[start : start + _BLOCK] @ signs.T) / 2).astype(np.uint8)
        for row, own in enumerate(distances, start):
            near = np.flatnonzero(own <= MAX_HASH_DISTANCE)
            near = near[near != row]
            for other in near[np.argsort(own[near], kind="stable")[:NEAREST]].tolist():
                pairs[min(row, other), max(row, other)] = int(own[other])
    return pairs


def find_near_duplicates(prints: Mapping[str, VideoPrint]) -> list[NearDuplicate]:
    """Pairs of prints that show the same recording, sorted by id; with a progress bar on stderr if it takes long.

    Finds copies that were re-encoded, rescaled, or cropped by up to about a quarter a side. Does not find copies that
    were mirrored, cut in time or changed in speed, nor a still taken from a clip.
    """
    videos = sorted(prints)
    if len(videos) < 2:
        return []
    pairs = sorted(_propose(np.stack([prints[video].hash for video in videos])).items())
    found = []
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(pairs), unit="pair", desc="near duplicates", delay=3.0, mininterval=30.0 if quiet else 0.2) as bar:
        for i, group in groupby(pairs, key=lambda pair: pair[0][0]):
            first = prints[videos[i]]
            coarse = _patches(_some(first.frames.astype(np.float32)), SCALES)
            for (_, j), distance in group:
                found.append(_compare(first, prints[videos[j]], distance, coarse))
                bar.update()
    return [pair for pair in found if pair is not None]


def join_pairs(pairs: Sequence[NearDuplicate]) -> list[tuple[list[str], list[NearDuplicate]]]:
    """Sorted ids that show one recording, joined over pairs, and the pairs they come from; every id stands in one list."""
    groups: dict[str, tuple[set[str], list[NearDuplicate]]] = {}
    for pair in pairs:
        both = [groups.setdefault(video, ({video}, [])) for video in (pair.first, pair.second)]
        small, large = sorted(both, key=lambda group: len(group[0]))
        if small is not large:
            large[0].update(small[0])
            large[1].extend(small[1])
            groups |= dict.fromkeys(small[0], large)
        large[1].append(pair)
    whole = {id(group): group for group in groups.values()}
    return [(sorted(videos), found) for videos, found in whole.values()]
