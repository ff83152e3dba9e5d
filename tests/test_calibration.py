"""Calibration, thresholds and decision curves: values by hand, what is recovered, and that test rows are never fitted on."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_experiment import FakeExperiment
from scipy.special import expit, softmax

from pipeline.errors import DataError
from pipeline.evaluation import predictions
from pipeline.evaluation.calibration import (
    LEAST_PATIENTS, brier_parts, calibration_line, calibration_metrics, chance_error, choose_threshold, fit_calibrator, net_benefit,
    reliability_points,
)
from pipeline.evaluation.calibration_pages import calibration_part
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import Scores, aggregate, expected_calibration_error
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.weighted import draw_patients


def drawn(patients: int, temperature: float, classes: int = 3, shift: float = 0.0, seed: int = 0) -> Scores:
    """One unit a patient, labels drawn from true probabilities; the network's logits are those times `temperature`, class 0 plus `shift`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (patients, classes))
    labels = (softmax(logits, axis=1).cumsum(1) < rng.random((patients, 1))).sum(1).clip(max=classes - 1)
    logits[:, 0] += shift
    return Scores(labels, softmax(temperature * logits, axis=1), np.arange(patients).astype(str), tuple("abcde"[:classes]))


# fitting


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature__recovers_what_the_logits_were_multiplied_by(temperature):
    scores = drawn(4000, temperature)
    found = fit_calibrator(scores, "temperature")
    assert 1 / found.scale == pytest.approx(temperature, rel=0.06)
    assert found.bias == (0, 0, 0) and found.fitted
    after = found.apply(scores.probabilities)
    assert np.array_equal(after.argmax(1), scores.probabilities.argmax(1))
    assert expected_calibration_error(scores.labels, after) < 0.025


@pytest.mark.parametrize("classes", [2, 3])
def test_platt__recovers_slope_and_offset(classes):
    found = fit_calibrator(drawn(6000, 2.0, classes, shift=1.0), "platt")
    assert found.scale == pytest.approx(0.5, rel=0.08)
    # softmax(z) is told from softmax(z + shift): class 0 needs its shift back, against any other class.
    assert found.bias[0] - np.mean(found.bias[1:]) == pytest.approx(-1.0, abs=0.12)


def test_temperature__the_optimum_is_that_of_the_formula():
    """Two patients' worth of 0.9 / 0.1 of which 3 in 4 are right: without a prior the best certainty would be 0.75."""
    labels = np.array([0, 0, 0, 1] * 5)
    scores = Scores(labels, np.tile([0.9, 0.1], (20, 1)), np.arange(20).astype(str), ("a", "b"))
    scale = fit_calibrator(scores, "temperature").scale
    grid = np.linspace(0.2, 1.2, 100001)
    certainty = expit(grid * np.log(9))
    loss = -(15 * np.log(certainty) + 5 * np.log(1 - certainty)) + np.log(grid) ** 2 / (2 * 0.5**2)
    assert scale == pytest.approx(grid[loss.argmin()], abs=1e-4)
    assert 0.75 < expit(scale * np.log(9)) < 0.9


def test_temperature__many_clips_of_a_patient_do_not_outweigh_the_prior():
    once = drawn(8, 3.0)
    often = Scores(np.repeat(once.labels, 50), np.repeat(once.probabilities, 50, 0), np.repeat(once.patients, 50), once.classes)
    assert fit_calibrator(often, "temperature").scale == pytest.approx(fit_calibrator(once, "temperature").scale, rel=1e-4)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_fit__few_patients_cost_little_and_gain(method):
    """Mean log loss on new patients after fitting on 6: at most a hair worse where all was right, better where too sure."""
    for temperature, wanted in ((1.0, 0.02), (4.0, -0.1)):
        new = drawn(1500, temperature, seed=99)
        change = []
        for seed in range(40):
            fitted = fit_calibrator(drawn(6, temperature, seed=seed), method).apply(new.probabilities)
            change.append(calibration_metrics(Scores(new.labels, fitted, new.patients, new.classes))["log_loss"])
        assert np.mean(change) - calibration_metrics(new)["log_loss"] < wanted


