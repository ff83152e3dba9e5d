"""VICReg: equal views, columns that vary, columns that do not repeat one another; no negatives, no twin.

Bardes, Ponce, LeCun, "Variance-Invariance-Covariance Regularization", ICLR 2022, arXiv 2105.04906. Statistics are taken over
the global batch, so that the number of processes changes nothing.
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

__all__ = ["VICReg", "VICRegParams"]


class VICRegParams(PairParams):
    """Parameters of VICReg; the authors' flags in brackets."""

    embedding_dim: int = Field(1024, ge=2)
    """Outputs and hidden units of the projector; 8192 in the paper, with batches of 2048."""
    invariance_weight: float = Field(25.0, ge=0)
    """lambda [sim-coeff]"""
    variance_weight: float = Field(25.0, ge=0)
    """mu [std-coeff]"""
    covariance_weight: float = Field(1.0, ge=0)
    """nu [cov-coeff]"""


@METHODS.register("vicreg")
class VICReg(PairMethod):
    """Three terms over the columns of the projections."""

    Params = VICRegParams

    def __init__(self, backbone: torch.nn.Module, params: VICRegParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        size = params.embedding_dim
        self.networks["head"] = heads.bn_mlp([context.feature_dim, size, size, size], last_bias=False)

    @classmethod
    def check(cls, params: VICRegParams, context: MethodContext, videos: int) -> list[str]:
        if params.variance_weight == 0:
            return ["methods.vicreg.variance_weight = 0: nothing keeps the embeddings apart, they will collapse to one point."]
        return []

    def chance_loss(self, progress: Progress) -> float:
        # Constant outputs: standard deviation sqrt(1e-4), the two other terms 0.
        return 0.99 * self.params.variance_weight

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        params = self.params
        z1, z2 = (distributed.gather_with_gradient(z) for z in self.two_outputs(batch))
        weights = (params.invariance_weight, params.variance_weight, params.covariance_weight)
        return StepOutput(*losses_baselines.vicreg(z1, z2, weights))
