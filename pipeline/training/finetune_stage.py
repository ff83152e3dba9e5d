"""The finetune stage around its loop: data of one fold, the encoder or the untrained network, finished results, outputs."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config import Config, fingerprint, pretraining_name
from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.splits import Fold, Splits
from pipeline.data.store import FrameStore
from pipeline.data.transforms import working_size
from pipeline.errors import CheckpointError, DataError, LeakageError
from pipeline.export.facts import about, find_weights, input_facts
from pipeline.files import alone_in, atomic_write, copy_into, hash_file, read_json, scratch_folder, write_curves, write_json
from pipeline.launch import threads_per_process
from pipeline.tracking import NullTracker, open_tracker
from pipeline.training.inputs import code_digest, frames_folder

__all__ = ["run_finetune_stage"]

OPTIMISTIC = "optimistic (selected on test)"
RESULT_FILES = ("predictions.csv", "features.npz", "card.json", "curves.csv", "model.safetensors")


def _parts(config: Config, splits: Splits, fold: Fold) -> dict[str, list[str]]:
    """Video ids of training, inner validation and test.

    With selection `inner` the first inner fold's validation part chooses the epoch and is not trained on; otherwise all
    training patients are trained on.
    """
    if config.finetune.selection == "inner" and not fold.inner:
        raise DataError(
            f"finetune.selection: inner needs inner validation patients, but fold {fold.fold} has too few. Use selection: last, fewer "
            f"split.folds, or more patients a class."
        )
    if config.finetune.selection == "inner":
        return {"train": fold.inner[0].train, "validation": fold.inner[0].validation, "test": fold.test}
    return {"train": fold.train, "validation": [], "test": fold.test}


def _encoder_card(init: str, fold: Fold, splits: Splits) -> dict[str, Any]:
    """What pretrained the encoder, checked against this fold's test patients; empty for `random`."""
    if init == "random":
        return {}
    folder = Path(f"models/encoders/fold{fold.fold}")
    if not (folder / "card.json").is_file():
        raise CheckpointError(f"{folder}: no encoder. Run the pretrain stage first (dvc repro pretrain@{fold.fold}).")
    card = read_json(folder / "card.json")
    missing = [name for name in ("groups", "scope", "method", "fingerprint") if name not in card] if isinstance(card, dict) else ["all"]
    if missing:
        raise CheckpointError(f"{folder / 'card.json'}: lacks {', '.join(missing)}. Run the pretrain stage again.")
    tested = set(splits.groups_of(fold.test))
    validated = set(splits.groups_of(fold.inner[0].validation)) if fold.inner else set()
    for name, patients in (("test", tested), ("inner validation", validated)):
        if told := sorted(set(card.get("label_groups", [])) & patients):
            raise LeakageError(
                f"{folder}: pretraining read the labels of {len(told)} {name} patients of fold {fold.fold}, for example {told[0]}. Run the "
                f"pretrain stage again."
            )
    shared = sorted(set(card["groups"]) & tested)
    if shared and card["scope"] == "fold":
        raise LeakageError(
            f"{folder}: this encoder was pretrained on {len(shared)} test patients of fold {fold.fold}, for example {shared[0]}. "
            f"Run the pretrain stage again with pretrain.scope: fold."
        )
    return card


def _extras_file(weights: str) -> Path:
    """Where the pretrain stage puts what a method has beside its trunk; most methods have nothing."""
    return Path(weights).with_name("extras.safetensors")


def _encoder_views(config: Config, encoder: dict[str, Any]) -> tuple[int, str, str]:
    """Working size, resize mode and normalisation of the pictures in features.npz: the encoder's own, of its card (`sonoscope
    embed` takes the same); those of fine-tuning for the untrained network, which no pretraining concerns."""
    own, size = config.finetune.augmentation, config.pretrain.image_size
    if not encoder:
        return working_size(own, size), own.resize, own.normalization
    resize = encoder.get("parameters", {}).get("augmentation", {}).get("resize", "short_side")
    return encoder.get("working_size", size), resize, encoder.get("normalization", own.normalization)


def _fingerprint(
    config: Config, splits: Splits, init: str, seed: int, parts: dict[str, list[str]], digest: str, views: tuple[int, str, str]
) -> str:
    """Everything that determines the predictions; for `random` that is independent of pretraining."""
    code = code_digest(
        "training/finetune.py", "training/finetune_stage.py", "training/optim.py", "models/classifier.py", "models/backbones.py",
        "models/catalog.py", "models/vit.py", "models/published.py", "models/lora.py",
        "models/levels.py", "models/heads.py", "data/photometry.py", "data/randaugment.py", "data/transforms.py",
        "data/store.py", "data/frames.py", "data/loader.py", "evaluation/features.py",
        "evaluation/metrics.py",
    )
    finetune = config.finetune.model_dump(mode="json", exclude={"initialisations", "seeds"})
    labels = sorted((video, splits.labels[video], splits.groups[video]) for part in parts.values() for video in part)
    shared = (config.pretrain.backbone, config.pretrain.image_size, config.launch.device)
    files = [Path(digest), _extras_file(digest)] if digest else []
    encoder = [hash_file(path) for path in files if path.is_file()] or f"random {config.pretrain.seed}"
    return fingerprint(finetune, shared, labels, parts, splits.classes, splits.manifest_digest, code, init, seed, encoder, views)


