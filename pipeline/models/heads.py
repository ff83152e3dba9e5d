"""Projection heads for pretraining and classifiers for fine-tuning, by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.models import levels
from pipeline.registry import HEADS

__all__ = [
    "OfficialPyramidHead", "PyramidHead", "SideBySide", "UnitLinear", "bn_mlp", "dino_head", "gallbladder_classifier",
    "linear_classifier", "msn_projection", "projection_mlp",
]


def projection_mlp(feature_dim: int, embedding_dim: int, hidden_dim: int | None = None) -> nn.Sequential:
    """Linear - ReLU - Linear as in MoCo v2 and UCL: no batch norm, PyTorch's default initialisation. [B, F] -> [B, D]."""
    hidden = hidden_dim or feature_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embedding_dim))


def bn_mlp(sizes: Sequence[int], *, last_norm: bool = False, last_bias: bool = True) -> nn.Sequential:
    """Linear - BatchNorm - ReLU for every hidden size, then Linear. [B, sizes[0]] -> [B, sizes[-1]].

    The hidden layers have no bias, because the batch norm behind them would take it away. `last_norm` ends with a batch norm
    without parameters (SimSiam's projector); `last_bias` is then without effect.
    """
    layers: list[nn.Module] = []
    for size, wider in pairwise(sizes[:-1]):
        layers += [nn.Linear(size, wider, bias=False), nn.BatchNorm1d(wider), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias and not last_norm))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(sizes[-1], affine=False)] if last_norm else []))


