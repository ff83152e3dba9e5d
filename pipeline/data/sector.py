"""The scan area of an ultrasound clip: found by what moves, fitted by the outline of a probe, with a confidence.

Everything a scanner writes beside its picture (text, rulers, logos, ECG, colour bars) stands still, or is small and comes and
goes at one brightness; the picture flickers through all levels. So what flickers, with the faint noise that hangs together with
it, is fitted by the outline that a convex, phased or linear probe draws. Pure functions on grey frames; what is done with the
result stands in `masking.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np

from pipeline.data.outline import box_mask, fan_mask, fit_box, fit_fan, hull

__all__ = ["Box", "Sector", "activity", "find_panes", "find_sector", "join_panes", "solid"]

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom exclusive."""

WORK = 160
"""Long side, in pixels, at which areas are found; masks are enlarged from there by their outline, not by their pixels."""
FLOOR = 1.5
"""Grey levels of flicker below which a pixel counts as standing still: lossy codecs flicker by about one."""
FEWEST = 4
"""Frames below which nothing is said about movement."""
FAINT = 2.0
"""Grey levels above the background from which a pixel, averaged over time, belongs to a picture: shadows are hardly black."""
BETWEEN = 0.1
"""Share of the frames in which a pixel that is written on and off may lie between its two levels: a line that moves blurs."""
BLINK = 60
"""Grey levels between the two from which something counts as written: the rims of dark pictures sparkle more faintly."""
MARGIN = 0.001
"""How far an outline is widened, as a share of the width."""


@dataclass(frozen=True)
class Sector:
    """The scan area of one clip.

    mask: bool [H, W]. wide: bool [H, W], the mask and the hull of all that may belong to it, for when it is not sure.
    geometry: convex, phased, linear, or free (no outline fits; the mask is the hull of what moved). confidence: 0 to 1: how
    well outline and picture agree, lowered by every reason in `reasons`. moving: share of the picture that moved. still: told by
    brightness alone, so that the confidence cannot exceed 0.75.
    """

    mask: np.ndarray
    wide: np.ndarray
    geometry: str
    confidence: float
    moving: float
    reasons: tuple[str, ...] = ()
    still: bool = False


def activity(frames: np.ndarray) -> np.ndarray:
    """How much each pixel flickers, in grey levels. uint8 [T, H, W] -> float32 [H, W].

    The mean step between neighbouring frames that differ at all (repeated frames of a screen recording do not dilute it), without
    cuts and black frames, in which whatever is written changes as well. Zero for fewer than `FEWEST` frames.
    """
    if len(frames) < FEWEST:
        return np.zeros(frames.shape[1:], np.float32)
    steps = [cv2.absdiff(before, after) for before, after in pairwise(frames)]
    lively = np.array([float(step.mean()) for step in steps])
    # Up to two thirds of the frames may be repeats.
    usual = max(float(np.percentile(lively, 80)), 0.2)
    keep = (lively > 0.25 * usual) & (lively < 4 * usual)
    total = np.zeros(frames.shape[1:], np.float32)
    for step in (step for step, kept in zip(steps, keep, strict=True) if kept):
        cv2.accumulate(step, total)
    return total / max(1, int(keep.sum()))


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


def _without_dark(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W] without black ones: with them a whole picture comes and goes."""
    levels = frames[:, ::4, ::4].mean((1, 2))
    seen = levels >= 0.3 * np.percentile(levels, 80)
    return frames if seen.all() else frames[seen]


def _switched(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which pixels take two levels and hardly any between, as writing does that comes and goes: speckle takes them all.

    uint8 [T, ...] -> bool [...], and the lowest and the highest level, uint8 [...].
    """
    low, high = frames.min(0), frames.max(0)
    quarter = (high - low) // 4
    between = ((frames > low + quarter) & (frames < high - quarter)).sum(0)
    return (quarter > 5) & (between <= BETWEEN * len(frames)), low, high


