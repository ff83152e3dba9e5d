"""McNemar's test: by hand, against the binomial, and clustered against exchanging whole patients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from simulate_statistics import models, units_apart

from pipeline.errors import DataError
from pipeline.evaluation.decision_tests import mcnemar
from pipeline.evaluation.metrics import Scores


def decided(right: list[int], patients: list[str] | None = None) -> Scores:
    """Units of class a, called rightly where `right` is 1."""
    rows = np.where(np.array(right)[:, None] == 1, [0.9, 0.1], [0.1, 0.9])
    names = [f"P{index:02d}" for index in range(len(right))] if patients is None else patients
    return Scores(np.zeros(len(right), int), rows, np.array(names), ("a", "b"))


def test_mcnemar__mid_p_by_hand() -> None:
    # 6 to 1: twice P(0 or 1 of 7) is 16/128; the observed table P(1 of 7) = 7/128 counts half on both sides.
    result = mcnemar(decided([1] * 6 + [0] + [1] * 3), decided([0] * 6 + [1] + [1] * 3))
    assert (result.first_only, result.second_only, result.units, result.patients, result.kind) == (6, 1, 10, 10, "mid-p")
    assert result.difference == pytest.approx(0.5) and result.p_value == pytest.approx(16 / 128 - 7 / 128)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 3), (9, 2), (30, 14)])
def test_mcnemar__mid_p_lies_below_the_exact_test_and_near_the_normal_one(wins: int, losses: int) -> None:
    first, second = decided([1] * wins + [0] * losses + [1]), decided([0] * wins + [1] * losses + [1])
    p_value = mcnemar(first, second).p_value
    assert p_value == pytest.approx(mcnemar(second, first).p_value)
    assert p_value <= (stats.binomtest(wins, wins + losses).pvalue + 1e-12 if wins + losses else 1)
    if wins == losses:
        assert p_value == pytest.approx(1)
    if wins + losses > 40:
        assert p_value == pytest.approx(stats.chi2.sf((wins - losses) ** 2 / (wins + losses), 1), abs=0.005)


def test_mcnemar__several_units_a_patient_by_hand() -> None:
    # Leans of the patients: A +2, B +1, C -1, D 0, E +1; sum 3, sum of squares 7.
    names = list("AABCDDEE")
    result = mcnemar(decided([1, 1, 1, 0, 1, 0, 1, 1], names), decided([0, 0, 0, 1, 1, 0, 0, 1], names))
    z = math.sqrt(4 / 5) * 3 / math.sqrt(7)
    assert result.kind == "clustered" and (result.first_only, result.second_only, result.patients) == (4, 1, 5)
    assert result.p_value == pytest.approx(2 * stats.t.sf(z, 4))


def test_mcnemar__clustered_is_near_the_exchange_of_whole_patients_and_far_from_clips() -> None:
    first, second = models(np.random.default_rng(3), 14, [2.5, 1.2])
    lean = (first.probabilities.argmax(1) == first.labels).astype(int) - (second.probabilities.argmax(1) == second.labels)
    sums = np.array([lean[first.patients == name].sum() for name in sorted(set(first.patients))])
    signs = np.array(list(itertools.product([-1, 1], repeat=14)))
    exact = np.mean(np.abs(signs @ sums) >= abs(sums.sum()))
    clustered, apart = mcnemar(first, second), mcnemar(units_apart(first), units_apart(second))
    assert clustered.p_value == pytest.approx(exact, abs=0.03)
    assert apart.p_value < clustered.p_value and apart.kind == "mid-p" and clustered.difference == apart.difference


def test_mcnemar__degenerate_and_wrong_input() -> None:
    names = list("AABB")
    same = decided([1, 0, 1, 1], names)
    assert mcnemar(same, same).p_value == 1.0, "no unit on which they disagree"
    alone = mcnemar(decided([1, 1], ["A", "A"]), decided([0, 0], ["A", "A"]))
    assert alone.p_value is None and "1 patient" in alone.reason
    with pytest.raises(DataError, match="same units in the same order"):
        mcnemar(same, decided([1, 0, 1, 1], list("ABAB")))
    with pytest.raises(DataError, match="same units in the same order"):
        mcnemar(same, decided([1, 0, 1], list("AAB")))
    with pytest.raises(DataError, match="no rows"):
        mcnemar(decided([], []), decided([], []))
