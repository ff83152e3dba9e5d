"""Area under the ROC curve without resampling: DeLong's interval and paired test, for patients who give several units.

A class is taken against all others. The patient is always the independent unit (Obuchowski 1997); where every patient
gives one unit, the numbers are exactly those of DeLong, DeLong & Clarke-Pearson (1988).
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit
from scipy.stats import rankdata
from scipy.stats import t as student

from pipeline.errors import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.statistics import Comparison, Interval
from pipeline.evaluation.weighted import TOO_FEW_PATIENTS, clustered_variance, same_patients

__all__ = ["delong", "delong_test"]


def _components(scores: Scores, position: int, order: list[str]) -> tuple[float, np.ndarray]:
    """The AUROC, and what each of G patients adds to its deviation by positive and negative units, float64 [G, 2].

    Placement values by ranks (Sun & Xu 2014, O(N log N)), summed over each patient (Obuchowski 1997).
    """
    group = np.searchsorted(order, scores.patients)
    score, hit = scores.probabilities[:, position], scores.labels == position
    hits, rest = int(hit.sum()), int((~hit).sum())
    rank = rankdata(score)
    # Share of negatives below a positive unit, and of positives above a negative one; ties count half.
    above = (rank[hit] - rankdata(score[hit])) / rest
    below = 1 - (rank[~hit] - rankdata(score[~hit])) / hits
    area = float(above.mean())
    sums = [np.bincount(group[part], values - area, len(order)) / len(values) for part, values in ((hit, above), (~hit, below))]
    return area, np.stack(sums, axis=1)


def _problem(scores: Scores, position: int) -> tuple[str, tuple[int, int]]:
    """Why there is no interval ("" if there may be one), and the patients with and without units of the class."""
    if not 0 <= position < len(scores.classes):
        raise DataError(f"AUROC: class number {position} does not exist; there are {len(scores.classes)} classes, counted from 0")
    if not len(scores.labels):
        raise DataError("predictions: no rows to evaluate")
    hit, name = scores.labels == position, scores.classes[position]
    carriers = (len(set(scores.patients[hit].tolist())), len(set(scores.patients[~hit].tolist())))
    if not carriers[0]:
        return f"class {name} is absent", carriers
    if not carriers[1]:
        return f"all units have class {name}", carriers
    for count, words in zip(carriers, (f"class {name}", f"a class other than {name}"), strict=True):
        if count < TOO_FEW_PATIENTS:
            return f"{count} patient with {words}: how patients differ cannot be seen", carriers
    return "", carriers


def delong(scores: Scores, position: int, *, confidence: float = 0.95) -> Interval:
    """AUROC of class number `position` against all others, with an interval over patients.

    The interval is made on the logit scale and brought back, so that it never passes 0 or 1 and is longer towards the
    middle, as the sampling distribution is near the ends; quantiles are Student's. A patient may give any number of
    units of either kind; what he has in both kinds enters as a covariance.

    Returns:
        `value` None without one of the two kinds; `low` and `high` None with a reason when one kind comes from fewer
        than 2 patients, or the units are separated perfectly (variance 0 is no proof of certainty) or not at all.

    Raises:
        DataError: no rows, or no such class.
    """
    problem, carriers = _problem(scores, position)
    if 0 in carriers:
        return Interval(None, None, None, confidence, 0, 0, problem)
    area, parts = _components(scores, position, sorted(set(scores.patients.tolist())))
    if not problem:
        variance, degrees = clustered_variance(parts, carriers)
        if area in (0.0, 1.0):
            problem = "the classes are separated without error, so the variance cannot be estimated"
        elif not variance:
            problem = "every unit is placed alike, so the variance cannot be estimated"
    if problem:
        return Interval(area, None, None, confidence, 0, 0, problem)
    half = student.ppf((1 + confidence) / 2, degrees) * np.sqrt(variance) / (area * (1 - area))
    low, high = expit(logit(area) + np.array([-half, half]))
    return Interval(area, float(low), float(high), confidence, 0, 0)


def delong_test(first: Scores, second: Scores, position: int, *, confidence: float = 0.95) -> Comparison:
    """Two-sided test and interval of the difference `first - second` of two AUROCs on the same patients.

    The difference is compared on the plain scale: it is near 0, where its distribution is symmetric. The sets must
    cover the same patients with the same kinds of units; the numbers of units may differ (another number of seeds).

    Returns:
        `p_value`, `low` and `high` None with a reason when a class comes from fewer than 2 patients or both sets rank
        every unit alike.

    Raises:
        DataError: patients, classes or carriers of the class differ, no rows, or no such class.
    """
    order = same_patients(first, second)
    problem, carriers = _problem(first, position)
    if any(_carriers(first, position, kind) != _carriers(second, position, kind) for kind in (True, False)):
        raise DataError(f"comparison: class {first.classes[position]} is not carried by the same patients in both sets of predictions")
    if 0 in carriers:
        return Comparison(None, None, None, None, len(order), 0, 0, problem)
    left, right = (_components(scores, position, order) for scores in (first, second))
    difference = left[0] - right[0]
    if not problem:
        variance, degrees = clustered_variance(left[1] - right[1], carriers)
        if not variance:
            problem = "both sets rank the units alike, patient by patient, so the variance cannot be estimated"
    if problem:
        return Comparison(difference, None, None, None, len(order), 0, 0, problem)
    error = float(np.sqrt(variance))
    half = float(student.ppf((1 + confidence) / 2, degrees)) * error
    p_value = float(2 * student.sf(abs(difference) / error, degrees))
    return Comparison(difference, difference - half, difference + half, p_value, len(order), 0, 0)


def _carriers(scores: Scores, position: int, kind: bool) -> set[str]:
    return set(scores.patients[(scores.labels == position) == kind].tolist())
