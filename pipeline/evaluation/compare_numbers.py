"""Metrics of one row of a comparison (the mean over its seeds and repeats), and paired differences between rows.

A run is a seed of a repeat: one prediction for every unit. Runs of one patient are drawn, or exchanged, together: more
seeds steady a number, they bring no new patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pipeline.errors import DataError
from pipeline.evaluation.decision_tests import mcnemar
from pipeline.evaluation.fold_tests import corrected_resampled_t
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.roc_tests import delong_test
from pipeline.evaluation.statistics import METRICS, Interval, WeightedMetrics, paired_bootstrap, patient_intervals, permutation_test

__all__ = ["METRICS", "Difference", "Measured", "difference", "permutations"]

ELEMENTS = 60_000_000
"""Exchanges times rows of a permutation test of a ranking metric; beyond it there are fewer exchanges, so that it ends in seconds."""
LEAST = 1_000


@dataclass(frozen=True)
class Difference:
    """First minus second in one metric, on the same patients."""

    first: str
    second: str
    value: float | None
    low: float | None
    high: float | None
    p: float | None
    """Two-sided, of exchanging the predictions of whole patients."""
    exact: bool
    """Whether all exchanges were counted, and not a random part of them."""
    patients: int
    reason: str = ""
    p_holm: float | None = None
    folds: dict[str, Any] | None = None
    """`fold_tests.corrected_resampled_t` over the mean differences of each fold and repeat."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further tests by name: `McNemar`, `DeLong, <class>`."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Measured:
    """Predictions of one row."""

    def __init__(self, name: str, table: pd.DataFrame, classes: Sequence[str], trained: float = 1.0) -> None:
        """`table` as `compare_sources.Experiment.table`; `trained` as `compare_rules.Group.trained`."""
        self.trained = trained
        self.name, self.table, self.classes = name, table, tuple(classes)
        self.patients = sorted(set(table["patient"]))
        self.runs = Scores.by_run(table, classes)

    @property
    def scores(self) -> list[Scores]:
        """One set of predictions a run."""
        return list(self.runs.values())

    def intervals(self, confidence: float) -> dict[str, Interval]:
        """All metrics with intervals over patients."""
        return patient_intervals(self.scores, METRICS, confidence=confidence)

    def by_seed(self, metric: str) -> dict[str, float | None]:
        """The metric of each seed, a mean over its repeats."""
        values = pd.Series({key: _value(scores, metric) for key, scores in self.runs.items()})
        return {str(seed): _number(part.mean(skipna=False)) for seed, part in values.groupby(level=0)}

    def by_fold(self, metric: str) -> dict[tuple[int, int], float]:
        """The metric of each (repeat, fold), a mean over seeds; NaN where it is not defined."""
        return {
            key: float(np.mean([_value(Scores.from_table(one, self.classes), metric) for _, one in part.groupby("seed")]))
            for key, part in self.table.groupby(["repeat", "fold"])
        }


def _value(scores: Scores, metric: str) -> float:
    engine = WeightedMetrics(scores)
    return float(engine.values(np.ones((1, len(engine.patients))), [metric])[metric][0])


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def permutations(metric: str, units: int) -> int:
    """Random exchanges of a permutation test over so many rows: 10 000, fewer where ranking them would take minutes."""
    return 10_000 if metric != "macro_auroc" else int(np.clip(ELEMENTS // max(units, 1), LEAST, 10_000))


def difference(first: Measured, second: Measured, metric: str, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0) -> Difference:
    """First minus second, with an interval over patients and tests.

    Args:
        first, second: rows with the same units, labels, patients, folds and runs (`compare_rules.same_rules` has checked it).

    Raises:
        DataError: patients, classes or runs differ.
    """
    if first.patients != second.patients or first.classes != second.classes or list(first.runs) != list(second.runs):
        raise DataError(f"compare: '{first.name}' and '{second.name}' do not hold the same patients, classes and seeds")
    drawn = paired_bootstrap(first.scores, second.scores, metric, replicates=replicates, confidence=confidence, seed=seed)
    low, high, reason = drawn.low, drawn.high, drawn.reason
    if low is not None and high is not None and high - low < 1e-9:
        # No spread among the patients there are is no proof of certainty about others.
        low, high, reason = None, None, "all patients gave the same difference, so resampling them tells nothing"
    wanted = permutations(metric, 2 * len(first.table))
    tested = permutation_test(first.scores, second.scores, metric, permutations=wanted, seed=seed)
    exact = first.patients != [] and tested.replicates + tested.degenerate == 2 ** len(first.patients)
    return Difference(
        first.name, second.name, drawn.difference, low, high, tested.p_value, exact, drawn.patients, reason,
        folds=_fold_test(first, second, metric, confidence), others=_others(first, second, metric),
    )


def _fold_test(first: Measured, second: Measured, metric: str, confidence: float) -> dict[str, Any] | None:
    """Corrected resampled t over folds and repeats; None with a single fold."""
    left, right = first.by_fold(metric), second.by_fold(metric)
    gaps = [left[key] - right[key] for key in left if np.isfinite(left[key] - right[key])]
    if len({fold for _, fold in left}) < 2:
        return None
    if len(gaps) < 2:
        return {"count": len(gaps), "p_value": None, "reason": f"defined in only {len(gaps)} of {len(left)} folds"}
    # Units tested over units trained on, as all folds together are the data; the smaller training part is the cautious one.
    trained = min(first.trained, second.trained)
    sizes = first.table.groupby(["repeat", "fold"])["unit"].nunique()
    whole = sizes.groupby(level=0).sum()
    ratio = float(np.mean([size / (whole[repeat] - size) / trained for (repeat, _), size in sizes.items()]))
    tested = corrected_resampled_t(gaps, ratio, confidence=confidence).as_dict()
    return {"count": len(gaps), "of": len(left), "test_over_train": ratio, "trained": trained, **tested}


def _others(first: Measured, second: Measured, metric: str) -> dict[str, dict[str, Any]]:
    """McNemar beside accuracy, DeLong beside the area under the ROC curve; units of all runs, the patient as the cluster."""
    if metric == "accuracy":
        return {"McNemar": mcnemar(_pooled(first), _pooled(second)).as_dict()}
    if metric != "macro_auroc":
        return {}
    # With two classes both curves are mirror images of one another.
    positions = range(len(first.classes)) if len(first.classes) > 2 else (1,)
    tests = {position: delong_test(_pooled(first), _pooled(second), position) for position in positions}
    return {f"DeLong, {first.classes[position]}": test.as_dict() for position, test in tests.items()}


def _pooled(row: Measured) -> Scores:
    return Scores.from_table(row.table, row.classes)
