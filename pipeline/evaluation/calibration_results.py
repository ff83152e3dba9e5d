"""Calibration of an evaluation: fitted item by item on inner validation videos, judged on the test videos of all folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.calibration import (
    BINS, Calibrator, calibration_line, calibration_metrics, choose_threshold, fit_calibrator, net_benefit, reliability_points,
)
from pipeline.evaluation.metrics import Scores, aggregate
from pipeline.evaluation.parts import Context
from pipeline.evaluation.predictions import Item, probability_columns
from pipeline.evaluation.report import plural
from pipeline.evaluation.statistics import paired_bootstrap, patient_intervals
from pipeline.evaluation.summary import average
from pipeline.evaluation.weighted import draw_patients
from pipeline.files import atomic_write

__all__ = ["DONE", "RATES", "RAW", "Fitted", "Judged", "judge", "nothing_fitted", "write_calibration"]

RAW, DONE = "as predicted", "calibrated"
RATES = {
    "sensitivity": "recall.called", "specificity": "recall.not called", "ppv": "precision.called", "npv": "precision.not called",
}
"""Rates of a threshold, as metrics of the two-class problem `called` against `not called`."""


@dataclass(frozen=True)
class Fitted:
    """What the inner validation patients of one item gave."""

    item: Item
    calibrator: Calibrator
    thresholds: Mapping[str, float | None]
    positives: Mapping[str, int]
    """Validation patients of each class."""
    raw: pd.DataFrame
    """Test videos as predicted."""
    done: pd.DataFrame
    """Test videos calibrated."""


@dataclass(frozen=True)
class Judged:
    """One initialisation: its items, numbers, points and curves; what is calibrated is missing where no item could be."""

    items: Sequence[Fitted]
    numbers: Mapping[str, Any]
    points: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
    """By state and class; class "" is the answered one."""
    curves: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
    """By class and state."""

    @property
    def changed(self) -> bool:
        """Whether any item was calibrated."""
        return any(one.calibrator.fitted for one in self.items)

    @property
    def last(self) -> Mapping[str, Any]:
        """Numbers of the calibrated state, or of the only one."""
        return self.numbers["after"] or self.numbers["before"]


def _fit(context: Context, item: Item) -> Fitted:
    """Calibrator and thresholds of one item, from its inner validation videos only."""
    settings, classes = context.config.evaluate, context.splits.classes
    videos = context.tables["video"]
    test = videos[(videos["init"] == item.card.init) & (videos["seed"] == item.card.seed) & (videos["fold"] == item.card.fold)]
    held = item.table[item.table["part"] == "validation"]
    shared = set(held["patient"]) & set(test["patient"])
    reason = ""
    if item.card.selection == "best_on_test":
        reason = "its epoch was chosen on test patients, so no patients are left to fit on"
    elif held.empty:
        reason = f"no inner validation patients (finetune.selection: {item.card.selection})"
    elif context.splits.stamp:
        # Where videos are divided, the column patient names videos and would not show it.
        reason = f"its inner validation and test parts share patients: {context.splits.stamp}"
    elif shared:
        reason = f"{len(shared)} of its {held['patient'].nunique()} inner validation {context.unit}s are also tested"
    if reason:
        calibrator = Calibrator(1.0, (0.0,) * len(classes), 0, 0, reason)
        return Fitted(item, calibrator, dict.fromkeys(classes), dict.fromkeys(classes, 0), test, test)
    scores = Scores.from_table(aggregate(held, classes, "video", settings.aggregation, settings.top_k), classes)
    calibrator = fit_calibrator(scores, settings.calibration)
    fitted = calibrator.apply(scores.probabilities)
    rule = settings.threshold
    thresholds = {
        name: choose_threshold(scores.labels == place, fitted[:, place], rule.rule, rule.target) for place, name in enumerate(classes)
    }
    positives = {name: len(set(scores.patients[scores.labels == place].tolist())) for place, name in enumerate(classes)}
    done = test.copy()
    columns = probability_columns(classes)
    done[columns] = calibrator.apply(test[columns].to_numpy())
    return Fitted(item, calibrator, thresholds, positives, test, done)


def nothing_fitted(items: Sequence[Fitted]) -> str:
    """Why no item had patients to fit on; empty where one had some."""
    if any(one.calibrator.patients for one in items):
        return ""
    first, *others = dict.fromkeys(one.calibrator.reason for one in items)
    return first + (f"; and {plural(len(others), 'other reason')}" if others else "")


def _item_numbers(one: Fitted) -> dict[str, Any]:
    return {
        "item": one.item.name, "fold": one.item.card.fold, "seed": one.item.card.seed, **one.calibrator.as_dict(),
        "thresholds": dict(one.thresholds), "positive_patients": dict(one.positives),
    }


def judge(context: Context, init: str, wanted: Sequence[str]) -> Judged:
    """Fit the items of one initialisation and judge their test videos; thresholds and curves for the classes in `wanted`."""
    settings, classes = context.config.evaluate, context.splits.classes
    items = [_fit(context, item) for item in context.items if item.card.init == init]
    changed = any(one.calibrator.fitted for one in items)
    states = (RAW, DONE) if changed else (RAW,)
    tables = {state: pd.concat([one.done if state == DONE else one.raw for one in items]) for state in states}
    scores = {state: Scores.from_table(table, classes) for state, table in tables.items()}
    names, group = np.unique(scores[RAW].patients, return_inverse=True)
    draws = draw_patients(len(names), settings.bootstrap, settings.seed)
    runs = {state: list(Scores.by_run(table, classes).values()) for state, table in tables.items()}
    numbers: dict[str, Any] = {
        "items_calibrated": sum(one.calibrator.fitted for one in items),
        "items": [_item_numbers(one) for one in items],
        "before": _state_numbers(context, runs[RAW], draws),
        "after": None, "difference": None, "answers_changed": 0,
    }
    if changed:
        numbers["after"] = _state_numbers(context, runs[DONE], draws)
        numbers["difference"] = _difference(context, runs)
        numbers["answers_changed"] = int((scores[RAW].probabilities.argmax(1) != scores[DONE].probabilities.argmax(1)).sum())
    numbers["thresholds"] = {name: _threshold_numbers(context, items, name) for name in wanted}
    # Fewer than eight videos a group would show luck only.
    bins = int(np.clip(len(runs[RAW][0].labels) // 8, 3, BINS))
    points = {
        (state, name): reliability_points(one, group, draws, settings.confidence, classes.index(name) if name else None, bins)
        for state, one in scores.items() for name in ("", *classes)
    }
    curves = {
        name: {
            state: net_benefit(one.labels == place, one.probabilities[:, place], group, draws, settings.confidence)
            for state, one in scores.items()
        }
        for name, place in ((name, classes.index(name)) for name in wanted)
    }
    return Judged(items, numbers, points, curves)


def _state_numbers(context: Context, runs: Sequence[Scores], draws: np.ndarray) -> dict[str, Any]:
    """Means over seeds and repeats; intervals of log loss, Brier score, slope and intercept over patients (`draws`: [B, G])."""
    settings = context.config.evaluate
    result = average([calibration_metrics(one) for one in runs])
    intervals = patient_intervals(runs, ["log_loss", "brier"], confidence=settings.confidence)
    for name, found in intervals.items():
        result |= {f"{name}_low": found.low, f"{name}_high": found.high}
    groups = [np.unique(one.patients, return_inverse=True)[1] for one in runs]
    for place, name in enumerate(runs[0].classes):
        # A line each and their mean, as the value is: one line through all would be another, less steep one.
        lines = [calibration_line(one.labels == place, one.probabilities[:, place], draws[:, group]) for one, group in zip(runs, groups, strict=True)]
        for key, values in zip(("slope", "intercept"), zip(*lines, strict=True), strict=True):
            low, high = _ends(np.mean(values, axis=0), settings.confidence)
            result["per_class"][name] |= {f"{key}_low": low, f"{key}_high": high}
    return result


def _ends(values: np.ndarray, confidence: float) -> tuple[float | None, float | None]:
    """Percentiles over the defined replicates; None where less than half of them are."""
    defined = values[np.isfinite(values)]
    if len(defined) < max(2, len(values) / 2):
        return None, None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _difference(context: Context, runs: Mapping[str, Sequence[Scores]]) -> dict[str, float | None]:
    """Calibrated minus as predicted, on the same draws of patients; below 0 is a gain."""
    settings = context.config.evaluate
    result: dict[str, float | None] = {}
    for name in ("log_loss", "brier"):
        found = paired_bootstrap(
            runs[DONE], runs[RAW], name, replicates=settings.bootstrap, confidence=settings.confidence, seed=settings.seed
        )
        result |= {name: found.difference, f"{name}_low": found.low, f"{name}_high": found.high}
    return result


def _threshold_numbers(context: Context, items: Sequence[Fitted], name: str) -> dict[str, Any]:
    """Test videos called `name` at their own fold's threshold, against their labels."""
    settings = context.config.evaluate
    lacking = [one.item.name for one in items if one.thresholds[name] is None]
    result: dict[str, Any] = {
        "thresholds": [one.thresholds[name] for one in items], "least_positive_patients": min(one.positives[name] for one in items),
    }
    if lacking:
        ends = [f"{rate}{end}" for rate in RATES for end in ("", "_low", "_high")]
        reason = nothing_fitted(items) or (
            f"no threshold for {', '.join(lacking)}: their inner validation patients do not hold both {name} and others"
        )
        return {**result, **dict.fromkeys(ends), "reason": reason}
    tables = []
    for one in items:
        called = (one.done[f"p_{name}"] >= one.thresholds[name]).astype(float)
        label = np.where(one.done["label"] == name, "called", "not called")
        tables.append(one.done.assign(label=label, **{"p_called": called, "p_not called": 1 - called}))
    runs = list(Scores.by_run(pd.concat(tables), ["not called", "called"]).values())
    intervals = patient_intervals(runs, list(RATES.values()), confidence=settings.confidence)
    for rate, metric in RATES.items():
        found = intervals[metric]
        result |= {rate: found.value, f"{rate}_low": found.low, f"{rate}_high": found.high}
    return result | {"reason": ""}


