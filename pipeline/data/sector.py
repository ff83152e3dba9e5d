"""The scan area of an ultrasound clip: found by what moves, fitted by the outline of a probe, with a confidence.

Everything a scanner writes beside its picture (text, rulers, logos, ECG, colour bars) stands still or is thin, the picture
flickers; so the moving area is fitted by the outline a convex, phased or linear probe draws, and only what lies inside it is
kept. Pure functions on grey frames; what is done with the result stands in `masking.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["Fan", "Sector", "activity", "fan_mask", "find_sector"]

WORK = 192
"""Long side, in pixels, at which areas are found; masks are enlarged from there by their outline, not by their pixels."""
FIT = 96
"""Long side at which outlines are fitted."""
FLOOR = 1.5
"""Grey levels of flicker below which a pixel counts as standing still: lossy codecs flicker by about one."""
DARK = 12
"""Grey level up to which a pixel counts as background."""


@dataclass(frozen=True)
class Fan:
    """Outline of a convex or phased probe's picture, in units of the picture's width.

    Apex (x, y), angles of the left and right edge from straight down (radians), nearest and farthest radius. A phased probe
    has a nearest radius near 0; a linear one is a `box`.
    """

    x: float
    y: float
    left: float
    right: float
    near: float
    far: float


@dataclass(frozen=True)
class Sector:
    """The scan area of one clip.

    mask: bool [H, W]. geometry: convex, phased, linear, or free (no outline fits; the mask is what moved). confidence: 0 to 1,
    the overlap (intersection over union) of outline and moving area, lowered where little moved. moving: share of pixels that
    moved. reasons: what lowered the confidence.
    """

    mask: np.ndarray
    geometry: str
    confidence: float
    moving: float
    reasons: tuple[str, ...] = ()


def activity(frames: np.ndarray) -> np.ndarray:
    """How much each pixel flickers, in grey levels. uint8 [T, H, W] -> float32 [H, W].

    The mean step between neighbouring frames that differ at all: repeated frames of a screen recording do not dilute it.
    """
    steps = np.abs(np.diff(frames.astype(np.int16), axis=0)).astype(np.float32)
    lively = steps.mean(axis=(1, 2))
    steps = steps[lively > 0.25 * max(float(np.median(lively)), 0.2)] if len(steps) else steps
    return steps.mean(0) if len(steps) else np.zeros(frames.shape[1:], np.float32)


def _shrink(frames: np.ndarray, side: int) -> np.ndarray:
    height, width = frames.shape[1:]
    scale = min(1.0, side / max(height, width))
    size = max(8, round(width * scale)), max(8, round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def _kernel(size: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def _filled(area: np.ndarray) -> np.ndarray:
    """Holes closed: everything that is not reached from the border."""
    padded = np.pad((~area).astype(np.uint8), 1, constant_values=1)
    cv2.floodFill(padded, None, (0, 0), 2)
    return padded[1:-1, 1:-1] != 2


def _moving_areas(frames: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """(areas of the picture by size, whether they were told by movement). frames: uint8 [T, h, w] at `WORK`.

    An area is a piece that moves, with what is bright and hangs together with it: parts of the picture may stand still, and a
    dark band may divide it. Pieces below a twentieth of the largest are left out.
    """
    flicker = activity(frames)
    moves = flicker > max(FLOOR, 0.15 * float(np.percentile(flicker, 95)))
    by_movement = float(moves.mean()) > 0.04
    size = max(5, round(0.05 * max(moves.shape)) | 1)
    # The first opening removes letters, ticks and lines; the second cuts thin bridges to a ruler or a label.
    bright = cv2.morphologyEx((frames.max(0) > DARK).astype(np.uint8), cv2.MORPH_OPEN, _kernel(3))
    bright = cv2.morphologyEx(_closed(bright, size), cv2.MORPH_OPEN, _kernel(size))
    core = bright
    if by_movement:
        core = cv2.morphologyEx(moves.astype(np.uint8), cv2.MORPH_OPEN, _kernel(3))
        core = cv2.morphologyEx(_closed(core, size), cv2.MORPH_OPEN, _kernel(size))
    count, labels = cv2.connectedComponents(bright | core, connectivity=4)
    pieces = [labels == number for number in range(1, count)]
    pieces = [piece for piece in pieces if (piece & (core > 0)).sum() > 0.25 * piece.sum()]
    pieces.sort(key=lambda piece: -int(piece.sum()))
    return [_filled(piece) for piece in pieces if piece.sum() >= 0.05 * pieces[0].sum()], by_movement


def _closed(area: np.ndarray, size: int) -> np.ndarray:
    """Morphological closing that does not stick to the border."""
    return cv2.morphologyEx(np.pad(area, size), cv2.MORPH_CLOSE, _kernel(size))[size:-size, size:-size]


def fan_mask(fan: Fan, shape: tuple[int, int], margin: float = 0.0) -> np.ndarray:
    """bool [H, W]: pixels inside a fan, widened by `margin` (in widths) on all sides."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    dx, dy = (x + 0.5) / width - fan.x, (y + 0.5) / width - fan.y
    radius = np.hypot(dx, dy)
    # Distance from the two straight edges, so that the margin has the same width everywhere.
    left = dx * math.cos(fan.left) - dy * math.sin(fan.left)
    right = dx * math.cos(fan.right) - dy * math.sin(fan.right)
    return (left >= -margin) & (right <= margin) & (radius >= fan.near - margin) & (radius <= fan.far + margin) & (dy > -margin)


