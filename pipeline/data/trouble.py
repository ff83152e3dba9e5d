"""What can be wrong with a file, and how it is noticed: frozen, black, jumping and tinted frames, uneven time, odd headers.

Pure functions on numbers and arrays. `KINDS` says how serious each finding is and what to do; who reads files, compares them
with one another and tells people is `inspect.py`. Thresholds were measured on 99 real clips of many scanners.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = [
    "CUT_TURN", "KINDS", "REPEAT", "SEVERITIES", "Finding", "FrameWatch", "Kind", "check_cuts", "check_frames", "check_picture", "check_times", "detail",
    "tint", "turn",
]

SEVERITIES = ("error", "warning", "note")
SIDE = 110
"""Frames are compared on a grid of about this many pixels a side. Skipping pixels, unlike averaging, keeps the noise."""
REPEAT = 0.5
"""Mean difference, in grey levels, below which two neighbours show one picture: repeats are re-encoded, so never equal."""
MANY_REPEATS = 0.27
STATIC, PUMPING = 0.85, 2.0
"""A clip is one picture if so many neighbours are equal and the rest differ by less: encoders refresh a picture now and then."""
BLACK = 3.0
"""Mean grey level of a frame taken off the skin or before the picture starts; text and rulers may still stand in it."""
CUT_STEP, CUT_NEAR = 2.8, 6
"""A cut changes the picture this many times more than any change among so many neighbours and the clip's usual change ..."""
CUT_TURN = 0.3
"""... and leaves so little likeness (1 - correlation of the detail). The two real cuts reach 4.2 times and 0.59; fast probes, and
clips that freeze and jump, 2.1 times where likeness is lost at all (0.1), and 1.8 times where it is lost as much (0.28 and more)."""
UNEVEN = 0.15
"""Spread of the gaps between frames (5th to 95th percentile over the median); 0.02 or less where times are rounded."""
TINTED = 3.0
"""Mean difference between colour channels; scanners' grey pictures stay below 2.5 whatever the codec."""
TINY, HUGE = 100, 2000
"""Pixels of the short and of the long side."""


@dataclass(frozen=True)
class Kind:
    """One kind of trouble: how serious, in words, and what to do."""

    severity: str
    title: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """One trouble of one file. `code` is a key of `KINDS`; `frame`: where to see it; `again`: told at another file of its pair already."""

    code: str
    text: str
    frame: int | None = None
    again: bool = False


