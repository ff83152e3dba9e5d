"""The finetune stage around its loop: data of one fold, the encoder or the untrained network, finished results, outputs."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, fingerprint, pretraining_name
from pipeline.data.frames import FrameCache, VideoRef, gather_videos
from pipeline.data.splits import OPTIMISTIC, Fold, Splits
from pipeline.data.store import FrameStore
from pipeline.data.transforms import working_size
from pipeline.errors import CheckpointError, DataError, LeakageError
from pipeline.export.facts import about, find_weights, input_facts
from pipeline.files import alone_in, atomic_write, copy_into, hash_file, read_json, scratch_folder, write_curves, write_json
from pipeline.launch import threads_per_process
from pipeline.parameters import FinetuneParams
from pipeline.tracking import NullTracker, open_tracker
from pipeline.training.inputs import code_digest, frames_folder

__all__ = ["run_finetune_stage"]

NO_LABELS = (
    "pretrain stage with a method or setting that reads no labels, or use finetune.selection: inner, whose validation patients such a "
    "method is not told."
)
RESULT_FILES = ("predictions.csv", "features.npz", "card.json", "curves.csv", "model.safetensors")


def _parts(config: Config, splits: Splits, fold: Fold) -> dict[str, list[str]]:
    """Video ids of training, inner validation and test.

    With selection `inner` the first inner fold's validation part chooses the epoch and is not trained on; otherwise all
    training patients are trained on (with `nested` after a choice on all inner folds).
    """
    if config.finetune.selection in ("inner", "nested") and not fold.inner:
        raise DataError(
            f"finetune.selection: {config.finetune.selection} needs inner validation patients, but fold {fold.fold} has too few. Use selection: "
            f"last, fewer split.folds, or more patients a class."
        )
    if config.finetune.selection == "nested" and splits.by_frame:
        raise DataError("finetune.selection: nested divides patients and data.group: frame divides nothing by patient. Use selection: inner.")
    if config.finetune.selection == "inner":
        return {"train": fold.inner[0].train, "validation": fold.inner[0].validation, "test": fold.test}
    return {"train": fold.train, "validation": [], "test": fold.test}


def _encoder_card(init: str, fold: Fold, splits: Splits, nested: bool) -> dict[str, Any]:
    """What pretrained the encoder, checked against this fold's test and validation patients; empty for `random`."""
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
    inner = fold.inner if nested else fold.inner[:1]
    validated = set(splits.groups_of([video for part in inner for video in part.validation]))
    for name, patients in (("test", tested), ("inner validation", validated)):
        if told := sorted(set(card.get("label_groups", [])) & patients):
            raise LeakageError(
                f"{folder}: pretraining read the labels of {len(told)} {name} patients of fold {fold.fold}, for example {told[0]}. Run the "
                + ("pretrain stage again." if not nested or name == "test" else NO_LABELS)
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
    config: Config, splits: Splits, fold: Fold, init: str, seed: int, parts: dict[str, list[str]], digest: str, views: tuple[int, str, str]
) -> str:
    """Everything that determines the predictions; for `random` that is independent of pretraining."""
    code = code_digest(
        "grid.py", "training/finetune.py", "training/finetune_stage.py", "training/selection.py", "training/optim.py", "models/classifier.py",
        "models/backbones.py",
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
    inner = [(part.train, part.validation) for part in fold.inner] if config.finetune.selection == "nested" else []
    return fingerprint(finetune, shared, labels, parts, inner, splits.classes, splits.manifest_digest, code, init, seed, encoder, views)


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
    encoder = _encoder_card(init, fold, splits, config.finetune.selection == "nested")
    weights = f"models/encoders/fold{fold_number}/encoder.safetensors" if encoder else ""
    trained, used = encoder.get("normalization"), config.finetune.augmentation.normalization
    if trained and trained != used:
        print(f"warning: finetune.augmentation.normalization is {used}, but the encoder was pretrained with {trained}; use the same", file=sys.stderr)
    key = _fingerprint(config, splits, fold, init, seed, parts, weights, _encoder_views(config, encoder))
    output = Path(f"models/finetuned/{init}-seed{seed}-fold{fold_number}")
    if splits.by_frame:
        # All folds hold the same videos; only their frames differ.
        key = fingerprint(key, splits.seed, fold.repeat, fold.fold, splits.folds_per_repeat, len(fold.inner))
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
        card["stamp"] = ", ".join(filter(None, (splits.stamp, card["stamp"]))) or None
        card["preprocessing"] = input_facts(config, config.finetune.augmentation)
        card["finetune"] = config.finetune.model_dump(mode="json", exclude={"initialisations", "seeds"})
        write_json(output / "card.json", card)
        _log_result(output, tracker)
        table = about(find_weights(output))
        if table["scorable"]:
            tracker.log_model(done / "model.safetensors", table, "classifier")
        else:
            tracker.set_tags({"model": f"not logged: {table['why_not']}"})
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


class _Networks:
    """Fresh networks of one item, each from the same weights and behind the same random numbers."""

    def __init__(self, config: Config, classes: int, weights: str, seed: int, train: list[int]) -> None:
        from pipeline.checkpoint import read_state_dict
        from pipeline.distributed import pick_device
        from pipeline.training.finetune import Prepared

        self.pretrain, self.classes, self.weights, self.seed = config.pretrain, classes, weights, seed
        self.device, self.prepared = pick_device(config.launch.device), Prepared(train)
        self.state = read_state_dict(Path(weights), "models/encoders") if weights else None
        self.extras = None
        if weights:
            beside = _extras_file(weights)
            self.extras = read_state_dict(beside, "models/encoders") if beside.is_file() else {}

    def trunk(self) -> tuple[Any, int]:
        """(encoder as pretraining left it, or untrained; width of its features)."""
        from pipeline.models.backbones import build_backbone
        from pipeline.models.published import load_trunk
        from pipeline.reproducibility import seed_everything

        seed_everything(self.seed)
        backbone, features = build_backbone(self.pretrain.backbone, self.pretrain.seed, self.pretrain.image_size)
        if self.state is not None:
            load_trunk(backbone, self.state, self.weights, "models/encoders")
        return backbone, features

    def build(self, data: Any, params: FinetuneParams) -> Any:
        """A classifier and its training."""
        from pipeline.models.classifier import Classifier
        from pipeline.training.finetune import Finetuning

        backbone, features = self.trunk()
        size = self.pretrain.image_size
        network = Classifier(
            backbone, self.pretrain.backbone, features, self.classes, head=params.head, trainable=params.trainable,
            batchnorm=params.batchnorm, lora_rank=params.lora_rank, lora_alpha=params.lora_alpha, image_size=size, extras=self.extras,
            pooling=params.pooling,
        ).to(self.device)
        return Finetuning(network, data, params, seed=self.seed, size=size, device=self.device, prepared=self.prepared)


def _gather(config: Config, splits: Splits, parts: dict[str, list[str]], seed: int, threads: int) -> Any:
    """The fold's videos with their labels: FinetuneData. Of training and validation what `finetune.label_fraction` leaves."""
    import numpy as np

    from pipeline.training.finetune import FinetuneData, subset_by_patient

    params, size = config.finetune, config.pretrain.image_size
    refs = gather_videos([FrameStore(frames_folder(params.source))], sorted(video for ids in parts.values() for video in ids))
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
        subset_by_patient([index[v] for v in parts[part]], labels, groups, params.label_fraction, seed, joint=joint)
        for part in ("train", "validation")
    )
    return FinetuneData(frames, labels, groups, splits.classes, train, validation, [index[v] for v in parts["test"]])


