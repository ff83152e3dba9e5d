"""Backbones by name: a trunk with plain torchvision parameter names that maps images to pooled features.

The trunk is torchvision's model with its classifier replaced by an identity, so an exported file loads into torchvision
with only `fc` missing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipeline.checkpoint import read_state_dict
from pipeline.errors import CheckpointError
from pipeline.registry import BACKBONES

__all__ = ["BackboneSpec", "build_backbone", "imagenet_state", "last_block_prefix"]


@dataclass(frozen=True)
class BackboneSpec:
    """One residual network: torchvision's block and layers, and the file name of its ImageNet V1 weights (or None)."""

    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    weights: str | None

    @property
    def feature_dim(self) -> int:
        """Channels after global average pooling."""
        return 512 * self.block.expansion


# resnet10 is torchvision's ResNet with one basic block a stage: its keys are a subset of resnet18's. It is there for
# CPUs and tests, where resnet18 is three times slower.
BACKBONES.register("resnet10")(BackboneSpec(BasicBlock, (1, 1, 1, 1), None))
BACKBONES.register("resnet18")(BackboneSpec(BasicBlock, (2, 2, 2, 2), "resnet18-f37072fd.pth"))
BACKBONES.register("resnet34")(BackboneSpec(BasicBlock, (3, 4, 6, 3), "resnet34-b627a593.pth"))
BACKBONES.register("resnet50")(BackboneSpec(Bottleneck, (3, 4, 6, 3), "resnet50-0676ba61.pth"))


def build_backbone(name: str, seed: int = 0) -> tuple[nn.Module, int]:
    """A randomly initialised trunk and its feature size. Images [B, 3, H, W] -> features [B, F].

    The initialisation depends on `seed` alone, so that "random initialisation" is the same network in every process.
    """
    spec = BACKBONES.get(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(spec.block, list(spec.layers))
    network.fc = nn.Identity()
    return network, spec.feature_dim


def last_block_prefix(name: str) -> str:
    """Parameter-name prefix of the last residual block, e.g. `layer4.1.` for resnet18 and `layer4.2.` for resnet50."""
    return f"layer4.{BACKBONES.get(name).layers[3] - 1}."


def imagenet_state(name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights from torch hub's cache folder; nothing is downloaded.

    Raises:
        CheckpointError: the file is not there; the message says where to put it and how to get it.
    """
    spec = BACKBONES.get(name)
    if spec.weights is None:
        raise CheckpointError(
            f"pretrain.init: imagenet weights do not exist for backbone '{name}'. Allowed here: random, or a path. "
            f"ImageNet weights exist for resnet18, resnet34, resnet50."
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / spec.weights
    if not path.is_file():
        shown = f"~{os.sep}{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
        raise CheckpointError(
            f"pretrain.init: imagenet was asked for, but {shown} does not exist. On a machine with network access run "
            f"`python -c \"import torchvision; torchvision.models.get_model('{name}', weights='IMAGENET1K_V1')\"` and copy "
            f"that file there, or set pretrain.init to random or to a path of weights (torchvision {torchvision.__version__} names)."
        )
    return read_state_dict(path)
