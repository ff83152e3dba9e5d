"""Intervals and tests against closed forms, slow obvious versions, and simulations with known truth."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from pipeline.errors import DataError
from pipeline.evaluation import statistics
from pipeline.evaluation.metrics import Scores, classification_metrics
from pipeline.evaluation.statistics import (
    METRICS,
    WeightedMetrics,
    bootstrap_intervals,
    holm,
    paired_bootstrap,
    patient_intervals,
    permutation_test,
)
from pipeline.evaluation.weighted import clustered_variance, influence


def make_scores(seed: int = 0, patients: int = 12, units: int = 4, classes: int = 3, skill: float = 1.5) -> Scores:
    """Random but better than chance; probabilities rounded so that ties occur."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(patients) % classes, units)
    logits = rng.normal(size=(len(labels), classes)) + skill * np.eye(classes)[labels]
    probabilities = np.round(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 1) + 0.05
    probabilities /= probabilities.sum(1, keepdims=True)
    names = np.repeat([f"P{index:02d}" for index in range(patients)], units)
    return Scores(labels, probabilities, names, tuple("abcdefgh"[:classes]))


def repeated(scores: Scores, weights: np.ndarray) -> Scores:
    """The set in which every patient's units occur as often as his weight says."""
    names = sorted(set(scores.patients))
    rows = np.concatenate(
        [
            np.tile(np.flatnonzero(scores.patients == name), int(weight))
            for name, weight in zip(names, weights, strict=True)
        ]
    ).astype(int)
    return Scores(scores.labels[rows], scores.probabilities[rows], scores.patients[rows], scores.classes)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_metrics__equal_the_plain_metrics_of_a_repeated_set(seed: int) -> None:
    scores = make_scores(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, 12)).astype(float)
    weights[:, :3] += 1  # every class stays present
    names = [*METRICS, "recall.b", "auroc.c"]
    fast = WeightedMetrics(scores).values(weights, names)
    for row, weight in enumerate(weights):
        slow = classification_metrics(repeated(scores, weight))
        slow |= {"recall.b": slow["per_class"]["b"]["recall"], "auroc.c": slow["per_class"]["c"]["auroc"]}
        for name in names:
            assert fast[name][row] == pytest.approx(slow[name], abs=1e-12), name


def test_weighted_metrics__missing_class_is_undefined_not_smaller() -> None:
    scores = make_scores()
    weights = np.ones((1, 12))
    weights[0, 2::3] = 0  # class c has gone
    values = WeightedMetrics(scores).values(weights)
    assert np.isnan([values[name][0] for name in ("balanced_accuracy", "macro_f1", "macro_auroc")]).all()
    assert np.isfinite([values[name][0] for name in ("accuracy", "log_loss", "brier")]).all()


def test_weighted_metrics__unknown_name() -> None:
    with pytest.raises(DataError, match="unknown metric 'acuracy'.*recall"):
        WeightedMetrics(make_scores()).values(np.ones((1, 12)), ["acuracy"])


def test_bootstrap__accuracy_of_independent_units_meets_the_closed_form() -> None:
    # One unit a patient: the bootstrap of a mean has standard deviation sqrt(p (1 - p) / n).
    rng = np.random.default_rng(3)
    right = rng.random(400) < 0.8
    probabilities = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
    scores = Scores(np.zeros(400, int), probabilities, np.array([f"P{i}" for i in range(400)]), ("a", "b"))
    interval = bootstrap_intervals(scores, ["accuracy"], replicates=4000)["accuracy"]
    mean = right.mean()
    half = 1.96 * math.sqrt(mean * (1 - mean) / 400)
    assert interval.value == pytest.approx(mean)
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), abs=0.006)
    assert interval.replicates == 4000 and interval.degenerate == 0


def clustered(rng: np.random.Generator, patients: int, units: int) -> Scores:
    """Accuracy differs between patients (mean 0.75, intra-patient correlation 1/3)."""
    chance = rng.beta(1.5, 0.5, patients)
    right = rng.random((patients, units)) < chance[:, None]
    probabilities = np.where(right.ravel()[:, None], [0.9, 0.1], [0.1, 0.9])
    return Scores(
        np.zeros(patients * units, int),
        probabilities,
        np.repeat([f"P{i:03d}" for i in range(patients)], units),
        ("a", "b"),
    )


