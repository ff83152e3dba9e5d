"""Backbones built from the catalog: trunks with plain torchvision or timm names that map images to one feature vector.

The classifier is an identity, so an exported file loads into torchvision with only `fc` missing, and into timm's model
(built with num_classes=0) with nothing missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pipeline.checkpoint import read_state_dict
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.catalog import BackboneInfo, describe, names, size_problem

__all__ = ["build_backbone", "build_trunk", "imagenet_state"]


def build_trunk(info: BackboneInfo, image_size: int = 224) -> nn.Module:
    """The network of a description, initialised from torch's global random state.

    Raises:
        ConfigError: the patches of a transformer do not divide the image.
    """
    if line := size_problem(info, image_size):
        raise ConfigError(line)
    if info.family == "vit":
        from pipeline.models.vit import ClassTokenViT

        return ClassTokenViT(info, image_size)
    network = ResNet(Bottleneck if info.feature_dim == 2048 else BasicBlock, list(info.blocks))
    network.fc = nn.Identity()
    return network


def build_backbone(name: str, seed: int = 0, image_size: int = 224) -> tuple[nn.Module, int]:
    """A randomly initialised trunk and its feature size. Images [B, 3, H, W] -> features [B, F].

    The initialisation depends on `seed` alone, so that "random initialisation" is the same network in every process. The
    image size decides how many positions a vision transformer has; it takes other sizes too.
    """
    info = describe(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_trunk(info, image_size), info.feature_dim


def _shown(path: Path) -> str:
    return f"~{os.sep}{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def imagenet_state(name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights from torch hub's or Hugging Face's cache folder; nothing is downloaded.

    Raises:
        CheckpointError: the file is not there; the message says where to put it and how to get it.
    """
    info = describe(name)
    if not info.weights:
        known = ", ".join(n for n in names() if describe(n).weights)
        raise CheckpointError(
            f"pretrain.init: imagenet weights do not exist for backbone '{name}'. Allowed here: random, or a path. "
            f"ImageNet weights exist for {known}."
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / info.weights
    if path.is_file():
        return read_state_dict(path)
    if info.hub:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(info.hub, "model.safetensors")
        if isinstance(cached, str):
            return read_state_dict(Path(cached))
    command = (
        f"import timm; timm.create_model('{info.hub.removeprefix('timm/')}', pretrained=True)" if info.hub else
        f"import torchvision; torchvision.models.get_model('{name}', weights='IMAGENET1K_V1')"
    )
    where = f"copy the folder models--{info.hub.replace('/', '--')} of its Hugging Face cache here" if info.hub else "copy that file there"
    raise CheckpointError(
        f"pretrain.init: imagenet was asked for, but {_shown(path)} does not exist. On a machine with network access run "
        f'`python -c "{command}"` and {where}, or set pretrain.init to random or to a path of weights '
        f"({'timm' if info.hub else f'torchvision {torchvision.__version__}'} names)."
    )
