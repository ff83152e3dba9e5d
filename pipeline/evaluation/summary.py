"""The numbers of details.json: out-of-fold metrics per initialisation, folds, seeds, baseline and paired difference.

Seeds and repeats of the cross-validation are scored one by one and averaged. Whatever makes a number better than it would
be for a new patient is a stamp that stands beside every number it touches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import pandas as pd

from pipeline.config import Config
from pipeline.data.splits import OPTIMISTIC, Splits
from pipeline.evaluation.metrics import Scores, aggregate, classification_metrics
from pipeline.evaluation.predictions import Item, probability_columns
from pipeline.evaluation.report import METRIC_NAMES, headline_sentence, init_names
from pipeline.evaluation.statistics import paired_bootstrap, patient_intervals, permutation_test

__all__ = ["METRICS", "TRANSDUCTIVE", "average", "summarise"]

TRANSDUCTIVE = "transductive pretraining"
LEVELS = ("frame", "video", "patient")
METRICS = tuple(METRIC_NAMES)
"""Metrics with intervals and differences; others (AUPRC, log loss, Brier score, calibration error) have none."""
BASELINE_METRICS = ("balanced_accuracy", "accuracy", "macro_f1")
"""Metrics of the hard decision; a constant answer has no ranking."""


def _stamps(config: Config, items: Sequence[Item], splits: Splits) -> list[str]:
    """What makes the numbers of these items better than for a new patient."""
    stamps: dict[str, None] = dict.fromkeys([splits.stamp] if splits.stamp else [])
    for item in items:
        card = item.card
        stamps |= dict.fromkeys(card.stamp.split(", ") if card.stamp else [])
        if card.selection == "best_on_test":
            stamps[OPTIMISTIC] = None
        seen = set(card.pretrain_groups) & {splits.groups[video] for video in splits.fold(card.fold).test}
        # Without a list of groups nothing proves that the main source was not pretrained on.
        unknown = card.pretrain_scope == "all" and not card.pretrain_groups and "main" in config.pretrain.sources
        if card.pretrain_scope == "all" and (seen or unknown):
            stamps[TRANSDUCTIVE] = None
    return list(stamps)


def summarise(
    config: Config, splits: Splits, items: Sequence[Item], tables: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    """All numbers of details.json from the tables of the three levels; see `evaluate`."""
    inits = list(dict.fromkeys(config.finetune.initialisations))
    first = "pretrained" if "pretrained" in inits else inits[0]
    stamps = {init: _stamps(config, [item for item in items if item.card.init == init], splits) for init in inits}
    # A fixed division tests a part of the labelled videos only.
    tested = {video for fold in splits.folds for video in fold.test}
    metrics: dict[str, Any] = {
        "schema": 1,
        "headline_init": first,
        "init_names": init_names(config),
        "group": splits.group,
        "unit": splits.unit,
        "stamp": ", ".join(dict.fromkeys(sum(stamps.values(), []))),
        "patients": len(splits.groups_of(tested)),
        "videos": len(tested),
        "frames": len(tables["frame"].drop_duplicates(["video", "frame"])),
        "folds": splits.folds_per_repeat,
        "repeats": splits.repeats,
        "seeds": len(set(config.finetune.seeds)),
        "chance": 1 / len(splits.classes),
        "aggregation": config.evaluate.aggregation,
        "bootstrap": config.evaluate.bootstrap,
        "confidence": config.evaluate.confidence,
    }
    for init in inits:
        own = {level: table[table["init"] == init] for level, table in tables.items()}
        metrics[init] = _one_initialisation(config, splits, own, ", ".join(stamps[init]))
    metrics["majority"] = _majority(config, splits, tables["frame"], inits[0])
    if {"pretrained", "random"} <= set(inits):
        metrics["difference"] = _differences(config, splits, tables, metrics["stamp"])
    headline = metrics[first]["video"]
    top = {f"balanced_accuracy{end}": headline[f"balanced_accuracy{end}"] for end in ("", "_low", "_high")}
    if "difference" in metrics:
        gain = metrics["difference"]["video"]
        top |= {f"pretraining_gain{end}": gain[f"balanced_accuracy{end}"] for end in ("", "_low", "_high", "_p")}
    sentence = headline_sentence(metrics, config.evaluate.confidence)
    return {"headline": sentence, **top, **metrics}


def _level(config: Config, table: pd.DataFrame, classes: Sequence[str], stamp: str) -> dict[str, Any]:
    """Metrics of one initialisation at one level: mean over seeds and repeats, spread over each, intervals over patients."""
    judged = Scores.by_run(table, classes)
    runs = {key: classification_metrics(scores) for key, scores in judged.items()}
    result = average(list(runs.values()))
    for place, word in enumerate(("seed", "repeat")):
        kinds = sorted({key[place] for key in runs})
        for name in METRICS if len(kinds) > 1 else ():
            means = [average([one[name] for key, one in runs.items() if key[place] == kind]) for kind in kinds]
            result[f"{name}_{word}_sd"] = stdev(means) if None not in means else None
    intervals = patient_intervals(list(judged.values()), METRICS, confidence=config.evaluate.confidence)
    for name in METRICS:
        low, high, reason = intervals[name].low, intervals[name].high, intervals[name].reason
        result[f"{name}_low"], result[f"{name}_high"] = low, high
        if reason:
            result["undefined"][f"{name} interval"] = reason
    return {**result, "stamp": stamp}


def average(values: Sequence[Any]) -> Any:
    """Mean of equally shaped results; None where one of them is undefined; text and class names of the first.

    Under `undefined` a reason that not all results have, such as a class that one seed never predicts, says how many have it.
    """
    first = values[0]
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for value in values for key in value)
        result = {key: average([value[key] for value in values if key in value]) for key in keys}
        if "undefined" in result:
            result["undefined"] = _reasons([value["undefined"] for value in values])
        return result
    if isinstance(first, list):
        return [average(list(column)) for column in zip(*values, strict=True)]
    if any(value is None for value in values):
        return None
    return first if isinstance(first, (str, bool)) or len(values) == 1 else mean(values)


def _reasons(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Why a number is undefined, by its name, with the number of runs where not all of them say so."""
    result = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        counts = Counter(run[key] for run in runs if key in run)
        parts = [reason if count == len(runs) else f"{reason} in {count} of {len(runs)} runs (seeds, repeats)" for reason, count in counts.items()]
        result[key] = "; ".join(parts)
    return result


