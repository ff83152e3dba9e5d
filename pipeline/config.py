"""Reads params.yaml into the models of `parameters.py`, before anything runs, and reports all problems at once.

The parameters of a method live in its own file (`pipeline/methods/<name>.py`); this module asks the registry for them.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import ConfigError
from pipeline.files import hash_bytes
from pipeline.grid import grid_lines, replaced
from pipeline.parameters import (
    DataParams, EvaluateParams, ExtractParams, FinetuneParams, LaunchParams, PretrainParams, Section, SplitParams, TrackingParams,
)
from pipeline.registry import METHODS, did_you_mean

__all__ = ["Config", "fingerprint", "load_config", "pretraining_name", "tracking_uri_from_environment"]


class Config(Section):
    """All of params.yaml."""

    data: DataParams = Field(default_factory=DataParams)
    extract: ExtractParams = Field(default_factory=ExtractParams)
    split: SplitParams = Field(default_factory=SplitParams)
    pretrain: PretrainParams = Field(default_factory=PretrainParams)
    methods: dict[str, Any] = Field(default_factory=dict)
    """Validated blocks by method name: after loading, values are the methods' own `Params` objects."""
    finetune: FinetuneParams = Field(default_factory=FinetuneParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    tracking: TrackingParams = Field(default_factory=TrackingParams)
    launch: LaunchParams = Field(default_factory=LaunchParams)

    @property
    def method_params(self) -> Section:
        """The parameter block of the chosen method."""
        params = self.methods.get(self.pretrain.method) or METHODS.get(self.pretrain.method).Params()
        return params.suited(self.pretrain.backbone, self.pretrain.image_size)


def _valid_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys allowed beside the last element of `location`, or [] where the schema is open (free dictionaries)."""
    current: Any = model
    for part in location[:-1]:
        if get_origin(current) is dict:
            current = get_args(current)[1]
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        if field is None:
            return []
        current = field.annotation
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


# A few lines of YAML with aliases can stand for a value whose text would fill all memory.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlong = 3, 300, 300, 12, 12, 60


def _shown(value: Any) -> str:
    """A value as it stands in messages."""
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _allowed(problem: Mapping[str, Any]) -> str:
    """The `what is allowed` half of one pydantic problem."""
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        return f"allowed: {context['expected']}"
    if problem["type"] == "value_error":
        return str(context.get("error", problem["msg"]))
    return problem["msg"][0].lower() + problem["msg"][1:]


def _problems(model: type[Section], values: Any, prefix: tuple[str, ...] = ()) -> tuple[Section | None, list[str]]:
    """Validate one mapping; returns the model or None, and one line a problem."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        lines: dict[str, str] = {}
        hints: dict[str, str] = {}
        for problem in error.errors():
            # Union branches append tags such as `int` or `literal['auto']` behind the key itself.
            location = tuple(part for part in problem["loc"] if not (isinstance(part, str) and _is_branch(part)))
            key = ".".join(str(part) for part in (*prefix, *location)) or "params.yaml"
            if problem["type"] == "extra_forbidden":
                known = _valid_keys(model, location)
                near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                lines[key] = f"{key}: unknown key (value {_shown(problem['input'])}).{hint} Allowed here: {', '.join(known)}"
            else:
                # Our own validators say themselves what they got; the input of one over several keys is the whole block.
                found = "" if problem["type"] in ("missing", "value_error") else f"got {_shown(problem['input'])}; "
                text = f"{found}{_allowed(problem)}"
                lines[key] = f"{lines[key]}, or {_allowed(problem)}" if key in lines else f"{key}: {text}"
                if problem["type"] == "literal_error" and isinstance(problem["input"], str):
                    near = did_you_mean(problem["input"].lower()[:100], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
                    hints[key] = f".{near}" if near else ""
        return None, [line + hints.get(key, "") for key, line in lines.items()]


def _is_branch(part: str) -> bool:
    return part in {"int", "float", "str", "bool", "none"} or part.startswith(("literal[", "constrained-", "list[", "dict["))


def _across_sections(config: Config) -> list[str]:
    """Rules that join several sections."""
    known = ["main", *config.data.extra_sources]
    lines = [
        f"pretrain.sources: unknown source '{name}'. Allowed: {', '.join(known)} (main is data.source, the others are the "
        f"keys of data.extra_sources)"
        for name in config.pretrain.sources
        if name not in known
    ]
    if config.finetune.source != "main":
        lines.append(f"finetune.source: got '{config.finetune.source}'; allowed: main (the labelled corpus, data.source)")
    if config.evaluate.aggregation == "attention" and config.finetune.pooling != "attention":
        lines.append(
            "evaluate.aggregation: attention weighs frames as fine-tuning has learnt to, but finetune.pooling is mean. Use finetune.pooling: "
            "attention, or another aggregation"
        )
    lines += _grid_problems(config.finetune)
    for name in config.data.extra_sources:
        if name == "main" or not name.replace("_", "").replace("-", "").isalnum():
            lines.append(f"data.extra_sources.{name}: a source name is letters, digits, '_' and '-', and not 'main'")
    return lines


def _grid_problems(finetune: FinetuneParams) -> list[str]:
    """Keys, values and combinations of finetune.grid that no recipe could have; each problem once, with the first values that show it."""
    lines = grid_lines(finetune)
    if lines:
        return lines
    found: dict[str, str] = {}
    for chosen in itertools.product(*finetune.grid.values()):
        values = dict(zip(finetune.grid, chosen, strict=True))
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in values.items())
        for line in _problems(FinetuneParams, replaced(finetune, values), ("finetune",))[1]:
            found.setdefault(line, f"finetune.grid ({shown}): {line}")
    return list(found.values())


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and check params.yaml.

    Returns:
        The frozen configuration, with `methods` holding the validated block of every method that is listed.

    Raises:
        ConfigError: with one line for every problem found, each naming key, value, what is allowed and the nearest key.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: not found. Run from the project folder, where params.yaml lies.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2021-13-45 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as data: and pretrain:, found {type(raw).__name__}")
    raw = dict(raw)
    blocks = raw.pop("methods", None) or {}
    config, lines = _problems(Config, raw)
    methods: dict[str, Any] = {}
    if not isinstance(blocks, dict):
        lines.append(f"methods: expected one block per method, found {type(blocks).__name__}")
        blocks = {}
    for name, block in blocks.items():
        try:
            params = METHODS.get(name).Params
        except ConfigError as error:
            lines.append(str(error).replace("pretrain.method", f"methods.{name}", 1))
            continue
        methods[name], more = _problems(params, block or {}, ("methods", name))
        lines += more
    chosen = (raw.get("pretrain") or {}).get("method", "ucl") if isinstance(raw.get("pretrain"), dict) else "ucl"
    if isinstance(chosen, str) and chosen not in methods:
        try:
            methods[chosen] = METHODS.get(chosen).Params()
        except ConfigError as error:
            lines.append(str(error))
    if config is not None:
        lines += _across_sections(config)
    if lines or config is None:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{path}: {count}\n" + "\n".join(f"  {line}" for line in lines))
    return config.model_copy(update={"methods": methods})


def pretraining_name(method: str, init: str) -> str:
    """What an encoder is called where experiments are compared: `ucl`, `ucl from imagenet`, or `imagenet` without pretraining.

    Args:
        method: pretrain.method. init: pretrain.init; a path of weights is called `weights file`.
    """
    start = init if init in ("random", "imagenet") else "weights file"
    if method == "random":
        return start
    return method if start == "random" else f"{method} from {start}"


def fingerprint(*parts: Any) -> str:
    """16 hex digits over parameter models and JSON values: equal inputs give equal folders, different ones never meet."""
    canonical = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hash_bytes(json.dumps(canonical, sort_keys=True, ensure_ascii=False))[:16]


def tracking_uri_from_environment() -> str | None:
    """MLFLOW_TRACKING_URI, the field's usual way to name a server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None