@dataclass(frozen=True)
class _Target:
    """What an outline should enclose: `sure` pixels; dark ones between them (shadow, fluid) hardly matter, others must stay out."""

    sure: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, area: np.ndarray) -> _Target:
        points = cv2.findNonZero(area.astype(np.uint8))
        hull = np.zeros(area.shape, np.uint8)
        cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
        return cls(area, np.where(area, 1.0, np.where(hull > 0, 0.25, 1.0)).astype(np.float32))

    def overlap(self, mask: np.ndarray) -> float:
        """Weighted intersection over union."""
        union = float(self.weight[mask | self.sure].sum())
        return float(self.weight[mask & self.sure].sum()) / union if union else 0.0


def _edge_lines(area: np.ndarray) -> tuple[float, float, float, float] | None:
    """Straight left and right edges as (slope, offset) each: x = slope * y + offset, from the rows where the picture widens."""
    rows = np.flatnonzero(area.any(1))
    first, last = area.argmax(1)[rows], area.shape[1] - 1 - area[:, ::-1].argmax(1)[rows]
    widest = rows[(last - first).argmax()]
    use = (rows > rows[0] + 0.1 * (widest - rows[0])) & (rows < widest - 0.05 * (widest - rows[0]))
    # Edges cut by the picture's border are no edges.
    left, right = use & (first > 0), use & (last < area.shape[1] - 1)
    if left.sum() < 6 or right.sum() < 6:
        return None

    def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        slope, offset = np.polyfit(y, x, 1)
        for _ in range(3):
            rest = np.abs(x - slope * y - offset)
            keep = rest <= max(1.0, 1.5 * float(np.median(rest)))
            slope, offset = np.polyfit(y[keep], x[keep], 1)
        return float(slope), float(offset)

    return *line(first[left], rows[left]), *line(last[right], rows[right])


def _start_fans(area: np.ndarray) -> list[Fan]:
    """Fans to begin the fit with: from the straight edges where there are any, else from the bounding box."""
    height, width = area.shape
    ys, xs = np.nonzero(area)
    starts = []
    lines = _edge_lines(area)
    if lines is not None and lines[2] - lines[0] > 0.15:
        (a, b, c, d) = lines
        y = (b - d) / (c - a)
        starts.append((a * y + b, y, math.atan(a), math.atan(c)))
    middle, span = (xs.min() + xs.max()) / 2, (xs.max() - xs.min()) / 2
    for angle in (0.5, 0.75):
        starts.append((middle, ys.max() - span / math.sin(angle), -angle, angle))
    fans = []
    for x, y, left, right in starts:
        radius = np.hypot(xs - x, ys - y)
        near, far = np.percentile(radius, [0.5, 99.5])
        fans.append(Fan(x / width, y / width, left, right, float(near) / width, float(far) / width))
    return fans


def _coarse(area: np.ndarray) -> np.ndarray:
    scale = min(1.0, FIT / max(area.shape))
    size = (max(8, round(area.shape[1] * scale)), max(8, round(area.shape[0] * scale)))
    return _filled(cv2.resize(area.astype(np.uint8), size, interpolation=cv2.INTER_AREA) > 0)


