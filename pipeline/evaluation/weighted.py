"""Metrics under any weights of patients, and how each patient moves them: what intervals and tests are made of.

Letters: B sets of weights, G patients, N units (frames, videos or patient labels), C classes. A resampled cohort is a row
of weights (how often a patient was drawn); metrics of all rows come from matrix products over per-patient counts, so
thousands cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.metrics import PROBABILITY_FLOOR, Scores

__all__ = [
    "METRICS",
    "Influence",
    "Runs",
    "WeightedMetrics",
    "WeightedRuns",
    "clustered_variance",
    "draw_patients",
    "influence",
    "same_patients",
]

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "log_loss", "brier")
CHUNK_ELEMENTS = 4_000_000
"""Elements of the largest temporary array (float64, so 32 MB), whatever B and N are."""
TOO_FEW_PATIENTS = 2
BY_CLASS = ("balanced_accuracy", "macro_f1", "macro_auroc")
"""Metrics in which every class weighs the same, however few patients carry it."""
STEP = 1e-3
"""Change of a weight by which the slope of a metric is measured."""
ROUNDING = 1e-12
"""Variances below this are sums of rounding errors; a standard error of 1e-6 would need millions of patients."""
Runs = Scores | Sequence[Scores]
"""Predictions of one model, or one set for each seed (and repeat) on the same patients."""


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


def same_patients(first: Runs, second: Runs) -> list[str]:
    """The sorted patients of two sets of predictions that are to be compared.

    Raises:
        DataError: patients or classes differ, or there are no rows.
    """
    left, right = ([part] if isinstance(part, Scores) else list(part) for part in (first, second))
    names = [{name for scores in part for name in scores.patients.tolist()} for part in (left, right)]
    if not names[0] and not names[1]:
        raise DataError("comparison: no rows to compare")
    if left[0].classes != right[0].classes:
        raise DataError(f"comparison: classes differ: {', '.join(left[0].classes)} and {', '.join(right[0].classes)}")
    if names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        raise DataError(
            f"comparison: the two sets of predictions must hold the same patients; {len(odd)} are in only one of them, such as {odd[0]}"
        )
    return sorted(names[0])


class WeightedRuns:
    """`WeightedMetrics` of every run over one order of patients; values are means over the runs."""

    def __init__(self, runs: Runs, patients: Sequence[str] | None = None) -> None:
        """`patients` fixes the order (default: sorted patients of all runs).

        Raises:
            DataError: no rows, or classes differ between runs.
        """
        self.runs = [runs] if isinstance(runs, Scores) else list(runs)
        if not self.runs or not all(len(scores.labels) for scores in self.runs):
            raise DataError("predictions: no rows to evaluate")
        for other in self.runs:
            if other.classes != self.runs[0].classes:
                raise DataError(f"predictions: runs with classes {', '.join(self.runs[0].classes)} and {', '.join(other.classes)}")
        known = sorted({name for scores in self.runs for name in scores.patients.tolist()})
        self.patients = known if patients is None else list(patients)
        self.engines = [WeightedMetrics(scores, self.patients) for scores in self.runs]

    def values(self, weights: np.ndarray, metrics: Sequence[str]) -> dict[str, np.ndarray]:
        """See `WeightedMetrics.values`."""
        found = [engine.values(weights, metrics) for engine in self.engines]
        return {name: np.mean([one[name] for one in found], axis=0) for name in metrics}


def draw_patients(patients: int, replicates: int, seed: int) -> np.ndarray:
    """Patients drawn with replacement, as counts: float64 [B, G]; equal arguments give equal draws."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=replicates).astype(np.float64)


def clustered_variance(parts: np.ndarray, carriers: np.ndarray) -> tuple[float, float]:
    """Variance of an estimate from what each patient adds to its deviation, and the degrees of freedom of that variance.

    K kinds of units (such as classes) are K samples of patients, as in Welch's test: each has its factor n / (n - 1) and
    counts for the degrees by Satterthwaite's formula, but never more than G - 1. A patient with units of two kinds adds
    their covariance (Obuchowski 1997 for the two kinds of an AUROC).

    Args:
        parts: float64 [G, K], sums of the deviations a patient's units of each kind cause.
        carriers: int [K], patients with such units, each at least 2.

    Returns:
        (0, 0) where nothing but rounding is left.
    """
    count, sizes = len(parts), np.asarray(carriers, np.float64)
    own = (parts**2).sum(0)
    kinds = own * sizes / (sizes - 1)
    total = float(kinds.sum() + count / (count - 1) * ((parts.sum(1) ** 2).sum() - own.sum()))
    if total <= ROUNDING:
        return 0.0, 0.0
    return total, float(min(kinds.sum() ** 2 / (kinds**2 / (sizes - 1)).sum(), count - 1))


