"""Deliver the events of a journal to MLflow: read on from the last delivered byte, find or create runs, send batches.

Runs are found by our own tags, so a journal can be delivered by the process that wrote it or days later; delivering an
event twice changes nothing. What a living store refuses is put aside and does not hold up the rest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.files import atomic_write
from pipeline.tracking_journal import FOLDER, file_lock
from pipeline.tracking_model import build_model, put_files

__all__ = ["Deliverer", "cleaned_key", "connect", "default_uri", "resolve_uri"]

MAX_METRICS, MAX_PARAMS, MAX_VALUE, MAX_KEY = 1000, 100, 6000, 250
SQLITE_WAIT_SECONDS = 1.0
LOCK_WAIT_SECONDS = 60.0
REFUSED_AFTER = 3
PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
RUN_KEY, EXECUTION, LEVEL, SESSION = "sonoscope.run", "sonoscope.execution", "sonoscope.level", "sonoscope.session"
# A training process must not hang on a network: MLflow's own defaults are 120 s and 7 tries.
CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def default_uri(root: Path) -> str:
    """The embedded store: SQLite at the project root, absolute, so that queued experiments land in the same file."""
    return f"sqlite:///{(root / 'mlflow.db').resolve().as_posix()}"


def resolve_uri(uri: str | None, root: Path) -> str:
    """`uri` with a relative SQLite path anchored at the project root; the embedded store when there is none."""
    if not uri:
        return default_uri(root)
    path = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else ""
    return f"sqlite:///{(root / path).resolve().as_posix()}" if path and not path.startswith("/") else uri


def cleaned_key(key: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    parts = [part for part in re.sub(r"[^\w\-./ :]", "_", key).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY] or "_"


def connect(uri: str) -> Any:
    """An MLflow client for `uri`. The import takes a second, which is why it happens here and nowhere else."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    # A locked database is logged by MLflow with a traceback each time; the courier gives one line instead.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


