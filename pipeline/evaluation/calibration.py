"""Calibration, thresholds and net benefit on arrays: fitted on one set of predictions, applied to another, then judged.

Letters: N units (mostly videos), C classes, G patients, B bootstrap replicates, T thresholds. Nothing here knows which
patients are test patients; `pipeline.evaluation.calibration_pages` hands in inner validation rows for every fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax

from pipeline.evaluation.metrics import (
    PROBABILITY_FLOOR, Scores, bin_places, brier_score, expected_calibration_error, log_loss,
)
from pipeline.evaluation.weighted import CHUNK_ELEMENTS

__all__ = [
    "LEAST_PATIENTS",
    "SCALES",
    "THRESHOLDS",
    "Calibrator",
    "brier_parts",
    "calibration_line",
    "calibration_metrics",
    "chance_error",
    "choose_threshold",
    "fit_calibrator",
    "net_benefit",
    "reliability_points",
]

SCALES = (0.1, 10.0)
"""Bounds of the factor on log-probabilities, which is 1 / temperature."""
PRIOR = 0.5
"""Standard deviation of the normal prior on log(scale) and on every bias, a patient counting as one observation."""
LEAST_PATIENTS = 5
"""Validation patients below which nothing is fitted."""
BINS = 10
THRESHOLDS = np.arange(1, 100) / 100
"""Probabilities at which net benefit is computed."""
STEPS, FARTHEST = 40, 30
"""Newton steps of the logistic lines, and the largest slope or intercept: what runs away by then is undefined."""


@dataclass(frozen=True)
class Calibrator:
    """The map p -> softmax(scale * log p + bias), the identity when `reason` says why nothing was fitted."""

    scale: float
    """1 / temperature."""
    bias: tuple[float, ...]
    """One a class; all 0 for temperature scaling."""
    patients: int
    """Patients of the rows it was fitted on."""
    units: int
    reason: str = ""

    @property
    def fitted(self) -> bool:
        """Whether it changes anything."""
        return not self.reason

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, float64 [N, C]; unchanged, to the bit, where nothing was fitted."""
        if not self.fitted:
            return probabilities
        return softmax(self.scale * _logs(probabilities) + np.asarray(self.bias), axis=1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bias": list(self.bias), "temperature": 1 / self.scale}


def _logs(probabilities: np.ndarray) -> np.ndarray:
    """Log-probabilities; what is below the floor (float32 writes 0) counts as the floor."""
    return np.log(np.maximum(probabilities, PROBABILITY_FLOOR))


def fit_calibrator(scores: Scores, method: Literal["none", "temperature", "platt"]) -> Calibrator:
    """Fit on the units of `scores`: most likely values, held near "change nothing" by a prior that many patients outweigh.

    `temperature` (Guo et al., ICML 2017): one factor 1/T on the log-probabilities; the order of the classes stays.
    `platt` (Platt 1999): a factor and an additive constant a class. For two classes that is Platt's line on the
    log-odds; for more, its joint form (bias-corrected temperature scaling, Alexandari et al. 2020), with C + 1
    parameters instead of the 2C of vector scaling. It can change the answer.

    Few patients determine even one parameter badly: without the prior, fitting on 5 patients makes probabilities that
    were right worse (docs/decisions.md has the simulation). The identity, with a reason, when the method is `none`,
    there are fewer than LEAST_PATIENTS patients, only one class occurs (`platt`: any class is absent), or the best
    factor lies at a bound.
    """
    patients, units, classes = len(set(scores.patients.tolist())), len(scores.labels), len(scores.classes)
    present = len(set(scores.labels.tolist()))
    nothing = Calibrator(1.0, (0.0,) * classes, patients, units)
    if method == "none":
        return replace(nothing, reason="evaluate.calibration is none")
    if patients < LEAST_PATIENTS:
        return replace(nothing, reason=f"{patients} inner validation patients; at least {LEAST_PATIENTS} are needed")
    if present < (2 if method == "temperature" else classes):
        return replace(nothing, reason=f"only {present} of {classes} classes among the inner validation patients")
    scale, bias = _most_likely(scores, patients, with_bias=method == "platt")
    if np.isclose(scale, SCALES).any():
        return replace(nothing, reason=f"the best factor on log-probabilities lies outside {SCALES[0]:g} to {SCALES[1]:g}")
    return replace(nothing, scale=scale, bias=tuple(bias.tolist()))


def _most_likely(scores: Scores, patients: int, with_bias: bool) -> tuple[float, np.ndarray]:
    """Factor and biases (float64 [C]) with the smallest log loss plus penalty.

    The mean loss counts `patients` times, not once a unit, because the units of a patient are not independent.
    """
    logs, classes = _logs(scores.probabilities), len(scores.classes)
    truth = np.eye(classes)[scores.labels]
    weight = patients / len(scores.labels)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = np.exp(values[0]), values[1:]
        tilted = scale * logs + bias
        excess = (softmax(tilted, axis=1) - truth) * weight
        value = weight * (logsumexp(tilted, axis=1) - (tilted * truth).sum(1)).sum()
        slope = np.concatenate([[scale * (excess * logs).sum()], excess.sum(0)])
        return float(value + (values**2).sum() / (2 * PRIOR**2)), slope + values / PRIOR**2

    bounds = [tuple(np.log(SCALES))] + [(None, None) if with_bias else (0, 0)] * classes
    start = np.zeros(classes + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-13, "gtol": 1e-8}).x
    return float(np.exp(found[0])), found[1:]


