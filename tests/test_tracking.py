"""MLflow tracking: two levels, nothing lost when the store is away, nothing that identifies, never in the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.errors import TrackingError
from pipeline.tracking import NullTracker, link_skipped, open_tracker, sync
from pipeline.tracking_context import execution_facts, flatten, readable, slug

REPOSITORY = Path(__file__).resolve().parents[1]
SECRET_FOLDER = "/clinic/ward7/Anna_Meyer"
SECRET_KEY = "k3y-of-the-hospital"


def make_config(**tracking: object) -> Config:
    return Config.model_validate(
        {
            "data": {"source": SECRET_FOLDER, "pseudonym_key": SECRET_KEY, "include": {"name": ["Anna Meyer"]},
                     "extra_sources": {"more": {"path": "/clinic/more_patients"}}},
            "extract": {"mask": {"review": "reviews/Anna_Meyer.csv"}},
            "split": {"file": "/clinic/own_split.json"},
            "pretrain": {"init": "/clinic/weights/start.safetensors"},
            "methods": {"ucl": {"temperature": 0.07}, "other": {"momentum": 0.5}},
            "tracking": {"flush_seconds": 0.05, **tracking},
        }
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder that is the current directory, with an empty store."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr("pipeline.tracking_store.SQLITE_WAIT_SECONDS", 0.2)
    for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def client(root: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path) -> list:
    """All runs, parents first, then by start."""
    store = client(root)
    experiment = store.get_experiment_by_name("sonoscope")
    found = store.search_runs([experiment.experiment_id]) if experiment else []
    return sorted(found, key=lambda run: ("mlflow.parentRunId" in run.data.tags, run.info.start_time))


def journals(root: Path) -> list[Path]:
    return sorted((root / ".tracking").glob("*.jsonl"))


def test_levels__one_parent_and_named_children(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "tepid-gibe")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "abc123")
    config = make_config()
    with open_tracker(config, "split", fingerprint="f1") as tracker:
        tracker.log_parent_metrics({"balance": 0.5})
    with open_tracker(config, "finetune", "pretrained-fold0-seed1") as second:
        second.log_dataset("main", "d" * 64, 12, "training")
        assert second.flush()
        assert second.parent_id == tracker.parent_id != ""
    parent, split, finetune = runs(root)
    assert [run.info.run_name for run in (parent, split, finetune)] == [
        "ucl from weights file tepid-gibe", "split", "finetune pretrained fold 0 seed 1"]  # fmt: skip
    assert split.data.tags["mlflow.parentRunId"] == finetune.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["dvc.experiment"] == "tepid-gibe" and parent.data.tags["dvc.baseline"] == "abc123"
    assert parent.data.tags["method"] == "ucl from weights file" and parent.data.tags["scope"] == "fold"
    assert split.data.tags["fingerprint"] == "f1" and "env.python" in split.data.tags
    assert parent.data.params["methods.ucl.temperature"] == "0.07" and "finetune.epochs" in parent.data.params
    assert not [key for key in parent.data.params if key.startswith(("methods.other", "tracking", "launch"))]
    assert set(split.data.params) and all(key.startswith("split.") for key in split.data.params)
    assert parent.data.metrics["balance"] == 0.5 and split.data.metrics["stage_seconds"] >= 0
    assert {run.info.status for run in (parent, split, finetune)} == {"FINISHED"}
    assert [given.dataset.name for given in parent.inputs.dataset_inputs] == ["main"]
    assert journals(root) == []


def test_execution__other_parameters_another_parent_but_launch_does_not_count(root: Path) -> None:
    first = make_config()
    configs = (
        first,
        first.model_copy(update={"finetune": first.finetune.model_copy(update={"epochs": 3})}),
        first.model_copy(update={"launch": first.launch.model_copy(update={"processes": 2})}),
        first.model_copy(update={"data": first.data.model_copy(update={"pseudonym_key": "another"})}),
    )
    keys = [open_tracker(config, "split").execution for config in configs]
    assert keys[0] == keys[2] == keys[3] != keys[1]


def test_execution__is_named_by_what_it_starts_from(root: Path) -> None:
    config = make_config()
    imagenet = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"method": "random", "init": "imagenet"})})
    facts = execution_facts(imagenet)
    assert facts.name.startswith("imagenet ")
    assert facts.tags["method"] == "imagenet"
    assert execution_facts(config).tags["method"] == "ucl from weights file"


def test_metrics__in_order_with_steps_and_without_nan(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(make_config(), "pretrain", "fold 0") as tracker:
        for step in range(2500):
            tracker.log_metrics({"loss": 100.0 - step, "lr": float("nan") if step % 1000 == 7 else 0.1}, step=step)
        tracker.log_metrics({"loss": float("inf")}, step=2500)
    run = runs(root)[1]
    history = client(root).get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in sorted(history, key=lambda point: point.step)] == [
        (step, 100.0 - step) for step in range(2500)]  # fmt: skip
    stamps = [point.timestamp for point in sorted(history, key=lambda point: point.step)]
    assert stamps == sorted(stamps) and stamps[0] >= run.info.start_time
    assert run.data.tags["left_out"] == "loss (1), lr (3)"
    assert capsys.readouterr().err.count("no finite numbers") == 1


def test_log_calls__take_microseconds(root: Path) -> None:
    with open_tracker(make_config(flush_seconds=60), "pretrain") as tracker:
        start = time.perf_counter()
        for step in range(1000):
            tracker.log_metrics({"loss": 1.0, "lr": 0.1}, step=step)
        assert (time.perf_counter() - start) / 1000 < 0.001


def test_status__failed_keeps_the_class_and_not_the_message(root: Path) -> None:
    with pytest.raises(ValueError, match="Anna"):
        with open_tracker(make_config(), "extract"):
            raise ValueError("Anna Meyer.avi is broken")
    with pytest.raises(SystemExit):
        with open_tracker(make_config(), "split"):
            sys.exit(2)
    assert runs(root)[2].info.status == "FAILED"
    parent, run, _ = runs(root)
    assert (parent.info.status, run.info.status) == ("FAILED", "FAILED")
    assert run.data.tags["failed.with"] == "ValueError"
    assert b"Anna" not in (root / "mlflow.db").read_bytes()


def test_restart__a_killed_stage_continues_its_run_and_a_finished_one_gets_another(root: Path) -> None:
    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        with open_tracker(config, "pretrain", "fold 0") as tracker:
            tracker.log_metrics({"loss": 2.0}, step=1)
            raise KeyboardInterrupt
    assert [run.info.status for run in runs(root)] == ["KILLED", "KILLED"]
    with open_tracker(config, "pretrain", "fold 0") as tracker:
        tracker.log_metrics({"loss": 1.0}, step=2)
    parent, run = runs(root)
    assert (parent.info.status, run.info.status) == ("FINISHED", "FINISHED")
    assert sorted(point.step for point in client(root).get_metric_history(run.info.run_id, "loss")) == [1, 2]
    with open_tracker(config, "pretrain", "fold 0"):
        pass
    assert [run.info.run_name for run in runs(root)][1:] == ["pretrain fold 0", "pretrain fold 0 (again)"]


PROCESS = """
import sys, time
from pathlib import Path
from pipeline.config import Config
from pipeline.tracking import open_tracker
config = Config.model_validate({"methods": {"ucl": {}}, "tracking": {"flush_seconds": 0.05}})
with open_tracker(config, sys.argv[1]) as tracker:
    tracker.log_metrics({"loss": 1.0}, step=3)
    tracker.flush()
    Path("ready-" + sys.argv[1]).touch()
    time.sleep(60)
