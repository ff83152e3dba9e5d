"""Phantom lung-ultrasound videos: the embedded default data, so that the whole pipeline runs with no download.

A caricature that keeps what matters for learning: speckle, reverberation, shadows, sliding and a probe that wanders
over an anatomy wider than the picture. Not a simulator, and no substitute for patients in any conclusion.

Letters: R depth samples, A beam lines, M columns of the world map (wider than the A lines of one frame), H and W the
picture; depth z in parts of the displayed depth (0 to 1), lateral position u in parts of the aperture (0 in the middle).
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.config import PhantomParams
from pipeline.errors import DataError
from pipeline.files import atomic_write

__all__ = ["CLASSES", "Appearance", "PhantomClip", "PhantomRow", "draw_patients", "write_phantoms"]

logger = logging.getLogger(__name__)

CLASSES = ("healthy", "b_lines", "consolidation")
_WORLD = 2.4
"""Width of the anatomy map in apertures: one aperture, the wandering of the probe to both sides, and sliding."""
_CALIBRATION_FRAMES = 9
_CLIPS_A_FOLDER = 16
_ENCODERS = {"mp4": "mp4v", "avi": "MJPG"}
_PATTERNS = ("part_*/clip_*.mp4", "part_*/clip_*.avi", "part_*/clip_*.gif")


@dataclass(frozen=True)
class Appearance:
    """What a patient and the scanner look like. Nothing here depends on the finding."""

    probe: str
    """`convex` or `linear`."""
    half_angle: float
    """Half opening of the convex sector in radians."""
    face_radius: float
    """Radius of the convex transducer face in parts of the displayed depth."""
    pleura: float
    """Depth of the pleural line, which is the thickness of the chest wall."""
    fat: float
    """Part of the chest wall that is subcutaneous fat; the rest is muscle."""
    speckle: float
    """Size of a speckle grain relative to the default."""
    compounding: float
    """How far the scanner smooths speckle: 0 leaves it Rayleigh distributed, 1 removes it."""
    dynamic_range: float
    """Decibels between black and white."""
    gamma: float
    slope: float
    """Decibels that time-gain compensation leaves uncorrected at the bottom."""
    noise: float
    """Amplitude of the electronic noise relative to the pleural line."""
    ribs: bool
    mean: float
    """Brightness of the sector of every clip, 0 to 1."""
    std: float
    """Contrast (standard deviation) of the sector of every clip."""
    aspect: float
    """Width by height of the picture."""


@dataclass(frozen=True)
class PhantomRow:
    """One line of labels.csv; `warning` is empty unless another encoder than the intended one had to be used."""

    path: str
    label: str
    patient: str
    probe: str
    warning: str = ""


@dataclass
class _World:
    """Maps under construction of the region under the pleura: depth below it `d` [R, 1], lateral position `u` [M]."""

    rng: np.random.Generator
    d: np.ndarray
    u: np.ndarray
    pleura: np.ndarray
    """[M] depth of the pleural line."""
    scatter: np.ndarray
    """[R, M] amplitude that is multiplied by speckle."""
    mirror: np.ndarray
    """[R, M] amplitude of smooth reflectors, free of speckle."""


def _smooth(rng: np.random.Generator, shape: tuple[int, int], sigma_z: float, sigma_u: float) -> np.ndarray:
    """Gaussian noise of zero mean and unit variance, float32 [rows, columns], correlated over sigma pixels each way."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    # sigma 0 means "derive it from the kernel size" to OpenCV, hence the small floor.
    noise = cv2.GaussianBlur(noise, (0, 0), max(sigma_u, 0.01), sigmaY=max(sigma_z, 0.01), borderType=cv2.BORDER_REFLECT)
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def _curve(rng: np.random.Generator, columns: int, sigma: float) -> np.ndarray:
    """Smooth random curve of zero mean and unit variance, float32 [columns]."""
    return _smooth(rng, (1, columns), 0.0, sigma)[0]


