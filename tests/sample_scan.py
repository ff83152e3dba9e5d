"""Synthetic scanner screens with known scan area: flickering speckle in the outline of a probe, and everything written beside it.

Overlays: a name, a changing clock, depth ticks, a logo, a grey bar, a moving ECG trace; closer to the picture: a sweeping and a
scrolling trace, a playback bar, a heart rate that blinks, a name that comes late. `Scan.written` marks all their pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

GEOMETRIES = ("convex", "phased", "linear")
OVERLAYS = ("text", "clock", "ticks", "logo", "bar", "ecg")
NEAR = ("sweep", "scroll", "playback", "blinking", "late")


@dataclass(frozen=True)
class Scan:
    """frames: uint8 [T, H, W], or [T, H, W, 3] BGR in colour. sector, written: bool [H, W], disjoint."""

    frames: np.ndarray
    sector: np.ndarray
    written: np.ndarray


def outline(geometry: str, size: tuple[int, int], zoom: float = 1.0) -> np.ndarray:
    """bool [H, W]: the scan area in the middle of a screen. size: width and height."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64) + 0.5
    if geometry == "linear":
        half = 0.27 * zoom * width
        return (np.abs(x - 0.5 * width) < half) & (y > 0.12 * height) & (y < 0.12 * height + 0.7 * zoom * height)
    apex, near, angle = (-0.1, 0.24, 0.55) if geometry == "convex" else (0.09, 0.015, 0.72)
    dx, dy = x - 0.5 * width, y - apex * height
    radius, far = np.hypot(dx, dy), (0.84 - apex) * height
    if zoom != 1:
        far = near * height + (far - near * height) * zoom
    return (radius > near * height) & (radius < far) & (np.abs(np.arctan2(dx, dy)) < angle)


def speckle(sector: np.ndarray, frames: int, rng: np.random.Generator, shadow: bool = True) -> np.ndarray:
    """uint8 [T, H, W]: tissue with layers, a fluid-filled hole and a shadow, that flickers as speckle does."""
    height, width = sector.shape
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    tissue = 70 + 40 * np.sin(18 * y + 3 * np.sin(5 * x)) - 45 * y
    hole = ((x - 0.56) / 0.07) ** 2 + ((y - 0.45) / 0.09) ** 2 < 1
    tissue = np.where(hole, 4, tissue)
    if shadow:
        tissue = np.where((np.abs(x - 0.42 - 0.05 * y) < 0.04) & (y > 0.35), 3, tissue)
    tissue = np.clip(tissue, 3, None)
    fixed = cv2.GaussianBlur(rng.gamma(2.0, 0.5, (height, width)), (0, 0), 1.2)
    out = np.zeros((frames, height, width), np.uint8)
    for t in range(frames):
        live = cv2.GaussianBlur(rng.gamma(2.0, 0.5, (height, width)), (0, 0), 0.8)
        out[t] = np.where(sector, np.clip(tissue * (0.6 * fixed + 0.4 * live), 0, 255), 0)
    return out


