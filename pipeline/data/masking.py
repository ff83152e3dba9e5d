"""From the frames of one video to its mask: what is kept, what is black in every stored frame, and why.

Frames wait in memory until the mask is known: all of a usual clip, the first `MEMORY` bytes of a long one. A mask never
proves that no name is left: text inside the scan area stays, and a person has to look at what the review list names.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.sector import Box, Sector, find_panes, join_panes, solid
from pipeline.errors import ConfigError, DataError
from pipeline.files import unshield
from pipeline.parameters import MaskParams

__all__ = ["Decision", "MaskReport", "Masker", "decision_for", "is_doppler", "read_review", "rows_without_file"]

MEMORY = 64 << 20
"""Bytes of frames that wait for the mask, in each process; at least `FEWEST` frames do."""
FEWEST, SAMPLES = 8, 24
"""Frames a mask is found from."""
_COLOUR_SIDE, _COLOUR_STEP = 96, 8
"""Size of the pictures in which colour is looked for, and of how many frames one is looked at."""
_COLOURS = 24
"""Pictures in which colour must come and go: about eight seconds of a usual clip."""
THUMB = 160
"""Long side of the pictures on the contact sheets."""
_WATCH = 16
"""Of how many later frames one is compared with the mask."""
_DECISIONS = ("accept", "keep", "exclude", "box")


@dataclass(frozen=True)
class Decision:
    """What a person decided about one video. box: for `box`, in pixels of the file. row: of the review file."""

    action: str
    box: Box | None = None
    row: int = field(default=0, compare=False)


@dataclass
class MaskReport:
    """What was found and done, as it goes into the list of masks.

    action: masked, wide (low confidence: the mask and the hull of all that may belong to it), kept (nothing was cut), box (a
    person's). geometry: that of `Sector`, or box. share: of the picture that is kept. grown: share of the frames looked at that
    show a picture beyond the mask. review: a person should look.
    """

    geometry: str = ""
    confidence: float | None = None
    share: float = 1.0
    action: str = "kept"
    panes: int = 1
    doppler: bool = False
    grown: float = 0.0
    reviewed: str = ""
    review: bool = False
    reasons: list[str] = field(default_factory=list)


def read_review(path: Path) -> dict[str, Decision]:
    """A person's decisions by path or video id, from a CSV file with the columns path or video, decision, x0, y0, x1, y1.

    Rows without a decision are left out, so that a list of the extract stage can be filled in bit by bit.

    Raises:
        ConfigError: naming the row that cannot be understood.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"extract.mask.review: {path} cannot be read as a CSV table ({type(error).__name__})") from None
    if "decision" not in columns or not {"path", "video"} & set(columns):
        raise ConfigError(f"extract.mask.review: {path}: found columns {', '.join(columns)}; wanted: decision, and path or video")
    found: dict[str, Decision] = {}
    for number, row in enumerate(rows, start=2):
        action = (row.get("decision") or "").strip().lower()
        names = [name for name in ((row.get("video") or "").strip(), unshield((row.get("path") or "").strip())) if name]
        if not action:
            continue
        where = f"extract.mask.review: {path}: row {number}"
        if action not in _DECISIONS or not names:
            whom = " and ".join(names) or "nothing"
            raise ConfigError(f"{where}: decision {action!r} for {whom}; allowed: {', '.join(_DECISIONS)}, for a path or video")
        try:
            box = tuple(int(row.get(column) or "") for column in ("x0", "y0", "x1", "y1")) if action == "box" else None
        except ValueError:
            raise ConfigError(f"{where}: a box needs whole numbers of pixels in x0, y0, x1, y1") from None
        if box is not None and not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise ConfigError(f"{where}: the box {box} is empty; wanted 0 <= x0 < x1 and 0 <= y0 < y1")
        found |= {name: Decision(action, box, number) for name in names}
    return found


