"""Cycle-Contrast, the parent of UCL: a frame's soft nearest neighbour among other videos must lead back to its own video.

Wu, Wang, "Contrastive Learning of Image Representations with Cross-Video Cycle-Consistency", ICCV 2021, arXiv 2105.06463. Two
parts: MoCo between two frames of one video, and the cycle, on a projection of its own. Frames of the own video are never
neighbours or negatives, because a small set comes round again every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from pipeline.data import clips
from pipeline.methods.base import ClipBatch, MethodContext, MethodParams, MomentumMethod, Progress, StepOutput, slow_twin_warning
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed, losses, losses_baselines
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    losses = LazyModule("pipeline.losses")
    losses_baselines = LazyModule("pipeline.losses_baselines")

__all__ = ["CycleContrast", "CycleContrastParams"]


class CycleContrastParams(MethodParams):
    """Parameters of Cycle-Contrast; the authors' flags in brackets."""

    temperature: float = Field(0.07, gt=0)
    """tau of both parts [moco-t]."""
    neighbor_temperature: float = Field(0.07, gt=0)
    """Of the weights that mix the neighbour [soft-nn-T]."""
    support_size: int = Field(256, ge=1)
    """Most similar frames that are mixed; 16384 of 81920 in the paper [soft-nn-support]."""
    cycle_weight: float = Field(0.1, ge=0)
    """Of the cycle in the sum [soft-nn-loss-weight]."""
    queue_size: int = Field(1024, ge=1)
    """Keys of other videos kept as neighbours and negatives; 81920 in the paper, for millions of videos [cycle-k]."""
    positive_radius: int | None = Field(None, ge=0)
    """The key shows a frame at most so many frames away; null: anywhere in the video, as published."""
    embedding_dim: int = Field(128, ge=2)
    momentum: float = Field(0.999, ge=0, le=1)
    batch_shuffle: bool = True

    @model_validator(mode="after")
    def _support(self) -> CycleContrastParams:
        if self.support_size > self.queue_size:
            raise ValueError(
                f"support_size ({self.support_size}) must be at most queue_size ({self.queue_size}): neighbours are mixed from the queue"
            )
        return self


@METHODS.register("cycle")
class CycleContrast(MomentumMethod):
    """InfoNCE between frames of one video plus the cross-video cycle; two projections side by side, one queue of both."""

    Params = CycleContrastParams

    def __init__(self, backbone: torch.nn.Module, params: CycleContrastParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context, params.queue_size, projections=2)
        self._chance: float | torch.Tensor = 0.0

    @classmethod
    def min_frames(cls, params: CycleContrastParams) -> int:
        return 1 if params.positive_radius == 0 else 2

    @classmethod
    def draw(
        cls, params: CycleContrastParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        return {"view": clips.two_frames(num_frames, params.positive_radius, rng)}

    @classmethod
    def check(cls, params: CycleContrastParams, context: MethodContext, videos: int) -> list[str]:
        warnings = slow_twin_warning("methods.cycle.momentum", params.momentum, context.epochs * context.steps_per_epoch)
        if videos < 2:
            warnings.append("methods.cycle: with a single video there is no neighbour in another one; nothing will be learned.")
        return warnings

    def chance_loss(self, progress: Progress) -> float | torch.Tensor:
        return self._chance

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """The queue takes the keys after the loss, so the first step has loss 0."""
        params, images = self.params, batch.frames["view"]
        query, cycle_query = self._parts(self.encode(images[:, 0]))
        key, cycle_key = self._parts(self.encode_keys(images[:, 1], progress, params.batch_shuffle))
        # Cloned: the queue is overwritten below, before the backward pass reads it.
        queue, cycle_queue = self.bank.rows.clone().chunk(2, dim=1)
        allowed = self.bank.allowed(batch.video, exclude_own=True, mask_unwritten=True)
        intra = losses.info_nce_logits(query, key, queue, params.temperature, allowed)
        back, neighbor = losses_baselines.cycle_logits(
            cycle_query, cycle_key, cycle_queue, support=params.support_size, neighbor_temperature=params.neighbor_temperature,
            temperature=params.temperature, allowed=allowed,
        )
        self._chance = (1 + params.cycle_weight) * allowed.sum(1).float().log1p().mean()
        intra_loss, cycle_loss = losses.first_column_cross_entropy(intra), losses.first_column_cross_entropy(back)
        self.bank.write(
            distributed.all_gather_rows(torch.cat([key, cycle_key], dim=1)), distributed.all_gather_rows(batch.video)
        )
        metrics = {
            "intra_loss": intra_loss.detach(), "cycle_loss": cycle_loss.detach(),
            "accuracy": (intra.argmax(1) == 0).float().mean(), "cycle_accuracy": (back.argmax(1) == 0).float().mean(),
            "neighbor_similarity": (cycle_query * neighbor).sum(1).mean().detach(),
        }
        return StepOutput(intra_loss + params.cycle_weight * cycle_loss, metrics)

    @staticmethod
    def _parts(joined: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The two projections, each of unit length. [B, 2 D] -> two [B, D]."""
        return tuple(losses.l2_normalize(part) for part in joined.chunk(2, dim=1))
