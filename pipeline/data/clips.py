"""Which frames of a video make a training sample: UCL's anchor, positive and negatives, and USCL's interpolated pairs.

Pure functions of numbers and arrays; no state. Sources: Basu et al., MICCAI 2022 (UCL); Chen et al., MICCAI 2021 (USCL).
Letters: N frames of the video, a anchor index, r positive radius, [low, high] distance window as fractions of N.
`ViewRule` says how a role's frames are rendered; `ClipBatch` is what the loader hands to a method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.parameters import AugmentationParams, Section

if TYPE_CHECKING:
    import torch

__all__ = [
    "ClipBatch", "PairParams", "ViewRule", "anchor_interval", "decay_factor", "distance_window", "draw_indices", "draw_pair", "interpolate",
    "mixed_pair", "negative_candidates", "pair_views", "positive_candidates", "sample_triple", "sample_weights", "two_frames",
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


def two_frames(num_frames: int, radius: int | None, rng: np.random.Generator) -> np.ndarray:
    """A frame, and another at most `radius` away (None: anywhere in the video). int64 [2].

    Both are the same frame with radius 0, and in a video of one frame.
    """
    first = int(rng.integers(num_frames))
    if radius == 0 or num_frames == 1:
        return np.repeat(first, 2)
    return np.append(first, draw_indices(positive_candidates(num_frames, first, radius or num_frames), 1, rng))


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


class PairParams(Section):
    """Sample-pair generation (USCL, Chen et al., MICCAI 2021; the `meta` variant: Meta-USCL of the same authors).

    A view is weight * boundary + (1 - weight) * anchor, where two boundary frames share one anchor frame.
    """

    variant: Literal["official", "two_coefficients", "meta"] = "official"
    """`official`: any three frames in any order, one weight for both views; `two_coefficients`: the same with a weight a view;
    `meta`: the anchor lies between the two others, a weight a view, and both frames of a view are augmented alike."""
    alpha: float | None = Field(None, gt=0)
    """Beta(alpha, beta) of the coefficient; null is the variant's own: 0.5 and 0.5 of the boundary frame, `meta` 3 and 5 of the anchor."""
    beta: float | None = Field(None, gt=0)
    min_gap: int = Field(0, ge=0)
    """Frames between any two of the three are at least this far apart (shrunk where a video is too short for it)."""
    max_gap: int | None = Field(None, ge=2)
    """Largest distance of any two of the three frames; null for no limit."""
    shared_anchor_augmentation: bool = True
    """Both views mix in one and the same view of the anchor frame, as published; `meta` always makes a view for each."""

    @model_validator(mode="after")
    def _fits(self) -> PairParams:
        if (self.alpha is None) != (self.beta is None):
            raise ValueError("alpha and beta must both be numbers or both be null")
        if self.max_gap is not None and self.max_gap < 2 * self.min_gap:
            raise ValueError(f"max_gap ({self.max_gap}) must be at least twice min_gap ({self.min_gap}): three frames must fit into it")
        return self


def sample_triple(params: PairParams, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Frame numbers (boundary 1, boundary 2, anchor) of one sample. int64 [3]; needs at least 3 frames.

    Uniform over all ordered triples of distinct frames that keep the gaps. `meta`: boundary 1 < anchor < boundary 2, the pair
    of offsets from boundary 1 uniform, then the start uniform.
    """
    gap = max(1, min(params.min_gap, (num_frames - 1) // 2))
    spans = np.arange(2 * gap, min(num_frames - 1, params.max_gap or num_frames) + 1)
    # A span of s frames leaves s + 1 - 2 gap places for the middle frame and, in the video, num_frames - s starts.
    chances = (spans + 1 - 2 * gap) * (1 if params.variant == "meta" else num_frames - spans)
    span = int(rng.choice(spans, p=chances / chances.sum()))
    start = int(rng.integers(num_frames - span))
    middle = start + int(rng.integers(gap, span - gap + 1))
    if params.variant == "meta":
        return np.array([start, start + span, middle], np.int64)
    return rng.permutation(np.array([start, middle, start + span], np.int64))


def sample_weights(params: PairParams, rng: np.random.Generator) -> np.ndarray:
    """Weights of the boundary frame in view 1 and view 2, in [0, 1]. float64 [2]."""
    meta = params.variant == "meta"
    alpha, beta = (params.alpha, params.beta) if params.alpha and params.beta else (3.0, 5.0) if meta else (0.5, 0.5)
    drawn = rng.beta(alpha, beta, size=2)
    if meta:
        return 1 - drawn
    return np.full(2, drawn[0]) if params.variant == "official" else drawn


def draw_pair(params: PairParams, num_frames: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Everything one interpolated pair needs, for `Method.draw`; `mixed_pair` makes the two views of it.

    Returns:
        "boundary": int64 [2], the boundary frames of view 1 and 2. "anchor": int64 [1], the frame mixed into both; [2], twice
        the same frame number, without `shared_anchor_augmentation`. `meta` has instead "first" and "second", int64 [2] each:
        (boundary, anchor) of view 1 and of view 2, to be rendered alike (`pair_views`). "weight": float64 [2], the share of
        the boundary frame in view 1 and 2.

        The arrays have these sizes for every video. One of fewer than 3 frames gives weights of 1, so that nothing is
        mixed: with 2 frames the views are the two frames in random order, with 1 frame it is drawn twice (SimCLR).
    """
    if num_frames >= 3:
        first, second, anchor = sample_triple(params, num_frames, rng)
        weight = sample_weights(params, rng)
    else:
        first, second = rng.permutation(2) % num_frames
        anchor, weight = second, np.ones(2)
    if params.variant == "meta":
        return {"first": np.array([first, anchor], np.int64), "second": np.array([second, anchor], np.int64), "weight": weight}
    copies = 1 if params.shared_anchor_augmentation else 2
    return {"boundary": np.array([first, second], np.int64), "anchor": np.full(copies, anchor, np.int64), "weight": weight}


def pair_views(params: PairParams, size: int, augmentation: AugmentationParams) -> dict[str, ViewRule]:
    """View rules of the roles of `draw_pair` that are not ordinary views, for `Method.views`.

    `meta` mixes the images and augments the mixture. Both frames of a view get the same random crop, flip, grey levels and
    blur here and are mixed afterwards: the same, since these are linear, up to the rounding and clipping to 8 bits. (Changes
    of hue and the maps among the optional ones are not linear.)
    """
    if params.variant != "meta":
        return {}
    return dict.fromkeys(("first", "second"), ViewRule(size, augmentation, linked=True))


def interpolate(boundary: torch.Tensor, anchor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight * boundary + (1 - weight) * anchor on normalised images. [B, 3, H, W], [B, 3, H, W], [B] -> [B, 3, H, W]."""
    share = weight.to(boundary.dtype).view(-1, *[1] * (boundary.ndim - 1))
    return share * boundary + (1 - share) * anchor


def mixed_pair(batch: ClipBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The two views of `draw_pair`'s roles, each [B, 3, H, W]."""
    weight, frames = batch.numbers["weight"], batch.frames
    if "first" in frames:
        ends, anchors = ([frames[role][:, k] for role in ("first", "second")] for k in (0, 1))
    else:
        ends, anchors = ([frames[role][:, k] for k in (0, -1)] for role in ("boundary", "anchor"))
    return interpolate(ends[0], anchors[0], weight[:, 0]), interpolate(ends[1], anchors[1], weight[:, 1])