def test_bootstrap__covers_the_truth_for_clustered_units_where_a_naive_one_fails() -> None:
    rng = np.random.default_rng(0)
    trials, cluster, naive = 200, 0, 0
    for _ in range(trials):
        scores = clustered(rng, 40, 15)
        interval = bootstrap_intervals(scores, ["accuracy"], replicates=300)["accuracy"]
        cluster += interval.low <= 0.75 <= interval.high
        half = 1.96 * math.sqrt(interval.value * (1 - interval.value) / 600)
        naive += abs(interval.value - 0.75) <= half
    # Binomial standard deviation of a coverage of 0.95 over 200 trials: 0.015.
    assert 0.90 <= cluster / trials <= 0.99
    assert naive / trials < 0.75


def test_bootstrap__seeded_and_counts_degenerate_replicates() -> None:
    rng = np.random.default_rng(1)
    labels = np.array([0] * 9 + [1])
    raw = rng.random((10, 2))
    scores = Scores(labels, raw / raw.sum(1, keepdims=True), np.array([f"P{i}" for i in range(10)]), ("a", "b"))
    one, again = (bootstrap_intervals(scores, seed=5) for _ in range(2))
    assert one == again
    assert one != bootstrap_intervals(scores, seed=6)
    # The only carrier of class b is not drawn with probability 0.9^10 = 0.349.
    share = one["balanced_accuracy"].degenerate / 2000
    assert share == pytest.approx(0.9**10, abs=0.04)
    assert one["accuracy"].degenerate == 0


def test_bootstrap__class_absent_altogether_and_single_patient() -> None:
    scores = make_scores(patients=12)
    two = Scores(
        scores.labels, np.c_[scores.probabilities * 0.9, np.full(len(scores.labels), 0.1)], scores.patients, (*"abcd",)
    )
    result = bootstrap_intervals(two, replicates=200)
    assert result["macro_auroc"].value is None and "absent" in result["macro_auroc"].reason
    assert result["balanced_accuracy"].low is not None
    alone = Scores(scores.labels, scores.probabilities, np.full(len(scores.labels), "P"), scores.classes)
    lonely = bootstrap_intervals(alone)["accuracy"]
    assert lonely.value is not None and lonely.low is None and "1 patient" in lonely.reason


def test_bootstrap__two_thousand_replicates_are_fast() -> None:
    scores = make_scores(patients=50, units=30, skill=1.0)
    start = time.perf_counter()
    bootstrap_intervals(scores, [*METRICS, "recall.a", "auroc.a"], replicates=2000)
    assert time.perf_counter() - start < 3.0


def test_paired_bootstrap__same_model_is_no_certainty_and_pairing_narrows() -> None:
    scores = make_scores(patients=30, skill=0.8)
    same = paired_bootstrap(scores, scores, "accuracy")
    assert (same.difference, same.low, same.high) == (0.0, None, None) and "same result" in same.reason
    # The second model is right where the first is, and on some more units: the pairs nearly cancel the patient effect.
    better = scores.probabilities.copy()
    wrong = np.flatnonzero(better.argmax(1) != scores.labels)[::4]
    better[wrong] = np.eye(3)[scores.labels[wrong]]
    second = Scores(scores.labels, better, scores.patients, scores.classes)
    result = paired_bootstrap(second, scores, "accuracy")
    single = bootstrap_intervals(scores, ["accuracy"])["accuracy"]
    assert result.difference == pytest.approx(len(wrong) / len(scores.labels))
    assert 0 < result.low < result.difference < result.high
    assert result.high - result.low < 0.8 * (single.high - single.low)


def test_paired__different_patients_or_classes_are_refused() -> None:
    first = make_scores(patients=12)
    fewer = Scores(first.labels[4:], first.probabilities[4:], first.patients[4:], first.classes)
    with pytest.raises(DataError, match="same patients; 1 are in only one of them, such as P00"):
        paired_bootstrap(first, fewer, "accuracy")
    renamed = Scores(first.labels, first.probabilities, first.patients, ("a", "b", "x"))
    with pytest.raises(DataError, match="classes differ"):
        permutation_test(first, renamed, "accuracy")


