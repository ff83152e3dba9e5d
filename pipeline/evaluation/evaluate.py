"""From the predictions of all folds to metrics.json, details.json, tables, pictures and the report.

Refuses what cannot be trusted (`predictions`), computes the numbers (`summary`), and lets `pages` show them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config import Config
from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore
from pipeline.errors import DataError
from pipeline.evaluation.calibration_pages import calibration_part
from pipeline.evaluation.checklist import checklist_part
from pipeline.evaluation.choices import choices_part
from pipeline.evaluation.curve_pages import curves_part
from pipeline.evaluation.explanations import explanations_part
from pipeline.evaluation.feature_pages import feature_results
from pipeline.evaluation.metrics import aggregate
from pipeline.evaluation.pages import Results, write_pages
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.phases import phase_metrics
from pipeline.evaluation.predictions import check_items, item_name, probability_columns, read_items, test_rows
from pipeline.evaluation.records import log_execution
from pipeline.evaluation.shortcuts import shortcuts_part
from pipeline.evaluation.subgroups import subgroups_part
from pipeline.evaluation.summary import METRICS, average, summarise
from pipeline.files import atomic_write, write_json
from pipeline.tracking import NullTracker

__all__ = ["compact", "evaluate", "headline_metrics", "log_results", "stage_records"]

PARTS: tuple[Callable[[Context], Part | None], ...] = (
    curves_part,
    explanations_part,
    subgroups_part,
    calibration_part,
    shortcuts_part,
    choices_part,
    checklist_part,
)
"""The topics beside the main numbers, in the order of the report."""


def evaluate(
    config: Config,
    folders: Sequence[Path],
    splits: Splits,
    store: FrameStore | None,
    output: Path,
    stages: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Judge all fine-tuned models and write everything a reader needs into `output`.

    Args:
        config: `finetune` says which items there must be, `evaluate` how they are judged.
        folders: one folder an item, with predictions.csv and card.json; those not asked for in params.yaml are left out
            with a warning.
        splits: the split the models were trained with.
        store: frames for the gallery and the data table; None leaves both without pictures.
        output: folder of the results, e.g. reports/evaluate.
        stages: rows of `link_skipped`, shown in the report.

    Returns:
        The content of details.json, of which metrics.json is the part worth a column in `dvc exp show`.

    Raises:
        DataError, LeakageError: see `pipeline.evaluation.predictions.check_items`.
    """
    folders, warnings = _asked_for(config, splits, [Path(folder) for folder in folders])
    items = read_items(folders)
    check_items(items, splits, config.finetune.initialisations, config.finetune.seeds)
    rows = test_rows(items, splits)
    how = config.evaluate.aggregation
    tables = {
        "frame": rows,
        "video": aggregate(rows, splits.classes, "video", how, config.evaluate.top_k),
        "patient": aggregate(rows, splits.classes, "patient", how, config.evaluate.top_k),
    }
    metrics = summarise(config, splits, items, tables)
    whole = _recordings(store)
    features = feature_results(items, splits, initialisations(metrics), config.evaluate.neighbors, whole)
    metrics["features"] = {init: {**one, "stamp": metrics[init]["stamp"]} for init, one in features.numbers.items()}
    phases = _phases(config, rows, splits, store, whole)
    if phases:
        metrics["phases"] = {init: {**one, "stamp": metrics[init]["stamp"]} for init, one in phases.items()}
        warnings.append(
            "labels belong to frames: a video of these tables is a stretch of one label, and a patient is the whole video; the table of "
            "phases judges whole videos"
        )
    write_tables(output, metrics, splits.classes, tables)
    context = Context(config, splits, items, tables, metrics, store, output, initialisations(metrics), whole)
    parts: list[Part] = []
    metrics["cautions"] = []
    for compute in PARTS:
        part = compute(context)
        if part is not None:
            # At once, because the model card, which is the last, tells of the others.
            parts.append(part)
            metrics[part.key] = {**part.numbers, "stamp": metrics["stamp"]}
            metrics["cautions"] += part.cautions
    metrics["headline_parts"] = {name: value for part in parts for name, value in part.headline.items()}
    write_json(output / "metrics.json", compact(metrics, parts))
    write_json(output / "details.json", metrics)
    said = [*splits.warnings, *warnings, *(line for part in parts for line in part.warnings)]
    results = Results(items, tables, metrics, said, features, [part.section for part in parts if part.section], stages)
    write_pages(config, splits, store, results, output)
    return metrics


def _recordings(store: FrameStore | None) -> dict[str, str]:
    """Stretch (video id) to the path of the whole video it was cut from."""
    rows = store.manifest.rows if store is not None else []
    return {row.video: row.path.rpartition("#")[0] for row in rows if row.kind == "stretch"}


