"""SimSiam: each view predicts the other's projection, which gets no gradient; no negatives, no momentum network.

Chen, He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566. One deviation: the predictor's
learning rate follows the schedule like everything else (the paper keeps it constant). Sizes are smaller than the published
ones (2048 and 512), which were chosen for a ResNet-50 and a million images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.methods.base import ClipBatch, MethodContext, PairMethod, PairParams, Progress, StepOutput
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import losses_baselines
    from pipeline.models import heads
else:
    losses_baselines = LazyModule("pipeline.losses_baselines")
    heads = LazyModule("pipeline.models.heads")

__all__ = ["SimSiam", "SimSiamParams"]


class SimSiamParams(PairParams):
    """Parameters of SimSiam."""

    embedding_dim: int = Field(512, ge=2)
    """Outputs and hidden units of the projector; 2048 in the paper."""
    predictor_dim: int = Field(128, ge=1)
    """Hidden units of the predictor, a bottleneck of a quarter; 512 in the paper."""


@METHODS.register("simsiam")
class SimSiam(PairMethod):
    """Symmetric negative cosine with a predictor and a stopped gradient."""

    Params = SimSiamParams

    def __init__(self, backbone: torch.nn.Module, params: SimSiamParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        size = params.embedding_dim
        self.networks["head"] = heads.bn_mlp([context.feature_dim, size, size, size], last_norm=True)
        self.networks["predictor"] = heads.bn_mlp([size, params.predictor_dim, size])

    def chance_loss(self, progress: Progress) -> None:
        return None

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """Loss in [-1, 1]: 0 for unrelated views, -1 for equal ones and for collapse, which `output_spread` tells apart."""
        views = self.two_outputs(batch)
        guesses = [self.networks["predictor"](z) for z in views]
        loss = (losses_baselines.negative_cosine(guesses[0], views[1]) + losses_baselines.negative_cosine(guesses[1], views[0])) / 2
        return StepOutput(loss, {"output_spread": losses_baselines.output_spread(views[0])})