@pytest.mark.parametrize(
    ("scores", "method", "words"),
    [
        (drawn(LEAST_PATIENTS - 1, 1.0), "temperature", "4 inner validation patients; at least 5 are needed"),
        (Scores(np.zeros(9, int), np.full((9, 2), 0.5), np.arange(9).astype(str), ("a", "b")), "temperature", "only 1 of 2 classes"),
        (Scores(np.arange(9) % 2, np.full((9, 3), 1 / 3), np.arange(9).astype(str), ("a", "b", "c")), "platt", "only 2 of 3 classes"),
        (drawn(50, 1.0), "none", "evaluate.calibration is none"),
    ],
)
def test_fit__what_cannot_be_fitted_changes_nothing_and_says_why(scores, method, words):
    found = fit_calibrator(scores, method)
    assert words in found.reason and not found.fitted
    assert found.apply(scores.probabilities) is scores.probabilities


def test_fit__zeros_and_ones_and_ties_stay_probabilities():
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    scores = Scores(np.array([0, 1, 1, 0, 1, 1]), probabilities, np.arange(6).astype(str), ("a", "b"))
    for method in ("temperature", "platt"):
        found = fit_calibrator(scores, method)
        after = found.apply(probabilities)
        assert found.fitted and np.isfinite(after).all() and (after > 0).all()
        assert after.sum(1) == pytest.approx(1)
    # One of three certain answers is wrong: the network was too sure.
    assert fit_calibrator(scores, "temperature").scale < 0.5


# judging


def test_brier_parts__by_hand():
    """0.2 said ten times (two true), 0.8 ten times (six true)."""
    event = np.array([1] * 2 + [0] * 8 + [1] * 6 + [0] * 4, bool)
    parts = brier_parts(event, np.repeat([0.2, 0.8], 10))
    assert parts["reliability"] == pytest.approx(0.5 * 0.0 + 0.5 * 0.2**2)
    assert parts["resolution"] == pytest.approx(0.2**2)  # bins at 0.2 and 0.6 around 0.4
    assert parts["uncertainty"] == pytest.approx(0.4 * 0.6)
    assert parts["within"] == pytest.approx(0)
    assert parts["brier"] == pytest.approx((2 * 0.64 + 8 * 0.04 + 6 * 0.04 + 4 * 0.64) / 20)


def test_brier_parts__sum_to_the_score():
    scores = drawn(200, 1.7)
    metrics = calibration_metrics(scores)
    parts = metrics["reliability"] - metrics["resolution"] + metrics["uncertainty"] + metrics["within"]
    assert metrics["brier"] == pytest.approx(parts)


def test_calibration_error__equal_width_by_hand():
    """Certainty 0.55 (half right) and 0.95 (all right), three times and once: |0.55 - 2/3| * 3/4 + 0.05 / 4."""
    probabilities = np.array([[0.55, 0.45]] * 3 + [[0.95, 0.05]])
    found = expected_calibration_error(np.array([0, 0, 1, 0]), probabilities, 10, "equal")
    assert found == pytest.approx((2 / 3 - 0.55) * 0.75 + 0.05 * 0.25)


def test_calibration_line__by_hand():
    """Said 0.5, seen 0.5 and said 0.8, seen 0.6: on the logit scale 0 -> 0 and log 4 -> log 1.5."""
    event = np.array([1] * 5 + [0] * 5 + [1] * 6 + [0] * 4, bool)
    slope, _ = calibration_line(event, np.repeat([0.5, 0.8], 10))
    assert slope[0] == pytest.approx(np.log(1.5) / np.log(4))
    _, intercept = calibration_line(event[10:], np.full(10, 0.8))
    assert intercept[0] == pytest.approx(np.log(1.5) - np.log(4))


def test_calibration_line__weights_are_repeats():
    scores = drawn(60, 2.0, 2)
    event, probability = scores.labels == 1, scores.probabilities[:, 1]
    times = np.random.default_rng(1).integers(0, 4, 60)
    weighted = calibration_line(event, probability, np.stack([times, np.ones(60)]))
    repeated = calibration_line(np.repeat(event, times), np.repeat(probability, times))
    assert [values[0] for values in weighted] == pytest.approx([values[0] for values in repeated])
    assert weighted[0][1] == pytest.approx(calibration_line(event, probability)[0][0])


