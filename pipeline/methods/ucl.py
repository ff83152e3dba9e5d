"""UCL: contrastive learning from ultrasound video with hard negatives inside the video.

Basu, Singla, Gupta, Rana, Gupta, Arora, "Unsupervised Contrastive Learning of Image Representations from Ultrasound Videos
with Hard Negative Mining", MICCAI 2022, arXiv 2207.13148. Defaults mend what the published program does against the
paper's own figure (own-video rows in the cross-video negative, a compounding curriculum); `sonoscope preset
ucl_official_gb` and `ucl_official_butterfly` set every option to the published behaviour.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.data import clips
from pipeline.methods.base import ClipBatch, MethodContext, MethodParams, MomentumMethod, Progress, StepOutput, slow_twin_warning
from pipeline.parameters import AugmentationParams
from pipeline.registry import METHODS, LazyModule

if TYPE_CHECKING:
    import torch

    from pipeline import distributed
    from pipeline import losses
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    losses = LazyModule("pipeline.losses")

__all__ = ["UCL", "UCLParams"]


class UCLParams(MethodParams):
    """Parameters of UCL; the published flag stands in brackets."""

    augmentation: AugmentationParams = Field(
        default_factory=lambda: AugmentationParams(crop="random", horizontal_flip=0, jitter=0, blur=0)
    )
    """The published pipeline crops and does nothing else."""
    temperature: float = Field(0.07, gt=0)
    """tau of the loss [moco-t]."""
    soft_nn_temperature: float = 0.07
    """tau_s of the mixing weights; -1 means `temperature` [soft-nn-t]."""
    support_size: int = Field(4, ge=1)
    """Bank rows mixed into the cross-video negative, S [single-loss-ncap-support-size]."""
    num_negatives: int = Field(3, ge=1)
    """Negatives from the same video per anchor, n [num-negatives]."""
    embedding_dim: int = Field(128, ge=2)
    """[moco-dim]"""
    momentum: float = Field(0.999, ge=0, le=1)
    """Of the key network's average [moco-m]."""
    positive_radius: int = Field(3, ge=1)
    anchor_range: tuple[float, float] = (0.2, 0.5)
    """Stretch of the video, as fractions, that anchors come from."""
    low: float = Field(0.2, ge=0, le=0.5)
    high: float = Field(0.4, gt=0, le=0.5)
    """Distance window of the negatives at the start, as fractions of the video."""
    cross_only_epochs: int = Field(10, ge=0)
    """First epochs in which only the cross-video negative is used."""
    decay: Literal["cosine", "cosine_compounded", "steps", "none"] = "cosine"
    """How the window shrinks; the published program compounds [cosine-curriculum]."""
    decay_start: int = Field(30, ge=0)
    decay_epochs: int | None = Field(None, ge=1)
    """Length of the decay; null: to the end of training."""
    floor_low: float | None = Field(0.03, ge=0, lt=0.5)
    floor_high: float | None = Field(0.07, gt=0, le=0.5)
    """Smallest window; null for both: no floor [cosine-clipping]."""
    negatives_replacement: bool = False
    negatives_encoder: Literal["query", "key"] = "query"
    cross_negative: Literal["soft_topk", "mean"] = "soft_topk"
    """[mean-neighbors]"""
    bank_size: int | Literal["auto"] = "auto"
    """Rows of the bank; `auto`: the negatives of one global batch."""
    bank_exclude_own_video: bool = True
    bank_mask_unwritten: bool = True
    bank_overflow: Literal["newest", "official"] = "newest"
    key_batch_includes_second_crop: bool = False
    batch_shuffle: bool = True
    short_video: Literal["exclude", "relax"] = "exclude"
    """Videos with fewer than 2 r + 2 frames: leave out and report, or clamp the candidate sets."""

    @model_validator(mode="after")
    def _windows(self) -> UCLParams:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be smaller than high ({self.high}), both between 0 and 0.5")
        if (self.floor_low is None) != (self.floor_high is None):
            raise ValueError("floor_low and floor_high must both be numbers or both be null")
        if self.floor_low is not None and not self.floor_low < self.floor_high:
            raise ValueError(f"floor_low ({self.floor_low}) must be smaller than floor_high ({self.floor_high})")
        if not 0 <= self.anchor_range[0] < self.anchor_range[1] <= 1:
            raise ValueError(f"anchor_range must satisfy 0 <= start < end <= 1; got {list(self.anchor_range)}")
        if self.soft_nn_temperature <= 0 and self.soft_nn_temperature != -1:
            raise ValueError(f"soft_nn_temperature must be above 0, or -1 for `temperature`; got {self.soft_nn_temperature}")
        if isinstance(self.bank_size, int) and self.bank_size < 1:
            raise ValueError(f"bank_size must be at least 1, or auto; got {self.bank_size}")
        if isinstance(self.bank_size, int) and self.support_size > self.bank_size and self.cross_negative == "soft_topk":
            raise ValueError(
                f"support_size ({self.support_size}) must be at most bank_size ({self.bank_size}): the cross-video negative is mixed from the bank"
            )
        return self

    @property
    def mixing_temperature(self) -> float:
        """tau_s with -1 resolved."""
        return self.temperature if self.soft_nn_temperature == -1 else self.soft_nn_temperature


