"""MLflow for the stages: one parent run per pipeline execution, its children the stages and folds.

A log call appends a line to a local journal and returns; a courier thread delivers to the store every few seconds.
If the store is slow, locked or gone, the run goes on, one warning is printed, and `sonoscope sync` delivers it later.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.config import Config, fingerprint as fingerprint_of, tracking_uri_from_environment
from pipeline.files import project_root, read_json, write_json
from pipeline.tracking_context import (
    ExecutionFacts, environment_tags, execution_facts, flatten, gpu_tags, readable, slug, stage_params,
)
from pipeline.tracking_courier import Courier, sync, warn
from pipeline.tracking_journal import FOLDER, Journal, stage_files
from pipeline.tracking_store import EXECUTION, LEVEL, RUN_KEY, SESSION, Deliverer, resolve_uri

__all__ = ["NullTracker", "Tracker", "link_skipped", "open_tracker", "sync", "tracking_uri"]

HEALTHY_CLOSE_SECONDS = 30.0
KILLED_CLOSE_SECONDS = 5.0
HEADLINE_METRICS = 30


def _now() -> int:
    return time.time_ns() // 1_000_000


class NullTracker:
    """Takes every call of a tracker and does nothing; only rank 0 writes the sidecar, since DVC expects the file."""

    run_id = parent_id = run_key = execution = execution_name = ""

    def __init__(self, stage: str, item: str | None = None, *, fingerprint: str = "", rank: int = 0) -> None:
        self.stage, self.item, self.fingerprint, self.rank = stage, item, fingerprint, rank
        self.status = "FINISHED"
        self.headline: dict[str, float] = {}
        self.params: dict[str, str] = {}
        self._started = time.monotonic()

    def __enter__(self) -> NullTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters of this stage; nested mappings are flattened with dots, private keys and paths left out."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at `step` (0 if None). NaN and infinities are left out and counted."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file, or a folder under its own name, into `folder` of the run's artifacts."""

    def log_model(self, weights: Path, about: Mapping[str, Any], name: str) -> None:
        """Log a weights file as an MLflow model that scores pictures; `about` as `pipeline.export.facts.about` gives it."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of this stage's run."""

    def log_dataset(self, name: str, digest: str, rows: int, context: str) -> None:
        """Log which data were used, by name and digest; `context` is for example `training`. On the parent run too."""

    def log_parent_params(self, params: Mapping[str, Any]) -> None:
        """`log_params` on the parent run."""

    def log_parent_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """`log_metrics` on the parent run: what the table of experiments shows."""

    def log_parent_artifact(self, path: Path, folder: str = "") -> None:
        """`log_artifact` on the parent run."""

    def set_parent_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the parent run."""

    def flush(self, seconds: float = HEALTHY_CLOSE_SECONDS) -> bool:
        """Wait until everything logged so far is delivered; False when that failed or took longer than `seconds`."""
        return True

    def write_sidecar(self, path: Path, **extra: Any) -> None:
        """Write the small JSON output by which a later execution finds this stage's run when DVC skips the stage."""
        if self.rank != 0:
            return
        record = {
            "schema": 1, "stage": self.stage, "item": self.item, "status": self.status, "fingerprint": self.fingerprint,
            "run_id": self.run_id, "parent_id": self.parent_id, "run_key": self.run_key, "execution": self.execution,
            "seconds": round(time.monotonic() - self._started, 3), "metrics": self.headline, "params": self.params,
        }  # fmt: skip
        write_json(Path(path), {**record, **extra})


