"""What can be checked before anything runs: parameters, and the files and folders they name.

The first stage of the pipeline (`stages/check.py`) calls it, so that a mistyped method or a missing folder ends with a
sentence at once, and not with DVC's "No such file" behind an hour of other stages.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.methods.base import Setting
from pipeline.registry import BACKBONES, HEADS, METHODS, did_you_mean

__all__ = ["check_named_files", "method_problems"]

PHANTOM = "data/phantom"
"""Written by the stage of that name, so it need not exist before."""


def _source_problem(key: str, path: str) -> str | None:
    if path == PHANTOM or Path(path).is_dir():
        return None
    what = "is a file, not a folder" if Path(path).exists() else "does not exist"
    hint = "" if Path(path).is_absolute() else " In a queued experiment a relative path must be known to git or DVC; use an absolute one."
    return f"{key}: {path} {what}. Give a folder of videos, stills or frame folders, or {PHANTOM} for the phantom clips.{hint}"


def method_problems(config: Config, labelled: dict[str, int] | None = None) -> list[str]:
    """What the chosen method says against this run; `labelled` counts labelled videos a class, None where not known yet."""
    pretrain, labels = config.pretrain, labelled
    if labels is None and config.data.labels == "none" and not config.data.extra_sources:
        labels = {}
    setting = Setting(
        pretrain.backbone, pretrain.image_size, max(1, pretrain.batch_size // pretrain.accumulate), pretrain.scope, labels
    )
    return METHODS.get(pretrain.method).problems(config.method_params, setting)


def check_named_files(config: Config) -> None:
    """Check that everything params.yaml points at is there.

    Raises:
        ConfigError: one line for every folder or file that is missing, and every name of a network part that is unknown.
    """
    sources = {"data.source": config.data.source}
    sources |= {f"data.extra_sources.{name}.path": source.path for name, source in config.data.extra_sources.items()}
    lines = [line for key, path in sources.items() if (line := _source_problem(key, path))]
    if config.split.file is not None and not Path(config.split.file).is_file():
        lines.append(f"split.file: {config.split.file} does not exist. Give a JSON file of folds, or null for folds drawn here.")
    for registry, name in ((BACKBONES, config.pretrain.backbone), (HEADS, config.finetune.head)):
        known = registry.declared()
        if name not in known:
            lines.append(f"{registry.key}: unknown {registry.kind} '{name}'. Allowed: {', '.join(known)}.{did_you_mean(name, known)}")
    words = ("linear", "last_block", "all")
    if config.finetune.trainable not in words and not re.match(r"(conv1|bn1|layer[1-4])(\.|$)", config.finetune.trainable):
        lines.append(
            f"finetune.trainable: '{config.finetune.trainable}' is no part of a network. Allowed: {', '.join(words)}, or the beginning of "
            f"parameter names such as layer4.1.{did_you_mean(config.finetune.trainable, words)}"
        )
    init = config.pretrain.init
    if init not in ("random", "imagenet") and not Path(init).is_file():
        lines.append(f"pretrain.init: {init} does not exist. Allowed: random, imagenet, or a weights file (.safetensors, .pth, .pt).")
    lines += method_problems(config)
    if lines:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"params.yaml: {count}\n" + "\n".join(f"  {line}" for line in lines))
