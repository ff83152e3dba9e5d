"""A project of its own in a temporary folder, with the code as it is now and tiny parameters; and commands run in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]

# One epoch of fine-tuning, three short ones of pretraining, frames of 32 pixels: a stage lasts as long as its imports.
TINY: dict[str, Any] = {
    "data.phantom.patients": 8, "data.phantom.clips_per_patient": 1, "data.phantom.seconds": 1.5, "data.phantom.size": 48,
    "extract.short_side": 48, "split.folds": [0, 1], "split.inner_folds": 2,
    "pretrain.image_size": 32, "pretrain.epochs": 3, "pretrain.batch_size": 4, "pretrain.memory_budget_mb": 64,
    "methods.ucl.cross_only_epochs": 1, "methods.ucl.decay_start": 1,
    "finetune.epochs": 1, "finetune.batch_size": 8, "finetune.frames_per_video": 2, "finetune.eval_frames_per_video": 2,
    "finetune.cached_views": 1, "evaluate.bootstrap": 100, "launch.device": "cpu", "launch.threads": 1,
    "tracking.flush_seconds": 1,
}


def environment() -> dict[str, str]:
    """This process's variables without anything that points at another project, and with this Python's commands first."""
    unwanted = ("DVC_", "MLFLOW_", "GIT_", "PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_", "MAKE", "MFLAGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"}


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the project; a failure shows what it said."""
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-6000:]}"
    return done


def set_params(folder: Path, values: Mapping[str, Any]) -> None:
    """Change values of params.yaml; each key must be there."""
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        *sections, name = key.split(".")
        section = params
        for part in sections:
            section = section[part]
        assert name in section, key
        section[name] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def make_project(folder: Path, values: Mapping[str, Any]) -> Path:
    """The working tree (also what is not committed yet) as a fresh repository with one commit."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listing:
        if name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    set_params(folder, {**TINY, **values})
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "config", "user.name", "Test")
    run(folder, "git", "config", "user.email", "test@example.org")
    run(folder, "git", "config", "commit.gpgsign", "false")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "-m", "A project")
    return folder
