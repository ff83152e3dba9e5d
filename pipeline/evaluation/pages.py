"""Draws all pictures of an evaluation and hands them, with tables and cases, to the report.

The glue between numbers and paper: which picture shows what, under which caption, and in which words for readers who
cannot see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config import Config
from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore
from pipeline.evaluation import content, plots
from pipeline.evaluation.feature_pages import FeatureResults, feature_section
from pipeline.evaluation.predictions import Item
from pipeline.evaluation.report import (
    METRIC_NAMES,
    Picture,
    ReportContent,
    Section,
    Table,
    cautions,
    init_name,
    network_words,
    number,
    percent,
    run_words,
    stamp_words,
    verdict,
    write_report,
)
from pipeline.evaluation.reproduction import commands
from pipeline.evaluation.summary import METRICS
from pipeline.tracking_context import shown_params, slug

__all__ = ["Results", "write_pages"]

@dataclass(frozen=True)
class Results:
    """What was computed, for those who show it."""

    items: Sequence[Item]
    tables: Mapping[str, pd.DataFrame]
    """Predictions by level: frame, video, patient."""
    metrics: Mapping[str, Any]
    warnings: Sequence[str]
    features: FeatureResults
    sections: Sequence[Section] = ()
    """What the parts of the evaluation want shown, in order."""
    stages: Sequence[Mapping[str, Any]] = ()
    """Rows of `pipeline.tracking.link_skipped`."""


def write_pages(config: Config, splits: Splits, store: FrameStore | None, results: Results, output: Path) -> None:
    """Write `output`/pictures/*.png and `output`/report.html."""
    items, tables, metrics, warnings = results.items, results.tables, results.metrics, results.warnings
    drawing = _Drawing(config, splits, metrics, output / "pictures")
    first, unit = metrics["headline_init"], splits.unit
    frames = tables["frame"]
    judged = content.judged_videos(tables["video"][tables["video"]["init"] == first], splits.classes)
    wrong, right = content.choose_cases(judged, frames[frames["init"] == first], splits.classes, store)
    patients = tables["patient"][tables["patient"]["init"] == first]
    drawing.gallery(wrong, right)
    features = feature_section(results.features, splits, store, output / "pictures", metrics)
    page = ReportContent(
        title=config.evaluate.title,
        metrics=metrics,
        classes=splits.classes,
        confidence=config.evaluate.confidence,
        verdict=verdict(metrics.get("difference", {}).get("video"), config.evaluate.confidence),
        cautions=cautions(config, metrics, warnings),
        stamps=stamp_words(metrics["stamp"]),
        pictures={
            "comparison": [drawing.comparison()],
            "confusion": drawing.confusion(),
            "folds": [drawing.folds()],
            "pretraining": drawing.pretraining(items),
            "finetuning": drawing.finetuning(items),
            "maps": features.maps if features else [],
        },
        tables={
            "comparison": content.comparison_table(metrics, drawing.inits, unit),
            "classes": [
                *content.phase_tables(metrics, drawing.inits, splits.classes), *content.class_tables(metrics, drawing.inits, splits.classes),
            ],
            "folds": content.fold_tables(metrics, drawing.inits, splits, unit),
            "patients": [content.patient_table(patients, judged, splits.classes, unit)],
            "data": content.data_tables(splits, store, unit, items),
            "training": [content.training_table(items, unit)],
            "features": features.tables if features else [],
            "stages": _stage_table(results.stages),
        },
        wrong=wrong,
        right=right,
        wrong_total=int((~judged["correct"]).sum()),
        wrong_mean=float((1 - judged["right"] / judged["networks"]).sum()),
        parameters=sorted(shown_params(config).items()),
        commands=commands(),
        seeds=_seeds(config),
        warnings=warnings,
        features=features,
        sections=results.sections,
    )
    write_report(output / "report.html", page)


def _seeds(config: Config) -> str:
    seeds = {"split": config.split.seed, "pretraining": config.pretrain.seed, "fine-tuning": ", ".join(map(str, config.finetune.seeds))}
    listed = "; ".join(f"{name} {value}" for name, value in (seeds | {"bootstrap and permutations": config.evaluate.seed}).items())
    return f"Seeds: {listed}. On the same kind of machine equal seeds give equal numbers; on another, training may differ in the last digits and from there on."


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not stages:
        return []
    rows = [
        [
            f"{row['stage']}{' ' + str(row['item']) if row.get('item') else ''}",
            row.get("status") or "–",
            "earlier run" if row.get("linked") else "this run",
            row.get("fingerprint") or "–",
            number(row.get("seconds"), 0),
            (row.get("run_id") or "–")[:8],
        ]
        for row in stages
    ]
    columns = ["Stage", "Status", "Computed in", "Fingerprint", "Seconds", "MLflow run"]
    return [Table("Stages behind these numbers", columns, rows, ["Seconds"])]


class _Drawing:
    """Pictures of one evaluation; every method writes a PNG and returns it with caption and alternative text."""

    def __init__(self, config: Config, splits: Splits, metrics: Mapping[str, Any], folder: Path) -> None:
        self.config, self.splits, self.metrics, self.folder = config, splits, metrics, folder
        self.stamp = metrics["stamp"]
        self.confidence = config.evaluate.confidence
        first = metrics["headline_init"]
        self.inits = [first, *(name for name in ("pretrained", "random") if name in metrics and name != first)]
        self._names = {init: self._name(init) for init in self.inits}

    def _name(self, init: str) -> str:
        return init_name(self.metrics, init)

    def comparison(self) -> Picture:
        """Dots with intervals of all initialisations at video level, and the majority class."""
        rows = []
        for name in METRICS:
            for init in self.inits:
                values = self.metrics[init]["video"]
                rows.append({"init": init, "metric": name, **_bounds(values, name)})
            majority = self.metrics["majority"]["video"].get(name)
            rows.append({"init": "majority", "metric": name, **_bounds({name: majority}, name)})
        path = self.folder / "comparison.png"
        plots.draw_comparison(
            path, pd.DataFrame(rows), METRIC_NAMES, self.metrics["chance"], self.confidence, self.stamp, self._names
        )
        spoken = "; ".join(f"{self._name(init)}: {number(self.metrics[init]['video']['balanced_accuracy'])}" for init in self.inits)
        first = self.metrics[self.inits[0]]["video"]
        lines = f"lines: {percent(self.confidence)} intervals over {self.metrics['unit']}s."
        if not any(np.isfinite(row["low"]) for row in rows):
            lines = f"no intervals: {first['undefined'].get('balanced_accuracy interval', 'not defined')}."
        return Picture(
            path,
            f"Four metrics per video. Balanced accuracy {spoken}.",
            f"Dots: value; {lines} Majority: always answering the "
            "most frequent class of the training videos; it can fall below guessing, because a class that is frequent "
            "in training is rarer in the test part.",
        )

    def confusion(self) -> list[Picture]:
        """One matrix an initialisation, counts of videos and row percent."""
        pictures = []
        for init in self.inits:
            values = self.metrics[init]["video"]
            path = self.folder / f"confusion_{init}.png"
            plots.draw_confusion(
                path,
                np.asarray(values["confusion"]),
                self.splits.classes,
                f"Videos, {self._name(init)}",
                self.metrics[init]["stamp"],
            )
            spoken = "; ".join(
                f"{name}: {number(values['per_class'][name]['recall'])} recognised" for name in self.splits.classes
            )
            mean = f" (mean of {runs})" if (runs := run_words(self.metrics)) else ""
            pictures.append(
                Picture(
                    path,
                    f"Confusion matrix of the {network_words(self.metrics, init)}. {spoken}.",
                    f"{init_name(self.metrics, init, capital=True)}: number of videos{mean}, and percent of the true class.",
                )
            )
        return pictures

    def folds(self) -> Picture:
        """Balanced accuracy of every fold."""
        name = "balanced_accuracy"
        rows = [
            {"init": init, "fold": int(fold), **_bounds(values, name)}
            for init in self.inits
            for fold, values in self.metrics[init]["folds"].items()
        ]
        pooled = [{"init": init, **_bounds(self.metrics[init]["video"], name)} for init in self.inits]
        path = self.folder / "folds.png"
        plots.draw_folds(
            path, pd.DataFrame(rows), pd.DataFrame(pooled), name, self.metrics["chance"], self.confidence, self.stamp, self._names
        )
        spoken = "; ".join(f"{self._name(row['init'])} fold {row['fold']}: {number(row['value'])}" for row in rows)
        return Picture(
            path,
            f"Balanced accuracy per fold. {spoken}.",
            self._fold_caption(),
        )

    def _fold_caption(self) -> str:
        """What the lines are, and why some or all folds have none."""
        name, unit = "balanced_accuracy", self.metrics["unit"]
        folds = [values for init in self.inits for values in self.metrics[init]["folds"].values()]
        lacking = [values for values in folds if values[f"{name}_low"] is None]
        reasons = "; ".join(dict.fromkeys(values["undefined"].get(f"{name} interval", "not defined") for values in lacking))
        if len(lacking) == len(folds):
            pooled = any(self.metrics[init]["video"][f"{name}_low"] is not None for init in self.inits)
            line = f", with intervals over {unit}s" if pooled else ""
            return f"Dots: value of a fold. No fold has an interval: {reasons}. Right: all folds together{line}."
        why = f" No interval: {reasons}." if lacking else ""
        return f"Dots: value of a fold; lines: intervals over the fold's {unit}s, wide because they are few; right: all folds together.{why}"

    def gallery(self, wrong: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> None:
        """gallery_wrong.png and gallery_right.png, for viewers without the report."""
        for name, cases in (("wrong", wrong), ("right", right)):
            shown = [case for case in cases if case["images"]][:6]
            if shown:
                plots.draw_gallery(self.folder / f"gallery_{name}.png", shown, f"Videos judged {name}ly", self.stamp)

    def pretraining(self, items: Sequence[Item]) -> list[Picture]:
        """Curves of the encoders of these folds, one line an encoder."""
        encoders = items[0].folder.parent.parent / "encoders"
        names = [f"fold{fold}" for fold in sorted({item.card.fold for item in items})]
        paths = {name: encoders / name / "curves.csv" for name in names}
        return self._curves("pretraining", {name: path for name, path in paths.items() if path.is_file()})

    def finetuning(self, items: Sequence[Item]) -> list[Picture]:
        """Curves of the fine-tuned models, coloured by initialisation."""
        paths = {item.name: item.folder / "curves.csv" for item in items}
        return self._curves("finetuning", paths, {item.name: item.card.init for item in items})

    def _curves(self, stage: str, paths: Mapping[str, Path], groups: Mapping[str, str] | None = None) -> list[Picture]:
        curves = {name: table for name, path in paths.items() if (table := content.read_curves(path)) is not None}
        pictures = []
        for column in content.curve_columns(curves):
            title = content.CURVE_NAMES.get(column, plots.readable(column).capitalize())
            path = self.folder / f"{stage}_{slug(column)}.png"
            chance = "chance_loss" if column == "loss" else None
            plots.draw_curve(path, curves, column, title, groups, chance, self.stamp, self._names)
            ends = [table[column].dropna() for table in curves.values() if column in table.columns]
            alt = (
                f"{title} during {stage}, {len(ends)} runs, from about {ends[0].iloc[0]:.3g} to {ends[0].iloc[-1]:.3g}."
            )
            pictures.append(Picture(path, alt, ""))
        return pictures


def _bounds(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """value, low and high as numbers; NaN for what is undefined."""
    found = {"value": values.get(name), "low": values.get(f"{name}_low"), "high": values.get(f"{name}_high")}
    return {key: float("nan") if value is None else float(value) for key, value in found.items()}