_NOTHING = "nothing to do; extraction reads it"
_FOLDERS = "if folders are classes, decide which is right; if they are not (formats, dates), set data.labels to none or to a table"
KINDS: dict[str, Kind] = {
    "unreadable": Kind("error", "cannot be read", "replace or remove them; extraction lists them in data/frames/main/quarantine.csv and goes on"),
    "labels": Kind("error", "labels table and files disagree", "correct the table; extraction stops until they agree"),
    "numbered": Kind("warning", "clips or stills", "look at them; a labels table that names folders or pictures decides"),
    "no-table": Kind("warning", "CSV table that gives no labels", "if it should, rename its columns or set the keys of section data, and look again"),
    "same-content-labels": Kind("error", "one content under different labels", "decide which label is right"),
    "same-content-patients": Kind("error", "one content under different patients", "decide which patient it is"),
    "near-duplicate-labels": Kind("error", "one recording under different labels", "look at both; give them one label or remove one"),
    "same-content-folders": Kind("warning", "one content in different class folders", _FOLDERS),
    "near-duplicate-folders": Kind("warning", "one recording in different class folders", _FOLDERS),
    "static": Kind("warning", "clip that does not move", "remove it, or keep it as a still image"),
    "black": Kind("warning", "black from start to end", "remove it"),
    "cut": Kind("warning", "hard cut inside", "split it there: both sides count as one recording, and negatives cross the cut"),
    "short": Kind("warning", "too few frames for a method", "pretraining with a method named here leaves it out"),
    "cut-off": Kind("warning", "cut off", "get the whole file; what is there is read, and its last frames are missing"),
    "repeats": Kind("warning", "frames repeat", "screen recording; lower extract.frames_per_second to what the scanner gave"),
    "black-start": Kind("warning", "black lead-in", "cut it off if there are many"),
    "black-end": Kind("warning", "black lead-out", "cut it off if there are many"),
    "black-inside": Kind("warning", "nearly black frames inside", "probe off the skin; cut them out if there are many"),
    "size-changes": Kind("warning", "frame size changes inside", "all frames are resized to the first; split it if it is two recordings"),
    "variable-rate": Kind("warning", "variable frame rate", "distances in frames are no distances in time; convert it if that matters"),
    "no-rate": Kind("warning", "frame rate unknown", "add a column fps to the labels table"),
    "tiny": Kind("warning", "tiny picture", "look whether it is a thumbnail"),
    "huge": Kind("note", "huge picture", "extract.short_side shrinks it; look whether it is a full screen"),
    "aspect": Kind("warning", "pixels are not square", "shown wider or narrower than stored; the stored pixels are used"),
    "burnt-in": Kind("warning", "burnt-in text by its header", "look at it: names in pictures are not removed by hashing headers"),
    "regions": Kind("warning", "several ultrasound regions", "two pictures on one screen, or a strip chart; look at reports/extract/contact_sheet_1.png"),
    "colour-flow": Kind("warning", "colour Doppler by its header", "decide whether such clips belong to the question"),
    "same-content": Kind("warning", "same content twice", "kept once; remove the copies"),
    "near-duplicate": Kind("warning", "one recording twice, encoded differently", "kept in one fold; check that the patients agree"),
    "same-name": Kind("note", "same file name in different folders", "name them by path in the labels table"),
    "no-label": Kind("note", "no label", "serves pretraining only"),
    "no-patient": Kind("warning", "no patient", "add a patient column: without it one patient's clips end up in training and test"),
    "shortcut": Kind("warning", "the class can be told without the picture", "see the numbers; balance the sources, or say so in the report"),
    "few-patients": Kind("warning", "class with few patients", "at least as many patients a class as folds are needed, better ten times that"),
    "count": Kind("note", "header lies about the number of frames", "nothing to do; frames are counted by decoding"),
    "extension": Kind("note", "content and extension differ", "nothing to do; the content decides. Other programs may refuse it"),
    "rotated": Kind("note", "rotation flag", "applied when it is read; other programs may ignore it"),
    "odd-size": Kind("note", "odd width or height", _NOTHING),
    "tint": Kind("note", "colour tint", "extract.color: gray removes it"),
    "alpha": Kind("note", "alpha channel", "dropped when it is read"),
    "deep": Kind("note", "more than 8 bits", "brought to 8 bits when it is read"),
    "pages": Kind("note", "several pages", "only the first is read"),
    "audio": Kind("note", "sound track", "never read. Listen before you pass it on: voices identify people"),
    "not-ascii": Kind("note", "name outside ASCII", "nothing to do here; archives and other systems may garble it"),
    "not-printable": Kind("warning", "name that cannot be printed", "rename it; lists show it with escapes"),
    "not-read": Kind("note", "file nobody reads", "another kind of file; name it in the labels table if it is a video all the same"),
    "link-outside": Kind("warning", "link that leads out of the folder", "not followed; copy the files in, or name the real folder"),
    "locked": Kind("error", "folder that cannot be opened", "change its permissions"),
}
"""Code: severity, title, advice. The order is that of the lists within one severity."""


