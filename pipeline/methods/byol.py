"""BYOL: the trained network predicts, of each view, what its slowly moving twin makes of the other view; no negatives.

Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, arXiv 2006.07733. The twin's momentum rises to 1 along a cosine.
Hidden layers are smaller than the published 4096, which were chosen for a ResNet-50 and a million images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.methods.base import ClipBatch, MethodContext, PairMethod, PairParams, Progress, StepOutput, slow_twin_warning
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import losses_baselines
    from pipeline.models import heads, momentum
else:
    torch = LazyModule("torch")
    losses_baselines = LazyModule("pipeline.losses_baselines")
    heads = LazyModule("pipeline.models.heads")
    momentum = LazyModule("pipeline.models.momentum")

__all__ = ["BYOL", "BYOLParams"]


class BYOLParams(PairParams):
    """Parameters of BYOL."""

    embedding_dim: int = Field(256, ge=2)
    hidden_dim: int = Field(1024, ge=1)
    """Hidden units of projector and predictor; 4096 in the paper."""
    momentum: float = Field(0.996, ge=0, le=1)
    """Of the twin's average at the start (tau_base)."""


@METHODS.register("byol")
class BYOL(PairMethod):
    """Symmetric regression of the momentum twin's unit-length projections."""

    Params = BYOLParams

    def __init__(self, backbone: torch.nn.Module, params: BYOLParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        size, hidden = params.embedding_dim, params.hidden_dim
        self.networks["head"] = heads.bn_mlp([context.feature_dim, hidden, size])
        self.networks["predictor"] = heads.bn_mlp([size, hidden, size])
        for part in ("backbone", "head"):
            self.networks[f"key_{part}"] = momentum.momentum_copy(self.networks[part])

    @classmethod
    def check(cls, params: BYOLParams, context: MethodContext, videos: int) -> list[str]:
        return slow_twin_warning("methods.byol.momentum", params.momentum, context.epochs * context.steps_per_epoch, rising=True)

    def before_step(self, progress: Progress) -> None:
        now = momentum.cosine_momentum(self.params.momentum, progress.step - 1, self.context.epochs * self.context.steps_per_epoch)
        for part in ("backbone", "head"):
            momentum.ema_update(self.networks[f"key_{part}"], self.networks[part], now)

    def chance_loss(self, progress: Progress) -> None:
        return None

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """Sum over both directions of 2 - 2 cos (Eq. 2): 4 for unrelated views, 0 for equal ones and for collapse."""
        views = self.two_outputs(batch)
        with torch.no_grad():
            targets = self.two_outputs(batch, "key_")
        guesses = [self.networks["predictor"](z) for z in views]
        cosines = losses_baselines.negative_cosine(guesses[0], targets[1]) + losses_baselines.negative_cosine(guesses[1], targets[0])
        return StepOutput(4 + 2 * cosines, {"output_spread": losses_baselines.output_spread(views[0])})
