"""USCL: contrast of interpolated frame pairs of ultrasound videos, with cross-entropy on the videos that have labels.

Chen, Zhang, Zheng, Fang, Ou, Xu, Liang, "USCL: Pretraining Deep Ultrasound Image Diagnosis Model Through Video Contrastive
Representation Learning", MICCAI 2021, arXiv 2011.13066. The classifier reads the representation, as the paper's figure draws it; the
published program's behaviour is `sonoscope preset uscl_official`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.data import clips
from pipeline.methods.base import (
    ClipBatch, Method, MethodContext, MethodParams, Progress, Setting, StepOutput, ViewRule, full_precision,
)
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

__all__ = ["USCL", "USCLParams", "published_holdout", "published_valid_loss"]


def published_holdout(videos: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) positions of the published program: one shuffle of 0..videos-1, the first floor(share * videos) held out.

    For comparisons with its runs only: it divides videos, not patients, and this project's splits come from splits.json.
    """
    order = np.random.RandomState(0).permutation(videos)
    held = int(share * videos)
    return order[held:], order[:held]


def published_valid_loss(batches: np.ndarray) -> float:
    """Number by which the published program chooses its epoch: sum of the batches' losses / (their count + 1e-6).

    For comparisons with its logs only: a small batch has an easier task and counts as much as a full one.
    """
    return float(np.sum(batches) / (len(batches) + 1e-6))


class USCLParams(MethodParams):
    """Parameters of USCL."""

    temperature: float = Field(0.5, gt=0)
    embedding_dim: int = Field(256, ge=2)
    supervised_weight: float = Field(0.2, ge=0)
    """lambda: weight of the cross-entropy of each of the two views; 0 trains without labels."""
    classifier_input: Literal["representation", "projection"] = "representation"
    """What the linear classifier reads: the pooled features (the paper's figure) or the projection (the published program)."""
    label_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the labelled training videos (without inner validation patients) whose labels are used."""
    bn_views: Literal["separate", "joint"] = "separate"
    """Batch-norm statistics of each view by itself, as published, or of both together."""
    pair: clips.PairParams = Field(default_factory=clips.PairParams)
    """How three frames of a video become the two views."""


@METHODS.register("uscl")
class USCL(Method):
    """NT-Xent between the two views of each video over all processes, and lambda times the cross-entropy of each view.

    A batch may hold two samples of one video (`pretrain.samples_per_video`, or a last batch that is filled up); these are not
    set against each other.
    """

    Params: ClassVar[type[MethodParams]] = USCLParams

    def __init__(self, backbone: torch.nn.Module, params: USCLParams, context: MethodContext) -> None:
        super().__init__(backbone, params, context)
        self.networks["head"] = heads.projection_mlp(context.feature_dim, params.embedding_dim)
        if params.supervised_weight > 0:
            width = context.feature_dim if params.classifier_input == "representation" else params.embedding_dim
            self.networks["classifier"] = heads.linear_classifier(width, context.classes)
        self._chance: float | torch.Tensor = 0.0

    @classmethod
    def label_share(cls, params: USCLParams) -> float:
        return params.label_fraction if params.supervised_weight > 0 else 0.0

    @classmethod
    def contrasts(cls, params: USCLParams) -> bool:
        return True

    @classmethod
    def draw(cls, params: USCLParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return clips.draw_pair(params.pair, num_frames, rng)

    @classmethod
    def views(cls, params: USCLParams, image_size: int) -> dict[str, ViewRule]:
        return clips.pair_views(params.pair, image_size, params.augmentation)

    @classmethod
    def problems(cls, params: USCLParams, setting: Setting) -> list[str]:
        lines = setting.lonely("leaves USCL no video to contrast: its loss is constantly 0")
        if params.supervised_weight == 0 or setting.labelled is None:
            return lines
        known = [name for name, count in setting.labelled.items() if count]
        if len(known) > 1:
            return lines
        why = " (pretrain.scope: all passes no label of the main source on)" if setting.scope == "all" else ""
        line = (
            f"methods.uscl.supervised_weight: {params.supervised_weight:g} needs labelled videos of at least 2 classes, and pretraining may "
            f"see labels of {len(known)}{f': {known[0]}' if known else ''}{why}. Give a labels table, raise methods.uscl.label_fraction "
            f"(now {params.label_fraction:g}), or set supervised_weight to 0 to train without labels."
        )
        return [*lines, line]

    @classmethod
    def check(cls, params: USCLParams, context: MethodContext, videos: int) -> list[str]:
        if videos >= 2:
            return []
        line = f"{videos} video: USCL has no negatives, its contrastive loss is constantly 0. Use at least 2 videos, better many more."
        return [line]

    def chance_loss(self, progress: Progress) -> float | torch.Tensor:
        return self._chance

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images [B, 3, H, W] -> representation [B, F], raw projection [B, D], logits [B, C] (None without labels), float32 or better."""
        networks, params = self.networks, self.params
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            features = networks["backbone"](images)
            projection = networks["head"](features)
            logits = None
            if params.supervised_weight > 0:
                logits = networks["classifier"](features if params.classifier_input == "representation" else projection)
        return full_precision(features), full_precision(projection), None if logits is None else full_precision(logits)

    def objective(
        self, projections: list[torch.Tensor], logits: list[torch.Tensor] | None, labels: torch.Tensor, videos: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """L = NT-Xent + lambda (CE of view 1 + CE of view 2); its mean over processes is that of the whole batch in one process.

        The cross-entropies are means over the labelled rows of all processes, and exactly 0 where there is none.

        Args:
            projections: raw, [B, D] of each view. logits: [B, C] of each view. labels: int64 [B], -1 where unlabelled, the same
                for both views. videos: int64 [B].
        """
        weight, world = self.params.supervised_weight, distributed.world_size()
        first, second = (losses.l2_normalize(view) for view in projections)
        gathered = distributed.gather_with_gradient(first), distributed.gather_with_gradient(second)
        everyone = distributed.all_gather_rows(videos)
        contrastive = losses.nt_xent((first, second), gathered, self.params.temperature, distributed.rank() * len(first), everyone)
        # Logits of a row: its partner, and both views of every other video.
        self._chance = (1 + 2 * (videos[:, None] != everyone).sum(1)).log().mean()
        metrics = {"contrastive": contrastive.detach(), "positive_similarity": (first * second).sum(1).mean().detach()}
        if logits is None:
            return contrastive, metrics
        rows = (distributed.all_gather_rows(labels) >= 0).sum()
        entropy = sum(losses.softened_cross_entropy(view, labels, 0.0, rows=rows, processes=world) for view in logits)
        self._chance = self._chance + 2 * weight * math.log(logits[0].shape[1]) * (rows > 0)
        metrics |= {"cross_entropy": entropy.detach() / 2, "labelled": rows / (len(labels) * world)}
        return contrastive + weight * entropy, metrics

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """One pass for each view (`bn_views`), each [B, 3, H, W]."""
        pair = clips.mixed_pair(batch)
        if self.params.bn_views == "joint":
            _, projection, logits = self.embed(torch.cat(pair))
            projections = list(projection.chunk(2))
            scores = None if logits is None else list(logits.chunk(2))
        else:
            (_, *one), (_, *two) = (self.embed(images) for images in pair)
            projections, scores = [one[0], two[0]], None if one[1] is None else [one[1], two[1]]
        return StepOutput(*self.objective(projections, scores, batch.label, batch.video))
