"""MSN: masked anchor views must predict to which prototypes the whole image belongs (vision transformers only).

Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022, arXiv 2204.07141; for endoscopy: Hirsch
et al., "Self-Supervised Learning for Endoscopic Video Analysis", MICCAI 2023, arXiv 2308.12394. An image method: all views
of a sample come from one frame. The exported encoder is the slowly moving target network, as published.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.methods.base import (
    ClipBatch,
    Method,
    MethodContext,
    MethodParams,
    Progress,
    Setting,
    StepOutput,
    ViewRule,
    full_precision,
    slow_twin_warning,
)
from pipeline.models.catalog import describe, names, size_problem
from pipeline.parameters import AugmentationParams, OptionalViewParams
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline import losses_msn
    from pipeline.models import heads, momentum, patches
else:
    torch = LazyModule("torch")
    losses_msn = LazyModule("pipeline.losses_msn")
    heads = LazyModule("pipeline.models.heads")
    momentum = LazyModule("pipeline.models.momentum")
    patches = LazyModule("pipeline.models.patches")

__all__ = ["MSN", "MSNParams", "linear_momentum", "sharpening"]

DROP_BY_WIDTH = {192: 0.15, 384: 0.15, 768: 0.3, 1024: 0.6}
"""`random_drop: auto`. Published for width 384 (ViT-S) only; larger models are said to profit from more."""


class MSNParams(MethodParams):
    """Parameters of MSN; architecture and loss default to the only published recipe (ViT-S/16), the augmentation to ultrasound's."""

    augmentation: AugmentationParams = Field(
        default_factory=lambda: AugmentationParams(
            scale=(0.3, 1.0), ratio=(0.75, 4 / 3), optional=OptionalViewParams(trim_border=True)
        )
    )
    """Of target and random anchors; focal anchors differ by `focal_scale`. Without the black border, else some are all black."""
    random_views: int = Field(1, ge=0)
    """Anchors of the full image size, partly masked."""
    focal_views: int = Field(10, ge=0)
    """Small anchors, each a small part of the image."""
    focal_size: int = Field(96, ge=8)
    """Pixels; a multiple of the patch size."""
    focal_scale: tuple[float, float] = (0.05, 0.3)
    """Share of the frame's area a focal anchor shows."""
    random_drop: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """Share of patches dropped from random anchors; `auto`: 0.15 for tiny and small, 0.3 for base, 0.6 for large models."""
    focal_drop: float = Field(0.0, ge=0, lt=1)
    shared_mask: bool = False
    """One choice of patches for all images of a step, as the published program does."""
    prototypes: int = Field(1024, ge=2)
    freeze_prototypes: bool = False
    hidden_dim: int = Field(2048, ge=2)
    embedding_dim: int = Field(256, ge=2)
    temperature: float = Field(0.1, gt=0)
    """tau, of anchors and targets."""
    sharpen: float = Field(0.25, gt=0, le=1)
    """T, of targets, at the start; above 1 it would flatten them."""
    sharpen_end: float = Field(0.25, gt=0, le=1)
    sinkhorn_iterations: int = Field(3, ge=0)
    """Rounds that balance the use of the prototypes by the targets; 0 for off."""
    me_max_weight: float = Field(1.0, ge=0)
    """Of the term that spreads the anchors over the prototypes."""
    entropy_weight: float = Field(0.0, ge=0)
    """Of the mean entropy of the anchors' predictions."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    momentum: float = Field(0.996, ge=0, le=1)
    """Of the target network's average, at the start."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    stretch: float = Field(1.25, ge=1)
    """Momentum and T reach their end values after this many times the training."""

    @model_validator(mode="after")
    def _views_and_ranges(self) -> MSNParams:
        if self.random_views + self.focal_views < 1:
            raise ValueError("random_views and focal_views are both 0; at least one anchor view is needed")
        if not 0 < self.focal_scale[0] <= self.focal_scale[1] <= 1:
            raise ValueError(f"focal_scale must satisfy 0 < low <= high <= 1; got {list(self.focal_scale)}")
        return self

    def drop(self, width: int) -> float:
        """`random_drop` with `auto` resolved for a transformer of this width."""
        return DROP_BY_WIDTH.get(width, 0.15) if self.random_drop == "auto" else self.random_drop