def brier_parts(event: np.ndarray, probability: np.ndarray, bins: int = BINS) -> dict[str, float]:
    """Murphy's decomposition (1973) of the Brier score of one event, over bins of equal counts.

    brier = reliability - resolution + uncertainty + within. Reliability is 0 when every bin's mean probability is its
    frequency; resolution is how far the bins' frequencies lie apart; uncertainty is the variance of the event;
    `within` is what differing probabilities within a bin add (Stephenson et al. 2008), 0 when a bin holds one value.

    Args:
        event: bool [N].
        probability: float [N].
    """
    event, probability = np.asarray(event, np.float64), np.asarray(probability, np.float64)
    place = bin_places(probability, bins)
    count = np.bincount(place)
    used = count > 0
    share = count[used] / len(event)
    said, seen = (np.bincount(place, values)[used] / count[used] for values in (probability, event))
    mean = event.mean()
    parts = {
        "brier": float(((probability - event) ** 2).mean()),
        "reliability": float(share @ (said - seen) ** 2),
        "resolution": float(share @ (seen - mean) ** 2),
        "uncertainty": float(mean * (1 - mean)),
    }
    return parts | {"within": parts["brier"] - parts["reliability"] + parts["resolution"] - parts["uncertainty"]}


def calibration_line(
    event: np.ndarray, probability: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Calibration slope and calibration-in-the-large of one event (Van Calster et al., BMC Medicine 2019).

    Slope: b of logit P(event) = a + b logit(p); 1 is right, below 1 too extreme, above 1 too timid. Intercept: a of
    logit P(event) = a + logit(p); 0 is right, below 0 the probabilities are too high.

    Args:
        event: bool [N].
        probability: float [N]; clipped to 1e-7 from 0 and 1.
        weights: float [B, N] >= 0; None for one row of ones.

    Returns:
        Slope and intercept, float64 [B] each; NaN where they do not exist: one outcome only, one value only, or an
        event that the probabilities separate without error.
    """
    event = np.asarray(event, np.float64)
    logit = np.log(np.clip(probability, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR))
    logit = logit - np.log1p(-np.clip(probability, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR))
    weights = np.ones((1, len(event))) if weights is None else np.asarray(weights, np.float64)
    slope, intercept = np.empty(len(weights)), np.empty(len(weights))
    step = max(1, CHUNK_ELEMENTS // (4 * max(len(event), 1)))
    for free, column, result in ((True, 1, slope), (False, 0, intercept)):
        # Replicates lie near the line through all units: half the steps.
        middle = _logistic(event, logit, weights.mean(0, keepdims=True), free, np.array([0.0, 1.0]))[0]
        start = middle if np.isfinite(middle).all() else np.array([0.0, 1.0])
        for begin in range(0, len(weights), step):
            part = slice(begin, begin + step)
            result[part] = _logistic(event, logit, weights[part], free, start)[:, column]
    return slope, intercept


def _logistic(event: np.ndarray, logit: np.ndarray, weights: np.ndarray, free: bool, start: np.ndarray) -> np.ndarray:
    """Newton's method for a + b x in all replicates at once, b fixed at 1 unless `free`; float64 [B, 2], NaN undefined."""
    line = np.tile(start, (len(weights), 1))
    found = np.zeros(len(weights), bool)
    with np.errstate(all="ignore"):
        for _ in range(STEPS):
            left = np.flatnonzero(~found)
            if not len(left):
                break
            own = weights[left]
            chance = expit(line[left, :1] + line[left, 1:] * logit)
            excess, spread = own * (event - chance), own * chance * (1 - chance)
            slope, tilt = excess.sum(1), excess @ logit
            level, cross, square = spread.sum(1), spread @ logit, spread @ logit**2
            if free:
                change = np.stack([square * slope - cross * tilt, level * tilt - cross * slope], 1) / (level * square - cross**2)[:, None]
            else:
                change = np.stack([slope / level, np.zeros(len(left))], 1)
            size = np.abs(change).max(1)
            found[left] = size < 1e-8
            # Separable data have no optimum: steps are kept short, and what still moves at the end is undefined.
            line[left] += change * np.minimum(1, 2 / np.maximum(size, 1e-300))[:, None]
    return np.where((found & (np.abs(line) < FARTHEST).all(1))[:, None], line, np.nan)


def reliability_points(
    scores: Scores, group: np.ndarray, draws: np.ndarray, confidence: float, event: int | None = None, bins: int = BINS
) -> list[dict[str, Any]]:
    """Points of a reliability diagram over bins of equal counts, with bands from resampled patients.

    Args:
        scores: N units, pooled over seeds.
        group: int [N], the patient of every unit in 0..G-1.
        draws: float64 [B, G], see `draw_patients`.
        event: a class: its probability against its frequency. None: certainty of the answered class against how often
            it is right.

    Returns:
        One row a bin: probability (mean), frequency, low, high (None with fewer than 2 patients, or all units
        alike), count (units), patients.
    """
    if event is None:
        said, seen = scores.probabilities.max(1), scores.probabilities.argmax(1) == scores.labels
    else:
        said, seen = scores.probabilities[:, event], scores.labels == event
    place = bin_places(said, bins)
    rows = []
    for number in np.unique(place):
        own = place == number
        count = np.bincount(group[own], minlength=draws.shape[1]).astype(np.float64)
        hits = np.bincount(group[own], seen[own], draws.shape[1])
        low, high = _band(draws @ hits, draws @ count, confidence) if (count > 0).sum() > 1 else (None, None)
        rows.append({
            "probability": float(said[own].mean()), "frequency": float(seen[own].mean()), "low": low, "high": high,
            "count": int(own.sum()), "patients": int((count > 0).sum()),
        })
    return rows


def _band(part: np.ndarray, whole: np.ndarray, confidence: float) -> tuple[float | None, float | None]:
    values = part[whole > 0] / whole[whole > 0]
    if len(values) < max(2, len(whole) // 2):
        return None, None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Resampling units that are all alike finds no spread; that is no proof of certainty.
    return (float(low), float(high)) if high - low > 1e-9 else (None, None)


def choose_threshold(
    event: np.ndarray, probability: np.ndarray, rule: Literal["youden", "sensitivity", "specificity"], target: float = 0.9
) -> float | None:
    """The probability from which on the event is called (p >= threshold); None unless both outcomes occur.

    Candidates lie midway between neighbouring values (and just beyond the ends), so that a new value near an old one
    falls on its side. `youden`: largest sensitivity + specificity, of equal ones the nearest to 0.5. `sensitivity`: the
    highest candidate with at least the target; `specificity`: the lowest one.
    """
    event, probability = np.asarray(event, bool), np.asarray(probability, np.float64)
    if event.all() or not event.any():
        return None
    values = np.unique(probability)
    candidates = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2, [(values[-1] + 1) / 2]])
    sensitivity = (probability[event][:, None] >= candidates).mean(0)
    specificity = (probability[~event][:, None] < candidates).mean(0)
    if rule == "youden":
        total = sensitivity + specificity
        best = candidates[total >= total.max() - 1e-12]
        return float(best[np.abs(best - 0.5).argmin()])
    if rule == "sensitivity":
        return float(candidates[sensitivity >= target - 1e-12].max())
    enough = candidates[specificity >= target - 1e-12]
    return float(enough.min()) if len(enough) else 1.0