def test_calibration_line__undefined_where_there_is_none():
    probability = np.array([0.1, 0.2, 0.8, 0.9])
    separable = calibration_line(np.array([0, 0, 1, 1], bool), probability)
    assert np.isnan(separable[0][0]) and separable[1][0] == pytest.approx(0)
    assert np.isnan(calibration_line(np.zeros(4, bool), probability)).all()
    assert np.isnan(calibration_line(np.array([0, 1, 0, 1], bool), np.full(4, 0.3))[0]).all()


def test_chance_error__is_what_calibrated_predictions_show():
    found = [expected_calibration_error(one.labels, one.probabilities) for one in (drawn(80, 1.0, seed=seed) for seed in range(60))]
    assert chance_error(drawn(80, 1.0).probabilities) == pytest.approx(np.mean(found), abs=0.015)


def test_reliability_points__by_hand():
    probabilities = np.array([[0.6, 0.4]] * 4 + [[0.1, 0.9]] * 4)
    scores = Scores(np.array([0, 0, 0, 1, 1, 1, 1, 1]), probabilities, np.array(list("ppqqrrss")), ("a", "b"))
    group = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    low, high = reliability_points(scores, group, draw_patients(4, 500, 0), 0.95)
    assert (low["probability"], low["frequency"], low["count"], low["patients"]) == (pytest.approx(0.6), 0.75, 4, 2)
    assert (low["low"], low["high"]) == (0.5, 1.0)  # only q, only p
    assert high["frequency"] == 1 and high["low"] is None  # all alike: resampling says nothing
    event = reliability_points(scores, group, draw_patients(4, 500, 0), 0.95, event=0)
    assert [row["probability"] for row in event] == pytest.approx([0.1, 0.6])
    assert [row["frequency"] for row in event] == [0, 0.75]


# thresholds and net benefit


def test_threshold__rules_by_hand():
    event = np.array([0, 0, 1, 0, 1, 1], bool)
    probability = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
    # 0.25: sensitivity 1, specificity 2/3; 0.65: 2/3 and 1. The one nearer to 0.5 is taken.
    assert choose_threshold(event, probability, "youden") == pytest.approx(0.65)
    assert choose_threshold(event, probability, "sensitivity", 0.9) == pytest.approx(0.25)
    assert choose_threshold(event, probability, "sensitivity", 0.6) == pytest.approx(0.65)
    assert choose_threshold(event, probability, "specificity", 0.9) == pytest.approx(0.65)
    assert choose_threshold(event, probability, "specificity", 0.3) == pytest.approx(0.15)


def test_threshold__ties_ends_and_one_outcome():
    assert choose_threshold(np.array([1, 1], bool), np.array([0.2, 0.4]), "youden") is None
    tied = choose_threshold(np.array([1, 0, 1, 0], bool), np.full(4, 0.3), "sensitivity", 0.9)
    assert tied <= 0.3  # equal values are called together
    with_one = choose_threshold(np.array([0, 1], bool), np.array([1.0, 1.0]), "specificity", 0.9)
    assert with_one == 1.0  # nothing lies above 1: the strictest there is


def test_net_benefit__by_hand():
    """Vickers & Elkin: TP/n - FP/n * t/(1-t)."""
    event = np.array([1, 1, 0, 0, 0], bool)
    probability = np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    group = np.arange(5)
    curve = net_benefit(event, probability, group, draw_patients(5, 200, 0), 0.95, np.array([0.2, 0.5, 0.95]))
    assert curve["net_benefit"] == pytest.approx([2 / 5 - 2 / 5 * 0.25, 1 / 5 - 1 / 5, 0])
    assert curve["treat_all"] == pytest.approx([0.4 - 0.6 * 0.25, 0.4 - 0.6, 0.4 - 0.6 * 19])
    assert (curve["low"] <= curve["net_benefit"]).all() and (curve["net_benefit"] <= curve["high"]).all()


