"""ROC and precision-recall curves: exact on hand-made scores, bands and intervals as resampling rows by hand gives them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from fake_experiment import FakeExperiment
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from pipeline.evaluation.curves import GRID, average_precision_interval, class_curve
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import Scores, auroc, average_precision
from pipeline.evaluation.statistics import bootstrap_intervals, patient_intervals

ROOT = Path(__file__).resolve().parents[1]


def scores(positive, score, patients=None):
    score = np.asarray(score, float)
    names = patients or [f"P{row}" for row in range(len(score))]
    return Scores(np.asarray(positive, np.int64), np.column_stack([1 - score, score]), np.array(names), ("rest", "own"))


def noisy(count: int = 60) -> Scores:
    """Many ties, four units a patient."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, count)
    score = (0.5 + 0.2 * (labels - 0.5) + rng.normal(0, 0.2, count)).clip(0, 1).round(1)
    return scores(labels, score, [f"P{row // 4}" for row in range(count)])


def test_curve__hand_made():
    curve = class_curve(scores([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]), 1, replicates=100)
    assert curve.roc[[0, 49, 50, 100]] == pytest.approx([0.5, 0.5, 1, 1])
    # The second hit comes third: two of three called are right.
    assert curve.pr[[0, 50, 51, 100]] == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert (curve.auroc, curve.average_precision) == pytest.approx((0.75, (1 + 2 / 3) / 2))
    assert (curve.prevalence, curve.positives) == (0.5, 2)
    assert curve.points[-1] == pytest.approx([1, 1, 1, 0.5])


def test_curve__ties_are_one_step():
    curve = class_curve(scores([1, 0, 1, 0], [0.5] * 4), 1, replicates=100)
    assert curve.roc == pytest.approx(GRID) and curve.pr == pytest.approx(np.full(101, 0.5))
    assert (curve.auroc, curve.average_precision) == (0.5, 0.5)


def test_curve__areas_are_those_of_the_metrics():
    data = noisy()
    curve, positive, score = class_curve(data, 1, replicates=100), data.labels == 1, data.probabilities[:, 1]
    assert curve.auroc == pytest.approx(auroc(positive, score)) == pytest.approx(roc_auc_score(positive, score))
    assert curve.average_precision == pytest.approx(average_precision(positive, score)) == pytest.approx(average_precision_score(positive, score))
    assert auc(curve.points[:, 0], curve.points[:, 1]) == pytest.approx(curve.auroc)


def test_curve__area_and_draws_are_those_of_the_bootstrap():
    data = noisy()
    curve, other = class_curve(data, 1, replicates=300, seed=3), bootstrap_intervals(data, ["auroc.own"], replicates=300, seed=3)["auroc.own"]
    assert curve.auroc == pytest.approx(other.value) and curve.replicates == other.replicates


def test_curve__bands_are_percentiles_over_resampled_patients():
    data, replicates = noisy(), 200
    curve = class_curve(data, 1, replicates=replicates, confidence=0.9, seed=1)
    names = sorted(set(data.patients.tolist()))
    draws = np.random.default_rng(1).multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    drawn = []
    for counts in draws:
        rows = np.concatenate([np.flatnonzero(data.patients == name) for name, count in zip(names, counts, strict=True) for _ in range(count)])
        part = Scores(data.labels[rows], data.probabilities[rows], data.patients[rows], data.classes)
        drawn.append(class_curve(part, 1, replicates=2))
    assert curve.roc_band == pytest.approx(np.quantile([one.roc for one in drawn], [0.05, 0.95], axis=0))
    assert curve.pr_band == pytest.approx(np.quantile([one.pr for one in drawn], [0.05, 0.95], axis=0))
    interval = average_precision_interval([data], 1, replicates=replicates, confidence=0.9, seed=1)
    assert interval == pytest.approx(np.quantile([one.average_precision for one in drawn], [0.05, 0.95]))