def run_finetune_stage(config: Config, init: str, seed: int, fold_number: int) -> str:
    """Fine-tune one initialisation on one fold into models/finetuned/<init>-seed<S>-fold<K>; returns the closing line.

    Raises:
        DataError, CheckpointError, LeakageError: what is missing or does not fit, before any training.
    """
    splits = Splits.read(Path("data/splits.json"))
    if not splits.labels:
        raise DataError(
            "finetune: no video has a label, so nothing can be fine-tuned or evaluated. `dvc repro pretrain@0` gives the encoder; "
            "for the rest give labels (data.labels)."
        )
    fold = splits.fold(fold_number)
    parts = _parts(config, splits, fold)
    encoder = _encoder_card(init, fold, splits)
    weights = f"models/encoders/fold{fold_number}/encoder.safetensors" if encoder else ""
    trained, used = encoder.get("normalization"), config.finetune.augmentation.normalization
    if trained and trained != used:
        print(f"warning: finetune.augmentation.normalization is {used}, but the encoder was pretrained with {trained}; use the same", file=sys.stderr)
    key = _fingerprint(config, splits, init, seed, parts, weights, _encoder_views(config, encoder))
    output = Path(f"models/finetuned/{init}-seed{seed}-fold{fold_number}")
    done = scratch_folder("finetune", key) / "result"
    item = f"{init} fold {fold_number} seed {seed}"
    with alone_in(done.parent), open_tracker(config, "finetune", item, fingerprint=key) as tracker:
        reused = (done / "card.json").is_file()
        if not reused:
            part = done.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            identity = {"schema": 1, "init": init, "seed": seed, "fold": fold_number, "fingerprint": key}
            _finetune(config, splits, parts, encoder, weights, identity, part, tracker)
            os.replace(part, done)
        output.mkdir(parents=True, exist_ok=True)
        for name in RESULT_FILES:
            copy_into(done / name, output / name)
        # What belongs to the encoder of this run and not to the shared result.
        card = read_json(output / "card.json") | _encoder_facts(encoder)
        card["preprocessing"] = input_facts(config, config.finetune.augmentation)
        card["finetune"] = config.finetune.model_dump(mode="json", exclude={"initialisations", "seeds"})
        write_json(output / "card.json", card)
        _log_result(output, tracker)
        table = about(find_weights(output))
        if table["scorable"]:
            tracker.log_model(done / "model.safetensors", table, "classifier")
        else:
            tracker.set_tags({"model": f"not logged: head {table['head']} takes several levels of features; sonoscope export --to onnx"})
        tracker.write_sidecar(Path(f"reports/runs/finetune-{init}-seed{seed}-fold{fold_number}.json"), fingerprint=key)
    return f"finetune {item}: {'finished result reused' if reused else 'done'}; predictions in {output}"


def _stamp(config: Config, encoder: dict[str, Any], budget: set[str], training: set[str]) -> str | None:
    """What makes the result better than it would be elsewhere. `budget`: patients whose labels fine-tuning reads, of `training`."""
    stamps = [OPTIMISTIC] if config.finetune.selection == "best_on_test" else []
    if config.finetune.label_fraction < 1 and (set(encoder.get("label_groups", [])) & training) - budget:
        stamps.append("encoder pretrained with labels beyond finetune.label_fraction")
    return ", ".join(stamps) or None


def _encoder_facts(encoder: dict[str, Any]) -> dict[str, Any]:
    """The part of a card that says where the trunk comes from."""
    start = encoder.get("init_format") or encoder.get("init", "random")
    return {
        "pretrain_init": f"{start} file" if encoder.get("init") == "weights file" else start,
        "pretrain_labelled_videos": encoder.get("labelled_videos", {}), "pretrain_label_groups": encoder.get("label_groups", []),
        "pretrain_groups": encoder.get("groups", []), "pretrain_scope": encoder.get("scope", "none"),
        "method": pretraining_name(encoder.get("method", "random"), encoder.get("init", "random")),
        "encoder_fingerprint": encoder.get("fingerprint"),
    }


