"""The loss of Masked Siamese Networks as pure functions, in the log domain so that no temperature underflows in float32.

Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022, arXiv 2204.07141. Letters: B images, V
anchor views of each, N = V B anchor rows, view by view; D embedding size, K prototypes. Probabilities are handled as
logarithms throughout. With several processes every function sees its own rows and gives what one process would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline import distributed

__all__ = ["MSNTerms", "linear_schedule", "log_assignment", "log_sharpen", "log_sinkhorn", "mean_log_probability", "msn_loss"]


@dataclass
class MSNTerms:
    """Scalars of one loss; `total` and the three terms carry gradient, the rest does not.

    `me_max` is log K - H(mean anchor probability), at least 0. `targets`: log of the final targets [B, K]. `clusters`:
    distinct most probable prototypes among the local targets; `target_max`, `target_min`: mean extreme probabilities.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    me_max: torch.Tensor
    entropy: torch.Tensor
    targets: torch.Tensor
    clusters: torch.Tensor
    target_max: torch.Tensor
    target_min: torch.Tensor


def log_assignment(embeddings: torch.Tensor, prototypes: torch.Tensor, temperature: float, smoothing: float = 0.0) -> torch.Tensor:
    """log P of each prototype: softmax(<z, q> / tau) of L2-normalised rows; a zero row predicts uniformly.

    With smoothing s, P is multiplied by (1 - s) I + s / K. [N, D], [K, D] -> [N, K], same dtype.
    """
    z, q = (F.normalize(x, dim=1, eps=1e-12) for x in (embeddings, prototypes))
    log_p = (z @ q.T / temperature).log_softmax(1)
    if smoothing <= 0:
        return log_p
    floor = log_p.new_tensor(math.log(smoothing / len(prototypes)))
    return floor.expand_as(log_p) if smoothing >= 1 else torch.logaddexp(log_p + math.log1p(-smoothing), floor)


def log_sharpen(log_p: torch.Tensor, temperature: float) -> torch.Tensor:
    """log of P^(1/T) / sum P^(1/T). [B, K] -> [B, K]."""
    return (log_p / temperature).log_softmax(1)


@torch.no_grad()
def log_sinkhorn(log_p: torch.Tensor, iterations: int = 3) -> torch.Tensor:
    """Balance the use of prototypes over the global batch: columns, then rows, divided by their sums, `iterations` times.

    Rows sum to 1 afterwards. Only the column sums cross processes. [B, K] logarithms -> [B, K], without gradient.
    """
    for _ in range(iterations):
        columns = distributed.all_gather_rows(log_p.logsumexp(0, keepdim=True)).logsumexp(0, keepdim=True)
        # A column nobody uses stays unused: -inf - -inf would be NaN.
        log_p = log_p - columns.masked_fill(columns.isneginf(), 0.0)
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
    return log_p


@torch.no_grad()
def mean_log_probability(log_p: torch.Tensor) -> torch.Tensor:
    """log of the mean probability of each prototype over the rows of all processes, without gradient. [N, K] -> [K]."""
    local = log_p.logsumexp(0, keepdim=True) - math.log(len(log_p))
    return distributed.all_gather_rows(local).logsumexp(0) - math.log(distributed.world_size())


def _me_max(log_p: torch.Tensor) -> torch.Tensor:
    """log K - H(pbar) of the anchors of all processes, with the gradient of the local mean.

    dR/dm = 1 + log pbar, and the 1 drops out because every row sums to one: so R is linear in the local mean m with
    constant weights log pbar. The gradient is passed on undivided, since averaging over processes divides it.
    """
    log_mean = mean_log_probability(log_p)
    weights = log_mean.clamp_min(torch.finfo(log_mean.dtype).min)
    value = math.log(log_p.shape[1]) + (log_mean.exp() * weights).sum()
    slope = (log_p.exp().mean(0) * weights).sum()
    return value + (slope - slope.detach())


def msn_loss(
    anchors: torch.Tensor,
    targets: torch.Tensor,
    prototypes: torch.Tensor,
    *,
    temperature: float = 0.1,
    sharpen: float = 0.25,
    sinkhorn_iterations: int = 3,
    me_max_weight: float = 1.0,
    entropy_weight: float = 0.0,
    smoothing: float = 0.0,
) -> MSNTerms:
    """total = CE + w_memax R + w_ent E (2204.07141, section 3; constants as in the published program).

    CE: cross-entropy of the anchors with the sharpened (and, with `sinkhorn_iterations`, balanced) assignment of their
    image's target. Terms of weight 0 are computed but kept out of the total. Gradient reaches anchors and, through the
    anchors' assignment only, the prototypes.

    Args:
        anchors: [V * B, D], row n belongs to image n mod B. targets: [B, D]. prototypes: [K, D]; none normalised.
        temperature: tau of both assignments. sharpen: T of the targets. smoothing: s of `log_assignment`.
    """
    log_p = log_assignment(anchors, prototypes, temperature, smoothing)
    with torch.no_grad():
        log_y = log_sharpen(log_assignment(targets, prototypes, temperature, smoothing), sharpen)
        if sinkhorn_iterations:
            log_y = log_sinkhorn(log_y, sinkhorn_iterations)
        y = log_y.exp()
    cross_entropy = -(log_p.unflatten(0, (-1, len(y))) * y).sum(2).mean()
    me_max = _me_max(log_p)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    total = cross_entropy
    for weight, term in ((me_max_weight, me_max), (entropy_weight, entropy)):
        if weight:
            total = total + weight * term
    used = torch.zeros_like(y[0]).index_fill(0, y.argmax(1), 1.0)
    return MSNTerms(total, cross_entropy, me_max, entropy, log_y, used.sum(), y.amax(1).mean(), y.amin(1).mean())


def linear_schedule(start: float, end: float, step: int, steps: float) -> float:
    """Value at a 0-based optimiser step on the line from `start` to `end`, which is reached after `steps` steps.

    Momentum and sharpening temperature of MSN, with `steps` = 1.25 times those of training.
    """
    return start + (end - start) * min(step / steps, 1.0)
