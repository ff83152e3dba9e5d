"""SimCLR: two views of one frame attract, all other frames of the global batch repel.

Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709. Frames are drawn one per video and epoch (times
`pretrain.samples_per_video`), like the other methods, so that comparisons see the same number of anchors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from pipeline.methods.base import ClipBatch, Method, MethodContext, MethodParams, Progress, Setting, StepOutput
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed
    from pipeline import losses
    from pipeline.models import heads
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    losses = LazyModule("pipeline.losses")
    heads = LazyModule("pipeline.models.heads")

__all__ = ["SimCLR", "SimCLRParams"]


class SimCLRParams(MethodParams):
    """Parameters of SimCLR."""

    temperature: float = Field(0.5, gt=0)
    embedding_dim: int = Field(128, ge=2)


@METHODS.register("simclr")
class SimCLR(Method):
    """NT-Xent over two views, gathered with gradient over all processes."""

    Params = SimCLRParams

    def __init__(self, backbone: torch.nn.Module, params: SimCLRParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        self.networks["head"] = heads.projection_mlp(context.feature_dim, params.embedding_dim)
        self._logits = 2 * context.forward_batch - 1

    @classmethod
    def contrasts(cls, params: SimCLRParams) -> bool:
        return True

    @classmethod
    def draw(cls, params: SimCLRParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"view": np.repeat(rng.integers(num_frames), 2)}

    @classmethod
    def problems(cls, params: SimCLRParams, setting: Setting) -> list[str]:
        return setting.lonely("leaves SimCLR no negatives: its loss is constantly 0")

    @classmethod
    def check(cls, params: SimCLRParams, context: MethodContext, videos: int) -> list[str]:
        if context.forward_batch < 2:
            return ["an epoch has 1 sample, so SimCLR has no negatives. Use more videos, or raise pretrain.samples_per_video."]
        return []

    def chance_loss(self, progress: Progress) -> float:
        return math.log(max(1, self._logits))

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """One pass over both views: [B, 2, 3, H, W] -> two [B, D]."""
        images = batch.frames["view"]
        views = self.encode(images.transpose(0, 1).flatten(0, 1)).chunk(2)
        gathered = tuple(distributed.gather_with_gradient(view) for view in views)
        self._logits = 2 * len(gathered[0]) - 1
        offset = distributed.rank() * len(views[0])
        loss = losses.nt_xent(views, gathered, self.params.temperature, offset)
        return StepOutput(loss, {"positive_similarity": (views[0] * views[1]).sum(1).mean().detach()})
