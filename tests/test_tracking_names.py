"""Experiments in MLflow: named by what differs and how good it was, few numbers, folds as children, a view that shows both."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fake_experiment import FakeExperiment

from pipeline.config import Config
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation import records
from pipeline.evaluation.records import (
    description,
    log_execution,
    log_folds,
    parent_metrics,
    run_name,
)
from pipeline.tracking import NullTracker, open_tracker
from pipeline.tracking_context import changed_params, execution_facts, spoken_params
from pipeline.tracking_view import VIEW, differing_params, prepare_view, view_state


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with params.yaml under git and an empty store, as the current directory."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setattr(evaluation, "PARTS", ())
    monkeypatch.setattr(evaluation, "write_pages", lambda *given: None)
    text = {
        "data": {"source": "/clinic/ward", "phantom": {"patients": 24}}, "pretrain": {"epochs": 16, "optimizer": {"lr": "1e-3"}},
        "methods": {"ucl": {"temperature": 0.07, "support_size": 4}, "simclr": {"temperature": 0.5}},
        "finetune": {"epochs": 30, "optimizer": {"lr": 0.001}, "trainable": "last_block"}, "split": {"folds": [0, 1, 2]},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    for words in (["init", "-q"], ["add", "params.yaml"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "start"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def config(**changes: object) -> Config:
    raw = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        block, *parts = key.split("__")
        place = raw[block]
        for part in parts[:-1]:
            place = place[part]
        place[parts[-1]] = value
    return Config.model_validate({**raw, "tracking": {"flush_seconds": 0.05}})


def runs(project: Path) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("sonoscope").experiment_id])
    return sorted(found, key=lambda run: ("mlflow.parentRunId" in run.data.tags, run.info.start_time))


def test_name__says_what_differs_from_the_commit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert changed_params(config()) == {}
    assert execution_facts(config()).name.startswith("ucl baseline ")
    changed = config(methods__ucl__temperature=0.2, finetune__epochs=5, data__source="/other", finetune__optimizer__lr="1e-3")
    facts = execution_facts(changed)
    assert facts.name == "ucl finetune.epochs=5 temperature=0.2", "epochs stands in two sections, temperature in one of this method"
    assert facts.tags["changed"] == "finetune.epochs=5 temperature=0.2"
    monkeypatch.setenv("DVC_EXP_NAME", "tepid-gibe")
    assert execution_facts(changed).name == "ucl finetune.epochs=5 temperature=0.2"
    assert execution_facts(config()).name == "ucl tepid-gibe"
    # What the experiment started from counts, not what a person has committed since.
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0" * 40)
    assert changed_params(changed) is None
    assert execution_facts(changed).name == "ucl tepid-gibe"


def test_name__outside_of_git_and_with_a_broken_file(project: Path) -> None:
    good = config()
    (project / "params.yaml").write_text("a: [", encoding="utf-8")
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qam", "broken"], cwd=project, check=True)
    assert changed_params(good) is None
    shutil.rmtree(project / ".git")
    assert changed_params(good) is None
    assert len(execution_facts(good).name) == len("ucl ") + 7


def test_spoken__long_values_and_many_of_them() -> None:
    known = {f"a.k{i}": "" for i in range(9)}
    text = spoken_params({f"a.k{i}": "x" * 99 if i == 0 else str(i) for i in range(9)}, known)
    assert text.startswith("k0=" + "x" * 23 + "… k1=1") and text.endswith("k4=4 +4 more")
    assert spoken_params({}, known) == ""


def judged(project: Path, **more: object) -> tuple[FakeExperiment, dict]:
    fake = FakeExperiment(project / "fake", params={"evaluate": {"bootstrap": 200}}, **more)
    return fake, evaluation.evaluate(fake.config, fake.folders, fake.splits, None, fake.root / "reports/evaluate")


def test_evaluation__names_describes_and_gives_every_fold_a_child(project: Path) -> None:
    _, metrics = judged(project)
    own = config(methods__ucl__temperature=0.2)
    with open_tracker(own, "evaluate") as tracker:
        log_execution(tracker, metrics)
    log_folds(own, metrics)
    parent, stage, *folds = runs(project)
    value, low, high = (metrics[f"balanced_accuracy{end}"] for end in ("", "_low", "_high"))
    assert parent.info.run_name == f"{value:.2f} ({low:.2f}–{high:.2f}) ucl temperature=0.2"
    assert stage.info.run_name == "evaluate"
    assert [run.info.run_name for run in folds] == ["evaluate fold 0", "evaluate fold 1", "evaluate fold 2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in folds} == {parent.info.run_id}
    for run in folds:
        fold = metrics["pretrained"]["folds"][run.info.run_name[-1]]
        assert run.data.metrics["balanced_accuracy"] == round(fold["balanced_accuracy"], 4)
    note = parent.data.tags["mlflow.note.content"]
    assert f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts/report.html" in note
    assert metrics["headline"] in note and note.count("\n| ") == 4
    assert min(parent.data.metrics) == "balanced_accuracy", "MLflow's comparison starts with the first of the alphabet"


def test_parent__has_few_numbers_and_none_of_another_initialisation(project: Path) -> None:
    _, metrics = judged(project)
    metrics["headline_parts"] = {"calibration.pretrained.ece": 0.1, "calibration.random.ece": 0.2, "subgroups.clearly_worse": 0.0}
    flat = parent_metrics(metrics)
    assert "calibration.random.ece" not in flat and {"calibration.pretrained.ece", "subgroups.clearly_worse"} <= set(flat)
    assert len(flat) <= 15 and {"balanced_accuracy", "balanced_accuracy_low", "pretraining_gain", "macro_auroc"} <= set(flat)


def test_words__without_interval_gain_or_clean_protocol(project: Path) -> None:
    _, metrics = judged(project, patients=6, skill={"pretrained": 9.0})
    assert metrics["balanced_accuracy_low"] is None
    assert run_name("ucl", metrics) == "1.00 ucl"
    assert run_name("ucl", {**metrics, "stamp": "optimistic (selected on test)"}) == "1.00 ! ucl"
    assert "without pretraining" not in description(metrics)
    assert "pretraining_gain" not in parent_metrics(metrics)


def test_repeats__every_fold_of_every_repeat_gets_a_child(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, metrics = judged(project)
    seen: list[str] = []

    def opened(config: Config, stage: str, item: str) -> NullTracker:
        seen.append(item)
        return NullTracker(stage, item)

    monkeypatch.setattr(records, "open_tracker", opened)
    for init in ("pretrained", "random"):
        metrics[init]["folds"] = {str(i): metrics[init]["folds"]["0"] for i in range(25)}
    log_folds(config(), metrics | {"folds": 5, "repeats": 5})
    assert len(seen) == 25 and [seen[0], seen[9], seen[24]] == ["fold 0, repeat 0", "fold 9, repeat 1", "fold 24, repeat 4"]


def test_many_folds__get_no_children_and_that_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, metrics = judged(project)
    metrics["pretrained"]["folds"] = {str(i): metrics["pretrained"]["folds"]["0"] for i in range(101)}
    log_folds(config(), metrics)
    assert not (project / ".tracking").exists()
    assert "101 folds get no runs of their own in MLflow" in capsys.readouterr().out


# the prepared view


def test_view__columns_and_charts_of_what_differs() -> None:
    found = [{"a": "1", "b": "x", "c": "1"}, {"a": "2", "b": "x", "c": "1"}, {"a": "3", "b": "x", "c": "2"}, {"a": "1", "b": "x"}]
    assert differing_params(found) == ["a", "c"], "those with most values first; a missing one is a value"
    state = view_state(differing_params(found))
    assert "params.`a`" in state["selectedColumns"] and "params.`b`" not in state["selectedColumns"]
    kinds = {chart["type"]: chart for chart in state["compareRunCharts"]}
    assert kinds["PARALLEL"]["selectedParams"] == ["a", "c"] and kinds["BAR"]["metricKey"] == "balanced_accuracy"
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {section["uuid"] for section in state["compareRunSections"]}
    assert [chart["type"] for chart in view_state([])["compareRunCharts"]] == ["BAR"]


def test_view__is_a_tag_of_the_experiment(project: Path) -> None:
    uri = f"sqlite:///{project / 'mlflow.db'}"
    assert prepare_view(uri, "sonoscope") == {}
    _, metrics = judged(project)
    for temperature in (0.1, 0.2):
        with open_tracker(config(methods__ucl__temperature=temperature), "evaluate") as tracker:
            log_execution(tracker, metrics)
    places = prepare_view(uri, "sonoscope")
    assert f"viewStateShareKey={VIEW}" in places["table"] and "compareRunsMode=CHART" in places["charts"]
    assert places["compare"].count("%22%2C%22") == 1
    from mlflow.tracking import MlflowClient

    tags = MlflowClient(uri).get_experiment_by_name("sonoscope").tags
    state = json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])
    assert state["compareRunCharts"][0]["selectedParams"] == ["methods.ucl.temperature"]
    assert state["searchFilter"] == "tags.`sonoscope.level` = 'execution'"
