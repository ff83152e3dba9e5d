"""Outlines that probes draw, fitted to an area: a fan (convex and phased probes) or an upright box (linear ones).

Fits weigh what an outline leaves out against what it takes in: shadows inside a picture cost little, and a fan that stands
upright is preferred, because a shadow at one side imitates a slanted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["Fan", "box_mask", "fan_mask", "fit_box", "fit_fan", "hull"]

FIT = 80
"""Long side at which outlines are fitted, after a search at half of it."""
_SHADOW, _BLACK = 0.15, 0.4
"""Cost of a pixel an outline takes in that shows nothing: between lit ones, and beside them. A lit one left out costs 1."""
_TILT = 0.06
"""What a radian of slant costs: probes draw upright fans, and shadows imitate slanted ones."""


@dataclass(frozen=True)
class Fan:
    """Outline of a convex or phased probe's picture, in units of the picture's width.

    Apex (x, y), angles of the left and right edge from straight down (radians), nearest and farthest radius. A phased probe
    has a nearest radius near 0; a linear one is a box.
    """

    x: float
    y: float
    left: float
    right: float
    near: float
    far: float


def hull(area: np.ndarray) -> np.ndarray:
    """Convex hull of a bool picture."""
    filled = np.zeros(area.shape, np.uint8)
    rows = np.flatnonzero(area.any(1))
    if len(rows):
        first, last = area[rows].argmax(1), area.shape[1] - 1 - area[rows, ::-1].argmax(1)
        ends = np.concatenate([np.stack([first, rows], 1), np.stack([last, rows], 1)]).astype(np.int32)
        cv2.fillConvexPoly(filled, cv2.convexHull(ends), 1)
    return filled > 0


def fan_mask(fan: Fan, shape: tuple[int, int], margin: float = 0.0) -> np.ndarray:
    """bool [H, W]: pixels inside a fan, widened by `margin` (in widths) on all sides."""
    return _fan_mask((fan.x, fan.y, fan.left, fan.right, fan.near, fan.far), *_grid(shape), margin)


def _grid(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Columns float32 [1, W] and rows [H, 1] of pixel centres, in widths."""
    height, width = shape
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(width)
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(width)
    return x[None], y[:, None]


def _fan_mask(values: Sequence[float], x: np.ndarray, y: np.ndarray, margin: float = 0.0) -> np.ndarray:
    apex_x, apex_y, left, right, near, far = (float(value) for value in values)
    dx, dy = x - np.float32(apex_x), y - np.float32(apex_y)
    square = dx * dx + dy * dy
    inside = square <= (far + margin) ** 2
    if near > margin:
        inside &= square >= (near - margin) ** 2
    # Distance from the two straight edges, so that the margin has the same width everywhere.
    inside &= dx * np.float32(math.cos(left)) - dy * np.float32(math.sin(left)) >= -margin
    inside &= dx * np.float32(math.cos(right)) - dy * np.float32(math.sin(right)) <= margin
    inside &= dy > -margin
    return inside


class _Target:
    """What an outline should enclose, and what each pixel costs that it gets wrong."""

    def __init__(self, area: np.ndarray) -> None:
        self.sure = area
        self.x, self.y = _grid(area.shape)
        extra = np.where(hull(area), _SHADOW, _BLACK).astype(np.float32)
        self._gain = area.astype(np.float32).ravel()
        self._cost = np.where(area, 0, extra).astype(np.float32).ravel()
        self._total = float(area.sum())

    def overlap(self, mask: np.ndarray) -> float:
        """Weighted intersection over union."""
        flat = mask.ravel().astype(np.float32)
        return float(flat @ self._gain) / (self._total + float(flat @ self._cost)) if self._total else 0.0

    def fan(self, values: np.ndarray) -> float:
        """Overlap with a fan, less what its slant costs."""
        return self.overlap(_fan_mask(values, self.x, self.y)) - _TILT * abs(values[2] + values[3]) / 2


def _edge_lines(area: np.ndarray) -> tuple[float, float, float, float] | None:
    """Straight left and right edges as (slope, offset) each: x = slope * y + offset, from the rows where the picture widens."""
    rows = np.flatnonzero(area.any(1))
    first, last = area.argmax(1)[rows], area.shape[1] - 1 - area[:, ::-1].argmax(1)[rows]
    widest = rows[(last - first).argmax()]
    use = (rows > rows[0] + 0.1 * (widest - rows[0])) & (rows < widest - 0.05 * (widest - rows[0]))
    # Edges cut by the picture's border are no edges.
    left, right = use & (first > 0), use & (last < area.shape[1] - 1)
    if left.sum() < 4 or right.sum() < 4:
        return None

    def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        slope, offset = np.polyfit(y, x, 1)
        for _ in range(3):
            rest = np.abs(x - slope * y - offset)
            keep = rest <= max(1.0, 1.5 * float(np.median(rest)))
            slope, offset = np.polyfit(y[keep], x[keep], 1)
        return float(slope), float(offset)

    return *line(first[left], rows[left]), *line(last[right], rows[right])


