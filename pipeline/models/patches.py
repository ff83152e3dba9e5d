"""Which patches of an image a vision transformer sees, and its forward pass over those alone.

Dropped patches are not processed at all (no mask token), as in Masked Siamese Networks (arXiv 2204.07141).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["class_token", "draw_patches", "kept_patches"]


def kept_patches(patches: int, drop: float) -> int:
    """Number of patches kept of `patches`: floor(patches * (1 - drop)), the product in floating point as published."""
    return int(patches * (1.0 - drop))


def draw_patches(patches: int, keep: int, seeds: Sequence[float]) -> torch.Tensor:
    """Random patches of each image, a pure function of its number in [0, 1). -> int64 [len(seeds), keep] on the CPU."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed * 2**24))
        rows.append(torch.randperm(patches, generator=generator)[:keep])
    return torch.stack(rows)


def class_token(vit: nn.Module, images: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Class token behind the final norm, computed from the patches `kept` only (None: all).

    Args:
        vit: `pipeline.models.backbones.ClassTokenViT`. images: [B, 3, H, W]. kept: int64 [B, n], patch numbers of each image.

    Returns:
        [B, F].
    """
    tokens = vit._pos_embed(vit.patch_embed(images))
    if kept is not None:
        # Positions are already added, so the order of the kept tokens does not matter; token 0 is the class token.
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        tokens = tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))
    return vit.norm(vit.blocks(vit.norm_pre(tokens)))[:, 0]
