"""Uncertainty of metrics when the patient is the independent unit: intervals and paired comparisons.

Letters: B replicates, G patients. docs/statistics.md says when to use what, with measured coverage and false alarms.

`Runs` are predictions of one model, or one set for each seed (and repeat) of the same patients: the metric is then the
mean over the runs, and a patient takes the predictions of all runs along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from pipeline.errors import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.weighted import (
    CHUNK_ELEMENTS,
    METRICS,
    TOO_FEW_PATIENTS,
    Influence,
    Runs,
    WeightedMetrics,
    WeightedRuns,
    clustered_variance,
    draw_patients,
    influence,
    same_patients,
)

__all__ = [
    "CHUNK_ELEMENTS",
    "METRICS",
    "TOO_FEW_PATIENTS",
    "Comparison",
    "Interval",
    "WeightedMetrics",
    "bootstrap_intervals",
    "draw_patients",
    "expanded_percentiles",
    "holm",
    "paired_bootstrap",
    "patient_intervals",
    "permutation_test",
]

LOSSES = ("log_loss", "brier")
SAME = "all patients gave the same result, so how patients differ cannot be seen"
ABSENT = "not defined for these predictions (a class is absent)"


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


def patient_intervals(runs: Runs, metrics: Sequence[str] = METRICS, *, confidence: float = 0.95) -> dict[str, Interval]:
    """Intervals for new patients by linearisation, on the logit scale (log scale for losses), with Student's quantiles.

    The standard error is that of the infinitesimal jackknife over patients with `clustered_variance`, so that a class of
    few patients widens the interval of metrics in which classes weigh the same. In simulations with 15 to 40 patients it
    keeps its level where percentiles of a bootstrap do not (docs/statistics.md): they are too narrow by the factor
    n / (n - 1) and by normal quantiles, and near 1 they are cut off at the wrong end.

    Args:
        runs: predictions at one level (frames, videos or patients), each unit with its patient.
        metrics: names known to `WeightedMetrics.values`.
        confidence: coverage aimed at, in (0, 1).

    Returns:
        `value` None where the metric is not defined. `low` and `high` None with a reason for fewer than 2 patients (in a
        class, where classes weigh the same), and where all patients gave the same result, such as no error at all.
    """
    result = {}
    for name, found in influence(runs, metrics).items():
        value, problem = _optional(found.value), found.problem
        variance, degrees = (0.0, 0.0) if problem or value is None else clustered_variance(found.parts, found.carriers)
        if value is None or problem or not variance:
            result[name] = Interval(value, None, None, confidence, 0, 0, ABSENT if value is None else problem or SAME)
            continue
        half = float(stats.t.ppf((1 + confidence) / 2, degrees) * np.sqrt(variance))
        if name in LOSSES:
            low, high = value * np.exp(np.array([-half, half]) / value)
        else:
            low, high = expit(logit(value) + np.array([-half, half]) / (value * (1 - value)))
        result[name] = Interval(value, float(low), float(high), confidence, 0, 0)
    return result


def expanded_percentiles(values: np.ndarray, confidence: float, found: Influence) -> tuple[float | None, float | None, int, str]:
    """Low and high end over the defined replicates, their number, and a reason when there is no interval.

    The percentiles lie further out than the plain ones (Hesterberg 2015), by as much as Student's quantiles and the
    factors of `clustered_variance` say.

    Args:
        values: float64 [B], the metric or difference in resampled patients, NaN where undefined.
        found: the same metric or difference, with what each patient adds to it.
    """
    defined = values[np.isfinite(values)]
    if found.problem:
        return None, None, len(defined), found.problem
    if len(defined) < max(2, len(values) // 2):
        return None, None, len(defined), f"defined in only {len(defined)} of {len(values)} replicates"
    factor, degrees = found.widening
    tail = stats.norm.cdf(factor * stats.t.ppf((1 - confidence) / 2, degrees))
    low, high = np.quantile(defined, [tail, 1 - tail])
    if high - low < 1e-9:
        return None, None, len(defined), SAME
    return float(low), float(high), len(defined), ""


def _optional(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def bootstrap_intervals(
    runs: Runs, metrics: Sequence[str] = METRICS, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Expanded percentile intervals from resampling whole patients (Field & Welsh 2007; Hesterberg 2015).

    All units of a drawn patient come along, also those of several runs, so units of one patient are never taken for
    independent. Replicates where a metric is undefined (a class was not drawn) are left out and counted; below half of
    them defined, or with fewer than 2 patients (in a class, where classes weigh the same), there is no interval.
    `patient_intervals` is nearer to its level close to 1, and is what reports show.

    Args:
        runs, metrics, confidence: see `patient_intervals`.
        replicates: B.
        seed: equal seeds give equal intervals.
    """
    engine = WeightedRuns(runs)
    count = len(engine.patients)
    if count < TOO_FEW_PATIENTS:
        values = engine.values(np.ones((1, count)), metrics)
        reason = f"{count} patient: nothing to resample"
        return {name: Interval(_optional(values[name][0]), None, None, confidence, 0, 0, reason) for name in metrics}
    drawn = engine.values(draw_patients(count, replicates, seed), metrics)
    result = {}
    for name, found in influence(runs, metrics).items():
        if not np.isfinite(found.value):
            result[name] = Interval(None, None, None, confidence, 0, replicates, ABSENT)
            continue
        low, high, defined, reason = expanded_percentiles(drawn[name], confidence, found)
        result[name] = Interval(found.value, low, high, confidence, defined, replicates - defined, reason)
    return result