class Tracker(NullTracker):
    """The run of one stage (or fold) and its parent. Use as a context manager; no method raises because of tracking.

    A stage that saves and leaves in good order because it was told to stop sets `tracker.status = "KILLED"` before.
    """

    def __init__(self, config: Config, stage: str, item: str | None, fingerprint: str, facts: ExecutionFacts) -> None:
        super().__init__(stage, item, fingerprint=fingerprint)
        self.root = project_root().resolve()
        self.execution, self.execution_name = facts.key, facts.name
        self.name = f"{stage} {readable(item)}" if item else stage
        self.run_key = fingerprint_of(facts.key, self.name)
        self.params = stage_params(facts.params, stage)
        self._facts = facts
        self._lock = threading.Lock()
        self._left_out: Counter[str] = Counter()
        self._lost = 0
        self._staged = 0
        self._session = uuid.uuid4().hex
        self._seconds, self._models = config.tracking.flush_seconds, config.tracking.models
        self._open_event = self._describe(config)
        self._journal: Journal | None = None
        self._courier: Courier | None = None
        self._old_handler: Any = None

    def _describe(self, config: Config) -> dict[str, Any]:
        """The first event of a session: all that is needed to create both runs, now or days later."""
        parent_tags = {**self._facts.tags, EXECUTION: self.execution, LEVEL: "execution"}
        repeated = ("dvc.experiment", "git.commit", "method")
        inherited = {key: value for key, value in self._facts.tags.items() if key in repeated}
        run_tags = {
            **inherited, **environment_tags(), EXECUTION: self.execution, LEVEL: "stage", RUN_KEY: self.run_key,
            SESSION: self._session, "stage": self.stage, "item": readable(self.item or ""),
            "fingerprint": self.fingerprint,
        }  # fmt: skip
        return {
            "op": "open", "t": _now(), "uri": config.tracking.uri or tracking_uri_from_environment() or "",
            "experiment": config.tracking.experiment,
            "parent": {"name": self._facts.name, "tags": parent_tags, "params": self._facts.params},
            "run": {"name": self.name, "tags": {k: v for k, v in run_tags.items() if v}, "params": self.params},
        }  # fmt: skip

    def __enter__(self) -> Tracker:
        try:
            self._journal = Journal.open(self.root, self.run_key)
        except (OSError, TimeoutError) as error:
            warn(f"cannot write under {self.root / FOLDER} ({type(error).__name__}); this run is not tracked")
            return self
        self._emit(self._open_event)
        self._courier = Courier(Deliverer(self._journal.path, self.root, live=True), self._seconds)
        self._courier.start()
        self._catch_termination()
        return self

    def _catch_termination(self) -> None:
        """Turn SIGTERM into SystemExit where nobody else handles it, so that the run ends as KILLED."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._old_handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGTERM, self._old_handler)
        if self._journal is None or self._courier is None:
            return
        if kind is not None and self.status != "KILLED":
            stopped = issubclass(kind, KeyboardInterrupt) or getattr(error, "code", None) == 128 + signal.SIGTERM
            in_order = isinstance(error, SystemExit) and error.code in (0, None)
            self.status = "KILLED" if stopped else "FINISHED" if in_order else "FAILED"
        if self.status == "FAILED":
            # The class only: a message may name a patient's file.
            self.set_tags({"failed.with": kind.__name__ if kind else ""})
        self.log_metrics({"stage_seconds": time.monotonic() - self._started})
        self.set_tags(gpu_tags())
        if self._left_out:
            found = ", ".join(f"{key} ({count})" for key, count in sorted(self._left_out.items()))
            warn(f"{sum(self._left_out.values())} values that are no finite numbers were left out: {found}")
            self.set_tags({"left_out": found})
        self._emit({"op": "end", "t": _now(), "status": self.status})
        self._close()

    def _close(self) -> None:
        """Deliver the rest within a bounded time; what cannot be delivered stays in the journal."""
        assert self._journal is not None and self._courier is not None
        seconds = KILLED_CLOSE_SECONDS if self.status == "KILLED" else HEALTHY_CLOSE_SECONDS
        delivered = self._courier.flush(seconds)
        if not self._courier.stop():
            return  # It hangs in a call of the store: the journal is its own until the process ends.
        try:
            if delivered and self._courier.deliverer.finish():
                warn(f"the MLflow store refused some events; they are kept in {self._journal.path}")
        except OSError as error:
            warn(f"cannot tidy {self._journal.path} ({type(error).__name__})")
        self._journal.close()
        self._journal = None

    def _emit(self, event: dict[str, Any]) -> None:
        """Append to the journal. A full disk is reported once and counted, never raised."""
        with self._lock:
            if self._journal is None:
                return
            try:
                self._journal.append(event)
            except (OSError, TypeError, ValueError) as error:
                self._lost += 1
                if self._lost == 1:
                    warn(f"cannot write {self._journal.path} ({type(error).__name__}); what is logged now may be lost")

    def _ids(self) -> dict[str, Any]:
        return self._courier.deliverer.state if self._courier else {}

    @property
    def run_id(self) -> str:  # type: ignore[override]
        """MLflow's id of this run; empty until it was delivered."""
        return self._ids().get("run", "")

    @property
    def parent_id(self) -> str:  # type: ignore[override]
        """MLflow's id of the parent run; empty until it was delivered."""
        return self._ids().get("parent", "")

    def _params_event(self, params: Mapping[str, Any], to: str) -> None:
        self._emit({"op": "params", "t": _now(), "to": to, "params": flatten(params)})

    def _metrics_event(self, metrics: Mapping[str, float], step: int | None, to: str) -> dict[str, float]:
        finite: dict[str, float] = {}
        for key, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if math.isfinite(number):
                finite[str(key)] = number
            else:
                self._left_out[str(key)] += 1
        if finite:
            self._emit({"op": "metrics", "t": _now(), "to": to, "step": int(step or 0), "metrics": finite})
        return finite

    def _tags_event(self, tags: Mapping[str, str], to: str) -> None:
        if tags:
            self._emit({"op": "tags", "t": _now(), "to": to, "tags": flatten(tags)})

    def _staged_event(self, path: Path, event: dict[str, Any], to: str) -> None:
        """An event with a file or folder, which is kept beside the journal until it is delivered."""
        if self._journal is None:
            return
        with self._lock:
            self._staged += 1
            staged = self.root / FOLDER / "files" / self._journal.path.stem / f"{self._session[:8]}-{self._staged}"
        try:
            place = stage_files(Path(path), staged)
        except OSError as error:
            warn(f"artifact {Path(path).name} cannot be read ({type(error).__name__}); it is not logged")
            return
        self._emit({**event, "t": _now(), "to": to, "path": str(place), "staged": str(staged)})

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._params_event(params, "run")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        finite = self._metrics_event(metrics, step, "run")
        with self._lock:
            for key, value in finite.items():
                if key in self.headline or len(self.headline) < HEADLINE_METRICS:
                    self.headline[key] = value

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._staged_event(path, {"op": "artifact", "folder": folder}, "run")

    def log_model(self, weights: Path, about: Mapping[str, Any], name: str) -> None:
        if self._models:
            self._staged_event(weights, {"op": "model", "name": name, "about": dict(about)}, "run")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._tags_event(tags, "run")

    def log_dataset(self, name: str, digest: str, rows: int, context: str) -> None:
        event = {"op": "dataset", "t": _now(), "to": "run", "name": name, "digest": digest, "rows": int(rows)}
        self._emit({**event, "context": context})

    def log_parent_params(self, params: Mapping[str, Any]) -> None:
        self._params_event(params, "parent")

    def log_parent_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._metrics_event(metrics, step, "parent")

    def log_parent_artifact(self, path: Path, folder: str = "") -> None:
        self._staged_event(path, {"op": "artifact", "folder": folder}, "parent")

    def set_parent_tags(self, tags: Mapping[str, str]) -> None:
        self._tags_event(tags, "parent")

    def flush(self, seconds: float = HEALTHY_CLOSE_SECONDS) -> bool:
        return self._courier is not None and self._courier.flush(seconds)

    def write_sidecar(self, path: Path, **extra: Any) -> None:
        if self._courier is not None and not self._courier.failed and not self.run_id:
            self._courier.flush(HEALTHY_CLOSE_SECONDS)
        super().write_sidecar(path, **extra)


