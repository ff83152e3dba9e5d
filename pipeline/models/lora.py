"""Low-rank adaptation of a vision transformer: W + (alpha / r) B A on the attention's qkv and output projections.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["LowRank", "add_lora", "merged_state"]

_INFIX = ".parametrizations.weight."


class LowRank(nn.Module):
    """Weight [out, in] -> weight + (alpha / rank) * up @ down. `up` starts at zero, so nothing changes at first."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.up @ self.down)


def add_lora(backbone: nn.Module, rank: int, alpha: float) -> list[str]:
    """Freeze a transformer and put adapters into all its blocks; returns the names of the parameters that train."""
    backbone.requires_grad_(False)
    for block in backbone.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))
    return [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]


def merged_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with adapters folded into the weights they adapt: plain names, bit for bit the adapted network."""
    state = network.state_dict()
    adapted = {name.split(_INFIX)[0] for name in state if _INFIX in name}
    plain = {name: value for name, value in state.items() if _INFIX not in name}
    return plain | {f"{name}.weight": network.get_submodule(name).weight.detach() for name in sorted(adapted)}