def _one_initialisation(
    config: Config, splits: Splits, tables: Mapping[str, pd.DataFrame], stamp: str
) -> dict[str, Any]:
    """All levels, every fold at video level, and mean and standard deviation over folds."""
    result: dict[str, Any] = {level: _level(config, tables[level], splits.classes, stamp) for level in LEVELS}
    videos = tables["video"]
    folds = {str(fold): _level(config, part, splits.classes, stamp) for fold, part in videos.groupby("fold")}
    kept = tuple(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high"))
    result["folds"] = {
        fold: {key: values[key] for key in ("n", "patients", *kept, "undefined", "stamp")}
        for fold, values in folds.items()
    }
    spread: dict[str, Any] = {}
    for name in METRICS:
        values = [fold[name] for fold in result["folds"].values() if fold[name] is not None]
        spread[name] = mean(values) if values else None
        spread[f"{name}_sd"] = stdev(values) if len(values) > 1 else None
        spread[f"{name}_folds"] = len(values)
    return {"stamp": stamp, **result, "fold_mean": {**spread, "stamp": stamp}}


def _majority(config: Config, splits: Splits, frames: pd.DataFrame, init: str) -> dict[str, Any]:
    """What always answering the most frequent class of the fold's training videos would score."""
    seed = frames["seed"].min()
    table = frames[(frames["init"] == init) & (frames["seed"] == seed)].copy()
    for fold in splits.folds:
        counts = Counter(splits.labels[video] for video in fold.train)
        answer = max(splits.classes, key=lambda name: counts[name])
        for name, column in zip(splits.classes, probability_columns(splits.classes), strict=True):
            table.loc[table["fold"] == fold.fold, column] = float(name == answer)
    levels = {"frame": table, **{level: aggregate(table, splits.classes, level) for level in ("video", "patient")}}
    result: dict[str, Any] = {}
    for level, part in levels.items():
        values = average([classification_metrics(Scores.from_table(one, splits.classes)) for _, one in part.groupby("repeat")])
        result[level] = {name: values[name] for name in BASELINE_METRICS}
    return result


def _differences(config: Config, splits: Splits, tables: Mapping[str, pd.DataFrame], stamp: str) -> dict[str, Any]:
    """Pretrained minus random on the same patients: bootstrap interval, permutation p value, and the reason where one is missing."""
    settings = config.evaluate
    result: dict[str, Any] = {}
    for level in LEVELS:
        table = tables[level]
        first, second = (
            list(Scores.by_run(table[table["init"] == init], splits.classes).values()) for init in ("pretrained", "random")
        )
        # Ranking every frame anew in ten thousand exchanges takes minutes on large data and answers no question.
        names = BASELINE_METRICS if level == "frame" else METRICS
        values: dict[str, Any] = {"stamp": stamp}
        for name in names:
            drawn = paired_bootstrap(
                first, second, name, replicates=settings.bootstrap, confidence=settings.confidence, seed=settings.seed
            )
            tested = permutation_test(first, second, name, seed=settings.seed)
            values |= {
                name: drawn.difference,
                f"{name}_low": drawn.low,
                f"{name}_high": drawn.high,
                f"{name}_p": tested.p_value,
                f"{name}_reason": drawn.reason or tested.reason,
            }
        result[level] = values
    return result
