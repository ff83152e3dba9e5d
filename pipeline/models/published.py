"""Weights of published programs into our trunks: which program wrote a file is read off its names.

Nothing is loaded by halves: a trunk tensor that is missing, of another shape, or too many is an error that says what was
found. The names come from the formats' descriptions, checked against files in their layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint import read_state_dict
from pipeline.errors import CheckpointError
from pipeline.models.backbones import build_trunk, imagenet_state
from pipeline.models.catalog import BackboneInfo, describe, names, within

__all__ = ["KeyReport", "detect_format", "initial_tensors", "load_trunk", "to_extras", "to_trunk"]

# Where programs keep their networks in the file, best first: of a pair, the slowly moving one is the published result (timm's
# own loader takes its `_ema` too).
_CONTAINERS = ("target_encoder", "teacher", "state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")

# (format, where the trunk is, a name that only this format has). The first whose trunk and sign are found.
_FORMATS = (
    ("US_UCL", "encoder_q.", r"(q_cycle_fc\.|negatives$)"),
    ("MoCo", "encoder_q.", ""),
    ("MoCo v3", "base_encoder.", ""),
    ("HiCo", "features.R18.", ""),
    ("USCL", "features.", r"features\.4\.0\.conv1\."),
    ("torchvision vision transformer", "", r"class_token$"),
    ("DINO", "backbone.", r"head\.(mlp|last_layer)\."),
    ("trunk with a head", "backbone.", ""),
    ("trunk with a head", "encoder.", ""),
    ("MSN", "", r"fc\.fc1\."),
    ("timm vision transformer", "", r"cls_token$"),
    ("torchvision ResNet", "", r"layer1\."),
)

# USCL numbers the children of torchvision's ResNet; relu, maxpool and avgpool have no tensors.
_USCL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# HiCo's pyramid, level projectors and classifier, under the names that our HiCo exports. The laterals and 3x3 convolutions are
# numbered from coarse to fine; l4 is in the file although no loss ever reached it.
_HICO = {
    "features.toplayer": "pyramid.lateral.p5", "features.latlayer1": "pyramid.lateral.p4", "features.latlayer2": "pyramid.lateral.p3",
    "features.latlayer3": "pyramid.lateral.p2", "features.smooth1": "pyramid.smooth.p4", "features.smooth2": "pyramid.smooth.p3",
    "features.smooth3": "pyramid.smooth.p2", "l2": "levels.p2.hidden", "l3": "levels.p3.hidden", "l4": "levels.p4.hidden",
    "l5": "levels.p5.hidden", "l22": "levels.p2.out", "l33": "levels.p3.out", "l55": "levels.p5.out", "lf": "classifier.0",
    "fc": "classifier.2",
}

# torchvision's names of the same transformer; its older files number the layers of the MLP.
_TORCHVISION_VIT = (
    (r"^conv_proj", "patch_embed.proj"), (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."), (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"\.ln_", ".norm"),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj", ".attn.proj"),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."), (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
)

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Tensors of a trunk of either family; one of these that the wanted trunk lacks says that the file is of another network.
_TRUNK = re.compile(
    r"(conv1|bn1|layer\d|cls_token|reg_token|register_tokens|dist_token|pos_embed|patch_embed|blocks|norm|norm_pre)(\.|$)"
)


@dataclass(frozen=True)
class KeyReport:
    """What happened to the names of a weights file.

    Attributes:
        format: the program that wrote it. prefix: what stands before the trunk's names in it. matched: tensors of the trunk
            that were found. missing: tensors of the trunk that stay as initialised. unexpected: names in the file that are
            not used (heads, queues, a second network). grid: sides of the patch grid in the file and here, where they differ.
    """

    format: str
    prefix: str
    matched: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [f"format {self.format} (prefix '{self.prefix}'): {self.matched} tensors of the trunk matched"]
        parts += [f"{len(some)} {what}{_examples(some)}" for some, what in ((self.missing, "missing"), (self.unexpected, "not used"))]
        if self.grid:
            parts.append("positions resampled from {0}x{0} to {1}x{1} patches".format(*self.grid))
        container = self.prefix.partition(".")[0]
        if container in _CONTAINERS:
            parts.append(f"read from the file's container '{container}'")
        return ", ".join(parts)


def _examples(some: Sequence[str]) -> str:
    return f" ({', '.join(some[:4])}{' ...' if len(some) > 4 else ''})" if some else ""


def _detect(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """(format, prefix of the trunk in this file).

    Raises:
        CheckpointError: no known format.
    """
    outer = next((f"{name}." for name in _CONTAINERS if any(key.startswith(f"{name}.") for key in tensors)), "")
    inner = [key.removeprefix(outer) for key in tensors if key.startswith(outer)]
    # DistributedDataParallel puts this before every name.
    if sum(key.startswith("module.") for key in inner) > len(inner) / 2:
        outer, inner = f"{outer}module.", [key.removeprefix("module.") for key in inner if key.startswith("module.")]
    for name, prefix, sign in _FORMATS:
        if any(key.startswith(prefix) for key in inner) and any(re.match(sign, key) for key in inner):
            return name, outer + prefix
    known = ", ".join(dict.fromkeys(name for name, _, _ in _FORMATS))
    raise CheckpointError(f"the names are those of no known program, for example{_examples(sorted(tensors))}. Known: {known}.")


def detect_format(tensors: Mapping[str, torch.Tensor]) -> str:
    """Which program wrote these tensors: US_UCL, MoCo, MoCo v3, HiCo, USCL, DINO, MSN, a timm or torchvision state dict, ...

    Raises:
        CheckpointError: no known format; the message has names of the file and the known formats.
    """
    return _detect(tensors)[0]


def _trunk_name(name: str, file_format: str) -> str:
    """Name in the trunk for a name behind the prefix."""
    if file_format == "USCL":
        number, _, rest = name.partition(".")
        return f"{_USCL.get(number, number)}.{rest}"
    if file_format == "torchvision vision transformer":
        for pattern, replacement in _TORCHVISION_VIT:
            name = re.sub(pattern, replacement, name)
    return name


def _unsound(name: str, value: torch.Tensor) -> str | None:
    """Why this tensor of a file cannot be a weight, or None."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type == "meta":
        return "not dense"
    if name.endswith("num_batches_tracked"):
        return None
    if value.dtype not in _REAL:
        return str(value.dtype).removeprefix("torch.")
    if value.untyped_storage().nbytes() < value.nbytes:
        return "larger than its data"
    return None if value.isfinite().all() else "not finite"


