"""Folders of weights as the stages leave them, with random weights: for the tests of what is done with finished weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import export_encoder, save_tensors
from pipeline.files import write_json
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier

__all__ = ["GROUPS", "PREPROCESSING", "hico_file", "make_classifier", "make_encoder"]

GROUPS = ["P0ba3c23bb0", "P10b1e9bb64", "P1b6d11ab68", "P4689568dc8", "P4690947629"]
PREPROCESSING = {"color": "gray", "stored_short_side": 96, "resize": "short_side", "working_size": 40, "normalization": "imagenet"}


def _lively(network: torch.nn.Module) -> torch.nn.Module:
    """Batch-norm statistics and biases that differ from their start, so that a forgotten tensor shows in the output."""
    generator = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.mul_(0.5 + torch.rand(value.shape, generator=generator))
    return network


def hico_file(trunk: Mapping[str, torch.Tensor], image_size: int = 32) -> dict[str, torch.Tensor]:
    """What HiCo's program saves around a trunk that ends in 512 channels; all that is not of the trunk is 1."""
    shapes = {"lf": (256, 512), "fc": (3, 256), "l22": (256, 256), "l33": (256, 256), "l55": (256, 256)}
    shapes |= {f"l{k}": (256, 256 * (image_size // 2**k) ** 2) for k in (2, 3, 4, 5)}
    laterals = {"toplayer": 512, "latlayer1": 256, "latlayer2": 128, "latlayer3": 64}
    shapes |= {f"features.{name}": (256, width, 1, 1) for name, width in laterals.items()}
    shapes |= {f"features.smooth{i}": (256, 256, 3, 3) for i in (1, 2, 3)}
    file = {f"features.R18.{name}": value for name, value in trunk.items()}
    for name, shape in shapes.items():
        file |= {f"{name}.weight": torch.ones(shape), f"{name}.bias": torch.ones(shape[0])}
    return file


def make_encoder(folder: Path, name: str, **changes: Any) -> Path:
    """An encoder folder for images of 32 pixels; `changes` go into its card."""
    network = _lively(build_backbone(name, seed=3, image_size=32)[0])
    card = {
        "schema": 1, "fingerprint": "0123456789abcdef", "method": "ucl", "backbone": name, "init": "random", "image_size": 32,
        "normalization": "imagenet", "epochs": 2, "scope": "fold", "transductive": False, "videos": 9, "frames": 90, "groups": GROUPS,
        "parameters": {"temperature": 0.07}, "final": {"loss": 0.5, "knn": 0.7}, "fold": 0, "preprocessing": PREPROCESSING,
        "too_short": ["v0"], "torch": torch.__version__,
    }  # fmt: skip
    export_encoder(folder, network.state_dict(), card | changes)
    return folder


def make_classifier(folder: Path, name: str, kind: str, **changes: Any) -> Path:
    """A folder of a fine-tuned classifier of two classes with the head `kind`; `changes` go into its card."""
    backbone, features = build_backbone(name, seed=3, image_size=32)
    torch.manual_seed(0)
    network = _lively(Classifier(backbone, name, features, 2, head=kind, trainable="linear", batchnorm="frozen", image_size=32))
    card = {
        "schema": 1, "init": "pretrained", "seed": 0, "fold": 0, "fingerprint": "fedcba9876543210", "classes": ["a", "b"],
        "train_groups": GROUPS[:2], "validation_groups": GROUPS[2:3], "test_groups": GROUPS[3:], "pretrain_groups": GROUPS,
        "pretrain_scope": "fold", "method": "ucl", "encoder_fingerprint": "0123456789abcdef", "selection": "inner", "selected_epoch": 2,
        "stamp": None, "trainable": "last_block", "head": kind, "label_fraction": 1.0, "backbone": name, "image_size": 32,
        "preprocessing": PREPROCESSING,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", network.state_dict(), {"schema": 1})
    write_json(folder / "card.json", card | changes)
    return folder
