"""What a training stage works on: which videos it may see, and the fingerprint of everything that determines its result.

No torch here: a stage that finds its result finished must not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, fingerprint
from pipeline.data.frames import VideoRef, gather_videos
from pipeline.data.splits import Splits
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
    """Class number of each video, -1 where unlabelled; used by the live monitor and by semi-supervised methods only."""
    classes: list[str]
    left_out: list[str]
    """Ids of videos that are too short for the method."""
    fingerprint: str


def _pretrain_fingerprint(config: Config, videos: Sequence[VideoRef]) -> str:
    """Everything that determines the encoder; not the fold number, so that folds which see the same videos share it."""
    pretrain = config.pretrain.model_dump(mode="json", exclude={"scope", "sources", "monitor", "memory_budget_mb", "checkpoint_seconds"})
    extract = config.extract.model_dump(mode="json", exclude={"workers", "on_error"})
    code = code_digest(
        f"methods/{config.pretrain.method}.py", "methods/base.py", "losses.py", "models/backbones.py", "models/heads.py",
        "models/momentum.py", "data/clips.py", "data/transforms.py", "data/store.py", "data/frames.py", "data/loader.py",
        "distributed.py", "training/optim.py", "training/pretrain.py",
    )
    weights = hash_file(Path(config.pretrain.init)) if Path(config.pretrain.init).is_file() else config.pretrain.init
    content = [(ref.row.video, ref.row.frames, ref.row.sha256) for ref in videos]
    return fingerprint(pretrain, config.method_params, extract, config.launch.device, code, weights, content)


def open_pretrain_inputs(config: Config, splits: Splits, fold: int) -> PretrainInputs:
    """Collect the videos of all pretraining sources that the encoder of this fold may see.

    With `pretrain.scope: fold` these exclude every video of the fold's test patients (in every source); with `all` nothing is
    excluded, and no label is passed on, so that not even a monitor looks at test labels.

    Raises:
        DataError: nothing is left, with counts of what was left out and why.
    """
    from pipeline.registry import METHODS

    method, params = METHODS.get(config.pretrain.method), config.method_params
    inside = fold if config.pretrain.scope == "fold" else None
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
    return PretrainInputs(
        kept,
        [splits.groups[ref.video] for ref in kept],
        [number.get(known.get(ref.video, ""), -1) for ref in kept],
        splits.classes,
        short,
        _pretrain_fingerprint(config, kept),
    )
