"""What a phantom's probe looks at: chest wall, pleura, lung with its finding, ribs and speckle, as maps of amplitudes.

Letters: R depth samples, M columns of the world map (wider than the beam lines of one frame); depth z in parts of the
displayed depth (0 to 1), lateral position u in parts of the aperture (0 in the middle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["CLASSES", "FINDINGS", "WORLD", "World", "add_ribs", "chest_wall", "curve", "smooth", "speckle_maps"]

WORLD = 2.4
"""Width of the anatomy map in apertures: one aperture, the wandering of the probe to both sides, and sliding."""


@dataclass
class World:
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


def smooth(rng: np.random.Generator, shape: tuple[int, int], sigma_z: float, sigma_u: float) -> np.ndarray:
    """Gaussian noise of zero mean and unit variance, float32 [rows, columns], correlated over sigma pixels each way."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    # sigma 0 means "derive it from the kernel size" to OpenCV, hence the small floor.
    along, across = max(sigma_z, 0.01), max(sigma_u, 0.01)
    noise = cv2.GaussianBlur(noise, (0, 0), across, sigmaY=along, borderType=cv2.BORDER_REFLECT)
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def curve(rng: np.random.Generator, columns: int, sigma: float) -> np.ndarray:
    """Smooth random curve of zero mean and unit variance, float32 [columns]."""
    return smooth(rng, (1, columns), 0.0, sigma)[0]


def _a_lines(world: World, strength: float) -> None:
    """Add reverberations at multiples of the pleural depth, each weaker and broader than the one above."""
    patches = np.clip(0.75 + 0.35 * curve(world.rng, world.u.size, 0.12 * world.u.size / WORLD), 0.15, 1.3)
    for order in range(1, 6):
        width = max(0.007 + 0.002 * order, 0.75 / world.d.size)
        echo = np.exp(-0.5 * ((world.d - order * world.pleura) / width) ** 2)
        world.mirror += strength * 0.72 ** (order - 1) * patches * echo
        # The layers above the pleura are repeated too, faint and smeared.
        smear = np.exp(-0.5 * ((world.d - (order - 0.22) * world.pleura) / (3 * width)) ** 2)
        world.scatter += 0.12 * strength * 0.6 ** (order - 1) * patches * smear


def _comet_tail(world: World, position: float, width: float, strength: float, length: float) -> None:
    """Add one vertical artefact from the pleura downwards; `length` is the depth over which it fades (1/e)."""
    wander = 0.15 * width * smooth(world.rng, (world.d.size, 1), world.d.size / 8, 0.0)
    spread = width * (1 + 0.5 * world.d)
    profile = np.exp(-0.5 * ((world.u - position - wander) / spread) ** 2) * np.exp(-world.d / length)
    ringing = 1 + 0.3 * np.cos(2 * np.pi * world.d / world.rng.uniform(0.025, 0.05) + world.rng.uniform(0, 6.3))
    world.scatter += strength * profile * ringing
    world.mirror += 0.35 * strength * profile


def _healthy(world: World) -> None:
    """A-lines, and now and then a short comet tail as every healthy pleura has."""
    _a_lines(world, world.rng.uniform(0.28, 0.5))
    for _ in range(world.rng.integers(0, 3)):
        _comet_tail(world, world.rng.uniform(-0.5, 0.5) * WORLD, 0.012, 0.15, 0.08)