class FrameWatch:
    """Sees every frame once and remembers two numbers of each: its mean level and its difference to the one before.

    Costs a few hundredths of a millisecond a frame, so that extraction watches too.
    """

    def __init__(self) -> None:
        self.levels, self.steps = array("f"), array("f")
        self.grid: np.ndarray | None = None
        """Every so many pixels of the last frame."""

    def see(self, frame: np.ndarray) -> None:
        """Take the next frame, uint8 [H, W] or [H, W, 3] (its middle channel counts)."""
        stride = max(1, min(frame.shape[:2]) // SIDE)
        grid = np.ascontiguousarray(frame[::stride, ::stride] if frame.ndim == 2 else frame[::stride, ::stride, 1])
        self.levels.append(cv2.mean(grid)[0])
        before = self.grid
        if before is not None:
            same_size = before.shape == grid.shape
            self.steps.append(cv2.norm(grid, before, cv2.NORM_L1) / grid.size if same_size else 255.0)
        self.grid = grid

    def findings(self) -> list[Finding]:
        """What the frames seen so far show."""
        return check_frames(np.asarray(self.levels), np.asarray(self.steps))


def check_frames(levels: np.ndarray, steps: np.ndarray) -> list[Finding]:
    """Static clips, repeats and black frames. levels: mean grey level of T frames; steps: mean differences of T-1 neighbours."""
    found = []
    count = len(levels)
    if count < 2:
        return found
    repeated = float((steps < REPEAT).mean())
    dark = levels < min(BLACK, max(0.5 * float(np.median(levels)), 1.0))
    if float(np.median(levels)) < 1.0:
        return [Finding("black", f"{count} frames, mean grey level {float(np.mean(levels)):.1f}", count // 2)]
    if repeated >= STATIC and float(steps.max()) < PUMPING:
        found.append(Finding("static", f"all {count} frames show one picture", 0))
    elif repeated >= MANY_REPEATS:
        jumps = steps[steps >= REPEAT]
        text = f"{100 * repeated:.0f} % of neighbours are almost equal: {len(jumps) + 1} different pictures in {count} frames"
        found.append(Finding("repeats", text, int(np.argmax(steps < REPEAT)) + 1))
    for start, end in _stretches(dark):
        code = "black-start" if start == 0 else "black-end" if end == count else "black-inside"
        where = f"frame {start}" if end - start == 1 else f"frames {start} to {end - 1}"
        found.append(Finding(code, f"{where} of {count}", start))
    return found


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """Runs of True as (first, last + 1)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def check_cuts(levels: np.ndarray, steps: np.ndarray, turns: np.ndarray) -> list[Finding]:
    """Hard cuts: a change far beyond the clip's usual one that leaves no likeness, between two frames that are not black.

    Args:
        levels: [T] mean grey levels. steps: [T-1] differences of neighbours. turns: [T-1] `turn` of neighbours.
    """
    moving = steps[steps >= REPEAT]
    # One change in a frozen clip is a change of slides.
    usual = float(np.median(moving)) if len(moving) > 1 else REPEAT
    lit = np.minimum(levels[:-1], levels[1:]) >= BLACK
    places = []
    for place in np.flatnonzero((steps > CUT_STEP * usual) & (turns > CUT_TURN) & lit).tolist():
        near = np.concatenate([steps[max(0, place - CUT_NEAR): place], steps[place + 1: place + 1 + CUT_NEAR]])
        if steps[place] > CUT_STEP * near.max(initial=0.0):
            places.append(place + 1)
    if not places:
        return []
    shown = ", ".join(str(place) for place in places[:5]) + (", ..." if len(places) > 5 else "")
    return [Finding("cut", f"at frame{'s' if len(places) > 1 else ''} {shown} of {len(levels)}", int(places[0]))]


def detail(frame: np.ndarray) -> np.ndarray:
    """A small copy, float32 [32, 32], of a grey frame without its broad shading: the sector's outline is no likeness."""
    small = cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    small -= cv2.GaussianBlur(small, (0, 0), 2)
    return small - small.mean()


def turn(first: np.ndarray, second: np.ndarray) -> float:
    """1 - correlation of two `detail`s; 0 where one of them is empty."""
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return 1 - float((first * second).sum()) / scale if scale > 0 else 0.0


def check_times(milliseconds: Sequence[float]) -> list[Finding]:
    """Variable frame rate, from the presentation time of each frame. Steps back (MPEG-2 falls back to 0) say nothing."""
    gaps = np.diff(np.asarray(milliseconds, np.float64))
    gaps = gaps[gaps > 0]
    if len(gaps) < 3:
        return []
    median = float(np.median(gaps))
    low, high = np.percentile(gaps, [5, 95])
    holes = int((gaps > 1.5 * median).sum())
    if (high - low) / median <= UNEVEN and holes < 2:
        return []
    first = int(np.argmax(gaps)) + 1
    return [Finding("variable-rate", f"gaps of {gaps.min() / 1000:.3f} to {gaps.max() / 1000:.3f} s, usually {median / 1000:.3f} s", first)]


def tint(frame: np.ndarray) -> tuple[float, float]:
    """Mean |red - green| and |green - blue| of a frame, uint8 BGR [H, W, 3]; zeros for a grey one."""
    if frame.ndim == 2:
        return 0.0, 0.0
    stride = max(1, min(frame.shape[:2]) // SIDE)
    blue, green, red = cv2.split(np.ascontiguousarray(frame[::stride, ::stride]))
    return cv2.norm(red, green, cv2.NORM_L1) / green.size, cv2.norm(green, blue, cv2.NORM_L1) / green.size


def check_picture(width: int, height: int, colours: tuple[float, float], *, subsampled: bool = True) -> list[Finding]:
    """Sizes that are tiny, huge or odd (where the codec keeps colour at half size), and tints."""
    found = []
    if min(width, height) < TINY:
        found.append(Finding("tiny", f"{width} x {height} pixels"))
    if max(width, height) > HUGE:
        found.append(Finding("huge", f"{width} x {height} pixels"))
    if subsampled and (width % 2 or height % 2):
        found.append(Finding("odd-size", f"{width} x {height} pixels"))
    if max(colours) > TINTED:
        found.append(Finding("tint", f"channels differ by {colours[0]:.1f} (red, green) and {colours[1]:.1f} (green, blue) grey levels"))
    return found
