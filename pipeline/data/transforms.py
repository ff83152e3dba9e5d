"""Random views of a frame: drawn from a given generator, rendered by OpenCV on uint8, normalised on the device.

OpenCV on uint8 is the fastest way measured (a tenth of the CPU time of torchvision's PIL transforms), releases the GIL,
and sends a quarter of the bytes to a GPU. What a view has beyond crop, flip, brightness, contrast and blur is its `Look`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from pipeline.data import photometry, randaugment
from pipeline.parameters import AugmentationParams
from pipeline.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from PIL import Image
else:
    torch = LazyModule("torch")
    Image = LazyModule("PIL.Image")

__all__ = [
    "STATISTICS", "Look", "View", "content_box", "draw_view", "evaluation_view", "frame_view", "normalize", "render", "resize_frame",
    "working_size",
]

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "uscl": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Look:
    """The rarer changes of a view, in the order in which they are made (blur comes before `solarize`)."""

    sharpen: int = 0
    move: tuple[float, float, float] | None = None
    """Rotation in degrees, shift in x and in y as fractions of the side."""
    jitter: tuple[tuple[str, float], ...] = ()
    """Changes of `photometry.adjust`."""
    grayscale: bool = False
    solarize: bool = False
    layers: tuple[tuple[str, float, float, float], ...] = ()
    """Of `randaugment.apply_layers`."""
    curve: tuple[np.ndarray, bool] | None = None
    """Of `photometry.bezier_map`."""
    holes: tuple[tuple[int, int], ...] = ()
    """Centres (y, x) of black squares of `hole_side` pixels."""
    hole_side: int = 0
    outpaint: int | None = None
    """Seed of the noise and its windows."""


class View(NamedTuple):
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
    look: Look | None = None


def working_size(augmentation: AugmentationParams, image_size: int) -> int:
    """Short side, in pixels, at which frames are held: room for a zoom where crops are resized, else the image size."""
    return round(image_size * augmentation.margin) if augmentation.crop == "resized" else image_size


def resize_frame(frame: np.ndarray, size: int, mode: str = "short_side") -> np.ndarray:
    """Bring a frame to working size: uint8 [H, W] or [H, W, 3] -> short side = `size`, or `size` x `size` (`square`).

    Area averaging when shrinking (linear interpolation aliases beyond a factor of two), linear when enlarging. `square`
    is what the published recipes do: Pillow's bilinear filter, to the bit.
    """
    height, width = frame.shape[:2]
    if mode == "square":
        if (height, width) == (size, size):
            return frame
        return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))
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


def content_box(frame: np.ndarray, darkest: float = 8.0) -> tuple[int, int, int, int]:
    """left, top, width, height of a frame without its black border: outer rows and columns with a mean grey below `darkest`.

    A side is left whole where more than half of it would go: a dark picture has no border.
    """
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if frame.ndim == 3 else frame
    box = []
    for axis, length in ((0, frame.shape[1]), (1, frame.shape[0])):
        means = cv2.reduce(grey, axis, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel()
        lit = np.flatnonzero(means >= darkest)
        first, end = (int(lit[0]), int(lit[-1]) + 1) if len(lit) else (0, 0)
        box.append((first, end - first) if end - first >= length / 2 else (0, length))
    (left, width), (top, height) = box
    return left, top, width, height


def _draw_look(augmentation: AugmentationParams, rng: np.random.Generator, size: int, jittered: bool) -> Look:
    """The rarer changes. One block of numbers with a place for each option, so that options do not disturb one another."""
    numbers, optional = rng.random(24).tolist(), augmentation.optional
    seeds = [int(number * 2**53) for number in numbers[20:23]]
    amounts = {
        "brightness": 1 + augmentation.brightness * (2 * numbers[0] - 1), "contrast": 1 + augmentation.contrast * (2 * numbers[1] - 1),
        "saturation": 1 + augmentation.saturation * (2 * numbers[2] - 1), "hue": augmentation.hue * (2 * numbers[3] - 1),
    }
    order = ["saturation", "hue"]  # the linear style has made brightness and contrast with the gain and the offset
    if augmentation.jitter_style == "torchvision":
        order = [list(amounts)[i] for i in np.argsort(numbers[4:8])]
    angle, x, y = (2 * number - 1 for number in numbers[8:11])
    holes: tuple[tuple[int, int], ...] = ()
    if optional.cutout_holes:
        places = np.random.default_rng(seeds[0]).integers(0, size, (optional.cutout_holes, 2))
        holes = tuple((int(y), int(x)) for y, x in places)
    return Look(
        sharpen=optional.sharpen,
        move=(optional.rotation * angle, optional.shift * x, optional.shift * y) if optional.rotation or optional.shift else None,
        jitter=tuple((name, amounts[name]) for name in order if getattr(augmentation, name)) if jittered else (),
        grayscale=numbers[11] < augmentation.grayscale,
        solarize=numbers[12] < augmentation.solarize,
        layers=randaugment.draw_layers(optional.randaugment, np.random.default_rng(seeds[1])) if optional.randaugment else (),
        curve=photometry.bezier_choice(numbers[13:19], optional.bezier),
        holes=holes,
        hole_side=round(optional.cutout_side * size / 224),
        outpaint=seeds[2] if numbers[19] < optional.outpaint else None,
    )


def draw_view(
    augmentation: AugmentationParams, rng: np.random.Generator, shape: tuple[int, int], size: int, image_size: int | None = None
) -> View:
    """Draw one view of a working frame of `shape` (height, width) for images of `size` pixels.

    Always draws the same number of decisions behind the crop, so that switching one option leaves the others alone; the
    rarer options draw theirs behind those, and only where one of them is on.

    `image_size` (None: `size`) is that of the method's ordinary views: the blur, 0.1 to 2 pixels at 224, is scaled to it, so
    that small crops are blurred by as many pixels as large ones, as published (MSN, DINO).
    """
    left, top, width, height = _crop_box(augmentation, rng, shape, size)
    flip, jitter, blur, gain, offset, sigma = rng.random(6).tolist()
    contrast, brightness = augmentation.contrast, augmentation.brightness
    jittered = jitter < augmentation.jitter
    linear = jittered and augmentation.jitter_style == "linear"
    return View(
        left, top, width, height,
        flip=flip < augmentation.horizontal_flip,
        gain=1 + contrast * (2 * gain - 1) if linear else 1.0,
        offset=64 * brightness * (2 * offset - 1) if linear else 0.0,
        sigma=(0.1 + 1.9 * sigma) * (image_size or size) / 224 if blur < augmentation.blur else 0.0,
        look=None if augmentation.plain else _draw_look(augmentation, rng, size, jittered),
    )


def frame_view(
    augmentation: AugmentationParams, rng: np.random.Generator, frame: np.ndarray, size: int, image_size: int | None = None
) -> View:
    """Draw one view of a working frame: `draw_view`, inside its content where the black border is to be left out."""
    if not augmentation.optional.trim_border:
        return draw_view(augmentation, rng, frame.shape[:2], size, image_size)
    left, top, width, height = content_box(frame)
    view = draw_view(augmentation, rng, (height, width), size, image_size)
    return view._replace(left=view.left + left, top=view.top + top)


def evaluation_view(shape: tuple[int, int], size: int) -> View:
    """The central window of a working frame whose short side is `size`."""
    height, width = shape
    return View((width - size) // 2, (height - size) // 2, size, size)


def render(frame: np.ndarray, view: View, size: int, out: np.ndarray) -> None:
    """Write one view into `out`. frame uint8 [H, W] or [H, W, 3] -> out uint8 [size, size] or [size, size, 3]."""
    image = frame[view.top : view.top + view.height, view.left : view.left + view.width]
    if image.shape[:2] != (size, size):
        # Linear: the working size keeps the shrink below two, where area averaging would cost seven times as much. Only
        # small views of frames that are held for larger ones shrink more.
        far = view.width > 2 * size and view.height > 2 * size
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if far else cv2.INTER_LINEAR)
    if view.flip:
        image = cv2.flip(image, 1)
    if view.gain != 1.0 or view.offset != 0.0:
        # The gain turns about the mid grey, so that contrast does not also brighten. addWeighted with a second weight
        # of zero is OpenCV's saturating scale and shift: 5 to 28 times faster than arithmetic on float arrays.
        image = cv2.addWeighted(image, view.gain, image, 0, 128 * (1 - view.gain) + view.offset)
    if view.look is not None:
        image = _before_blur(image, view.look)
    if view.sigma > 0.2:
        # The taps of cv2.GaussianBlur (3 sigma to each side), 1.5 to 3 times faster and within one grey level of it.
        kernel = cv2.getGaussianKernel(round(6 * view.sigma + 1) | 1, view.sigma)
        image = cv2.sepFilter2D(image, -1, kernel, kernel)
    if view.look is not None:
        image = _behind_blur(image, view.look)
    out[...] = image


def _before_blur(image: np.ndarray, look: Look) -> np.ndarray:
    """Sharpening, rotation and shift, colour."""
    image = photometry.sharpen(image, look.sharpen)
    if look.move:
        angle, x, y = look.move
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        image = photometry.warp(image, np.array([[cos, sin, x * image.shape[1]], [-sin, cos, y * image.shape[0]]]))
    for name, amount in look.jitter:
        image = photometry.adjust(image, name, amount)
    return photometry.grayscale(image) if look.grayscale else image


def _behind_blur(image: np.ndarray, look: Look) -> np.ndarray:
    """Solarisation, RandAugment, non-linear intensity, holes, outpainting."""
    image = photometry.solarize(image) if look.solarize else image
    image = randaugment.apply_layers(image, look.layers)
    if look.curve:
        image = photometry.curve(image, *look.curve)
    if look.holes:
        image = photometry.cut_out(image, look.holes, look.hole_side)
    return image if look.outpaint is None else photometry.outpaint(image, np.random.default_rng(look.outpaint))


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
