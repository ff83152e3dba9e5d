"""Small data and runs for the tests of training: structured clips in a frame store, parameters, a project folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from pipeline import distributed
from pipeline.config import Config, load_config
from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.loader import ClipLoader, SamplingPlan
from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.splits import Splits
from pipeline.data.splitting import make_splits
from pipeline.data.store import FrameStore, write_video
from pipeline.methods.base import Method, MethodContext
from pipeline.models.backbones import build_backbone
from pipeline.parameters import AugmentationParams
from pipeline.registry import METHODS
from pipeline.tracking import NullTracker
from pipeline.training.inputs import PretrainInputs
from pipeline.training.pretrain import Pretraining

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PLAIN = {"resize": "short_side", "crop": "center", "horizontal_flip": 0, "jitter": 0, "blur": 0}
"""Augmentation that changes nothing."""

torch.set_num_threads(1)


def clip_frames(seed: int, frames: int, side: int, label: int = 0, channels: int = 1) -> list[np.ndarray]:
    """A texture of its own for each seed that drifts sideways; class 1 is coarser and brighter than class 0."""
    rng = np.random.default_rng(seed)
    world = rng.normal(size=(side, side + 2 * frames)).astype(np.float32)
    world = cv2.GaussianBlur(world, (0, 0), 1.5 + 3 * label)
    world = (world - world.mean()) / world.std() * 35 + 90 + 60 * label + 10 * rng.normal()
    grey = [np.clip(world[:, 2 * t : 2 * t + side], 0, 255).astype(np.uint8) for t in range(frames)]
    return grey if channels == 1 else [np.dstack([f, np.roll(f, 5, 0), 255 - f]) for f in grey]


def make_store(
    folder: Path,
    patients: int = 6,
    clips: int = 1,
    frames: int | list[int] = 20,
    side: int = 40,
    channels: int = 1,
    first: int = 0,
    source: str = "main",
    labelled: bool = True,
) -> FrameStore:
    """A frame store of `patients` x `clips` videos; patient i has class i mod 2 (`a`, `b`)."""
    rows = []
    for number in range(patients * clips):
        patient = number // clips + first
        video = f"{(patient + 1) * 0x1F3A5B79D1 + number % clips:016x}"
        count = frames if isinstance(frames, int) else frames[number % len(frames)]
        pictures = clip_frames(int(video, 16), count, side, patient % 2, channels)
        written = write_video(
            folder, video, (cv2.imencode(".jpg", f[..., ::-1] if f.ndim == 3 else f)[1].tobytes() for f in pictures)
        )
        rows.append(
            VideoRow(
                video=video,
                source=source,
                path=f"{video}.mp4",
                sha256=video * 4,
                patient=f"P{patient:010x}",
                label="ab"[patient % 2] * labelled,
                kind="video",
                frames=written,
                frames_decoded=written,
                frames_claimed=written,
                fps=12.0,
                fps_source="container",
                width=side,
                height=side,
                stored_width=side,
                stored_height=side,
                channels=channels,
                bytes=(folder / f"{video}.tar").stat().st_size,
            )
        )
    Manifest(rows).write(folder / "manifest.csv")
    return FrameStore(folder)


SMALL: dict[str, Any] = {
    "pretrain": {
        "backbone": "resnet10",
        "image_size": 32,
        "epochs": 3,
        "batch_size": 4,
        "checkpoint_seconds": 3600,
        "samples_per_video": 2,
        "optimizer": {"name": "sgd", "lr": 0.01},
        "monitor": {"every_epochs": 1, "frames_per_video": 1},
    },
    "methods": {
        "ucl": {"cross_only_epochs": 1, "decay_start": 2, "momentum": 0.9, "embedding_dim": 16},
        "simclr": {"embedding_dim": 16},
        "moco": {"embedding_dim": 16, "queue_size": 32, "momentum": 0.9},
        "uscl": {"embedding_dim": 16},
        "hico": {"embedding_dim": 16},
        "simsiam": {"embedding_dim": 32, "predictor_dim": 8},
        "byol": {"embedding_dim": 16, "hidden_dim": 32, "momentum": 0.9},
        "barlow": {"embedding_dim": 32},
        "vicreg": {"embedding_dim": 32},
        "dino": {"output_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "local_views": 2, "momentum": 0.9},
        "cycle": {"embedding_dim": 16, "queue_size": 32, "support_size": 32, "momentum": 0.9},
        "msn": {
            "focal_size": 16, "focal_views": 2, "prototypes": 16, "hidden_dim": 32, "embedding_dim": 16, "momentum": 0.9,
            "sharpen": 0.5,
        },
        "random": {},
    },
    "finetune": {"epochs": 3, "frames_per_video": 2, "eval_frames_per_video": 2, "batch_size": 8, "cached_views": 2},
    "split": {"folds": [0, 1, 2]},
    "tracking": {"enabled": False},
    "launch": {"device": "cpu", "threads": 1, "processes": 1},
}


BACKBONES_OF_TESTS = {"msn": "vit_tiny"}
"""Methods that cannot work on resnet10."""


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested values replaced; keys of `changes` may be dotted."""
    result = json.loads(json.dumps(base))
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return result


