"""What can be checked before anything runs: parameters, and the files and folders they name.

The first stage of the pipeline (`stages/check.py`) calls it, so that a mistyped method or a missing folder ends with a
sentence at once, and not with DVC's "No such file" behind an hour of other stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.grid import candidates
from pipeline.methods.base import Setting
from pipeline.models.catalog import LEVEL_HEADS, describe, levels_problem, missing_problems, size_problem, trainable_problem
from pipeline.registry import BACKBONES, HEADS, METHODS, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["check_named_files", "method_problems"]

PHANTOM = "data/phantom"
"""Written by the stage of that name, so it need not exist before."""


def _source_problem(key: str, path: str) -> str | None:
    if path == PHANTOM or Path(path).is_dir():
        return None
    what = "is a file, not a folder" if Path(path).exists() else "does not exist"
    hint = "" if Path(path).is_absolute() else " In a queued experiment a relative path must be known to git or DVC; use an absolute one."
    return f"{key}: {path} {what}. Give a folder of videos, stills or frame folders, or {PHANTOM} for the phantom clips.{hint}"


def _has_no_labels(path: str) -> bool:
    """Whether a source cannot have labels, by a look at the names in its folder: no table, and not two folders that could be classes."""
    folder = Path(path)
    try:
        seen = [item for item in folder.iterdir() if not item.name.startswith(".")]
        return not any(item.suffix.lower() == ".csv" for item in seen) and sum(item.is_dir() for item in seen) < 2
    except OSError:
        return False  # missing folders and locked ones are told elsewhere


def method_problems(config: Config) -> list[str]:
    """What the chosen method says against this run, as far as params.yaml tells (the videos are looked at by the stage)."""
    pretrain = config.pretrain
    tables = {"main": "none" if pretrain.scope == "all" or config.data.group == "frame" else config.data.labels}
    tables |= {name: source.labels for name, source in config.data.extra_sources.items()}
    paths = {"main": config.data.source} | {name: source.path for name, source in config.data.extra_sources.items()}
    # Phantoms are not written yet or have a table; labels of frames lie in files of their own.
    open_ends = {name for name, path in paths.items() if path == PHANTOM} | ({"main"} if config.data.frame_labels else set())
    method = METHODS.get(pretrain.method)
    searched = [name for name in pretrain.sources if tables.get(name) == "auto" and name not in open_ends]
    bare = [name for name in searched if method.label_share(config.method_params) > 0 and _has_no_labels(paths[name])]
    known = all(tables.get(name) == "none" or name in bare for name in pretrain.sources)
    labels: dict[str, int] | None = {} if known else None
    lines = method.problems(config.method_params, Setting.of(config, labels))
    if bare and lines != method.problems(config.method_params, Setting.of(config, None)):
        lines += [f"data.labels: auto, but {paths[name]} has neither a CSV table nor class folders (<class>/<file>)" for name in bare]
    return lines


def _backbone_problems(config: Config) -> list[str]:
    """An image that the patches do not divide (methods say so of their smaller views), and parts that the network does not have."""
    info = describe(config.pretrain.backbone)
    lines = [size_problem(info, config.pretrain.image_size), *missing_problems(info, config.pretrain.init_allow_missing)]
    for recipe in (recipe for _, recipe in candidates(config.finetune)):
        if recipe.head in LEVEL_HEADS:
            lines.append(levels_problem(info, f"finetune.head: {recipe.head}"))
        lines.append(trainable_problem(info, recipe.trainable))
    return [line for line in lines if line]


def _frame_problems(config: Config) -> list[str]:
    """What a split by frame cannot go with; the split stage would say it only behind extraction."""
    if config.data.group != "frame":
        return []
    lines = ["data.group: frame deals single frames, and split.file divides videos. Set one of them back"] if config.split.file else []
    if config.data.frame_labels:
        lines.append("data.group: frame is for videos with one label each, and data.frame_labels gives each frame its own. Use group: video")
    return lines


def _selection_problems(config: Config) -> list[str]:
    """Nested selection with an encoder that knows labels of its validation patients; attention over what a head does not give."""
    pretrain, finetune, lines = config.pretrain, config.finetune, []
    heads = {recipe.head for _, recipe in candidates(finetune)} & set(LEVEL_HEADS)
    if finetune.pooling == "attention" and heads:
        lines.append(
            f"finetune.pooling: attention weighs frames by their pooled features; head {min(heads)} takes several levels. Use pooling: mean, "
            f"or head: linear or mlp"
        )
    if finetune.selection == "nested" and config.data.group == "frame":
        lines.append("finetune.selection: nested needs patients that stay apart, but data.group is frame. Use selection: inner, or group: patient")
    told = METHODS.get(pretrain.method).label_share(config.method_params) > 0 and pretrain.scope == "fold" and "main" in pretrain.sources
    if finetune.selection == "nested" and told and "pretrained" in finetune.initialisations and config.data.labels != "none":
        lines.append(
            f"finetune.selection: nested validates on every training patient in turn, but pretrain.method {pretrain.method} reads the labels "
            f"of training patients, so that the choice would be made on patients the encoder was told about. Use selection: inner (such a "
            f"method is never told its validation patients), a setting of the method without labels, or another method"
        )
    return lines


def _pyramid_problems(config: Config, head: str, extras: Mapping[str, torch.Tensor]) -> list[str]:
    """What a head of several levels says against the tensors of a file. Built without memory: it may have hundreds of millions of weights."""
    import torch

    from pipeline.models.backbones import build_trunk
    from pipeline.models.levels import stage_channels

    info = describe(config.pretrain.backbone)
    if levels_problem(info, "finetune.head"):
        return []  # said with the backbone
    with torch.device("meta"):
        channels = stage_channels(build_trunk(info, config.pretrain.image_size))
        try:
            HEADS.get(head)(channels, 2, config.pretrain.image_size, {name: value.to("meta") for name, value in extras.items()})
        except CheckpointError as error:
            return [str(error)]
    return []


def _head_problems(config: Config, head: str) -> list[str]:
    """A head that continues from a pretrained pyramid, where pretraining leaves none or not all of it. Imports torch for a file of weights."""
    pretrain = config.pretrain
    kind = METHODS.get(pretrain.method)
    if head not in LEVEL_HEADS or "pretrained" not in config.finetune.initialisations or kind.leaves_pyramid(config.method_params):
        return []
    if not kind.trains and Path(pretrain.init).is_file():
        from pipeline.models.published import initial_tensors, to_extras

        try:
            extras = to_extras(initial_tensors(pretrain.backbone, pretrain.init)[0])
        except CheckpointError:
            return []  # said with the weights
        if extras:
            return _pyramid_problems(config, head, extras)
    return [
        f"finetune.head: {head} continues from the pyramid that HiCo leaves beside the trunk; pretrain.method {pretrain.method} leaves none "
        f"here. Use pretrain.method: hico (objective semi or self), or random with pretrain.init a file of HiCo, or another head."
    ]


def _weights_problems(config: Config) -> list[str]:
    """Weights that are not there or do not fit the backbone: said now, and not behind hours of extraction. Imports torch."""
    from pipeline.models.published import initial_tensors, to_extras, to_trunk

    pretrain = config.pretrain
    try:
        tensors, source = initial_tensors(pretrain.backbone, pretrain.init)
        to_trunk(tensors, pretrain.backbone, source=source, allow_missing=pretrain.init_allow_missing)
    except CheckpointError as error:
        return [str(error)]
    if METHODS.get(pretrain.method).trains:
        return []
    try:
        to_extras(tensors)  # handed on as they are
    except CheckpointError as error:
        return [f"pretrain.init: {source}: {error}"]
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
    lines += _frame_problems(config)
    review = config.extract.mask.review
    if review is not None and not Path(review).is_file():
        lines.append(f"extract.mask.review: {review} does not exist. Give a CSV file of decisions (docs/masking.md), or null.")
    heads = list(dict.fromkeys(recipe.head for _, recipe in candidates(config.finetune)))
    for registry, known, name in (
        (BACKBONES, BACKBONES.names(), config.pretrain.backbone), *((HEADS, HEADS.declared(), head) for head in heads),
    ):
        if name not in known:
            lines.append(f"{registry.key}: unknown {registry.kind} '{name}'. Allowed: {', '.join(known)}.{did_you_mean(name, known)}")
    known_backbone = config.pretrain.backbone in BACKBONES.names()
    if known_backbone:
        lines += _backbone_problems(config)
    init = config.pretrain.init
    if init not in ("random", "imagenet") and not Path(init).is_file():
        from pipeline.checkpoint import missing_weights

        lines.append(missing_weights(Path(init), "pretrain.init"))
    elif init != "random" and known_backbone:
        lines += _weights_problems(config)
    lines += [line for head in heads for line in _head_problems(config, head)]
    lines += _selection_problems(config)
    if known_backbone:
        lines += method_problems(config)
    lines = list(dict.fromkeys(lines))  # a method that needs an even image says it too
    if lines:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"params.yaml: {count}\n" + "\n".join(f"  {line}" for line in lines))
