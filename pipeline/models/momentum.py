"""Slowly moving parts: the momentum (EMA) copy of a network and the ring buffer of embeddings.

Both belong to the resumable state of a run, not to exported weights.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import nn

__all__ = ["EmbeddingBank", "cosine_momentum", "ema_update", "momentum_copy"]


def momentum_copy(network: nn.Module) -> nn.Module:
    """A deep copy that never receives gradients; it starts equal to `network`."""
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


@torch.no_grad()
def ema_update(key: nn.Module, query: nn.Module, momentum: float) -> None:
    """key <- momentum * key + (1 - momentum) * query, parameters only.

    Batch-norm running statistics are not averaged: the key network keeps those of its own forward passes (He et al.,
    CVPR 2020; confirmed for UCL). One fused call over all tensors, since a Python loop costs more than the arithmetic.
    """
    keys, queries = list(key.parameters()), list(query.parameters())
    torch._foreach_mul_(keys, momentum)
    torch._foreach_add_(keys, queries, alpha=1.0 - momentum)


def cosine_momentum(start: float, step: int, steps: int) -> float:
    """Momentum of a step of a run of `steps`: `start` at step 0, rising to 1 along a half cosine.

    1 - (1 - start)(cos(pi step / steps) + 1) / 2 (BYOL, Grill et al., NeurIPS 2020, section 3.2; DINO uses the same).
    """
    progress = min(max(step, 0), steps) / max(steps, 1)
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


class EmbeddingBank:
    """Ring buffer of M embeddings with the video each came from.

    Attributes:
        rows: [M, D], zero where never written. videos: int64 [M], -1 where never written. pointer: next row to write.
    """

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(size, dim, dtype=dtype, device=device)
        self.videos = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.pointer = 0

    def write(self, rows: torch.Tensor, videos: torch.Tensor, overflow: Literal["newest", "official"] = "newest") -> bool:
        """Write c rows [c, D] at the pointer, wrapping around; returns False if nothing was written.

        When c > M: `newest` keeps the last M rows, each where the ring would have put it. `official` imitates the
        published program: at pointer 0 the *first* M rows are kept and the pointer stays; elsewhere nothing is written.
        """
        size, count = len(self.rows), len(rows)
        rows, videos = rows.detach().to(self.rows), videos.to(self.videos)
        if count > size and overflow == "official":
            if self.pointer != 0:
                return False
            self.rows.copy_(rows[:size])
            self.videos.copy_(videos[:size])
            return True
        skipped = max(0, count - size)
        slots = (torch.arange(skipped, count, device=self.rows.device) + self.pointer) % size
        self.rows[slots] = rows[skipped:]
        self.videos[slots] = videos[skipped:]
        self.pointer = (self.pointer + count) % size
        return True

    def allowed(self, videos: torch.Tensor, *, exclude_own: bool, mask_unwritten: bool) -> torch.Tensor | None:
        """bool [B, M]: which rows each of the B anchors (int64 [B] video numbers) may use; None when nothing is masked."""
        if not (exclude_own or mask_unwritten):
            return None
        mask = torch.ones(len(videos), len(self.rows), dtype=torch.bool, device=self.rows.device)
        if exclude_own:
            mask &= self.videos[None, :] != videos[:, None]
        if mask_unwritten:
            mask &= (self.videos >= 0)[None, :]
        return mask

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors for an exact resume."""
        return {"rows": self.rows, "videos": self.videos, "pointer": torch.tensor(self.pointer)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`; shapes must match."""
        self.rows.copy_(state["rows"])
        self.videos.copy_(state["videos"])
        self.pointer = int(state["pointer"])

    def to(self, device: torch.device | str) -> None:
        """Move the buffer to another device, in place."""
        self.rows, self.videos = self.rows.to(device), self.videos.to(device)