class Deliverer:
    """The reading side of one journal: sends what lies behind the last delivered byte.

    `live` says that the run is going on now; a late delivery leaves the state of the parent alone if newer stages set
    it.
    """

    def __init__(self, journal: Path, root: Path, *, live: bool, uri: str | None = None) -> None:
        self.journal, self.root, self.live = journal, root, live
        self._uri = uri
        self._client: Any = None
        self._known: dict[str, dict[str, str]] = {}
        self._state_path = journal.with_suffix(".state")
        self._refused_path = journal.with_suffix(".refused")
        self.state: dict[str, Any] = {"offset": 0, "run": "", "parent": "", "uri": "", "ended": False, "t": 0}
        self.state["failed"] = [0, 0]
        try:
            self.state.update(json.loads(self._state_path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass  # No state, or half of one: deliver again from the start, which changes nothing.
        self.refused = 0

    def deliver(self) -> int:
        """Send everything that is pending; returns the number of events. On an exception, try later."""
        pending = list(self._pending())
        done = 0
        try:
            while done < len(pending):
                self._check_free()
                batch = self._batch(pending, done)
                self._apply_or_refuse([event for _, event in batch], batch[-1][0])
                done += len(batch)
                self.state.update(offset=batch[-1][0], t=batch[-1][1]["t"])
                if any(event["op"] in ("open", "artifact", "model", "end") for _, event in batch):
                    self._save()
                    self._unstage(batch[-1][1])
        finally:
            if pending:
                self._save()
        return done

    def _pending(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(offset behind the line, event) of every complete, readable line that was not delivered."""
        with open(self.journal, "rb") as handle:
            handle.seek(self.state["offset"])
            offset = self.state["offset"]
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # Half a line of a process that was killed while it wrote.
                if isinstance(event, dict) and "op" in event:
                    yield offset, event

    @staticmethod
    def _batch(pending: list[tuple[int, dict[str, Any]]], start: int) -> list[tuple[int, dict[str, Any]]]:
        """The next event, or as many neighbouring metric events of one run as fit in a request."""
        first = pending[start][1]
        end, size = start + 1, len(first.get("metrics", ()))
        while first["op"] == "metrics" and end < len(pending):
            event = pending[end][1]
            size += len(event.get("metrics", ()))
            if event["op"] != "metrics" or event["to"] != first["to"] or size > MAX_METRICS:
                break
            end += 1
        return pending[start:end]

    def _apply_or_refuse(self, events: list[dict[str, Any]], offset: int) -> None:
        """Apply; put aside what the living store will never take, so that one bad event does not hold up the others."""
        try:
            getattr(self, f"_on_{events[0]['op']}")(events)
            self.state["failed"] = [0, 0]
        except Exception as error:
            count = self.state["failed"][1] + 1 if self.state["failed"][0] == offset else 1
            self.state["failed"] = [offset, count]
            code = getattr(error, "error_code", "")
            permanent = code in PERMANENT or isinstance(error, (FileNotFoundError, TypeError))
            if events[0]["op"] == "open" or not (permanent or (count >= REFUSED_AFTER and self._alive())):
                raise
            with open(self._refused_path, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
            self.refused += len(events)

    def _alive(self) -> bool:
        try:
            self._client.search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def _save(self) -> None:
        atomic_write(self._state_path, json.dumps(self.state))

    def _check_free(self) -> None:
        """Raise sqlite3.OperationalError at once when SQLite is locked: MLflow itself would wait 20 s in every call."""
        uri = resolve_uri(self._uri or self.state["uri"], self.root)
        path = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and path.is_file():
            with closing(sqlite3.connect(path, timeout=SQLITE_WAIT_SECONDS, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")

    def _target(self, event: Mapping[str, Any]) -> str:
        return self.state["parent" if event["to"] == "parent" else "run"]

    def client(self) -> Any:
        """The connected client; the first creation of a SQLite store is guarded because its migrations race."""
        if self._client is None:
            with file_lock(self.root / FOLDER / "store.lock", LOCK_WAIT_SECONDS):
                self._client = connect(resolve_uri(self._uri or self.state["uri"], self.root))
                self._client.search_experiments(max_results=1)
        return self._client

    # One method an event kind. Each may be repeated with the same event and then changes nothing.

    def _on_open(self, events: list[dict[str, Any]]) -> None:
        event = events[0]
        self.state["uri"], self.state["ended"] = event["uri"], False
        client = self.client()
        with file_lock(self.root / FOLDER / "create.lock", LOCK_WAIT_SECONDS):
            experiment = self._experiment(event["experiment"])
            parent = self._find(experiment, EXECUTION, event["parent"])
            parent_id = parent.info.run_id if parent else self._create(experiment, event, "parent", {})
            run = self._find(experiment, RUN_KEY, event["run"])
            session = event["run"]["tags"][SESSION]
            again = run is not None and run.info.status == "FINISHED" and run.data.tags.get(SESSION) != session
            if run is None or again:
                # A finished stage that runs again gets a run of its own: two curves in one plot would mislead.
                event = {**event, "run": {**event["run"], "name": event["run"]["name"] + (" (again)" if again else "")}}
                run_id = self._create(experiment, event, "run", {"mlflow.parentRunId": parent_id})
            else:
                run_id = run.info.run_id
                client.set_tag(run_id, SESSION, session)
                if run.data.tags.get(SESSION) != session:
                    client.update_run(run_id, status="RUNNING")
        self.state |= {"parent": parent_id, "run": run_id, "experiment": experiment}
        if self.live:
            client.update_run(parent_id, status="RUNNING")
        client.set_tag(parent_id, "sonoscope.last_stage", event["run"]["name"])
        self._params(parent_id, event["parent"]["params"])
        self._params(run_id, event["run"]["params"])

    def _experiment(self, name: str) -> str:
        client = self.client()
        found = client.get_experiment_by_name(name)
        if found is None:
            local = resolve_uri(self._uri or self.state["uri"], self.root) == default_uri(self.root)
            place = (self.root / "mlartifacts").resolve().as_uri() if local else None
            # The tag opens MLflow's page for model training; without it version 3 shows the one for language models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=place, tags=kind)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _find(self, experiment: str, tag: str, wanted: Mapping[str, Any]) -> Any:
        """The newest run that carries our own key, or None."""
        level, key = wanted["tags"][LEVEL], wanted["tags"][tag]
        query = f"tags.`{tag}` = '{key}' and tags.`{LEVEL}` = '{level}'"
        found = self.client().search_runs([experiment], query, max_results=1, order_by=["attributes.start_time DESC"])
        return found[0] if found else None

    def _create(self, experiment: str, event: Mapping[str, Any], which: str, more: Mapping[str, str]) -> str:
        name, tags = event[which]["name"], {**event[which]["tags"], **more}
        return self.client().create_run(experiment, start_time=event["t"], tags=tags, run_name=name).info.run_id

    def _on_params(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._params(self._target(event), event["params"])

    def _params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log new parameters; equal ones are skipped, a changed one becomes a tag since MLflow refuses the change."""
        from mlflow.entities import Param

        client = self.client()
        if run_id not in self._known:
            self._known[run_id] = dict(client.get_run(run_id).data.params)
        known = self._known[run_id]
        cut = {cleaned_key(key): _cut(value) for key, value in params.items()}
        fresh = [Param(key, value) for key, value in cut.items() if key not in known]
        for start in range(0, len(fresh), MAX_PARAMS):
            client.log_batch(run_id, params=fresh[start : start + MAX_PARAMS])
            known.update((param.key, param.value) for param in fresh[start : start + MAX_PARAMS])
        for key, value in cut.items():
            if known[key] != value:
                client.set_tag(run_id, f"changed.{key}"[:MAX_KEY], value)

    def _on_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        run_id = self._target(events[0])
        batch = [
            Metric(cleaned_key(key), value, event["t"], event["step"])
            for event in events
            for key, value in event["metrics"].items()
        ]
        for start in range(0, len(batch), MAX_METRICS):
            self.client().log_batch(run_id, metrics=batch[start : start + MAX_METRICS])

    def _on_tags(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import RunTag

        run_id = self._target(events[0])
        page = f"#/experiments/{self.state.get('experiment', '0')}/runs/{run_id}/artifacts/"
        texts = {key: value.replace("](report.html)", f"]({page}report.html)") for key, value in events[0]["tags"].items()}
        tags = [RunTag(cleaned_key(key), _cut(value)) for key, value in texts.items()]
        for start in range(0, len(tags), MAX_PARAMS):
            self.client().log_batch(run_id, tags=tags[start : start + MAX_PARAMS])

    def _on_artifact(self, events: list[dict[str, Any]]) -> None:
        event = events[0]
        path, folder = Path(event["path"]), event["folder"] or None
        if not path.exists():
            raise FileNotFoundError(f"artifact {path.name} was removed before it was delivered")
        self.client().log_artifact(self._target(event), str(path), folder)

    def _on_model(self, events: list[dict[str, Any]]) -> None:
        event, run_id = events[0], self._target(events[0])
        weights = Path(event["path"])
        if not weights.exists():
            raise FileNotFoundError(f"model {event['name']}: {weights.name} was removed before it was delivered")
        model = self._logged_model(run_id, event["name"], event["about"])
        if model.status == "READY":
            return
        with tempfile.TemporaryDirectory(dir=event["staged"]) as folder:
            built = Path(folder) / "model"
            build_model(built, event["about"], name=event["name"], run_id=run_id, model_id=model.model_id)
            put_files(built, weights, self.client(), model)
        self.client().finalize_logged_model(model.model_id, "READY")

    def _logged_model(self, run_id: str, name: str, about: Mapping[str, Any]) -> Any:
        """The model of this name of a run, tied to the run; created when there is none."""
        from mlflow.entities import LoggedModelOutput

        client, run = self.client(), self.client().get_run(run_id)
        experiment = run.info.experiment_id
        found = client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{run_id}'", max_results=1)
        if found:
            model = found[0]
        else:
            shown = {"backbone": about["network"]["backbone"], "image_size": about["network"]["image_size"]}
            shown |= {key: about[key] for key in ("head", "fold", "scope", "stamp") if about[key] is not None}
            shown["method"] = about["training"].get("method", "random")
            params, tags = {key: str(value) for key, value in shown.items()}, {"fingerprint": about["fingerprint"]}
            model = client.create_logged_model(experiment, name, run_id, tags, params, about["kind"])
        if model.model_id not in [output.model_id for output in (run.outputs.model_outputs if run.outputs else [])]:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return model

    @staticmethod
    def _unstage(event: Mapping[str, Any]) -> None:
        if event["op"] in ("artifact", "model"):
            shutil.rmtree(event["staged"], ignore_errors=True)

    def _on_dataset(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        event = events[0]
        profile = json.dumps({"num_rows": event["rows"]})
        dataset = Dataset(event["name"], event["digest"][:36], "code", '{"tags": {}}', profile=profile)
        tags = [InputTag("mlflow.data.context", event["context"])]
        for run_id in (self.state["run"], self.state["parent"]):
            self.client().log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])

    def _on_end(self, events: list[dict[str, Any]]) -> None:
        event = events[0]
        client = self.client()
        client.set_terminated(self.state["run"], event["status"], event["t"])
        last = client.get_run(self.state["parent"]).info.end_time
        if last is None or last <= event["t"]:
            client.set_terminated(self.state["parent"], event["status"], event["t"])
        self.state["ended"] = True

    def abandon(self, moment: int) -> None:
        """Mark a run whose process died without a word as KILLED at `moment` (milliseconds)."""
        if self.state["run"] and not self.state["ended"]:
            self._on_end([{"op": "end", "status": "KILLED", "t": moment}])

    def finish(self) -> int:
        """Remove what was delivered; returns how many refused events stay behind as the new journal."""
        if self._refused_path.exists():
            left = sum(1 for _ in open(self._refused_path, encoding="utf-8"))
            os.replace(self._refused_path, self.journal)
            self.state.update(offset=0, failed=[0, 0])
            self._save()
            return left
        self.journal.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)
        shutil.rmtree(self.root / FOLDER / "files" / self.journal.stem, ignore_errors=True)
        return 0


def _cut(value: str) -> str:
    """A value of at most 6000 characters, with a note where it was cut."""
    note = f" ... (cut from {len(value)} characters)"
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - len(note)] + note
