"""ROC and precision-recall curves of one class against the rest, with bands and areas from resampling whole patients.

Letters: N scored units, B replicates, G patients. A band is vertical: at each false positive rate (or recall) of a grid, the
percentiles of the replicates' sensitivity (or precision) there (Fawcett 2006, section 8). It is pointwise: it holds at one
place of the curve, not for the whole curve at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.weighted import draw_patients

__all__ = ["GRID", "Curve", "average_precision_interval", "class_curve"]

GRID = np.linspace(0, 1, 101)
CHUNK_ELEMENTS = 4_000_000
"""Elements of the largest temporary array, whatever B and N are."""


@dataclass(frozen=True)
class Curve:
    """One class against the rest. Bands and intervals are None where they cannot be had, with `reason`."""

    points: np.ndarray
    """float64 [P, 4]: false positive rate, sensitivity, recall, precision after each step from the highest score down."""
    roc: np.ndarray
    """Sensitivity at `GRID`."""
    pr: np.ndarray
    """Precision at `GRID`."""
    prevalence: float
    positives: int
    """Units of the class, all seeds counted."""
    auroc: float
    average_precision: float
    roc_band: np.ndarray | None = None
    """float64 [2, 101]: low and high end at `GRID`."""
    pr_band: np.ndarray | None = None
    replicates: int = 0
    """Replicates that held the class and others."""
    reason: str = ""


def class_curve(scores: Scores, position: int, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0) -> Curve | None:
    """Curves of class number `position` against the rest, all units pooled (folds, seeds); None without positives or negatives.

    Equal scores form one step: a diagonal of the ROC curve, one point of the other. Sensitivity at a false positive rate is the
    highest reached there, linear between steps; precision at a recall is that of the first step reaching it, so that the mean over
    recall is the average precision. Patients are drawn with replacement, all their units together; the draws are those of
    `draw_patients` with the same seed. The area under the ROC curve has its interval from `patient_intervals`, which
    keeps its level, the average precision from `average_precision_interval`. Below half of the replicates with both sides
    there is no band.
    """
    positive = scores.labels == position
    if not 0 < positive.sum() < len(positive):
        return None
    names = np.unique(scores.patients)
    hits, false = next(_sweep(scores, position, np.ones((1, len(names)))))
    zeros = np.zeros(1)
    points = np.column_stack([np.concatenate([zeros, part]) for part in (false / false[-1], hits / hits[-1])])
    precision = hits / (hits + false)
    points = np.column_stack([points, points[:, 1], np.concatenate([precision[:1], precision])])
    roc, pr, area, average = _at_grid(hits, false)
    plain = {
        "points": points, "roc": roc, "pr": pr, "prevalence": float(positive.mean()), "positives": int(positive.sum()), "auroc": area,
        "average_precision": average,
    }
    if len(names) < 2:
        return Curve(**plain, reason=f"{len(names)} patient: nothing to resample")
    weights = draw_patients(len(names), replicates, seed)
    drawn = [_at_grid(hits, false) for hits, false in _sweep(scores, position, weights) if hits[-1] > 0 and false[-1] > 0]
    if len(drawn) < max(2, replicates // 2):
        return Curve(**plain, replicates=len(drawn), reason=f"the class and others were drawn in only {len(drawn)} of {replicates} replicates")
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    return Curve(
        **plain, roc_band=np.quantile([one[0] for one in drawn], ends, axis=0), pr_band=np.quantile([one[1] for one in drawn], ends, axis=0),
        replicates=len(drawn),
    )


def average_precision_interval(
    runs: Sequence[Scores], position: int, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval over patients of the average precision of class number `position`, mean over `runs` (seeds, repeats).

    Every run holds the same patients, and a draw is the same patients in all of them. None with fewer than two patients,
    or where less than half of the replicates hold the class and others.
    """
    names = np.unique(runs[0].patients)
    if len(names) < 2:
        return None
    weights = draw_patients(len(names), replicates, seed)
    areas = [
        [_average_precision(hits, false) if hits[-1] > 0 and false[-1] > 0 else np.nan for hits, false in _sweep(one, position, weights)] for one in runs
    ]
    drawn = np.mean(areas, axis=0)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < max(2, replicates // 2):
        return None
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _sweep(scores: Scores, position: int, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cumulative weights of positives and negatives from the highest score down, one pair a row of `weights` [B, G]."""
    positive, group = scores.labels == position, np.unique(scores.patients, return_inverse=True)[1]
    score = scores.probabilities[:, position]
    order = np.argsort(-score, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(score[order])) + 1])
    group, positive = group[order], positive[order]
    step = max(1, CHUNK_ELEMENTS // len(order))
    for begin in range(0, len(weights), step):
        drawn = weights[begin : begin + step, group]
        hits = np.cumsum(np.add.reduceat(np.where(positive, drawn, 0.0), starts, axis=1), axis=1)
        false = np.cumsum(np.add.reduceat(np.where(positive, 0.0, drawn), starts, axis=1), axis=1)
        yield from zip(hits, false, strict=True)


def _average_precision(hits: np.ndarray, false: np.ndarray) -> float:
    """Mean precision over recall, from cumulative weights after each step."""
    called = hits + false
    precision = np.divide(hits, called, out=np.ones_like(hits), where=called > 0)
    return float(np.sum(np.diff(hits, prepend=0.0) * precision) / hits[-1])


def _at_grid(hits: np.ndarray, false: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Sensitivity and precision at `GRID`, area under the ROC curve, average precision, from cumulative weights after each step."""
    sensitivity, rate = (np.concatenate([[0.0], part]) / part[-1] for part in (hits, false))
    last = np.searchsorted(rate, GRID, side="right") - 1
    after = np.minimum(last + 1, len(rate) - 1)
    width = rate[after] - rate[last]
    share = np.divide(GRID - rate[last], width, out=np.zeros_like(GRID), where=width > 0)
    roc = sensitivity[last] + share * (sensitivity[after] - sensitivity[last])
    called = hits + false
    precision = np.divide(hits, called, out=np.ones_like(hits), where=called > 0)
    # Half a hit at least: recall 0 is reached before anything is found, where precision has no meaning.
    first = np.minimum(np.searchsorted(hits, np.maximum(GRID * hits[-1], min(0.5, hits[-1])) - 1e-9), len(hits) - 1)
    area = float(np.sum(np.diff(rate) * (sensitivity[1:] + sensitivity[:-1]) / 2))
    return roc, precision[first], area, _average_precision(hits, false)