def net_benefit(
    event: np.ndarray, probability: np.ndarray, group: np.ndarray, draws: np.ndarray, confidence: float,
    thresholds: np.ndarray = THRESHOLDS,
) -> dict[str, np.ndarray]:
    """Decision curve (Vickers & Elkin 2006): true positives minus false positives at the threshold's exchange rate.

    Net benefit at t is TP/n - FP/n * t / (1 - t), with p >= t called positive.

    Args:
        event: bool [N]; probability: float [N]; group: int [N], the patient of every unit in 0..G-1.
        draws: float64 [B, G], see `draw_patients`.

    Returns:
        threshold, net_benefit, low, high, treat_all, treat_none; float64 [T] each.
    """
    event = np.asarray(event, bool)
    rate = thresholds / (1 - thresholds)
    called = probability[:, None] >= thresholds
    gain = np.where(event[:, None], 1.0, -rate) * called
    patients = draws.shape[1]
    sums = np.zeros((patients, len(thresholds)))
    np.add.at(sums, group, gain)
    drawn = draws @ sums / (draws @ np.bincount(group, minlength=patients))[:, None]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    share = event.mean()
    return {
        "threshold": thresholds, "net_benefit": gain.mean(0), "low": low, "high": high,
        "treat_all": share - (1 - share) * rate, "treat_none": np.zeros(len(thresholds)),
    }


