"""Which patches of an image a vision transformer sees, and its forward pass over those alone.

Dropped patches are not processed at all (no mask token), as in Masked Siamese Networks (arXiv 2204.07141).
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["class_token", "draw_patches", "kept_patches"]


def kept_patches(patches: int, drop: float) -> int:
    """Number of patches kept of `patches`: floor(patches * (1 - drop)), the product in floating point as published."""
    return int(patches * (1.0 - drop))


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """A bijection of the integers below 2^32 that looks random (Wellons, "Hash Prospector"); int64, products below 2^63."""
    numbers = ((numbers ^ (numbers >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    numbers = ((numbers ^ (numbers >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return numbers ^ (numbers >> 15)


def draw_patches(patches: int, keep: int, seeds: torch.Tensor) -> torch.Tensor:
    """Random patches of each image, a pure function of its number in [0, 1), equal on every device.

    Integer keys are sorted where the numbers lie: a generator for each image would make a GPU wait for the CPU in every step.

    Args:
        seeds: float32 [B].

    Returns:
        int64 [B, keep], on the device of `seeds`.
    """
    image = _mixed((seeds * 2**24).long())
    keys = _mixed((image[:, None] + torch.arange(patches, device=seeds.device)) & 0xFFFFFFFF)
    return keys.argsort(dim=1)[:, :keep]


def class_token(vit: nn.Module, images: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Class token behind the final norm, computed from the patches `kept` only (None: all).

    Args:
        vit: `pipeline.models.vit.ClassTokenViT`. images: [B, 3, H, W]. kept: int64 [B, n], patch numbers of each image.

    Returns:
        [B, F].
    """
    tokens = vit._pos_embed(vit.patch_embed(images))
    if kept is not None:
        # Positions are already added, so the order of the kept tokens does not matter; token 0 is the class token.
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        tokens = tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))
    return vit.norm(vit.blocks(vit.norm_pre(tokens)))[:, 0]
