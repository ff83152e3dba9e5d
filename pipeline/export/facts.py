"""What is known about finished weights, as one table without anything that identifies: kind, network, preprocessing, origin.

Read from the card beside the weights. The same table goes into exported model cards and into MLflow's models. No torch.
"""

from __future__ import annotations

import csv
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.transforms import STATISTICS, working_size
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import hash_file, read_json
from pipeline.models.catalog import describe
from pipeline.parameters import AugmentationParams

__all__ = ["LIBRARY_HEADS", "Weights", "about", "check_form", "find_weights", "headline", "input_facts"]

FILES = {"encoder.safetensors": "encoder", "model.safetensors": "classifier"}
LIBRARY_HEADS = ("linear", "mlp")
"""Heads that sit on the pooled features, where torchvision and timm keep their own classifier."""
# timm's names of the same architectures (vit_base_4 and vit_large_7 but for the patch size); resnet10 has none.
TIMM_NAMES = {
    "resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50", "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224", "vit_small_8": "vit_small_patch8_224", "vit_base": "vit_base_patch16_224",
    "vit_base_4": "vit_base_patch16_224", "vit_base_8": "vit_base_patch8_224", "vit_base_32": "vit_base_patch32_224",
    "vit_large_7": "vit_large_patch16_224", "vit_large_32": "vit_large_patch32_224",
    "vit_large": "vit_large_patch16_224", "dinov2_small": "vit_small_patch14_dinov2", "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_large": "vit_large_patch14_dinov2",
}  # fmt: skip
PACKAGES = ("sonoscope", "torch", "torchvision", "timm", "safetensors")


@dataclass(frozen=True)
class Weights:
    """A weights file of ours: `kind` is encoder or classifier, `card` what its stage wrote beside it."""

    path: Path
    kind: str
    card: dict[str, Any]


def find_weights(target: Path) -> Weights:
    """The weights in a folder of models/encoders or models/finetuned, or a .safetensors file there.

    Raises:
        CheckpointError: there are none, or the card beside them is missing or incomplete.
    """
    path = Path(target)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise CheckpointError(
                f"export: {path} holds neither of {', '.join(FILES)}. Wanted is a folder such as models/encoders/fold0 or "
                f"models/finetuned/pretrained-seed0-fold0 (`dvc repro` makes them), or a weights file in one."
            )
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"export: {path} does not exist. Wanted is a folder such as models/encoders/fold0, or the weights file in it.")
    if path.name not in FILES:
        raise CheckpointError(
            f"export: {path.name} is not a weights file of this pipeline. Wanted is {' or '.join(FILES)}, with its card.json beside it."
        )
    beside = path.with_name("card.json")
    try:
        card = read_json(beside)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"export: {beside} cannot be read ({type(error).__name__}); it says what the weights are. Keep it beside them."
        ) from None
    wanted = ("backbone", "image_size", "fingerprint", *(("classes", "head") if FILES[path.name] == "classifier" else ("method", "scope")))
    missing = [name for name in wanted if not isinstance(card, dict) or name not in card]
    if missing:
        raise CheckpointError(f"export: {beside} lacks {', '.join(missing)}. Run the stage again that wrote it.")
    if not isinstance(card["image_size"], int) or not all(isinstance(name, str) for name in card.get("classes", ())):
        raise CheckpointError(f"export: {beside}: image_size must be a whole number and classes a list of names")
    return Weights(path, FILES[path.name], card)


def input_facts(config: Config, augmentation: AugmentationParams) -> dict[str, Any]:
    """How frames become network inputs, as it goes into a card: extraction's steps and those without random views."""
    without: dict[str, Any] = dict.fromkeys(("color", "short_side", "on_error", "workers", "max_pixels", "frames_per_second", "max_frames"), True)
    without["mask"] = {"review"}
    return {
        "color": config.extract.color, "stored_short_side": config.extract.short_side, "resize": augmentation.resize,
        "working_size": working_size(augmentation, config.pretrain.image_size), "normalization": augmentation.normalization,
        "extraction": config.extract.model_dump(mode="json", exclude=without),
    }


def _preprocessing(card: Mapping[str, Any]) -> dict[str, Any]:
    known = card.get("preprocessing") or {}
    normalization = known.get("normalization", card.get("normalization", "imagenet"))
    mean, std = STATISTICS[normalization]
    return {
        "size": card["image_size"], "working_size": known.get("working_size", card["image_size"]),
        "color": known.get("color", "unknown"), "stored_short_side": known.get("stored_short_side"),
        "resize": known.get("resize", "short_side"), "normalization": normalization, "mean": list(mean), "std": list(std),
        "extraction": known.get("extraction", {}),
    }


def _network(card: Mapping[str, Any]) -> dict[str, Any]:
    try:
        info = describe(card["backbone"])
    except ConfigError as error:
        raise CheckpointError(f"export: the card names a backbone that this version does not know. {error}") from None
    vit = info.family == "vit"
    return {
        "backbone": info.name, "library": "timm" if vit else "torchvision",
        "name": TIMM_NAMES.get(info.name) if vit else (info.name if info.name in TIMM_NAMES else None),
        "timm_name": TIMM_NAMES.get(info.name), "blocks": list(info.blocks), "feature_dim": info.feature_dim,
        "patch_size": info.patch_size, "image_size": card["image_size"],
    }


