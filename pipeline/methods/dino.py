"""DINO: a student matches the sharpened, centred output of its slowly moving teacher over large and small crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.14294. Any trunk will do that
takes images of two sizes. Sizes of the head are smaller than the published ones (2048 hidden, 65536 outputs), which were
chosen for a million images. The paper trains with adamw, 10 epochs of warm-up and gradients clipped to length 3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.methods.base import (
    ClipBatch, Method, MethodContext, MethodParams, Progress, Setting, StepOutput, ViewRule, slow_twin_warning,
)
from pipeline.models import catalog
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed, losses_baselines
    from pipeline.models import heads, momentum
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    losses_baselines = LazyModule("pipeline.losses_baselines")
    heads = LazyModule("pipeline.models.heads")
    momentum = LazyModule("pipeline.models.momentum")

__all__ = ["DINO", "DINOParams"]


class DINOParams(MethodParams):
    """Parameters of DINO; the authors' flags in brackets."""

    output_dim: int = Field(256, ge=2)
    """Outputs of the last layer, K; 65536 in the paper [out_dim]."""
    hidden_dim: int = Field(1024, ge=1)
    """2048 in the paper."""
    bottleneck_dim: int = Field(256, ge=2)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.02, gt=0)
    """From the end of the warm-up on [teacher_temp]; 0.04 to 0.07 in the paper, with which runs of hundreds of steps stay at chance."""
    teacher_warmup_temperature: float = Field(0.02, gt=0)
    """In the first epoch; 0.04 in the paper [warmup_teacher_temp]."""
    teacher_warmup_epochs: int = Field(10, ge=0)
    """30 of 300 or more in the paper [warmup_teacher_temp_epochs]."""
    center_momentum: float = Field(0.9, ge=0, le=1)
    momentum: float = Field(0.996, ge=0, le=1)
    """Of the teacher's average at the start; it rises to 1 along a cosine [momentum_teacher]."""
    freeze_last_layer: int = Field(1, ge=0)
    """First epochs in which the last layer does not learn."""
    local_views: int = Field(4, ge=0)
    """Small crops a sample, beside two large ones; 8 in the paper, 0 for none [local_crops_number]."""
    local_size: int | Literal["auto"] = "auto"
    """Side of the small crops; `auto`: 3/7 of the image size (96 of 224) in whole patches, or in steps of 16, at least 32."""
    local_scale: tuple[float, float] = (0.1, 0.4)
    """Share of the frame a small crop shows; from 0.05 in the paper. `augmentation.scale` is that of the large ones."""
    export: Literal["teacher", "student"] = "teacher"
    """Whose trunk is exported; the paper evaluates the teacher."""

    @model_validator(mode="after")
    def _crops(self) -> DINOParams:
        if not 0 < self.local_scale[0] <= self.local_scale[1] <= 1:
            raise ValueError(f"local_scale must satisfy 0 < low <= high <= 1; got {list(self.local_scale)}")
        if isinstance(self.local_size, int) and self.local_size < 16:
            raise ValueError(f"local_size must be at least 16, or auto; got {self.local_size}")
        return self

    def side(self, image_size: int, step: int = 16) -> int:
        """Side of the small crops in pixels; `auto` is a multiple of `step`."""
        if self.local_size != "auto":
            return self.local_size
        return max(math.ceil(32 / step), round(image_size * 3 / 7 / step)) * step

    def suited(self, backbone: str, image_size: int) -> DINOParams:
        patch = catalog.describe(backbone).patch_size if backbone in catalog.names() else 0
        return self.model_copy(update={"local_size": self.side(image_size, patch or 16)})


