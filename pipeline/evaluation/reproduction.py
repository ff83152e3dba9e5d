"""The exact commands that make this very report again: commit, parameters that differ from it, experiment, environment.

Reads git and params.yaml as they were when the report was written. Private values (folders, keys) are named, not shown.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.tracking_context import PRIVATE_KEYS, git_output

__all__ = ["changed_values", "commands"]

NOT_COMPUTED = ("tracking", "launch")
"""Sections that say where and how a run is watched, not what is computed."""
_ABSENT = object()
MAX_SHOWN = 24
"""Values on one command line; beyond it a line says how many more."""


def commands(present: Path = Path("params.yaml"), experiment: str | None = None) -> list[tuple[str, str]]:
    """(command, what it does), in the order in which to type them.

    Args:
        present: the parameters of this run. experiment: name of the DVC experiment; None: what DVC says in its environment.
    """
    experiment = os.environ.get("DVC_EXP_NAME", "") if experiment is None else experiment
    code, head = git_output("rev-parse", _start())
    if code:
        return [("dvc repro", "makes the report again; no git commit is known, because this folder is no git repository"), *_LOOK]
    lines = [(f"git checkout {head}", f"the code, params.yaml and dvc.yaml of this report{_dirty()}")]
    lines.append(("pip install --require-hashes -r requirements.lock", "the same versions of every library, if yours differ from those below"))
    options, private = changed_values(present)
    again = "dvc exp run " + " ".join(options) if options else "dvc repro"
    own = f"; give {', '.join(private)} your own values: they are not shown here" if private else ""
    if experiment:
        lines.append((f"dvc exp apply {shlex.quote(experiment)}", "brings parameters and results of this experiment back, as long as DVC keeps it"))
    what = "the values that differ from params.yaml of that commit" if options else "parameters as in that commit"
    lines.append((again, f"{'or computes it anew' if experiment else 'computes everything again'}, {what}; what is cached is not computed twice{own}"))
    return [*lines, *_LOOK]


_LOOK = [
    ("dvc metrics show", "the numbers of this report as text; dvc metrics diff compares with another revision"),
    ("dvc plots show", "its curves and tables as interactive plots"),
    ("sonoscope ui", "opens MLflow with all runs and learning curves"),
]


def _start() -> str:
    """The commit that the run, or the experiment, started from."""
    return os.environ.get("DVC_EXP_BASELINE_REV") or "HEAD"


def _dirty() -> str:
    changed = git_output("diff", "--name-only", _start(), "--", ".", ":(exclude)params.yaml", ":(exclude)dvc.lock")[1].split("\n")
    names = [name for name in changed if name]
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f". Uncommitted changes were there as well ({', '.join(names[:3])}{more}): without them the result may differ"


def changed_values(present: Path) -> tuple[list[str], list[str]]:
    """(`-S key=value` for every value that differs from params.yaml of the commit, private keys that differ without their values)."""
    code, text = git_output("show", f"{_start()}:./params.yaml")
    try:
        old, new = _flat(yaml.safe_load(text) or {}) if code == 0 else {}, _flat(yaml.safe_load(present.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError, AttributeError):
        return [], []
    if not old:
        return [], []
    changed = {key: value for key, value in new.items() if key.split(".")[0] not in NOT_COMPUTED and not _same(old.get(key, _ABSENT), value)}
    private = [key for key in changed if PRIVATE_KEYS.search(key)]
    shown = [key for key in changed if key not in private]
    options = [f"-S {shlex.quote(('' if key in old else '+') + key + '=' + _value(changed[key]))}" for key in shown[:MAX_SHOWN]]
    options += [f"(and {len(shown) - MAX_SHOWN} values more)"] if len(shown) > MAX_SHOWN else []
    return options + [f"-S {key}=..." for key in private], private


def _same(first: Any, second: Any) -> bool:
    """Whether two values of YAML mean the same: 1e-3 is text to it, and 0.001 a number."""
    try:
        return first == second or (not isinstance(second, bool) and float(first) == float(second))
    except (TypeError, ValueError):
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves under dotted keys; lists and empty sections are leaves."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _value(value: Any) -> str:
    """As DVC reads it on a command line: text bare where it is a plain word, everything else as JSON."""
    if isinstance(value, str):
        return value if value and all(letter.isalnum() or letter in "_-./" for letter in value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ",".join(_value(one) for one in value) + "]"
    return json.dumps(value)
