"""Optimisers and the learning rate as a pure function of the epoch, so that a resumed run has the same rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from pipeline.parameters import OptimizerParams

__all__ = ["build_optimizer", "learning_rate", "set_learning_rate"]


def learning_rate(params: OptimizerParams, epochs: int, epoch: float) -> float:
    """Rate at a (fractional) epoch: linear warm-up, constant part, then a cosine from `lr` to `min_lr`.

    lr_e = min + (lr - min)(1 + cos(pi t / period)) / 2 with t the epochs since the cosine began. With `per_epoch` the
    fraction is dropped, as in the published recipes.
    """
    if params.per_epoch:
        epoch = math.floor(epoch)
    if epoch < params.warmup_epochs:
        return params.lr * (epoch + 1) / (params.warmup_epochs + 1)
    if params.schedule == "constant":
        return params.lr
    start = params.warmup_epochs + params.constant_epochs
    period = params.schedule_epochs or max(1, epochs - start)
    progress = min(max(epoch - start, 0.0), period)
    return params.min_lr + (params.lr - params.min_lr) * (1 + math.cos(math.pi * progress / period)) / 2


def build_optimizer(params: OptimizerParams, weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD (no Nesterov), Adam (L2 in the gradient) or AdamW over the weights that want a gradient, one group.

    Weight decay applies to every weight, biases and batch norm included, as in the published recipes.
    """
    trained = [w for w in weights if w.requires_grad]
    if params.name == "sgd":
        return torch.optim.SGD(trained, lr=params.lr, momentum=params.momentum, weight_decay=params.weight_decay, foreach=True)
    kind = torch.optim.Adam if params.name == "adam" else torch.optim.AdamW
    return kind(trained, lr=params.lr, weight_decay=params.weight_decay, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
