"""Uncertainty of metrics when the patient is the independent unit: cluster bootstrap and paired comparisons.

Letters: B replicates, G patients, N units (frames, videos or patient labels), C classes. Every replicate is a row of
patient weights (how often a patient was drawn); metrics of all replicates come from matrix products over per-patient
counts, so thousands of replicates cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.metrics import PROBABILITY_FLOOR, Scores

__all__ = [
    "METRICS",
    "Comparison",
    "Interval",
    "WeightedMetrics",
    "bootstrap_intervals",
    "draw_patients",
    "holm",
    "paired_bootstrap",
    "permutation_test",
    "same_patients",
]

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "log_loss", "brier")
CHUNK_ELEMENTS = 4_000_000
"""Elements of the largest temporary array (float64, so 32 MB), whatever B and N are."""
TOO_FEW_PATIENTS = 2


@dataclass(frozen=True)
class Interval:
    """A value and its interval. `low` and `high` are None, with a reason, when they cannot be had."""

    value: float | None
    low: float | None
    high: float | None
    confidence: float
    replicates: int
    """Replicates that count; 0 for intervals from a formula."""
    degenerate: int
    """Replicates left out because the metric is not defined there, mostly as a class was not drawn."""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """The difference `first - second` of one metric on the same patients."""

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided; None from the bootstrap."""
    patients: int
    replicates: int
    degenerate: int
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class WeightedMetrics:
    """Metrics of one set of predictions under any patient weights.

    Definitions are those of `pipeline.evaluation.metrics`, with one rule added: a class that has labels in the full set
    but none under some weights makes balanced accuracy, macro-F1 and AUROC undefined there (NaN), because a mean over
    fewer classes would be another quantity. Classes without any label are left out throughout (macro AUROC is then
    undefined).
    """

    def __init__(self, scores: Scores, patients: Sequence[str] | None = None) -> None:
        """`patients` fixes the order of the weights (default: sorted patients of `scores`)."""
        names = sorted(set(scores.patients.tolist())) if patients is None else list(patients)
        place = {name: index for index, name in enumerate(names)}
        foreign = set(scores.patients.tolist()) - set(place)
        if foreign:
            raise DataError(
                f"predictions: patient {min(foreign)} is not among the {len(names)} patients that are compared"
            )
        self.patients = names
        self.scores = scores
        self.group = np.array([place[name] for name in scores.patients.tolist()], np.int64)
        classes = len(scores.classes)
        cells = (self.group * classes + scores.labels) * classes + scores.probabilities.argmax(1)
        self.confusion = np.bincount(cells, minlength=len(names) * classes**2).reshape(len(names), classes * classes)
        truth = scores.probabilities[np.arange(len(scores.labels)), scores.labels]
        per_unit = {
            "log_loss": -np.log(np.maximum(truth, PROBABILITY_FLOOR)),
            "brier": ((scores.probabilities - np.eye(classes)[scores.labels]) ** 2).sum(1),
        }
        self.sums = {name: np.bincount(self.group, values, len(names)) for name, values in per_unit.items()}
        self.counts = np.bincount(self.group, minlength=len(names)).astype(np.float64)
        self.present = np.bincount(scores.labels, minlength=classes) > 0

    def values(self, weights: np.ndarray, metrics: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
        """Metrics under weights float64 [B, G] >= 0: float64 [B] each, NaN where undefined.

        Besides `METRICS`, `recall.<class>`, `precision.<class>` and `auroc.<class>` are known.

        Raises:
            DataError: for an unknown metric, listing the known ones.
        """
        classes = len(self.scores.classes)
        with np.errstate(divide="ignore", invalid="ignore"):
            table = (weights @ self.confusion).reshape(-1, classes, classes)
            hits = np.diagonal(table, axis1=1, axis2=2)
            support, called = table.sum(2), table.sum(1)
            per_class = {"recall": hits / support, "precision": hits / called}
            f1 = np.where(support > 0, 2 * hits / (support + called), np.nan)
            result = {}
            for name in metrics:
                if name == "accuracy":
                    result[name] = hits.sum(1) / table.sum((1, 2))
                elif name == "balanced_accuracy":
                    result[name] = per_class["recall"][:, self.present].mean(1)
                elif name == "macro_f1":
                    result[name] = f1[:, self.present].mean(1)
                elif name in self.sums:
                    result[name] = weights @ self.sums[name] / (weights @ self.counts)
                elif name == "macro_auroc":
                    result[name] = np.mean([self._auroc(weights, position) for position in range(classes)], axis=0)
                else:
                    kind, position = self._parse(name)
                    result[name] = self._auroc(weights, position) if kind == "auroc" else per_class[kind][:, position]
        return result

    def _parse(self, name: str) -> tuple[str, int]:
        kind, _, label = name.partition(".")
        if kind not in ("recall", "precision", "auroc") or label not in self.scores.classes:
            raise DataError(
                f"unknown metric {name!r}; allowed: {', '.join(METRICS)}, and recall., precision., auroc. with one of "
                "the "
                f"classes {', '.join(self.scores.classes)}"
            )
        return kind, self.scores.classes.index(label)

    def _auroc(self, weights: np.ndarray, position: int) -> np.ndarray:
        """Weighted Mann-Whitney statistic of one class against the rest; ties count half. float64 [B]."""
        score = self.scores.probabilities[:, position]
        order = np.argsort(score, kind="stable")
        starts = np.concatenate([[0], np.flatnonzero(np.diff(score[order])) + 1])
        group, positive = self.group[order], self.scores.labels[order] == position
        result = np.full(len(weights), np.nan)
        step = max(1, CHUNK_ELEMENTS // max(len(order), 1))
        for begin in range(0, len(weights), step):
            drawn = weights[begin : begin + step, group]
            hits = np.add.reduceat(np.where(positive, drawn, 0.0), starts, axis=1)
            rest = np.add.reduceat(np.where(positive, 0.0, drawn), starts, axis=1)
            below = np.cumsum(rest, axis=1) - rest / 2
            pairs = hits.sum(1) * rest.sum(1)
            result[begin : begin + step] = np.where(pairs > 0, (hits * below).sum(1) / pairs, np.nan)
        return result


def draw_patients(patients: int, replicates: int, seed: int) -> np.ndarray:
    """Patients drawn with replacement, as counts: float64 [B, G]; equal arguments give equal draws."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=replicates).astype(np.float64)


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float | None, float | None, int, str]:
    """Low and high end over the defined replicates, their number, and a reason when there is no interval."""
    defined = values[np.isfinite(values)]
    if len(defined) < max(2, len(values) // 2):
        return None, None, len(defined), f"defined in only {len(defined)} of {len(values)} replicates"
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high), len(defined), ""


def _optional(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def bootstrap_intervals(
    scores: Scores, metrics: Sequence[str] = METRICS, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile intervals from resampling whole patients (Field & Welsh 2007, cluster bootstrap).

    All units of a drawn patient come along, also those of several seeds, so units of one patient are never taken for
    independent. Replicates where a metric is undefined (a class was not drawn) are left out and counted; below half of
    them defined, or with fewer than 2 patients, there is no interval. With few patients per class percentile intervals
    are somewhat too narrow; the number of patients belongs beside them.

    Args:
        scores: predictions at one level (frames, videos or patients), each unit with its patient.
        metrics: names known to `WeightedMetrics.values`.
        replicates: B.
        confidence: coverage aimed at, in (0, 1).
        seed: equal seeds give equal intervals.
    """
    engine = WeightedMetrics(scores)
    count = len(engine.patients)
    if not count:
        raise DataError("predictions: no rows to evaluate")
    values = {name: value[0] for name, value in engine.values(np.ones((1, count)), metrics).items()}
    if count < TOO_FEW_PATIENTS:
        reason = f"{count} patient: nothing to resample"
        return {name: Interval(_optional(values[name]), None, None, confidence, 0, 0, reason) for name in metrics}
    drawn = engine.values(draw_patients(count, replicates, seed), metrics)
    result = {}
    for name in metrics:
        if not np.isfinite(values[name]):
            reason = "not defined for these predictions (a class is absent)"
            result[name] = Interval(None, None, None, confidence, 0, replicates, reason)
            continue
        low, high, defined, reason = _percentiles(drawn[name], confidence)
        result[name] = Interval(float(values[name]), low, high, confidence, defined, replicates - defined, reason)
    return result


def same_patients(first: Scores, second: Scores) -> list[str]:
    """The sorted patients of two sets of predictions that are to be compared.

    Raises:
        DataError: patients or classes differ, or there are no rows.
    """
    names = [set(part.patients.tolist()) for part in (first, second)]
    if first.classes != second.classes:
        raise DataError(f"comparison: classes differ: {', '.join(first.classes)} and {', '.join(second.classes)}")
    if names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        raise DataError(
            f"comparison: the two sets of predictions must hold the same patients; {len(odd)} are in only one of "
            "them, such as "
            f"{odd[0]}"
        )
    if not names[0]:
        raise DataError("comparison: no rows to compare")
    return sorted(names[0])


def _paired(first: Scores, second: Scores) -> tuple[WeightedMetrics, WeightedMetrics]:
    """Both sets over one order of patients; DataError unless patients and classes agree."""
    order = same_patients(first, second)
    return WeightedMetrics(first, order), WeightedMetrics(second, order)


def _difference(left: WeightedMetrics, right: WeightedMetrics, metric: str, weights: np.ndarray) -> np.ndarray:
    return left.values(weights, [metric])[metric] - right.values(weights, [metric])[metric]


def paired_bootstrap(
    first: Scores, second: Scores, metric: str, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Interval of the difference `first - second`, drawing the same patients for both.

    The sets must cover the same patients; their units may differ (another number of seeds, say).

    Raises:
        DataError: patients or classes differ, or the metric is unknown.
    """
    left, right = _paired(first, second)
    count = len(left.patients)
    difference = _optional(_difference(left, right, metric, np.ones((1, count)))[0])
    if difference is None or count < TOO_FEW_PATIENTS:
        reason = (
            f"{count} patient: nothing to resample"
            if count < TOO_FEW_PATIENTS
            else "metric not defined (a class is absent)"
        )
        return Comparison(difference, None, None, None, count, 0, 0, reason)
    drawn = _difference(left, right, metric, draw_patients(count, replicates, seed))
    low, high, defined, reason = _percentiles(drawn, confidence)
    return Comparison(difference, low, high, None, count, defined, replicates - defined, reason)


def _join(first: Scores, second: Scores) -> Scores:
    """Both sets as one, every patient twice: `0` + name from the first, `1` + name from the second."""
    return Scores(
        labels=np.concatenate([first.labels, second.labels]),
        probabilities=np.concatenate([first.probabilities, second.probabilities]),
        patients=np.array([f"0{name}" for name in first.patients] + [f"1{name}" for name in second.patients]),
        classes=first.classes,
    )


def permutation_test(
    first: Scores, second: Scores, metric: str, *, permutations: int = 10_000, seed: int = 0
) -> Comparison:
    """Two-sided test of "both models are the same" by exchanging the two models' predictions patient by patient.

    Under that hypothesis each patient's two sets of predictions are exchangeable; the p-value is the share of exchanges
    whose absolute difference is at least the observed one. All 2^G exchanges are enumerated when they are not more than
    `permutations`; otherwise random ones are drawn and the observed one is counted in (Phipson & Smyth 2010), so p is
    never 0. Exchanges where the metric is undefined are left out and counted.

    Raises:
        DataError: patients or classes differ, or the metric is unknown.
    """
    left, right = _paired(first, second)
    count = len(left.patients)
    observed = _optional(_difference(left, right, metric, np.ones((1, count)))[0])
    if observed is None:
        return Comparison(None, None, None, None, count, 0, 0, "metric not defined (a class is absent)")
    exact = 2**count <= permutations if count < 63 else False
    if exact:
        swap = ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(np.float64)
    else:
        swap = np.random.default_rng(seed).integers(0, 2, (permutations, count)).astype(np.float64)
    both = WeightedMetrics(_join(first, second), [f"{side}{name}" for side in "01" for name in left.patients])
    kept, other = np.concatenate([1 - swap, swap], axis=1), np.concatenate([swap, 1 - swap], axis=1)
    drawn = both.values(kept, [metric])[metric] - both.values(other, [metric])[metric]
    defined = drawn[np.isfinite(drawn)]
    # Equal differences must count as equal although they were added up in another order.
    extreme = int((np.abs(defined) >= abs(observed) - 1e-12).sum())
    p_value = extreme / len(defined) if exact else (extreme + 1) / (len(defined) + 1)
    return Comparison(observed, None, None, p_value, count, len(defined), len(drawn) - len(defined))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of several p-values, in the order given."""
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    result = np.empty_like(values)
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()