@METHODS.register("dino")
class DINO(Method):
    """Cross-entropy between teacher and student over all pairs of different views, the teacher seeing large ones only."""

    Params = DINOParams

    def __init__(self, backbone: torch.nn.Module, params: DINOParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        self.networks["head"] = heads.dino_head(context.feature_dim, params.hidden_dim, params.bottleneck_dim, params.output_dim)
        for part in ("backbone", "head"):
            self.networks[f"key_{part}"] = momentum.momentum_copy(self.networks[part])
        self.center = torch.zeros(params.output_dim, dtype=next(backbone.parameters()).dtype)

    @classmethod
    def draw(cls, params: DINOParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        frame = rng.integers(num_frames)
        roles = {"view": np.repeat(frame, 2)}
        return {**roles, "local": np.repeat(frame, params.local_views)} if params.local_views else roles

    @classmethod
    def views(cls, params: DINOParams, image_size: int) -> dict[str, ViewRule]:
        local = params.augmentation.model_copy(update={"crop": "resized", "scale": params.local_scale})
        return {"local": ViewRule(params.side(image_size), local)} if params.local_views else {}

    @classmethod
    def problems(cls, params: DINOParams, setting: Setting) -> list[str]:
        line = catalog.size_problem(catalog.describe(setting.backbone), params.side(setting.image_size), "methods.dino.local_size")
        return [line] if params.local_views and line else []

    @classmethod
    def check(cls, params: DINOParams, context: MethodContext, videos: int) -> list[str]:
        warnings = slow_twin_warning("methods.dino.momentum", params.momentum, context.epochs * context.steps_per_epoch, rising=True)
        if params.teacher_temperature >= params.student_temperature:
            warnings.append(
                f"methods.dino.teacher_temperature = {params.teacher_temperature} is not below student_temperature = "
                f"{params.student_temperature}: the teacher is not sharper than the student, which ends in equal outputs for all images."
            )
        return warnings

    def before_step(self, progress: Progress) -> None:
        now = momentum.cosine_momentum(self.params.momentum, progress.step - 1, self.context.epochs * self.context.steps_per_epoch)
        for part in ("backbone", "head"):
            momentum.ema_update(self.networks[f"key_{part}"], self.networks[part], now)
        self.networks["head"][-1].frozen = progress.epoch < self.params.freeze_last_layer

    def finish(self, progress: Progress) -> None:
        self.before_step(progress)

    def chance_loss(self, progress: Progress) -> float:
        return math.log(self.params.output_dim)

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """The views of one size go through the networks together; the centre follows after the loss."""
        params, images = self.params, batch.frames["view"]
        large = images.transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            teacher = self.project(large, "key_").unflatten(0, (2, -1))
        student = self.project(large).unflatten(0, (2, -1))
        if params.local_views:
            small = self.project(batch.frames["local"].transpose(0, 1).flatten(0, 1))
            student = torch.cat([student, small.unflatten(0, (params.local_views, -1))])
        temperature = losses_baselines.linear_warmup(
            params.teacher_warmup_temperature, params.teacher_temperature, params.teacher_warmup_epochs, progress.epoch
        )
        loss = losses_baselines.dino_cross_entropy(student, teacher, self.center, params.student_temperature, temperature)
        sharp = ((teacher - self.center) / temperature).softmax(-1)
        mean = distributed.reduce_mean(sharp.mean((0, 1)))
        metrics = {
            "teacher_entropy": torch.special.entr(sharp).sum(-1).mean(),
            "teacher_mean_entropy": torch.special.entr(mean).sum(),
        }
        batch_center = distributed.reduce_mean(teacher.mean((0, 1)))
        self.center = params.center_momentum * self.center + (1 - params.center_momentum) * batch_center
        return StepOutput(loss, metrics)

    def extra_state(self) -> dict[str, torch.Tensor]:
        return {"center": self.center}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        self.center = state["center"].to(self.center)

    def move_extra_state(self, device: torch.device) -> None:
        self.center = self.center.to(device)

    @property
    def backbone(self) -> torch.nn.Module:
        return self.networks["key_backbone" if self.params.export == "teacher" else "backbone"]
