"""Contrastive losses and the hard cross-video negative as pure functions of tensors.

Letters: B samples, D embedding size, n intra-video negatives, M bank rows, S support rows. Embeddings are L2-normalised
along D (epsilon 1e-12) unless called raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F

__all__ = [
    "cross_video_negative", "first_column_cross_entropy", "hierarchical_contrast", "info_nce_logits", "l2_normalize",
    "nt_xent", "soft_targets", "softened_cross_entropy", "ucl_logits",
]


def l2_normalize(raw: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, epsilon 1e-12. [..., D] -> [..., D], same dtype."""
    return F.normalize(raw, dim=-1, eps=1e-12)


def cross_video_negative(
    q: torch.Tensor,
    bank: torch.Tensor,
    *,
    support: int,
    temperature: float,
    allowed: torch.Tensor | None = None,
    mode: Literal["soft_topk", "mean"] = "soft_topk",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The synthetic hard negative of each anchor: a softmax-weighted mean of its `support` most similar bank rows.

    UCL (Basu et al., MICCAI 2022, Fig. 3). Not re-normalised, so its length is at most 1. The weights carry gradient to
    `q`; the choice of rows does not; bank rows are constants.

    Args:
        q: [B, D] normalised anchors. bank: [M, D]. allowed: bool [B, M], rows each anchor may use (None: all).
        temperature: of the weights (tau_s). mode: `mean` is the plain mean of all rows of the bank.

    Returns:
        z_hat [B, D]; support indices int64 [B, min(S, M)], most similar first; exists bool [B], False where no row was
        allowed (z_hat is then zero and the caller drops its logit).
    """
    bank = bank.detach()
    if mode == "mean":
        exists = torch.ones(len(q), dtype=torch.bool, device=q.device)
        return bank.mean(0).expand_as(q), torch.empty(len(q), 0, dtype=torch.int64, device=q.device), exists
    scores = q @ bank.T
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    top, rows = scores.topk(min(support, len(bank)), dim=1)
    exists = top[:, :1].isfinite().squeeze(1)
    # A row of only -inf would make the softmax 0/0; its weights are set to zero instead.
    weights = torch.where(exists[:, None], top, torch.zeros_like(top)).div(temperature).softmax(dim=1)
    weights = weights * (top.isfinite() & exists[:, None])
    return torch.einsum("bs,bsd->bd", weights, bank[rows]), rows, exists


def ucl_logits(
    q: torch.Tensor,
    positive: torch.Tensor,
    negatives: torch.Tensor | None,
    z_hat: torch.Tensor,
    temperature: float,
    exists: torch.Tensor | None = None,
) -> torch.Tensor:
    """Columns [positive | intra-video negatives | cross-video negative] / tau; the correct class is column 0.

    Args:
        q, positive, z_hat: [B, D]. negatives: [B, n, D], or None in the cross-only phase. exists: bool [B] from
            `cross_video_negative`; where False the last logit is minus infinity.

    Returns:
        [B, 2] without intra-video negatives, [B, n + 2] with them.
    """
    columns = [(q * positive).sum(-1, keepdim=True)]
    if negatives is not None:
        columns.append(torch.einsum("bd,bnd->bn", q, negatives))
    cross = (q * z_hat).sum(-1, keepdim=True)
    if exists is not None:
        cross = cross.masked_fill(~exists[:, None], float("-inf"))
    return torch.cat([*columns, cross], dim=1) / temperature


def first_column_cross_entropy(logits: torch.Tensor, reduction: Literal["mean", "none"] = "mean") -> torch.Tensor:
    """-log softmax(logits)[:, 0], averaged over rows unless `none`. [B, C] -> scalar or [B]."""
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, target, reduction=reduction)


def info_nce_logits(
    q: torch.Tensor,
    key: torch.Tensor,
    queue: torch.Tensor,
    temperature: float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Columns [positive | queue] / tau (MoCo, He et al., CVPR 2020, Eq. 1); column 0 is correct.

    Args:
        q, key: [B, D]. queue: [M, D]. allowed: bool [B, M]; rows that may not serve as negatives become -inf.
    """
    negatives = q @ queue.T
    if allowed is not None:
        negatives = negatives.masked_fill(~allowed, float("-inf"))
    return torch.cat([(q * key).sum(-1, keepdim=True), negatives], dim=1) / temperature


def nt_xent(
    local: tuple[torch.Tensor, torch.Tensor],
    gathered: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    offset: int = 0,
    videos: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, Chen et al., ICML 2020, Eq. 1) over the global batch.

    Args:
        local: two views [B, D] of this process. gathered: the same of all processes [G, D], in rank order, with gradient.
        offset: row of `gathered` where the local samples begin.
        videos: int64 [G], the video of each gathered row; frames of one video are then no negatives of each other.

    Returns:
        Mean over the 2B local rows; its mean over processes is the loss of the global batch in one process.
    """
    z1, z2 = local
    everyone = torch.cat(gathered)
    total, batch = len(gathered[0]), len(z1)
    rows = torch.arange(batch, device=z1.device) + offset
    own = torch.cat([rows, rows + total])
    partner = torch.cat([rows + total, rows])
    logits = torch.cat([z1, z2]) @ everyone.T / temperature
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    if videos is not None:
        hidden = (videos[rows, None] == videos).repeat(2, 2).scatter(1, partner[:, None], False)
    return F.cross_entropy(logits.masked_fill(hidden.scatter(1, own[:, None], True), float("-inf")), partner)


def hierarchical_contrast(
    views: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    gathered: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    temperature: float,
    pairing: Literal["cross_view", "within_view"] = "cross_view",
    offset: int = 0,
    videos: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The contrastive terms of HiCo (Zhang et al., ACCV 2022): levels against themselves (peer) and against the global one (cross).

    Args:
        views: of each view the embeddings "local", "medium", "global", [B, D] each, of this process. gathered: the same of all
            processes [G, D], in rank order, with gradient. offset, videos: as `nt_xent` has them.
        pairing: `cross_view` sets the global embedding of one view against the other levels of the other view, as the paper's
            figure draws it; `within_view` against those of the same view, as the published program does.

    Returns:
        NT-Xent terms: local_local, medium_medium, global_global (one each); global_medium, global_local (sums of two); peer and
        cross, their sums.
    """

    def term(a: int, level: str, b: int, other: str) -> torch.Tensor:
        return nt_xent((views[a][level], views[b][other]), (gathered[a][level], gathered[b][other]), temperature, offset, videos)

    terms = {f"{level}_{level}": term(0, level, 1, level) for level in ("local", "medium", "global")}
    peer = sum(terms.values())
    first, second = (0, 1) if pairing == "within_view" else (1, 0)
    for level in ("medium", "local"):
        terms[f"global_{level}"] = term(0, "global", first, level) + term(1, "global", second, level)
    return terms | {"peer": peer, "cross": terms["global_medium"] + terms["global_local"]}


def soft_targets(
    labels: torch.Tensor,
    classes: int,
    alpha: float,
    rows: torch.Tensor,
    form: Literal["sum_to_one", "batch_divisor"] = "sum_to_one",
) -> torch.Tensor:
    """Softened one-hot targets of HiCo. int64 [B] -> float64 [B, K].

    `sum_to_one`: 1 - alpha for the class, alpha / (K - 1) for each other. `batch_divisor`, as the published program does: 1 - alpha
    for the class, and alpha / (rows - 1) added to every class; rows then do not sum to one. With one labelled row that has no
    value, and the target is the hard one.

    Args:
        labels: class numbers; rows with a negative one get a target that means nothing. rows: labelled rows of the whole batch
            (int64 scalar), over all processes.
    """
    hard = F.one_hot(labels.clamp(min=0), classes).double()
    if form == "sum_to_one":
        return (1 - alpha) * hard + (1 - hard) * (alpha / max(classes - 1, 1))
    return torch.where(rows > 1, (1 - alpha) * hard + alpha / (rows - 1).clamp(min=1).double(), hard)


def softened_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    *,
    form: Literal["sum_to_one", "batch_divisor"] = "sum_to_one",
    rows: torch.Tensor | None = None,
    processes: int = 1,
) -> torch.Tensor:
    """- 1/R sum_b sum_k t_bk log softmax(o_b)_k over the R labelled rows of a batch; `soft_targets` says t. Scalar.

    Exactly 0, with zero gradient, where no row is labelled (the published program gives NaN there).

    Args:
        logits: [B, K]. labels: int64 [B], negative where unlabelled. rows: labelled rows over all processes (int64 scalar), None
            for those given here. processes: their number; the mean of the result over processes is the loss of the whole
            batch in one process.
    """
    known = labels >= 0
    rows = known.sum() if rows is None else rows
    targets = soft_targets(labels, logits.shape[1], alpha, rows, form).to(logits.dtype)
    each = -(targets * F.log_softmax(logits, dim=1)).sum(1)
    return processes * torch.where(known, each, 0.0).sum() / rows.clamp(min=1)