def _b_lines(world: World) -> None:
    """Three to six comet tails in view that reach the bottom; they erase the A-lines."""
    _a_lines(world, world.rng.uniform(0.015, 0.05))
    count = int(world.rng.integers(4, 7))
    start = world.rng.uniform(0, 1)
    for index in range(int(count * WORLD) + 1):
        position = (index + start + world.rng.uniform(-0.25, 0.25)) / count - 0.5 * WORLD
        width = world.rng.uniform(0.007, 0.02)
        _comet_tail(world, position, width, world.rng.uniform(0.2, 0.6), world.rng.uniform(1.5, 4.0))
    # Interstitial oedema roughens the pleura itself.
    world.mirror[: max(2, world.d.size // 40)] *= np.clip(1 + 0.3 * curve(world.rng, world.u.size, 2.0), 0.2, 2)


def _consolidation(world: World) -> None:
    """Subpleural regions of tissue echo with a shredded lower border and bright air bronchograms."""
    rng, rows, columns = world.rng, world.d.size, world.u.size
    _a_lines(world, rng.uniform(0.02, 0.07))
    aperture = columns / WORLD
    depth = np.zeros(columns, np.float32)
    spacing = rng.uniform(0.85, 1.0)
    for centre in np.arange(-0.5 * WORLD + rng.uniform(-0.4, 0.4), 0.5 * WORLD + 0.4, spacing):
        half, height = rng.uniform(0.3, 0.42), rng.uniform(0.25, 0.5)
        bump = np.clip(1 - ((world.u - centre) / half) ** 2, 0, None)
        depth = np.maximum(depth, height * bump)
    touched = np.clip(depth / 0.1, 0, 1)
    shred = 0.04 * smooth(rng, (rows, columns), 0.02 * rows, 0.025 * aperture)
    shred += 0.03 * curve(rng, columns, 0.03 * aperture)
    inside = depth + touched * shred - world.d
    region = 1 / (1 + np.exp(-np.clip(inside / 0.008, -30, 30)))
    # The lung beyond is aerated again: a broken bright edge, and dirty tails that fade below it.
    flecks = np.clip(0.35 + 0.7 * smooth(rng, (rows, columns), 0.012 * rows, 0.018 * aperture), 0, 2.2)
    border = touched * flecks * np.exp(-0.5 * ((inside + 0.008) / 0.016) ** 2)
    streaks = np.clip(0.8 + 0.25 * curve(rng, columns, 0.02 * aperture), 0.35, 1.6)
    tails = touched * streaks * np.exp(-np.clip(-inside, 0, None) / 0.4) * (1 - region)
    tissue = 0.075 * np.clip(1 + 0.35 * smooth(rng, (rows, columns), 0.03 * rows, 0.05 * aperture), 0.3, 2)
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


FINDINGS: dict[str, Callable[[World], None]] = {
    "healthy": _healthy, "b_lines": _b_lines, "consolidation": _consolidation,
}
CLASSES = tuple(FINDINGS)


def chest_wall(rng: np.random.Generator, fat: float, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Skin, fat with septa (down to the part `fat` of the wall), fascia, muscle; rows from transducer to pleura.

    Returns:
        Scattering and mirroring amplitudes, float32 [rows, columns] each.
    """
    aperture = columns / WORLD
    zeta = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    bend = 0.035 * curve(rng, columns, 0.25 * aperture) * np.sin(np.pi * zeta)
    level = zeta + bend
    deep = fat + 0.55 * (1 - fat)
    edges = [0, 0.07, 0.1, fat - 0.02, fat + 0.02, deep - 0.02, deep + 0.02, 1]
    scatter = np.interp(level, edges, [0.3, 0.26, 0.07, 0.06, 0.13, 0.12, 0.085, 0.075]).astype(np.float32)
    stripes = smooth(rng, (rows, columns), 0.012 * rows + 0.3, 0.16 * aperture)
    septa = smooth(rng, (rows, columns), 0.02 * rows + 0.3, 0.07 * aperture)
    muscle = (level > fat).astype(np.float32)
    scatter *= np.clip(1 + muscle * 0.45 * stripes, 0.3, 2.5)
    mirror = np.clip(septa - 1.3, 0, 1) * 0.16 * (1 - muscle) + np.clip(stripes - 1.2, 0, 1) * 0.14 * muscle
    for edge, strength in ((0.0, 0.5), (0.08, 0.2), (fat, 0.42), (deep, 0.3)):
        fascia = np.clip(0.8 + 0.35 * curve(rng, columns, 0.1 * aperture), 0.15, 1.5)
        mirror += strength * fascia * np.exp(-0.5 * ((level - edge) / 0.018) ** 2)
    return scatter, mirror.astype(np.float32)


def add_ribs(rng: np.random.Generator, u: np.ndarray, scatter: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """Draw rib surfaces into the chest wall maps, darken what lies behind them.

    Returns:
        What the ribs let through, 0 to 1, float32 [M].
    """
    zeta = np.linspace(0, 1, scatter.shape[0], dtype=np.float32)[:, None]
    through = np.ones(u.size, np.float32)
    spacing = rng.uniform(0.75, 1.0)
    for centre in np.arange(-0.5 * WORLD + rng.uniform(0, spacing), 0.5 * WORLD, spacing):
        across = (u - centre) / rng.uniform(0.075, 0.12)
        surface = rng.uniform(0.5, 0.62) + 0.16 * across**2
        near = np.clip(1.2 - np.abs(across), 0, 0.3) / 0.3
        shadow = 1 - near * 0.97 / (1 + np.exp(-np.clip((zeta - surface - 0.02) / 0.015, -30, 30)))
        scatter *= shadow
        mirror *= shadow
        mirror += 0.9 * near * np.exp(-0.5 * ((zeta - surface) / 0.03) ** 2)
        through *= 1 - 0.96 * near
    return through


def speckle_maps(rng: np.random.Generator, grain: float, rows: int, columns: int) -> np.ndarray:
    """Two independent complex speckle fields, float32 [rows, columns, 4] (re, im, re, im), unit variance.

    `grain` is the size of a speckle relative to the default. The point-spread function is wider across the beam than
    along it and widens with depth.
    """
    size = grain * max(rows / 160, 0.5)
    deep = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    fields = []
    for _ in range(4):
        narrow = smooth(rng, (rows, columns), 0.5 * size, 0.8 * size)
        wide = smooth(rng, (rows, columns), 0.65 * size, 1.9 * size)
        fields.append(np.sqrt(1 - deep) * narrow + np.sqrt(deep) * wide)
    return np.stack(fields, axis=-1)