@METHODS.register("ucl")
class UCL(MomentumMethod):
    """Anchor and intra-video negatives through the query network, positive through its momentum copy, one bank."""

    Params = UCLParams

    def __init__(self, backbone: torch.nn.Module, params: UCLParams, context: MethodContext) -> None:
        auto = context.global_batch * params.num_negatives
        super().__init__(backbone, params, context, auto if params.bank_size == "auto" else params.bank_size)

    @classmethod
    def min_frames(cls, params: UCLParams) -> int:
        return 3 if params.short_video == "relax" else 2 * params.positive_radius + 2

    @classmethod
    def window(cls, params: UCLParams, epoch: int, epochs: int) -> tuple[float, float]:
        """Distance window [low, high] of an epoch as fractions of the video."""
        length = params.decay_epochs or max(1, epochs - params.decay_start)
        floors = None if params.floor_low is None else (params.floor_low, params.floor_high)
        return clips.distance_window(
            epoch, low=params.low, high=params.high, decay=params.decay, decay_start=params.decay_start,
            decay_epochs=length, floors=floors,
        )

    @classmethod
    def draw(cls, params: UCLParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        first, end = clips.anchor_interval(num_frames, params.anchor_range)
        # An empty interval can only come from a narrow anchor_range on a short video: the nearest frame serves.
        anchor = int(rng.integers(first, end)) if first < end else min(first, num_frames - 1)
        low, high = cls.window(params, epoch, epochs)
        positive = clips.positive_candidates(num_frames, anchor, params.positive_radius)
        negative = clips.negative_candidates(num_frames, anchor, low, high, params.positive_radius)
        chosen = clips.draw_indices(positive, 1, rng)
        if len(negative) == 0:
            every = np.arange(num_frames)
            far = every[np.abs(every - anchor) > params.positive_radius]
            negative = far if len(far) else every[(every != anchor) & (every != chosen[0])]
        roles = {
            "anchor": np.array([anchor]),
            "positive": chosen,
            "negatives": clips.draw_indices(negative, params.num_negatives, rng, params.negatives_replacement),
        }
        if params.key_batch_includes_second_crop:
            roles["second"] = np.array([anchor])
        return roles

    @classmethod
    def check(cls, params: UCLParams, context: MethodContext, videos: int) -> list[str]:
        steps = context.epochs * context.steps_per_epoch
        warnings = slow_twin_warning("methods.ucl.momentum", params.momentum, steps)
        if params.cross_only_epochs >= context.epochs:
            warnings.append(
                f"methods.ucl.cross_only_epochs = {params.cross_only_epochs} is not below pretrain.epochs = {context.epochs}: the "
                f"intra-video negatives are never used."
            )
        if videos < 2 and params.bank_exclude_own_video:
            warnings.append(
                "methods.ucl.bank_exclude_own_video: true with a single video leaves no cross-video negative: the loss is constantly 0 in the "
                "first cross_only_epochs. Use more videos, or set cross_only_epochs to 0."
            )
        elif context.global_batch == 1 and params.bank_exclude_own_video and params.bank_size == "auto":
            warnings.append(
                "pretrain.batch_size = 1 with methods.ucl.bank_size = auto: the bank holds the anchor's own video only, so there is "
                "no cross-video negative. Set bank_size to several times num_negatives."
            )
        return warnings

    def cross_only(self, epoch: int) -> bool:
        """True in the first epochs, in which the loss has no intra-video negatives."""
        return epoch < self.params.cross_only_epochs

    def chance_loss(self, progress: Progress) -> float:
        return math.log(2 if self.cross_only(progress.epoch) else self.params.num_negatives + 2)

    def _embed_positives(self, batch: ClipBatch, progress: Progress) -> torch.Tensor:
        """z+ [B, D]. The anchor's second crop shares the key batch only to reproduce published batch-norm statistics."""
        images = batch.frames["positive"].flatten(0, 1)
        if "second" in batch.frames:
            images = torch.cat([batch.frames["second"].flatten(0, 1), images])
        return self.encode_keys(images, progress, self.params.batch_shuffle)[-len(batch.video) :]

    def _embed_negatives(self, batch: ClipBatch, cross_only: bool) -> torch.Tensor:
        """z of the intra-video negatives [B, n, D], sample-major; without gradient where the loss has no use for one."""
        images = batch.frames["negatives"]
        prefix = "key_" if self.params.negatives_encoder == "key" else ""
        with torch.set_grad_enabled(not cross_only and not prefix):
            return self.encode(images.flatten(0, 1), prefix).unflatten(0, images.shape[:2])

    def logits(self, batch: ClipBatch, progress: Progress) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits [B, 2] (cross-only phase) or [B, n + 2], column 0 correct, and metrics; writes the bank.

        The order matters (it decides batch-norm statistics and the bank's content): negatives, bank, anchors, keys.
        """
        params, cross_only = self.params, self.cross_only(progress.epoch)
        negatives = self._embed_negatives(batch, cross_only)
        videos = distributed.all_gather_rows(batch.video.repeat_interleave(params.num_negatives))
        self.bank.write(distributed.all_gather_rows(negatives.flatten(0, 1)), videos, params.bank_overflow)
        q = self.encode(batch.frames["anchor"].flatten(0, 1))
        positive = self._embed_positives(batch, progress)
        allowed = self.bank.allowed(
            batch.video, exclude_own=params.bank_exclude_own_video, mask_unwritten=params.bank_mask_unwritten
        )
        z_hat, rows, exists = losses.cross_video_negative(
            q, self.bank.rows, support=params.support_size, temperature=params.mixing_temperature, allowed=allowed,
            mode=params.cross_negative,
        )
        logits = losses.ucl_logits(q, positive, None if cross_only else negatives, z_hat, params.temperature, exists)
        own = (self.bank.videos[rows] == batch.video[:, None]).float()
        metrics = {
            "accuracy": (logits.argmax(1) == 0).float().mean(),
            "positive_similarity": (q * positive).sum(1).mean().detach(),
            "intra_negative_similarity": torch.einsum("bd,bnd->bn", q, negatives).mean().detach(),
            "cross_negative_similarity": (q * z_hat).sum(1).mean().detach(),
            "own_video_support": own.mean() if own.numel() else own.sum(),
        }
        return logits, metrics

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        logits, metrics = self.logits(batch, progress)
        return StepOutput(losses.first_column_cross_entropy(logits), metrics)