def _demand_sound(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `CheckpointError`, one line, where a tensor is no dense tensor of finite real numbers (step counters excepted)."""
    wrong = [f"{name}: {why}" for name, value in sorted(tensors.items()) if (why := _unsound(name, value))]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors cannot be weights{_examples(wrong)}. Wanted: dense tensors of finite float16, bfloat16, float32 or float64."
        )


def _positions(found: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Resample the positions of another grid in place; returns the two sides, or None where they were equal."""
    have, want = found.get("pos_embed"), wanted.get("pos_embed")
    if have is None or want is None or have.shape == want.shape or have.ndim != 3 or have.shape[2] != want.shape[2]:
        return None
    from pipeline.models.vit import resample_positions

    side = math.isqrt(want.shape[1] - 1)
    found["pos_embed"] = resample_positions(have, side)
    return math.isqrt(have.shape[1] - 1), side


def _fit(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], allow_missing: Sequence[str]
) -> tuple[dict[str, torch.Tensor], KeyReport, list[str]]:
    """(state under the trunk's names, report, what does not fit: one phrase each)."""
    file_format, prefix = _detect(tensors)
    inside = {_trunk_name(name.removeprefix(prefix), file_format): name for name in tensors if name.startswith(prefix)}
    found = {name: tensors[inside[name]] for name in wanted if name in inside}
    _demand_sound(found)
    # Some programs train in half precision; nothing here does.
    found = {name: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for name, value in found.items()}
    grid = _positions(found, wanted)
    # Old files lack batch norm's step counter; it plays no part with a fixed momentum.
    absent = sorted(name for name in wanted if name not in inside and not name.endswith("num_batches_tracked"))
    missing = [name for name in absent if not any(within(name, part) for part in allow_missing)]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in sorted(found.items()) if value.shape != wanted[name].shape
    ]
    extra = sorted(name for name in inside if name not in wanted and _TRUNK.match(name))
    lists = ((missing, "are missing"), (shapes, "have another shape"), (extra, "in the file are no part of it"))
    phrases = [f"{len(some)} tensors {what}{_examples(some)}" for some, what in lists if some]
    used = {inside[name] for name in found}
    return found, KeyReport(file_format, prefix, len(found), absent, sorted(set(tensors) - used), grid), phrases