def test_permutation__exact_p_value_equals_brute_force() -> None:
    first, second = make_scores(1, patients=8, skill=2.0), make_scores(2, patients=8, skill=0.2)
    result = permutation_test(first, second, "macro_auroc")
    names = sorted(set(first.patients))
    differences = []
    for pattern in itertools.product([0, 1], repeat=8):
        swapped = np.isin(first.patients, [name for name, flag in zip(names, pattern, strict=True) if flag])[:, None]
        left = Scores(
            first.labels, np.where(swapped, second.probabilities, first.probabilities), first.patients, first.classes
        )
        right = Scores(
            first.labels, np.where(swapped, first.probabilities, second.probabilities), first.patients, first.classes
        )
        differences.append(classification_metrics(left)["macro_auroc"] - classification_metrics(right)["macro_auroc"])
    assert result.difference == pytest.approx(differences[0])
    assert result.p_value == pytest.approx(np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12))
    assert result.replicates == 256


def test_permutation__in_parts_gives_what_all_at_once_gives_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(12, "macro_auroc"), (30, "balanced_accuracy"), (31, "log_loss")]
    pairs = [(make_scores(1, patients=count, skill=0.9), make_scores(2, patients=count, skill=0.8)) for count, _ in cases]
    # Numbers of the program that drew all exchanges at once.
    whole = [permutation_test(*pair, name, permutations=5000, seed=3) for pair, (_, name) in zip(pairs, cases, strict=True)]
    assert [(one.p_value, one.replicates) for one in whole] == [(0.4287109375, 4096), (0.22615476904619075, 5000), (0.042191561687662464, 5000)]
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 1000)
    largest: list[int] = []
    values = WeightedMetrics.values
    monkeypatch.setattr(WeightedMetrics, "values", lambda self, weights, *rest: (largest.append(weights.size), values(self, weights, *rest))[1])
    assert [permutation_test(*pair, name, permutations=5000, seed=3) for pair, (_, name) in zip(pairs, cases, strict=True)] == whole
    assert max(largest) <= 1000


def test_permutation__same_model_has_p_one_and_sampled_p_is_never_zero() -> None:
    scores = make_scores(patients=30)
    assert permutation_test(scores, scores, "accuracy", permutations=500).p_value == 1.0
    perfect = Scores(scores.labels, np.eye(3)[scores.labels], scores.patients, scores.classes)
    poor = Scores(scores.labels, np.eye(3)[(scores.labels + 1) % 3], scores.patients, scores.classes)
    assert permutation_test(perfect, poor, "accuracy", permutations=999).p_value == pytest.approx(1 / 1000)


def test_permutation__false_positives_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(150):
        first = clustered(rng, 16, 5)
        flip = rng.random(80) < 0.3
        probabilities = [
            np.where((flip & (rng.random(80) < 0.5))[:, None], first.probabilities[:, ::-1], first.probabilities)
            for _ in range(2)
        ]
        pair = [Scores(first.labels, values, first.patients, first.classes) for values in probabilities]
        hits += permutation_test(*pair, "accuracy", permutations=300, seed=trial).p_value <= 0.05
    assert hits / 150 <= 0.10


def test_intervals__accuracy_of_independent_units_is_the_closed_form() -> None:
    right = np.arange(40) % 5 > 0
    scores = Scores(np.zeros(40, int), np.where(right[:, None], [0.9, 0.1], [0.1, 0.9]), np.array([f"P{i}" for i in range(40)]), ("a", "b"))
    interval = patient_intervals(scores, ["accuracy"])["accuracy"]
    # Standard error of a mean with n - 1, carried to the logit by 1 / (p (1 - p)), Student's quantile for 39 degrees.
    half = stats.t.ppf(0.975, 39) * math.sqrt(0.8 * 0.2 / 39) / (0.8 * 0.2)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, expit(logit(0.8) - half), expit(logit(0.8) + half)))
    found = influence(scores, ["accuracy"])["accuracy"]
    assert found.widening == (pytest.approx(math.sqrt(40 / 39)), pytest.approx(39))
    assert bootstrap_intervals(scores, ["accuracy"], replicates=4000)["accuracy"].low == pytest.approx(0.8 - 2.05 * math.sqrt(0.16 / 40), abs=0.025)


