"""Small seeded simulations: intervals hold the truth and tests raise false alarms as often as they say.

Bounds are those a right method leaves once in some thousand seeds; that of taking clips for patients is far outside.
"""

from __future__ import annotations

import numpy as np
from scipy import stats
from simulate_statistics import coverage, false_alarms, fold_false_alarms, share, subgroup_false_alarms, table


def bounds(rate: float, trials: int) -> tuple[float, float]:
    """Where a share with this expectation lies in all but 2 of 1000 simulations."""
    low, high = stats.binom.interval(0.998, trials, rate)
    return low / trials, high / trials


def test_intervals__hold_the_truth_as_often_as_they_say() -> None:
    trials = 150
    held, length = coverage(24, 1.5, trials, replicates=200, seed=3)
    found = {name: share(hits)[0] for name, hits in held.items()}
    low, _ = bounds(0.93, trials)
    for name in ("balanced accuracy: patients, linearised", "macro F1: patients, linearised", "AUROC of class c: patients, DeLong"):
        assert found[name] >= low, name
        assert np.nanmean(length[name]) < 0.45, "not by being useless"
    assert found["balanced accuracy: patients, expanded percentiles"] >= low
    assert found["balanced accuracy: patients, plain percentiles"] < found["balanced accuracy: patients, expanded percentiles"]
    naive = found["balanced accuracy: clips, plain percentiles"]
    assert naive < bounds(0.95, trials)[0], "clips of one patient must matter here"
    assert found["AUROC of class c: clips, DeLong"] < found["AUROC of class c: patients, DeLong"]


def test_tests__raise_false_alarms_as_often_as_they_say() -> None:
    trials = 150
    found = {name: share(hits)[0] for name, hits in false_alarms(24, 1.5, trials, replicates=200, seed=5).items()}
    _, high = bounds(0.05, trials)
    for name, rate in found.items():
        if "patients" in name or "interval" in name:
            assert rate <= high, name
    assert found["AUROC: DeLong, clips"] > found["AUROC: DeLong, patients"]


def test_subgroups__differ_from_the_rest_by_chance_as_often_as_they_say() -> None:
    trials = 300
    found = {name: share(hits)[0] for name, hits in subgroup_false_alarms(30, 1.5, trials, replicates=300, seed=2).items()}
    _, high = bounds(0.05, trials)
    assert found["0 outside the interval"] <= high and found["permutation, patients"] <= high
    assert found["0 outside the interval"] < 0.7 * found["0 outside plain percentiles"]


def test_fold_tests__only_the_corrected_t_survives_overlapping_training_sets() -> None:
    trials = 150
    found = {name: share(hits)[0] for name, hits in fold_false_alarms(40, trials, seed=1).items()}
    _, high = bounds(0.06, trials)
    assert found["5 folds x 5: corrected t"] <= high and found["5 folds: corrected t"] <= high
    assert found["5 folds x 5: plain t"] > 0.25


def test_share__counts_studies_without_an_answer() -> None:
    mean, error, without = share([True, False, True, float("nan")])
    assert (mean, without) == (2 / 3, 1) and 0.25 < error < 0.35
    assert share([False] * 10)[1] > 0, "no alarm in ten studies is no proof"


def test_table__a_row_a_method_and_a_column_a_number_of_patients() -> None:
    hits, lengths = {"way": [True] * 19 + [False]}, {"way": [0.25] * 20}
    lines = table("interval", {15: hits, 30: {"way": [1.0, np.nan]}}, {15: lengths, 30: {"way": [0.5, np.nan]}}).splitlines()
    assert lines[0] == "| interval | 15 patients | 30 patients |"
    assert lines[2] == "| way | 95.0 ± 5.0, 0.25 long | 100.0 ± 100.0, 0.50 long, none in 50 % |"
