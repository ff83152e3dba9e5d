"""What MLflow is told of an evaluation: few numbers on the experiment's own run, its name and description, one child a fold.

Everything else stands on the run of the evaluate stage, so that tables and charts of experiments stay readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import Config
from pipeline.evaluation.report import METRIC_NAMES, number, signed
from pipeline.tracking import NullTracker, open_tracker

__all__ = ["description", "log_execution", "log_folds", "parent_metrics", "run_name"]

MOST_FOLDS = 100
"""Folds, those of all repeats together, that get a run of their own; each costs about a third of a second."""
DIGITS = 4
CHILD_METRICS = tuple(METRIC_NAMES)


def parent_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of the experiment's own run, rounded for MLflow's narrow columns; undefined ones are left out.

    MLflow's comparison starts with the first name of the alphabet, so `balanced_accuracy` comes before all others.
    """
    ends = ("", "_low", "_high")
    first = metrics[metrics["headline_init"]]
    flat: dict[str, float | None] = {f"balanced_accuracy{end}": metrics[f"balanced_accuracy{end}"] for end in ends}
    flat["balanced_accuracy_per_patient"] = first["patient"]["balanced_accuracy"]
    flat["balanced_accuracy_fold_sd"] = first["fold_mean"]["balanced_accuracy_sd"]
    flat |= {name: first["video"][name] for name in ("macro_auroc", "macro_f1")}
    flat |= {f"pretraining_gain{end}": metrics.get(f"pretraining_gain{end}") for end in (*ends, "_p")}
    flat |= {f"phases.{init}.f1": numbers["f1"] for init, numbers in metrics.get("phases", {}).items()}
    # Those of another initialisation stand on the run of the stage.
    others = {"pretrained", "random"} - {metrics["headline_init"]}
    flat |= {key: value for key, value in metrics.get("headline_parts", {}).items() if not others & set(key.split("."))}
    return {key: round(value, DIGITS) for key, value in flat.items() if value is not None}


def run_name(start: str, metrics: Mapping[str, Any]) -> str:
    """`0.72 (0.60–0.83) ucl temperature=0.2`, the result first because MLflow cuts names; a stamped one has an exclamation mark."""
    value, low, high = (metrics[f"balanced_accuracy{end}"] for end in ("", "_low", "_high"))
    span = f" ({number(low)}–{number(high)})" if low is not None and high is not None else ""
    return f"{number(value)}{span}{' !' if metrics['stamp'] else ''} {start}"


def description(metrics: Mapping[str, Any]) -> str:
    """Markdown for the page of the experiment's run: headline, link to the report, what pretraining brought, folds."""
    lines = [f"**{metrics['headline']}** ([report](report.html))", ""]
    if metrics.get("pretraining_gain") is not None:
        low, high = metrics.get("pretraining_gain_low"), metrics.get("pretraining_gain_high")
        span = f" ({signed(low)} to {signed(high)})" if low is not None and high is not None else ""
        lines += [f"Against the same network without pretraining: {signed(metrics['pretraining_gain'])}{span}.", ""]
    shown = [METRIC_NAMES[name] for name in CHILD_METRICS]
    lines += [f"| Fold | Videos | Patients | {' | '.join(shown)} |", f"|{'---|' * (3 + len(shown))}"]
    for fold, values in metrics[metrics["headline_init"]]["folds"].items():
        cells = [number(values[name]) for name in CHILD_METRICS]
        lines.append(f"| {fold} | {values['n']} | {values['patients']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def log_execution(tracker: NullTracker, metrics: Mapping[str, Any]) -> None:
    """Metrics, name and description of the experiment's own run."""
    tracker.log_parent_metrics(parent_metrics(metrics))
    tracker.set_parent_tags({"mlflow.runName": run_name(tracker.execution_name, metrics), "mlflow.note.content": description(metrics)})


def log_folds(config: Config, metrics: Mapping[str, Any]) -> None:
    """One child run a fold of every repeat, with the fold's metrics under the names the experiment's own run has; says so where there are too many."""
    folds = metrics[metrics["headline_init"]]["folds"]
    if len(folds) > MOST_FOLDS:
        print(f"evaluate: {len(folds)} folds get no runs of their own in MLflow, as more than {MOST_FOLDS} would bury the others; folds.csv has them")
        return
    others = [name for name in ("pretrained", "random") if name in metrics and name != metrics["headline_init"]]
    for fold, values in folds.items():
        # Folds are numbered through all repeats.
        repeat = f", repeat {int(fold) // metrics['folds']}" if metrics["repeats"] > 1 else ""
        with open_tracker(config, "evaluate", f"fold {fold}{repeat}") as child:
            found = {name: values[name] for name in CHILD_METRICS}
            found |= {f"balanced_accuracy{end}": values[f"balanced_accuracy{end}"] for end in ("_low", "_high")}
            found |= {f"{init}.balanced_accuracy": metrics[init]["folds"][fold]["balanced_accuracy"] for init in others}
            child.log_metrics({key: round(value, DIGITS) for key, value in found.items() if value is not None})
            child.set_tags({"stamp": values["stamp"] or "none"})