def test_intervals__balanced_accuracy_is_welchs_mean_of_classes() -> None:
    # 12 patients of a (3 wrong) and 5 of b (2 wrong): each recall has its own variance and degrees of freedom.
    labels = np.repeat([0, 1], [12, 5])
    right = np.r_[np.arange(12) > 2, np.arange(5) > 1]
    rows = np.eye(2)[np.where(right, labels, 1 - labels)]
    found = influence(Scores(labels, rows, np.array([f"P{i:02d}" for i in range(17)]), ("a", "b")), ["balanced_accuracy"])["balanced_accuracy"]
    parts = [0.75 * 0.25 / 11 / 4, 0.6 * 0.4 / 4 / 4]
    assert found.value == pytest.approx(0.675) and found.carriers.tolist() == [12, 5]
    assert clustered_variance(found.parts, found.carriers) == pytest.approx((sum(parts), sum(parts) ** 2 / (parts[0] ** 2 / 11 + parts[1] ** 2 / 4)))


def test_intervals__more_runs_of_the_same_patients_bring_no_patients() -> None:
    scores, other = make_scores(0, skill=0.7), make_scores(1, skill=0.7)
    one, again = patient_intervals(scores), patient_intervals([scores] * 5)
    for name in METRICS:
        assert (one[name].low, one[name].high) == pytest.approx((again[name].low, again[name].high))
    both = patient_intervals([scores, other], ["macro_auroc"])["macro_auroc"]
    assert both.value == pytest.approx(np.mean([classification_metrics(part)["macro_auroc"] for part in (scores, other)]))
    listed = permutation_test([scores, scores], [other, other], "accuracy")
    assert listed.p_value == permutation_test(scores, other, "accuracy").p_value
    assert paired_bootstrap([scores, scores], other, "macro_f1") == paired_bootstrap(scores, other, "macro_f1")
    with pytest.raises(DataError, match="2 and 1 runs"):
        permutation_test([scores, scores], [other], "accuracy")
    with pytest.raises(DataError, match="no rows"):
        patient_intervals([])


def test_intervals__class_of_one_patient_leaves_only_what_does_not_need_it() -> None:
    scores = make_scores(patients=13, skill=0.8)
    kept = (scores.labels != 2) | (scores.patients == "P02")
    few = Scores(scores.labels[kept], scores.probabilities[kept], scores.patients[kept], scores.classes)
    for intervals in (patient_intervals(few), bootstrap_intervals(few, replicates=100)):
        assert intervals["balanced_accuracy"].low is None and "class c comes from 1 patient" in intervals["balanced_accuracy"].reason
        assert intervals["accuracy"].low < intervals["accuracy"].value < intervals["accuracy"].high
        assert intervals["log_loss"].low is not None
    gap = paired_bootstrap(few, few, "macro_auroc")
    assert gap.difference == 0 and gap.low is None and "1 patient" in gap.reason


def test_intervals__no_error_at_all_is_no_certainty() -> None:
    scores = make_scores()
    perfect = Scores(scores.labels, np.eye(3)[scores.labels], scores.patients, scores.classes)
    for interval in patient_intervals(perfect, ["accuracy", "macro_f1", "macro_auroc", "brier"]).values():
        assert interval.value in (0.0, 1.0) and interval.low is None and "same result" in interval.reason


def test_intervals__patient_with_two_labels_counts_once() -> None:
    scores = make_scores(patients=12, skill=0.5)
    paired = Scores(scores.labels, scores.probabilities, np.array([f"Q{int(name[1:]) // 2}" for name in scores.patients]), scores.classes)
    found = influence(paired, ["balanced_accuracy"])["balanced_accuracy"]
    assert found.parts.shape == (6, 3) and found.carriers.tolist() == [4, 4, 4]
    assert patient_intervals(paired, ["balanced_accuracy"])["balanced_accuracy"].low is not None


def test_holm__worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
