"""HiCo: contrast of local, medium and global embeddings of one ultrasound video, with a softened supervised term.

Zhang, Chen, Liu, Liu, Wang, Li, "HiCo: Hierarchical Contrastive Learning for Ultrasound Video Model Pretraining", ACCV 2022, arXiv
2210.04477. Pairs are made as in USCL. Defaults follow the paper's figure where the published program differs from it and mend the
target that does not sum to one; `sonoscope preset hico_official` sets every option to the published program's behaviour.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.data import clips
from pipeline.methods.base import (
    ClipBatch, Method, MethodContext, MethodParams, Progress, Setting, StepOutput, ViewRule, full_precision,
)
from pipeline.models import catalog
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed
    from pipeline import losses
    from pipeline.models import heads, levels
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    losses = LazyModule("pipeline.losses")
    heads = LazyModule("pipeline.models.heads")
    levels = LazyModule("pipeline.models.levels")

__all__ = ["HiCo", "HiCoParams"]

LARGE = 20_000_000
"""Weights in flattened projectors from which a warning is due; a resnet18 has 11 million."""


class HiCoParams(MethodParams):
    """Parameters of HiCo."""

    objective: Literal["semi", "self", "supervised"] = "semi"
    """`semi`: contrast and softened cross-entropy; `self`: contrast alone; `supervised`: plain cross-entropy alone."""
    temperature: float = Field(0.5, gt=0)
    embedding_dim: int = Field(256, ge=2)
    """Of each level."""
    peer_weight: float = Field(0.5, ge=0, le=1)
    """mu: weight of the terms between equal levels; those between the global and another level have 1 - mu."""
    cross_level: Literal["cross_view", "within_view"] = "cross_view"
    """Global level against the other levels of the other view (the paper's figure), or of its own view (the program)."""
    medium_level: Literal["p3", "p4"] = "p3"
    """Pyramid map of the medium level: p3 in the program, p4 in the figure."""
    smooth_p5: bool = False
    """A 3x3 convolution on the global map: in the figure, not in the program."""
    projector_pool: Literal["gap", "flatten"] = "gap"
    """`gap` averages a pyramid map before its projector; `flatten` keeps every position as published: 260 million weights at 224 pixels."""
    classifier_input: Literal["pooled", "global"] = "pooled"
    """`pooled`: a hidden layer on the trunk's pooled features (the program); `global`: one layer on the global embedding (the figure)."""
    soft_label: Literal["sum_to_one", "batch_divisor"] = "sum_to_one"
    """What is left of the target goes evenly to the other classes, or as published: alpha / (labelled rows - 1) to every class."""
    alpha: float = Field(0.2, ge=0, lt=1)
    """Share taken off the labelled class."""
    supervised_weight: float = Field(0.2, gt=0)
    """lambda: of the softened cross-entropy of each view."""
    label_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the labelled videos whose label is used."""
    pair: clips.PairParams = Field(default_factory=clips.PairParams)
    """How the two views of a video are interpolated."""

    def maps(self) -> dict[str, str]:
        """Level to pyramid map, of the levels the objective uses."""
        if self.objective == "supervised":
            return {"global": "p5"} if self.classifier_input == "global" else {}
        return {"local": "p2", "medium": self.medium_level, "global": "p5"}


@METHODS.register("hico")
class HiCo(Method):
    """Two interpolated views, each through trunk, pyramid and level projectors in a pass of its own."""

    Params: ClassVar[type[MethodParams]] = HiCoParams

    def __init__(self, backbone: torch.nn.Module, params: HiCoParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        self.maps = params.maps()
        if self.maps:
            self.networks["pyramid"] = levels.Pyramid(levels.stage_channels(backbone), self.maps.values(), smooth_p5=params.smooth_p5)
            self.networks["levels"] = torch.nn.ModuleDict({
                name: levels.LevelProjector(params.projector_pool, levels.map_side(name, context.image_size), params.embedding_dim)
                for name in self.maps.values()
            })
        if params.objective != "self":
            self.networks["classifier"] = (
                heads.projection_mlp(context.feature_dim, context.classes, levels.WIDTH) if params.classifier_input == "pooled"
                else torch.nn.Linear(params.embedding_dim, context.classes)
            )
        self._chance: float | torch.Tensor = 0.0

    @classmethod
    def label_share(cls, params: HiCoParams) -> float:
        return 0.0 if params.objective == "self" else params.label_fraction

    @classmethod
    def contrasts(cls, params: HiCoParams) -> bool:
        return params.objective != "supervised"

    @classmethod
    def leaves_pyramid(cls, params: HiCoParams) -> bool:
        return params.objective != "supervised"

    @classmethod
    def draw(cls, params: HiCoParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return clips.draw_pair(params.pair, num_frames, rng)

    @classmethod
    def views(cls, params: HiCoParams, image_size: int) -> dict[str, ViewRule]:
        return clips.pair_views(params.pair, image_size, params.augmentation)

    @classmethod
    def problems(cls, params: HiCoParams, setting: Setting) -> list[str]:
        line = catalog.levels_problem(catalog.describe(setting.backbone), "pretrain.method: hico")
        lines = [line] if line else []
        if cls.contrasts(params):
            lines += setting.lonely("leaves HiCo no video to contrast: its contrastive loss is constantly 0")
        known = {name: count for name, count in (setting.labelled or {}).items() if count}
        if params.objective != "self" and setting.labelled is not None and len(known) < 2:
            found = f"{sum(known.values())} labelled videos of {len(known)} classes"
            lines.append(
                f"methods.hico.objective: {params.objective} learns from labels, and pretraining may see {found} (scope: {setting.scope}; "
                f"`all` passes no labels on). Give labels of at least 2 classes, or set it to self."
            )
        return lines

    @classmethod
    def check(cls, params: HiCoParams, context: MethodContext, videos: int) -> list[str]:
        warnings = []
        if cls.contrasts(params) and videos < 2:
            warnings.append(f"{videos} video: HiCo has no negatives, its contrastive loss is constantly 0. Use at least 2 videos, better many more.")
        weights = sum(levels.WIDTH**2 * levels.map_side(name, context.image_size) ** 2 for name in params.maps().values())
        if params.projector_pool == "flatten" and weights >= LARGE:
            warnings.append(
                f"methods.hico.projector_pool = flatten: at pretrain.image_size = {context.image_size} the level projectors hold "
                f"{weights / 1e6:.0f} million weights, several times the trunk. `gap` needs {len(params.maps()) * levels.WIDTH**2 / 1e6:.1f} million."
            )
        return warnings

    def compile(self) -> None:
        for stage in ("layer1", "layer2", "layer3", "layer4"):  # `levels.stage_maps` calls them one by one
            getattr(self.networks["backbone"], stage).compile()

    def exports(self) -> dict[str, torch.Tensor]:
        """Pyramid, level projectors and classifier."""
        return {name: value for name, value in self.networks.state_dict().items() if not name.startswith("backbone.")}

    def chance_loss(self, progress: Progress) -> float | torch.Tensor:
        return self._chance

    def embed(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """One view: images [B, 3, H, W] -> raw embeddings [B, D] by level, and logits [B, K] (None without labels); float32 or better."""
        params, networks = self.params, self.networks
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            stages = levels.stage_maps(networks["backbone"], images)
            pyramid = networks["pyramid"](stages) if self.maps else {}
            found = {level: networks["levels"][name](pyramid[name]) for level, name in self.maps.items()}
            logits = None
            if params.objective != "self":
                logits = networks["classifier"](levels.pooled(stages) if params.classifier_input == "pooled" else found["global"])
        return {level: full_precision(rows) for level, rows in found.items()}, None if logits is None else full_precision(logits)

    def contrast(self, views: list[dict[str, torch.Tensor]], videos: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """mu peer + (1 - mu) cross of raw embeddings over the global batch, and its terms; adds to the chance loss.

        A batch may hold two samples of one video (`pretrain.samples_per_video`); these are no negatives of each other.
        """
        params, size = self.params, len(views[0]["global"])
        unit = [{level: losses.l2_normalize(rows) for level, rows in view.items()} for view in views]
        everyone = distributed.all_gather_rows(videos)
        # One gather for the six embeddings.
        packed = torch.cat([rows for view in unit for rows in view.values()], dim=1)
        parts = iter(distributed.gather_with_gradient(packed).split(params.embedding_dim, dim=1))
        gathered = [{level: next(parts) for level in view} for view in unit]
        terms = losses.hierarchical_contrast(
            (unit[0], unit[1]), (gathered[0], gathered[1]), params.temperature, params.cross_level, distributed.rank() * size, everyone
        )
        # Three peer terms and four cross terms; the logits of a row are its partner and both rows of every other video.
        logits = (1 + 2 * (videos[:, None] != everyone).sum(1)).log().mean()
        self._chance = self._chance + (4 - params.peer_weight) * logits
        return params.peer_weight * terms["peer"] + (1 - params.peer_weight) * terms["cross"], terms

    def supervise(self, logits: list[torch.Tensor], labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted cross-entropies of both views over the labelled rows of the global batch; adds to the chance loss."""
        params, world = self.params, distributed.world_size()
        plain = params.objective == "supervised"
        alpha, weight = (0.0, 0.5) if plain else (params.alpha, params.supervised_weight)
        rows = (distributed.all_gather_rows(labels) >= 0).sum()
        first, second = (
            losses.softened_cross_entropy(view, labels, alpha, form=params.soft_label, rows=rows, processes=world) for view in logits
        )
        mass = losses.soft_targets(labels[:1], logits[0].shape[1], alpha, rows, params.soft_label).sum()
        self._chance = self._chance + 2 * weight * math.log(logits[0].shape[1]) * mass * (rows > 0)
        right = torch.stack([(view.argmax(1) == labels) & (labels >= 0) for view in logits]).float().mean(0).sum()
        metrics = {
            "cross_entropy": ((first + second) / 2).detach(), "labelled": rows.float() / (len(labels) * world),
            "label_accuracy": world * right / rows.clamp(min=1),
        }
        return weight * (first + second), metrics

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """A pass for each view, so that batch-norm statistics are those of one view, as published."""
        views, logits = zip(*(self.embed(images) for images in clips.mixed_pair(batch)), strict=True)
        loss, metrics, self._chance = torch.zeros((), device=batch.label.device), {}, 0.0
        if self.params.objective != "supervised":
            loss, terms = self.contrast(list(views), batch.video)
            metrics = {name: value.detach() for name, value in terms.items()}
        if self.params.objective != "self":
            supervised, more = self.supervise(list(logits), batch.label)
            loss, metrics = loss + supervised, metrics | more
        return StepOutput(loss, metrics)
