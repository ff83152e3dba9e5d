"""`sonoscope doctor`: what this machine and this project have, and what to do about what is missing.

The report is made to be sent to somebody: names of users and hosts are taken out of it.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError
from pipeline.files import project_root
from pipeline.machine import Check, machine_checks, no_answer
from pipeline.tracking_journal import FOLDER, in_use

__all__ = ["project_checks", "run_doctor", "without_names"]

YOUNG_SECONDS = 300.0

# Account and host names that say nothing about anybody, and are words of messages besides.
_COMMON = {"root", "user", "users", "home", "admin", "runner", "vm", "host", "localhost", "docker", "data", "work"}


def without_names(text: str) -> str:
    """`text` with the home folder as `~`, and the names of user and host as `<user>` and `<host>`."""
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?=/|\W|$)", "~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        # A container may run under a number that no account has.
        user = ""
    host = socket.gethostname()
    for name, mask in ((user, "<user>"), (host, "<host>"), (host.split(".")[0], "<host>")):
        if len(name) > 1 and name.lower() not in _COMMON:
            text = re.sub(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", mask, text)
    return text


def _run(words: list[str], root: Path, seconds: float = 60) -> tuple[int, str]:
    """Exit code and output (stdout, or the first line of stderr when it failed).

    Raises:
        subprocess.TimeoutExpired: it took longer (`_guarded` makes a warning of it).
    """
    try:
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=seconds, check=False)
    except OSError as error:
        return 127, type(error).__name__
    if done.returncode == 0:
        return 0, done.stdout.strip()
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, lines[0].strip() if lines else f"exit code {done.returncode}"


def _git(root: Path) -> list[Check]:
    if shutil.which("git") is None:
        return [Check("git", "problem", "not installed", "install git; DVC experiments are git commits")]
    code, text = _run(["git", "rev-parse", "--short", "HEAD"], root)
    if code != 0:
        if "dubious ownership" in text:
            todo = 'git config --global --add safe.directory "$PWD"'
        else:
            todo = "git init && git add . && git commit -m start: 'dvc exp run' needs a repository with a commit"
        return [Check("git", "problem", text, todo)]
    revision = text
    # dvc.lock of the working copy is normally not committed, so files unknown to git do not count as changes.
    changed = len(_run(["git", "status", "--porcelain", "--untracked-files=no"], root)[1].splitlines())
    checks = [Check("git", "ok", f"commit {revision}, " + (f"{changed} changed file(s)" if changed else "clean"))]
    if any(_run(["git", "config", f"user.{key}"], root)[0] for key in ("name", "email")):
        checks.append(
            Check(
                "git identity",
                "warning",
                "user.name or user.email is not set, without which 'dvc exp run' stops",
                "git config user.name NAME && git config user.email ADDRESS",
            )
        )
    return checks


def _dvc(root: Path) -> list[Check]:
    try:
        version = importlib.metadata.version("dvc")  # to start DVC only for this costs a second
    except importlib.metadata.PackageNotFoundError:
        return [Check("dvc", "problem", "not installed", "make install")]
    if not (root / ".dvc").is_dir():
        return [Check("dvc", "problem", f"{version}; no .dvc folder here", "run from the project folder")]
    if _run(["git", "check-ignore", "-q", "dvc.lock"], root)[0] == 0:
        return [Check("dvc", "problem", "dvc.lock is ignored by git, which DVC refuses", "take it out of .gitignore")]
    code, text = _run([sys.executable, "-m", "dvc", "stage", "list", "--name-only"], root)
    if code != 0:
        return [
            Check("dvc", "problem", f"{version}; {text}", "mend dvc.yaml or params.yaml; 'dvc stage list' says more")
        ]
    return [Check("dvc", "ok", f"{version}, {len(text.splitlines())} stages")]


def _params(root: Path) -> tuple[Config | None, list[Check]]:
    try:
        config = load_config(root / "params.yaml")
    except ConfigError as error:
        lines = str(error).replace(f"{root}/", "").splitlines()
        return None, [
            Check("params.yaml", "problem", " | ".join(line.strip() for line in lines), "mend the keys named")
        ]
    return config, [
        Check("params.yaml", "ok", f"valid; method {config.pretrain.method}, {config.split.words}")
    ]


def _data(config: Config, root: Path) -> list[Check]:
    """Whether the sources are there, and whether a queued experiment would find them too."""
    checks = []
    sources = {"data.source": config.data.source}
    sources.update({f"data.extra_sources.{name}": source.path for name, source in config.data.extra_sources.items()})
    for key, text in sources.items():
        folder = root / text
        if text == "data/phantom" and not folder.exists():
            checks.append(Check(key, "ok", "the embedded phantom clips; 'dvc repro' writes them"))
        elif not folder.is_dir():
            checks.append(Check(key, "problem", f"{text}: no such folder", f"set {key} in params.yaml"))
        elif not any(folder.iterdir()):
            checks.append(Check(key, "problem", f"{text}: empty", "put the videos there, or name another folder"))
        elif text != "data/phantom" and not Path(text).is_absolute() and not _travels(folder, root):
            checks.append(
                Check(
                    key,
                    "warning",
                    f"{text}: here, but a queued DVC experiment works on a copy without it",
                    f"give the absolute path in params.yaml, or: dvc add {text} and commit the .dvc file",
                )
            )
        else:
            checks.append(Check(key, "ok", f"{text}: here"))
    return checks


def _travels(folder: Path, root: Path) -> bool:
    """Whether a copy of the commit contains the folder: tracked by DVC or by git."""
    return Path(f"{folder}.dvc").exists() or bool(_run(["git", "ls-files", "--", str(folder)], root)[1])


def _store(config: Config, root: Path) -> list[Check]:
    """Whether the MLflow store opens, without writing to it."""
    from pipeline.tracking import tracking_uri

    if not config.tracking.enabled:
        return [Check("mlflow store", "ok", "tracking is switched off (tracking.enabled)")]
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        return [_sqlite_store(Path(uri.removeprefix("sqlite:///")), root)]
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
                answer.read(16)
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = type(getattr(error, "reason", error)).__name__
            return [
                Check(
                    "mlflow store",
                    "warning",
                    f"a server, which does not answer ({reason})",
                    "start it or mend MLFLOW_TRACKING_URI; runs go on without it, 'sonoscope sync' delivers later",
                )
            ]
        return [Check("mlflow store", "ok", "a server, which answers")]
    kind = uri.split(":", 1)[0]
    if kind == "file" or ":" not in uri:
        return [
            Check(
                "mlflow store",
                "problem",
                "a folder of files, which MLflow 3 does not take",
                "tracking.uri: null for the SQLite store of the project",
            )
        ]
    return [Check("mlflow store", "ok", f"a {kind} store (not opened)")]


def _sqlite_store(path: Path, root: Path) -> Check:
    place = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    if not path.exists():
        if path.parent.is_dir():
            return Check("mlflow store", "ok", f"{place}: made by the first run")
        return Check(
            "mlflow store", "problem", f"{place}: its folder does not exist", "make the folder, or set tracking.uri"
        )
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5) as store:
            count = store.execute("select count(*) from runs").fetchone()[0]
    except sqlite3.Error as error:
        return Check(
            "mlflow store",
            "problem",
            f"{place}: {error}",
            "move the file away; the next run makes a new one, and 'sonoscope sync' delivers what is in .tracking",
        )
    return Check("mlflow store", "ok", f"{place}: opens, {count} runs")


def _journals(root: Path) -> list[Check]:
    waiting = Counter()
    for path in (root / FOLDER).glob("*.jsonl"):
        try:
            # A stage that has just ended may be delivered by the next one.
            waiting[in_use(path) or time.time() - path.stat().st_mtime < YOUNG_SECONDS] += 1
        except FileNotFoundError:
            continue
    name = "mlflow delivery"
    running = [Check(name, "ok", f"{waiting[True]} journal(s) of stages that run now or have just ended")] if waiting[True] else []
    left = [Check(name, "warning", f"{waiting[False]} run(s) not or not fully delivered", "sonoscope sync")] if waiting[False] else []
    return running + left


def _guarded(name: str, probe: Callable[..., list[Check]], *arguments: object) -> list[Check]:
    """The checks of one probe; one that fails itself becomes a line of the report instead of ending it."""
    try:
        return probe(*arguments)
    except subprocess.TimeoutExpired as late:
        return [no_answer(name, late)]
    except Exception as error:
        return [Check(name, "problem", f"the check itself failed: {type(error).__name__}: {error}", "make install")]


def project_checks(root: Path) -> list[Check]:
    """Checks of the project in `root`: parameters, data, git, DVC, MLflow store. Writes nothing."""
    config, checks = _params(root)
    if config is not None:
        checks += _guarded("data.source", _data, config, root)
    checks += [*_guarded("git", _git, root), *_guarded("dvc", _dvc, root)]
    if config is not None:
        checks += _guarded("mlflow store", _store, config, root)
    return checks + _journals(root)


def _table(checks: list[Check], width: int) -> str:
    """Four columns, the last two wrapped to the width."""
    first = max(len(check.name) for check in checks)
    room = max(width - first - 13, 50)
    left = room * 11 // 20
    right = room - left
    lines = [f"{'status':<8} {'check':<{first}}  {'found':<{left}}  what to do"]
    for check in checks:
        found = textwrap.wrap(check.found, left) or [""]
        todo = textwrap.wrap(check.todo, right) or [""]
        for row in range(max(len(found), len(todo))):
            cells = (check.status, check.name) if row == 0 else ("", "")
            cell = found[row] if row < len(found) else ""
            action = todo[row] if row < len(todo) else ""
            lines.append(f"{cells[0]:<8} {cells[1]:<{first}}  {cell:<{left}}  {action}".rstrip())
    return "\n".join(lines)


def run_doctor(*, as_json: bool = False, probes: tuple[Callable[[Path], list[Check]], ...] | None = None) -> int:
    """Print the report; 1 when there is a problem, else 0 (warnings included).

    Args:
        as_json: one JSON object `{"schema": 1, "checks": [{name, status, found, todo}], "problems", "warnings"}`.
        probes: what to check, each a function of the project folder; None means machine and project.
    """
    root = project_root().resolve()
    probes = probes or (machine_checks, project_checks)
    checks = [check for probe in probes for check in _guarded(probe.__name__.replace("_", " "), probe, root)]
    checks = [replace(check, found=without_names(check.found), todo=without_names(check.todo)) for check in checks]
    problems = sum(check.status == "problem" for check in checks)
    warnings = sum(check.status == "warning" for check in checks)
    if as_json:
        report = {
            "schema": 1,
            "checks": [asdict(check) for check in checks],
            "problems": problems,
            "warnings": warnings,
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(_table(checks, shutil.get_terminal_size((140, 24)).columns))
        print(f"\n{problems} problem(s), {warnings} warning(s)")
    return 1 if problems else 0
