"""Small videos, stills and frame folders made on the spot for the tests of the intake.

Every frame shows its own number (0 to 63) as two grey levels, so that a test can tell which frame it got.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mov": "mp4v"}


def picture(index: int, size: tuple[int, int] = (64, 48), seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: `index` in base 8 as a level per half, and a patch that depends on `seed` so that files differ.

    Levels are 32 apart: lossy codecs leave out small changes between frames.
    """
    width, height = size
    frame = np.full((height, width, 3), 16 + 32 * (index // 8), np.uint8)
    frame[:, width // 2:] = 16 + 32 * (index % 8)
    frame[:8, :8] = np.random.default_rng(seed).integers(0, 255, 3)
    return frame


def number(frame: np.ndarray) -> int:
    """The number a grey frame of `picture` shows."""
    width = frame.shape[1]
    parts = (frame[12:, 2: width // 2 - 4], frame[12:, width // 2 + 4: -2])
    high, low = (round((float(part.mean()) - 16) / 32) for part in parts)
    return 8 * high + low


def write_video(path: Path, frames: int, fps: float = 10.0, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """A video of `frames` frames; codec and container follow the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # OpenCV chooses the container by the extension, so other names are made by renaming.
    suffix = path.suffix.lower() if path.suffix.lower() in CODECS else ".mp4"
    made = path.with_name(f"{path.stem}-writing{suffix}")
    writer = cv2.VideoWriter(str(made), cv2.VideoWriter_fourcc(*CODECS[suffix]), fps, size)
    assert writer.isOpened()
    for index in range(frames):
        writer.write(picture(index, size, seed))
    writer.release()
    made.rename(path)
    return path


def write_gif(path: Path, frames: int, milliseconds: int = 100) -> Path:
    """An animated GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [Image.fromarray(picture(index)) for index in range(frames)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=milliseconds, loop=0)
    return path


def write_frame_folder(folder: Path, frames: int, pattern: str = "{:05d}.jpg") -> Path:
    """A folder of numbered images."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(frames):
        cv2.imwrite(str(folder / pattern.format(index)), picture(index))
    return folder


def write_image(path: Path, index: int = 0, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """One still image in the format of the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture(index, size, seed))
    return path
