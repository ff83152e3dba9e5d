"""Golden images of the published USCL program: Bezier map, Cutout, sharpening, and the way from a fold file to the network.

Checks by file name, for the suite of USCL. Tolerances: maps 1e-9, holes exact, sharpening exact but for halves that Pillow's
float32 rounds either way (one level, 1 pixel of 100), network inputs 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from golden_tools import Mismatch, close, exact, tensor

from pipeline.data.photometry import bezier_choice, bezier_map, cut_out, sharpen
from pipeline.data.transforms import normalize, resize_frame

__all__ = ["CHECKS"]

Case = dict[str, np.ndarray]


def check_bezier(case: Case, settings: dict[str, Any]) -> None:
    """`control` and `decreasing` from the numbers drawn, and the map of the intensities; none where the gate is shut."""
    choice = bezier_choice(case["draws"], settings["prob"])
    if choice is None:
        close("y", case["x"], case["y"])
        return
    control, decreasing = choice
    close("control", control, case["control"])
    exact("decreasing", decreasing, settings["decreasing"])
    close("y", bezier_map(case["x"], control, decreasing), case["y"])


def check_cutout(case: Case, settings: dict[str, Any]) -> None:
    holed = cut_out(case["image"].transpose(1, 2, 0), case["centres"], settings["side"])
    exact("output", holed.transpose(2, 0, 1), case["output"])


def check_sharpen(case: Case, settings: dict[str, Any]) -> None:
    difference = np.abs(sharpen(case["image"], settings["level"]).astype(int) - case["output"])
    if difference.max() > 1 or (difference > 0).mean() > 0.01:
        raise Mismatch(f"output: up to {difference.max()} levels apart, {(difference > 0).mean():.2%} of the values differ")


def check_preprocess(case: Case, settings: dict[str, Any]) -> None:
    """Squeezed to 224 x 224 and normalised, looked at on the stored grid. `y` only goes along with the images."""
    for image, want in zip(case["X"], case["pixels"], strict=True):
        frame = resize_frame(np.ascontiguousarray(image.transpose(1, 2, 0), dtype=np.uint8), 224, "square")
        close("pixels", normalize(tensor(frame)[None], "uscl")[0, :, 8::16, 8::16], want)


CHECKS: dict[str, Callable[[Case, dict[str, Any]], None]] = {
    "aug_bezier": check_bezier, "aug_cutout": check_cutout, "aug_sharpen": check_sharpen, "preprocess": check_preprocess,
}
"""By file name without its ending."""
