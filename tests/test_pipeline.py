"""The whole pipeline under DVC: what runs, what is skipped, experiments that never meet, MLflow's table, and a killed run.

Two projects run side by side: one is left alone and varied by experiments; the other is killed while it pretrains, started
again, and pretrained on everything. On two idle cores all of it takes two to three minutes.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from scratch_project import environment, make_project, run, set_params

from pipeline.export.facts import about, find_weights

TEMPERATURES = {"0.07", "0.1", "0.05", "0.2"}
PATIENCE = 900
"""Seconds after which a queue that has not finished is a failure."""


@dataclass
class Story:
    """A project's folder and what was seen on the way, by name of the event."""

    folder: Path
    seen: dict[str, Any] = field(default_factory=dict)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old, text.count(old))
    path.write_text(text.replace(old, new), encoding="utf-8")


def _ran(output: str) -> list[str]:
    """Names of the stages a `dvc repro` or `dvc exp run` really ran, without the check that any parameter repeats."""
    return [name for name in re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE) if name != "check"]


def _outcome(folder: Path) -> dict[str, Any]:
    """What the last run left in the project; read at once, because the next run replaces it."""
    reports = folder / "reports" / "evaluate"
    return {
        "metrics": _json(reports / "metrics.json"),
        "details": _json(reports / "details.json"),
        "report": (reports / "report.html").read_text(encoding="utf-8"),
        "cards": {path.parent.name: _json(path) for path in sorted(folder.glob("models/*/*/card.json"))},
        "encoders": {path.parent.name: path.read_bytes() for path in folder.glob("models/encoders/*/encoder.safetensors")},
        "sidecars": {path.stem: _json(path) for path in folder.glob("reports/runs/*.json")},
    }