def _strips(area: np.ndarray, sure: np.ndarray | None = None) -> np.ndarray:
    """The parts of an area that lie in a low, wide strip: shadows of ribs that move are higher. sure: a third of it at least."""
    width = area.shape[1]
    closed = cv2.morphologyEx(area.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, max(3, width // 12)), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(closed)
    wide, high = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT]
    strip = (wide > 0.6 * width) & (wide > 3 * high)
    if sure is not None:
        strip &= np.bincount(labels[sure], minlength=len(wide)) > 0.3 * np.bincount(labels[area], minlength=len(wide))
    strip[0] = False
    return strip[labels] & area


def _small(area: np.ndarray) -> np.ndarray:
    """The pieces of an area that are nowhere as thick as a picture: one that comes after a change of depth is no writing."""
    size = round(0.056 * max(area.shape)) | 1
    closed = cv2.morphologyEx(area.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    thick = cv2.morphologyEx(closed, cv2.MORPH_OPEN, np.ones((size, size), np.uint8)) > 0
    if not thick.any():
        return area
    count, labels = cv2.connectedComponents(closed, connectivity=8)
    return area & (np.bincount(labels[thick], minlength=count) == 0)[labels]


def _lonely(area: np.ndarray, lively: np.ndarray) -> np.ndarray:
    """The pieces of an area around which most is still; specks are left out, because they occur in pictures as well."""
    count, labels = cv2.connectedComponents(area.astype(np.uint8), connectivity=8)
    around = cv2.dilate(labels.astype(np.float32), np.ones((5, 5), np.uint8)).astype(np.int32)
    around[area] = 0
    alone = np.bincount(around.ravel(), lively.ravel(), count) <= 0.4 * np.bincount(around.ravel(), minlength=count)
    alone &= np.bincount(labels.ravel(), minlength=count) > 6
    alone[0] = False
    return alone[labels]


def _overlaid(frames: np.ndarray, mean: np.ndarray, flicker: np.ndarray) -> np.ndarray:
    """What is drawn over a screen and moves, or comes and goes: traces, bars, names, cursors. uint8 [T, h, w] -> bool [h, w].

    Pixels that switch between two levels or are lit now and then, in a low, wide strip; or bright ones that switch, in small
    pieces with still surroundings.
    """
    if len(frames) < FEWEST:
        return np.zeros(mean.shape, bool)
    switched, low, high = _switched(frames)
    lively = flicker > FLOOR
    thin = switched | ((high > 40) & (mean < 0.3 * high))
    strips = _strips(thin)
    # The line a trace comes back to is lit too often to count by itself.
    strips |= _strips(thin | lively, thin)
    written = _small(switched & (high - low > BLINK))
    return strips | _lonely(written, lively & ~(switched | strips))


@dataclass(frozen=True)
class _View:
    """A clip in a few pictures at `WORK`: mean over time, flicker, and `overlaid` (bool): see `_overlaid`."""

    mean: np.ndarray
    flicker: np.ndarray
    overlaid: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> _View:
        small = _shrink(frames, WORK)
        mean, flicker = small.mean(0, dtype=np.float32), activity(small)
        return cls(mean, flicker, _overlaid(_without_dark(small), mean, flicker))

    @property
    def background(self) -> float:
        """The grey level of what shows nothing: that of the darkest fiftieth, if it is dark."""
        low = float(np.percentile(self.mean, 2))
        return low if low < 40 else 0.0

    def moves(self) -> np.ndarray:
        return (self.flicker > max(FLOOR, 0.1 * float(np.percentile(self.flicker, 95)))) & ~self.overlaid

    def lit(self) -> np.ndarray:
        shown = (self.mean > self.background + FAINT) | (self.flicker > 0.5 + float(np.percentile(self.flicker, 2)))
        written = (self.mean > 60) & (self.flicker < 0.3 + 0.01 * self.mean)
        return shown & ~(self.overlaid | written)


def solid(area: np.ndarray) -> np.ndarray:
    """Letters, ticks and lines removed, gaps closed, thin bridges to a ruler or a label cut. bool -> uint8."""
    size = max(5, round(0.05 * max(area.shape)) | 1)
    area = cv2.morphologyEx(area.astype(np.uint8), cv2.MORPH_OPEN, _kernel(3))
    inner, border = slice(size, -size), (size, size, size, size)
    # Padded, so that closing does not stick to the border.
    area = cv2.morphologyEx(cv2.copyMakeBorder(area, *border, cv2.BORDER_CONSTANT, value=0), cv2.MORPH_CLOSE, _kernel(size))[inner, inner]
    area = cv2.copyMakeBorder(area, *border, cv2.BORDER_REPLICATE)
    return cv2.morphologyEx(area, cv2.MORPH_OPEN, _kernel(size))[inner, inner]


def _pieces(view: _View, faint: bool) -> tuple[list[np.ndarray], bool]:
    """(areas of the picture by size, whether they were told by movement).

    An area is a piece that moves, with what is lit and hangs together with it (`faint`): parts of the picture may stand still,
    and a dark band may divide it. Pieces below a twentieth of the largest are left out.
    """
    moves = view.moves()
    by_movement = float(moves.mean()) > 0.03
    core = solid(moves) if by_movement else solid(view.mean > view.background + 12)
    area = core | solid(view.lit()) if faint and by_movement else core
    count, labels = cv2.connectedComponents(area, connectivity=4)
    pieces = [labels == number for number in range(1, count)]
    pieces = [piece for piece in pieces if (piece & (core > 0)).sum() > 0.2 * piece.sum()]
    pieces.sort(key=lambda piece: -int(piece.sum()))
    return [_filled(piece) for piece in pieces if piece.sum() >= 0.05 * pieces[0].sum()], by_movement


@dataclass(frozen=True)
class _Outline:
    """What was fitted to one picture of a clip: the geometry, how well it agrees, and the mask at full size.

    hull: bool at `WORK`, around every piece that may belong to the picture.
    """

    geometry: str
    score: float
    mask: np.ndarray
    hull: np.ndarray


def _enlarged(small: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return cv2.resize(small.astype(np.uint8) * 255, shape[::-1], interpolation=cv2.INTER_LINEAR) > 0


def _fit(area: np.ndarray, shape: tuple[int, int], margin: float) -> _Outline:
    """The outline of a probe around an area (at `WORK`), or its hull where none fits. shape: of the mask."""
    around = hull(area)
    (fan, fan_score), (box, box_score) = fit_fan(area), fit_box(area)
    # A box has fewer freedoms than a fan; a fan with nearly parallel edges can imitate one.
    if box_score > 0.8 and (box_score >= fan_score - 0.004 or fan.right - fan.left < 0.12):
        return _Outline("linear", box_score, box_mask(box, shape, margin), around)
    if fan_score > 0.75:
        opening = (fan.right - fan.left) * fan.near
        return _Outline("convex" if opening > 0.08 else "phased", fan_score, fan_mask(fan, shape, margin), around)
    return _Outline("free", min(0.5, max(fan_score, box_score)), _enlarged(around, shape), around)


def _best_outline(pieces: list[np.ndarray], shape: tuple[int, int], margin: float) -> _Outline:
    """The outline of the largest piece, and of those beside it that one outline can hold as well: parts of it beyond a shadow."""
    area = pieces[0]
    best = _fit(area, shape, margin)
    for piece in pieces[1:]:
        both = _fit(area | piece, shape, margin)
        if both.geometry != "free" and both.score >= best.score - 0.06:
            area, best = area | piece, both
    # Blocks of text are smaller.
    large = [piece for piece in pieces if piece.sum() >= 0.08 * pieces[0].sum()]
    return replace(best, hull=hull(np.logical_or.reduce(large)))


def _outline(view: _View, shape: tuple[int, int], margin: float) -> tuple[_Outline | None, bool]:
    """(outline of the largest picture in a view, whether movement decided); None where there is no picture."""
    pieces, by_movement = _pieces(view, faint=True)
    if not pieces or pieces[0].mean() < 0.02:
        return None, by_movement
    best = _best_outline(pieces, shape, margin)
    if best.score < 0.85 and by_movement:
        # A grey panel around the picture counts as lit: then movement alone tells the picture.
        moving, _ = _pieces(view, faint=False)
        other = _best_outline(moving, shape, margin) if moving and moving[0].mean() >= 0.02 else best
        best = other if other.score > best.score + 0.05 else best
    return best, by_movement


def _split(view: _View) -> int | None:
    """The column (at `WORK`) between two pictures side by side, or None: nothing is lit there from top to bottom."""
    lit = view.lit() if view.flicker.any() else view.mean > view.background + 12
    lit = cv2.morphologyEx(lit.astype(np.uint8), cv2.MORPH_OPEN, _kernel(3))
    used = np.flatnonzero(lit.any(0))
    if len(used) < 40:
        return None
    left, right = int(used[0]), int(used[-1]) + 1
    empty = lit[:, left:right].mean(0) <= 0.005
    quarter = (right - left) // 4
    middle = np.flatnonzero(empty[quarter:-quarter]) + left + quarter
    if not len(middle):
        return None
    column = int(middle[len(middle) // 2])
    halves = [lit[:, left:column], lit[:, column:right]]
    sizes = [int(half.sum()) for half in halves]
    tall = [float(np.ptp(np.flatnonzero(half.any(1))) if half.any() else 0) for half in halves]
    return column if min(sizes) > 0.25 * sum(sizes) and min(tall) > 0.6 * max(tall) else None


def _joined(letters: np.ndarray) -> np.ndarray:
    """Letters of one line as one piece. bool -> uint8."""
    return cv2.morphologyEx(letters.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((1, max(3, letters.shape[1] // 50 | 1)), np.uint8))


def _without_labels(mask: np.ndarray, frames: np.ndarray, flicker: np.ndarray) -> np.ndarray:
    """Cut what is written across the rim or just inside: still in every frame, and mostly outside, or bright in a still place.

    What comes and goes at one brightness is cut as well where it lies mostly outside.
    """
    low, high = frames.min(0), frames.max(0)
    still = cv2.absdiff(high, low) < 30
    width = max(3, round(0.04 * mask.shape[1]) | 1)
    inner = cv2.erode(mask.astype(np.uint8), _kernel(width)) > 0
    quiet = cv2.blur(flicker, (width, width)) < 0.8
    cut = _blinking(mask, _without_dark(frames))
    for level in (25, 60):
        bright = still & (low > level)
        lines = _joined(bright) if level == 25 else bright.astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(lines, connectivity=8)
        inside, deep, alone = (np.bincount(labels[part], minlength=count) for part in (mask, inner, quiet))
        size = stats[:, cv2.CC_STAT_AREA]
        labelled = (inside > 0) & (inside < 0.5 * size) if level == 25 else (inside > 0) & (deep == 0) & (alone > 0.8 * size)
        labelled[0] = False
        if labelled.any():
            cut |= labelled[labels]
    return mask & (cv2.dilate(cut.astype(np.uint8), _kernel(5)) == 0) if cut.any() else mask


def _blinking(mask: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Lines of what comes and goes at one brightness, across the rim of a mask and mostly outside. bool [H, W]."""
    wide = max(3, round(0.12 * mask.shape[1]) | 1)
    flat = mask.astype(np.uint8)
    # Only a band along the rim is looked at, half as far inside as outside: the whole picture would cost several times as much.
    band = (cv2.dilate(flat, np.ones((wide, wide), np.uint8)) > cv2.erode(flat, np.ones((wide // 2 | 1,) * 2, np.uint8))).ravel()
    if not band.any():
        return np.zeros_like(mask)
    written = np.zeros(mask.size, bool)
    switched, low, high = _switched(frames.reshape(len(frames), -1)[:, np.flatnonzero(band)])
    written[band] = switched & (high - low > BLINK)
    written = _small(written.reshape(mask.shape))
    count, labels = cv2.connectedComponents(_joined(written), connectivity=8)
    size, inside = np.bincount(labels[written], minlength=count), np.bincount(labels[written & mask], minlength=count)
    line = (inside > 0) & (inside < 0.6 * size) & (size > 4)
    line[0] = False
    return line[labels]


def _judge(view: _View, mask: np.ndarray, score: float, by_movement: bool, cine: bool) -> tuple[float, tuple[str, ...]]:
    """Confidence and what lowered it. The mask is at full size."""
    reasons = []
    small = cv2.resize(mask.astype(np.uint8), view.mean.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    moves = solid(view.moves()) > 0
    kept = float((moves & small).sum()) / max(1, int(moves.sum()))
    if by_movement and kept < 0.97:
        score *= max(0.0, 1 - 3 * (0.97 - kept))
        reasons.append(f"{1 - kept:.0%} of what moves lies outside")
    if not by_movement:
        score *= 0.75
        reasons.append("nothing moves: told by brightness" if cine else "too few frames: told by brightness")
    elif float(view.mean.std()) < 0.5 * float(view.flicker.mean()):
        score *= 0.3
        reasons.append("noise without a picture")
    if float(mask.mean()) < 0.1:
        score *= 0.7
        reasons.append(f"small ({float(mask.mean()):.0%} of the picture)")
    return round(float(np.clip(score, 0, 1)), 3), tuple(reasons)


def find_sector(frames: np.ndarray, boxes: Sequence[Box] = (), margin: float = MARGIN) -> Sector:
    """The scan area of a clip, of all panes where several pictures lie side by side; see `find_panes`."""
    return join_panes(find_panes(frames, boxes, margin))


def join_panes(panes: Sequence[Sector]) -> Sector:
    """Several panes as one sector, as sure as the least sure of them."""
    if len(panes) == 1:
        return panes[0]
    least = min(panes, key=lambda pane: pane.confidence)
    geometries = list(dict.fromkeys(pane.geometry for pane in panes))
    return replace(
        least, mask=np.logical_or.reduce([pane.mask for pane in panes]), wide=np.logical_or.reduce([pane.wide for pane in panes]),
        geometry=geometries[0] if len(geometries) == 1 else "free",
        moving=sum(pane.moving for pane in panes), reasons=tuple(dict.fromkeys(reason for pane in panes for reason in pane.reasons)),
    )


def find_panes(frames: np.ndarray, boxes: Sequence[Box] = (), margin: float = MARGIN) -> list[Sector]:
    """The scan area of each picture of a clip: one, or several side by side, from left to right.

    Args:
        frames: uint8 [T, H, W], T evenly chosen frames (8 to 32 are plenty; 1 for a still).
        boxes: two-dimensional regions of a DICOM header: looked at alone.
        margin: how far the outline is widened, as a share of the width.
    """
    height, width = frames.shape[1:]
    view = _View.of(frames)
    if boxes and _holds(boxes, view, width):
        return [_find_one(frames, box, margin, trusted=True) for box in _columns(boxes)]
    column = _split(view)
    if column is not None:
        middle = round(column * width / view.mean.shape[1])
        panes = [_find_one(frames, box, margin) for box in ((0, 0, middle, height), (middle, 0, width, height))]
        if min(pane.confidence for pane in panes) >= 0.4:
            return panes
    return [_find_one(frames, (0, 0, width, height), margin, view=view)]


def _holds(boxes: Sequence[Box], view: _View, width: int) -> bool:
    """Whether boxes hold nearly all that flickers: some headers keep the regions of a picture that was larger."""
    moves = solid(view.flicker > 0.5 + float(np.percentile(view.flicker, 2))) > 0
    inside = np.zeros_like(moves)
    scale = moves.shape[1] / width
    for left, top, right, bottom in boxes:
        inside[int(top * scale) : math.ceil(bottom * scale), int(left * scale) : math.ceil(right * scale)] = True
    return float((moves & inside).sum()) >= 0.93 * float(moves.sum())


def _columns(boxes: Sequence[Box]) -> list[Box]:
    """Boxes that lie above one another or overlap are one; from left to right."""
    found: list[Box] = []
    for box in sorted(boxes):
        if found and box[0] < found[-1][2]:
            last = found.pop()
            box = (last[0], min(last[1], box[1]), max(last[2], box[2]), max(last[3], box[3]))
        found.append(box)
    return found


def _find_one(frames: np.ndarray, box: Box, margin: float, trusted: bool = False, view: _View | None = None) -> Sector:
    """The scan area within a box; all of it where nothing is found and the box is `trusted`. view: of the box, if it is known."""
    left, top, right, bottom = box
    part = frames[:, top:bottom, left:right]
    view, mask = view or _View.of(part), np.zeros(frames.shape[1:], bool)
    outline, by_movement = _outline(view, part.shape[1:], margin)
    moving = float(view.moves().mean()) * (mask[top:bottom, left:right].size / mask.size)
    if outline is None:
        mask[top:bottom, left:right] = True
        reason = "hardly anything moves" if by_movement else "nothing moves and nothing is bright"
        return Sector(mask, mask, "free", 0.6 if trusted else 0.0, moving, (reason,))
    flicker = cv2.resize(view.flicker, part.shape[:0:-1], interpolation=cv2.INTER_LINEAR)
    inside = _without_labels(outline.mask, part, flicker) if by_movement else outline.mask
    confidence, reasons = _judge(view, inside, outline.score, by_movement, len(frames) >= FEWEST)
    if outline.geometry == "free":
        reasons = ("no outline of a probe fits", *reasons)
    mask[top:bottom, left:right] = inside
    wide = mask.copy()
    wide[top:bottom, left:right] |= _enlarged(outline.hull, part.shape[1:])
    return Sector(mask, wide, outline.geometry, confidence, moving, reasons, not by_movement)
