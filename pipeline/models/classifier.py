"""A trunk with a classifier on top: what trains, what stays frozen, and where the frozen part ends.

When the first layers are frozen their outputs never change, so they can be computed once; `split` cuts the network there.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.backbones import last_block_prefix
from pipeline.registry import HEADS

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Images [B, 3, H, W] -> logits [B, C].

    Args:
        backbone: trunk with torchvision names and `fc` an identity. trainable: `linear` (head only), `last_block`, `all`,
            or a parameter-name prefix. batchnorm: `frozen` keeps running statistics of frozen layers as they are; `train`
            lets them follow the batches, as the published lung recipe does; `official_eval_after_first_epoch` reproduces the
            published gallbladder program, which never returns to training mode after its first validation.
    """

    def __init__(self, backbone: nn.Module, name: str, features: int, classes: int, *, head: str, trainable: str, batchnorm: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = HEADS.get(head)(features, classes)
        self.batchnorm = batchnorm
        prefix = {"linear": None, "last_block": last_block_prefix(name), "all": ""}.get(trainable, trainable)
        named = dict(backbone.named_parameters())
        chosen = [n for n in named if prefix is not None and n.startswith(prefix)]
        if trainable not in ("linear", "all", "last_block") and not chosen:
            blocks = sorted({".".join(n.split(".")[:2]) for n in named if n.startswith("layer")})
            raise ConfigError(
                f"finetune.trainable: no parameter of {name} begins with '{trainable}'. Allowed: linear, last_block, all, or a prefix "
                f"such as {', '.join(blocks[-3:])}."
            )
        for parameter_name, parameter in named.items():
            parameter.requires_grad_(parameter_name in chosen)
        self.trained_names = chosen

    def stages(self) -> list[tuple[str, nn.Module]]:
        """The trunk as a sequence of (name, module), ending with pooling."""
        b = self.backbone
        blocks = [(f"layer{i}.{j}", block) for i in range(1, 5) for j, block in enumerate(getattr(b, f"layer{i}"))]
        stem = nn.Sequential(b.conv1, b.bn1, b.relu, b.maxpool)
        return [("conv1", stem), *blocks, ("pool", nn.Sequential(b.avgpool, nn.Flatten(1)))]

    def split(self) -> tuple[nn.Module, nn.Module]:
        """(frozen, live): images -> constants, constants -> logits. The cut is before the first stage that trains."""
        stages = self.stages()

        def trains(module: nn.Module) -> bool:
            return any(p.requires_grad for p in module.parameters())

        cut = next((i for i, (_, module) in enumerate(stages) if trains(module)), len(stages))
        frozen = nn.Sequential(*[module for _, module in stages[:cut]])
        return frozen, nn.Sequential(*[module for _, module in stages[cut:]], self.head)

    @property
    def cacheable(self) -> bool:
        """True when some first layers are constants: frozen weights and frozen batch-norm statistics."""
        return self.batchnorm == "frozen" and "conv1.weight" not in self.trained_names

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
        return self.head(self.backbone(images))
