"""Averages over seeds and repeats keep the reasons of what is missing, and say how many runs they hold for."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from fake_experiment import FakeExperiment

from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.summary import average


def test_average__reason_of_some_runs_says_of_how_many() -> None:
    runs = [{"undefined": {"x": "never"}}, {"undefined": {}}, {"undefined": {"x": "never", "y": "one"}}]
    assert average(runs)["undefined"] == {"x": "never in 2 of 3 runs (seeds, repeats)", "y": "one in 1 of 3 runs (seeds, repeats)"}
    assert average([runs[0]] * 2)["undefined"] == {"x": "never"}
    other = average([runs[0], {"undefined": {"x": "absent"}}])["undefined"]["x"]
    assert other == "never in 1 of 2 runs (seeds, repeats); absent in 1 of 2 runs (seeds, repeats)"


def test_seeds__class_that_one_of_them_never_predicts(tmp_path: Path) -> None:
    fake = FakeExperiment(tmp_path, classes=["a", "b", "c"], patients=18, seeds=[0, 1], params={"evaluate": {"bootstrap": 100, "explanations": 0}})
    for fold in range(3):
        fake.edit_table(f"pretrained-seed1-fold{fold}", lambda table: table.assign(p_a=table["p_a"] + table["p_c"], p_c=0.0))
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")
    reason = "class c is never predicted in 1 of 2 runs (seeds, repeats)"
    assert metrics["pretrained"]["video"]["undefined"]["c.precision"] == reason
    assert reason in html.unescape((tmp_path / "out/report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("patients", [4, 24])
def test_difference__says_why_its_interval_is_missing(tmp_path: Path, patients: int) -> None:
    skill = {"pretrained": 9.0, "random": 9.0} if patients == 4 else {"pretrained": 1.0, "random": 0.5}
    fake = FakeExperiment(tmp_path, patients=patients, folds=2, skill=skill, params={"evaluate": {"bootstrap": 100, "explanations": 0}})
    video = evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")["difference"]["video"]
    assert (video["balanced_accuracy_low"] is None) == (patients == 4) == bool(video["balanced_accuracy_reason"])
    if patients == 4:
        assert "all patients gave the same result" in video["balanced_accuracy_reason"]
