"""Several experiments on the same patients: one row each, and paired differences to the first with corrected p values.

    sonoscope compare EXPERIMENT EXPERIMENT ...      (names of `dvc exp show`, git revisions, or folders)

Intervals of the differences resample patients; p values come from a patient-level permutation test, corrected by Holm.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pipeline.config import pretraining_name
from pipeline.errors import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.statistics import bootstrap_intervals, holm, paired_bootstrap, permutation_test

__all__ = ["Experiment", "compare", "read_experiment"]

METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auroc")
RESULTS = "reports/evaluate"


@dataclass(frozen=True)
class Experiment:
    """Out-of-fold predictions per video of one experiment."""

    name: str
    method: str
    stamp: str
    table: pd.DataFrame
    """predictions_video.csv, rows of one initialisation."""

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the probability columns."""
        return [column.removeprefix("p_") for column in self.table.columns if column.startswith("p_")]


def _read(name: str, file: str) -> str:
    """A file of a project folder or of an experiment known to DVC; `file` is relative to the project."""
    folder = Path(name)
    if folder.is_dir():
        path = folder / file
        if not path.is_file():
            raise DataError(f"compare: {path} does not exist. Run the evaluate stage there first (dvc repro).")
        return path.read_text(encoding="utf-8")
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        return dvc.api.read(file, rev=name, encoding="utf-8")
    except (DvcException, FileNotFoundError, OSError) as error:
        raise DataError(
            f"compare: '{name}' is neither a folder nor an experiment whose {file} is in the cache "
            f"({type(error).__name__}). `dvc exp show` lists the experiments."
        ) from None


def read_experiment(name: str, initialisation: str = "pretrained") -> Experiment:
    """Predictions of one experiment.

    Raises:
        DataError: unknown experiment, or it has no rows of this initialisation.
    """
    table = pd.read_csv(io.StringIO(_read(name, f"{RESULTS}/predictions_video.csv")), keep_default_na=False, dtype={"video": str, "patient": str, "label": str})
    rows = table[table["init"] == initialisation]
    if rows.empty:
        raise DataError(f"compare: '{name}' has no initialisation '{initialisation}'; found: {', '.join(sorted(set(table['init'])))}")
    stamp = json.loads(_read(name, f"{RESULTS}/metrics.json")).get("stamp") or "none"
    pretrain = yaml.safe_load(_read(name, "params.yaml"))["pretrain"]
    method = pretraining_name(str(pretrain["method"]), str(pretrain.get("init", "random")))
    return Experiment(name, method, "" if stamp == "none" else stamp, rows.reset_index(drop=True))


def _same_folds(experiments: Sequence[Experiment]) -> None:
    """Refuse experiments that were not judged on the same videos in the same folds."""
    keys = ["video", "fold", "seed", "patient", "label"]
    first = experiments[0]
    wanted = set(map(tuple, first.table[keys].astype(str).to_numpy()))
    for other in experiments[1:]:
        if other.classes != first.classes:
            raise DataError(f"compare: '{other.name}' tells apart {other.classes}, '{first.name}' {first.classes}")
        found = set(map(tuple, other.table[keys].astype(str).to_numpy()))
        if found != wanted:
            example = sorted(found ^ wanted)[0]
            raise DataError(
                f"compare: '{other.name}' and '{first.name}' were not judged on the same folds: {len(found ^ wanted)} rows differ, for "
                f"example video {example[0]} (fold {example[1]}, seed {example[2]}). Run both with the same data and split parameters."
            )


def compare(names: Sequence[str], *, replicates: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Metrics of every experiment and its paired difference to the first one.

    Returns:
        {"rows": one dict an experiment (metrics with intervals, difference in balanced accuracy with interval, p, p after
        Holm), "text": a Markdown table}.

    Raises:
        DataError: fewer than two experiments, or they do not share folds.
    """
    if len(names) < 2:
        raise DataError("compare: give at least two experiments; the first is the one the others are compared with")
    experiments = [read_experiment(name) for name in names]
    _same_folds(experiments)
    scores = [Scores.from_table(experiment.table, experiment.classes) for experiment in experiments]
    rows: list[dict[str, Any]] = []
    for experiment, score in zip(experiments, scores, strict=True):
        intervals = bootstrap_intervals(score, METRICS, replicates=replicates, seed=seed)
        rows.append({"name": experiment.name, "method": experiment.method, "stamp": experiment.stamp, "metrics": intervals})
    tests = [permutation_test(score, scores[0], "balanced_accuracy", seed=seed) for score in scores[1:]]
    corrected = holm([1.0 if test.p_value is None else test.p_value for test in tests])
    for row, score, test, p in zip(rows[1:], scores[1:], tests, corrected, strict=True):
        row["difference"] = paired_bootstrap(score, scores[0], "balanced_accuracy", replicates=replicates, seed=seed)
        row["p"], row["p_holm"] = test.p_value, p
    return {"rows": rows, "text": _markdown(rows)}


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        # + 0.0 turns -0.0 into 0.0
        shown, *ends = (None if x is None else f"{round(x, 2) + 0.0:{sign}.2f}" for x in (value, low, high))
        return str(shown) if low is None else f"{shown} ({ends[0]} to {ends[1]})"

    names = [metric.replace("_", " ") for metric in METRICS]
    head = ["experiment", "method", *names, f"balanced accuracy minus {rows[0]['name']}", "p", "p (Holm)"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        cells = [row["name"] + (f" [{row['stamp']}]" if row["stamp"] else ""), row["method"]]
        intervals = [row["metrics"][metric] for metric in METRICS]
        cells += [cell(i.value, i.low, i.high) for i in intervals]
        gap = row.get("difference")
        tail = [cell(gap.difference, gap.low, gap.high, "+"), f"{row['p']:.3f}", f"{row['p_holm']:.3f}"] if gap else ["", "", ""]
        lines.append(" | ".join([*cells, *tail]))
    return "\n".join(f"| {line} |" for line in lines)
