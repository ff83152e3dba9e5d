"""Barlow Twins: the cross-correlation of the two views' projections becomes the identity; no negatives, no twin.

Zbontar, Jing, Misra, LeCun, Deny, ICML 2021, arXiv 2103.03230. Correlations are taken over the global batch, so that the
number of processes changes nothing. Deviation: the loss is divided by the embedding size (see `losses_baselines`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.methods.base import ClipBatch, MethodContext, PairMethod, PairParams, Progress, StepOutput
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed, losses_baselines
    from pipeline.models import heads
else:
    distributed = LazyModule("pipeline.distributed")
    losses_baselines = LazyModule("pipeline.losses_baselines")
    heads = LazyModule("pipeline.models.heads")

__all__ = ["BarlowTwins", "BarlowTwinsParams"]


class BarlowTwinsParams(PairParams):
    """Parameters of Barlow Twins."""

    embedding_dim: int = Field(1024, ge=2)
    """Outputs and hidden units of the projector; 8192 in the paper, with batches of 2048."""
    redundancy_weight: float = Field(0.0051, ge=0)
    """lambda, of the off-diagonal part."""


@METHODS.register("barlow")
class BarlowTwins(PairMethod):
    """Redundancy reduction over the columns of the projections."""

    Params = BarlowTwinsParams

    def __init__(self, backbone: torch.nn.Module, params: BarlowTwinsParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        size = params.embedding_dim
        self.networks["head"] = heads.bn_mlp([context.feature_dim, size, size, size], last_bias=False)

    @classmethod
    def check(cls, params: BarlowTwinsParams, context: MethodContext, videos: int) -> list[str]:
        # A correlation matrix from B samples has rank B - 1 at most, so with a unit diagonal its off-diagonal squares sum to
        # D^2 / (B - 1) - D or more; a loss above 1 is worse than collapse.
        floor = params.redundancy_weight * (params.embedding_dim / max(context.forward_batch - 1, 1) - 1)
        line = (
            f"methods.barlow.embedding_dim = {params.embedding_dim}: a batch of {context.forward_batch} samples cannot decorrelate so many "
            f"columns (the loss of equal views stays above {floor:.1f}; a collapsed network has 1). Use a smaller embedding_dim, a "
            f"smaller redundancy_weight or more samples a forward pass (pretrain.batch_size / pretrain.accumulate)."
        )
        return [line] if floor >= 1 else []

    def chance_loss(self, progress: Progress) -> float:
        return 1.0

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        z1, z2 = (distributed.gather_with_gradient(z) for z in self.two_outputs(batch))
        loss = losses_baselines.barlow_twins(z1, z2, self.params.redundancy_weight)
        return StepOutput(loss, {"output_spread": losses_baselines.output_spread(z1)})