def _paired(first: Runs, second: Runs) -> tuple[WeightedRuns, WeightedRuns]:
    """Both sets over one order of patients; DataError unless patients and classes agree."""
    order = same_patients(first, second)
    return WeightedRuns(first, order), WeightedRuns(second, order)


def _difference(left: WeightedRuns, right: WeightedRuns, metric: str, weights: np.ndarray) -> np.ndarray:
    return left.values(weights, [metric])[metric] - right.values(weights, [metric])[metric]


def paired_bootstrap(
    first: Runs, second: Runs, metric: str, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Interval of the difference `first - second`, drawing the same patients for both; percentiles as in `bootstrap_intervals`.

    The sets must cover the same patients; their units may differ (another number of seeds, say). Without any spread
    between patients (equal predictions, for one) there is no interval: that is no proof of certainty about others.

    Raises:
        DataError: patients or classes differ, no rows, or the metric is unknown.
    """
    left, right = _paired(first, second)
    count = len(left.patients)
    difference = _optional(_difference(left, right, metric, np.ones((1, count)))[0])
    if difference is None or count < TOO_FEW_PATIENTS:
        reason = f"{count} patient: nothing to resample" if count < TOO_FEW_PATIENTS else "metric not defined (a class is absent)"
        return Comparison(difference, None, None, None, count, 0, 0, reason)
    drawn = _difference(left, right, metric, draw_patients(count, replicates, seed))
    both = [influence(side.runs, [metric], side.patients)[metric] for side in (left, right)]
    low, high, defined, reason = expanded_percentiles(drawn, confidence, both[0] - both[1])
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
    first: Runs, second: Runs, metric: str, *, permutations: int = 10_000, seed: int = 0
) -> Comparison:
    """Two-sided test of "both models are the same" by exchanging the two models' predictions patient by patient.

    Under that hypothesis each patient's two sets of predictions are exchangeable; the p-value is the share of exchanges
    whose absolute difference is at least the observed one. All 2^G exchanges are enumerated when they are not more than
    `permutations`; otherwise random ones are drawn and the observed one is counted in (Phipson & Smyth 2010), so p is
    never 0. Exchanges where the metric is undefined are left out and counted.

    Raises:
        DataError: patients, classes or numbers of runs differ, no rows, or the metric is unknown.
    """
    left, right = _paired(first, second)
    count = len(left.patients)
    observed = _optional(_difference(left, right, metric, np.ones((1, count)))[0])
    if observed is None:
        return Comparison(None, None, None, None, count, 0, 0, "metric not defined (a class is absent)")
    exact = 2**count <= permutations if count < 63 else False
    total = 2**count if exact else permutations
    if len(left.runs) != len(right.runs):
        raise DataError(f"comparison: {len(left.runs)} and {len(right.runs)} runs cannot be exchanged for one another")
    joined = [_join(one, two) for one, two in zip(left.runs, right.runs, strict=True)]
    both = WeightedRuns(joined, [f"{side}{name}" for side in "01" for name in left.patients])
    drawn = np.empty(total)
    rng = np.random.default_rng(seed)
    # Weights have a column for each patient of each model, confusion matrices C x C; a generator gives the same numbers part by part as at once.
    step = max(1, CHUNK_ELEMENTS // max(2 * count, len(both.runs[0].classes) ** 2))
    for begin in range(0, total, step):
        rows = np.arange(begin, min(begin + step, total))
        swap = ((rows[:, None] >> np.arange(count)) & 1 if exact else rng.integers(0, 2, (len(rows), count))).astype(np.float64)
        kept, other = np.concatenate([1 - swap, swap], axis=1), np.concatenate([swap, 1 - swap], axis=1)
        drawn[rows] = both.values(kept, [metric])[metric] - both.values(other, [metric])[metric]
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