def rows_without_file(decisions: Mapping[str, Decision], files: Iterable[tuple[str, str]]) -> list[str]:
    """Rows of the review file that match none of these files (path, video id): `row 3 (a.avi)`."""
    known = {name for file in files for name in file}
    used = {decision.row for name, decision in decisions.items() if name in known}
    unused = {decision.row: name for name, decision in decisions.items() if decision.row not in used}
    return [f"row {row} ({name})" for row, name in sorted(unused.items())]


def decision_for(decisions: Mapping[str, Decision], path: str, video: str) -> Decision | None:
    """The decision about a file, by its path or its video id."""
    return decisions.get(path) or decisions.get(video)


def is_doppler(pictures: np.ndarray, mask: np.ndarray) -> bool:
    """Whether colour Doppler (flow or power) is shown inside a mask.

    Strong colour that comes and goes, in a picture that is otherwise grey or of one tint.

    Args:
        pictures: uint8 [T, h, w, 3] BGR; one for a still.
        mask: bool [h, w].
    """
    planes = cv2.split(pictures.reshape(-1, *pictures.shape[2:]))
    vivid = cv2.subtract(cv2.max(cv2.max(*planes[:2]), planes[2]), cv2.min(cv2.min(*planes[:2]), planes[2])) > 60
    # Nearly every clip ends here, at a small part of the cost of what follows.
    if vivid.reshape(pictures.shape[:3])[:, mask].sum() <= 0.001 * mask.sum():
        return False
    inside = pictures[:, mask].astype(np.float32)
    grey = inside.mean(2)
    # What a tint (sepia, blue) adds is a share of the brightness, the same everywhere.
    bright = grey > 20
    tint = np.median(inside[bright] / grey[bright][:, None], axis=0) if bright.any() else np.ones(3)
    # White has lost its tint, so it takes colour of its own as well.
    strong = (np.abs(inside - grey[..., None] * tint).max(2) > 45) & (np.ptp(inside, axis=2) > 60)
    share = float(strong.any(0).mean())
    if not 0.004 < share < 0.5:
        return False
    # A logo or a colour bar stays as it is.
    return len(pictures) < 3 or float(strong.all(0).sum()) < 0.5 * float(strong.any(0).sum())


