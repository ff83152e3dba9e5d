"""What dvc.lock records of results: their digests, and the parameters they were made with, whatever params.yaml says by now."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["digests", "folder_digest", "overlaid", "recorded", "stages_of"]


def stages_of(lock: bytes) -> dict[str, Any]:
    """The stages that dvc.lock records; {} where it cannot be read."""
    try:
        return dict(yaml.load(lock, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"])
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError):
        return {}


def digests(stages: Mapping[str, Any], stage: str, kind: str = "outs") -> dict[str, str]:
    """Digests of what a stage has written (or read, with `deps`), by path."""
    try:
        return {str(item["path"]): str(item.get("md5", "")) for item in stages[stage].get(kind, [])}
    except (KeyError, TypeError, AttributeError):
        return {}


def folder_digest(folder: Path) -> str:
    """The digest that DVC gives a folder: of the sorted list of the files in it with theirs."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(), "relpath": name} for name, path in files]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode("utf-8"), usedforsecurity=False).hexdigest() + ".dir"


def recorded(stages: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Parameters by dotted key (of a value or a section) that an evaluation and its data were made with; stages it lags behind, which do not count."""
    try:
        params = {name: dict((block.get("params") or {}).get("params.yaml") or {}) for name, block in stages.items()}
        pretrain = params["evaluate"]["pretrain"]
        sources = [str(name) for name in pretrain["sources"]]
        if not isinstance(pretrain["method"], str):
            return {}, []
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}, []  # another pipeline's, or one that has not been evaluated
    used = digests(stages, "evaluate", "deps")
    earlier = ["phantom", "extract", "split", *(f"extract_extra@{name}" for name in sources)]
    behind = [name for name in earlier if any(digest != used.get(path, digest) for path, digest in digests(stages, name).items())]
    found: dict[str, Any] = {}
    for name in [*(name for name in earlier if name not in behind), "evaluate"]:
        found |= params.get(name, {})
    return found, behind


def overlaid(given: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """params.yaml with the recorded values and sections in their places."""
    result = copy.deepcopy(dict(given))
    for key, value in record.items():
        *sections, last = str(key).split(".")
        place = result
        for part in sections:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    return result
