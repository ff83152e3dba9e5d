"""Finds finished experiments by name (a folder, DVC, MLflow) and reads their predictions and parameters with distrust.

Parameters are those that the results were made with, as dvc.lock records them: params.yaml may have been edited or restored since.

Nothing here compares. What passes holds one probability distribution per unit, seed, repeat and initialisation.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml

from pipeline.config import Config, load_config, pretraining_name
from pipeline.errors import ConfigError, DataError, some
from pipeline.evaluation.compare_lock import digests, folder_digest, overlaid, recorded, stages_of
from pipeline.registry import METHODS, did_you_mean
from pipeline.tracking import tracking_uri
from pipeline.tracking_context import flatten
from pipeline.tracking_store import EXECUTION, LEVEL, connect

__all__ = ["LEVELS", "Experiment", "Finder", "Level", "read_experiment"]

Level = Literal["video", "patient", "frame"]
RESULTS = "reports/evaluate"
LEVELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "video": ("predictions_video.csv", ("video",)),
    "patient": ("predictions_patient.csv", ("patient", "label")),
    "frame": ("predictions.csv", ("video", "frame")),
}
"""By level: the file, and the columns that name a unit. A patient is judged once for each label his videos carry."""
HASH = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Experiment:
    """Out-of-fold predictions of one experiment at one level, for one initialisation."""

    name: str
    params: Mapping[str, str]
    """Flat and as text, with defaults filled in, only the chosen method's block, nothing private (`tracking_context.flatten`)."""
    stamp: str
    table: pd.DataFrame
    """Columns seed, repeat, fold (int), patient, label, unit (str), p_<class>; sorted by seed, repeat, unit."""
    classes: tuple[str, ...]

    @property
    def method(self) -> str:
        """What was pretrained, and from what."""
        return pretraining_name(self.params["pretrain.method"], self.params["pretrain.init"])


@dataclass(frozen=True)
class _Found:
    """The files of an experiment as text, and its parameters."""

    texts: Mapping[str, str]
    params: Mapping[str, str]