def _phases(
    config: Config, rows: pd.DataFrame, splits: Splits, store: FrameStore | None, whole: Mapping[str, str]
) -> dict[str, Any]:
    """Metrics of whole videos whose frames have labels of their own, by initialisation (means over seeds and repeats); {} without any."""
    frames = rows[rows["video"].isin(whole)]
    if store is None or frames.empty:
        return {}
    number = {name: place for place, name in enumerate(splits.classes)}
    judged = set(frames["video"])
    stored = sum(row.frames for row in store.manifest.rows if row.video in judged)
    result: dict[str, Any] = {}
    for init, part in frames.groupby("init"):
        result[str(init)] = average([
            phase_metrics(
                one["video"].map(whole).to_numpy(str), one["label"].map(number).to_numpy(np.int64),
                one[probability_columns(splits.classes)].to_numpy().argmax(1), list(splits.classes), config.evaluate.phase_convention,
            ) | {"frames_stored": stored}
            for _, one in part.groupby(["seed", "repeat"])
        ])
    return result


def _asked_for(config: Config, splits: Splits, folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Folders of the items params.yaml asks for; the others are results of other parameters that DVC left on disk."""
    wanted = {
        item_name(init, seed, fold.fold)
        for init in config.finetune.initialisations
        for seed in config.finetune.seeds
        for fold in splits.folds
    }
    others = sorted(folder.name for folder in folders if folder.name not in wanted)
    warnings = [
        f"{name} is not asked for by finetune.initialisations, finetune.seeds and split.folds, and was left out"
        for name in others
    ]
    start = {"imagenet": "ImageNet", "random": "random"}.get(config.pretrain.init, "given")
    if config.pretrain.method == "random":
        warnings.append(f"nothing was pretrained (pretrain.method: random): `pretrained` stands for the {start} weights as they are")
    elif config.pretrain.init != "random" and "random" in config.finetune.initialisations:
        warnings.append(
            f"pretraining started from {start} weights, the comparison network from random ones: the difference holds what "
            "those weights bring as well (an experiment with pretrain.method: random judges them alone)"
        )
    kept = [folder for folder in folders if folder.name in wanted]
    if not kept:
        raise DataError("no fine-tuned models that params.yaml asks for. Run `dvc repro finetune` first.")
    return kept, warnings


def initialisations(metrics: Mapping[str, Any]) -> list[str]:
    """The initialisations that were judged, the headline first."""
    first = metrics["headline_init"]
    return [first, *(name for name in ("pretrained", "random") if name in metrics and name != first)]


def compact(metrics: Mapping[str, Any], parts: Sequence[Part] = ()) -> dict[str, Any]:
    """The numbers worth a column in `dvc exp show`: every value here becomes one."""
    ends = ("", "_low", "_high")
    top = ("balanced_accuracy", "pretraining_gain")
    result: dict[str, Any] = {
        f"{name}{end}": metrics[f"{name}{end}"] for name in top for end in ends if name in metrics
    }
    if "pretraining_gain_p" in metrics:
        result["pretraining_gain_p"] = metrics["pretraining_gain_p"]
    result |= {"stamp": metrics["stamp"] or "none", "patients": metrics["patients"], "videos": metrics["videos"]}
    for init in initialisations(metrics):
        video, patient = metrics[init]["video"], metrics[init]["patient"]
        result[init] = {
            "video": {f"{name}{end}": video[f"{name}{end}"] for name in METRICS for end in ends},
            "patient": {f"balanced_accuracy{end}": patient[f"balanced_accuracy{end}"] for end in ends},
            "frame": {"balanced_accuracy": metrics[init]["frame"]["balanced_accuracy"]},
            "fold_sd": metrics[init]["fold_mean"]["balanced_accuracy_sd"],
            "stamp": metrics[init]["stamp"] or "none",
        }
    if "phases" in metrics:
        result["phases"] = {
            init: {name: one[name] for name in ("convention", "f1", "f1_sd", "accuracy")}
            | {"pooled_macro_f1": one["pooled"]["macro_f1"], "stamp": one["stamp"] or "none"}
            for init, one in metrics["phases"].items()
        }
    result["majority"] = {"accuracy": metrics["majority"]["video"]["accuracy"]}
    result["features"] = {init: _compact_features(numbers) for init, numbers in metrics["features"].items()}
    return result | {part.key: {**part.compact, "stamp": result["stamp"]} for part in parts if part.compact}


def _compact_features(numbers: Mapping[str, Any]) -> dict[str, Any]:
    names = ("neighbors", "precision", "precision_chance", "same_patient", "same_patient_chance", "silhouette_label", "silhouette_patient")
    per_class = {name: values["precision"] for name, values in numbers["per_class"].items()}
    return {name: numbers[name] for name in names} | {"class_precision": per_class, "stamp": numbers["stamp"] or "none"}


def headline_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for the table of experiments, e.g. `pretrained.video.balanced_accuracy`; undefined ones are left out."""
    flat: dict[str, float | None] = {
        key: metrics.get(key)
        for key in (
            "balanced_accuracy",
            "balanced_accuracy_low",
            "balanced_accuracy_high",
            "pretraining_gain",
            "pretraining_gain_low",
            "pretraining_gain_high",
            "pretraining_gain_p",
        )
    }
    for init in initialisations(metrics):
        for level in ("video", "patient"):
            for name in METRICS:
                flat[f"{init}.{level}.{name}"] = metrics[init][level][name]
    for init, numbers in metrics["features"].items():
        flat |= {f"{init}.features.{name}": numbers[name] for name in ("precision", "same_patient")}
    for init, numbers in metrics.get("phases", {}).items():
        flat |= {f"phases.{init}.f1": numbers["f1"], f"phases.{init}.pooled_macro_f1": numbers["pooled"]["macro_f1"]}
    flat |= metrics.get("headline_parts", {})
    return {key: value for key, value in flat.items() if value is not None}


def log_results(tracker: NullTracker, metrics: Mapping[str, Any], output: Path) -> None:
    """Headline on the stage's run and, shorter, on the parent, folds as steps, stamps as tags, report and pictures as artifacts."""
    headline = headline_metrics(metrics)
    tracker.log_metrics(headline)
    log_execution(tracker, metrics)
    for init in initialisations(metrics):
        for fold, values in metrics[init]["folds"].items():
            found = {f"fold.{init}.{name}": values[name] for name in METRICS if values[name] is not None}
            tracker.log_metrics(found, step=int(fold))
    tags = {"stamp": metrics["stamp"] or "none", "headline": metrics["headline"]}
    # What an absent phase counts moves the numbers by tens of points: the convention stands beside them.
    tags |= {"phases.convention": numbers["convention"] for numbers in metrics.get("phases", {}).values()}
    tracker.set_tags(tags)
    tracker.set_parent_tags(tags)
    tables = ("predictions.csv", "predictions_video.csv", "predictions_patient.csv")
    for name in ("metrics.json", "details.json", *tables, "pictures", "model_card.md", "checklist.md"):
        tracker.log_artifact(output / name)
    tracker.log_parent_artifact(output / "report.html")


def write_tables(
    output: Path, metrics: Mapping[str, Any], classes: Sequence[str], tables: Mapping[str, pd.DataFrame]
) -> None:
    """predictions*.csv for readers, and confusion*.csv and folds.csv for `dvc plots`."""
    inits = initialisations(metrics)
    columns = probability_columns(classes)
    for level, name in (
        ("frame", "predictions.csv"),
        ("video", "predictions_video.csv"),
        ("patient", "predictions_patient.csv"),
    ):
        table = tables[level].copy()
        table["predicted"] = [classes[index] for index in table[columns].to_numpy().argmax(axis=1)]
        table["stamp"] = table["init"].map({init: metrics[init]["stamp"] for init in inits})
        _write_csv(output / name, table)
    videos = tables["video"]
    for init in inits:
        own = videos[videos["init"] == init]
        predicted = [classes[index] for index in own[columns].to_numpy().argmax(axis=1)]
        name = "confusion.csv" if init == inits[0] else f"confusion_{init}.csv"
        _write_csv(output / name, pd.DataFrame({"actual": own["label"], "predicted": predicted, "stamp": metrics[init]["stamp"]}))
    folds = [
        {"init": init, "fold": int(fold), "repeat": int(fold) // metrics["folds"], **{key: values[key] for key in values if key.startswith(METRICS)},
         "stamp": metrics[init]["stamp"]}
        for init in inits
        for fold, values in metrics[init]["folds"].items()
    ]
    _write_csv(output / "folds.csv", pd.DataFrame(folds))


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    atomic_write(path, table.to_csv(index=False, lineterminator="\n"))


def stage_records(config: Config) -> set[str]:
    """Names, without `.json`, of the run records (reports/runs) that the present parameters call for."""
    extracts = {"extract", *(f"extract-{name}" for name in config.data.extra_sources)}
    pretrains = {f"pretrain-fold{fold}" for fold in config.split.folds}
    tuned = config.finetune
    finetunes = {
        f"finetune-{item_name(init, seed, fold)}"
        for init in tuned.initialisations for seed in tuned.seeds for fold in config.split.folds
    }
    return extracts | {"split"} | pretrains | finetunes
