"""What MLflow is told about an execution: names, parameters without anything that identifies, git state, environment.

Nothing here talks to MLflow; `pipeline.tracking` collects these facts and `pipeline.tracking_store` delivers them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.config import Config, fingerprint, pretraining_name
from pipeline.files import hash_file

__all__ = [
    "PRIVATE_KEYS", "ExecutionFacts", "environment_tags", "execution_facts", "flatten", "git_output", "git_revision", "gpu_tags", "readable",
    "short_keys", "shown_params", "slug", "stage_params",
]

# Values that say where data lie, who is in them, or that are free text. Their effect on a result is carried by the data
# set's digest, so nothing is lost for comparison.
PRIVATE_KEYS = re.compile(
    r"(^|\.)(pseudonym_key|data\.(source|labels|include|extra_sources)|extract\.mask\.review|split\.file|evaluate\.title)(\.|$)"
)
STAGE_SECTIONS = {
    "extract": ("data", "extract"),
    "split": ("split",),
    "pretrain": ("pretrain", "methods"),
    "finetune": ("finetune",),
    "evaluate": ("evaluate",),
}
MOST_SPOKEN, MAX_SPOKEN = 5, 24
"""Changed parameters in a run's name, and characters of a value."""
PACKAGES = ("torch", "torchvision", "dvc", "mlflow", "numpy", "scikit-learn", "opencv-python")
# DVC itself rewrites these two when it runs an experiment; what they hold is logged as parameters and fingerprints.
GENERATED = (":(exclude)params.yaml", ":(exclude)dvc.lock")


class ExecutionFacts(BaseModel):
    """What makes one pipeline execution the same in all of its stage processes."""

    key: str
    """16 hex digits over experiment name, parameters and commit: the parent run is found again by it."""
    name: str
    tags: dict[str, str]
    params: dict[str, str]


def slug(text: str) -> str:
    """`text` with everything but letters, digits and `_` turned into single dashes, for file names and tag keys."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def readable(item: str) -> str:
    """`pretrained-fold0-seed1` and `pretrained fold 0 seed 1` both as the latter."""
    return re.sub(r"\b(fold|seed)(?=\d)", r"\1 ", re.sub(r"[-_\s]+", " ", item)).strip()


def _text(value: Any) -> str:
    """A parameter as MLflow shows it: text as it is, everything else as JSON, no absolute paths."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    looks_absolute = value.startswith(("/", "~", "\\\\", "file:")) or re.match(r"[A-Za-z]:[\\/]", value)
    return "(path left out)" if looks_absolute else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings and parameter models as one level of dotted keys with text values; private keys are left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        if PRIVATE_KEYS.search(name):
            continue
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = _text(value)
    return flat


def _init(value: str) -> str:
    """`random` and `imagenet` as they are; of a weights file only its name."""
    return re.split(r"[\\/]", value)[-1]


def shown_params(config: Config) -> dict[str, str]:
    """The whole resolved configuration as flat text, with only the chosen method's block and without private keys."""
    dump = {name: value for name, value in config.model_dump(mode="json", exclude={"methods"}).items()}
    for section in ("tracking", "launch"):
        dump.pop(section)
    dump["pretrain"]["init"] = _init(dump["pretrain"]["init"])
    method = config.pretrain.method
    if method in config.methods:
        dump["methods"] = {method: config.methods[method]}
    return flatten(dump)


def stage_params(params: Mapping[str, str], stage: str) -> dict[str, str]:
    """The part of `shown_params` that belongs to `stage`, keys unchanged so that columns of parent and child agree."""
    sections = STAGE_SECTIONS.get(stage, (stage,))
    return {key: value for key, value in params.items() if key.split(".", 1)[0] in sections}