class SideBySide(nn.ModuleList):
    """Heads on the same features, their outputs joined. [B, F] -> [B, D1 + D2 + ...]."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(features) for head in self], dim=1)


class UnitLinear(nn.Linear):
    """Linear layer without bias over unit-length inputs, with unit-length rows. [B, D] -> [B, K] cosines.

    What weight normalisation with a fixed gain of 1 computes (DINO's last layer), but it can be copied.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.frozen = False
        """While True the gradient of the weights is zero, not absent: several processes must agree on what has one."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        weight = self.weight.detach() + 0 * self.weight if self.frozen else self.weight
        # Not in bfloat16: the cosines are divided by temperatures of a few hundredths.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(F.normalize(features.to(weight.dtype), dim=-1), F.normalize(weight, dim=-1))


def dino_head(feature_dim: int, hidden_dim: int, bottleneck_dim: int, outputs: int) -> nn.Sequential:
    """Three linear layers with GELU down to a bottleneck, then `UnitLinear` (DINO, Caron et al., ICCV 2021, appendix C).

    Weights N(0, 0.02), biases 0. [B, F] -> [B, K].
    """
    head = nn.Sequential(
        nn.Linear(feature_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
        nn.Linear(hidden_dim, bottleneck_dim), UnitLinear(bottleneck_dim, outputs),
    )
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return head


@HEADS.register("linear")
def linear_classifier(feature_dim: int, classes: int) -> nn.Module:
    """One linear layer. [B, F] -> [B, C] logits."""
    return nn.Linear(feature_dim, classes)


@HEADS.register("mlp")
def gallbladder_classifier(feature_dim: int, classes: int) -> nn.Module:
    """Linear(F, 256) - ReLU - Dropout(0.4) - Linear(256, C), weights N(0, 0.01), biases 0.

    The classifier of the published gallbladder fine-tuning (UCL, Basu et al., MICCAI 2022). [B, F] -> [B, C] logits.
    """
    head = nn.Sequential(nn.Linear(feature_dim, 256), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(256, classes))
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return head


def msn_projection(feature_dim: int, embedding_dim: int = 256, hidden_dim: int = 2048) -> nn.Sequential:
    """Linear - BN - GELU - Linear - BN - GELU - Linear under the names of the published checkpoints. [B, F] -> [B, D].

    Masked Siamese Networks (arXiv 2204.07141, the published program): weights truncated normal 0.02, biases 0.
    """
    head = nn.Sequential(OrderedDict(
        fc1=nn.Linear(feature_dim, hidden_dim), bn1=nn.BatchNorm1d(hidden_dim), gelu1=nn.GELU(),
        fc2=nn.Linear(hidden_dim, hidden_dim), bn2=nn.BatchNorm1d(hidden_dim), gelu2=nn.GELU(),
        fc3=nn.Linear(hidden_dim, embedding_dim),
    ))
    for layer in (head.fc1, head.fc2, head.fc3):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return head


@HEADS.register("hico_pyramid")
class PyramidHead(nn.Module):
    """One linear layer on [relu(U_k pool(P_k)) for k = 2 ... 5, relu(U_f f)], each 256 wide. C2 ... C5 -> [B, C] logits.

    HiCo's fine-tuning network. Only the linear layer and the pyramid's P5 convolution train; the rest of the pyramid, U_k and U_f
    stay as pretrained. Random where our pretraining has none, since no loss reaches it: the 3x3 convolution and U_k of the map that is
    not the medium level (k = 4, or 3 with `medium_level: p4`), and U_f where nothing is classified from f. All else must be there.

    Args:
        channels: of C2 ... C5. extras: what pretraining exported beside the trunk; None for a network without pretraining.
    """

    takes_levels: ClassVar[bool] = True
    keeps_projectors: ClassVar[bool] = True
    """False: U_k and U_f are fresh random ones."""

    def __init__(self, channels: Sequence[int], classes: int, image_size: int, extras: Mapping[str, torch.Tensor] | None) -> None:
        super().__init__()
        given = extras or {}
        smooth = "pyramid.smooth.p5.weight" in given
        self.pyramid = levels.Pyramid(channels, smooth_p5=smooth)
        self.levels = nn.ModuleDict({
            name: levels.LevelProjector(self._pool(given), levels.map_side(name, image_size), None) for name in levels.MAPS
        })
        self.features = nn.Linear(channels[-1], levels.WIDTH)
        self.linear = nn.Linear(5 * levels.WIDTH, classes)
        if extras is not None:
            self._load(extras)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for trained in (self.pyramid.lateral["p5"], self.linear):
            trained.requires_grad_(True)

    def _pool(self, given: Mapping[str, torch.Tensor]) -> levels.Pool:
        """As in pretraining: flattened maps need wider projectors."""
        width = given["levels.p2.hidden.weight"].shape[-1] if "levels.p2.hidden.weight" in given else levels.WIDTH
        return "gap" if width == levels.WIDTH else "flatten"

    def _load(self, extras: Mapping[str, torch.Tensor]) -> None:
        """Raises `CheckpointError` where the pretraining left no pyramid, a part of it, or one for other images or another trunk."""
        none = not any(name.startswith(("pyramid.", "levels.")) for name in extras)
        if self.keeps_projectors and none:
            raise CheckpointError(
                "finetune.head: hico_pyramid wants the pyramid and projectors that HiCo pretraining leaves beside the trunk (extras.safetensors), "
                "and this encoder has none. Use pretrain.method: hico (objective semi or self), or another finetune.head."
            )
        if none:
            raise CheckpointError(
                "finetune.head: hico_official wants the pyramid that HiCo pretraining leaves beside the trunk (extras.safetensors), and this "
                "encoder has none: a random pyramid would stay frozen. Use pretrain.method: hico, or another finetune.head."
            )
        kept = ("pyramid.", "levels.", "features.") if self.keeps_projectors else ("pyramid.",)
        renamed = {name.replace("classifier.0.", "features."): value for name, value in extras.items()}
        own = {name: value for name, value in self.state_dict().items() if name.startswith(kept)}
        spare = self._spare(renamed)
        missing = [name for name in own if name not in renamed and not name.startswith(spare)]
        if missing:
            raise CheckpointError(
                f"finetune.head: {'hico_pyramid' if self.keeps_projectors else 'hico_official'} wants {len(own)} tensors that HiCo leaves "
                f"beside the trunk, and {len(missing)} of them are missing: {', '.join(missing)}. They would stay random and frozen. Use a "
                f"whole file, or another finetune.head."
            )
        own = {name: value for name, value in own.items() if name in renamed}
        wrong = [f"{n} {tuple(renamed[n].shape)} instead of {tuple(v.shape)}" for n, v in own.items() if renamed[n].shape != v.shape]
        if wrong:
            raise CheckpointError(
                f"finetune.head: what is beside the trunk is of another network: {'; '.join(wrong[:2])}. Flattened projectors fit one image "
                f"size only; pretrain again after a change of pretrain.backbone or pretrain.image_size."
            )
        self.load_state_dict({name: renamed[name] for name in own}, strict=False)

    @staticmethod
    def _spare(given: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Beginnings of names that may be absent as a whole. Only a file of the published program has both 3x3 convolutions, and all else."""
        other = "p3" if any(name.startswith("levels.p4.out.") for name in given) else "p4"
        parts = (f"pyramid.smooth.{other}.", f"levels.{other}.", "features.")
        absent = tuple(part for part in parts if not any(name.startswith(part) for name in given))
        return absent if parts[0] in absent else ()

    def forward(self, stages: Sequence[torch.Tensor]) -> torch.Tensor:
        maps = self.pyramid(stages)
        rows = [self.levels[name](maps[name]) for name in levels.MAPS]
        return self.linear(torch.cat([*rows, F.relu(self.features(levels.pooled(stages)))], dim=1))


@HEADS.register("hico_official")
class OfficialPyramidHead(PyramidHead):
    """The head as HiCo's program fine-tunes it: the pyramid is loaded, but flattening U_k and U_f are fresh, random and frozen."""

    keeps_projectors: ClassVar[bool] = False

    def _pool(self, given: Mapping[str, torch.Tensor]) -> levels.Pool:
        return "flatten"