def _a_lines(world: _World, strength: float) -> None:
    """Add reverberations at multiples of the pleural depth, each weaker and broader than the one above."""
    lines = 1 / world.u.size * _WORLD
    patches = np.clip(0.75 + 0.35 * _curve(world.rng, world.u.size, 0.12 / lines), 0.15, 1.3)
    for order in range(1, 6):
        width = max(0.007 + 0.002 * order, 0.75 / world.d.size)
        echo = np.exp(-0.5 * ((world.d - order * world.pleura) / width) ** 2)
        world.mirror += strength * 0.72 ** (order - 1) * patches * echo
        # The layers above the pleura are repeated too, faint and smeared.
        smear = np.exp(-0.5 * ((world.d - (order - 0.22) * world.pleura) / (3 * width)) ** 2)
        world.scatter += 0.12 * strength * 0.6 ** (order - 1) * patches * smear


def _comet_tail(world: _World, position: float, width: float, strength: float, length: float) -> None:
    """Add one vertical artefact from the pleura downwards; `length` is the depth over which it fades (1/e)."""
    wander = 0.15 * width * _smooth(world.rng, (world.d.size, 1), world.d.size / 8, 0.0)
    spread = width * (1 + 0.5 * world.d)
    profile = np.exp(-0.5 * ((world.u - position - wander) / spread) ** 2) * np.exp(-world.d / length)
    ringing = 1 + 0.3 * np.cos(2 * np.pi * world.d / world.rng.uniform(0.025, 0.05) + world.rng.uniform(0, 6.3))
    world.scatter += strength * profile * ringing
    world.mirror += 0.35 * strength * profile


def _healthy(world: _World) -> None:
    """A-lines, and now and then a short comet tail as every healthy pleura has."""
    _a_lines(world, world.rng.uniform(0.28, 0.5))
    for _ in range(world.rng.integers(0, 3)):
        _comet_tail(world, world.rng.uniform(-0.5, 0.5) * _WORLD, 0.012, 0.15, 0.08)