def test_net_benefit__band_draws_patients_not_videos():
    event = np.tile([True, False], 10)
    probability = np.where(event, 0.9, 0.1)
    alone = net_benefit(event, probability, np.arange(20), draw_patients(20, 500, 0), 0.95)
    event = np.repeat([True, False], 10)
    joined = net_benefit(event, np.where(event, 0.9, 0.1), np.repeat(np.arange(4), 5), draw_patients(4, 500, 0), 0.95)
    assert (joined["high"] - joined["low"])[49] > (alone["high"] - alone["low"])[49]


# in an evaluation


def experiment(folder, **settings) -> FakeExperiment:
    return FakeExperiment(folder, **{"patients": 30, **settings})


def judged(fake: FakeExperiment, change=None) -> Part:
    """The part alone, in a second instead of the ten of a whole evaluation; `change(table)` edits every item's rows."""
    items = predictions.read_items(fake.folders)
    if change:
        items = [replace(item, table=change(item.table.copy())) for item in items]
    table = aggregate(predictions.test_rows(items, fake.splits), fake.classes, "video")
    inits = list(fake.skill)
    metrics = {"seeds": len(fake.seeds), "videos": len(fake.labels), "patients": fake.patients, **{init: {"stamp": ""} for init in inits}}
    return calibration_part(Context(fake.config, fake.splits, items, {"video": table}, metrics, None, fake.root / "out", inits, {}))


def test_part__test_rows_never_enter_a_fit(tmp_path):
    """All test labels and all test probabilities change; every fitted number stays the same to the bit."""
    fake = experiment(tmp_path)
    before = judged(fake).numbers

    def other(table):
        test = table["part"] == "test"
        table.loc[test, ["p_a", "p_b"]] = 0.5 * table.loc[test, ["p_b", "p_a"]].to_numpy() + 0.25
        return table

    def flipped(table):
        test = table["part"] == "test"
        table.loc[test, "label"] = table.loc[test, "label"].map({"a": "b", "b": "a"})
        return table

    for change in (other, flipped):
        after = judged(fake, change).numbers
        for init in ("pretrained", "random"):
            assert before[init]["items"] == after[init]["items"] and before[init]["items_calibrated"] == 3
            assert before[init]["before"]["log_loss"] != after[init]["before"]["log_loss"]
    first, second = (numbers["pretrained"]["thresholds"]["a"] for numbers in (before, after))
    assert first["thresholds"] == second["thresholds"]
    assert first["sensitivity"] == pytest.approx(1 - second["specificity"])


def test_part__validation_rows_do(tmp_path):
    fake = experiment(tmp_path)

    def surer(table):
        held = table["part"] == "validation"
        values = table.loc[held, ["p_a", "p_b"]].to_numpy() ** 3
        table.loc[held, ["p_a", "p_b"]] = values / values.sum(1, keepdims=True)
        return table

    before, after = judged(fake).numbers["random"], judged(fake, surer).numbers["random"]
    for old, new in zip(before["items"], after["items"], strict=True):
        assert new["temperature"] > old["temperature"]
    assert before["before"] == after["before"]


def test_part__files_and_words(tmp_path):
    fake = experiment(tmp_path, seeds=[0, 1])
    out = fake.root / "out"
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, out)
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "Can the probabilities be trusted?" in page and 'href="#calibration"' in page
    assert metrics["calibration"]["caution"] in page
    assert "Calibrated on inner validation patients" in page and "Probabilities are not calibrated" not in page
    card = (out / "model_card.md").read_text(encoding="utf-8")
    assert metrics["calibration"]["caution"] in card and "not calibrated" not in card
    found = metrics["calibration"]["pretrained"]
    # The main numbers are those without calibration, which changes no answer.
    assert found["answers_changed"] == 0 and found["before"]["ece"] == metrics["pretrained"]["video"]["ece"]
    assert found["difference"]["log_loss"] == pytest.approx(found["after"]["log_loss"] - found["before"]["log_loss"])
    points = pd.read_csv(out / "calibration.csv")
    assert points["count"].sum() == 2 * 60  # videos of both seeds
    curve = pd.read_csv(out / "decision_curve.csv")
    assert len(curve) == 99 and (curve["low"] <= curve["network"] + 1e-12).all()
    both = pd.read_csv(out / "calibration_all.csv")
    assert set(both["state"]) == {"as predicted", "calibrated"} and set(both["class"]) == {"(answer)", "a", "b"}
    text = (out / "details.json").read_text()
    assert "NaN" not in text and json.loads(text)["calibration"]["method"] == "temperature"
    compact = json.loads((out / "metrics.json").read_text())["calibration"]["pretrained"]
    assert set(compact) == {"ece", "ece_calibrated"}
    assert metrics["headline_parts"]["calibration.pretrained.ece_calibrated"] == compact["ece_calibrated"]


