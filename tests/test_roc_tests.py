"""DeLong over patients: by hand, against all pairs, and against the published example of clustered units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import logit
from simulate_statistics import models, units_apart

from pipeline.errors import DataError
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.roc_tests import auroc_influence, delong, delong_test
from pipeline.evaluation.weighted import clustered_variance, influence

# Obuchowski (1997), table 1: patient, stenosis, readings of two observers (complete rows). 36 patients with 1 or 2 arteries.
ARTERIES = """1 1 87 87,1 1 79 83,2 1 88 94,2 1 95 93,3 1 100 100,3 1 68 79,4 1 65 61,4 1 89 91,5 1 97 97,5 1 100 100,6 1 100 99,6 1 89 88,
7 1 77 77,8 1 94 89,8 0 45 44,9 1 89 92,9 0 -11 -17,10 1 95 91,10 0 30 14,11 1 95 95,11 0 10 -122,12 1 100 100,12 0 19 -3,13 1 75 75,
14 0 70 73,14 1 70 81,15 0 26 27,15 1 86 93,16 0 0 8,16 1 65 70,17 0 6 23,17 1 100 100,18 0 76 79,18 1 96 95,19 0 44 55,19 1 100 100,
20 0 73 67,20 1 97 94,21 1 85 86,22 0 58 60,22 1 100 99,23 0 -2 -2,23 1 100 100,24 0 -3 -14,24 0 0 -11,25 0 47 -3,25 0 -94 -90,
26 0 -16 17,26 0 75 85,27 0 5 -22,27 0 -1 -14,28 0 -6 -52,29 0 37 38,29 0 47 35,30 0 42 40,30 0 4 6,31 0 55 23,31 0 55 45,32 0 4 -87,
32 0 -13 -65,33 0 49 24,33 0 35 9,34 0 53 66,35 0 2 -15,36 0 -48 -78"""


def ranked(scores: list[float], positive: list[int], patients: list[str] | None = None) -> Scores:
    """Two classes, the second of which has these scores brought to 0..1."""
    values = np.asarray(scores, float)
    values = (values - values.min()) / max(np.ptp(values), 1)
    names = np.array([f"P{index:03d}" for index in range(len(values))] if patients is None else patients)
    return Scores(np.array(positive), np.stack([1 - values, values], axis=1), names, ("no", "yes"))


def arteries() -> tuple[Scores, Scores]:
    rows = np.array([line.split() for line in ARTERIES.replace("\n", "").split(",")], int)
    names = [f"P{patient:02d}" for patient in rows[:, 0]]
    first, second = (ranked(rows[:, column].tolist(), rows[:, 1].tolist(), names) for column in (2, 3))
    return first, second


def error(scores: Scores, position: int = 1) -> float:
    found = auroc_influence(scores, position)
    return math.sqrt(clustered_variance(found.parts, found.carriers)[0])


def test_delong__by_hand() -> None:
    # Positives 8, 6, 4 lie above 2, 2, 1 of the negatives 5, 3; these lie below 2 and 3 positives.
    scores = ranked([8, 6, 4, 5, 3], [1, 1, 1, 0, 0])
    interval = delong(scores, 1)
    area = (1 + 1 + 1 / 2) / 3
    first, second = np.var([1, 1, 0.5], ddof=1) / 3, np.var([2 / 3, 1], ddof=1) / 2
    degrees = (first + second) ** 2 / (first**2 / 2 + second**2)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(first + second) / (area * (1 - area))
    assert interval.value == pytest.approx(area)
    assert [logit(interval.low), logit(interval.high)] == pytest.approx([logit(area) - half, logit(area) + half])
    assert delong(scores, 0).value == pytest.approx(area), "the other class read from the other end"


@pytest.mark.parametrize("seed", range(4))
def test_delong__one_unit_a_patient_equals_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive = rng.permutation(np.arange(23) % 3 == 0)
    pair = [ranked((rng.integers(0, 9, 23) + 3 * positive).tolist(), positive.astype(int).tolist()) for _ in range(2)]  # with ties
    placed = []
    for scores in pair:
        values = scores.probabilities[:, 1]
        wins = np.sign(values[positive][:, None] - values[~positive][None]) / 2 + 0.5
        placed.append((wins.mean(), wins.mean(1), wins.mean(0)))
    areas, rows, columns = zip(*placed, strict=True)
    both = np.cov(rows) / len(rows[0]) + np.cov(columns) / len(columns[0])
    assert [delong(scores, 1).value for scores in pair] == pytest.approx(areas)
    assert [error(scores) for scores in pair] == pytest.approx(np.sqrt(np.diag(both)))
    found = auroc_influence(pair[0], 1) - auroc_influence(pair[1], 1)
    assert clustered_variance(found.parts, found.carriers)[0] == pytest.approx(both[0, 0] + both[1, 1] - 2 * both[0, 1])
    test = delong_test(*pair, 1)
    assert test.difference == pytest.approx(areas[0] - areas[1]) and test.low < test.difference < test.high


def test_delong__published_example_of_clustered_units() -> None:
    first, second = arteries()
    assert [delong(scores, 1).value for scores in (first, second)] == pytest.approx([0.9837, 0.9852], abs=5e-5)
    # S10/m + S01/n + 2 S11/(mn) with the components printed below the table.
    wanted = [
        0.0013151307 / 29 + 0.0022375873 / 36 + 2 * 0.0051785478 / (29 * 36),
        0.0009284122 / 29 + 0.0022598583 / 36 - 2 * 0.0005015760 / (29 * 36),
    ]
    assert [error(scores) ** 2 for scores in (first, second)] == pytest.approx(wanted, rel=1e-6)
    assert np.sqrt(wanted) == pytest.approx([0.0108, 0.0097], abs=5e-5)
    covariance = 0.0008484357 / 29 + 0.0019241250 / 36 + (0.0028648340 - 0.0015136931) / (29 * 36)
    found = auroc_influence(second, 1) - auroc_influence(first, 1)
    variance, _ = clustered_variance(found.parts, found.carriers)
    assert variance == pytest.approx(sum(wanted) - 2 * covariance, rel=1e-5)
    # Published with normal quantiles: 0.0014 (-0.0115 to 0.0143), p = 0.8271. Student's make them a little wider.
    test = delong_test(second, first, 1)
    assert (test.difference, math.sqrt(variance)) == pytest.approx((0.0014, 0.0066), abs=5e-5)
    assert 2 * stats.norm.sf(test.difference / math.sqrt(variance)) == pytest.approx(0.8271, abs=5e-5)
    assert test.low < -0.0115 and test.high > 0.0143 and 0.8271 < test.p_value < 0.84


def test_delong__clips_taken_for_patients_give_another_error() -> None:
    first, _ = arteries()
    assert error(units_apart(first)) != pytest.approx(error(first), rel=0.02)
    (scores,) = models(np.random.default_rng(0), 60, [1.5])
    assert error(units_apart(scores), 2) < 0.85 * error(scores, 2)
    twice = Scores(*(np.concatenate([part, part]) for part in (scores.labels, scores.probabilities, scores.patients)), scores.classes)
    assert error(twice, 2) == pytest.approx(error(scores, 2)), "copies of all clips bring no patients"


def test_delong__equals_the_slopes_of_the_weighted_metric() -> None:
    (scores,) = models(np.random.default_rng(4), 25, [1.0])
    for position, name in enumerate(scores.classes):
        slow, fast = influence(scores, [f"auroc.{name}"])[f"auroc.{name}"], auroc_influence(scores, position)
        assert slow.parts == pytest.approx(fast.parts, abs=1e-6)
        assert slow.value == pytest.approx(fast.value) and slow.carriers.tolist() == fast.carriers.tolist()


def test_delong__patient_with_both_labels_is_one_patient() -> None:
    # All scores of a patient move together, so within-patient order is certain and the covariance shortens the interval.
    rng = np.random.default_rng(2)
    base = np.repeat(rng.normal(size=30), 2)
    positive = np.tile([0, 1], 30)
    both = ranked((base + 0.5 * positive).tolist(), positive.tolist(), [f"P{index // 2:02d}" for index in range(60)])
    assert error(both) < 0.5 * error(units_apart(both))
    assert delong(both, 1).low is not None


@pytest.mark.parametrize(
    ("values", "positive", "patients", "value", "reason"),
    [
        ([1, 2, 3], [0, 0, 0], None, None, "class yes is absent"),
        ([1, 2, 3], [1, 1, 1], None, None, "all units have class yes"),
        ([1, 2, 3, 4], [0, 0, 1, 1], None, 1.0, "placed alike"),
        ([3, 4, 1, 2], [0, 0, 1, 1], None, 0.0, "placed alike"),
        ([5, 5, 5, 5], [0, 0, 1, 1], None, 0.5, "placed alike"),
        ([1, 3, 2, 4], [0, 0, 1, 1], ["A", "B", "C", "C"], 0.75, "class yes comes from 1 patient"),
        ([1, 3, 2, 4], [0, 0, 1, 1], ["A", "A", "A", "A"], 0.75, "class yes comes from 1 patient, what is not yes comes from 1 patient"),
    ],
)
def test_delong__what_cannot_be_had_is_none_with_a_reason(values: list, positive: list, patients: list | None, value: float, reason: str) -> None:
    scores = ranked(values, positive, patients)
    interval = delong(scores, 1)
    assert interval.value == (None if value is None else pytest.approx(value))
    assert interval.low is None and interval.high is None and reason in interval.reason
    test = delong_test(scores, scores, 1)
    assert test.p_value is None and test.low is None and test.reason
    assert test.difference == (None if value is None else 0.0)


def test_delong__wrong_input() -> None:
    scores = ranked([1, 3, 2, 4], [0, 0, 1, 1])
    with pytest.raises(DataError, match="class number 2 does not exist"):
        delong(scores, 2)
    with pytest.raises(DataError, match="no rows"):
        delong(Scores(np.zeros(0, int), np.zeros((0, 2)), np.array([], str), ("no", "yes")), 1)
    with pytest.raises(DataError, match="same patients"):
        delong_test(scores, ranked([1, 3, 2, 4], [0, 0, 1, 1], list("WXYZ")), 1)
    with pytest.raises(DataError, match="not carried by the same patients"):
        delong_test(scores, ranked([1, 3, 2, 4], [0, 1, 0, 1]), 1)
    values = scores.probabilities.copy()
    values[2, 1] = np.nan
    with pytest.raises(DataError, match="row 2 is not a probability distribution"):
        Scores(scores.labels, values, scores.patients, scores.classes)


def test_delong_test__better_model_is_found_and_sides_are_exchangeable() -> None:
    good, poor = models(np.random.default_rng(1), 80, [3.0, 1.0])
    there, back = delong_test(good, poor, 0), delong_test(poor, good, 0)
    assert there.p_value == pytest.approx(back.p_value) and there.p_value < 0.001
    assert there.difference == pytest.approx(-back.difference) and there.low == pytest.approx(-back.high) and there.low > 0