class Masker:
    """Collects frames of one video until its mask can be found, then applies it to all of them."""

    def __init__(self, params: MaskParams, name: str, boxes: Sequence[Box] = (), decision: Decision | None = None, *, flow: bool = False) -> None:
        """boxes: two-dimensional regions of a DICOM header, in pixels of the file; flow: it calls one colour flow. name: for messages."""
        self.params, self.report = params, MaskReport()
        self.mask: np.ndarray | None = None
        """uint8 [H, W], 255 inside, at the size of the stored frames; None before `decide` and where nothing is cut."""
        self.preview: np.ndarray | None = None
        """uint8 [h, 2 w, 3] BGR: a frame as it was, with the outline, and what is left of it; for the contact sheet."""
        self._name, self._boxes, self._decision, self._least, self._flow = name, boxes, decision, params.min_confidence, flow
        self._crop: Box | None = None
        self._bytes = self._seen = self._passed = self._looked = self._grew = 0
        self._colours: list[np.ndarray] = []
        self._area: np.ndarray | None = None
        self._written: np.ndarray | None = None
        self._stack: np.ndarray | None = None

    def wants(self, frame: np.ndarray, original: np.ndarray) -> bool:
        """Take note of a frame that waits; whether there is room for more."""
        self._note_colour(original)
        self._seen += 1
        self._bytes += frame.nbytes
        return self._bytes < MEMORY or self._seen < FEWEST

    def pass_by(self, original: np.ndarray) -> None:
        """Look for colour in a frame that comes after the mask was found.

        Raises:
            DataError: the parameters exclude the video.
        """
        self._note_colour(original)
        # Half of the pictures are looked at again with the next ones, so that what comes and goes is seen wherever it begins.
        if len(self._colours) >= _COLOURS:
            self._look_for_doppler()
            self._colours = self._colours[-_COLOURS // 2 :]

    def _note_colour(self, original: np.ndarray) -> None:
        self._passed += 1
        if original.ndim == 3 and self._passed % _COLOUR_STEP == 1:
            step = max(1, min(original.shape[:2]) // _COLOUR_SIDE)
            self._colours.append(original[::step, ::step].copy())

    def decide(self, frames: Sequence[np.ndarray], size: tuple[int, int]) -> None:
        """Find the mask from the waiting frames. size: width and height of the file's frames.

        Raises:
            DataError: the parameters or a person exclude the video.
        """
        grey = _choose(frames)
        height, width = grey.shape[1:]
        boxes = [scaled for box in self._boxes if (scaled := _scale(box, size, (width, height)))]
        panes = find_panes(grey, boxes)
        sector, report = join_panes(panes), self.report
        if sector.still:
            self._least = self.params.min_confidence_still
        action = self._decision.action if self._decision else ""
        report.reviewed, report.panes = action, len(panes)
        report.confidence, report.reasons = sector.confidence, list(sector.reasons)
        if action == "exclude":
            raise DataError(f"{self._name}: left out by extract.mask.review")
        if len(panes) > 1 and not action:
            sector = self._choose_pane(panes, sector)
        self._area = sector.mask
        self._look_for_doppler()
        self._colours = self._colours[-_COLOURS // 2 :]
        report.geometry = sector.geometry
        if action == "box" and self._decision and self._decision.box:
            mask = np.zeros((height, width), bool)
            left, top, right, bottom = _scale(self._decision.box, size, (width, height)) or (0, 0, 0, 0)
            mask[top:bottom, left:right] = True
            report.action = report.geometry = "box"
        else:
            mask = self._chosen(sector, action)
        if not mask.any():
            raise DataError(f"{self._name}: the box of extract.mask.review lies outside the picture")
        self._keep(mask, frames, grey)
        low = sector.confidence < self._least
        report.review = not action and (low or report.action != "masked" or len(panes) > 1 or report.doppler)

    def _choose_pane(self, panes: list[Sector], together: Sector) -> Sector:
        if self.params.dual == "exclude":
            raise DataError(f"{self._name}: {len(panes)} pictures side by side (extract.mask.dual: exclude)")
        if self.params.dual == "larger":
            return max(panes, key=lambda pane: int(pane.mask.sum()))
        return {"left": panes[0], "right": panes[-1]}.get(self.params.dual, together)

    def _look_for_doppler(self) -> None:
        if self._area is None or self.report.doppler:
            return
        self.report.doppler = self._flow or self._shows_doppler(self._area)
        if self.report.doppler and self.params.doppler == "exclude" and not self._decision:
            raise DataError(f"{self._name}: colour Doppler (extract.mask.doppler: exclude)")

    def _shows_doppler(self, inside: np.ndarray) -> bool:
        if not self._colours:
            return False
        height, width = self._colours[-1].shape[:2]
        same = [picture for picture in self._colours if picture.shape == self._colours[-1].shape]
        area = cv2.resize(inside.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
        return is_doppler(np.stack(same), area)

    def _chosen(self, sector: Sector, action: str) -> np.ndarray:
        """The mask that the parameters want for what was found."""
        everything = np.ones_like(sector.mask)
        if action == "keep":
            return everything
        if action == "accept" or sector.confidence >= self._least:
            self.report.action = "masked"
            return sector.mask
        if self.params.low_confidence == "exclude":
            raise DataError(f"{self._name}: no sure mask, confidence {sector.confidence:.2f} (extract.mask.low_confidence: exclude)")
        if self.params.low_confidence == "keep" or sector.confidence == 0:
            return everything
        self.report.action = "wide" if self.params.low_confidence == "wide" else "masked"
        return sector.wide if self.params.low_confidence == "wide" else sector.mask

    def _keep(self, mask: np.ndarray, frames: Sequence[np.ndarray], grey: np.ndarray) -> None:
        """Note what `apply` needs, the picture for the contact sheet, and whether the picture outgrows the mask already."""
        full = mask.astype(np.uint8) * 255
        self.preview = _before_and_after(frames[len(frames) // 2], full)
        # Rounded down, so that 1 means that nothing was cut.
        self.report.share = int(10000 * float(mask.mean())) / 10000
        if mask.all():
            return
        written = cv2.dilate((grey.min(0) > 20).astype(np.uint8), np.ones((5, 5), np.uint8))
        self._written = written | cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8))
        for frame in grey[::3]:
            self._watch(frame)
        self.mask = full
        if self.params.crop:
            left, top, width, height = cv2.boundingRect(full)
            self._crop = (left, top, left + width, top + height)
            self.mask = np.ascontiguousarray(self._cropped(full))
        self._stack = self.mask if frames[0].ndim == 2 else cv2.merge([self.mask] * 3)

    def _cropped(self, frame: np.ndarray) -> np.ndarray:
        if self._crop is None:
            return frame
        left, top, right, bottom = self._crop
        return frame[top:bottom, left:right]

    def apply(self, frame: np.ndarray, watch: bool = True) -> np.ndarray:
        """A frame as it is stored: zero outside the mask, cropped if the parameters want that. uint8 [H, W] or [H, W, 3].

        watch: the frame was not among those `decide` saw, so every few of them are compared with the mask.
        """
        if self._stack is None:
            return frame
        if watch:
            self._seen += 1
            if self._seen % _WATCH == 0:
                self._watch(_grey(frame))
        return cv2.bitwise_and(self._cropped(frame), self._stack)

    def _watch(self, frame: np.ndarray) -> None:
        """Count a frame, and whether it shows more than letters and lines beyond the mask and what is written in every frame."""
        beyond = ((frame > 40) & (self._written == 0)).astype(np.uint8)
        scale = 160 / max(frame.shape)
        small = cv2.resize(beyond * 255, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else beyond * 255
        self._looked += 1
        self._grew += float(solid(small > 127).mean()) > 0.01

    def finish(self) -> list[str]:
        """Complete the report when all frames are through; returns warnings for the manifest."""
        report = self.report
        self._look_for_doppler()
        report.review = report.review or (report.doppler and not report.reviewed)
        report.grown = round(self._grew / self._looked, 3) if self._looked else 0.0
        notes = []
        if report.grown > 0.05:
            report.review = not report.reviewed
            report.reasons.append(f"in {report.grown:.0%} of the frames looked at the picture reaches beyond the mask")
            notes.append(f"mask: the picture reaches beyond it in {self._grew} of {self._looked} frames looked at (a change of depth?)")
        if report.confidence is not None and report.confidence < self._least and not report.reviewed:
            notes.append("mask: low confidence")
        if report.panes > 1:
            notes.append("two pictures side by side")
        if report.doppler:
            notes.append("colour Doppler")
        return notes


def _grey(frame: np.ndarray) -> np.ndarray:
    return frame if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)


def _before_and_after(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Two thumbnails side by side, uint8 [h, 2 w, 3] BGR. mask: uint8 [H, W]."""
    scale = THUMB / max(mask.shape)
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    before = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    before = cv2.cvtColor(before, cv2.COLOR_GRAY2BGR) if before.ndim == 2 else before
    small = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    after = cv2.bitwise_and(before, before, mask=small)
    edges, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.concatenate([cv2.drawContours(before, edges, -1, (0, 255, 0), 1), after], axis=1)


def _choose(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Evenly chosen frames in grey, uint8 [T, H, W]."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(SAMPLES, len(frames))).round().astype(int))
    return np.stack([_grey(frames[index]) for index in chosen])


def _scale(box: Box, size: tuple[int, int], target: tuple[int, int]) -> Box | None:
    """A box in pixels of the file as one in pixels of the stored frame; None where nothing of it lies inside."""
    factors = [target[0] / size[0], target[1] / size[1]] * 2
    values = [round(value * factor) for value, factor in zip(box, factors, strict=True)]
    left, top, right, bottom = max(0, values[0]), max(0, values[1]), min(target[0], values[2]), min(target[1], values[3])
    return (left, top, right, bottom) if right - left > 1 and bottom - top > 1 else None