def test_part__none_changes_nothing(tmp_path):
    part = judged(experiment(tmp_path, params={"evaluate": {"calibration": "none"}}))
    assert part.numbers["pretrained"]["after"] is None and part.numbers["pretrained"]["items_calibrated"] == 0
    assert "Probabilities are not calibrated (evaluate.calibration is none)" in part.numbers["caution"]
    assert [name for name in part.headline if name.endswith("_calibrated")] == []
    # A threshold needs no calibration.
    assert part.numbers["pretrained"]["thresholds"]["a"]["sensitivity"] > 0.5


def test_part__one_positive_class_and_a_rule(tmp_path):
    settings = {"positive_class": "b", "threshold": {"rule": "sensitivity", "target": 0.95}, "calibration": "platt"}
    numbers = judged(experiment(tmp_path / "a", params={"evaluate": settings})).numbers
    assert list(numbers["pretrained"]["thresholds"]) == ["b"] and numbers["rule"] == "sensitivity of at least 0.95"
    low = judged(experiment(tmp_path / "b", params={"evaluate": settings | {"threshold": {"rule": "sensitivity", "target": 0.5}}})).numbers
    for strict, loose in zip(*(found["random"]["thresholds"]["b"]["thresholds"] for found in (numbers, low)), strict=True):
        assert strict < loose
    with pytest.raises(DataError, match=r"evaluate.positive_class: got 'malignant'; allowed: null, a, b"):
        judged(experiment(tmp_path / "c", params={"evaluate": {"positive_class": "malignant"}}))


def test_part__rates_by_hand(tmp_path):
    """0.8 for every b, 0.3 for every a, but 0.9 for the a of one tested patient: thresholds midway between 0.3 and 0.8."""
    fake = experiment(tmp_path, patients=12, params={"evaluate": {"calibration": "none"}})
    odd = f"P{0:010x}"

    def fixed(table):
        wrong = (table["patient"] == odd) & (table["part"] == "test")
        table["p_b"] = np.where(table["label"] == "b", 0.8, np.where(wrong, 0.9, 0.3))
        table["p_a"] = 1 - table["p_b"]
        return table

    found = judged(fake, fixed).numbers["pretrained"]["thresholds"]["b"]
    assert found["thresholds"] == pytest.approx([0.55] * 3)
    assert (found["sensitivity"], found["specificity"]) == (1, pytest.approx(10 / 12))
    assert (found["ppv"], found["npv"]) == (pytest.approx(12 / 14), 1)
    assert found["sensitivity_low"] is None  # all patients gave the same result
    assert found["specificity_low"] < 10 / 12 < found["specificity_high"]


def test_part__without_validation_rows(tmp_path):
    fake = experiment(tmp_path)
    for folder in fake.folders:
        fake.edit_card(folder.name, selection="last", validation_groups=[])
    part = judged(fake, lambda table: table[table["part"] == "test"])
    found = part.numbers["pretrained"]
    assert found["items_calibrated"] == 0 and found["after"] is None
    assert all("no inner validation patients (finetune.selection: last)" in item["reason"] for item in found["items"])
    assert found["thresholds"]["a"]["sensitivity"] is None
    assert found["thresholds"]["a"]["reason"] == "no inner validation patients (finetune.selection: last)"
    assert "Nothing was calibrated, and no threshold was chosen: no inner validation patients" in part.section.words[1]
    assert not {"At one threshold", "What was fitted, model by model"} & {table.title for table in part.section.tables}
    assert "Probabilities are not calibrated (no inner validation patients" in part.numbers["caution"]


