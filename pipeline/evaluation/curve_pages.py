"""ROC and precision-recall curves of the report: roc.csv, pr.csv, one picture a class, and a table of the areas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation import plots
from pipeline.evaluation.curves import GRID, Curve, average_precision_interval, class_curve
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.report import Picture, Section, Table, init_name, number, percent
from pipeline.evaluation.statistics import Interval, patient_intervals
from pipeline.files import atomic_write
from pipeline.tracking_context import slug

__all__ = ["curves_part"]

ROC_COLUMNS = ["init", "class", "fpr", "tpr", "tpr_low", "tpr_high", "stamp"]
HOW = (
    "Both curves ask how well the probabilities rank the videos, whatever threshold is chosen later. Upper picture (ROC): of the videos of the class, "
    "how many are found (sensitivity), against how many others are called by mistake; the diagonal is guessing. Lower picture: of the videos "
    "called, how many are right (precision), against how many are found (recall); the dotted line is the share of the class, which guessing reaches."
)
PR_COLUMNS = ["init", "class", "recall", "precision", "precision_low", "precision_high", "stamp"]


def curves_part(context: Context) -> Part:
    """Every class against the rest, per video: all folds and seeds pooled, bands and intervals over patients."""
    settings, classes = context.config.evaluate, context.splits.classes
    videos = context.tables["video"]
    found: dict[str, dict[str, Curve]] = {}
    options = {"replicates": settings.bootstrap, "confidence": settings.confidence, "seed": settings.seed}
    for init in context.inits:
        scores = Scores.from_table(videos[videos["init"] == init], classes)
        curves = {name: class_curve(scores, position, **options) for position, name in enumerate(classes)}
        found[init] = {name: curve for name, curve in curves.items() if curve is not None}
    _write(context, found)
    numbers = {}
    for init, curves in found.items():
        runs = list(Scores.by_run(videos[videos["init"] == init], classes).values())
        areas = patient_intervals(runs, [f"auroc.{name}" for name in curves], confidence=settings.confidence)
        values = context.metrics[init]["video"]["per_class"]
        precisions = {name: average_precision_interval(runs, classes.index(name), **options) for name in curves}
        numbers[init] = {name: _numbers(values[name], curves.get(name), areas.get(f"auroc.{name}"), precisions.get(name)) for name in classes}
    return Part("curves", numbers, _section(context, found, numbers))


def _write(context: Context, found: Mapping[str, Mapping[str, Curve]]) -> None:
    """roc.csv and pr.csv: every step of every curve, with the band at its place."""
    tables: dict[str, list[pd.DataFrame]] = {"roc.csv": [], "pr.csv": []}
    for init, curves in found.items():
        for name, curve in curves.items():
            for file, (x, y), band, columns in (
                ("roc.csv", (0, 1), curve.roc_band, ROC_COLUMNS), ("pr.csv", (2, 3), curve.pr_band, PR_COLUMNS),
            ):
                places = curve.points[:, x]
                ends = [np.interp(places, GRID, end) for end in band] if band is not None else [np.full(len(places), np.nan)] * 2
                values = [init, name, places, curve.points[:, y], *ends, context.metrics[init]["stamp"]]
                tables[file].append(pd.DataFrame(dict(zip(columns, values, strict=True))))
    for file, columns in (("roc.csv", ROC_COLUMNS), ("pr.csv", PR_COLUMNS)):
        table = pd.concat(tables[file], ignore_index=True) if tables[file] else pd.DataFrame(columns=columns)
        atomic_write(context.output / file, table.to_csv(index=False, lineterminator="\n"))


def _numbers(measured: Mapping[str, Any], curve: Curve | None, area: Interval | None, precision: tuple[float, float] | None) -> dict[str, Any]:
    """Areas as in the metrics, means over seeds and repeats: AUROC with its interval as in all tables, average precision with percentiles."""
    own = (area.low, area.high) if area and area.low is not None and area.high is not None else None
    ends = {"auroc": own, "average_precision": precision}
    values = {"auroc": measured["auroc"], "average_precision": measured["auprc"]}
    result: dict[str, Any] = {}
    for key, value in values.items():
        low, high = ends.get(key) or (None, None)
        if low is not None and high - low < 1e-9:
            # All patients alike: resampling them finds no spread, which is no proof of certainty.
            low, high = None, None
        result |= {key: value, f"{key}_low": low, f"{key}_high": high}
    reason = "the class has no videos, or there are no others" if curve is None else curve.reason
    return result | {"prevalence": curve.prevalence if curve else None, "videos": measured["support"], "reason": reason}


def _words(values: Mapping[str, Any], key: str) -> str:
    low, high = values[f"{key}_low"], values[f"{key}_high"]
    return number(values[key]) + (f" ({number(low)} to {number(high)})" if low is not None else "")


def _section(context: Context, found: Mapping[str, Mapping[str, Curve]], numbers: Mapping[str, Any]) -> Section:
    confidence, unit, inits = context.config.evaluate.confidence, context.unit, list(found)
    videos = context.tables["video"]
    patients = videos.drop_duplicates(["patient", "label"])["label"].value_counts()
    called = {init: init_name(context.metrics, init) for init in inits}
    pictures = []
    for place, name in enumerate(context.splits.classes):
        curves = {init: found[init][name] for init in inits if name in found[init]}
        if not curves:
            continue
        areas = {init: tuple(_words(numbers[init][name], key) for key in ("auroc", "average_precision")) for init in curves}
        path = context.output / "pictures" / f"curves_{place + 1}_{slug(name)[:40]}.png"
        plots.draw_class_curves(path, GRID, curves, areas, name, context.metrics["stamp"], called)
        spoken = "; ".join(f"{called[init]}: AUROC {both[0]}, average precision {both[1]}" for init, both in areas.items())
        pictures.append(Picture(path, f"ROC curve and precision-recall curve of {name} against the rest. {spoken}.", ""))
    rows = [
        [name if place == 0 else "", called[init], f"{numbers[init][name]['videos']:g}", int(patients.get(name, 0)), number(numbers[init][name]["prevalence"]),
         *(_words(numbers[init][name], key) for key in ("auroc", "average_precision"))]
        for name in context.splits.classes for place, init in enumerate(inits)
    ]
    columns = ["Class", "Network", "Videos", f"{unit.capitalize()}s", "Prevalence", "AUROC", "Average precision"]
    reasons = sorted({one["reason"] for init in inits for one in numbers[init].values() if one["reason"]})
    note = (
        f"Brackets: {percent(confidence)} intervals over {unit}s, for AUROC as in all tables, for average precision percentiles of the bootstrap that "
        "gives the bands; these are too narrow with few of them. Several seeds or repeats: values are means of them, curves and bands pool them."
        + (f" No interval: {'; '.join(reasons)}." if reasons else "")
    )
    pooled = (
        "All folds are pooled; they are scored by different networks, which tends to lower the curve. " if len(context.splits.folds) > 1 else
        "Seeds are pooled; they are different networks, which tends to lower the curve. " if context.metrics["seeds"] > 1 else ""
    )
    band = (
        f"Shaded: {percent(confidence)} bands over {unit}s, at each place by itself. {pooled}"
        f"With a rare class look at the lower picture: a high AUROC can go with many false alarms."
    )
    table = Table("Each class against the rest, per video", columns, rows, columns[2:], note)
    return Section("curves", "How well are the classes ranked?", [HOW, band], pictures, [table], after="classes", layout="panels")
