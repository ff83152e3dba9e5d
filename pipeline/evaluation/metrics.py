"""Classification metrics on arrays, and the way from frames to videos to patients.

Letters: N scored units (frames, videos or patients), C classes. A metric that its data cannot define is None with a
reason under `undefined`, never NaN, so that every result is valid JSON. No plots, files or confidence intervals here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from pipeline.errors import DataError

__all__ = [
    "Scores",
    "RULES",
    "aggregate",
    "attention_mean",
    "auroc",
    "average_precision",
    "bin_places",
    "brier_score",
    "classification_metrics",
    "confusion_matrix",
    "expected_calibration_error",
    "harmonic_mean",
    "log_loss",
    "malignancy_metrics",
    "reliability_curve",
    "select_epoch",
]

# Keys that keep apart predictions of different models on the same video.
RUN_COLUMNS = ("init", "seed", "fold", "repeat", "part")
RULES = ("mean", "max", "vote", "top_k", "attention")
# Probabilities arrive as float32; a certain and wrong prediction costs -log of this instead of infinity.
PROBABILITY_FLOOR = 1e-7


@dataclass(frozen=True)
class Scores:
    """Predictions of N units: `labels` int64 [N] (class index), `probabilities` float64 [N, C], `patients` str [N].

    Raises:
        DataError: on unequal lengths, a label outside the classes, or rows that are no probabilities (tolerance 1e-3).
    """

    labels: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        count, classes = len(self.labels), len(self.classes)
        if self.probabilities.shape != (count, classes) or len(self.patients) != count:
            raise DataError(
                f"predictions: {count} labels, probabilities of shape {self.probabilities.shape} and "
                f"{len(self.patients)} "
                f"patients do not belong together; expected [{count}, {classes}] probabilities and {count} patients"
            )
        if count and not (0 <= self.labels.min() and self.labels.max() < classes):
            raise DataError(f"predictions: a label lies outside the {classes} classes {', '.join(self.classes)}")
        total = self.probabilities.sum(1)
        wrong = ~(np.isfinite(total) & (np.abs(total - 1) <= 1e-3) & (self.probabilities >= 0).all(1))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"predictions: row {row} is not a probability distribution (values "
                f"{self.probabilities[row].tolist()}, sum "
                f"{total[row]:g}; {int(wrong.sum())} such rows); values must be >= 0 and sum to 1"
            )

    @classmethod
    def from_table(cls, table: pd.DataFrame, classes: Sequence[str]) -> Scores:
        """From a table with the columns `label`, `patient` and `p_<class>` of every class, such as predictions.csv.

        Raises:
            DataError: naming a missing column, or labels that are none of `classes`.
        """
        columns = [f"p_{name}" for name in classes]
        missing = [name for name in ("label", "patient", *columns) if name not in table.columns]
        if missing:
            raise DataError(
                f"predictions: column {missing[0]!r} is missing; found: {', '.join(map(str, table.columns))}"
            )
        index = {name: position for position, name in enumerate(classes)}
        names = table["label"].astype(str)
        unknown = sorted(set(names) - set(index))
        if unknown:
            raise DataError(f"predictions: label {unknown[0]!r} is not one of the classes {', '.join(classes)}")
        return cls(
            labels=names.map(index).to_numpy(np.int64),
            probabilities=table[columns].to_numpy(np.float64),
            patients=table["patient"].astype(str).to_numpy(),
            classes=tuple(classes),
        )

    @classmethod
    def by_run(cls, table: pd.DataFrame, classes: Sequence[str]) -> dict[tuple[int, int], Scores]:
        """Predictions of every (seed, repeat) of one initialisation; each holds every unit once. The table has these two columns as well."""
        return {key: cls.from_table(part, classes) for key, part in table.groupby(["seed", "repeat"])}


def _vote(probabilities: np.ndarray) -> np.ndarray:
    """One-hot rows of the winning class; a tie goes to the class listed first. float64 [N, C]."""
    return np.eye(probabilities.shape[1])[probabilities.argmax(1)]


def aggregate(
    table: pd.DataFrame,
    classes: Sequence[str],
    level: Literal["video", "patient"],
    how: Literal["mean", "max", "vote", "top_k", "attention"] = "mean",
    top_k: float = 0.2,
) -> pd.DataFrame:
    """Frame predictions to one row a video, or videos to one row a patient.

    `mean` averages probabilities. `max` takes every class at its most certain member and rescales to sum 1 (a finding
    that shows in one frame counts). `vote` gives the share of members whose most probable class it is (ties: class
    listed first). `top_k` takes for every class the mean of its k largest probabilities (`top_k` below 1: that share of
    the members, rounded up; from 1: that many, or all) and rescales to sum 1. `attention` weighs the frames of a video by
    the column `weight` as fine-tuning did (`attention_mean`); videos carry no weight, so a patient is the mean of his
    videos. Level `patient` first aggregates frames to videos (so that long clips do not outvote short ones),
    then videos.

    Labels belong to videos, and one patient may have clips of a healthy and of a diseased region. The unit of level
    `patient` is therefore (patient, label): a patient is judged once for each label he carries, from the videos that
    carry it. Picking the worst label instead would need an order of severity that the data do not state. Intervals
    still resample whole patients (`pipeline.evaluation.statistics`), so the rows of one patient are never taken for
    independent.

    Args:
        table: columns `video`, `patient`, `label`, `p_<class>`..., and any of `init`, `seed`, `fold`, `repeat`, `part`, which
            keep models apart: members are joined only where all of them agree.
        classes: the classes in order.
        level: unit of the result.
        how: rule for both steps. top_k: see above.

    Returns:
        Columns: those of init, seed, fold, repeat, part that were there; `video` (level video only), `patient`, `label`,
        `members` (number of joined rows of the level below), `p_<class>`...; sorted by these keys.

    Raises:
        DataError: a column is missing, the rule is unknown, or one video has two labels or two patients.
    """
    columns = [f"p_{name}" for name in classes]
    if how == "attention" and "weight" not in table.columns:
        raise DataError(
            "aggregation: attention needs the weights of frames (column weight of predictions.csv), which fine-tuning writes with "
            "finetune.pooling: attention"
        )
    missing = [name for name in ("video", "patient", "label", *columns) if name not in table.columns]
    if missing:
        raise DataError(f"predictions: column {missing[0]!r} is missing; found: {', '.join(map(str, table.columns))}")
    if how not in RULES or level not in ("video", "patient"):
        raise DataError(f"aggregation: got level {level!r}, rule {how!r}; allowed: video, patient and {', '.join(RULES)}")
    runs = [name for name in RUN_COLUMNS if name in table.columns]
    several = table.groupby([*runs, "video"])[["label", "patient"]].nunique().max(axis=1)
    if (several > 1).any():
        raise DataError(f"predictions: video {several.idxmax()} occurs with two labels or two patients")
    videos = _join(table, [*runs, "video", "patient", "label"], columns, how, top_k)
    return videos if level == "video" else _join(videos, [*runs, "patient", "label"], columns, "mean" if how == "attention" else how, top_k)


def _join(table: pd.DataFrame, keys: list[str], columns: list[str], how: str, top_k: float) -> pd.DataFrame:
    values = table[columns].to_numpy(np.float64)
    values = _vote(values) if how == "vote" else values
    frame = pd.concat([table[keys].reset_index(drop=True), pd.DataFrame(values, columns=columns)], axis=1)
    grouped = frame.groupby(keys, sort=True)
    if how in ("top_k", "attention"):
        weights = table["weight"].to_numpy(np.float64) if how == "attention" else None
        number = grouped.ngroup().to_numpy()
        order = np.argsort(number, kind="stable")
        rows = [
            _most_certain(values[place], top_k) if weights is None else attention_mean(values[place], weights[place])
            for place in np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
        ]
        joined = pd.DataFrame(rows, index=grouped.size().index, columns=columns)
    else:
        joined = grouped[columns].max() if how == "max" else grouped[columns].mean()
    joined = joined.div(joined.sum(axis=1), axis=0)
    joined.insert(0, "members", grouped.size())
    return joined.reset_index()


def _most_certain(probabilities: np.ndarray, top_k: float) -> np.ndarray:
    """Mean of the largest values of every class: float64 [N, C] -> [C], not rescaled."""
    count = len(probabilities)
    # 0.2 of 5 is 1, whatever the last digit of the product says.
    kept = min(count, int(top_k)) if top_k >= 1 else max(1, int(np.ceil(round(top_k * count, 9))))
    return np.sort(probabilities, axis=0)[count - kept :].mean(0)


def attention_mean(probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Softmax of the weighted sum of the frames' logits, from their probabilities: [N, C] and weights [N] of sum 1 -> [C].

    A logit is a log-probability but for a number that all classes of the frame share, and the softmax does not see it.
    """
    logits = np.asarray(weights, np.float64) @ np.log(np.maximum(np.asarray(probabilities, np.float64), 1e-38))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [C, C], rows = truth, columns = prediction."""
    flat = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def auroc(positive: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve of one class against the rest: P(score of a positive > of a negative), ties count half.

    None when there is no positive or no negative. `positive` bool [N], `score` float [N].
    """
    positive = np.asarray(positive, bool)
    count = int(positive.sum())
    rest = len(positive) - count
    if not count or not rest:
        return None
    return float((rankdata(score)[positive].sum() - count * (count + 1) / 2) / (count * rest))


