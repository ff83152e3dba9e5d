"""RandAugment of the published phase recognition (EndoSSL's fine-tuning), on uint8 images with levels of 0 to 255.

The published program multiplies levels of 0 to 255 by 255 again before, which leaves nearly two levels only; the ranges here
are those it means. Source: arXiv 1909.13719; operations and ranges as in TensorFlow's model garden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from pipeline.data import photometry
from pipeline.parameters import RandAugmentParams

__all__ = ["OPERATIONS", "apply_layers", "draw_layers"]

FILL = 128
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
"""Kernel of the smooth image that sharpness moves away from (Pillow's)."""


def _channels(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`change` of each colour channel on its own."""
    return change(image) if image.ndim == 2 else cv2.merge([change(channel) for channel in cv2.split(image)])


def _auto_contrast(channel: np.ndarray) -> np.ndarray:
    low, high, _, _ = cv2.minMaxLoc(channel)
    return cv2.normalize(channel, None, 0, 255, cv2.NORM_MINMAX) if high > low else channel


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH)[1:-1, 1:-1]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)


def _solarize_add(image: np.ndarray, addition: float) -> np.ndarray:
    levels = np.arange(256)
    return cv2.LUT(image, np.where(levels < 128, np.minimum(levels + round(addition), 255), levels).astype(np.uint8))


def _move(image: np.ndarray, matrix: Any) -> np.ndarray:
    return photometry.warp(image, np.array(matrix, np.float64), FILL)


def _rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return _move(image, [[cos, sin, 0], [-sin, cos, 0]])


def _cutout(image: np.ndarray, reach: float, y: float, x: float) -> np.ndarray:
    height, width = image.shape[:2]
    half = round(reach * height)
    return photometry.cut_out(image, [(int(y * height), int(x * width))], 2 * half, FILL)


# Name: (largest amount, at magnitude 10; whether it may turn negative; what it does). Lengths are fractions of the side.
OPERATIONS: dict[str, tuple[float, bool, Callable[[np.ndarray, float, float, float], np.ndarray]]] = {
    "identity": (0.0, False, lambda image, a, y, x: image),
    "auto_contrast": (0.0, False, lambda image, a, y, x: _channels(image, _auto_contrast)),
    "equalize": (0.0, False, lambda image, a, y, x: _channels(image, cv2.equalizeHist)),
    "rotate": (30.0, True, lambda image, a, y, x: _rotate(image, a)),
    "color": (1.8, False, lambda image, a, y, x: photometry.adjust(image, "saturation", a + 0.1)),
    "contrast": (1.8, False, lambda image, a, y, x: photometry.adjust(image, "contrast", a + 0.1)),
    "brightness": (1.8, False, lambda image, a, y, x: photometry.adjust(image, "brightness", a + 0.1)),
    "sharpness": (1.8, False, lambda image, a, y, x: _sharpness(image, a + 0.1)),
    "shear_x": (0.3, True, lambda image, a, y, x: _move(image, [[1, a, 0], [0, 1, 0]])),
    "shear_y": (0.3, True, lambda image, a, y, x: _move(image, [[1, 0, 0], [a, 1, 0]])),
    "translate_x": (100 / 224, True, lambda image, a, y, x: _move(image, [[1, 0, a * image.shape[1]], [0, 1, 0]])),
    "translate_y": (100 / 224, True, lambda image, a, y, x: _move(image, [[1, 0, 0], [0, 1, a * image.shape[0]]])),
    "cutout": (40 / 224, False, _cutout),
    "solarize_add": (110.0, False, lambda image, a, y, x: _solarize_add(image, a)),
}


def draw_layers(params: RandAugmentParams, rng: np.random.Generator) -> tuple[tuple[str, float, float, float], ...]:
    """What the layers do: (operation, amount, y, x) each, the last two for operations with a place, in fractions.

    Each layer picks one of the operations (no operation is one of them) and applies it with a probability drawn from 0.2
    to 0.8; five numbers a layer, whatever it picks.
    """
    layers, names = [], list(OPERATIONS)
    for which, chance, gate, y, x in rng.random((params.layers, 5)).tolist():
        name = names[int(which * len(names))]
        if gate < 0.2 + 0.6 * chance:
            largest, signed, _ = OPERATIONS[name]
            amount = largest * params.magnitude / 10
            # The sign comes from a number that only `cutout`, which has no sign, uses otherwise.
            layers.append((name, -amount if signed and y < 0.5 else amount, y, x))
    return tuple(layers)


def apply_layers(image: np.ndarray, layers: tuple[tuple[str, float, float, float], ...]) -> np.ndarray:
    """The image after all layers: uint8 [H, W] or [H, W, 3], as given."""
    for name, amount, y, x in layers:
        image = OPERATIONS[name][2](image, amount, y, x)
    return image
