"""What a training stage works on: which videos it may see, and the fingerprint of everything that determines its result.

No torch here: a stage that finds its result finished must not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config, fingerprint
from pipeline.data.frames import VideoRef, gather_videos
from pipeline.data.splits import Fold, Splits
from pipeline.data.store import FrameStore
from pipeline.errors import DataError
from pipeline.files import hash_file

__all__ = ["PretrainInputs", "code_digest", "frames_folder", "open_pretrain_inputs"]

PACKAGE = Path(__file__).resolve().parents[1]


def frames_folder(source: str) -> Path:
    """Where the extract stage puts the frame store of a source."""
    return Path("data/frames") / source


def code_digest(*names: str) -> list[str]:
    """SHA-256 of source files of the package, by name relative to it: their change makes a new result."""
    return [hash_file(PACKAGE / name) for name in names]


@dataclass(frozen=True)
class PretrainInputs:
    """Videos one encoder is pretrained on."""

    videos: list[VideoRef]
    groups: list[str]
    """Patient (or other group) of each video."""
    labels: list[int]
    """Class number of each video, -1 where unlabelled; used by the live monitor only."""
    classes: list[str]
    targets: list[int]
    """Class number of each video for a semi-supervised method, -1 where it must not know it."""
    target_classes: list[str]
    """Classes of `targets`: those of the main source first; empty where the method reads no labels."""
    left_out: list[str]
    """Ids of videos that are too short for the method."""
    fingerprint: str
    scope: str = "fold"
    """`fold`, `all` (transductive), or `none` where nothing is trained."""

    @property
    def target_groups(self) -> list[str]:
        """Patients whose labels pretraining reads."""
        return sorted({group for group, target in zip(self.groups, self.targets, strict=True) if target >= 0})

    def target_counts(self) -> dict[str, int]:
        """Labelled videos of each class that pretraining uses."""
        return {name: self.targets.count(number) for number, name in enumerate(self.target_classes)}


def _pretrain_fingerprint(config: Config, videos: Sequence[VideoRef], targets: Sequence[str]) -> str:
    """Everything that determines the encoder; not the fold number, so that folds which see the same videos share it."""
    pretrain = config.pretrain.model_dump(mode="json", exclude={"scope", "sources", "monitor", "memory_budget_mb", "checkpoint_seconds"})
    extract = config.extract.model_dump(mode="json", exclude={"workers": True, "on_error": True, "mask": {"review"}})
    code = code_digest(
        f"methods/{config.pretrain.method}.py", "methods/base.py", "losses.py", "losses_baselines.py", "losses_msn.py",
        "models/catalog.py", "models/backbones.py", "models/vit.py", "models/published.py", "models/levels.py",
        "models/heads.py",
        "models/momentum.py", "models/patches.py", "data/clips.py", "data/photometry.py", "data/randaugment.py",
        "data/transforms.py", "data/store.py", "data/frames.py", "data/loader.py",
        "distributed.py", "training/optim.py", "training/pretrain.py",
    )
    weights = hash_file(Path(config.pretrain.init)) if Path(config.pretrain.init).is_file() else config.pretrain.init
    # The size of the stored frames tells masks of the same file apart, which a person's review may have changed.
    content = [(ref.row.video, ref.row.frames, ref.row.sha256, ref.row.bytes, ref.row.mask_share) for ref in videos]
    return fingerprint(pretrain, config.method_params, extract, config.launch.device, code, weights, content, targets)


def _told(fold: Fold) -> list[str]:
    """Videos of a fold's training patients without the inner validation part, where there is one."""
    return fold.inner[0].train if fold.inner else fold.train


def _permitted_labels(splits: Splits, fold: int | None, videos: Sequence[VideoRef]) -> list[str]:
    """Label of each video that pretraining may know, empty where none.

    Main source: labels of the videos that fine-tuning trains on, not those of the inner validation part, so that an epoch is
    chosen on patients whose labels no part of the network knows; none without a fold. Further sources: what their tables say,
    but never of a patient with other labelled main videos (without a fold these are all of them).
    """
    training = set() if fold is None else set(_told(splits.fold(fold)))
    closed = set(splits.groups_of(set(splits.labels) - training))
    main = {*splits.labels, *splits.unlabelled}
    own = {video: splits.labels[video] for video in training}
    return [
        own.get(ref.video, "") if ref.video in main else "" if splits.groups[ref.video] in closed else ref.row.label for ref in videos
    ]


def _drawn_share(labels: Sequence[str], share: float, seed: int) -> list[str]:
    """`labels` with ceil(share * n) of the n given ones kept, drawn by the seed, and the others empty."""
    given = [i for i, label in enumerate(labels) if label]
    kept = set(np.random.default_rng(seed).permutation(given)[: math.ceil(share * len(given))].tolist())
    return [label if i in kept else "" for i, label in enumerate(labels)]


def open_pretrain_inputs(config: Config, splits: Splits, fold: int) -> PretrainInputs:
    """Collect the videos of all pretraining sources that the encoder of this fold may see.

    With `pretrain.scope: fold` these exclude every video of the fold's test patients (in every source); with `all`, and in a
    split by frame, nothing is excluded, and no label of the main source is passed on, so that not even a monitor looks at test
    labels.

    Raises:
        DataError: nothing is left, with counts of what was left out and why.
    """
    from pipeline.registry import METHODS

    method, params = METHODS.get(config.pretrain.method), config.method_params
    inside = fold if config.pretrain.scope == "fold" and not splits.by_frame else None
    wanted = [v for source in config.pretrain.sources for v in splits.pretraining_videos(inside, source)]
    stores = [FrameStore(frames_folder(source)) for source in config.pretrain.sources]
    refs = gather_videos(stores, wanted)
    needed = method.min_frames(params) if method.trains else 1
    kept = [ref for ref in refs if ref.row.frames >= needed]
    short = [ref.video for ref in refs if ref.row.frames < needed]
    if not kept:
        raise DataError(
            f"pretrain: no video is left for method {config.pretrain.method}: of {len(refs)} videos in {', '.join(config.pretrain.sources)}, "
            f"{len(short)} have fewer than the {needed} frames it samples from. Extract more frames "
            f"(extract.frames_per_second, extract.max_frames) or choose a method for single frames (simclr, moco)."
        )
    number = {name: i for i, name in enumerate(splits.classes)}
    known = splits.labels if inside is not None else {}
    share = method.label_share(params)
    permitted = _permitted_labels(splits, inside, kept) if share else [""] * len(kept)
    target_classes = sorted({*permitted} - {""}, key=lambda name: (number.get(name, len(number)), name))
    chosen = _drawn_share(permitted, share, config.pretrain.seed)
    return PretrainInputs(
        kept,
        [splits.groups[ref.video] for ref in kept],
        [number.get(known.get(ref.video, ""), -1) for ref in kept],
        splits.classes,
        [target_classes.index(label) if label else -1 for label in chosen],
        target_classes,
        short,
        _pretrain_fingerprint(config, kept, chosen if share else []),
        ("all" if inside is None else "fold") if method.trains else "none",
    )
