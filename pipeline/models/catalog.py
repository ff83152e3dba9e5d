"""Backbones by name, as facts that can be read without torch: family, feature size, patch size, blocks.

`backbones.py` builds them. The keys of the ResNets are torchvision's, those of the vision transformers timm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.registry import BACKBONES, did_you_mean

__all__ = [
    "LEVEL_HEADS", "BackboneInfo", "describe", "last_block", "levels_problem", "missing_problems", "names", "part_names",
    "size_problem", "trainable_problem", "within",
]


LEVEL_HEADS = ("hico_official", "hico_pyramid")
"""Fine-tuning heads that take several levels of features."""


@dataclass(frozen=True)
class BackboneInfo:
    """One architecture.

    Attributes:
        blocks: residual blocks of each of the four stages, or the transformer blocks alone, e.g. (12,).
        patch_size: side of a patch in pixels, 0 for ResNets. heads: attention heads, 0 for ResNets.
        weights: file name of its ImageNet-1k weights in torch hub's cache, "" where there are none.
        hub: repository of the same weights in the Hugging Face cache, "" where there is none.
        layer_scale: the output of every attention and MLP is scaled by a learnt vector, as in DINOv2.
    """

    name: str
    family: Literal["resnet", "vit"]
    feature_dim: int
    blocks: tuple[int, ...]
    patch_size: int = 0
    heads: int = 0
    weights: str = ""
    hub: str = ""
    layer_scale: bool = False


# resnet10 is torchvision's ResNet with one basic block a stage: its keys are a subset of resnet18's. It is there for
# CPUs and tests, where resnet18 is three times slower. The ImageNet weights of the transformers are DeiT's, whose inputs
# are normalised with ImageNet's statistics as everything here is (those of timm's other ViTs are not).
for _info in (
    BackboneInfo("resnet10", "resnet", 512, (1, 1, 1, 1)),
    BackboneInfo("resnet18", "resnet", 512, (2, 2, 2, 2), weights="resnet18-f37072fd.pth"),
    BackboneInfo("resnet34", "resnet", 512, (3, 4, 6, 3), weights="resnet34-b627a593.pth"),
    BackboneInfo("resnet50", "resnet", 2048, (3, 4, 6, 3), weights="resnet50-0676ba61.pth"),
    BackboneInfo("vit_tiny", "vit", 192, (12,), 16, 3, "deit_tiny_patch16_224-a1311bcf.pth", "timm/deit_tiny_patch16_224.fb_in1k"),
    BackboneInfo("vit_small", "vit", 384, (12,), 16, 6, "deit_small_patch16_224-cd65a155.pth", "timm/deit_small_patch16_224.fb_in1k"),
    BackboneInfo("vit_small_8", "vit", 384, (12,), 8, 6),
    BackboneInfo("vit_base", "vit", 768, (12,), 16, 12, "deit_base_patch16_224-b5f2ef4d.pth", "timm/deit_base_patch16_224.fb_in1k"),
    BackboneInfo("vit_base_4", "vit", 768, (12,), 4, 12),
    BackboneInfo("vit_base_8", "vit", 768, (12,), 8, 12),
    BackboneInfo("vit_base_32", "vit", 768, (12,), 32, 12),
    BackboneInfo("vit_large", "vit", 1024, (24,), 16, 16),
    BackboneInfo("vit_large_7", "vit", 1024, (24,), 7, 16),
    BackboneInfo("vit_large_32", "vit", 1024, (24,), 32, 16),
    BackboneInfo("dinov2_small", "vit", 384, (12,), 14, 6, layer_scale=True),
    BackboneInfo("dinov2_base", "vit", 768, (12,), 14, 12, layer_scale=True),
    BackboneInfo("dinov2_large", "vit", 1024, (24,), 14, 16, layer_scale=True),
):
    BACKBONES.register(_info.name)(_info)


def describe(name: str) -> BackboneInfo:
    """The facts of a backbone; `ConfigError` with the known names for an unknown one."""
    return BACKBONES.get(name)


def names(family: str | None = None) -> list[str]:
    """All names, or those of one family, sorted."""
    return [name for name in BACKBONES.names() if family in (None, describe(name).family)]


def part_names(info: BackboneInfo) -> list[str]:
    """Names of parts in the order of the forward pass; the names of all parameters begin with one of them and a dot."""
    if info.family == "vit":
        return ["cls_token", "pos_embed", "patch_embed", *(f"blocks.{i}" for i in range(info.blocks[0])), "norm"]
    return ["conv1", "bn1", *(f"layer{i + 1}.{j}" for i, count in enumerate(info.blocks) for j in range(count))]


def last_block(info: BackboneInfo) -> tuple[str, ...]:
    """Parts of the last block: `layer4.1` of resnet18, `blocks.11` and the final `norm` of a vision transformer."""
    return tuple(part_names(info)[-2:] if info.family == "vit" else part_names(info)[-1:])


def within(name: str, part: str) -> bool:
    """True when a parameter belongs to a part: `blocks.1.norm1.weight` to `blocks.1` or `blocks`, not to `blocks.11`."""
    return not part or name == part or name.startswith(part.rstrip(".") + ".")


def _is_part(parts: list[str], name: str) -> bool:
    """True when some parameters of a network of these parts begin with `name`, which is not empty."""
    return bool(name) and any(within(name, part) or within(part, name) for part in parts)


def missing_problems(info: BackboneInfo, allowed: list[str]) -> list[str]:
    """A line for each name of `pretrain.init_allow_missing` that is no part of this network."""
    parts = part_names(info)
    return [
        f"pretrain.init_allow_missing: '{name}' is no part of {info.name}. Allowed: the beginning of parameter names such as "
        f"{', '.join(parts[-3:])}.{did_you_mean(name, parts)}"
        for name in allowed if not _is_part(parts, name)
    ]


def trainable_problem(info: BackboneInfo, trainable: str) -> str | None:
    """The line that says why `finetune.trainable` does not suit this network, or None."""
    words = ("linear", "last_block", "all", "lora")
    parts = part_names(info)
    if trainable == "lora" and info.family != "vit":
        return (
            f"finetune.trainable: lora adapts the attention of vision transformers; pretrain.backbone is {info.name}. "
            f"Use linear, last_block or all, or a backbone of {', '.join(names('vit'))}."
        )
    if trainable in words or _is_part(parts, trainable):
        return None
    return (
        f"finetune.trainable: '{trainable}' is no part of {info.name}. Allowed: {', '.join(words)}, or the beginning of "
        f"parameter names such as {', '.join(parts[-3:])}.{did_you_mean(trainable, [*words, *parts])}"
    )


def size_problem(info: BackboneInfo, size: int, key: str = "pretrain.image_size") -> str | None:
    """The line that says why images of this side do not fit, or None."""
    if not info.patch_size or size % info.patch_size == 0:
        return None
    below = max(1, size // info.patch_size) * info.patch_size
    return (
        f"{key}: {size} pixels are not divisible by the patches of {info.name} ({info.patch_size} pixels). "
        f"Use {below} or {below + info.patch_size}."
    )


def levels_problem(info: BackboneInfo, key: str) -> str | None:
    """The line that says why `key` (a method or head that wants features of several levels) cannot use this backbone, or None."""
    if info.family == "resnet":
        return None
    return f"{key} wants features of several levels, and {info.name} has one. Allowed for pretrain.backbone here: {', '.join(names('resnet'))}."