def _finetune(
    config: Config, splits: Splits, parts: dict[str, list[str]], encoder: dict[str, Any], weights: str, identity: dict[str, Any],
    folder: Path, tracker: NullTracker,
) -> None:
    """Train, select, predict, and write the result files into `folder`."""
    import numpy as np
    import torch

    from pipeline.checkpoint import read_state_dict, save_tensors
    from pipeline.distributed import pick_device
    from pipeline.evaluation.features import write_features
    from pipeline.models.backbones import build_backbone
    from pipeline.models.classifier import Classifier
    from pipeline.models.lora import merged_state
    from pipeline.models.published import load_trunk
    from pipeline.reproducibility import configure_torch, seed_everything
    from pipeline.training.finetune import FinetuneData, Finetuning, subset_by_patient

    params, started = config.finetune, time.monotonic()
    threads = threads_per_process(config.launch)
    configure_torch(threads)
    seed_everything(identity["seed"])
    device = pick_device(config.launch.device)
    store = FrameStore(frames_folder(params.source))
    wanted = sorted(video for ids in parts.values() for video in ids)
    size = config.pretrain.image_size
    refs = gather_videos([store], wanted)
    frames = FrameCache(
        refs, working_size(params.augmentation, size), mode=params.augmentation.resize,
        budget_mb=config.pretrain.memory_budget_mb, threads=threads,
    )
    index = {ref.video: i for i, ref in enumerate(refs)}
    number = {name: i for i, name in enumerate(splits.classes)}
    labels = np.array([number[splits.labels[ref.video]] for ref in refs], np.int64)
    groups = [splits.groups[ref.video] for ref in refs]
    joint = any(ref.row.kind == "stretch" for ref in refs)
    # The validation patients' labels choose the epoch, so they count towards the label budget as well.
    train, validation = (
        subset_by_patient([index[v] for v in parts[part]], labels, groups, params.label_fraction, identity["seed"], joint=joint)
        for part in ("train", "validation")
    )
    data = FinetuneData(frames, labels, groups, splits.classes, train, validation, [index[v] for v in parts["test"]])
    backbone, features = build_backbone(config.pretrain.backbone, config.pretrain.seed, size)
    extras = None
    if weights:
        load_trunk(backbone, read_state_dict(Path(weights), "models/encoders"), weights, "models/encoders")
        beside = _extras_file(weights)
        extras = read_state_dict(beside, "models/encoders") if beside.is_file() else {}
    # Before the network changes: the report's map and neighbours show what the encoder itself sees, prepared as in its pretraining.
    working, mode, normalization = _encoder_views(config, encoder)
    write_features(
        folder / "features.npz", backbone.to(device), FrameCache(refs, working, mode=mode, budget_mb=0), range(len(refs)), size=size,
        device=device, normalization=normalization,
    )
    network = Classifier(
        backbone, config.pretrain.backbone, features, len(splits.classes), head=params.head, trainable=params.trainable,
        batchnorm=params.batchnorm, lora_rank=params.lora_rank, lora_alpha=params.lora_alpha, image_size=size, extras=extras,
    ).to(device)
    run = Finetuning(network, data, params, seed=identity["seed"], size=size, device=device)
    run.train(tracker, f"finetune {identity['init']} fold {identity['fold']}")
    card = identity | {
        "classes": splits.classes, "train_groups": sorted({groups[v] for v in train}),
        "validation_groups": sorted({groups[v] for v in validation}), "test_groups": splits.groups_of(parts["test"]),
        "selection": params.selection, "selected_epoch": run.selected_epoch,
        "stamp": _stamp(config, encoder, {groups[v] for v in train + validation}, {*splits.groups_of(parts["train"] + parts["validation"])}),
        "trainable": params.trainable, "head": params.head, "label_fraction": params.label_fraction,
        "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "backbone": config.pretrain.backbone, "image_size": size, "device": device.type,
        "seconds": round(time.monotonic() - started, 1),
    } | _encoder_facts(encoder)
    _write_predictions(folder / "predictions.csv", run, identity, splits)
    write_curves(folder / "curves.csv", run.rows)
    save_tensors(folder / "model.safetensors", merged_state(network), {"schema": 1})
    write_json(folder / "card.json", card)


def _write_predictions(path: Path, run: Any, identity: dict[str, Any], splits: Splits) -> None:
    """predictions.csv: one row a predicted frame of the test and inner validation videos."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["init", "seed", "fold", "part", "video", "patient", "frame", "label", *(f"p_{name}" for name in splits.classes)])
    for part in ("test", "validation"):
        if not getattr(run.data, part):
            continue
        predicted = run.predict(part)
        for (index, frame), probabilities in zip(predicted.items, predicted.probabilities, strict=True):
            video = run.data.frames.videos[index].video
            fields = [identity["init"], identity["seed"], identity["fold"], part, video, splits.groups[video], frame]
            table.writerow([*fields, splits.labels[video], *(repr(float(p)) for p in probabilities)])
    atomic_write(path, text.getvalue())


def _log_result(output: Path, tracker: NullTracker) -> None:
    card = read_json(output / "card.json")
    tracker.log_params({"selected_epoch": card["selected_epoch"], "stamp": card["stamp"] or "none", "method": card["method"]})
    tracker.log_metrics({
        "train.seconds": card["seconds"], "selected_epoch": card["selected_epoch"], "train.patients": len(card["train_groups"]),
    })
    tracker.log_artifact(output / "curves.csv")
    tracker.log_artifact(output / "predictions.csv")