def _write(frames: np.ndarray, kind: str, sector: np.ndarray) -> None:
    """Draw one overlay into all frames, in place."""
    count, height, width = frames.shape
    scale = max(0.3, width / 900)
    heavy = 1 if width < 700 else 2
    font = cv2.FONT_HERSHEY_SIMPLEX
    columns = np.flatnonzero(sector.any(0))
    rows = np.flatnonzero(sector.any(1))
    right, top, bottom = int(columns[-1]) + max(3, width // 80), int(rows[0]), int(rows[-1])
    for t, frame in enumerate(frames):
        if kind == "text":
            for line, text in enumerate(("DOE JANE", "ID 4711", "1953")):
                cv2.putText(frame, text, (3, round((line + 1) * 32 * scale) + 2), font, scale, 235, heavy)
        elif kind == "clock":
            cv2.putText(frame, f"12:0{t % 10}:{10 + 7 * t % 50}", (round(0.76 * width), round(30 * scale)), font, scale, 220, heavy)
        elif kind == "ticks":
            for place in np.linspace(top, bottom, 9).round().astype(int):
                cv2.line(frame, (right, int(place)), (right + max(3, width // 60), int(place)), 200, heavy)
        elif kind == "logo":
            cv2.circle(frame, (width - width // 12, height - height // 10), width // 24, 250, -1)
        elif kind == "bar":
            for row in range(height // 3):
                frame[height // 3 + row, 3 : 3 + width // 40] = 255 - 255 * row // (height // 3)
        elif kind in ("sweep", "scroll"):
            x = np.arange(width)
            place = x if kind == "sweep" else x + 9 * t
            beat = np.exp(-((place % (width // 4) - width / 8) ** 2) / (2 * (width / 100) ** 2))
            y = bottom + 0.11 * height - 0.04 * height * beat
            trace = np.stack([x, y.round()], 1).astype(np.int32)
            gap = 17 * t % width
            for part in (trace[:gap], trace[gap + 24 :]) if kind == "sweep" else (trace,):
                cv2.polylines(frame, [part], False, 150, 2)
        elif kind == "playback":
            cv2.rectangle(frame, (0, bottom + height // 30), (width * (t + 1) // count, bottom + height // 18), 200, -1)
        elif kind == "blinking" and t // 4 % 2:
            cv2.putText(frame, f"HR {60 + t}", (round(0.72 * width), round(0.66 * height)), font, 2.2 * scale, 255, 2)
        elif kind == "late" and t > 0.7 * count:
            cv2.putText(frame, "DOE JANE 1953", (3, round(0.6 * height)), font, 1.6 * scale, 255, 2)
        elif kind == "ecg":
            x = np.arange(width)
            beat = np.exp(-(((x - 9 * t) % (width // 4) - width / 8) ** 2) / (2 * (width / 100) ** 2))
            y = (0.97 * height - 0.07 * height * beat).round().astype(int)
            cv2.polylines(frame, [np.stack([x, y], 1).astype(np.int32)], False, 210, heavy)


def scan(
    geometry: str = "convex", size: tuple[int, int] = (400, 300), frames: int = 24, seed: int = 0,
    overlays: tuple[str, ...] = OVERLAYS, zoom: float = 1.0, shadow: bool = True, gap: int | None = None,
) -> Scan:
    """One clip of a scanner's screen. gap: pixels around the picture in which nothing is written; by default a fiftieth of the width."""
    rng = np.random.default_rng(seed)
    sector = outline(geometry, size, zoom)
    picture = speckle(sector, frames, rng, shadow)
    written = np.zeros_like(picture)
    for kind in overlays:
        _write(written, kind, sector)
    gap = size[0] // 50 if gap is None else gap
    near = cv2.dilate(sector.astype(np.uint8), np.ones((2 * gap + 1,) * 2, np.uint8)) > 0
    written[:, near] = 0
    return Scan(np.maximum(picture, written), sector, (written > 0).any(0))


def with_doppler(clip: Scan, seed: int = 0) -> Scan:
    """The clip in BGR with red and blue flow that comes and goes in the middle of its scan area."""
    rng = np.random.default_rng(seed)
    colour = np.repeat(clip.frames[..., None], 3, axis=3)
    ys, xs = np.nonzero(clip.sector)
    cy, cx, r = int(ys.mean()), int(xs.mean()), max(4, clip.sector.shape[1] // 14)
    for t, frame in enumerate(colour):
        patch = frame[cy - r : cy + r, cx - r : cx + r]
        flow = cv2.GaussianBlur(rng.random(patch.shape[:2]), (0, 0), 2) > 0.5
        patch[flow] = (20, 30, 200 + t % 3 * 20) if t % 4 < 2 else (210, 40, 20)
    return Scan(colour, clip.sector, clip.written)


def side_by_side(geometry: str, size: tuple[int, int] = (300, 240), frames: int = 20, seed: int = 0) -> Scan:
    """Two clips of one screen, with a black gap between them."""
    left, right = (scan(geometry, size, frames, seed + n, overlays=("text",)) for n in range(2))
    return Scan(*(np.concatenate(pair, axis=-1) for pair in zip(_parts(left), _parts(right), strict=True)))


def _parts(clip: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return clip.frames, clip.sector, clip.written


def write_clip(path: Path, frames: np.ndarray, fps: float = 12.0) -> Path:
    """Frames as an MJPEG AVI of high quality (.avi) or MPEG-4 (.mp4)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), code, fps, (frames.shape[2], frames.shape[1]))
    assert writer.isOpened()
    writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 95)
    for frame in frames:
        writer.write(frame if frame.ndim == 3 else cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    writer.release()
    return path