def _dealt(splits: Splits, fold: Fold, frames: FrameCache, inner: int | None) -> Callable[[str, int], list[int]]:
    """Which frames of a video a part may use where the split deals frames: for `FinetuneData.allowed`."""
    return lambda part, video: splits.frames_of(fold, part, frames.videos[video].video, frames.num_frames(video), inner)


def _finetune(
    config: Config, splits: Splits, parts: dict[str, list[str]], encoder: dict[str, Any], weights: str, identity: dict[str, Any],
    folder: Path, tracker: NullTracker,
) -> None:
    """Train, select, predict, and write the result files into `folder`."""
    from pipeline.checkpoint import save_tensors
    from pipeline.evaluation.features import write_features
    from pipeline.models.lora import merged_state
    from pipeline.reproducibility import configure_torch

    params, started = config.finetune, time.monotonic()
    threads = threads_per_process(config.launch)
    configure_torch(threads)
    data = _gather(config, splits, parts, identity["seed"], threads)
    if splits.by_frame:
        data = replace(data, allowed=_dealt(splits, splits.fold(identity["fold"]), data.frames, 0 if params.selection == "inner" else None))
    networks = _Networks(config, len(splits.classes), weights, identity["seed"], data.train)
    # Of the untouched network: the report's map and neighbours show what the encoder itself sees, prepared as in its pretraining.
    working, mode, normalization = _encoder_views(config, encoder)
    refs = data.frames.videos
    write_features(
        folder / "features.npz", networks.trunk()[0].to(networks.device), FrameCache(refs, working, mode=mode, budget_mb=0),
        range(len(refs)), size=config.pretrain.image_size, device=networks.device, normalization=normalization,
    )
    title, nested = f"finetune {identity['init']} fold {identity['fold']}", {}
    if params.selection == "nested":
        run, predictions, nested = _nested(networks, data, splits.fold(identity["fold"]), params, tracker, title)
    else:
        run = networks.build(data, params)
        run.train(tracker, title)
        predictions = {part: run.predict(part) for part in ("test", "validation") if getattr(data, part)}
    groups, chosen = data.groups, run.params
    validated = {v for v, _ in predictions["validation"].items} if "validation" in predictions else set()
    card = identity | {
        "classes": splits.classes, "train_groups": sorted({groups[v] for v in data.train}),
        "validation_groups": sorted({groups[v] for v in validated}), "test_groups": splits.groups_of(parts["test"]),
        "selection": params.selection, "selected_epoch": run.selected_epoch, **nested,
        "stamp": _stamp(config, encoder, {groups[v] for v in {*data.train, *validated}}, {*splits.groups_of(parts["train"] + parts["validation"])}),
        "trainable": chosen.trainable, "head": chosen.head, "pooling": chosen.pooling, "label_fraction": params.label_fraction,
        "trained_parameters": sum(p.numel() for p in run.network.parameters() if p.requires_grad),
        "backbone": config.pretrain.backbone, "image_size": config.pretrain.image_size, "device": networks.device.type,
        "seconds": round(time.monotonic() - started, 1),
    } | _encoder_facts(encoder)
    _write_predictions(folder / "predictions.csv", predictions, refs, identity, splits)
    write_curves(folder / "curves.csv", run.rows)
    save_tensors(folder / "model.safetensors", merged_state(run.network), {"schema": 1})
    write_json(folder / "card.json", card)