def make_config(folder: Path, **changes: Any) -> Config:
    """Small parameters with changes (`pretrain__epochs=2` is pretrain.epochs), written to `folder` and read back."""
    values = merged(SMALL, {key.replace("__", "."): value for key, value in changes.items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(json.dumps(values))  # JSON is YAML
    return load_config(folder / "params.yaml")


def make_inputs(store: FrameStore, fingerprint: str = "0123456789abcdef", told: bool = False) -> PretrainInputs:
    """All videos of a store as the input of one pretraining run; `told`: of a method that reads labels."""
    refs = gather_videos([store])
    labels = ["ab".index(r.row.label) for r in refs]
    targets = labels if told else [-1] * len(labels)
    return PretrainInputs(refs, [r.row.patient for r in refs], labels, ["a", "b"], targets, ["a", "b"] if told else [], [], fingerprint)


class ListTracker(NullTracker):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__("pretrain")
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))


class StopAfter(distributed.StopFlag):
    """A stop flag that is raised after so many questions, one a step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def raised(self) -> Any:
        self.left -= 1
        return distributed.signal.SIGTERM if self.left < 0 else None


def never() -> StopAfter:
    """A stop flag that is never raised."""
    return StopAfter(10**9)


def make_run(config: Config, store: FrameStore, scratch: Path, tracker: NullTracker | None = None) -> Pretraining:
    """A pretraining run in this process."""
    told = METHODS.get(config.pretrain.method).label_share(config.method_params) > 0
    return Pretraining(config, make_inputs(store, told=told), scratch, tracker or NullTracker("pretrain"), threads=1)


def make_method(
    name: str,
    *,
    batch: int = 8,
    seed: int = 0,
    image: int = 32,
    norm: bool = True,
    double: bool = False,
    **changes: Any,
) -> Method:
    """A method on a small backbone, optionally without batch norm and in float64."""
    kind = METHODS.get(name)
    small = {k: v for k, v in SMALL["methods"][name].items() if k in kind.Params.model_fields}
    params = kind.Params(**{**small, **changes})
    torch.manual_seed(seed)
    backbone, features = build_backbone(BACKBONES_OF_TESTS.get(name, "resnet10"), seed, image)
    if not norm:
        remove_batch_norm(backbone)
    backbone = backbone.double() if double else backbone
    method = kind(backbone, params, MethodContext(features, 6, 10, batch, seed, image, classes=2))
    if not norm:
        remove_batch_norm(method.networks)
    if double:
        method.networks.double()
    method.networks.train()
    return method


def remove_batch_norm(module: torch.nn.Module) -> None:
    """Replace every batch norm by a fixed scaling, so that an image's embedding does not depend on its batch."""

    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * x

    for name, child in module.named_children():
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
            setattr(module, name, Scale())
        else:
            remove_batch_norm(child)


def toy_loader(
    store: FrameStore,
    method: type[Method],
    params: Any,
    *,
    size: int = 32,
    batch: int = 4,
    augmentation: dict[str, Any] | None = None,
    budget_mb: int = 64,
    rank: int = 0,
    world: int = 1,
    threads: int = 1,
    working: int | None = None,
    **plan: Any,
) -> ClipLoader:
    """Batches of a store for a method."""
    views = AugmentationParams(**{**PLAIN, **(augmentation or {})})
    frames = FrameCache(gather_videos([store]), working or size, budget_mb=budget_mb, threads=1)
    # Every third video is unlabelled, as in the data of semi-supervised methods.
    labels = np.array([-1 if i % 3 == 2 else "ab".index(ref.row.label or "a") for i, ref in enumerate(frames.videos)], np.int64)
    sampling = SamplingPlan(method, params, views, size, plan.pop("epochs", 6), batch, **plan)
    return ClipLoader(frames, labels, sampling, rank=rank, world=world, threads=threads)


def make_project(
    folder: Path, patients: int = 9, frames: int | list[int] = 12, **changes: Any
) -> tuple[Config, Splits]:
    """A project folder ready for the pretrain stage: params.yaml, data/frames/main, data/splits.json."""
    config = make_config(folder, **changes)
    store = make_store(folder / "data/frames/main", patients, frames=frames)
    splits = make_splits(store.manifest, config)
    splits.write(folder / "data/splits.json")
    return config, splits


def stage_command(stage: str, *arguments: str) -> list[str]:
    """The command line of a stage."""
    return [sys.executable, str(ROOT / "stages" / f"{stage}.py"), *arguments]


def stage_environment(folder: Path) -> dict[str, str]:
    """A clean environment for a stage in a temporary project."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MLFLOW_TRACKING_URI")
    return {**{k: v for k, v in os.environ.items() if k not in hidden}, "DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"}


def run_stage(folder: Path, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one stage to its end in a temporary project."""
    return subprocess.run(
        stage_command(stage, *arguments),
        cwd=folder,
        env=stage_environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