def check_form(weights: Weights, form: str) -> None:
    """Refuse a form (torchvision, timm, safetensors, onnx) that no network with these weights has.

    Raises:
        CheckpointError: says which form to use.
    """
    if weights.card.get("pooling") == "attention":
        raise CheckpointError(
            "export: this classifier was fine-tuned with finetune.pooling: attention, which judges the frames of a video together; an exported "
            "network judges single pictures. Fine-tune with pooling: mean, or export the encoder alone (models/encoders/fold<K>)."
        )
    network = _network(weights.card)
    if form == "torchvision" and network["library"] == "timm":
        raise CheckpointError(
            f"export: {network['backbone']} has timm's names; torchvision's vision transformers are built otherwise. Use --to timm."
        )
    if form == "timm" and not network["timm_name"]:
        raise CheckpointError(f"export: timm knows no {network['backbone']} of this shape. Use --to torchvision, safetensors or onnx.")


def _counts(weights: Weights) -> dict[str, int]:
    """Numbers of videos and patients; never who they are."""
    card = weights.card
    if weights.kind == "encoder":
        return {"videos": card.get("videos", 0), "frames": card.get("frames", 0), "patients": len(card.get("groups", ()))}
    parts = ("train", "validation", "test", "pretrain")
    return {f"{part}_patients": len(card.get(f"{part}_groups", ())) for part in parts}


def _pretraining_labels(weights: Weights) -> dict[str, Any] | None:
    """How many patients' labels pretraining read, and videos by class; None where the card does not say."""
    prefix = "pretrain_" if weights.kind == "classifier" else ""
    videos, groups = (weights.card.get(f"{prefix}{name}") for name in ("labelled_videos", "label_groups"))
    if videos is None or groups is None:
        return None
    return {"patients": len(groups), "videos": {name: count for name, count in videos.items() if count}}


def _versions(card: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | ({"torch_in_training": card["torch"]} if card.get("torch") else {})


def _tested(table: Path) -> dict[tuple[str, ...], tuple[float, ...]]:
    """Probabilities of every test row of a predictions.csv, by run, video and frame: columns may be added to either table, and digits lost."""
    with open(table, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["part"] == "test"]
    return {
        tuple(row[key] for key in ("init", "seed", "fold", "video", "frame")): tuple(float(cell) for key, cell in row.items() if key.startswith("p_"))
        for row in rows
    }


def _is_reported(own: Path, reported: Path) -> bool:
    """True when every test row of a fold's predictions stands in the report's table with the same probabilities."""
    rows, known = _tested(own), _tested(reported)
    return bool(rows) and all(
        len(known.get(key, ())) == len(values) and all(math.isclose(one, two, abs_tol=1e-9) for one, two in zip(values, known[key], strict=True))
        for key, values in rows.items()
    )


def headline(weights: Weights) -> dict[str, Any]:
    """Numbers that say how good the weights are, with where they come from; {} when none are known.

    Encoders: the last line of the curves. Classifiers: the out-of-fold result of their initialisation over all folds, from the
    report of the same project, if that report holds the predictions of exactly these weights.
    """
    card = weights.card
    if weights.kind == "encoder":
        numbers = {k: v for k, v in (card.get("final") or {}).items() if isinstance(v, int | float)}
        return {"source": "last epoch of pretraining, on frames it may see", "values": numbers} if numbers else {}
    reports = weights.path.resolve().parents[3] / "reports/evaluate"
    try:
        if not _is_reported(weights.path.with_name("predictions.csv"), reports / "predictions.csv"):
            return {}
        details = read_json(reports / "details.json")
        block = details[card["init"]]["video"]
        values = {k: block[k] for k in ("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", "macro_auroc") if k in block}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    source = (
        f"out-of-fold result of all {details.get('folds')} folds (initialisation {card['init']}), per video, interval over "
        f"{details.get('patients')} patients; this file is one fold's model"
    )
    return {"source": source, "confidence": details.get("confidence"), "values": values}


def _unscorable(weights: Weights) -> str:
    """Why these weights cannot judge picture by picture with a library's network; empty when they can."""
    card = weights.card
    if weights.kind == "encoder":
        return ""
    if card.get("pooling", "mean") == "attention":
        return "finetune.pooling attention judges the frames of a video together, and a model of single pictures cannot"
    if card["head"] not in LIBRARY_HEADS:
        return f"head {card['head']} takes several levels of features; sonoscope export --to onnx"
    return ""


def about(weights: Weights) -> dict[str, Any]:
    """The whole table, JSON-ready. Holds counts of patients, no names, ids or paths.

    Raises:
        CheckpointError: the backbone is unknown.
    """
    card, classifier = weights.card, weights.kind == "classifier"
    keys = ("method", "epochs", "steps", "seed", "parameters", "selection", "selected_epoch", "trainable", "label_fraction", "device")
    scope = card.get("pretrain_scope" if classifier else "scope", "none")
    network = _network(card)
    training = {key: card[key] for key in keys if card.get(key) is not None}
    training["start"] = card.get("pretrain_init" if classifier else "init", "random")
    return {
        "schema": 1, "scorable": not _unscorable(weights), "why_not": _unscorable(weights),
        "name": f"{network['backbone']} {weights.kind}, {card.get('method', 'random')}", "kind": weights.kind,
        "network": network, "head": card.get("head") if classifier else None, "classes": list(card["classes"]) if classifier else [],
        "preprocessing": _preprocessing(card), "training": training,
        "data": _counts(weights), "pretraining_labels": _pretraining_labels(weights), "fold": card.get("fold"), "scope": scope,
        "transductive": scope == "all", "stamp": card.get("stamp"),
        "metrics": headline(weights), "fingerprint": card["fingerprint"], "encoder_fingerprint": card.get("encoder_fingerprint"),
        "weights": {"file": weights.path.name, "sha256": hash_file(weights.path), "bytes": weights.path.stat().st_size},
        "versions": _versions(card),
    }