def _b_lines(world: _World) -> None:
    """Three to six comet tails in view that reach the bottom; they erase the A-lines."""
    _a_lines(world, world.rng.uniform(0.015, 0.05))
    count = int(world.rng.integers(4, 7))
    start = world.rng.uniform(0, 1)
    for index in range(int(count * _WORLD)):
        position = (index + start + world.rng.uniform(-0.25, 0.25)) / count - 0.5 * _WORLD
        width = world.rng.uniform(0.007, 0.02)
        _comet_tail(world, position, width, world.rng.uniform(0.2, 0.6), world.rng.uniform(1.5, 4.0))
    # Interstitial oedema roughens the pleura itself.
    world.mirror[: max(2, world.d.size // 40)] *= np.clip(1 + 0.3 * _curve(world.rng, world.u.size, 2.0), 0.2, 2)


def _consolidation(world: _World) -> None:
    """Subpleural regions of tissue echo with a shredded lower border and bright air bronchograms."""
    rng, rows, columns = world.rng, world.d.size, world.u.size
    _a_lines(world, rng.uniform(0.02, 0.07))
    aperture = columns / _WORLD
    depth = np.zeros(columns, np.float32)
    spacing = rng.uniform(0.85, 1.0)
    for centre in np.arange(-0.5 * _WORLD + rng.uniform(-0.4, 0.4), 0.5 * _WORLD + 0.4, spacing):
        half, height = rng.uniform(0.3, 0.42), rng.uniform(0.25, 0.5)
        bump = np.clip(1 - ((world.u - centre) / half) ** 2, 0, None)
        depth = np.maximum(depth, height * bump)
    touched = np.clip(depth / 0.1, 0, 1)
    shred = 0.03 * _curve(rng, columns, 0.03 * aperture) + 0.04 * _smooth(rng, (rows, columns), 0.02 * rows, 0.025 * aperture)
    inside = depth + touched * shred - world.d
    region = 1 / (1 + np.exp(-np.clip(inside / 0.008, -30, 30)))
    # The lung beyond is aerated again: a broken bright edge, and dirty tails that fade below it.
    flecks = np.clip(0.35 + 0.7 * _smooth(rng, (rows, columns), 0.012 * rows, 0.018 * aperture), 0, 2.2)
    border = touched * flecks * np.exp(-0.5 * ((inside + 0.008) / 0.016) ** 2)
    streaks = np.clip(0.8 + 0.25 * _curve(rng, columns, 0.02 * aperture), 0.35, 1.6)
    tails = touched * streaks * np.exp(-np.clip(-inside, 0, None) / 0.4) * (1 - region)
    tissue = 0.075 * np.clip(1 + 0.35 * _smooth(rng, (rows, columns), 0.03 * rows, 0.05 * aperture), 0.3, 2)
    pleura = np.exp(-world.d / 0.02)
    world.mirror *= 1 - touched * (0.85 - 0.25 * pleura)
    world.scatter *= 1 - touched * (0.8 - 0.3 * pleura)
    world.scatter += region * tissue + 0.16 * tails
    world.mirror += 0.5 * border + region * _bronchograms(rng, depth, rows, columns)


def _bronchograms(rng: np.random.Generator, depth: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bright spots and short branching dashes where `depth` [columns] is positive; float32 [rows, columns]."""
    canvas = np.zeros((rows, columns), np.float32)
    places = np.flatnonzero(depth > 0.1)
    thickness = max(1, round(rows / 110))
    for column in rng.choice(places, min(places.size, 36), replace=False) if places.size else ():
        row = float(rng.uniform(0.15, 0.75) * depth[column] * rows)
        angle, reach = rng.uniform(-1.2, 1.2), max(0.0, rng.uniform(-0.04, 0.05)) * rows
        end = (round(float(column + reach * np.cos(angle))), round(row + reach * np.sin(angle)))
        cv2.line(canvas, (int(column), round(row)), end, float(rng.uniform(0.4, 1.3)), thickness, cv2.LINE_8)
    return cv2.GaussianBlur(canvas, (0, 0), max(0.5, rows / 260))


FINDINGS: dict[str, Callable[[_World], None]] = {
    "healthy": _healthy, "b_lines": _b_lines, "consolidation": _consolidation,
}


def _chest_wall(rng: np.random.Generator, look: Appearance, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Skin, fat with septa, fascia, striated muscle; rows run from the transducer to the pleura.

    Returns:
        Scattering and mirroring amplitudes, float32 [rows, columns] each.
    """
    aperture = columns / _WORLD
    zeta = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    bend = 0.035 * _curve(rng, columns, 0.25 * aperture) * np.sin(np.pi * zeta)
    level = zeta + bend
    deep = look.fat + 0.55 * (1 - look.fat)
    edges = [0, 0.07, 0.1, look.fat - 0.02, look.fat + 0.02, deep - 0.02, deep + 0.02, 1]
    scatter = np.interp(level, edges, [0.3, 0.26, 0.07, 0.06, 0.13, 0.12, 0.085, 0.075]).astype(np.float32)
    stripes = _smooth(rng, (rows, columns), 0.012 * rows + 0.3, 0.16 * aperture)
    septa = _smooth(rng, (rows, columns), 0.02 * rows + 0.3, 0.07 * aperture)
    muscle = (level > look.fat).astype(np.float32)
    scatter *= np.clip(1 + muscle * 0.45 * stripes, 0.3, 2.5)
    mirror = np.clip(septa - 1.3, 0, 1) * 0.16 * (1 - muscle) + np.clip(stripes - 1.2, 0, 1) * 0.14 * muscle
    for edge, strength in ((0.0, 0.5), (0.08, 0.2), (look.fat, 0.42), (deep, 0.3)):
        fascia = np.clip(0.8 + 0.35 * _curve(rng, columns, 0.1 * aperture), 0.15, 1.5)
        mirror += strength * fascia * np.exp(-0.5 * ((level - edge) / 0.018) ** 2)
    return scatter, mirror.astype(np.float32)


def _add_ribs(rng: np.random.Generator, u: np.ndarray, scatter: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """Draw rib surfaces into the chest wall maps, darken what lies behind them.

    Returns:
        What the ribs let through, 0 to 1, float32 [M].
    """
    zeta = np.linspace(0, 1, scatter.shape[0], dtype=np.float32)[:, None]
    through = np.ones(u.size, np.float32)
    spacing = rng.uniform(0.75, 1.0)
    for centre in np.arange(-0.5 * _WORLD + rng.uniform(0, spacing), 0.5 * _WORLD, spacing):
        across = (u - centre) / rng.uniform(0.075, 0.12)
        surface = rng.uniform(0.5, 0.62) + 0.16 * across**2
        near = np.clip(1.2 - np.abs(across), 0, 0.3) / 0.3
        shadow = 1 - near * 0.97 / (1 + np.exp(-np.clip((zeta - surface - 0.02) / 0.015, -30, 30)))
        scatter *= shadow
        mirror *= shadow
        mirror += 0.9 * near * np.exp(-0.5 * ((zeta - surface) / 0.03) ** 2)
        through *= 1 - 0.96 * near
    return through


def _speckle_maps(rng: np.random.Generator, look: Appearance, rows: int, columns: int) -> np.ndarray:
    """Two independent complex speckle fields, float32 [rows, columns, 4] (re, im, re, im), unit variance.

    The point-spread function is wider across the beam than along it and widens with depth.
    """
    size = look.speckle * max(rows / 160, 0.5)
    deep = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    fields = []
    for _ in range(4):
        narrow = _smooth(rng, (rows, columns), 0.5 * size, 0.8 * size)
        wide = _smooth(rng, (rows, columns), 0.65 * size, 1.9 * size)
        fields.append(np.sqrt(1 - deep) * narrow + np.sqrt(deep) * wide)
    return np.stack(fields, axis=-1)


def _scan_maps(look: Appearance, height: int, width: int, rows: int, lines: int) -> tuple[np.ndarray, ...]:
    """Where in the beam image [R, A] each picture element comes from.

    Returns:
        Line and depth sample of every picture element, float32 [H, W] each, and the sector as bool [H, W].
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if look.probe == "convex":
        angle, radius = look.half_angle, look.face_radius
        top = radius * np.cos(angle)
        # Scanners fill the height and cut the corners of the sector, but not much of it.
        widest = 1.15 * width / (2 * (radius + 1) * np.sin(angle))
        scale = min(widest, 0.98 * height / (radius + 1 - top))
        across = (x - 0.5 * (width - 1)) / scale
        down = y / scale + top - 0.01 * height / scale
        z = np.hypot(across, down) - radius
        u = np.arctan2(across, down) / (2 * angle)
    else:
        u = (x - 0.5 * (width - 1)) / (0.94 * width)
        z = (y - 0.02 * height) / (0.96 * height)
    sector = (np.abs(u) <= 0.5) & (z >= 0) & (z <= 1)
    return ((u + 0.5) * (lines - 1)).astype(np.float32), (z * (rows - 1)).astype(np.float32), sector


class PhantomClip:
    """One clip: a world of anatomy and speckle, and the pictures a wandering probe takes of it.

    Frames are computed when asked for, so memory does not grow with the length of the clip.
    """

    def __init__(self, look: Appearance, label: str, size: int, frames: int, rate: float, seed: list[int]) -> None:
        """`size` is the height of the picture, `rate` the frames a second; equal arguments give equal frames."""
        rng = np.random.default_rng(seed)
        self.look, self.frames, self.rate = look, frames, rate
        self.height, self.width = size // 2 * 2, round(size * look.aspect) // 2 * 2
        self.rows, self.lines = size, round(0.85 * size)
        columns = round(self.lines * _WORLD)
        self._u = np.linspace(-0.5 * _WORLD, 0.5 * _WORLD, columns, dtype=np.float32)
        tilt = rng.uniform(-0.03, 0.03) * self._u
        waviness = 0.012 * _curve(rng, columns, 0.3 * self.lines)
        self._pleura = (look.pleura * rng.uniform(0.94, 1.06) + tilt + waviness).astype(np.float32)
        self._build(rng, label, columns)
        self._draw_motion(rng)
        self._map_x, self._map_y, sector = _scan_maps(look, self.height, self.width, self.rows, self.lines)
        self._sector = sector.astype(np.float32)
        self._gain, self._offset = 1.0, 0.0
        self._calibrate(sector)

    def _build(self, rng: np.random.Generator, label: str, columns: int) -> None:
        look, rows = self.look, self.rows
        self._wall_rows = max(16, round(rows * look.pleura))
        wall_scatter, wall_mirror = _chest_wall(rng, look, self._wall_rows, columns)
        self._through = np.ones(columns, np.float32)
        if look.ribs:
            self._through = _add_ribs(rng, self._u, wall_scatter, wall_mirror)
        d = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
        width = max(0.009, 0.75 / rows)
        shine = np.clip(0.95 + 0.18 * _curve(rng, columns, 0.1 * self.lines), 0.4, 1.4)
        line = shine * np.exp(-0.5 * ((d - 1.2 * width) / width) ** 2)
        cloud = np.clip(1 + 0.3 * _smooth(rng, (rows, columns), 0.1 * rows, 0.15 * self.lines), 0.3, 2)
        haze = cloud * rng.uniform(0.018, 0.035) * np.exp(-d / rng.uniform(0.4, 1.0))
        world = _World(rng, d, self._u, self._pleura, haze + 0.4 * line, line)
        FINDINGS[label](world)
        self._anatomy = np.dstack(
            [np.vstack([wall_scatter, world.scatter]), np.vstack([wall_mirror, world.mirror])]
        ).astype(np.float32)
        self._speckle = _speckle_maps(rng, look, rows, columns)
        self._noise = np.abs(_smooth(rng, (2 * rows, 2 * self.lines), 0.5, 0.7))

    def _draw_motion(self, rng: np.random.Generator) -> None:
        """Probe, breath and heart: one value a frame. The noise map is shifted at random."""
        look, t = self.look, np.arange(self.frames) / self.rate
        direction = rng.choice([-1.0, 1.0])
        sweep = np.sin(2 * np.pi * (t / rng.uniform(14, 20) + rng.uniform(-0.12, -0.06)))
        breath = np.sin(2 * np.pi * (t * rng.uniform(0.2, 0.33) + rng.uniform(0, 1)))
        beat = np.sin(2 * np.pi * (t * rng.uniform(1.0, 1.6) + rng.uniform(0, 1))) ** 5
        self._centre = direction * rng.uniform(0.42, 0.55) * sweep
        self._slide = rng.uniform(0.025, 0.05) * breath + 0.006 * beat
        self._press = 0.012 * breath + 0.004 * beat
        # The image plane leaves its tissue slowly, and with it the speckle pattern.
        self._turn = t * rng.uniform(0.25, 0.5)
        self._shift = rng.integers(0, [self.rows, self.lines], (self.frames, 2))
        z = np.linspace(0, 1, self.rows, dtype=np.float32)[:, None]
        knots = np.interp(z, np.linspace(0, 1, 8), rng.normal(0, 0.8, 8))
        across = np.linspace(-1, 1, self.lines, dtype=np.float32)
        decibels = look.slope * z + knots - rng.uniform(1, 6) * np.abs(across) ** 4
        self._compensation = (10 ** (decibels / 20)).astype(np.float32)
        # Smooth reflectors answer best where the beam meets them at a right angle, in the middle of the picture.
        self._facing = 1 - rng.uniform(0.3, 0.75) * across**2
        self._floor = (look.noise * 10 ** (0.5 * z)).astype(np.float32)

    def _beam_image(self, index: int) -> np.ndarray:
        """Log-compressed echo amplitude of frame `index`, float32 [R, A], 0 to 1."""
        z = np.linspace(0, 1, self.rows, dtype=np.float32)[:, None]
        u = np.linspace(-0.5, 0.5, self.lines, dtype=np.float32) + self._centre[index]
        pleura = (np.interp(u, self._u, self._pleura) + self._press[index]).astype(np.float32)
        below = z > pleura
        column = (u + below * self._slide[index] + 0.5 * _WORLD) * ((self._u.size - 1) / _WORLD)
        row = np.where(below, self._wall_rows + (z - pleura) * (self.rows - 1), z / pleura * (self._wall_rows - 1))
        column, row = column.astype(np.float32), row.astype(np.float32)
        depth = np.broadcast_to((z + self._press[index]) * (self.rows - 1), column.shape).astype(np.float32)
        anatomy = cv2.remap(self._anatomy, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        field = cv2.remap(self._speckle, column, depth, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        cos, sin = np.float32(np.cos(self._turn[index])), np.float32(np.sin(self._turn[index]))
        mixed = cos * field[..., :2] + sin * field[..., 2:]
        # Magnitude of a circular Gaussian field is Rayleigh distributed; 1.2533 is its mean at unit variance.
        grain = cv2.magnitude(mixed[..., 0], mixed[..., 1]) / 1.2533
        grain += self.look.compounding * (1 - grain)
        through = np.interp(u, self._u, self._through).astype(np.float32)
        echo = (anatomy[..., 0] * grain + anatomy[..., 1] * self._facing) * np.where(below, through, 1) * self._compensation
        top, left = self._shift[index]
        echo += self._floor * self._noise[top : top + self.rows, left : left + self.lines]
        decibels = (20 / np.log(10)) * cv2.log(np.maximum(echo, 1e-6).astype(np.float32))
        return np.clip(1 + decibels / self.look.dynamic_range, 0, 1) ** self.look.gamma

    def _picture(self, index: int) -> np.ndarray:
        """Scan-converted frame before brightness is set, float32 [H, W]."""
        return cv2.remap(self._beam_image(index), self._map_x, self._map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def _calibrate(self, sector: np.ndarray) -> None:
        """Find gain and offset that give the sector the patient's own mean and standard deviation.

        Without this the amount of bright artefact would tell the class by brightness alone.
        """
        chosen = np.unique(np.linspace(0, self.frames - 1, _CALIBRATION_FRAMES).round().astype(int))
        values = np.concatenate([self._picture(index)[sector] for index in chosen])
        for _ in range(12):
            seen = np.clip(self._gain * values + self._offset, 0, 1)
            factor = float(np.clip(self.look.std / max(seen.std(), 1e-3), 0.5, 2.0))
            # Turn the contrast about the present mean, then move the mean where it belongs.
            self._gain *= factor
            self._offset = factor * (self._offset - seen.mean()) + self.look.mean
            self._offset += self.look.mean - np.clip(self._gain * values + self._offset, 0, 1).mean()

    def frame(self, index: int) -> np.ndarray:
        """Frame `index` as uint8 [H, W], black outside of the sector."""
        picture = np.clip(self._gain * self._picture(index) + self._offset, 0, 1) * self._sector
        return (255 * picture + 0.5).astype(np.uint8)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.frame(index) for index in range(self.frames))


def _strata(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """`count` values spread evenly over [low, high] in random order, each jittered within its stratum."""
    return low + (high - low) * (rng.permutation(count) + rng.uniform(0, 1, count)) / count


def draw_patients(params: PhantomParams) -> list[tuple[str, Appearance]]:
    """Class and appearance of every patient.

    Classes differ by at most one patient. Probe, brightness and contrast have the same distribution in every class
    (drawn in strata); everything else is drawn without looking at the class.
    """
    rng = np.random.default_rng([params.seed, 1])
    order = rng.permutation(params.patients)
    patients: dict[int, tuple[str, Appearance]] = {}
    for number, label in enumerate(CLASSES):
        members = order[number :: len(CLASSES)]
        means = _strata(rng, members.size, 0.2, 0.36)
        stds = _strata(rng, members.size, 0.15, 0.22)
        for rank, member in enumerate(members):
            look = _draw_appearance(np.random.default_rng([params.seed, 2, int(member)]), linear=rank % 3 == 1)
            patients[int(member)] = (label, replace(look, mean=float(means[rank]), std=float(stds[rank])))
    return [patients[index] for index in range(params.patients)]


def _draw_appearance(rng: np.random.Generator, linear: bool) -> Appearance:
    """One patient and scanner; brightness and contrast are placeholders for `draw_patients` to set."""
    return Appearance(
        probe="linear" if linear else "convex",
        half_angle=rng.uniform(0.38, 0.58),
        face_radius=rng.uniform(0.25, 0.55),
        pleura=rng.uniform(0.2, 0.3) if linear else rng.uniform(0.16, 0.27),
        fat=rng.uniform(0.25, 0.5),
        speckle=rng.uniform(0.8, 1.5),
        compounding=rng.uniform(0.1, 0.5),
        dynamic_range=rng.uniform(46, 60),
        gamma=rng.uniform(0.85, 1.3),
        slope=rng.uniform(-9, 0),
        noise=rng.uniform(0.002, 0.006),
        ribs=bool(rng.uniform() < 0.35),
        mean=0.25,
        std=0.15,
        aspect=float(rng.choice([1.0, 1.0, 1.0, 1.2, 0.85])),
    )


def _write_gif(path: Path, clip: PhantomClip) -> None:
    pictures = [Image.fromarray(picture) for picture in clip]
    buffer = io.BytesIO()
    # GIF counts time in hundredths of a second.
    delay = max(2, round(100 / clip.rate)) * 10
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=delay, loop=0)
    atomic_write(path, buffer.getvalue())


def _write_container(path: Path, clip: PhantomClip) -> bool:
    """Encode by OpenCV; False, and no file left, where the encoder is missing."""
    code = cv2.VideoWriter_fourcc(*_ENCODERS[path.suffix[1:]])
    writer = cv2.VideoWriter(str(path), code, clip.rate, (clip.width, clip.height))
    if not writer.isOpened():
        path.unlink(missing_ok=True)
        return False
    for picture in clip:
        writer.write(cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR))
    writer.release()
    if path.is_file() and path.stat().st_size > 0:
        return True
    path.unlink(missing_ok=True)
    return False


def _write_clip(path: Path, clip: PhantomClip) -> tuple[Path, str]:
    """Write one clip to `path`, or beside it as .avi where its encoder is missing; the path written, and a warning."""
    if path.suffix == ".gif":
        _write_gif(path, clip)
        return path, ""
    if _write_container(path, clip):
        return path, ""
    spare = path.with_suffix(".avi")
    if path != spare and _write_container(spare, clip):
        warning = f"{path.name}: no {_ENCODERS[path.suffix[1:]]} encoder here, written as {spare.name} (MJPG)"
        logger.warning(warning)
        return spare, warning
    raise DataError(
        f"{path}: OpenCV can write neither mp4v nor MJPG video here. Install the opencv-python wheel (it brings both "
        "encoders) and check that the disk is writable and not full, or point data.source at videos of your own."
    )


def _clear(folder: Path) -> None:
    """Remove an earlier set of phantoms from `folder`; anything else in it is somebody's data and is left alone."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; the phantoms need a folder of their own")
    ours = {folder / "labels.csv", *(path for pattern in _PATTERNS for path in folder.glob(pattern))}
    others = [path for path in folder.rglob("*") if path.is_file() and path not in ours]
    if others:
        raise DataError(
            f"{folder}: holds {len(others)} files that are not phantoms, such as {others[0].relative_to(folder)}. "
            "Phantoms are written to an empty folder or over earlier phantoms; move these files or name another folder."
        )
    for path in ours:
        path.unlink(missing_ok=True)


def write_phantoms(folder: Path, params: PhantomParams) -> list[PhantomRow]:
    """Write the phantom videos and, last, `labels.csv` (path, label, patient, probe) into `folder`.

    Most clips are mp4, some avi and at least one gif; some have another frame rate or aspect. File names, formats and
    rates tell nothing about class or patient. Equal parameters give equal frames.

    Returns:
        One row a clip, sorted by path.

    Raises:
        DataError: the folder holds other files, or no video encoder works.
    """
    folder = Path(folder)
    _clear(folder)
    patients = draw_patients(params)
    count = len(patients) * params.clips_per_patient
    rng = np.random.default_rng([params.seed, 3])
    names, kinds, rates = rng.permutation(count), rng.permutation(count), rng.permutation(count)
    rows = []
    for number in tqdm(range(count), desc="phantoms", unit="clip", disable=None):
        patient = number // params.clips_per_patient
        label, look = patients[patient]
        suffix = "gif" if kinds[number] == 0 else "avi" if kinds[number] % 6 == 3 else "mp4"
        rate = params.frames_per_second * (1.25 if rates[number] % 8 == 0 else 1.0)
        frames = max(2, round(params.seconds * rate))
        name = int(names[number])
        path = folder / f"part_{name // _CLIPS_A_FOLDER}" / f"clip_{name:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        clip = PhantomClip(look, label, params.size, frames, rate, [params.seed, 4, number])
        path, warning = _write_clip(path, clip)
        rows.append(PhantomRow(path.relative_to(folder).as_posix(), label, f"patient_{patient:03d}", look.probe, warning))
    rows.sort(key=lambda row: row.path)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "patient", "probe"])
    writer.writerows([row.path, row.label, row.patient, row.probe] for row in rows)
    atomic_write(folder / "labels.csv", table.getvalue())
    return rows
