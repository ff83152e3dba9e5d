"""Embeddings of frames and what they tell without a classifier: neighbours across patients, collapse statistics."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.data.frames import FrameCache
from pipeline.data.transforms import evaluation_view, normalize, render
from pipeline.errors import PipelineError
from pipeline.files import atomic_write

__all__ = ["collapse_statistics", "embed_frames", "evenly_spaced", "neighbor_accuracy", "render_centre", "write_features"]

FRAMES_KEPT = 4
"""Frames a video in features.npz: enough for a mean and for neighbours, and cheap beside fine-tuning."""


def evenly_spaced(num_frames: int, count: int) -> list[int]:
    """At most `count` distinct frame numbers, spread evenly and centred: 2 of 10 are frames 2 and 7."""
    if num_frames <= count:
        return list(range(num_frames))
    return [int((i + 0.5) * num_frames / count) for i in range(count)]


def render_centre(frames: FrameCache, items: list[tuple[int, int]], size: int) -> np.ndarray:
    """Central views of (video index, frame number) pairs: uint8 [N, size, size] or [N, size, size, 3].

    A frame held larger than `size` is shrunk to it first, so that the whole short side is seen.
    """
    out = np.empty((len(items), size, size, *frames.frame_shape), np.uint8)
    for row, (index, number) in enumerate(items):
        frame = frames.frame(index, number)
        side = min(frame.shape[:2])
        view = evaluation_view(frame.shape[:2], side)
        render(frame, view, size, out[row])
    return out


@torch.no_grad()
def embed_frames(
    backbone: nn.Module, frames: FrameCache, items: list[tuple[int, int]], *, size: int, device: torch.device,
    normalization: str = "imagenet", batch: int = 64,
) -> torch.Tensor:
    """Features of central views in evaluation mode. Returns float32 [N, F] on the CPU; the network's mode is put back."""
    training = backbone.training
    backbone.eval()
    parts = []
    for start in range(0, len(items), batch):
        images = torch.from_numpy(render_centre(frames, items[start : start + batch], size)).to(device)
        parts.append(backbone(normalize(images, normalization)).float().cpu())
    backbone.train(training)
    return torch.cat(parts) if parts else torch.empty(0, 0)


def write_features(
    path: Path, backbone: nn.Module, frames: FrameCache, videos: Sequence[int], *, size: int, device: torch.device, normalization: str
) -> None:
    """features.npz of some videos, by their numbers in `frames`: what the report's map and neighbours are made of.

    Arrays: `vectors` float16 [N, F] of length 1, `frame` int32 [N], `owner` int32 [N] (place in `videos`), `videos` [V]
    ids; four evenly spaced frames a video. Equal features give equal bytes.

    Raises:
        PipelineError: a feature is not finite.
    """
    items = [(video, number) for video in videos for number in evenly_spaced(frames.num_frames(video), FRAMES_KEPT)]
    vectors = embed_frames(backbone, frames, items, size=size, device=device, normalization=normalization)
    if not torch.isfinite(vectors).all():
        raise PipelineError("the encoder's features are not finite: its weights are damaged, or pretraining has diverged.")
    place = {video: row for row, video in enumerate(videos)}
    out = io.BytesIO()
    np.savez(
        out,
        vectors=torch.nn.functional.normalize(vectors, dim=1).numpy().astype(np.float16),
        frame=np.array([number for _, number in items], np.int32),
        owner=np.array([place[video] for video, _ in items], np.int32),
        videos=np.array([frames.videos[video].video for video in videos]),
    )
    atomic_write(path, out.getvalue())


def collapse_statistics(features: torch.Tensor) -> dict[str, float]:
    """Signs of collapse of features [N, F].

    `embedding_std`: mean over dimensions of the standard deviation of unit-length features times sqrt(F); 1 when spread
    evenly, 0 when all are equal (Chen and He, CVPR 2021, section 4.1). `effective_rank`: exp of the entropy of the
    normalised singular values of the centred features (RankMe, Garrido et al., ICML 2023); at most min(N, F).
    """
    if len(features) < 2:
        return {"embedding_std": 0.0, "effective_rank": 1.0}
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    std = unit.std(0).mean() * unit.shape[1] ** 0.5
    singular = torch.linalg.svdvals(unit - unit.mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    return {"embedding_std": float(std), "effective_rank": float(rank)}


def neighbor_accuracy(features: torch.Tensor, labels: np.ndarray, groups: np.ndarray, neighbors: int = 5) -> float | None:
    """Share of rows whose nearest neighbours *of other patients* vote for the right class, averaged over classes.

    Args:
        features: [N, F]. labels: int [N], -1 rows are left out. groups: [N] patient of each row.

    Returns:
        Balanced accuracy of the vote (cosine similarity, weights exp(similarity / 0.07)), None where it cannot be computed.
    """
    keep = labels >= 0
    features, labels, groups = features[torch.from_numpy(keep)], labels[keep], groups[keep]
    classes = np.unique(labels)
    if len(classes) < 2 or len(np.unique(groups)) < 2:
        return None
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit @ unit.T
    same = torch.from_numpy(groups[:, None] == groups[None, :])
    similarity[same] = -2.0
    top, index = similarity.topk(min(neighbors, len(labels) - 1), dim=1)
    weight = torch.where(top > -1.5, (top / 0.07).exp(), torch.zeros_like(top))
    votes = torch.zeros(len(labels), int(classes.max()) + 1).scatter_add_(1, torch.from_numpy(labels.astype(np.int64))[index], weight)
    right = votes.argmax(1).numpy() == labels
    return float(np.mean([right[labels == c].mean() for c in classes]))
