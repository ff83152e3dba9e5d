"""Several levels of a residual network: its stage maps, a feature pyramid on them, an embedding of each pyramid map.

HiCo (Zhang et al., ACCV 2022) over the pyramid of Lin et al., CVPR 2017. Letters: C2 ... C5 outputs of the four stages (strides 4,
8, 16, 32), P2 ... P5 pyramid maps of the same sizes. Nothing is built that a loss over the wanted maps does not reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MAPS", "WIDTH", "LevelProjector", "Pyramid", "map_side", "pooled", "stage_channels", "stage_maps"]

WIDTH = 256
"""Channels of every pyramid map, and units of every projector's hidden layer."""
MAPS = ("p2", "p3", "p4", "p5")
"""From fine to coarse."""
Pool = Literal["gap", "flatten"]


def stage_maps(backbone: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """C2 ... C5 of a torchvision ResNet. [B, 3, H, W] -> four maps [B, C, H/4, W/4] to [B, C, H/32, W/32], sides rounded up."""
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
    maps = []
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def stage_channels(backbone: nn.Module) -> list[int]:
    """Channels of C2 ... C5, read from the last convolution of each stage."""
    last = [[m for m in getattr(backbone, f"layer{i}").modules() if isinstance(m, nn.Conv2d)] for i in range(1, 5)]
    # In torchvision's first blocks the shortcut's convolution comes last; it has as many output channels.
    return [convolutions[-1].out_channels for convolutions in last]


def pooled(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The trunk's ordinary features: global average of C5. [B, C, h, w] -> [B, C]."""
    return maps[-1].mean((2, 3))


def map_side(name: str, image_size: int) -> int:
    """Side in pixels of a pyramid map (`p2` ... `p5`) of square images."""
    return -(-image_size // 2 ** int(name[1]))


class Pyramid(nn.Module):
    """C2 ... C5 -> the wanted of P2 ... P5, each [B, 256, h, w].

    P5 = conv1x1(C5), Q_k = up(Q_k+1) + conv1x1(C_k) with Q5 = P5, P_k = conv3x3(Q_k); convolutions with bias, no norm, no
    activation; up() is bilinear to the size of C_k, corners not aligned. P5 has no 3x3 unless `smooth_p5` (the paper's figure
    draws one, the published program has none).

    Args:
        channels: of C2 ... C5. wanted: names of the maps to make, of p2, p3, p4, p5.
    """

    def __init__(self, channels: Sequence[int], wanted: Iterable[str] = MAPS, *, smooth_p5: bool = False) -> None:
        super().__init__()
        self.wanted = sorted(wanted)
        inputs = dict(zip(MAPS, channels, strict=True))
        self.lateral = nn.ModuleDict({name: nn.Conv2d(inputs[name], WIDTH, 1) for name in MAPS if name >= self.wanted[0]})
        smoothed = [name for name in self.wanted if name != "p5" or smooth_p5]
        self.smooth = nn.ModuleDict({name: nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for name in smoothed})

    def forward(self, maps: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        stages = dict(zip(MAPS, maps, strict=True))
        found: dict[str, torch.Tensor] = {}
        above: torch.Tensor | None = None
        for name in sorted(self.lateral, reverse=True):
            here = self.lateral[name](stages[name])
            if above is not None:
                here = F.interpolate(above, size=here.shape[-2:], mode="bilinear", align_corners=False) + here
            above = here
            if name in self.wanted:
                found[name] = self.smooth[name](here) if name in self.smooth else here
        return found


class LevelProjector(nn.Module):
    """V relu(U pool(P)): the embedding of one pyramid map. [B, 256, h, w] -> [B, D].

    Args:
        pool: `gap` averages the map, so that any image size fits; `flatten` keeps every position as published, which fixes the
            image size and needs 256 x 256 x side^2 weights. side: of the map, used by `flatten`. embedding_dim: D; None
            leaves V out and returns relu(U pool(P)), [B, 256].
    """

    def __init__(self, pool: Pool, side: int, embedding_dim: int | None) -> None:
        super().__init__()
        self.pool = pool
        self.hidden = nn.Linear(WIDTH * (side * side if pool == "flatten" else 1), WIDTH)
        self.out = nn.Identity() if embedding_dim is None else nn.Linear(WIDTH, embedding_dim)

    def forward(self, pyramid_map: torch.Tensor) -> torch.Tensor:
        rows = pyramid_map.mean((2, 3)) if self.pool == "gap" else pyramid_map.flatten(1)
        return self.out(F.relu(self.hidden(rows)))