def _fit_fan(target: _Target) -> tuple[Fan, float]:
    """The fan with the largest overlap with the target (at `FIT`), by pattern search from a few starts."""
    area = target.sure
    best, best_score = Fan(0.5, 0.0, -0.7, 0.7, 0.0, 1.0), 0.0
    for start in _start_fans(area):
        values = np.array([start.x, start.y, start.left, start.right, start.near, start.far])
        steps = np.array([0.03, 0.06, 0.06, 0.06, 0.03, 0.03])
        score = target.overlap(fan_mask(Fan(*values), area.shape))
        while steps[0] > 0.0015:
            improved = False
            for index in range(6):
                for sign in (1, -1):
                    trial = values.copy()
                    trial[index] += sign * steps[index]
                    if trial[4] < 0 or trial[2] > trial[3]:
                        continue
                    found = target.overlap(fan_mask(Fan(*trial), area.shape))
                    if found > score:
                        values, score, improved = trial, found, True
                        break
            if not improved:
                steps = steps / 2
        if score > best_score:
            best, best_score = Fan(*(float(v) for v in values)), score
    return best, best_score


def _fit_box(target: _Target) -> tuple[tuple[float, float, float, float], float]:
    """The upright rectangle (left, top, right, bottom in widths) that overlaps the target most, and the overlap."""
    area = target.sure
    width = area.shape[1]
    columns, rows = area.mean(0), area.mean(1)
    xs, ys = np.flatnonzero(columns > 0.5 * columns.max()), np.flatnonzero(rows > 0.5 * rows.max())
    left, right, top, bottom = xs[0], xs[-1] + 1, ys[0], ys[-1] + 1
    box = np.zeros_like(area)
    box[top:bottom, left:right] = True
    return (left / width, top / width, right / width, bottom / width), target.overlap(box)


def _box_mask(box: tuple[float, float, float, float], shape: tuple[int, int], margin: float) -> np.ndarray:
    width = shape[1]
    left, top, right, bottom = (value * width for value in box)
    m = margin * width
    mask = np.zeros(shape, bool)
    mask[max(0, round(top - m)) : round(bottom + m), max(0, round(left - m)) : round(right + m)] = True
    return mask


def find_sector(frames: np.ndarray, boxes: list[tuple[int, int, int, int]] | None = None, margin: float = 0.004) -> Sector:
    """The scan area of a clip.

    Args:
        frames: uint8 [T, H, W], T evenly chosen frames (8 to 32 are plenty; 1 for a still).
        boxes: two-dimensional regions of a DICOM header (left, top, right, bottom in pixels of `frames`): looked at alone.
        margin: how far the outline is widened, as a share of the width.
    """
    height, width = frames.shape[1:]
    inside = np.ones((height, width), bool)
    if boxes:
        inside[:] = False
        for left, top, right, bottom in boxes:
            inside[top:bottom, left:right] = True
        frames = np.where(inside, frames, 0)
    pieces, by_movement = _moving_areas(_shrink(frames, WORK))
    share = float(sum(piece.mean() for piece in pieces))
    reasons = []
    if share < 0.02:
        reason = "hardly anything moves" if by_movement else "nothing moves and nothing is bright"
        return Sector(inside, "free", 0.6 if boxes else 0.0, share, (reason,))
    area, target = pieces[0], _Target.of(_coarse(pieces[0]))
    (fan, fan_score), (box, box_score) = _fit_fan(target), _fit_box(target)
    for piece in pieces[1:]:
        # A piece beside the largest belongs to the picture if one outline can hold both.
        both = _Target.of(_coarse(area | piece))
        (wide_fan, wide_fan_score), (wide_box, wide_box_score) = _fit_fan(both), _fit_box(both)
        if max(wide_fan_score, wide_box_score) >= max(fan_score, box_score) - 0.04:
            area, fan, fan_score, box, box_score = area | piece, wide_fan, wide_fan_score, wide_box, wide_box_score
    # A box has fewer freedoms than a fan; a fan with nearly parallel edges can imitate one.
    if box_score >= fan_score - 0.02 and box_score > 0.8:
        geometry, score, mask = "linear", box_score, _box_mask(box, (height, width), margin)
    elif fan_score > 0.75:
        opening = (fan.right - fan.left) * fan.near
        geometry, score = "convex" if opening > 0.08 else "phased", fan_score
        mask = fan_mask(fan, (height, width), margin)
    else:
        geometry, score = "free", min(0.5, max(fan_score, box_score))
        mask = cv2.resize(area.astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR) > 0
        reasons.append("no outline of a probe fits what moves")
    mask &= inside
    if not by_movement:
        score *= 0.75
        reasons.append("nothing moves: the area was told by brightness")
    if share < 0.1:
        score *= 0.7
        reasons.append(f"the area is small ({share:.0%} of the picture)")
    return Sector(mask, geometry, round(float(score), 3), share, tuple(reasons))
