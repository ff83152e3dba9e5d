"""Tests over folds against closed forms, published numbers and a numerical posterior."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.errors import DataError
from pipeline.evaluation.fold_tests import bayesian_correlated_t, corrected_resampled_t

VALUES = [0.02, 0.05, -0.01, 0.03, 0.04]


def test_corrected_t__closed_form_and_plain_t_in_the_limit() -> None:
    values = VALUES
    result = corrected_resampled_t(values, 1 / 4)
    error = np.std(values, ddof=1) * math.sqrt(1 / 5 + 1 / 4)
    assert result.t == pytest.approx(np.mean(values) / error)
    assert result.p_value == pytest.approx(2 * stats.t.sf(result.t, 4))
    assert (result.low + result.high) / 2 == pytest.approx(np.mean(values))
    plain = stats.ttest_1samp(values, 0)
    assert corrected_resampled_t(values, 1e-15).p_value == pytest.approx(plain.pvalue)


def test_corrected_t__published_example() -> None:
    # 10 folds, mean 2.0 points, standard deviation of the differences sqrt(3.4^2 + 4.7^2): t = 0.75.
    spread = math.hypot(3.4, 4.7)
    values = np.array([-1.0, 1.0] * 5)
    values = 2.0 + values / values.std(ddof=1) * spread
    assert corrected_resampled_t(values, 1 / 9).t == pytest.approx(0.75, abs=0.005)


def test_corrected_t__degenerate_and_wrong_input() -> None:
    constant = corrected_resampled_t([0.1, 0.1, 0.1], 0.5)
    assert constant.t is None and constant.p_value is None and "no variance" in constant.reason
    assert constant.mean == pytest.approx(0.1) and constant.low is None and constant.high is None
    with pytest.raises(DataError, match="at least 2"):
        corrected_resampled_t([0.1], 0.5)
    with pytest.raises(DataError, match="finite"):
        corrected_resampled_t([0.1, float("nan")], 0.5)


def test_corrected_t__repeats_of_the_same_folds_bring_no_patients() -> None:
    # Repeating every difference r times leaves only the part of the overlap, n_test/n_train, however large r is.
    for repeats in (1, 4, 400):
        result = corrected_resampled_t(VALUES * repeats, 1 / 4)
        spread = np.std(VALUES * repeats, ddof=1)
        assert result.standard_error == pytest.approx(spread * math.sqrt(1 / (5 * repeats) + 1 / 4))
        assert result.degrees == 5 * repeats - 1
    assert result.standard_error > 0.5 * np.std(VALUES)
    assert "no variance" in corrected_resampled_t([0.1] * 6, 1 / 4).reason


def test_bayesian__is_the_posterior_of_correlated_normal_differences() -> None:
    # Numerically: flat prior on the mean, 1/sigma on the deviation, correlation n_test / (n_test + n_train) between folds.
    values, rope, correlation = np.array(VALUES), 0.015, 1 / 5
    means, deviations = np.linspace(-0.6, 0.6, 4001), np.exp(np.linspace(np.log(1e-3), np.log(3), 400))
    inverse = np.linalg.inv((1 - correlation) * np.eye(5) + correlation)
    gap = values[None] - means[:, None]
    form = np.einsum("mi,ij,mj->m", gap, inverse, gap)
    density = (deviations[None] ** -5 * np.exp(-form[:, None] / (2 * deviations[None] ** 2))).sum(1)
    density /= density.sum()
    answer = bayesian_correlated_t(VALUES, 1 / 4, rope=rope)
    wanted = [density[part].sum() for part in (means < -rope, np.abs(means) <= rope, means > rope)]
    assert [answer.worse, answer.equivalent, answer.better] == pytest.approx(wanted, abs=0.01)
    assert answer.worse + answer.equivalent + answer.better == pytest.approx(1)


def test_bayesian__agrees_with_the_test_and_turns_over() -> None:
    test = corrected_resampled_t(VALUES, 1 / 4)
    there = bayesian_correlated_t(VALUES, 1 / 4, rope=0.0)
    assert there.worse == pytest.approx(test.p_value / 2) and there.equivalent == 0.0
    back = bayesian_correlated_t([-value for value in VALUES], 1 / 4, rope=0.01)
    there = bayesian_correlated_t(VALUES, 1 / 4, rope=0.01)
    assert (there.worse, there.equivalent, there.better) == pytest.approx((back.better, back.equivalent, back.worse))
    assert bayesian_correlated_t(VALUES, 1 / 4, rope=0.5).equivalent > 0.99


def test_bayesian__degenerate_and_wrong_input() -> None:
    answer = bayesian_correlated_t([0.1, 0.1, 0.1], 0.5)
    assert answer.worse is None and answer.better is None and "no variance" in answer.reason
    with pytest.raises(DataError, match="must be >= 0"):
        bayesian_correlated_t(VALUES, 1 / 4, rope=-0.1)
    with pytest.raises(DataError, match="at least 2"):
        bayesian_correlated_t([0.1], 1 / 4)