class Finder:
    """Looks a name up: as a folder, then in this DVC project, then in the MLflow store. Each is opened once, when needed."""

    def __init__(self, params: Path = Path("params.yaml")) -> None:
        """`params`: where the address of the MLflow store may be written."""
        self._params = params
        self._repo: Any = None
        self._client: Any = None
        self._parents: list[Any] | None = None
        self._told: set[str] = set()

    def find(self, name: str, files: Sequence[str]) -> _Found:
        """The `files` of reports/evaluate, and the parameters.

        Raises:
            DataError: the name is unknown (with the nearest known ones), ambiguous, or the experiment lacks a file.
        """
        if Path(name).is_dir():
            return self._folder(Path(name), files, name)
        found = self._dvc(name, files) or self._mlflow(name, files)
        if found:
            return found
        known = self.names()
        there = f" There are: {some(map(shlex.quote, known), 12)}." if known else ""
        here = " `workspace` is the result in this folder." if self._open_repo() else ""
        raise DataError(
            f"compare: '{name}' is not a folder, not an experiment or revision of this DVC project, and not a run in MLflow."
            f"{did_you_mean(name, known)}{there}{here} List them with `dvc exp show` or `sonoscope ui`."
        )

    def knows(self, name: str) -> bool:
        """Whether there is a folder, or an experiment or revision of DVC, of exactly this name."""
        return Path(name).is_dir() or self._dvc(name, []) is not None

    def names(self) -> list[str]:
        """Names of experiments that DVC and MLflow know, sorted; a run that is no experiment of DVC by its name in MLflow."""
        repo = self._open_repo()
        listed = {name for found in repo.experiments.ls(all_commits=True).values() for name, _ in found} if repo else set()
        for run in self._runs():
            experiment = run.data.tags.get("dvc.experiment", "")
            listed.add(experiment if experiment not in ("", "workspace") else str(run.info.run_name))
        return sorted(listed - {""})

    # --- a folder ---

    def _folder(self, folder: Path, files: Sequence[str], name: str) -> _Found:
        texts = {}
        for file in files:
            path = folder / RESULTS / file
            if not path.is_file():
                raise DataError(f"compare: {path} does not exist. Run the evaluate stage there first (dvc repro).")
            texts[file] = _decoded(path.read_bytes(), str(path))
        path = folder / "params.yaml"
        if not path.is_file():
            raise DataError(f"compare: {path} does not exist; give the folder of a project.")
        given, lock = _raw_params(_decoded(path.read_bytes(), str(path)), str(path)), folder / "dvc.lock"
        stages = stages_of(lock.read_bytes()) if lock.is_file() else {}
        if stages and folder_digest(folder / RESULTS) != digests(stages, "evaluate").get(RESULTS):
            self._warn(
                f"{name}: {RESULTS} is not what dvc.lock records (a stage was run without DVC?), so its parameters are taken from params.yaml; "
                "where that was edited since, run dvc repro"
            )
            stages = {}
        return _Found(texts, self._made_with(name, given, stages))

    def _warn(self, line: str) -> None:
        """Once, beside the result."""
        if line not in self._told:
            self._told.add(line)
            print(f"warning: {line}", file=sys.stderr)

    def _made_with(self, name: str, given: Mapping[str, Any], stages: Mapping[str, Any]) -> dict[str, str]:
        """Flat parameters of the results: what DVC's record of the stages says, the rest from params.yaml; warns where the two differ."""
        record, behind = recorded(stages)
        if behind:
            self._warn(f"{name}: {' and '.join(behind)} ran again after the results were made, which are older than that. Run dvc repro")
        now, made = _flat_params(given), _flat_params(overlaid(given, record))
        keys = sorted(key for key in {*now, *made} if _plain(now.get(key, "")) != _plain(made.get(key, "")))
        if "pretrain.method" in keys:  # each method has a block of its own
            keys = ["pretrain.method", *(key for key in keys if key != "pretrain.method" and not key.startswith("methods."))]
        if keys:
            shown = some((f"{key} {made.get(key, 'unknown')} (params.yaml: {now.get(key, 'unknown')})" for key in keys), 6)
            self._warn(f"{name}: its results were made with other values than params.yaml has now, and are compared as made with {shown}; "
                       "dvc repro makes those of params.yaml")
        return made

    # --- DVC ---

    def _open_repo(self) -> Any:
        """The DVC project around the current folder, or None."""
        if self._repo is None:
            from dvc.exceptions import DvcException
            from dvc.repo import Repo

            try:
                self._repo = Repo()
            except DvcException:
                self._repo = False
        return self._repo or None

    def _dvc(self, name: str, files: Sequence[str]) -> _Found | None:
        repo = self._open_repo()
        if repo is None:
            return None
        # What lies in the folder, even where a stage was run without DVC; elsewhere, and where nothing is checked out, what DVC knows.
        if name == "workspace" and Path(repo.root_dir, RESULTS).is_dir():
            return self._folder(Path(os.path.relpath(repo.root_dir)), files, name)
        from dvc.exceptions import DvcException
        from dvc.scm import RevError, SCMError

        def read(file: str) -> str:
            try:
                return _decoded(cached(file) or repo.dvcfs.read_bytes(file), f"{file} of '{name}'")
            except (DvcException, OSError) as error:
                raise DataError(
                    f"compare: '{name}' is known, but its {file} is not there ({type(error).__name__}): the experiment has not come to "
                    "an end, is older than this file, or lies on another machine (`dvc exp pull`, `dvc pull`)."
                ) from None

        try:
            with repo.switch(name):
                cached = _Cached(repo)
                texts = {file: read(f"{RESULTS}/{file}") for file in files}
                return _Found(texts, self._made_with(name, _raw_params(read("params.yaml"), f"params.yaml of '{name}'"), cached.stages))
        except (RevError, SCMError, ValueError):
            return None

    def close(self) -> None:
        """Let the DVC project go; its open git files complain at the end of the process otherwise."""
        if self._repo:
            self._repo.close()
            self._repo = None

    # --- MLflow ---

    def _config(self) -> Config:
        try:
            return load_config(self._params)
        except ConfigError:
            return Config()

    def _store(self) -> Any:
        """A client of the configured store, or None where there is none: asking must not create one."""
        if self._client is None:
            uri = tracking_uri(self._config())
            path = uri.removeprefix("sqlite:///")
            self._client = connect(uri) if path == uri or Path(path).is_file() else False
        return self._client or None

    def _runs(self) -> list[Any]:
        """Parent runs of the configured MLflow experiment, newest first; [] when the store cannot be reached."""
        if self._parents is None:
            self._parents = []
            try:
                client = self._store()
                experiment = client.get_experiment_by_name(self._config().tracking.experiment) if client else None
                token = "" if experiment else None
                while token is not None:
                    page = client.search_runs(
                        [experiment.experiment_id], f"tags.`{LEVEL}` = 'execution'", max_results=1000, page_token=token or None,
                    )
                    self._parents += page
                    token = page.token or None
            except Exception as error:  # any kind of trouble of a server, a file or a network
                print(f"warning: the MLflow store cannot be read ({type(error).__name__}); only folders and DVC are looked at", file=sys.stderr)
        return self._parents

    def _mlflow(self, name: str, files: Sequence[str]) -> _Found | None:
        parents = [run for run in self._runs() if name in (run.info.run_name, run.info.run_id, run.data.tags.get("dvc.experiment"))]
        if not parents and HASH.fullmatch(name) and self._store():
            parents = self._by_id(name)
        if not parents:
            return None
        judged = [(run, child) for run in parents if (child := self._evaluation(run))]
        if not judged:
            raise DataError(f"compare: MLflow's run '{name}' has no finished evaluation; wait for it, or deliver what is pending with `sonoscope sync`")
        if len(judged) > 1:
            ids = some((run.info.run_id for run, _ in judged), 6)
            raise DataError(f"compare: {len(judged)} runs in MLflow are called '{name}'; give the id of one (newest first): {ids}")
        run, child = judged[0]
        with tempfile.TemporaryDirectory() as folder:
            texts = {file: self._artifact(child, file, name, folder) for file in files}
        return _Found(texts, {**_default_params(run.data.params.get("pretrain.method", "")), **run.data.params})

    def _by_id(self, run_id: str) -> list[Any]:
        """The parent of a run that is no parent itself, or a parent of another MLflow experiment."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
            if run.data.tags.get(LEVEL) != "execution":
                run = self._client.get_run(run.data.tags.get("mlflow.parentRunId", ""))
        except MlflowException:
            return []
        return [run] if EXECUTION in run.data.tags else []

    def _evaluation(self, parent: Any) -> Any:
        """The newest finished evaluate run below a parent, or None."""
        query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.stage = 'evaluate' and attributes.status = 'FINISHED'"
        found = self._client.search_runs([parent.info.experiment_id], query, max_results=1000, order_by=["attributes.start_time DESC"])
        # Folds have runs of their own, named by an item; they hold no predictions.
        return next((run for run in found if "item" not in run.data.tags), None)

    def _artifact(self, run: Any, file: str, name: str, folder: str) -> str:
        try:
            path = Path(self._client.download_artifacts(run.info.run_id, file, folder))
        except Exception as error:  # stores raise what they like
            other = "" if file == LEVELS["video"][0] else "; --level video may do"
            raise DataError(
                f"compare: MLflow's run '{name}' has no artifact {file} ({type(error).__name__}): it is older than this file{other}"
            ) from None
        return _decoded(path.read_bytes(), f"{file} of '{name}'")


class _Cached:
    """Files of the current revision straight from git or the local cache; DVC's own way parses its lock file for a third of a second."""

    def __init__(self, repo: Any) -> None:
        self._repo, self._objects, self.stages = repo, {}, {}
        try:
            self.stages = stages_of(repo.fs.read_bytes(repo.fs.join(repo.root_dir, "dvc.lock")))
            digest = digests(self.stages, "evaluate").get(RESULTS, "")
            listed = json.loads(self._object(digest)) if digest.endswith(".dir") else []
            self._objects = {f"{RESULTS}/{entry['relpath']}": entry["md5"] for entry in listed}
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def _object(self, digest: str) -> bytes:
        return Path(self._repo.cache.local.oid_to_path(digest)).read_bytes()

    def __call__(self, file: str) -> bytes | None:
        """The content, or None where DVC must be asked."""
        try:
            if file in self._objects:
                return self._object(self._objects[file])
            return None if file.startswith(RESULTS) else self._repo.fs.read_bytes(self._repo.fs.join(self._repo.root_dir, file))
        except OSError:
            return None


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"compare: {place} is not UTF-8 text (byte {error.start})") from None