def _start_fans(area: np.ndarray) -> list[np.ndarray]:
    """Fans to begin the fit with: from the straight edges where there are any, and from the bounding box."""
    width = area.shape[1]
    ys, xs = np.nonzero(area)
    apexes = []
    lines = _edge_lines(area)
    if lines is not None and lines[2] - lines[0] > 0.15:
        (a, b, c, d) = lines
        y = (b - d) / (c - a)
        apexes.append((a * y + b, y, math.atan(a), math.atan(c)))
        slant = (math.atan(c) - math.atan(a)) / 2
        apexes.append((a * y + b, y, -slant, slant))
    middle, span = (xs.min() + xs.max()) / 2, (xs.max() - xs.min()) / 2
    for angle in (0.45, 0.7):
        apexes.append((middle, ys.max() - span / math.sin(angle), -angle, angle))
    fans = []
    for x, y, left, right in apexes:
        radius = np.hypot(xs - x, ys - y)
        near, far = np.percentile(radius, [0.5, 99.5])
        fans.append(np.array([x / width, y / width, left, right, near / width, far / width]))
    return fans


def _coarse(area: np.ndarray, side: int) -> np.ndarray:
    scale = min(1.0, side / max(area.shape))
    size = (max(8, round(area.shape[1] * scale)), max(8, round(area.shape[0] * scale)))
    return cv2.resize(area.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 127


_MOVES = np.array([
    # Single values, and pairs that keep the other edges about where they are: apex up with a narrower angle, both radii.
    [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1],
    [0, 1, 0, 0, -1, -1], [0, 1, -0.5, 0.5, -1, -1], [0, 1, 0, 0, 0, 0], [0, 0, -1, 1, 0, 0], [1, 0, -1, -1, 0, 0],
])
_STEP = np.array([0.04, 0.06, 0.06, 0.06, 0.06, 0.06])


def _climb(target: _Target, values: np.ndarray, size: float, smallest: float) -> tuple[np.ndarray, float]:
    """Pattern search: each move is tried both ways, and all steps are halved when none helps."""
    score = target.fan(values)
    while size > smallest:
        improved = False
        for move in _MOVES:
            for sign in (1, -1):
                trial = values + sign * size * move * _STEP
                if trial[4] < 0 or trial[2] > trial[3] - 0.05 or max(-trial[2], trial[3]) > 1.4:
                    continue
                found = target.fan(trial)
                if found > score + 1e-5:
                    values, score, improved = trial, found, True
                    break
        if not improved:
            size /= 2
    return values, score


def fit_fan(area: np.ndarray) -> tuple[Fan, float]:
    """The fan that agrees best with an area (bool [h, w]), and its overlap."""
    rough = _Target(_coarse(area, FIT // 2))
    starts = sorted(_start_fans(rough.sure), key=rough.fan, reverse=True)[:2]
    values, _ = max((_climb(rough, start, 1.0, 0.2) for start in starts), key=lambda found: found[1])
    fine = _Target(_coarse(area, FIT))
    values, _ = _climb(fine, values, 0.25, 0.03)
    return Fan(*(float(value) for value in values)), fine.overlap(_fan_mask(values, fine.x, fine.y))


def fit_box(area: np.ndarray) -> tuple[tuple[float, float, float, float], float]:
    """The upright rectangle (left, top, right, bottom in widths) that agrees best with an area (bool [h, w]), and its overlap.

    The overlap is measured as that of `fit_fan`, so that the two can be compared.
    """
    width = area.shape[1]
    target = _Target(_coarse(area, FIT))
    best, best_score = (0.0, 0.0, 1.0, 1.0), -1.0
    columns, rows = area.mean(0), area.mean(1)
    for share in (0.1, 0.3, 0.5, 0.7):
        xs, ys = np.flatnonzero(columns > share * columns.max()), np.flatnonzero(rows > share * rows.max())
        box = (xs[0] / width, ys[0] / width, (xs[-1] + 1) / width, (ys[-1] + 1) / width)
        inside = (target.x >= box[0]) & (target.x < box[2]) & (target.y >= box[1]) & (target.y < box[3])
        score = target.overlap(inside)
        if score > best_score:
            best, best_score = box, score
    return best, best_score


def box_mask(box: tuple[float, float, float, float], shape: tuple[int, int], margin: float) -> np.ndarray:
    """bool [H, W]: pixels inside a box (in widths), widened by `margin`."""
    width = shape[1]
    left, top, right, bottom = (value * width for value in box)
    m = margin * width
    mask = np.zeros(shape, bool)
    mask[max(0, round(top - m)) : round(bottom + m), max(0, round(left - m)) : round(right + m)] = True
    return mask
