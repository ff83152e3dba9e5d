"""What can be checked before anything runs: parameters, and the files and folders they name.

The first stage of the pipeline (`stages/check.py`) calls it, so that a mistyped method or a missing folder ends with a
sentence at once, and not with DVC's "No such file" behind an hour of other stages.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.methods.base import Setting
from pipeline.models.catalog import LEVEL_HEADS, describe, levels_problem, size_problem, trainable_problem
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


def method_problems(config: Config) -> list[str]:
    """What the chosen method says against this run, as far as params.yaml tells (the videos are looked at by the stage)."""
    pretrain = config.pretrain
    tables = {"main": "none" if pretrain.scope == "all" else config.data.labels}
    tables |= {name: source.labels for name, source in config.data.extra_sources.items()}
    labels: dict[str, int] | None = {} if all(tables.get(source) == "none" for source in pretrain.sources) else None
    return METHODS.get(pretrain.method).problems(config.method_params, Setting.of(config, labels))


def _backbone_problems(config: Config) -> list[str]:
    """Sizes that the patches do not divide, and a part to train that the network does not have."""
    info = describe(config.pretrain.backbone)
    rules = METHODS.get(config.pretrain.method).views(config.method_params, config.pretrain.image_size)
    sizes = {"pretrain.image_size": config.pretrain.image_size}
    sizes |= {f"methods.{config.pretrain.method}: views of {role}": rule.size for role, rule in rules.items()}
    lines = [size_problem(info, size, key) for key, size in sizes.items()]
    if config.finetune.head in LEVEL_HEADS:
        lines.append(levels_problem(info, f"finetune.head: {config.finetune.head}"))
    return [line for line in (*lines, trainable_problem(info, config.finetune.trainable)) if line]


def _weights_problems(config: Config) -> list[str]:
    """Weights that are not there or do not fit the backbone: said now, and not behind hours of extraction. Imports torch."""
    from pipeline.models.published import initial_tensors, to_trunk

    pretrain = config.pretrain
    try:
        tensors, source = initial_tensors(pretrain.backbone, pretrain.init)
        to_trunk(tensors, pretrain.backbone, source=source, allow_missing=pretrain.init_allow_missing)
    except CheckpointError as error:
        return [str(error)]
    return []


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
    for registry, known, name in (
        (BACKBONES, BACKBONES.names(), config.pretrain.backbone), (HEADS, HEADS.declared(), config.finetune.head),
    ):
        if name not in known:
            lines.append(f"{registry.key}: unknown {registry.kind} '{name}'. Allowed: {', '.join(known)}.{did_you_mean(name, known)}")
    if config.pretrain.backbone in BACKBONES.names():
        lines += _backbone_problems(config)
    init = config.pretrain.init
    if init not in ("random", "imagenet") and not Path(init).is_file():
        lines.append(f"pretrain.init: {init} does not exist. Allowed: random, imagenet, or a weights file (.safetensors, .pth, .pt).")
    elif init != "random" and config.pretrain.backbone in BACKBONES.names():
        lines += _weights_problems(config)
    lines += method_problems(config)
    if lines:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"params.yaml: {count}\n" + "\n".join(f"  {line}" for line in lines))