def tracking_uri(config: Config) -> str:
    """The address of the store: `tracking.uri`, else MLFLOW_TRACKING_URI, else the SQLite file at the project root."""
    return resolve_uri(config.tracking.uri or tracking_uri_from_environment(), project_root())


def open_tracker(
    config: Config, stage: str, item: str | None = None, *, fingerprint: str = "", rank: int | None = None
) -> NullTracker:
    """The tracker of one stage, to be used in a `with` statement.

    Args:
        stage: `extract`, `split`, `pretrain`, `finetune` or `evaluate`.
        item: what distinguishes runs of the stage, for example `fold 0` or `pretrained fold 0 seed 0`.
        fingerprint: of everything the result depends on; becomes a tag.
        rank: of this process; None reads RANK, which torchrun sets. Only rank 0 logs.

    Returns:
        A `Tracker`, or a `NullTracker` when tracking is disabled or the rank is not 0.
    """
    rank = int(os.environ.get("RANK", "0") or 0) if rank is None else rank
    if rank != 0 or not config.tracking.enabled:
        return NullTracker(stage, item, fingerprint=fingerprint, rank=rank)
    return Tracker(config, stage, item, fingerprint, execution_facts(config))


def link_skipped(
    tracker: NullTracker, folder: Path = Path("reports/runs"), only: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Tie stages that DVC took from its cache to this execution's parent run.

    Reads every sidecar in `folder`. A stage that ran in another execution is named on the parent by a tag
    `linked.<stage>[-item]` with its run id; its numbers stay there, so that the parents' columns remain few. `only` names the
    files (without `.json`) that belong to the present parameters; DVC leaves records of earlier folds lying.

    Returns:
        One row a stage, sorted by file name: stage, item, run_id, parent_id, status, fingerprint, seconds, linked.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        if only is not None and path.stem not in only:
            continue
        try:
            record = read_json(path)
            stage, item = str(record["stage"]), record.get("item")
        except (OSError, ValueError, KeyError, TypeError):
            warn(f"{path} is not a record of a stage's run and is left out")
            continue
        linked = bool(tracker.execution) and record.get("execution", "") not in ("", tracker.execution)
        if linked:
            prefix = f"linked.{slug(f'{stage}-{item}' if item else stage)}"
            run_id = record.get("run_id") or f"not delivered yet, key {record.get('run_key', '')}"
            tracker.set_parent_tags({prefix: run_id})
        shown = ("run_id", "parent_id", "status", "fingerprint", "seconds")
        rows.append({"stage": stage, "item": item, **{key: record.get(key) for key in shown}, "linked": linked})
    return rows