def git_output(*arguments: str) -> tuple[int, str]:
    """Exit code and output of git in the working copy that runs; a queued experiment has one of its own."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout.strip()


def git_revision() -> str:
    """The commit of the working copy; empty outside of git."""
    code, head = git_output("rev-parse", "HEAD")
    return head if code == 0 else ""


def changed_params(config: Config) -> dict[str, str] | None:
    """Parameters that differ from params.yaml of the commit the experiment started from; None where that cannot be told."""
    code, text = git_output("show", f"{os.environ.get('DVC_EXP_BASELINE_REV') or 'HEAD'}:./params.yaml")
    try:
        raw = yaml.safe_load(text) if code == 0 else None
    except yaml.YAMLError:
        raw = None
    if not isinstance(raw, Mapping):
        return None
    before, now = flatten(raw), shown_params(config)
    now = {key: value for key, value in now.items() if not key.startswith("data.phantom") and key not in ("pretrain.method", "pretrain.init")}
    return {key: value for key, value in now.items() if key in before and not _equal(before[key], value)}


def _equal(first: str, second: str) -> bool:
    """Whether two texts of a parameter mean the same: 1e-3 is 0.001."""
    try:
        return first == second or float(first) == float(second)
    except ValueError:
        return False


def short_keys(keys: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The shortest end of each key that no other key of `known` has; the whole key where every shorter one has a double."""
    ends = Counter(".".join(key.split(".")[-size:]) for key in known for size in range(1, key.count(".") + 2))

    def short(key: str) -> str:
        parts = key.split(".")
        return next((name for size in range(1, len(parts)) if ends[name := ".".join(parts[-size:])] == 1), key)

    return {key: short(key) for key in keys}


def spoken_params(changed: Mapping[str, str], known: Mapping[str, str]) -> str:
    """`temperature=0.2 finetune.epochs=5`: each key as short as `short_keys` makes it."""
    short = short_keys(changed, known)
    words = [f"{short[key]}={value if len(value) <= MAX_SPOKEN else value[: MAX_SPOKEN - 1] + '…'}" for key, value in sorted(changed.items())]
    more = len(words) - MOST_SPOKEN
    return " ".join(words[:MOST_SPOKEN]) + (f" +{more} more" if more > 0 else "")


def execution_facts(config: Config) -> ExecutionFacts:
    """Collect what identifies this execution: the same in every stage process of one `dvc repro` or `dvc exp run`."""
    head = git_revision()
    dirty = git_output("diff", "--quiet", "HEAD", "--", ".", *GENERATED)[0] == 1 if head else False
    experiment = os.environ.get("DVC_EXP_NAME", "")
    determining = config.model_dump(mode="json", exclude={"tracking": True, "launch": True, "methods": True})
    # A guess at a weak key must not be checkable against a number that a shared server shows.
    determining["data"].pop("pseudonym_key", None)
    method = config.pretrain.method
    block = config.methods.get(method, {})
    called = pretraining_name(method, config.pretrain.init)
    params_hash = fingerprint(determining, block)
    params = shown_params(config)
    different = changed_params(config)
    changed = spoken_params(different or {}, params)
    unchanged = f"baseline {head[:7]}" if different == {} else params_hash[:7]
    tags = {
        "dvc.experiment": experiment or "workspace",
        "dvc.baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "git.commit": head,
        "git.dirty": "yes" if dirty else "no",
        "mlflow.source.git.commit": head,
        "mlflow.source.name": "dvc exp run" if experiment else "dvc repro",
        "mlflow.source.type": "LOCAL",
        "method": called,
        "scope": config.pretrain.scope,
        "sonoscope.params": params_hash,
        "changed": changed,
    }
    return ExecutionFacts(
        key=fingerprint(experiment or "workspace", params_hash, head),
        name=f"{called} {changed or experiment or unchanged}",
        tags={key: value for key, value in tags.items() if value},
        params=params,
    )


def environment_tags() -> dict[str, str]:
    """Python, package versions, platform, cores and lock file of this process, without importing any of them."""
    tags = {
        "env.python": platform.python_version(),
        "env.platform": f"{platform.system()} {platform.machine()}",
        "env.cpus": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            tags[f"env.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    lock = Path("requirements.lock")
    if lock.is_file():
        tags["env.lock"] = hash_file(lock)[:16]
    return tags


def gpu_tags() -> dict[str, str]:
    """Names of the GPUs this process used; empty when torch or CUDA was never started here."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return {}
    try:
        return {"env.gpus": ", ".join(cuda.get_device_name(index) for index in range(cuda.device_count()))}
    except RuntimeError:
        return {}  # A GPU that failed is the stage's error, not one of the log.
