"""Random views of a frame: drawn from a given generator, rendered by OpenCV on uint8, normalised on the device.

OpenCV on uint8 is the fastest way measured (a tenth of the CPU time of torchvision's PIL transforms), releases the GIL,
and sends a quarter of the bytes to a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.parameters import AugmentationParams
from pipeline.registry import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

__all__ = ["STATISTICS", "View", "draw_view", "evaluation_view", "normalize", "render", "resize_frame", "working_size"]

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "uscl": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


@dataclass(frozen=True)
class View:
    """One way to look at a frame: crop box in pixels of the working frame, flip, gain, offset, blur."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False
    gain: float = 1.0
    offset: float = 0.0
    """Added after the gain, in grey levels of 0 to 255."""
    sigma: float = 0.0
    """Gaussian blur in pixels of the view; 0 for none."""


def working_size(augmentation: AugmentationParams, image_size: int) -> int:
    """Short side, in pixels, at which frames are held: room for a zoom where crops are resized, else the image size."""
    return round(image_size * augmentation.margin) if augmentation.crop == "resized" else image_size


def resize_frame(frame: np.ndarray, size: int, mode: str = "short_side") -> np.ndarray:
    """Bring a frame to working size: uint8 [H, W] or [H, W, 3] -> short side = `size`, or `size` x `size` (`square`).

    Area averaging when shrinking (linear interpolation aliases beyond a factor of two), linear when enlarging.
    """
    height, width = frame.shape[:2]
    if mode == "square":
        target = (size, size)
    else:
        scale = size / min(height, width)
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
    if target == (width, height):
        return frame
    shrinks = target[0] < width or target[1] < height
    return cv2.resize(frame, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _crop_box(
    augmentation: AugmentationParams, rng: np.random.Generator, shape: tuple[int, int], size: int
) -> tuple[int, int, int, int]:
    """left, top, width, height of a random crop inside a frame of `shape` (height, width)."""
    height, width = shape
    if augmentation.crop == "center":
        return (width - size) // 2, (height - size) // 2, size, size
    if augmentation.crop == "random":
        return int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1)), size, size
    (smallest, largest), (low, high) = augmentation.scale, map(math.log, augmentation.ratio)
    for _ in range(10):
        zoom, aspect = rng.random(2).tolist()
        area = height * width * (smallest + (largest - smallest) * zoom)
        ratio = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side, side


def draw_view(augmentation: AugmentationParams, rng: np.random.Generator, shape: tuple[int, int], size: int) -> View:
    """Draw one view of a working frame of `shape` (height, width) for images of `size` pixels.

    Always draws the same number of decisions behind the crop, so that switching one option leaves the others alone.
    """
    left, top, width, height = _crop_box(augmentation, rng, shape, size)
    flip, jitter, blur, gain, offset, sigma = rng.random(6).tolist()
    contrast, brightness = augmentation.contrast, augmentation.brightness
    jittered = jitter < augmentation.jitter
    return View(
        left, top, width, height,
        flip=flip < augmentation.horizontal_flip,
        gain=1 + contrast * (2 * gain - 1) if jittered else 1.0,
        offset=64 * brightness * (2 * offset - 1) if jittered else 0.0,
        sigma=(0.1 + 1.9 * sigma) * size / 224 if blur < augmentation.blur else 0.0,
    )


def evaluation_view(shape: tuple[int, int], size: int) -> View:
    """The central window of a working frame whose short side is `size`."""
    height, width = shape
    return View((width - size) // 2, (height - size) // 2, size, size)


def render(frame: np.ndarray, view: View, size: int, out: np.ndarray) -> None:
    """Write one view into `out`. frame uint8 [H, W] or [H, W, 3] -> out uint8 [size, size] or [size, size, 3]."""
    image = frame[view.top : view.top + view.height, view.left : view.left + view.width]
    if image.shape[:2] != (size, size):
        # Linear: the working size keeps the shrink below two, where area averaging would cost seven times as much.
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    if view.flip:
        image = cv2.flip(image, 1)
    if view.gain != 1.0 or view.offset != 0.0:
        # The gain turns about the mid grey, so that contrast does not also brighten. addWeighted with a second weight
        # of zero is OpenCV's saturating scale and shift: 5 to 28 times faster than arithmetic on float arrays.
        image = cv2.addWeighted(image, view.gain, image, 0, 128 * (1 - view.gain) + view.offset)
    if view.sigma > 0.2:
        # The taps of cv2.GaussianBlur (3 sigma to each side), 1.5 to 3 times faster and within one grey level of it.
        kernel = cv2.getGaussianKernel(round(6 * view.sigma + 1) | 1, view.sigma)
        image = cv2.sepFilter2D(image, -1, kernel, kernel)
    out[...] = image


def normalize(images: torch.Tensor, statistics: str = "imagenet", dtype: torch.dtype | None = None) -> torch.Tensor:
    """uint8 [..., H, W] (grey) or [..., H, W, 3] -> float [..., 3, H, W] on the same device; grey fills three channels.

    `imagenet`: (x / 255 - mean) / std per channel; `uscl`: (x / 255 - 0.5) / 0.25.
    """
    mean, std = STATISTICS[statistics]
    dtype = dtype or torch.float32
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=images.device).view(3, 1, 1)
    offsets = [-m / s for m, s in zip(mean, std, strict=True)]
    shift = torch.tensor(offsets, dtype=dtype, device=images.device).view(3, 1, 1)
    colour = images.movedim(-1, -3) if images.ndim >= 4 and images.shape[-1] == 3 else images.unsqueeze(-3)
    return colour.to(dtype) * scale + shift