def _wait_for_queue(folder: Path) -> str:
    """Start the queue's worker, wait until nothing is queued or running, and return the last `dvc queue status`."""
    # The worker stays in the background and keeps its output open: a pipe would never end.
    with open(folder.parent / "worker.txt", "wb") as log:
        subprocess.run(["dvc", "queue", "start"], cwd=folder, env=environment(), stdout=log, stderr=log, check=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(3)
        status = run(folder, "dvc", "queue", "status").stdout
        if not re.search(r"\b(Queued|Running)\b", status):
            return status
    run(folder, "dvc", "queue", "stop", "--kill", check=False)
    raise AssertionError(f"the queue has not finished\n{status}")


def _vary(folder: Path) -> Story:
    """Run all, look at what edits would re-run, then one experiment and a grid of two."""
    story = Story(make_project(folder, {}))
    story.seen["first"] = run(folder, "dvc", "repro").stdout
    story.seen["outcome"] = _outcome(folder)
    story.seen["card"] = about(find_weights(folder / "models/finetuned/pretrained-seed0-fold0"))["metrics"]
    with open(folder / "reports/evaluate/predictions.csv", encoding="utf-8", newline="") as handle:
        story.seen["predictions"] = list(csv.DictReader(handle))
    start = time.monotonic()
    story.seen["second"] = run(folder, "dvc", "repro").stdout
    print(f"dvc repro with nothing to do: {time.monotonic() - start:.1f} s")
    story.seen["git"] = run(folder, "git", "status", "--short").stdout.split()

    params, simclr = folder / "params.yaml", folder / "pipeline" / "methods" / "simclr.py"
    kept = params.read_bytes(), simclr.read_bytes()
    set_params(folder, {"methods.simclr.temperature": 0.9})
    _edit(simclr, "from __future__", "# An idle remark.\nfrom __future__")
    story.seen["after_other_method"] = run(folder, "dvc", "status").stdout
    set_params(folder, {"finetune.optimizer.lr": 0.002})
    story.seen["after_finetune"] = run(folder, "dvc", "status").stdout
    params.write_bytes(kept[0])
    simclr.write_bytes(kept[1])

    # One initialisation is enough here, and half the work.
    fewer = ("-S", "finetune.initialisations=[pretrained]")
    story.seen["experiment"] = run(folder, "dvc", "exp", "run", "-n", "warm", "-S", "methods.ucl.temperature=0.1", *fewer).stdout
    story.seen["experiment_cards"] = _outcome(folder)["cards"]
    run(folder, "dvc", "exp", "run", "--queue", "-S", "methods.ucl.temperature=0.05,0.2", *fewer)
    story.seen["queue"] = _wait_for_queue(folder)
    story.seen["mistyped"] = run(folder, "dvc", "exp", "run", "--temp", "-S", "pretrain.method=ulc", check=False).stdout
    return story


def _kill_at_first_checkpoint(folder: Path) -> None:
    """Start `dvc repro` and end all of its processes without warning as soon as pretraining has saved something."""
    with open(folder.parent / "killed.txt", "wb") as log:
        child = subprocess.Popen(["dvc", "repro"], cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True)
    while not list(folder.glob(".scratch/pretrain/*/state-*.pt")):
        assert child.poll() is None, (folder.parent / "killed.txt").read_text()
        time.sleep(0.005)
    family = [child.pid, *(process.pid for process in psutil.Process(child.pid).children(recursive=True))]
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=10)
    survivors = [pid for pid in family if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not survivors, "a stage outlives the group of `dvc repro`"


def _kill_and_widen(folder: Path) -> Story:
    """Kill the first pretraining, start again, then pretrain on everything, test patients included."""
    # Saved after every step, so that the kill lands in the middle; neither changes a result.
    story = Story(make_project(folder, {"pretrain.checkpoint_seconds": 0, "finetune.initialisations": ["pretrained"]}))
    _kill_at_first_checkpoint(folder)
    story.seen["results_after_kill"] = list(folder.glob(".scratch/pretrain/*/result"))
    story.seen["again"] = run(folder, "dvc", "repro", "pretrain").stdout
    story.seen["encoders"] = {path.parent.name: path.read_bytes() for path in folder.glob("models/encoders/*/encoder.safetensors")}
    story.seen["checkpoints"] = list(folder.glob(".scratch/pretrain/*/state-*"))
    story.seen["all"] = run(folder, "dvc", "exp", "run", "-n", "everything", "-S", "pretrain.scope=all").stdout
    story.seen["outcome"] = _outcome(folder)
    return story


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Story]]]:
    """Both projects at work; a test waits for the one it asks about."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            "varied": pool.submit(_vary, tmp_path_factory.mktemp("varied") / "project"),
            "killed": pool.submit(_kill_and_widen, tmp_path_factory.mktemp("killed") / "project"),
        }


@pytest.fixture(scope="module")
def varied(stories: dict[str, Future[Story]]) -> Story:
    return stories["varied"].result()


@pytest.fixture(scope="module")
def killed(stories: dict[str, Future[Story]]) -> Story:
    return stories["killed"].result()


@pytest.fixture(scope="module")
def runs(varied: Story) -> list[Any]:
    """All MLflow runs of the first project, from its own store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{varied.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sonoscope")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def _parents(runs: list[Any]) -> list[Any]:
    return [one for one in runs if "mlflow.parentRunId" not in one.data.tags]


def _children(runs: list[Any], parent: Any) -> list[Any]:
    return [one for one in runs if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


# --- one run ---------------------------------------------------------------------------------------------------------

ITEMS = [f"{init}-seed0-fold{fold}" for init in ("pretrained", "random") for fold in (0, 1)]


def test_repro__runs_every_stage_once(varied: Story) -> None:
    ran = _ran(varied.seen["first"])
    finetune = [f"finetune@{init}-0-{fold}" for init in ("pretrained", "random") for fold in (0, 1)]
    assert sorted(ran) == sorted(["phantom", "extract", "split", "pretrain@0", "pretrain@1", *finetune, "evaluate"])


def test_repro__metrics_and_predictions_cover_all_folds(varied: Story) -> None:
    outcome = varied.seen["outcome"]
    low, value, high = (outcome["metrics"][f"balanced_accuracy{end}"] for end in ("_low", "", "_high"))
    # So few patients may all be judged alike, and then there is no interval.
    assert 0 <= value <= 1 and (low is None or 0 <= low <= value <= high <= 1)
    assert outcome["metrics"]["stamp"] == "none" and outcome["metrics"]["patients"] == 8
    assert outcome["details"]["headline"].startswith("Balanced accuracy per video")
    rows = varied.seen["predictions"]
    assert {(row["init"], row["fold"]) for row in rows} == {(init, fold) for init in ("pretrained", "random") for fold in "01"}
    for init in ("pretrained", "random"):
        assert len({row["patient"] for row in rows if row["init"] == init}) == 8, "every patient is tested once"
    assert {name for name in outcome["cards"] if "seed" in name} == set(ITEMS)


def test_repro__encoders_never_saw_the_test_patients(varied: Story) -> None:
    cards = varied.seen["outcome"]["cards"]
    for fold in (0, 1):
        test = set(cards[f"pretrained-seed0-fold{fold}"]["test_groups"])
        assert test and not test & set(cards[f"fold{fold}"]["groups"])
    assert cards["fold0"]["fingerprint"] != cards["fold1"]["fingerprint"]


def test_repro__report_is_one_self_contained_file(varied: Story) -> None:
    report = varied.seen["outcome"]["report"]
    assert "Balanced accuracy" in report and "synthetic phantoms" in report
    fetched = re.findall(r"""(?:src|href|data|action|poster)\s*=\s*["']?([^"'\s>]+)|url\(["']?([^"')]+)""", report)
    outside = [a or b for a, b in fetched if not (a or b).startswith(("data:", "#"))]
    links = [target for target in outside if not re.search(rf'<a [^>]*href="{re.escape(target)}"', report)]
    assert not links and "<script" not in report and "<link" not in report and "@import" not in report


def test_repro__every_stage_leaves_its_sidecar(varied: Story) -> None:
    sidecars = varied.seen["outcome"]["sidecars"]
    assert set(sidecars) == {
        "extract", "split", "pretrain-fold0", "pretrain-fold1", *(f"finetune-{item}" for item in ITEMS), "evaluate",
    }
    assert all(one["run_id"] for one in sidecars.values())
    assert len({one["parent_id"] for one in sidecars.values()}) == 1


def test_repro__a_second_time_runs_nothing_and_leaves_git_clean(varied: Story) -> None:
    assert _ran(varied.seen["second"]) == [] and "up to date" in varied.seen["second"]
    assert varied.seen["git"] in ([], ["??", "dvc.lock"], ["M", "dvc.lock"])


def test_repro__another_methods_file_and_parameters_change_nothing(varied: Story) -> None:
    changed = re.findall(r"^(\S+):$", varied.seen["after_other_method"], re.MULTILINE)
    assert set(changed) <= {"check"}, "a changed parameter is checked, and repeats nothing that does not use it"


def test_repro__a_finetuning_parameter_repeats_no_pretraining(varied: Story) -> None:
    changed = re.findall(r"^(\S+):$", varied.seen["after_finetune"], re.MULTILINE)
    assert {name.split("@")[0] for name in changed} == {"check", "finetune", "evaluate"}


# --- MLflow and experiments ------------------------------------------------------------------------------------------


def test_mlflow__one_parent_with_the_result_and_a_child_for_each_stage_and_fold(varied: Story, runs: list[Any]) -> None:
    (parent,) = [one for one in _parents(runs) if one.info.run_id == varied.seen["outcome"]["sidecars"]["split"]["parent_id"]]
    outcome = varied.seen["outcome"]["metrics"]
    assert parent.data.metrics["balanced_accuracy"] == pytest.approx(outcome["balanced_accuracy"], abs=5e-5)
    assert "pretrained.video.accuracy" not in parent.data.metrics and " ucl " in parent.info.run_name
    assert parent.data.params["methods.ucl.temperature"] == "0.07" and parent.data.params["split.folds"] == "[0, 1]"
    assert not [key for key in parent.data.params if key.startswith(("methods.simclr", "data.source", "tracking", "launch"))]
    names = sorted(one.info.run_name for one in _children(runs, parent))
    assert names == sorted(
        ["extract", "split", "pretrain fold 0", "pretrain fold 1", "evaluate", "evaluate fold 0", "evaluate fold 1"]
        + [f"finetune {init} fold {fold} seed 0" for init in ("pretrained", "random") for fold in (0, 1)]
    )
    assert {one.info.status for one in [parent, *_children(runs, parent)]} == {"FINISHED"}
    losses = [one.data.metrics.get("loss") for one in _children(runs, parent) if one.data.tags["stage"] == "pretrain"]
    assert len(losses) == 2 and None not in losses


def test_experiments__an_inline_one_repeats_only_what_depends_on_it(varied: Story) -> None:
    ran = _ran(varied.seen["experiment"])
    assert set(ran) == {"pretrain@0", "pretrain@1", "finetune@pretrained-0-0", "finetune@pretrained-0-1", "evaluate"}


def test_experiments__the_queue_runs_the_grid(varied: Story) -> None:
    status = varied.seen["queue"]
    assert len(re.findall(r"\bSuccess\b", status)) == 2 and "Failed" not in status, status


def test_experiments__a_mistyped_method_is_told_by_the_check(varied: Story) -> None:
    assert "unknown method 'ulc'" in varied.seen["mistyped"] and "Did you mean 'ucl'?" in varied.seen["mistyped"]


def test_card__of_exported_weights_has_the_report_s_numbers(varied: Story) -> None:
    block = varied.seen["outcome"]["details"]["pretrained"]["video"]
    assert varied.seen["card"]["values"]["balanced_accuracy_low"] == block["balanced_accuracy_low"]


def test_experiments__share_no_checkpoint(varied: Story) -> None:
    """Two folds and four temperatures: eight encoders, each with a fingerprint and a scratch folder of its own."""
    import dvc.api

    cards = [varied.seen["outcome"]["cards"][name] for name in ("fold0", "fold1")]
    cards += [varied.seen["experiment_cards"][name] for name in ("fold0", "fold1")]
    names = run(varied.folder, "dvc", "exp", "list", "--name-only").stdout.split()
    assert "warm" in names and len(names) == 3
    for name in set(names) - {"warm"}:
        for fold in (0, 1):
            text = dvc.api.read(f"models/encoders/fold{fold}/card.json", repo=str(varied.folder), rev=f"refs/exps/{_ref(varied, name)}")
            cards.append(json.loads(text))
    assert len({card["fingerprint"] for card in cards}) == 8
    assert {str(card["parameters"]["temperature"]) for card in cards} == TEMPERATURES
    scratch = {path.parents[1].name: _json(path) for path in varied.folder.glob(".scratch/pretrain/*/result/card.json")}
    assert set(scratch) == {card["fingerprint"] for card in cards}
    assert not list(varied.folder.glob(".scratch/pretrain/*/state-*")), "checkpoints are removed once their result is there"


def _ref(story: Story, name: str) -> str:
    """The part of an experiment's git reference behind refs/exps/."""
    refs = run(story.folder, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    (found,) = [ref for ref in refs if ref.endswith(f"/{name}")]
    return found.removeprefix("refs/exps/")


def test_experiments__one_parent_each_with_its_own_temperature(varied: Story, runs: list[Any]) -> None:
    parents = _parents(runs)
    assert sorted(parent.data.params["methods.ucl.temperature"] for parent in parents) == sorted(TEMPERATURES)
    for parent in parents:
        assert "balanced_accuracy" in parent.data.metrics
        stages = {one.data.tags["stage"] for one in _children(runs, parent)}
        assert {"pretrain", "finetune", "evaluate"} <= stages
    names = {parent.data.tags["dvc.experiment"] for parent in parents}
    assert len(names) == 4 and {"workspace", "warm"} <= names
    later = [parent for parent in parents if parent.data.tags["dvc.experiment"] != "workspace"]
    for parent in later:
        assert parent.data.tags["linked.split"] == varied.seen["outcome"]["sidecars"]["split"]["run_id"], "skipped, not lost"


# --- a killed run, and scope: all ------------------------------------------------------------------------------------


def test_killed__continues_and_ends_with_the_same_encoder(varied: Story, killed: Story) -> None:
    assert killed.seen["results_after_kill"] == [], "the kill came too late to prove anything"
    assert set(_ran(killed.seen["again"])) == {"pretrain@0", "pretrain@1"}, "what was finished is kept"
    assert "continuing at epoch" in killed.seen["again"]
    assert killed.seen["encoders"] == varied.seen["outcome"]["encoders"]
    assert killed.seen["checkpoints"] == []


def test_scope_all__is_said_everywhere(killed: Story) -> None:
    outcome = killed.seen["outcome"]
    assert outcome["metrics"]["stamp"] == outcome["metrics"]["pretrained"]["stamp"] == "transductive pretraining"
    assert "transductive" in outcome["details"]["headline"] and "transductive" in outcome["report"]
    for fold in (0, 1):
        card = outcome["cards"][f"fold{fold}"]
        assert card["transductive"] and card["scope"] == "all" and len(card["groups"]) == 8
    # The folds see the same videos, so the second one is the first one's encoder.
    assert outcome["encoders"]["fold0"] == outcome["encoders"]["fold1"]
    assert "finished result reused" in killed.seen["all"]