def average_precision(positive: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the precision-recall curve as a step function; equal scores form one step. None without positives."""
    positive = np.asarray(positive, bool)
    if not positive.any():
        return None
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    ends = np.append(np.flatnonzero(np.diff(np.asarray(score)[order])), len(order) - 1)
    hits = np.cumsum(positive[order])[ends]
    return float(np.sum(np.diff(hits, prepend=0) * hits / (ends + 1)) / positive.sum())


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-probability (nats) of the true class; probabilities below 1e-7 count as 1e-7."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], PROBABILITY_FLOOR)).mean())


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over units of the squared distance to the one-hot truth, summed over classes: 0 perfect, 2 worst."""
    return float(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1).mean())


def bin_places(values: np.ndarray, bins: int, width: Literal["mass", "equal"] = "mass") -> np.ndarray:
    """Bin of every value in [0, 1], int64 [N]: bins of equal counts (`mass`), or ((k - 1) / bins, k / bins] (`equal`).

    Equal values share a bin, so the result does not depend on their order; fewer distinct values give fewer bins.
    """
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.unique(np.quantile(values, inner, method="inverted_cdf")) if width == "mass" else inner
    return np.searchsorted(edges, values, side="left")


def reliability_curve(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10, width: Literal["mass", "equal"] = "mass"
) -> dict[str, list[float]]:
    """Certainty of the predicted class against how often it is right, in bins (`bin_places`).

    Bins of equal counts by default, because confident models leave most equal-width bins nearly empty.

    Returns:
        `confidence`, `accuracy` (means per bin) and `count`, lists of equal length, at most `bins` long.
    """
    certainty = probabilities.max(1)
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    place = bin_places(certainty, bins, width)
    count = np.bincount(place)
    used = count > 0
    mean = [
        np.bincount(place, weights=values, minlength=len(count))[used] / count[used] for values in (certainty, right)
    ]
    return {"confidence": mean[0].tolist(), "accuracy": mean[1].tolist(), "count": count[used].tolist()}


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 10, width: Literal["mass", "equal"] = "mass"
) -> float:
    """Mean |confidence - accuracy| over the bins of `reliability_curve`, weighted by their counts (Guo et al. 2017)."""
    curve = {name: np.asarray(values) for name, values in reliability_curve(labels, probabilities, bins, width).items()}
    return float(np.abs(curve["confidence"] - curve["accuracy"]) @ curve["count"] / curve["count"].sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def classification_metrics(scores: Scores) -> dict[str, Any]:
    """All metrics of one set of predictions, ready for JSON.

    The predicted class is the most probable one; a tie goes to the class listed first. Rules for absent classes:
    recall (and AUROC, AUPRC) of a class without labels and precision of a class that is never predicted are None; F1 is
    2TP / (2TP + FP + FN), None if that is 0/0; balanced accuracy and macro-F1 are means over the classes that have
    labels; macro AUROC and macro AUPRC need every class and are None otherwise, because a mean over fewer classes is
    another quantity.

    Returns:
        n, patients, accuracy, balanced_accuracy, macro_f1, macro_auroc, macro_auprc, log_loss, brier, ece, per_class
        {class: recall, precision, f1, auroc, auprc, support}, confusion (rows = truth), classes, undefined {name:
        reason}.

    Raises:
        DataError: without any unit.
    """
    labels, probabilities, classes = scores.labels, scores.probabilities, scores.classes
    if not len(labels):
        raise DataError("predictions: no rows to evaluate")
    confusion = confusion_matrix(labels, probabilities.argmax(1), len(classes))
    support, called, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    undefined: dict[str, str] = {}
    per_class: dict[str, dict[str, Any]] = {}
    for position, name in enumerate(classes):
        positive = labels == position
        per_class[name] = {
            "recall": _ratio(hits[position], support[position]),
            "precision": _ratio(hits[position], called[position]),
            "f1": _ratio(2 * hits[position], support[position] + called[position]),
            "auroc": auroc(positive, probabilities[:, position]),
            "auprc": average_precision(positive, probabilities[:, position]),
            "support": int(support[position]),
        }
        for metric, value in per_class[name].items():
            if value is None:
                undefined[f"{name}.{metric}"] = _reason(name, metric, int(support[position]), len(labels))
    present = [name for name, count in zip(classes, support, strict=True) if count]
    result: dict[str, Any] = {
        "n": len(labels),
        "patients": len(set(scores.patients.tolist())),
        "accuracy": float(hits.sum() / len(labels)),
        "balanced_accuracy": float(np.mean([per_class[name]["recall"] for name in present])),
        "macro_f1": float(np.mean([per_class[name]["f1"] for name in present])),
    }
    for metric in ("auroc", "auprc"):
        values = [per_class[name][metric] for name in classes]
        lacking = [name for name, value in zip(classes, values, strict=True) if value is None]
        result[f"macro_{metric}"] = None if lacking else float(np.mean(values))
        if lacking:
            undefined[f"macro_{metric}"] = f"not defined for class {', '.join(lacking)}"
    result |= {
        "log_loss": log_loss(labels, probabilities),
        "brier": brier_score(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
    }
    return result | {
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "classes": list(classes),
        "undefined": undefined,
    }


def _reason(name: str, metric: str, support: int, count: int) -> str:
    if metric == "precision":
        return f"class {name} is never predicted"
    if metric == "f1":
        return f"class {name} has no label and is never predicted"
    return f"class {name} has no label" if not support else f"all {count} units have class {name}"


def malignancy_metrics(confusion: np.ndarray) -> dict[str, float | None]:
    """The published gallbladder metrics from 3x3 counts (rows = truth; 0 normal, 1 benign, 2 malignant).

    specificity: normal and benign not called malignant; sensitivity: malignant called malignant; accuracy_2class:
    malignant told from the rest (the "Acc" of the UCL paper); accuracy_3class: trace over total. None where the
    denominator is 0.

    Raises:
        DataError: the matrix is not 3x3.
    """
    counts = np.asarray(confusion)
    if counts.shape != (3, 3):
        raise DataError(
            f"malignancy metrics need a 3x3 confusion matrix (normal, benign, malignant); got shape {counts.shape}"
        )
    spared = counts[:2, :2].sum()
    return {
        "specificity": _ratio(spared, counts[:2].sum()),
        "sensitivity": _ratio(counts[2, 2], counts[2].sum()),
        "accuracy_2class": _ratio(spared + counts[2, 2], counts.sum()),
        "accuracy_3class": _ratio(np.trace(counts), counts.sum()),
    }


def harmonic_mean(first: float | None, second: float | None) -> float:
    """2ab / (a + b); 0 when both are 0 or one is undefined."""
    if first is None or second is None or first + second == 0:
        return 0.0
    return 2.0 * first * second / (first + second)


def select_epoch(
    scores: Sequence[float | None] | Sequence[Sequence[float | None]],
    rule: Literal["highest", "lowest", "harmonic_mean"] = "highest",
) -> int:
    """Index of the chosen epoch: the best value by strict improvement, so the earliest of equal ones.

    Args:
        scores: one value an epoch, or for `harmonic_mean` a pair (specificity, sensitivity) an epoch. None and NaN mean
            undefined and are never chosen.
        rule: `lowest` is for losses. `harmonic_mean` is the rule of the published gallbladder recipe (0/0 counts as 0).

    Raises:
        DataError: no epoch has a defined score, or the rule is unknown.
    """
    if rule not in ("highest", "lowest", "harmonic_mean"):
        raise DataError(f"epoch selection: unknown rule {rule!r}; allowed: highest, lowest, harmonic_mean")
    best, chosen = -np.inf, -1
    for epoch, score in enumerate(scores):
        value = harmonic_mean(*score) if rule == "harmonic_mean" else score
        if value is None or np.isnan(value):
            continue
        value = -value if rule == "lowest" else value
        if value > best:
            best, chosen = value, epoch
    if chosen < 0:
        raise DataError(
            f"epoch selection: none of {len(scores)} epochs has a defined score; use finetune.selection: last, or more "
            "validation patients"
        )
    return chosen