def _raw_params(text: str, place: str) -> dict[str, Any]:
    """params.yaml as it stands.

    Raises:
        DataError: it does not say what was pretrained.
    """
    try:
        raw = yaml.safe_load(text)
        known = isinstance(raw["pretrain"]["method"], str)
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError):
        known = False
    if not known:
        raise DataError(f"compare: {place} does not say pretrain.method; it is no parameter file of Sonoscope")
    return raw


def _flat_params(raw: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as flat text; keys that an older experiment did not know have their defaults."""
    blocks, method = raw.get("methods"), raw["pretrain"]["method"]
    given = {key: value for key, value in raw.items() if key not in ("tracking", "launch", "methods")}
    if isinstance(blocks, dict) and blocks.get(method):
        given["methods"] = {method: blocks[method]}
    init = raw["pretrain"].get("init")
    if isinstance(init, str):
        given["pretrain"] = {**given["pretrain"], "init": re.split(r"[\\/]", init)[-1]}
    return {**_default_params(str(method)), **flatten(given)}


def _default_params(method: str) -> dict[str, str]:
    """Flat defaults, for keys that an older experiment did not know."""
    defaults = Config().model_dump(mode="json", exclude={"methods", "tracking", "launch"})
    try:
        defaults["methods"] = {method: METHODS.get(method).Params().model_dump(mode="json")}
    except ConfigError:
        pass  # a method of another version: what its experiment says is all that is known
    return flatten(defaults)


def _plain(value: str) -> str:
    """Numbers in one form: YAML's `1`, `1.0` and `1e0` mean the same."""
    try:
        return f"{float(value):.10g}"
    except ValueError:
        return value


def read_experiment(name: str, initialisation: str = "pretrained", level: Level = "video", finder: Finder | None = None) -> Experiment:
    """Predictions of one experiment, checked.

    Raises:
        DataError: unknown experiment, no rows of this initialisation, or predictions that cannot be trusted.
    """
    file, unit = LEVELS[level]
    found = (finder or Finder()).find(name, [file, "metrics.json"])
    place = f"compare: {file} of '{name}'"
    try:
        metrics = json.loads(found.texts["metrics.json"])
        stamp = str(metrics.get(initialisation, {}).get("stamp") or metrics.get("stamp") or "none")
    except (ValueError, AttributeError):
        raise DataError(f"compare: metrics.json of '{name}' cannot be read. Run the evaluate stage again.") from None
    for key in ("pretrain.method", "pretrain.init", "pretrain.seed"):
        if key not in found.params:
            raise DataError(f"compare: the parameters of '{name}' lack {key}: it was not made by Sonoscope")
    params = {key: _plain(value) for key, value in found.params.items() if value != "{}"}
    table, classes = _table(found.texts[file], place, initialisation, unit)
    _check_units(table, place, divisible=params.get("data.group", "patient") != "patient")
    # A page is handed on: where a folder lies is nobody's business.
    called = Path(name).resolve().name if Path(name).is_dir() else name
    return Experiment(called, params, "" if stamp == "none" else stamp, table, classes)


def _table(text: str, place: str, initialisation: str, unit: Sequence[str]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Typed columns of one initialisation; the column `repeat` is younger than others and 0 where it lacks."""
    try:
        # Every cell as text first: a class may be called "NA", a video id may look like a number.
        raw = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{place} is not a readable table ({type(error).__name__})") from None
    needed = ["init", "seed", "fold", "patient", "label", *unit]
    missing = [name for name in needed if name not in raw.columns]
    columns = [name for name in raw.columns if name.startswith("p_")]
    if missing or len(columns) < 2:
        raise DataError(f"{place}: column {missing[0] if missing else 'p_<class>'} is missing; found: {', '.join(raw.columns)}")
    rows = raw[raw["init"] == initialisation].reset_index(drop=True)
    if "part" in rows.columns:
        rows = rows[rows["part"] == "test"].reset_index(drop=True)
    if rows.empty:
        raise DataError(f"{place} has no initialisation '{initialisation}'; found: {', '.join(sorted(set(raw['init']))) or 'no rows'}. Set --init.")
    table = pd.DataFrame({"patient": rows["patient"], "label": rows["label"], "unit": rows[list(unit)].agg(" ".join, axis=1)})
    for key in ("seed", "repeat", "fold"):
        given = rows[key] if key in rows.columns else pd.Series("0", index=rows.index)
        wrong = ~given.str.fullmatch(r"\d{1,12}")
        if wrong.any():
            raise DataError(f"{place}: {key} {given[wrong].iloc[0]!r} ({unit[0]} {rows[unit[0]][wrong].iloc[0]}); allowed: whole numbers")
        table[key] = given.astype(int)
    for column in columns:
        table[column] = pd.to_numeric(rows[column], errors="coerce").astype(float)
    values = table[columns].to_numpy()
    wrong = ~(np.isfinite(values).all(1) & (values >= 0).all(1) & (np.abs(values.sum(1) - 1) <= 1e-3))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{place}: {int(wrong.sum())} of {len(wrong)} rows are no probabilities, such as {rows.loc[row, columns].tolist()} of {unit[0]} "
            f"{rows[unit[0]][row]}; they must be numbers >= 0 that sum to 1. Training may have diverged: run it again with a lower rate."
        )
    classes = tuple(column.removeprefix("p_") for column in columns)
    foreign = sorted(set(table["label"]) - set(classes))
    if foreign:
        raise DataError(f"{place}: label {foreign[0]!r} is none of the classes {', '.join(classes)}")
    return table.sort_values(["seed", "repeat", "unit", "fold"], kind="stable", ignore_index=True), classes


def _check_units(table: pd.DataFrame, place: str, *, divisible: bool) -> None:
    """One row a unit, one label and patient a unit, the same units in every run, no patient on both sides of a fold.

    `divisible`: the data were split below the patient on purpose, so that a patient may be tested in several folds.
    """
    run = ["seed", "repeat"]
    key = [*run, "unit", *(["fold"] if divisible else [])]
    twice = table[table.duplicated(key)]
    if len(twice):
        one = twice.iloc[0]
        raise DataError(
            f"{place}: {one['unit']} is predicted {int((table['unit'] == one['unit']).sum())} times in seed {one['seed']}, repeat {one['repeat']}; "
            f"{len(twice)} such rows. Each must be tested once: run the evaluate stage again."
        )
    for column in ("patient", "label"):
        several = table.groupby("unit")[column].nunique()
        if (several > 1).any():
            raise DataError(f"{place}: {several.idxmax()} has two values of {column}; run extract and everything after it again")
    several = table.groupby([*run, "patient"])["fold"].nunique()
    if not divisible and (several > 1).any():
        seed, repeat, patient = several.idxmax()
        raise DataError(
            f"{place}: {int((several > 1).sum())} patients are tested in more than one fold, such as {patient} (seed {seed}, repeat {repeat}): each "
            "was in the training part of the other fold, so nothing can be concluded. Split by patient (data.group: patient)."
        )
    units = table.groupby(run)["unit"].agg(frozenset)
    everything = frozenset(table["unit"])
    for (seed, repeat), found in units.items():
        if found != everything:
            lost = table[table["unit"].isin(everything - found)]
            raise DataError(
                f"{place}: seed {seed}, repeat {repeat} has no prediction for {len(everything - found)} of {len(everything)} units "
                f"(fold {some(sorted(set(lost['fold'])))}), such as {min(everything - found)}. Run the evaluate stage again."
            )