@dataclass(frozen=True)
class Influence:
    """A metric and how it moves with the weight of each patient (infinitesimal jackknife, Efron 1982)."""

    value: float
    """NaN where not defined."""
    parts: np.ndarray
    """float64 [G, K], see `clustered_variance`."""
    carriers: np.ndarray
    kinds: tuple[str, ...]

    def __sub__(self, other: Influence) -> Influence:
        return Influence(self.value - other.value, self.parts - other.parts, self.carriers, self.kinds)

    def minus_other_patients(self, other: Influence) -> Influence:
        """The difference to a metric of other units, mostly of other patients: the kinds of each side are samples of their own, as in Welch's test."""
        kinds = tuple(f"on one side {kind}" for kind in self.kinds + other.kinds)
        return Influence(self.value - other.value, np.hstack([self.parts, -other.parts]), np.concatenate([self.carriers, other.carriers]), kinds)

    @property
    def problem(self) -> str:
        """Why there is no variance; empty if there is one."""
        few = [f"{name} 1 patient" for name, count in zip(self.kinds, self.carriers, strict=True) if count < TOO_FEW_PATIENTS]
        return f"{', '.join(dict.fromkeys(few))}: how patients differ cannot be seen" if few else ""

    @property
    def widening(self) -> tuple[float, float]:
        """How much longer the standard error is than the one a bootstrap finds, and its degrees of freedom."""
        variance, degrees = clustered_variance(self.parts, self.carriers)
        plain = float((self.parts.sum(1) ** 2).sum())
        return (float(np.sqrt(variance / plain)), degrees) if variance and plain > ROUNDING else (1.0, np.inf)


def _kinds(scores: Scores, metric: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Kind of every unit, int [N] (-1 = the metric ignores it), and the words for a kind with too few patients."""
    family, _, name = metric.partition(".")
    if metric in BY_CLASS:
        return scores.labels, tuple(f"class {label} comes from" for label in scores.classes)
    if not name:
        return np.zeros(len(scores.labels), np.int64), ("all comes from",)
    position = scores.classes.index(name)
    hit = scores.labels == position
    if family == "auroc":
        return np.where(hit, 0, 1), (f"class {name} comes from", f"what is not {name} comes from")
    called = scores.probabilities.argmax(1) == position
    return np.where(hit if family == "recall" else called, 0, -1), (f"what is {'' if family == 'recall' else 'called '}{name} comes from",)


def influence(runs: Runs, metrics: Sequence[str], patients: Sequence[str] | None = None) -> dict[str, Influence]:
    """The slope of every metric in the weight of every patient, by kinds of his units, as mean over the runs.

    Slopes are central differences: exact to about 1e-6 of their size, for any metric of `WeightedMetrics`.
    """
    engines = WeightedRuns(runs, patients)
    place = {name: index for index, name in enumerate(engines.patients)}
    whole = engines.values(np.ones((1, len(place))), metrics)
    result = {}
    for metric in metrics:
        found: list[np.ndarray] = []
        present: np.ndarray | bool = False
        for scores in engines.runs:
            kind, words = _kinds(scores, metric)
            cell = np.array([place[name] for name in scores.patients.tolist()]) * (len(words) + 1) + kind + 1
            used, group = np.unique(cell, return_inverse=True)
            names = [f"{index:09d}" for index in range(len(used))]
            engine = WeightedMetrics(Scores(scores.labels, scores.probabilities, np.array(names)[group], scores.classes), names)
            parts = np.zeros(len(place) * (len(words) + 1))
            parts[used] = _slopes(engine, metric)
            found.append(parts.reshape(len(place), len(words) + 1)[:, 1:])
            present = present | (np.bincount(used, minlength=len(parts)).reshape(len(place), len(words) + 1)[:, 1:] > 0)
        carriers = np.sum(present, axis=0)
        kept = carriers > 0
        kinds = tuple(word for word, keep in zip(words, kept, strict=True) if keep)
        result[metric] = Influence(float(whole[metric][0]), np.mean(found, axis=0)[:, kept], carriers[kept], kinds)
    return result


def _slopes(engine: WeightedMetrics, metric: str) -> np.ndarray:
    """Derivative of the metric by the weight of each of G groups, float64 [G]."""
    count = len(engine.patients)
    result = np.empty(count)
    step = max(1, CHUNK_ELEMENTS // count)
    for begin in range(0, count, step):
        rows = np.arange(begin, min(begin + step, count))
        weights = np.ones((len(rows), count))
        ends = []
        for change in (STEP, -STEP):
            weights[np.arange(len(rows)), rows] = 1 + change
            ends.append(engine.values(weights, [metric])[metric])
        result[rows] = (ends[0] - ends[1]) / (2 * STEP)
    return result
