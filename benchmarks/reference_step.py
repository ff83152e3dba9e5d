"""A UCL step that does everything the published program does, for the benchmark of our own step.

Written from the description of Basu et al. (MICCAI 2022) and of the behaviour of their program, not from its text. What
our step leaves out, because it cannot reach the loss: negatives encoded with gradients in the cross-video phase too,
second crops through the key network, cycle heads, two queues that are multiplied and thrown away. What ours does
otherwise: no Python loops over samples and parameters, one fused optimiser and momentum update, channels-last weights.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.models.backbones import build_backbone

__all__ = ["ReferenceStep"]


class ReferenceStep:
    """One process, no data-parallel wrapper (whose buffer broadcast would come on top).

    Args:
        backbone: name. batch: videos of a step. negatives: of each video.
        queue, cycle_queue: entries of the dead queues; the defaults are those of the published program (its scripts
            shrink the first to 32).
    """

    def __init__(
        self, backbone: str, device: torch.device, *, batch: int, negatives: int, dim: int = 128, queue: int = 65536,
        cycle_queue: int = 81920, support: int = 4, temperature: float = 0.07, momentum: float = 0.999,
    ) -> None:
        trunk, features = build_backbone(backbone)
        parts = {"trunk": trunk, "head": _mlp(features, dim), "cycle": _mlp(features, dim)}
        self.query = nn.ModuleDict(parts).to(device)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.bank = torch.zeros(batch * negatives, dim, device=device)
        self.queue = F.normalize(torch.randn(dim, queue, device=device), dim=0)
        self.cycle_queue = F.normalize(torch.randn(dim, cycle_queue, device=device), dim=0)
        self.support, self.temperature, self.momentum, self.written = support, temperature, momentum, 0
        self.optimizer = torch.optim.SGD(self.query.parameters(), 0.003, momentum=0.9, weight_decay=1e-4)

    def __call__(self, frames: dict[str, torch.Tensor], cross_only: bool) -> float:
        """One optimiser step; the loss. Roles anchor, second, positive: [B, 1, 3, H, W]; negatives: [B, n, 3, H, W]."""
        batch, count = frames["negatives"].shape[:2]
        negatives, _ = self._embed(self.query, frames["negatives"].flatten(0, 1))
        self.bank.copy_(negatives.detach())
        q, q_cycle = self._embed(self.query, frames["anchor"].flatten(0, 1))
        with torch.no_grad():
            for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = mine.data * self.momentum + other.data * (1 - self.momentum)
            images = torch.cat([frames["second"].flatten(0, 1), frames["positive"].flatten(0, 1)])
            keys, keys_cycle = self._embed(self.key, images)
            second, positive = keys.chunk(2)
        self._dead_branches(q, q_cycle, second, keys_cycle)
        rows = []
        own = negatives.view(batch, count, -1)
        for sample in range(batch):
            scores = self.bank @ q[sample]
            top, chosen = scores.topk(self.support)
            z_hat = (top / self.temperature).softmax(0) @ self.bank[chosen]
            columns = [(q[sample] * positive[sample]).sum()[None]]
            if not cross_only:
                columns.append(own[sample] @ q[sample])
            columns.append((q[sample] * z_hat).sum()[None])
            rows.append(torch.cat(columns) / self.temperature)
        logits = torch.stack(rows)
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64, device=logits.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @staticmethod
    def _embed(networks: nn.ModuleDict, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit-length embeddings of both heads, [B, D] each."""
        features = networks["trunk"](images)
        return F.normalize(networks["head"](features), dim=1), F.normalize(networks["cycle"](features), dim=1)

    def _dead_branches(
        self, q: torch.Tensor, q_cycle: torch.Tensor, second: torch.Tensor, keys_cycle: torch.Tensor
    ) -> None:
        """Queue logits, soft nearest neighbour and cycle back: computed by the program, never used by its loss."""
        torch.cat([(q * second).sum(1, keepdim=True), q @ self.queue], dim=1).div(self.temperature)
        nearest = []
        for sample in q_cycle @ self.cycle_queue:
            top, chosen = sample.topk(self.support)
            nearest.append(self.cycle_queue[:, chosen] @ (top / self.temperature).softmax(0))
        (torch.stack(nearest) @ keys_cycle.T).div(self.temperature).softmax(1)
        for rows, queue in ((second, self.queue), (keys_cycle, self.cycle_queue)):
            first = self.written % (queue.shape[1] - len(rows))
            queue[:, first : first + len(rows)] = rows.T
        self.written += len(keys_cycle)


def _mlp(features: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))
