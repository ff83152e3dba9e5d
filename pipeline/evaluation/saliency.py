"""Which cells of a picture speak for a class, by a fine-tuned network's own account: Grad-CAM and attention rollout. Needs torch.

Letters: N pictures, S their side in pixels, g cells a side of the map, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint import read_state_dict
from pipeline.data.transforms import normalize
from pipeline.errors import CheckpointError
from pipeline.models.backbones import build_backbone
from pipeline.models.catalog import describe
from pipeline.models.heads import HEADS

__all__ = ["FINEST", "Network", "load_network", "random_network"]

FINEST = 7
"""Cells a side that a map should have: those of the last stage at 224 pixels, where Grad-CAM was published."""
BATCH = 16


class Network:
    """A trunk with a classifier on its pooled features, and its maps. Runs on the CPU, so that equal weights give equal maps."""

    def __init__(self, backbone: nn.Module, head: nn.Module, card: Mapping[str, Any]) -> None:
        self.backbone, self.head = backbone.eval().requires_grad_(False), head.eval().requires_grad_(False)
        self.info, self.size = describe(card["backbone"]), int(card["image_size"])
        self.statistics = (card.get("preprocessing") or {}).get("normalization", "imagenet")

    @property
    def stage(self) -> int:
        """1 to 4: the last stage of a ResNet whose maps have `FINEST` cells a side; the first where none has. 0 for transformers."""
        sides = [-(-self.size // 2**power) for power in (2, 3, 4, 5)]
        return 0 if self.info.family == "vit" else max([place + 1 for place, side in enumerate(sides) if side >= FINEST], default=1)

    def maps(self, images: np.ndarray, classes: Sequence[int]) -> np.ndarray:
        """Heat for the given class of every picture: uint8 [N, S, S(, 3)] -> float64 [N, g, g] >= 0, all zero where nothing speaks for it."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = normalize(torch.from_numpy(images[start : start + BATCH]), self.statistics)
            rule = self._rollout if self.info.family == "vit" else self._grad_cam
            parts.append(rule(batch, torch.tensor(classes[start : start + BATCH])).double().numpy())
        return np.concatenate(parts)

    def _grad_cam(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Gradient of the class's logit times activation, summed over channels, what speaks against it left out.

        At the last stage this is Grad-CAM (Selvaraju et al., ICCV 2017), because behind it stand a mean over all cells and a
        head, so that the gradient is the same in every cell. At an earlier stage it is HiResCAM (Draelos and Carin 2020), whose
        cells add up to what the stage contributes.
        """
        b = self.backbone
        stages = [b.layer1, b.layer2, b.layer3, b.layer4]
        with torch.no_grad():
            x = b.maxpool(b.relu(b.bn1(b.conv1(images))))
            for stage in stages[: self.stage]:
                x = stage(x)
        kept = x.requires_grad_()
        # A stage begins with a ReLU in place nowhere, yet its shortcut may alias its input.
        y = kept * 1
        for stage in stages[self.stage :]:
            y = stage(y)
        score = self.head(y.mean((2, 3))).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, kept)
        return (gradient * kept.detach()).sum(1).clamp_min(0)

    def _rollout(self, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Attention of the class token to the patches through all blocks, with the shortcuts (Abnar and Zuidema, ACL 2020).

        It is the same for every class: it says what was looked at, not what for.
        """
        found: list[torch.Tensor] = []

        def attention(block: nn.Module) -> Any:
            def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                count, tokens, _ = output.shape
                query, key, _ = output.reshape(count, tokens, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)
                found.append(((block.q_norm(query) * block.scale) @ block.k_norm(key).transpose(-2, -1)).softmax(-1).mean(1))

            return keep

        hooks = [block.attn.qkv.register_forward_hook(attention(block.attn)) for block in self.backbone.blocks]
        try:
            with torch.no_grad():
                self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        eye = torch.eye(found[0].shape[-1])
        total = eye.expand_as(found[0])
        for one in found:
            total = (one + eye) / 2 @ total
        row = total[:, 0, 1:]
        side = math.isqrt(row.shape[1])
        return row.reshape(-1, side, side)


def load_network(folder: Path, card: Mapping[str, Any]) -> Network:
    """The classifier in a folder of models/finetuned. The weights of attention over frames, where there are some, are not needed.

    Raises:
        CheckpointError: the file is no weights file, or of another network than the card says.
    """
    path = Path(folder) / "model.safetensors"
    state = read_state_dict(path, "evaluate.explanations")
    backbone, features = build_backbone(card["backbone"], image_size=card["image_size"])
    head = HEADS.get(card["head"])(features, len(card["classes"]))
    for name, module in (("backbone", backbone), ("head", head)):
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError:
            raise CheckpointError(f"evaluate.explanations: {path} does not fit the {name} its card.json names") from None
    return Network(backbone, head, card)


def random_network(card: Mapping[str, Any], seed: int) -> Network:
    """The same network with random weights throughout: what a map shows without anything learned (Adebayo et al., NeurIPS 2018)."""
    backbone, features = build_backbone(card["backbone"], seed, card["image_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(backbone, HEADS.get(card["head"])(features, len(card["classes"])), card)