def _nested(
    networks: _Networks, data: Any, fold: Fold, params: FinetuneParams, tracker: NullTracker, title: str
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Choose on the inner folds, then train on all training patients: (the last network's training, predictions, facts for the card)."""
    from pipeline.training.selection import choose, inner_data

    choice = choose(networks.build, inner_data(data, fold.inner), params, title)
    run = networks.build(data, choice.params)
    run.train(tracker, title, choice.epoch + 1)
    for epoch, scores in enumerate(choice.curve):
        tracker.log_metrics(scores, step=epoch)
    run.rows = [row | scores for row, scores in zip(run.rows, choice.curve, strict=False)]
    facts = {"grid": params.grid, "nested": {"values": choice.values, "score": choice.score, "candidates": choice.table}}
    return run, {"test": run.predict("test"), "validation": choice.predictions}, facts


def _write_predictions(
    path: Path, predictions: dict[str, Any], refs: list[VideoRef], identity: dict[str, Any], splits: Splits
) -> None:
    """predictions.csv: one row a predicted frame of the test and inner validation videos; `weight` where attention gave it one."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    weighed = ["weight"] if predictions["test"].weights is not None else []
    table.writerow(["init", "seed", "fold", "part", "video", "patient", "frame", "label", *weighed, *(f"p_{name}" for name in splits.classes)])
    for part, predicted in predictions.items():
        for row, ((index, frame), probabilities) in enumerate(zip(predicted.items, predicted.probabilities, strict=True)):
            video = refs[index].video
            fields = [identity["init"], identity["seed"], identity["fold"], part, video, splits.groups[video], frame, splits.labels[video]]
            numbers = [*([predicted.weights[row]] if weighed else []), *probabilities]
            table.writerow([*fields, *(repr(float(number)) for number in numbers)])
    atomic_write(path, text.getvalue())


def _log_result(output: Path, tracker: NullTracker) -> None:
    card = read_json(output / "card.json")
    chosen = {f"chosen.{key}": value for key, value in card.get("nested", {}).get("values", {}).items()}
    tracker.log_params({"selected_epoch": card["selected_epoch"], "stamp": card["stamp"] or "none", "method": card["method"], **chosen})
    tracker.log_metrics({
        "train.seconds": card["seconds"], "selected_epoch": card["selected_epoch"], "train.patients": len(card["train_groups"]),
    })
    tracker.log_artifact(output / "curves.csv")
    tracker.log_artifact(output / "predictions.csv")