def write_calibration(context: Context, judged: Mapping[str, Judged], wanted: Sequence[str]) -> None:
    """calibration.csv and decision_curve.csv hold one line each, for `dvc plots`; the files `_all` hold everything."""
    stamps = {init: context.metrics[init]["stamp"] for init in judged}
    points = [
        {"init": init, "state": state, "class": name or "(answer)", **row, "stamp": stamps[init]}
        for init, one in judged.items() for (state, name), rows in one.points.items() for row in rows
    ]
    curves = [
        pd.DataFrame({"init": init, "class": name, "state": state, **curve, "stamp": stamps[init]})
        for init, one in judged.items() for name, states in one.curves.items() for state, curve in states.items()
    ]
    _csv(context, "calibration_all.csv", pd.DataFrame(points))
    _csv(context, "decision_curve_all.csv", pd.concat(curves))
    first = judged[context.inits[0]]
    state = DONE if first.changed else RAW
    _csv(context, "calibration.csv", pd.DataFrame(first.points[state, ""]).assign(stamp=stamps[context.inits[0]]))
    curve, raw = first.curves[wanted[0]][state], first.curves[wanted[0]][RAW]
    default = np.maximum(curve["treat_all"], curve["treat_none"])
    _csv(context, "decision_curve.csv", pd.DataFrame({
        "class": wanted[0], "threshold": curve["threshold"], "network": curve["net_benefit"], "as_predicted": raw["net_benefit"],
        "low": curve["low"], "high": curve["high"], "all_or_none": default,
        "stamp": stamps[context.inits[0]],
    }))


def _csv(context: Context, name: str, table: pd.DataFrame) -> None:
    atomic_write(context.output / name, table.to_csv(index=False, lineterminator="\n"))
