"""MoCo v2: a query view attracts its momentum key and repels a queue of earlier keys.

He et al., CVPR 2020, arXiv 1911.05722; Chen et al., arXiv 2003.04297 (v2: MLP head, stronger augmentation). The queue is
a ring of any length that is kept for resuming; keys of the anchor's own video are not used as negatives by default,
because on small sets they come round again every epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from pipeline.methods.base import ClipBatch, MethodContext, MethodParams, MomentumMethod, Progress, StepOutput, slow_twin_warning
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed
    from pipeline import losses
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    losses = LazyModule("pipeline.losses")

__all__ = ["MoCo", "MoCoParams"]


class MoCoParams(MethodParams):
    """Parameters of MoCo v2."""

    temperature: float = Field(0.2, gt=0)
    embedding_dim: int = Field(128, ge=2)
    momentum: float = Field(0.999, ge=0, le=1)
    queue_size: int = Field(4096, ge=1)
    """Keys kept as negatives; 65536 in the paper, for a million images."""
    queue_exclude_own_video: bool = True
    batch_shuffle: bool = True


@METHODS.register("moco")
class MoCo(MomentumMethod):
    """InfoNCE against a queue of momentum keys."""

    Params = MoCoParams

    def __init__(self, backbone: torch.nn.Module, params: MoCoParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context, params.queue_size)
        self._chance: float | torch.Tensor = 0.0

    @classmethod
    def draw(cls, params: MoCoParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"view": np.repeat(rng.integers(num_frames), 2)}

    @classmethod
    def check(cls, params: MoCoParams, context: MethodContext, videos: int) -> list[str]:
        steps = context.epochs * context.steps_per_epoch
        warnings = slow_twin_warning("methods.moco.momentum", params.momentum, steps)
        if params.queue_size > steps * context.global_batch:
            warnings.append(
                f"methods.moco.queue_size = {params.queue_size} is larger than the {steps * context.global_batch} keys of the whole run; "
                f"unused rows are masked, so the number of negatives grows during training."
            )
        if videos < 2 and params.queue_exclude_own_video:
            warnings.append(
                "methods.moco.queue_exclude_own_video: true with a single video leaves no negatives, the loss is constantly 0. Use more "
                "videos, or set it to false."
            )
        return warnings

    def chance_loss(self, progress: Progress) -> float | torch.Tensor:
        return self._chance

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """Query on the first view, key on the second; the queue takes the keys after the loss (its first step has loss 0)."""
        params = self.params
        images = batch.frames["view"]
        q = self.encode(images[:, 0])
        key = self.encode_keys(images[:, 1], progress, params.batch_shuffle)
        allowed = self.bank.allowed(batch.video, exclude_own=params.queue_exclude_own_video, mask_unwritten=True)
        self._chance = allowed.sum(1).float().log1p().mean()
        # Cloned: the queue is overwritten below, before the backward pass reads it.
        logits = losses.info_nce_logits(q, key, self.bank.rows.clone(), params.temperature, allowed)
        self.bank.write(distributed.all_gather_rows(key), distributed.all_gather_rows(batch.video))
        metrics = {
            "accuracy": (logits.argmax(1) == 0).float().mean(),
            "positive_similarity": (q * key).sum(1).mean().detach(),
            "negatives": (self.bank.videos >= 0).float().sum(),
        }
        return StepOutput(losses.first_column_cross_entropy(logits), metrics)