def chance_error(probabilities: np.ndarray, trials: int = 200, seed: int = 0) -> float:
    """The expected calibration error that would be found, on average, if the certainties were exactly right.

    Few units leave every bin off by luck, so an error is only a finding above this. Units are drawn independently; those
    of one patient are alike, which makes the true value somewhat larger.
    """
    certainty = probabilities.max(1)
    place = bin_places(certainty, BINS)
    member = np.eye(place.max() + 1)[place]
    drawn = np.random.default_rng(seed).random((trials, len(certainty))) < certainty
    return float((np.abs((drawn - certainty) @ member).sum(1) / len(certainty)).mean())


def calibration_metrics(scores: Scores) -> dict[str, Any]:
    """How far probabilities can be trusted, for one set of units, ready for JSON.

    Returns:
        log_loss; brier and its parts summed over the classes (reliability, resolution, uncertainty, within); ece and
        ece_equal_width (10 bins of equal counts and of equal width, certainty of the answer); ece_by_chance (see
        `chance_error`); per_class {class: slope, intercept (None where undefined), said (mean probability), seen
        (share of units)}.
    """
    labels, probabilities = scores.labels, scores.probabilities
    parts = [brier_parts(labels == place, probabilities[:, place]) for place in range(len(scores.classes))]
    per_class: dict[str, Mapping[str, float | None]] = {}
    for place, name in enumerate(scores.classes):
        slope, intercept = calibration_line(labels == place, probabilities[:, place])
        per_class[name] = {
            "slope": _optional(slope[0]), "intercept": _optional(intercept[0]),
            "said": float(probabilities[:, place].mean()), "seen": float((labels == place).mean()),
        }
    return {
        "log_loss": log_loss(labels, probabilities),
        "brier": brier_score(labels, probabilities),
        **{name: sum(part[name] for part in parts) for name in ("reliability", "resolution", "uncertainty", "within")},
        "ece": expected_calibration_error(labels, probabilities, BINS),
        "ece_equal_width": expected_calibration_error(labels, probabilities, BINS, "equal"),
        "ece_by_chance": chance_error(probabilities),
        "per_class": per_class,
    }


def _optional(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
