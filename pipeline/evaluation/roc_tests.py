"""Area under the ROC curve without resampling: DeLong's interval and paired test, for patients who give several units.

A class is taken against all others. The patient is always the independent unit (Obuchowski 1997); where every patient
gives one unit, the variances are exactly those of DeLong, DeLong & Clarke-Pearson (1988).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from pipeline.errors import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.statistics import Comparison, Interval
from pipeline.evaluation.weighted import Influence, clustered_variance, same_patients

__all__ = ["auroc_influence", "delong", "delong_test"]


def auroc_influence(scores: Scores, position: int, patients: Sequence[str] | None = None) -> Influence:
    """AUROC of class number `position` against all others, and what each patient's units of both kinds add to its deviation.

    Placement values come from ranks (Sun & Xu 2014, O(N log N)) and are summed over patients (Obuchowski 1997); ties
    count half. `value` is NaN, without parts, where one of the two kinds is absent.

    Args:
        patients: sorted patients of the rows (default: those of `scores`).

    Raises:
        DataError: no rows, or no such class.
    """
    if not 0 <= position < len(scores.classes):
        raise DataError(f"AUROC: class number {position} does not exist; there are {len(scores.classes)} classes, counted from 0")
    if not len(scores.labels):
        raise DataError("predictions: no rows to evaluate")
    order = sorted(set(scores.patients.tolist())) if patients is None else list(patients)
    place = {name: index for index, name in enumerate(order)}
    group = np.array([place[name] for name in scores.patients.tolist()])
    score, hit = scores.probabilities[:, position], scores.labels == position
    kinds = (hit, ~hit)
    carriers = np.array([len(np.unique(group[kind])) for kind in kinds])
    words = (f"class {scores.classes[position]} comes from", f"what is not {scores.classes[position]} comes from")
    if not carriers.all():
        return Influence(float("nan"), np.zeros((len(order), 2)), carriers, words)
    rank = stats.rankdata(score)
    # Share of the negatives below a positive unit, and of the positives above a negative one.
    above = (rank[hit] - stats.rankdata(score[hit])) / (~hit).sum()
    below = 1 - (rank[~hit] - stats.rankdata(score[~hit])) / hit.sum()
    area = float(above.mean())
    parts = [np.bincount(group[kind], found - area, len(order)) / len(found) for kind, found in zip(kinds, (above, below), strict=True)]
    return Influence(area, np.stack(parts, axis=1), carriers, words)


def _absent(scores: Scores, position: int) -> str:
    name = scores.classes[position]
    return f"all units have class {name}" if (scores.labels == position).any() else f"class {name} is absent"


def delong(scores: Scores, position: int, *, confidence: float = 0.95) -> Interval:
    """AUROC of class number `position` against all others, with an interval over patients.

    The interval is made on the logit scale and brought back, so that it never passes 0 or 1 and is longer towards the
    middle, as the sampling distribution is near the ends; in simulations it keeps its level where the plain scale does
    not (docs/statistics.md). Quantiles are Student's with Satterthwaite's degrees of freedom, as in the test of Brunner &
    Munzel (2000), which has the same variance. A patient may give any number of units of either kind.

    Returns:
        `value` None without one of the two kinds. `low` and `high` None with a reason when one kind comes from 1 patient,
        or the kinds are separated without error (a variance of 0 is no proof of certainty).

    Raises:
        DataError: no rows, or no such class.
    """
    found = auroc_influence(scores, position)
    if np.isnan(found.value):
        return Interval(None, None, None, confidence, 0, 0, _absent(scores, position))
    variance, degrees = (0.0, 0.0) if found.problem else clustered_variance(found.parts, found.carriers)
    if not variance:
        reason = found.problem or "every unit is placed alike (no errors at all, or one score for all): no variance can be estimated"
        return Interval(found.value, None, None, confidence, 0, 0, reason)
    half = stats.t.ppf((1 + confidence) / 2, degrees) * np.sqrt(variance) / (found.value * (1 - found.value))
    low, high = expit(logit(found.value) + np.array([-half, half]))
    return Interval(found.value, float(low), float(high), confidence, 0, 0)


def delong_test(first: Scores, second: Scores, position: int, *, confidence: float = 0.95) -> Comparison:
    """Two-sided test and interval of the difference `first - second` of two AUROCs on the same patients.

    The difference is judged on the plain scale: near 0 its distribution is symmetric. The sets must cover the same
    patients with the same kinds of units; the numbers of units may differ (another number of seeds).

    Returns:
        `difference` None without one of the two kinds. `p_value`, `low` and `high` None with a reason when one kind comes
        from 1 patient, or both sets rank the units alike.

    Raises:
        DataError: patients, classes or carriers of the class differ, no rows, or no such class.
    """
    order = same_patients(first, second)
    left, right = (auroc_influence(scores, position, order) for scores in (first, second))
    if any(_carriers(first, position, kind) != _carriers(second, position, kind) for kind in (True, False)):
        raise DataError(f"comparison: class {first.classes[position]} is not carried by the same patients in both sets of predictions")
    found = left - right
    if np.isnan(found.value):
        return Comparison(None, None, None, None, len(order), 0, 0, _absent(first, position))
    variance, degrees = (0.0, 0.0) if found.problem else clustered_variance(found.parts, found.carriers)
    if not variance:
        reason = found.problem or "both sets rank the units alike, patient by patient: no variance can be estimated"
        return Comparison(found.value, None, None, None, len(order), 0, 0, reason)
    error = float(np.sqrt(variance))
    half = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
    p_value = float(2 * stats.t.sf(abs(found.value) / error, degrees))
    return Comparison(found.value, found.value - half, found.value + half, p_value, len(order), 0, 0)


def _carriers(scores: Scores, position: int, kind: bool) -> set[str]:
    return set(scores.patients[(scores.labels == position) == kind].tolist())