"""


def start(stage: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", PROCESS, stage], env=environment)


def test_processes__started_together_share_one_parent_and_end_as_killed(root: Path) -> None:
    (root / "mlflow.db").unlink()  # Creating the store is part of the race.
    processes = {stage: start(stage) for stage in ("extract", "split")}
    deadline = time.monotonic() + 60
    while not all((root / f"ready-{stage}").exists() for stage in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent, *children = runs(root)
    assert sorted(run.info.run_name for run in children) == ["extract", "split"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sync(root)["in_use"] == 2
    processes["extract"].send_signal(signal.SIGTERM)
    processes["split"].kill()
    assert processes["extract"].wait(30) == 143 and processes["split"].wait(30) == -9
    status = {run.info.run_name: run.info.status for run in runs(root)[1:]}
    assert status == {"extract": "KILLED", "split": "RUNNING"}
    assert sync(root)["runs"] == 1
    assert {run.info.status for run in runs(root)[1:]} == {"KILLED"}


def train_while_away(root: Path, config: Config) -> float:
    """A loop that logs into a store that is away; returns the seconds it took."""
    (root / "curve.txt").write_text("old content")
    begin = time.monotonic()
    with open_tracker(config, "pretrain", "fold 0") as tracker:
        for step in range(50):
            tracker.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
        tracker.log_artifact(root / "curve.txt", "curves")
        time.sleep(0.3)
        tracker.write_sidecar(root / "reports/runs/pretrain-fold0.json")
    (root / "curve.txt").unlink()
    return time.monotonic() - begin


def assert_all_arrived(root: Path) -> None:
    parent, run = runs(root)
    assert len(client(root).get_metric_history(run.info.run_id, "loss")) == 50
    assert run.info.status == parent.info.status == "FINISHED"
    assert (root / f"mlartifacts/{run.info.run_id}/artifacts/curves/curve.txt").read_text() == "old content"
    assert journals(root) == [] and not list((root / ".tracking/files").glob("*"))


def test_locked_store__the_loop_ends_in_time_and_sync_delivers_once(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert train_while_away(root, make_config()) < 10
    assert capsys.readouterr().err.count("sonoscope sync") == 1
    assert len(journals(root)) == 1
    with pytest.raises(TrackingError, match="1 journal"):
        sync(root)
    other.execute("ROLLBACK")
    other.close()
    ended = json.loads(journals(root)[0].read_text().splitlines()[-1])["t"]
    assert sync(root)["events"] > 50
    assert runs(root)[1].info.end_time == ended
    assert_all_arrived(root)
    assert sync(root) == {"runs": 0, "events": 0, "in_use": 0, "refused": 0}


def test_lock_midway__what_came_before_and_after_ends_in_one_run(root: Path) -> None:
    other = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    with open_tracker(make_config(), "pretrain") as tracker:
        tracker.log_metrics({"loss": 3.0}, step=0)
        assert tracker.flush()
        other.execute("BEGIN EXCLUSIVE")
        tracker.log_metrics({"loss": 2.0}, step=1)
        assert not tracker.flush()
        tracker.log_metrics({"loss": 1.0}, step=2)
    other.execute("ROLLBACK")
    other.close()
    assert sync(root)["runs"] == 1
    parent, run = runs(root)
    assert [point.value for point in client(root).get_metric_history(run.info.run_id, "loss")] == [3.0, 2.0, 1.0]
    assert run.info.status == parent.info.status == "FINISHED"


@pytest.mark.parametrize("server", ["closed", "silent"])
def test_unreachable_server__the_loop_ends_in_time_and_sync_delivers_elsewhere(
    root: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "silent":
            listener.listen(8)
        assert train_while_away(root, make_config(uri=f"http://127.0.0.1:{listener.getsockname()[1]}")) < 15
    assert json.loads((root / "reports/runs/pretrain-fold0.json").read_text())["run_id"] == ""
    sync(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    assert_all_arrived(root)


def test_delivery__a_journal_sent_twice_makes_no_second_run_or_point(root: Path, tmp_path: Path) -> None:
    train_while_away(root, make_config(uri="file:///nowhere"))
    copy = {path: path.read_bytes() for path in journals(root)}
    sync(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    for path, content in copy.items():
        path.write_bytes(b"".join(line for line in content.splitlines(True) if b'"op":"artifact"' not in line))
    sync(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    assert_all_arrived(root)


def test_parameters__long_values_are_cut_and_changes_become_tags(root: Path) -> None:
    with open_tracker(make_config(), "split") as tracker:
        tracker.log_params({"long": "x" * 9000, "nested": {"a": [1, 2], "odd key!": None}, "seed": 1})
        tracker.log_params({"seed": 1})
        tracker.log_params({"seed": 2})
        tracker.log_metrics({"a//../b*": 1.0})
        tracker.set_tags({"after": "still delivered"})
    run = runs(root)[1]
    assert len(run.data.params["long"]) == 6000 and run.data.params["long"].endswith("(cut from 9000 characters)")
    assert run.data.params["nested.a"] == "[1, 2]" and run.data.params["nested.odd key_"] == "null"
    assert run.data.params["seed"] == "1" and run.data.tags["changed.seed"] == "2"
    assert run.data.metrics["a/b_"] == 1.0 and run.data.tags["after"] == "still delivered"


def test_store__holds_nothing_that_identifies(root: Path) -> None:
    (root / "note.txt").write_text("fine")
    for stage in ("extract", "split", "pretrain"):
        with open_tracker(make_config(), stage) as tracker:
            tracker.log_params({"data": {"source": SECRET_FOLDER}, "where": f"{SECRET_FOLDER}/video.avi"})
            tracker.log_params({"extract": make_config().extract.model_dump(mode="json")})
            tracker.log_dataset("main", "abc", 3, "training")
            tracker.log_artifact(root / "note.txt")
    content = (root / "mlflow.db").read_bytes()
    for secret in ("Anna", "clinic", SECRET_KEY, "Meyer", "more_patients", "own_split"):
        assert secret.encode() not in content, secret
    assert b"start.safetensors" in content


def test_import__neither_mlflow_nor_torch(root: Path) -> None:
    code = "import sys, pipeline.tracking; print([m for m in ('mlflow', 'torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_null_tracker__other_ranks_write_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with open_tracker(make_config(), "pretrain") as tracker:
        tracker.log_metrics({"loss": 1.0})
        tracker.write_sidecar(root / "side.json")
    assert type(tracker) is NullTracker and not (root / "side.json").exists() and not (root / ".tracking").exists()
    with open_tracker(make_config(enabled=False), "pretrain", rank=0) as tracker:
        tracker.write_sidecar(root / "side.json", videos=3)
    assert json.loads((root / "side.json").read_text())["videos"] == 3


def test_journal__a_folder_that_cannot_be_written_is_no_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".tracking").write_text("a file in the way")
    with open_tracker(make_config(), "split") as tracker:
        tracker.log_metrics({"loss": 1.0})
        tracker.log_artifact(root / "absent.txt")
        tracker.write_sidecar(root / "side.json")
    assert "not tracked" in capsys.readouterr().err and (root / "side.json").exists()


def test_refused__one_bad_event_does_not_hold_up_the_others(root: Path) -> None:
    (root / "gone.txt").write_text("x")
    with open_tracker(make_config(flush_seconds=60), "split") as tracker:
        tracker.log_artifact(root / "gone.txt")
        shutil.rmtree(root / ".tracking/files")
        tracker.log_metrics({"loss": 1.0})
    assert runs(root)[1].data.metrics["loss"] == 1.0 and runs(root)[1].info.status == "FINISHED"
    assert "gone.txt" in journals(root)[0].read_text()
    assert sync(root)["refused"] == 1


def test_link_skipped__names_the_old_run_and_repeats_its_metrics(root: Path) -> None:
    old = make_config()
    with open_tracker(old, "pretrain", "fold 0", fingerprint="f") as pretrain:
        pretrain.log_metrics({"knn": 0.4}, step=1)
        pretrain.log_metrics({"knn": 0.8}, step=2)
        pretrain.write_sidecar(Path("reports/runs/pretrain-fold0.json"))
    new = old.model_copy(update={"finetune": old.finetune.model_copy(update={"epochs": 3})})
    with open_tracker(new, "finetune", "random fold 0 seed 0") as finetune:
        finetune.write_sidecar(Path("reports/runs/finetune.json"))
    Path("reports/runs/broken.json").write_text("{")
    with open_tracker(new, "evaluate") as tracker:
        rows = link_skipped(tracker)
    assert [(row["stage"], row["item"], row["linked"]) for row in rows] == [
        ("finetune", "random fold 0 seed 0", False), ("pretrain", "fold 0", True)]  # fmt: skip
    parent = client(root).get_run(tracker.parent_id)
    assert parent.info.run_id != rows[1]["parent_id"]
    assert parent.data.tags["linked.pretrain-fold-0"] == rows[1]["run_id"] == pretrain.run_id != ""
    assert not [name for name in parent.data.metrics if name.startswith("linked")], "the table of parents stays readable"


def test_empty_folder__is_an_artifact_without_trouble(root: Path) -> None:
    (root / "empty").mkdir()
    with open_tracker(make_config(), "extract") as tracker:
        tracker.log_artifact(root / "empty")
        tracker.status = "KILLED"
    assert journals(root) == [] and runs(root)[1].info.status == "KILLED"


def test_names__items_in_both_spellings() -> None:
    assert readable("pretrained-seed0-fold12") == readable("pretrained seed 0 fold 12") == "pretrained seed 0 fold 12"
    assert slug("finetune-random fold 0") == "finetune-random-fold-0"
    assert flatten({"data": {"source": "x", "group": "patient"}, "p": "C:\\data\\x"}) == {
        "data.group": "patient", "p": "(path left out)"}  # fmt: skip