def test_part__best_on_test_is_not_calibrated_whatever_its_rows_say(tmp_path):
    fake = experiment(tmp_path)
    for folder in fake.folders:
        fake.edit_card(folder.name, selection="best_on_test")
    for item in judged(fake).numbers["pretrained"]["items"]:
        assert "chosen on test patients" in item["reason"] and item["thresholds"] == {"a": None, "b": None}


def test_part__validation_patients_that_are_also_tested(tmp_path):
    """Nothing may be fitted on them."""
    fake = experiment(tmp_path)

    def both(table):
        table.loc[table["part"] == "validation", "patient"] = table.loc[table["part"] == "test", "patient"].iloc[0]
        return table

    for item in judged(fake, both).numbers["pretrained"]["items"]:
        assert "1 of its 1 inner validation patients are also tested" in item["reason"] and item["thresholds"]["a"] is None


def test_part__divided_patients_are_not_fitted_on_though_their_videos_differ(tmp_path):
    """A split by video: the column patient names videos, so that only the split knows whose they are."""
    fake = experiment(tmp_path)
    fake.splits = replace(fake.splits, group="video", divided_patients=3)
    for item in judged(fake).numbers["pretrained"]["items"]:
        assert "share patients: video-level split" in item["reason"] and item["thresholds"]["a"] is None


def test_part__a_class_that_one_validation_part_lacks(tmp_path):
    """No threshold in one fold: no rates over part of the folds, the reason names the model."""
    def lacking(table):
        gone = (table["part"] == "validation") & (table["label"] == "b") & (table["init"] == "pretrained") & (table["fold"] == 1)
        return table[~gone]

    numbers = judged(experiment(tmp_path), lacking).numbers
    found = numbers["pretrained"]
    assert found["items_calibrated"] == 2 and "only 1 of 2 classes" in found["items"][1]["reason"]
    assert found["thresholds"]["b"]["thresholds"][1] is None and found["thresholds"]["b"]["specificity"] is None
    assert "pretrained-seed0-fold1" in found["thresholds"]["b"]["reason"]
    assert numbers["random"]["thresholds"]["b"]["specificity"] is not None


def test_part__probabilities_of_exactly_zero_and_one(tmp_path):
    def hard(table):
        table["p_a"] = (table["p_a"] > 0.5).astype(float)
        table["p_b"] = 1 - table["p_a"]
        return table

    part = judged(experiment(tmp_path), hard)
    found = part.numbers["random"]
    assert found["after"]["log_loss"] < found["before"]["log_loss"]
    json.dumps(part.numbers, allow_nan=False)


def test_part__three_classes_of_three_patients_each(tmp_path):
    """Too few to fit on and too few for most lines: said, not crashed."""
    part = judged(experiment(tmp_path, patients=9, classes=["a", "b", "c"], clips=1))
    assert all("3 inner validation patients; at least 5" in item["reason"] for item in part.numbers["random"]["items"])
    json.dumps([part.numbers, part.compact, part.headline], allow_nan=False)


@pytest.mark.parametrize(
    ("sharpened", "words"),
    [(8.0, "It helped: log loss on the test videos changed by −"), (1.0, "shows neither gain nor harm"), (-1, "It did harm: log loss")],
)
def test_part__says_whether_it_helped(tmp_path, sharpened, words):
    """Validation and test too sure alike: a gain. Only validation too sure: the test probabilities get too flat, which is harm."""
    def change(table):
        rows = table["part"] == "validation" if sharpened < 0 else table["part"] != ""
        values = np.maximum(table.loc[rows, ["p_a", "p_b"]].to_numpy(), 1e-6) ** (6.0 if sharpened < 0 else sharpened)
        table.loc[rows, ["p_a", "p_b"]] = values / values.sum(1, keepdims=True)
        return table

    part = judged(experiment(tmp_path, skill={"pretrained": 1.0}, seeds=[3]), change)
    assert words in part.section.words[1]