def test_curve__what_cannot_be_had_is_said():
    assert class_curve(scores([0, 0], [0.1, 0.2]), 1) is None
    one = class_curve(scores([0, 1], [0.1, 0.2], ["P", "P"]), 1)
    assert one.roc_band is None and "nothing to resample" in one.reason
    # One patient of 40 shows the class: a third of the draws lack it; with two classes of one patient each, most do.
    rare = class_curve(scores([1, 0], [0.9, 0.2]), 1, replicates=400)
    interval = average_precision_interval([scores([1, 0], [0.9, 0.2])], 1, replicates=400)
    assert rare.replicates < 400 and (rare.roc_band is None) == (interval is None) == bool(rare.reason)
    assert average_precision_interval([scores([0, 1], [0.1, 0.2], ["P", "P"])], 1) is None


def test_average_precision__mean_of_runs_whose_scores_are_not_comparable():
    one, rng = noisy(120), np.random.default_rng(2)
    # The other network ranks as well, but all its scores lie lower: pooled, the ranking would be spoilt.
    moved = one.probabilities[:, 1] * 0.3 + rng.normal(0, 0.01, 120).clip(-0.02, 0.02)
    other = Scores(one.labels, np.column_stack([1 - moved, moved]), one.patients, one.classes)
    pooled = Scores(*(np.concatenate([getattr(run, name) for run in (one, other)]) for name in ("labels", "probabilities", "patients")), one.classes)
    low, high = average_precision_interval([one, other], 1, replicates=500)
    single = [average_precision_interval([run], 1, replicates=500) for run in (one, other)]
    mean = np.mean([average_precision(run.labels == 1, run.probabilities[:, 1]) for run in (one, other)])
    assert low < mean < high and min(single)[0] <= low and high <= max(pair[1] for pair in single)
    assert average_precision(pooled.labels == 1, pooled.probabilities[:, 1]) < mean - 0.02


def test_part__tables_numbers_and_pictures(tmp_path):
    fake = FakeExperiment(tmp_path, classes=["a", "b/ b", "$c{"], patients=18, seeds=[0, 1])
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")
    roc, pr = pd.read_csv(tmp_path / "out/roc.csv"), pd.read_csv(tmp_path / "out/pr.csv")
    assert set(roc["class"]) == set(pr["class"]) == {"a", "b/ b", "$c{"} and set(roc["init"]) == {"pretrained", "random"}
    for table, name in ((roc, "tpr"), (pr, "precision")):
        # At its own edges a pointwise band may leave the curve out; elsewhere it must not.
        inside = (table[f"{name}_low"] - 1e-9 <= table[name]) & (table[name] <= table[f"{name}_high"] + 1e-9)
        assert inside.mean() > 0.8
    values = metrics["curves"]["pretrained"]["a"]
    assert values["auroc"] == metrics["pretrained"]["video"]["per_class"]["a"]["auroc"]
    # Two intervals of one number in one report would be one too many.
    videos = pd.read_csv(tmp_path / "out/predictions_video.csv").query("init == 'pretrained'")
    runs = [Scores.from_table(part, fake.classes) for _, part in videos.groupby("seed")]
    same = patient_intervals(runs, ["auroc.a"])["auroc.a"]
    assert (values["auroc_low"], values["auroc_high"]) == (pytest.approx(same.low), pytest.approx(same.high))
    assert values["average_precision_low"] < values["average_precision"] < values["average_precision_high"]
    assert values["prevalence"] == pytest.approx(1 / 3) and values["reason"] == ""
    assert {path.name for path in (tmp_path / "out/pictures").glob("curves_*")} == {"curves_1_a.png", "curves_2_b-b.png", "curves_3_c.png"}
    assert "How well are the classes ranked?" in (tmp_path / "out/report.html").read_text()


def test_plots__template_and_columns_of_dvc_fit_the_tables(tmp_path):
    fake = FakeExperiment(tmp_path)
    evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "reports/evaluate")
    shown = {path: about for block in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for path, about in block.items()}
    for name in ("roc.csv", "pr.csv"):
        about = shown[f"reports/evaluate/{name}"]
        template = json.loads((ROOT / f".dvc/plots/{about['template']}.json").read_text())
        grouped = {channel["field"] for channel in template["spec"]["encoding"].values() if "<" not in channel.get("field", "<")}
        assert {about["x"], about["y"], *grouped} <= set(pd.read_csv(tmp_path / "reports/evaluate" / name).columns) and grouped == {"class", "init"}
