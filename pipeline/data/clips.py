"""Which frames of a video make a training sample: anchor, positive, intra-video negatives, and their distance curriculum.

Pure functions of numbers; no pixels, no state. Source: Basu et al., MICCAI 2022 (UCL). Letters: N frames of the video,
a anchor index, r positive radius, [low, high] distance window as fractions of N. `ViewRule` says
how a role's frames are rendered; `ClipBatch` is what the loader hands to a method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.parameters import AugmentationParams

if TYPE_CHECKING:
    import torch

__all__ = [
    "ClipBatch", "ViewRule", "anchor_interval", "decay_factor", "distance_window", "draw_indices", "negative_candidates", "positive_candidates",
]

Decay = Literal["cosine", "cosine_compounded", "steps", "none"]


@dataclass(frozen=True)
class ViewRule:
    """How the frames of one role become views.

    `linked`: all frames of the role in a sample share one random view (the same window, flip and grey levels), so that they
    stay comparable pixel by pixel.
    """

    size: int
    augmentation: AugmentationParams
    linked: bool = False


@dataclass
class ClipBatch:
    """One process's share of a micro-batch.

    frames: role -> float tensor [B, K, 3, H, W], normalised; K views of that role a sample.
    video: int64 [B], one number a video, the same on every process. label: int64 [B], -1 where unlabelled.
    numbers: name -> float32 tensor [B, K], the random numbers of a sample that `Method.draw` asked for.
    """

    frames: dict[str, torch.Tensor]
    video: torch.Tensor
    label: torch.Tensor
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: Any) -> ClipBatch:
        """The same batch on another device."""
        frames, numbers = ({name: x.to(device) for name, x in part.items()} for part in (self.frames, self.numbers))
        return ClipBatch(frames, self.video.to(device), self.label.to(device), numbers)


def anchor_interval(num_frames: int, anchor_range: tuple[float, float] = (0.2, 0.5)) -> tuple[int, int]:
    """Half-open integer interval [first, end) the anchor is drawn from: ceil(0.2 N) <= a <= ceil(0.5 N) - 1.

    Empty (first >= end) for very short videos; callers exclude or relax those.
    """
    return math.ceil(anchor_range[0] * num_frames), math.ceil(anchor_range[1] * num_frames)


def positive_candidates(num_frames: int, anchor: int, radius: int = 3) -> np.ndarray:
    """Indices at most `radius` frames from the anchor, the anchor itself left out. int64, ascending."""
    near = np.arange(max(0, anchor - radius), min(num_frames - 1, anchor + radius) + 1)
    return near[near != anchor]


def negative_candidates(num_frames: int, anchor: int, low: float, high: float, radius: int = 3) -> np.ndarray:
    """Frames of the same video whose distance from the anchor lies in the window [low, high] (fractions of N).

    The two sides differ by one frame and by floor against ceil at the far end, as in the published sampler, and a hard
    floor of `radius` + 1 keeps negatives apart from positives. int64, left side first; may be empty.
    """
    n, a = num_frames, anchor
    near, far_left, far_right = math.floor(low * n), math.floor(high * n), math.ceil(high * n)
    left = np.arange(max(0, min(a - far_left, a - radius - 3)), max(0, min(a - near, a - radius - 1)))
    right = np.arange(min(n, max(a + near, a + radius + 1)), min(n, max(a + far_right, a + radius + 3)))
    return np.concatenate([left, right]).astype(np.int64)


def decay_factor(epoch: int, decay_start: int, decay_epochs: int) -> float:
    """f(e) = (1 + cos(pi (e - start) / length)) / 2 from 1 at `decay_start` to 0 after `decay_epochs`; 1 before."""
    progress = min(max(epoch - decay_start, 0), decay_epochs)
    return (1.0 + math.cos(math.pi * progress / decay_epochs)) / 2.0


def distance_window(
    epoch: int,
    *,
    low: float = 0.2,
    high: float = 0.4,
    decay: Decay = "cosine",
    decay_start: int = 30,
    decay_epochs: int = 30,
    floors: tuple[float, float] | None = (0.03, 0.07),
) -> tuple[float, float]:
    """The window [low, high] of one epoch: constant, then shrinking, which makes the negatives harder.

    `cosine` multiplies the starting window by f(e). `cosine_compounded` is what the published program does: every epoch
    multiplies the current window, so that it collapses far sooner. `steps` is its table without the cosine flag:
    (0.2, 0.4), from `decay_start` (0.1, 0.15), for the last third of the decay (0.03, 0.07), scaled to `low` and `high`.
    A pure function of the epoch, so a resumed run has the same window.
    """
    if decay == "none" or epoch < decay_start:
        return low, high
    if decay == "steps":
        last = epoch >= decay_start + (2 * decay_epochs) // 3
        shrink = (0.15, 0.175) if last else (0.5, 0.375)
        return low * shrink[0], high * shrink[1]
    if decay == "cosine":
        factor = decay_factor(epoch, decay_start, decay_epochs)
    else:
        factor = math.prod(decay_factor(e, decay_start, decay_epochs) for e in range(decay_start, epoch + 1))
    now = low * factor, high * factor
    # A floor above the starting window must not widen it.
    return (max(min(floors[0], low), now[0]), max(min(floors[1], high), now[1])) if floors else now


def draw_indices(candidates: np.ndarray, count: int, rng: np.random.Generator, replacement: bool = False) -> np.ndarray:
    """`count` of the candidates, int64. Without replacement where there are enough, else (or on request) with."""
    return rng.choice(candidates, size=count, replace=replacement or len(candidates) < count).astype(np.int64)
