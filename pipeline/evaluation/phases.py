"""Metrics of surgical phase recognition: every frame has a label, and videos differ in which phases they show.

What an absent phase counts changes the numbers by tens of points, so every result names its convention. Letters: N
frames, V videos, C phases. Conventions of the macro mean within a video (or the pool): `union`, phases in labels or
predictions (the published evaluation of EndoSSL, arXiv 2308.12394); `gt`, phases in the labels; `all`, all C, an absent
one counting 0.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.metrics import confusion_matrix

__all__ = ["CONVENTIONS", "Convention", "macro_scores", "per_phase_means", "per_video_scores", "phase_metrics", "phase_scores"]

Convention = Literal["union", "gt", "all"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


def phase_scores(labels: np.ndarray, predicted: np.ndarray, phases: int) -> np.ndarray:
    """Precision, recall and F1 of every phase over a set of frames, 0 where undefined: float64 [C, 3]."""
    counts = confusion_matrix(labels, predicted, phases)
    hits, true, called = counts.diagonal(), counts.sum(1), counts.sum(0)

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return part / np.maximum(whole, 1)  # where the whole is 0, so is the part

    return np.stack([ratio(hits, called), ratio(hits, true), ratio(2 * hits, called + true)], axis=1)


def macro_scores(labels: np.ndarray, predicted: np.ndarray, phases: int, convention: Convention) -> np.ndarray:
    """Accuracy and macro precision, recall, F1 over a set of frames: float64 [4].

    Macro F1 is the mean of the phases' F1, not the harmonic mean of macro precision and recall.

    Raises:
        DataError: no frame, unequal lengths, or an unknown convention.
    """
    if not len(labels) or len(labels) != len(predicted):
        raise DataError(f"phases: {len(labels)} labels and {len(predicted)} predictions; equal numbers, at least 1, are needed")
    if convention not in CONVENTIONS:
        raise DataError(f"phases: convention {convention!r} is unknown; allowed: {', '.join(CONVENTIONS)}")
    seen = set(np.asarray(labels).tolist()) | (set(np.asarray(predicted).tolist()) if convention == "union" else set())
    kept = range(phases) if convention == "all" else sorted(seen)
    accuracy = np.mean(np.asarray(labels) == np.asarray(predicted))
    return np.concatenate([[accuracy], phase_scores(labels, predicted, phases)[list(kept)].mean(0)])


def per_video_scores(
    videos: np.ndarray, labels: np.ndarray, predicted: np.ndarray, phases: int, convention: Convention
) -> np.ndarray:
    """`macro_scores` of every video, in order of its id: float64 [V, 4]."""
    parts = [videos == video for video in np.unique(videos)]
    return np.stack([macro_scores(labels[part], predicted[part], phases, convention) for part in parts])


def per_phase_means(videos: np.ndarray, labels: np.ndarray, predicted: np.ndarray, phases: int) -> np.ndarray:
    """Precision, recall and F1 of each phase, averaged over the videos whose labels contain it; NaN where none: float64 [C, 3]."""
    result = np.full((phases, 3), np.nan)
    scores = {video: phase_scores(labels[videos == video], predicted[videos == video], phases) for video in np.unique(videos)}
    for phase in range(phases):
        holders = np.unique(videos[labels == phase])
        if len(holders):
            result[phase] = np.mean([scores[video][phase] for video in holders], axis=0)
    return result


def phase_metrics(
    videos: np.ndarray, labels: np.ndarray, predicted: np.ndarray, classes: list[str], convention: Convention = "union"
) -> dict[str, Any]:
    """All numbers of one set of predictions, ready for JSON, as fractions.

    Args:
        videos: [N] ids. labels, predicted: int64 [N], class numbers. classes: the phases in order.

    Returns:
        convention; accuracy, precision, recall, f1 (means over videos, each video of weight 1) with f1_sd over videos;
        f1_by_convention; pooled {accuracy, macro_f1 (same convention), macro_f1_all, weighted_f1} over all frames;
        per_phase {class: precision, recall, f1, videos}, None where no video has the phase; videos, frames.

    Raises:
        DataError: see `macro_scores`.
    """
    phases = len(classes)
    table = per_video_scores(videos, labels, predicted, phases, convention)
    pooled = macro_scores(labels, predicted, phases, convention)
    support = np.bincount(labels, minlength=phases)
    means = per_phase_means(videos, labels, predicted, phases)
    per_phase = {
        name: {key: None if np.isnan(value) else float(value) for key, value in zip(("precision", "recall", "f1"), row, strict=True)}
        | {"videos": len(np.unique(videos[labels == number]))}
        for number, (name, row) in enumerate(zip(classes, means, strict=True))
    }
    return {
        "convention": convention,
        **dict(zip(("accuracy", "precision", "recall", "f1"), table.mean(0).tolist(), strict=True)),
        "f1_sd": float(table[:, 3].std(ddof=1)) if len(table) > 1 else None,
        "f1_by_convention": {
            name: float(per_video_scores(videos, labels, predicted, phases, name)[:, 3].mean()) for name in CONVENTIONS
        },
        "pooled": {
            "accuracy": float(pooled[0]), "macro_f1": float(pooled[3]),
            "macro_f1_all": float(macro_scores(labels, predicted, phases, "all")[3]),
            "weighted_f1": float(phase_scores(labels, predicted, phases)[:, 2] @ support / len(labels)),
        },
        "per_phase": per_phase, "videos": len(table), "frames": len(labels),
    }