def _shapes(info: BackboneInfo, image_size: int) -> dict[str, torch.Tensor]:
    """The state dict of a trunk without memory behind it."""
    size = image_size if not info.patch_size else max(1, image_size // info.patch_size) * info.patch_size
    with torch.device("meta"):
        return build_trunk(info, size).state_dict()


def _suits(tensors: Mapping[str, torch.Tensor], name: str) -> bool:
    try:
        return not _fit(tensors, _shapes(describe(name), 224), ())[2]
    except CheckpointError:
        return False


def _checked(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], what: str, source: str, key: str, allow_missing: Sequence[str]
) -> tuple[dict[str, torch.Tensor], KeyReport]:
    """`_fit`, or the error that says why not, and which known backbone the file is of."""
    try:
        state, report, phrases = _fit(tensors, wanted, allow_missing)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {source}: {error}") from None
    if not phrases:
        return state, report
    suited = [name for name in names() if _suits(tensors, name)]
    advice = f"It fits pretrain.backbone: {suited[0]}." if suited else "It fits none of the known backbones."
    if report.missing and len(phrases) == 1 and key == "pretrain.init":
        advice += " Parts that may stay as initialised can be named in pretrain.init_allow_missing."
    raise CheckpointError(f"{key}: {source} (format {report.format}) does not fit {what}: {'; '.join(phrases)}. {advice}")


def to_trunk(
    tensors: Mapping[str, torch.Tensor], backbone: str | BackboneInfo, image_size: int = 224, *, source: str = "the file",
    key: str = "pretrain.init", allow_missing: Sequence[str] = (),
) -> tuple[dict[str, torch.Tensor], KeyReport]:
    """Tensors of a published file -> state dict of our trunk, positions resampled to `image_size`, and what became of each name.

    Args:
        tensors: names as in the file, containers joined with dots (`read_state_dict`). source: what errors call the file.
        allow_missing: parts of the trunk that need not be there, e.g. ("norm",).

    Raises:
        CheckpointError: unknown format, tensors that cannot be weights, or another architecture: counts, examples, and the backbone it fits.
    """
    info = describe(backbone) if isinstance(backbone, str) else backbone
    return _checked(tensors, _shapes(info, image_size), info.name, source, key, allow_missing)


def to_extras(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a file of the published HiCo program holds beside its trunk, float32, under the names of `HiCo.exports`; else nothing.

    Raises:
        CheckpointError: unknown format, or numbers that cannot be weights.
    """
    file_format, prefix = _detect(tensors)
    if file_format != "HiCo":
        return {}
    outer = prefix.removesuffix("features.R18.")
    parts = {name: name.removeprefix(outer).rpartition(".") for name in tensors if name.startswith(outer)}
    found = {f"{_HICO[part]}.{kind}": tensors[name] for name, (part, _, kind) in parts.items() if part in _HICO}
    _demand_sound(found)
    return {name: value.float() for name, value in found.items()}


def load_trunk(
    network: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, key: str = "pretrain.init", allow_missing: Sequence[str] = ()
) -> KeyReport:
    """Load a published file into a trunk; every tensor must fit but those named.

    Raises:
        CheckpointError: as `to_trunk`; nothing is loaded then.
    """
    state, report = _checked(tensors, network.state_dict(), "this backbone", source, key, allow_missing)
    network.load_state_dict(state, strict=False)
    return report


def initial_tensors(backbone: str, init: str) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors, what to call them) for `pretrain.init`: imagenet, or the path of a weights file."""
    if init == "imagenet":
        return imagenet_state(backbone), "imagenet weights"
    return read_state_dict(Path(init)), Path(init).name
