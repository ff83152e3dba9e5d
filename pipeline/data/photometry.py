"""Changes of grey levels and colour, and the rarer geometric ones, of a uint8 view: pure functions on OpenCV.

Images are uint8 [H, W] or [H, W, 3] (RGB); nothing is written into an input. Grey images have no hue and no saturation, so
that such changes leave them as they are. Sources: torchvision's ColorJitter (factors), USCL (arXiv 2011.13066, the options
its published program leaves off), Models Genesis (non-linear intensity, outpainting), BYOL (solarisation).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

__all__ = [
    "SHARPEN_LEVELS", "adjust", "bezier_choice", "bezier_map", "curve", "cut_out", "grayscale", "outpaint", "sharpen", "solarize", "warp",
]

SHARPEN_LEVELS = {
    -1: ((-1, -0.5, -1), (-0.5, 3, -0.5), (-1, -0.5, -1)),
    1: ((1, -2, 1), (-2, 5, -2), (1, -2, 1)),
    2: ((0, -2 / 7, 0), (-2 / 7, 19 / 7, -2 / 7), (0, -2 / 7, 0)),
    3: ((0, -1, 0), (-1, 5, -1), (0, -1, 0)),
    4: ((-1, -1, -1), (-1, 9, -1), (-1, -1, -1)),
    5: ((-1, -4, -1), (-4, 21, -4), (-1, -4, -1)),
}
"""Kernels of USCL by level; each is divided by its own sum."""
LEVELS = np.arange(256)


def _levels(values: np.ndarray) -> np.ndarray:
    """Table of 256 real levels, rounded and cut to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _blend(image: np.ndarray, factor: float, level: float) -> np.ndarray:
    """factor x image + (1 - factor) x level, rounded and cut."""
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * level)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image


def grayscale(image: np.ndarray) -> np.ndarray:
    """The image without its colour, in as many channels as before."""
    return cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB) if image.ndim == 3 else image


def adjust(image: np.ndarray, change: str, amount: float) -> np.ndarray:
    """One change of torchvision's ColorJitter: a factor of brightness, contrast or saturation, or a shift of the hue in turns.

    Contrast turns about the mean grey level of the image, saturation about the grey image.
    """
    if change == "brightness":
        return _blend(image, amount, 0)
    if change == "contrast":
        return _blend(image, amount, int(cv2.mean(_grey(image))[0] + 0.5))
    if image.ndim == 2:
        return image
    if change == "saturation":
        return cv2.addWeighted(image, amount, grayscale(image), 1 - amount, 0)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(amount * 256) % 256)  # a circle of 256 steps: the sum wraps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Levels from `threshold` on inverted."""
    return cv2.LUT(image, np.where(threshold <= LEVELS, 255 - LEVELS, LEVELS).astype(np.uint8))


def sharpen(image: np.ndarray, level: int) -> np.ndarray:
    """USCL's sharpening, -1 or 1 to 5; 0 changes nothing. The outermost pixels stay, as in Pillow's kernel filter."""
    if not level:
        return image
    kernel, out = np.array(SHARPEN_LEVELS[level]), image.copy()
    # Pillow rounds halves up, OpenCV to even: the small delta puts sums that end in a half on Pillow's side.
    out[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / kernel.sum(), delta=1e-4)[1:-1, 1:-1]
    return out


def bezier_choice(draws: Sequence[float], probability: float) -> tuple[np.ndarray, bool] | None:
    """(two inner control points [2, 2], decreasing) of the map that six uniform numbers choose, or None for no map.

    Order of the numbers, as USCL draws them: gate, x and y of the first point, x and y of the second, direction.
    """
    if draws[0] >= probability:
        return None
    return np.array(draws[1:5], np.float64).reshape(2, 2), draws[5] < 0.5


def bezier_map(values: np.ndarray, control: np.ndarray, decreasing: bool) -> np.ndarray:
    """Cubic Bezier curve through (0, 0), two control points [2, 2] and (1, 1) as a map of intensities in [0, 1]. float64.

    The curve is sampled at 1000 parameters, from (1, 1) to (0, 0). Abscissae are sorted upwards; ordinates too, or left in the
    curve's order, which makes a decreasing map (Models Genesis, as USCL has it).
    """
    t = np.linspace(0, 1, 1000)[:, None]
    points = np.concatenate([[[0.0, 0.0]], control, [[1.0, 1.0]]])
    weights = np.hstack([t**3, 3 * t**2 * (1 - t), 3 * t * (1 - t) ** 2, (1 - t) ** 3])
    x, y = (weights @ points).T
    return np.interp(values, np.sort(x), y if decreasing else np.sort(y))


def curve(image: np.ndarray, control: np.ndarray, decreasing: bool) -> np.ndarray:
    """`bezier_map` of the levels of an image."""
    return cv2.LUT(image, _levels(255 * bezier_map(LEVELS / 255, control, decreasing)))


def cut_out(image: np.ndarray, centres: Sequence[Sequence[int]], side: int, level: int = 0) -> np.ndarray:
    """Squares set to `level`: rows y - h to y + h (without the last), columns likewise, h = side // 2. Any [H, W, ...] array.

    centres: (y, x) each. An odd side loses a pixel, as in the published Cutout (arXiv 1708.04552).
    """
    out, half = image.copy(), side // 2
    for y, x in centres:
        out[max(0, y - half) : y + half, max(0, x - half) : x + half] = level
    return out


def outpaint(image: np.ndarray, rng: np.random.Generator, windows: int = 5) -> np.ndarray:
    """Noise with `windows` windows of the image in it, each 4/7 to 3/7 of the sides smaller (Models Genesis)."""
    (height, width), out = image.shape[:2], rng.integers(0, 256, image.shape, np.uint8)
    for _ in range(windows):
        w, h = (side - int(rng.integers(3 * side // 7, 4 * side // 7 + 1)) for side in (width, height))
        x, y = (int(rng.integers(3, side - inner - 2)) for side, inner in ((width, w), (height, h)))
        out[y : y + h, x : x + w] = image[y : y + h, x : x + w]
    return out


def warp(image: np.ndarray, matrix: np.ndarray, level: int = 0) -> np.ndarray:
    """Linear map [2, 2] and shift [2, 1] in pixels about the middle, x first; what comes from outside gets `level`."""
    height, width = image.shape[:2]
    middle = np.array([[width - 1], [height - 1]]) / 2
    matrix = np.asarray(matrix, np.float64)
    moved = np.hstack([matrix[:, :2], middle - matrix[:, :2] @ middle + matrix[:, 2:]])
    return cv2.warpAffine(image, moved, (width, height), flags=cv2.INTER_LINEAR, borderValue=(level,) * 3)
