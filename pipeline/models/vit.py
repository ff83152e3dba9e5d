"""The vision transformer behind the `vit_*` backbones: timm's, with positions resampled as MSN and DINO do.

A module of its own, so that runs with a ResNet need not wait for timm.
"""

from __future__ import annotations

import math

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.models.catalog import BackboneInfo

__all__ = ["ClassTokenViT", "resample_positions", "vit_stages"]


class ClassTokenViT(VisionTransformer):
    """Images [B, 3, H, W], any size that the patches divide -> class token [B, F] after the final norm.

    Positions are resampled to the grid of the images without antialiasing; timm's own resampling antialiases, which changes
    the features of small crops by about one per cent. `image_size` is that of the stored table of positions.
    """

    def __init__(self, info: BackboneInfo, image_size: int) -> None:
        super().__init__(
            img_size=image_size, patch_size=info.patch_size, embed_dim=info.feature_dim, depth=info.blocks[0],
            num_heads=info.heads, num_classes=0, global_pool="token", dynamic_img_size=True,
            init_values=1e-5 if info.layer_scale else None,
        )
        # As MSN trains it (Assran et al., ECCV 2022); timm's class token starts near zero, its patches like any convolution.
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.patch_embed.proj.bias)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Patches [B, h, w, F] -> tokens [B, 1 + h w, F] with positions added (a hook of timm's)."""
        grid = [int(side) for side in x.shape[1:3]]
        positions = resample_abs_pos_embed(self.pos_embed, grid, list(self.patch_embed.grid_size), antialias=False)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(tokens + positions)


def resample_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions [1, 1 + s*s, F] of class token and square patch grid -> [1, 1 + side*side, F], bicubic, no antialiasing.

    Raises:
        CheckpointError: the table is not that of one class token and a square grid.
    """
    old = math.isqrt(max(0, positions.shape[1] - 1)) if positions.ndim == 3 else 0
    if old < 1 or len(positions) != 1 or 1 + old * old != positions.shape[1]:
        raise CheckpointError(
            f"pos_embed: a table of shape {tuple(positions.shape)}; wanted is [1, 1 + s*s, F], one class token and a square grid of patches."
        )
    return resample_abs_pos_embed(positions, [side, side], [old, old], antialias=False)


class _Embedding(nn.Module):
    """Images -> tokens [B, 1 + N, F]: the first stage of a transformer, with the parameters it uses."""

    def __init__(self, vit: ClassTokenViT) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = vit.patch_embed, vit.cls_token, vit.pos_embed
        self._positions = vit._pos_embed  # a function of these parameters, not a part

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._positions(self.patch_embed(images))


class _ClassToken(nn.Module):
    """Tokens [B, T, F] -> the first [B, F]."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0]


def vit_stages(vit: ClassTokenViT) -> list[tuple[str, nn.Module]]:
    """The transformer as a sequence of (name, module) that share its parameters, ending with the class token."""
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(vit.blocks)]
    return [("embed", _Embedding(vit)), *blocks, ("norm", nn.Sequential(vit.norm, _ClassToken()))]
