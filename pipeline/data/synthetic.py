"""Phantom lung-ultrasound videos: the embedded default data, so that the whole pipeline runs with no download.

A caricature that keeps what matters for learning: speckle, reverberation, shadows, sliding and a probe that wanders
over an anatomy wider than the picture. Not a simulator, and no substitute for patients in any conclusion.

Letters: R depth samples, A beam lines, M columns of the world map (wider than the A lines in view), H and W the
picture; depth z in parts of the displayed depth (0 to 1), lateral position u in parts of the aperture (0: middle).
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.data.anatomy import CLASSES, FINDINGS, WORLD, World, add_ribs, chest_wall, curve, smooth, speckle_maps
from pipeline.errors import DataError
from pipeline.files import atomic_write
from pipeline.parameters import PhantomParams

__all__ = ["CLASSES", "Appearance", "PhantomClip", "PhantomRow", "draw_patients", "write_phantoms"]

logger = logging.getLogger(__name__)

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
        columns = round(self.lines * WORLD)
        self._u = np.linspace(-0.5 * WORLD, 0.5 * WORLD, columns, dtype=np.float32)
        tilt = rng.uniform(-0.03, 0.03) * self._u
        waviness = 0.012 * curve(rng, columns, 0.3 * self.lines)
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
        wall_scatter, wall_mirror = chest_wall(rng, look.fat, self._wall_rows, columns)
        self._through = np.ones(columns, np.float32)
        if look.ribs:
            self._through = add_ribs(rng, self._u, wall_scatter, wall_mirror)
        d = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
        width = max(0.009, 0.75 / rows)
        shine = np.clip(0.95 + 0.18 * curve(rng, columns, 0.1 * self.lines), 0.4, 1.4)
        line = shine * np.exp(-0.5 * ((d - 1.2 * width) / width) ** 2)
        cloud = np.clip(1 + 0.3 * smooth(rng, (rows, columns), 0.1 * rows, 0.15 * self.lines), 0.3, 2)
        haze = cloud * rng.uniform(0.018, 0.035) * np.exp(-d / rng.uniform(0.4, 1.0))
        world = World(rng, d, self._u, self._pleura, haze + 0.4 * line, line)
        FINDINGS[label](world)
        self._anatomy = np.dstack(
            [np.vstack([wall_scatter, world.scatter]), np.vstack([wall_mirror, world.mirror])]
        ).astype(np.float32)
        self._speckle = speckle_maps(rng, look.speckle, rows, columns)
        self._noise = np.abs(smooth(rng, (2 * rows, 2 * self.lines), 0.5, 0.7))

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
        column = (u + below * self._slide[index] + 0.5 * WORLD) * ((self._u.size - 1) / WORLD)
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
        echo = anatomy[..., 0] * grain + anatomy[..., 1] * self._facing
        echo *= np.where(below, through, np.float32(1)) * self._compensation
        top, left = self._shift[index]
        echo += self._floor * self._noise[top : top + self.rows, left : left + self.lines]
        decibels = (20 / np.log(10)) * cv2.log(np.maximum(echo, 1e-6).astype(np.float32))
        return np.clip(1 + decibels / self.look.dynamic_range, 0, 1) ** self.look.gamma

    def _picture(self, index: int) -> np.ndarray:
        """Scan-converted frame before brightness is set, float32 [H, W]."""
        beams = self._beam_image(index)
        return cv2.remap(beams, self._map_x, self._map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

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
        relative = path.relative_to(folder).as_posix()
        rows.append(PhantomRow(relative, label, f"patient_{patient:03d}", look.probe, warning))
    rows.sort(key=lambda row: row.path)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "patient", "probe"])
    writer.writerows([row.path, row.label, row.patient, row.probe] for row in rows)
    atomic_write(folder / "labels.csv", table.getvalue())
    return rows
