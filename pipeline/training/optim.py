"""Optimisers; learning rate and weight decay as pure functions of the step, so that a resumed run has the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from pipeline.parameters import OptimizerParams

__all__ = ["apply_schedule", "build_optimizer", "clip_gradients", "learning_rate", "weight_decay"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_TOKENS = ("cls_token", "pos_embed", "reg_token", "mask_token")


def _cosine(start: float, end: float, now: float, period: float) -> float:
    """From `start` at 0 to `end` at `period`, and no further."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(now, 0.0), period) / period)) / 2


def learning_rate(params: OptimizerParams, epochs: int, epoch: float, steps_per_epoch: int = 1) -> float:
    """Rate at a (fractional) epoch: linear warm-up, constant part, then a cosine from `lr` to `min_lr`.

    lr_e = min + (lr - min)(1 + cos(pi t / period)) / 2 with t the epochs since the cosine began. With `per_epoch` the
    fraction is dropped, as in the published recipes. With `warmup_lr` time is counted in whole optimiser steps from 1
    (MSN, 2204.07141, the published program): start + (lr - start) t / w for t < w, then the same cosine.
    """
    if params.per_epoch:
        epoch = math.floor(epoch)
    warm, flat, total = params.warmup_epochs, params.warmup_epochs + params.constant_epochs, params.stretch * epochs
    period: float | None = params.schedule_epochs
    if params.warmup_lr is None:
        if epoch < warm:
            return params.lr * (epoch + 1) / (warm + 1)
    else:
        epoch = round(epoch * steps_per_epoch) + 1
        warm, flat, total = (int(length * steps_per_epoch) for length in (warm, flat, total))
        period = period and period * steps_per_epoch
        if epoch < warm:
            return params.warmup_lr + (params.lr - params.warmup_lr) * epoch / warm
    if params.schedule == "constant":
        return params.lr
    return _cosine(params.lr, params.min_lr, epoch - flat, period or max(1, total - flat))


def weight_decay(params: OptimizerParams, epochs: int, epoch: float, steps_per_epoch: int = 1) -> float:
    """Decay at a (fractional) epoch: constant, or a cosine over all (stretched) steps, counted from 1, to `weight_decay_end`."""
    if params.weight_decay_end is None:
        return params.weight_decay
    step = round((math.floor(epoch) if params.per_epoch else epoch) * steps_per_epoch) + 1
    return _cosine(params.weight_decay, params.weight_decay_end, step, max(1, int(params.stretch * epochs * steps_per_epoch)))


def _trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, weight, belongs to a norm layer) of everything that wants a gradient, each once, in the network's order."""
    norms = {id(weight) for module in network.modules() if isinstance(module, _NORMS) for weight in module.parameters(recurse=False)}
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            yield name, weight, id(weight) in norms


def _decays(words: Iterable[str], name: str, weight: nn.Parameter, in_norm: bool) -> bool:
    last = name.rpartition(".")[2]
    is_a = {"bias": last == "bias", "norm": in_norm, "one_dimensional": weight.ndim < 2, "token": last in _TOKENS}
    return not any(is_a[word] for word in words)


def build_optimizer(params: OptimizerParams, network: nn.Module, exempt: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    """SGD (no Nesterov), Adam (L2 in the gradient) or AdamW over the weights of `network` that want a gradient.

    Weight decay applies to every weight, biases and batch norm included, as in the published recipes, but for what
    `no_decay` names. Weights whose name begins with a word of `exempt` are neither decayed nor clipped. Each group
    says so under `decay` and `clip`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight, in_norm in _trained(network):
        free = name.startswith(exempt) if exempt else False
        groups.setdefault((not free and _decays(params.no_decay, name, weight, in_norm), not free), []).append(weight)
    described = [
        {"params": weights, "decay": decay, "clip": clip, "weight_decay": params.weight_decay if decay else 0.0}
        for (decay, clip), weights in groups.items()
    ]
    if params.name == "sgd":
        return torch.optim.SGD(described, lr=params.lr, momentum=params.momentum, foreach=True)
    kind = torch.optim.Adam if params.name == "adam" else torch.optim.AdamW
    return kind(described, lr=params.lr, foreach=True)


def apply_schedule(
    optimizer: torch.optim.Optimizer, params: OptimizerParams, epochs: int, epoch: float, steps_per_epoch: int
) -> float:
    """Set rate and weight decay of every group for the step at this (fractional) epoch; returns the rate."""
    rate, decay = (rule(params, epochs, epoch, steps_per_epoch) for rule in (learning_rate, weight_decay))
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decay"] else 0.0
    return rate


def clip_gradients(optimizer: torch.optim.Optimizer, params: OptimizerParams) -> torch.Tensor | None:
    """Shrink the gradients to the norm `clip_norm` together (but for the exempt weights); returns the norm they had.

    None where clipping is off. Called once a step on averaged gradients, so that all processes shrink alike.
    """
    if not params.clip_norm:
        return None
    clipped = [weight for group in optimizer.param_groups if group["clip"] for weight in group["params"]]
    return nn.utils.clip_grad_norm_(clipped, params.clip_norm)
