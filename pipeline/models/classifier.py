"""A trunk with a classifier on top: what trains, what stays frozen, where the frozen part ends, and how a video's frames are joined.

When the first layers are frozen their outputs never change, so they can be computed once; `split` cuts the network there.
Letters: N frames, C classes, F features, V videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.catalog import describe, last_block, levels_problem, trainable_problem, within
from pipeline.models.levels import stage_channels, stage_maps
from pipeline.models.lora import add_lora
from pipeline.registry import HEADS

__all__ = ["Classifier", "GatedAttention", "attend"]

ATTENTION_WIDTH = 128
"""Hidden units of the attention (Ilse et al.: L = 128)."""


class GatedAttention(nn.Module):
    """Score of a frame among those of its video: w . (tanh(V f) * sigmoid(U f)). Features [N, F] -> [N, 1].

    Gated attention pooling, Ilse et al., ICML 2018 (arXiv 1802.04712), eq. 9 without the softmax over the video (`attend`).
    w starts at 0, so that training begins with the plain mean of the frames.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.signal, self.gate = nn.Linear(features, ATTENTION_WIDTH), nn.Linear(features, ATTENTION_WIDTH)
        self.score = nn.Linear(ATTENTION_WIDTH, 1, bias=False)  # a bias would change no weight
        nn.init.zeros_(self.score.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.score(self.signal(features).tanh() * self.gate(features).sigmoid())


def attend(outputs: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of videos from those of their frames, weighed by the softmax of the frames' scores (eq. 7, 8 on logits).

    Args:
        outputs: [N, C + 1], logits and score of every frame, video after video. sizes: frames of each video.

    Returns:
        logits [V, C]; weights [N], of sum 1 within a video.
    """
    weights = torch.cat([scores.softmax(0) for scores in outputs[:, -1].split(list(sizes))])
    parts = (weights[:, None] * outputs[:, :-1]).split(list(sizes))
    return torch.stack([part.sum(0) for part in parts]), weights


class _Joined(nn.Module):
    """Outputs of several modules for the same features, side by side."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(features) for part in self.parts], dim=1)


class Classifier(nn.Module):
    """Images [N, 3, H, W] -> logits [N, C]; with pooling `attention` [N, C + 1], the last column being the score for `attend`.

    Args:
        backbone: trunk of the catalog, its classifier an identity. trainable: `linear` (head only), `last_block`, `all`,
            `lora` (adapters of rank `lora_rank` and the head; transformers only), or the name of a part. batchnorm: `frozen`
            keeps running statistics of frozen layers as they are; `train` lets them follow the batches, as the published
            lung recipe does; `official_eval_after_first_epoch` reproduces the published gallbladder program, which never
            returns to training mode after its first validation. image_size, extras (what pretraining left beside the trunk,
            None without pretraining): read by heads that take several levels of features. pooling: `mean` or `attention`.
    """

    def __init__(
        self, backbone: nn.Module, name: str, features: int, classes: int, *, head: str, trainable: str, batchnorm: str,
        lora_rank: int = 8, lora_alpha: float = 16.0, image_size: int = 224, extras: Mapping[str, torch.Tensor] | None = None, pooling: str = "mean",
    ) -> None:
        super().__init__()
        self.backbone, self.info = backbone, describe(name)
        kind = HEADS.get(head)
        self.takes_levels: bool = getattr(kind, "takes_levels", False)
        if self.takes_levels and (line := levels_problem(self.info, f"finetune.head: {head}")):
            raise ConfigError(line)
        self.head = kind(stage_channels(backbone), classes, image_size, extras) if self.takes_levels else kind(features, classes)
        if pooling == "attention" and self.takes_levels:
            raise ConfigError(f"finetune.pooling: attention weighs frames by their pooled features; head {head} takes others. Use mean.")
        # Behind the head, which thereby starts from the same random numbers with and without it.
        self.attention = GatedAttention(features) if pooling == "attention" else None
        self.batchnorm = batchnorm
        if line := trainable_problem(self.info, trainable):
            raise ConfigError(line)
        if trainable == "lora":
            self.trained_names = add_lora(backbone, lora_rank, lora_alpha)
            return
        parts = {"linear": (), "last_block": last_block(self.info), "all": ("",)}.get(trainable, (trainable,))
        self.trained_names = [n for n, _ in backbone.named_parameters() if any(within(n, part) for part in parts)]
        if not self.trained_names and trainable != "linear":
            raise ConfigError(f"finetune.trainable: no parameter of {name} begins with '{trainable}'. Allowed: linear, last_block, all, lora.")
        for parameter_name, parameter in backbone.named_parameters():
            parameter.requires_grad_(parameter_name in self.trained_names)

    def stages(self) -> list[tuple[str, nn.Module]]:
        """The trunk as a sequence of (name, module), ending with pooling."""
        b = self.backbone
        if self.info.family == "vit":
            from pipeline.models.vit import vit_stages

            return vit_stages(b)
        blocks = [(f"layer{i}.{j}", block) for i in range(1, 5) for j, block in enumerate(getattr(b, f"layer{i}"))]
        stem = nn.Sequential(b.conv1, b.bn1, b.relu, b.maxpool)
        return [("conv1", stem), *blocks, ("pool", nn.Sequential(b.avgpool, nn.Flatten(1)))]

    def _cut(self) -> int:
        """Number of first stages without anything that trains."""
        live = (i for i, (_, module) in enumerate(self.stages()) if any(p.requires_grad for p in module.parameters()))
        return next(live, len(self.stages()))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """(frozen, live): images -> constants, constants -> logits. The cut is before the first stage that trains."""
        stages = [module for _, module in self.stages()]
        cut = self._cut()
        return nn.Sequential(*stages[:cut]), nn.Sequential(*stages[cut:], self._top())

    @property
    def cacheable(self) -> bool:
        """True when some first layers are constants: frozen weights and frozen batch-norm statistics."""
        if self.takes_levels:
            return False  # maps of four stages are kept, and they are many times larger than the images
        if self.info.family == "vit":
            # The tokens of the first stage alone are larger than the images and cost nothing to compute.
            return self._cut() > 1
        return self.batchnorm == "frozen" and self._cut() > 0

    def _top(self) -> nn.Module:
        return self.head if self.attention is None else _Joined(self.head, self.attention)

    def training_mode(self, epoch: int) -> None:
        """Set the modes of one training epoch (0-based)."""
        if self.batchnorm == "official_eval_after_first_epoch" and epoch > 0:
            self.eval()
            return
        self.train()
        if self.batchnorm != "frozen":
            return
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = stage_maps(self.backbone, images) if self.takes_levels else self.backbone(images)
        return self._top()(features)
