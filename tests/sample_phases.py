"""A tiny set of endoscopy videos with a phase a frame: a coloured disc on black whose colour and texture tell the phase."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

PHASES = ("Preparation", "Dissection", "Packaging")
COLOURS = ((60, 60, 200), (60, 200, 60), (200, 60, 60))
RATE = 5
"""Annotation rows to a stored picture."""


def disc(phase: int, rng: np.random.Generator, width: int = 72, height: int = 48) -> np.ndarray:
    """uint8 BGR [H, W, 3]: a disc of the phase's colour with noise, black around it."""
    picture = np.zeros((height, width, 3), np.uint8)
    colour = tuple(int(c) for c in np.clip(np.array(COLOURS[phase]) + rng.integers(-30, 30, 3), 0, 255))
    cv2.circle(picture, (width // 2 + int(rng.integers(-3, 3)), height // 2), height // 2, colour, -1)
    noisy = picture + (picture.sum(2, keepdims=True) > 0) * rng.integers(-12, 12, picture.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def write_phase_videos(root: Path, videos: int = 6, ending: str = "\n") -> list[list[int]]:
    """Cholec80's layout: frames/videoNN/videoNN_FFFFFF.png and phase_annotations/videoNN-phase.txt; returns the phase of every picture."""
    truth = []
    for video in range(1, videos + 1):
        rng = np.random.default_rng(video)
        lengths = rng.integers(2, 5, 3)
        order = [0, 1, 0, 2] if video % 2 else [0, 1, 2]
        phases = [phase for place, phase in enumerate(order) for _ in range(int(lengths[place % 3]))]
        folder = root / f"frames/video{video:02d}"
        folder.mkdir(parents=True)
        for number, phase in enumerate(phases, start=1):
            cv2.imwrite(str(folder / f"video{video:02d}_{number:06d}.png"), disc(phase, rng))
        rows = [f"{frame}\t{PHASES[phases[frame // RATE]]}" for frame in range(RATE * (len(phases) - 1) + 1)]
        annotation = root / f"phase_annotations/video{video:02d}-phase.txt"
        annotation.parent.mkdir(exist_ok=True)
        # No newline at the end, as some of the published files.
        annotation.write_bytes(ending.join(["Frame\tPhase", *rows]).encode())
        truth.append(phases)
    return truth
