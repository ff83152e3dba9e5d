"""Clips and files with one planted trouble each, for the tests of what `sonoscope inspect` finds."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def speckle(count: int, seed: int = 0, size: tuple[int, int] = (160, 128)) -> np.ndarray:
    """uint8 [T, H, W]: a lit disc of smooth texture that drifts by a pixel a frame, with fresh noise; no trouble at all."""
    width, height = size
    rng = np.random.default_rng(seed)
    wide = cv2.GaussianBlur(rng.normal(0, 1, (height, width + count)).astype(np.float32), (0, 0), 4)
    wide = 110 + 45 * wide / wide.std()
    disc = cv2.circle(np.zeros((height, width), np.float32), (width // 2, height // 2), height // 2 - 4, 1.0, -1)
    frames = [(wide[:, place: place + width] + rng.normal(0, 4, (height, width))) * disc for place in range(count)]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def write_clip(path: Path, frames: np.ndarray, fps: float = 20.0) -> Path:
    """Frames [T, H, W] or [T, H, W, 3] as a video; container and codec follow the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".avi": "MJPG"}.get(path.suffix.lower(), "mp4v")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (frames.shape[2], frames.shape[1]))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame if frame.ndim == 3 else cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    writer.release()
    return path


def write_uneven_gif(path: Path, frames: np.ndarray, milliseconds: Sequence[int]) -> Path:
    """A GIF whose frames last differently long."""
    pages = [Image.fromarray(frame) for frame in frames]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=list(milliseconds), loop=0)
    return path


def turn(path: Path) -> None:
    """Write a rotation by 90 degrees into the track header of an MP4."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"tkhd") + 4 + 40
    raw[start: start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


def add_sound(path: Path) -> None:
    """Append the header of a sound track to the boxes of an MP4 whose `moov` is the last box."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"moov") - 4
    box = struct.pack(">I4s", 24, b"udta") + b"hdlr" + bytes(8) + b"soun"
    raw[start: start + 4] = struct.pack(">I", int.from_bytes(raw[start: start + 4], "big") + len(box))
    path.write_bytes(raw + box)


def stretch(path: Path, across: int, down: int) -> None:
    """Write a sample aspect ratio into an MP4 whose `moov` is the last box: a `pasp` box at the end of the sample entry."""
    raw, box = bytearray(path.read_bytes()), struct.pack(">I4sII", 16, b"pasp", across, down)
    places, inside = [], 0
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"mp4v"):
        inside = raw.index(name, inside)
        places.append(inside - 4)
    end = places[-1] + int.from_bytes(raw[places[-1]: places[-1] + 4], "big")
    for place in places:
        raw[place: place + 4] = struct.pack(">I", int.from_bytes(raw[place: place + 4], "big") + len(box))
    path.write_bytes(raw[:end] + box + raw[end:])