@METHODS.register("msn")
class MSN(Method):
    """Anchor network trained by gradient, target network its moving average, learnt prototypes between them."""

    Params = MSNParams
    exempt = ("prototypes",)

    def __init__(self, backbone: nn.Module, params: MSNParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        self.networks["head"] = heads.msn_projection(context.feature_dim, params.embedding_dim, params.hidden_dim)
        # The bias-free layer stands for its weight: it starts uniform in +-1 / sqrt(D), as published.
        self.networks["prototypes"] = torch.nn.Linear(params.embedding_dim, params.prototypes, bias=False)
        self.networks["prototypes"].weight.requires_grad_(not params.freeze_prototypes)
        for part in ("backbone", "head"):
            self.networks[f"key_{part}"] = momentum.momentum_copy(self.networks[part])

    @classmethod
    def draw(cls, params: MSNParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        frame, anchors = int(rng.integers(num_frames)), {"random": params.random_views, "focal": params.focal_views}
        roles = {role: np.full(count, frame) for role, count in anchors.items() if count}
        return {"target": np.array([frame]), **roles, "patches": rng.random(params.random_views + params.focal_views)}

    @classmethod
    def views(cls, params: MSNParams, image_size: int) -> dict[str, ViewRule]:
        focal = params.augmentation.model_copy(update={"scale": params.focal_scale})
        return {"focal": ViewRule(params.focal_size, focal)} if params.focal_views else {}

    @classmethod
    def problems(cls, params: MSNParams, setting: Setting) -> list[str]:
        info = describe(setting.backbone)
        if info.family != "vit":
            return [
                f"pretrain.backbone: {info.name} has no patches to mask; method msn needs a vision transformer: {', '.join(names('vit'))}"
            ]
        sizes = [("pretrain.image_size", setting.image_size, "random_drop", params.drop(info.feature_dim))] * bool(params.random_views)
        sizes += [("methods.msn.focal_size", params.focal_size, "focal_drop", params.focal_drop)] * bool(params.focal_views)
        lines = []
        for key, size, ratio, drop in sizes:
            wrong = size_problem(info, size, key)
            if wrong:
                lines.append(wrong)
            elif (number := (size // info.patch_size) ** 2) * (1 - drop) < 1:
                lines.append(
                    f"methods.msn.{ratio}: {drop:g} drops all {number} patches of an image of {size} pixels; at most "
                    f"{math.floor(100 * (1 - 1 / number)) / 100:g} leaves one"
                )
        return [*lines, *setting.lonely("leaves the batch norm of the projection head nothing to average")]

    @classmethod
    def check(cls, params: MSNParams, context: MethodContext, videos: int) -> list[str]:
        rising = params.momentum_end > params.momentum
        return slow_twin_warning("methods.msn.momentum", params.momentum, context.epochs * context.steps_per_epoch, rising)

    def chance_loss(self, progress: Progress) -> float:
        return math.log(self.params.prototypes)

    @property
    def backbone(self) -> nn.Module:
        return self.networks["key_backbone"]

    def before_step(self, progress: Progress) -> None:
        """The average that belongs to the optimiser step before this one; both networks start equal."""
        if progress.step:
            steps = self.context.epochs * self.context.steps_per_epoch
            for part in ("backbone", "head"):
                rate = linear_momentum(self.params, progress.step - 1, steps)
                momentum.ema_update(self.networks[f"key_{part}"], self.networks[part], rate)

    def finish(self, progress: Progress) -> None:
        self.before_step(progress)

    def compile(self) -> None:
        self.networks["backbone"].blocks.compile()  # `patches.class_token` calls the parts, since some patches are left out

    def embed(self, images: torch.Tensor, kept: torch.Tensor | None = None, prefix: str = "") -> torch.Tensor:
        """Head outputs, not normalised. [B, 3, H, W], patches kept int64 [B, n] or None -> [B, D], float32 (float64 stays)."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            raw = self.networks[f"{prefix}head"](patches.class_token(self.networks[f"{prefix}backbone"], images, kept))
        return full_precision(raw)

    def _kept(self, images: torch.Tensor, seeds: torch.Tensor, drop: float, progress: Progress) -> torch.Tensor | None:
        """Patches each image keeps, int64 [B, n], or None for all. seeds: [B], one number in [0, 1) an image."""
        side = self.networks["backbone"].patch_embed.patch_size[0]
        total = (images.shape[-2] // side) * (images.shape[-1] // side)
        keep = patches.kept_patches(total, drop)
        if keep == total:
            return None
        if self.params.shared_mask:
            return self.permutation(total, progress)[:keep].expand(len(images), -1).to(images.device)
        return patches.draw_patches(total, keep, seeds)

    def embed_anchors(self, batch: ClipBatch, progress: Progress) -> torch.Tensor:
        """Random anchors in one pass, focal anchors in another, so that batch norm never mixes them. -> [V * B, D], view by view."""
        params, parts, first = self.params, [], 0
        for role, drop in (("random", params.drop(self.context.feature_dim)), ("focal", params.focal_drop)):
            if role in batch.frames:
                views = batch.frames[role].transpose(0, 1)
                seeds = batch.numbers["patches"].T[first : first + len(views)]
                images = views.flatten(0, 1)
                parts.append(self.embed(images, self._kept(images, seeds.flatten(), drop, progress)))
                first += len(views)
        return torch.cat(parts)

    def loss(self, batch: ClipBatch, progress: Progress) -> losses_msn.MSNTerms:
        """All terms of one micro-batch."""
        params = self.params
        anchors = self.embed_anchors(batch, progress)
        with torch.no_grad():
            targets = self.embed(batch.frames["target"].flatten(0, 1), prefix="key_")
        steps = self.context.epochs * self.context.steps_per_epoch
        return losses_msn.msn_loss(
            anchors, targets, self.networks["prototypes"].weight, temperature=params.temperature,
            sharpen=sharpening(params, progress.step, steps),
            sinkhorn_iterations=params.sinkhorn_iterations, me_max_weight=params.me_max_weight,
            entropy_weight=params.entropy_weight, smoothing=params.label_smoothing,
        )

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        terms = self.loss(batch, progress)
        metrics: dict[str, Any] = {name: getattr(terms, name).detach() for name in (
            "cross_entropy", "me_max", "entropy", "clusters", "target_max", "target_min",
        )}
        return StepOutput(terms.total, metrics)


def linear_momentum(params: MSNParams, step: int, steps: int) -> float:
    """Momentum of the target network behind the 0-based optimiser step, of `steps` in training."""
    return losses_msn.linear_schedule(params.momentum, params.momentum_end, step, params.stretch * steps)


def sharpening(params: MSNParams, step: int, steps: int) -> float:
    """Sharpening temperature T of the targets in a 0-based optimiser step, of `steps` in training."""
    return losses_msn.linear_schedule(params.sharpen, params.sharpen_end, step, params.stretch * steps)
