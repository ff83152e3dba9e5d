"""Losses of SimSiam, BYOL, Barlow Twins, VICReg, DINO and Cycle-Contrast as pure functions of tensors.

Letters: B samples, D embedding size, K outputs of DINO's last layer, V views of the student, T views of the teacher. Losses over
statistics of the batch (Barlow Twins, VICReg) want the rows of all processes, gathered with gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.losses import cross_video_negative, info_nce_logits, l2_normalize

__all__ = [
    "barlow_twins", "cycle_logits", "dino_cross_entropy", "linear_warmup", "negative_cosine", "output_spread", "standardize", "vicreg",
]


def negative_cosine(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-cos(p, stopgrad(z)), averaged over rows (SimSiam, Chen & He, CVPR 2021, Eq. 1). [B, D], [B, D] -> scalar in [-1, 1]."""
    return -F.cosine_similarity(prediction, target.detach(), dim=-1, eps=1e-8).mean()


def output_spread(raw: torch.Tensor) -> torch.Tensor:
    """Spread of the directions of [B, D], detached: 1 where they are spread evenly, 0 where all are one (SimSiam, Fig. 2).

    Standard deviation over the batch of the unit-length rows, mean over dimensions, times sqrt(D).
    """
    unit = F.normalize(raw.detach(), dim=-1)
    return unit.std(0, correction=0).mean() * raw.shape[-1] ** 0.5


def standardize(raw: torch.Tensor) -> torch.Tensor:
    """Each column with mean 0 and variance 1 over the batch (biased, epsilon 1e-5, like batch norm). [B, D] -> [B, D]."""
    variance, mean = torch.var_mean(raw, dim=0, correction=0)
    return (raw - mean) * (variance + 1e-5).rsqrt()


def _off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix [D, D] with zeros on its diagonal."""
    return matrix - torch.diag(matrix.diagonal())


def barlow_twins(z1: torch.Tensor, z2: torch.Tensor, redundancy: float) -> torch.Tensor:
    """Cross-correlation of two views against the identity (Zbontar et al., ICML 2021, Eq. 1), divided by D.

    [sum_i (1 - C_ii)^2 + redundancy sum_{i != j} C_ij^2] / D. The division is ours: 1 is then the loss of a constant network,
    whatever D is.

    Args:
        z1, z2: [B, D], the whole batch, B >= 2. redundancy: lambda.
    """
    correlation = standardize(z1).T @ standardize(z2) / len(z1)
    loss = (1 - correlation.diagonal()).pow(2).sum() + redundancy * _off_diagonal(correlation).pow(2).sum()
    return loss / len(correlation)


def vicreg(z1: torch.Tensor, z2: torch.Tensor, weights: tuple[float, float, float]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Invariance, variance and covariance (Bardes, Ponce, LeCun, ICLR 2022, Eq. 1-6) and the three terms, detached.

    Mean squared error of the views; hinge of each column's standard deviation (unbiased, epsilon 1e-4 inside the root) at 1,
    mean of both views, as in the authors' program; squared off-diagonal covariances divided by D, sum of both views.

    Args:
        z1, z2: [B, D], the whole batch, B >= 2. weights: of the three terms, in this order.
    """
    variance = sum(F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() for z in (z1, z2)) / 2
    covariance = sum(_off_diagonal(torch.cov(z.T)).pow(2).sum() / z.shape[1] for z in (z1, z2))
    terms = {"invariance": F.mse_loss(z1, z2), "variance": variance, "covariance": covariance}
    loss = sum(weight * term for weight, term in zip(weights, terms.values(), strict=True))
    return loss, {name: term.detach() for name, term in terms.items()}


def dino_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, center: torch.Tensor, student_temperature: float, teacher_temperature: float
) -> torch.Tensor:
    """Cross-entropy of the student's views with the centred, sharpened teacher's (Caron et al., ICCV 2021, Eq. 1-3).

    Mean over all pairs of a teacher view and another view of the student, and over samples.

    Args:
        student: logits [V, B, K], the first T views being the teacher's. teacher: logits [T, B, K], no gradient.
        center: [K], subtracted from the teacher's logits.
    """
    wanted = ((teacher.detach() - center) / teacher_temperature).softmax(-1)
    found = (student / student_temperature).log_softmax(-1)
    pairs = -torch.einsum("tbk,vbk->tv", wanted, found)
    views = len(teacher)
    same = pairs[:, :views].diagonal().sum()
    return (pairs.sum() - same) / ((pairs.numel() - views) * student.shape[1])


def linear_warmup(start: float, end: float, epochs: int, epoch: int) -> float:
    """From `start` in epoch 0 to `end` in epoch `epochs` - 1 in equal steps, `end` afterwards (DINO's teacher temperature)."""
    return end if epoch >= epochs - 1 else start + (end - start) * epoch / (epochs - 1)


def cycle_logits(
    query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, *, support: int, neighbor_temperature: float, temperature: float,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the way back: from the query's soft nearest neighbour to the own video's key, against the queue.

    Cycle-Contrast (Wu & Wang, ICCV 2021, section 3.2). The neighbour is the softmax-weighted mean of the `support` most similar
    allowed rows, brought to unit length; its weights carry gradient to the query.

    Args:
        query, key: [B, D] of two frames of one video, unit length. queue: [M, D]. allowed: bool [B, M], rows of other videos.

    Returns:
        [B, 1 + M], column 0 correct; only column 0 is finite where no row was allowed. The neighbour [B, D].
    """
    mixed, _, _ = cross_video_negative(query, queue, support=support, temperature=neighbor_temperature, allowed=allowed)
    neighbor = l2_normalize(mixed)
    return info_nce_logits(neighbor, key, queue, temperature, allowed), neighbor
