"""What is watched while pretraining: collapse, neighbours across patients, throughput, and one readable line an epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from pipeline.data.frames import FrameCache
from pipeline.errors import PipelineError
from pipeline.evaluation.features import collapse_statistics, embed_frames, evenly_spaced, neighbor_accuracy
from pipeline.parameters import MonitorParams, OptimizerParams

__all__ = ["Monitor", "Throughput", "chance_warning", "epoch_line"]


class Monitor:
    """Measures the backbone on central views of fixed frames of the pretraining videos.

    Only patients the encoder may see take part. The neighbour vote asks other patients' frames, so it cannot profit from
    recognising the patient. Nothing here selects anything.

    Args:
        labels: int64 [videos], -1 where unlabelled or not to be used. groups: patient of each video.
    """

    def __init__(self, params: MonitorParams, frames: FrameCache, labels: np.ndarray, groups: list[str], size: int) -> None:
        self.params, self.frames, self.size = params, frames, size
        chosen = evenly_spaced(len(frames), params.max_videos)
        self.items = [(v, n) for v in chosen for n in evenly_spaced(frames.num_frames(v), params.frames_per_video)]
        self.labels = np.array([labels[v] for v, _ in self.items])
        self.groups = np.array([groups[v] for v, _ in self.items])

    def measure(self, backbone: nn.Module, device: torch.device, normalization: str) -> dict[str, float]:
        """`embedding_std`, `effective_rank`, and `knn_balanced_accuracy` where labels allow it."""
        features = embed_frames(backbone, self.frames, self.items, size=self.size, device=device, normalization=normalization)
        if not torch.isfinite(features).all():
            raise PipelineError(
                "pretrain: the backbone gives numbers that are not finite. Lower pretrain.optimizer.lr, or set pretrain.precision to float32."
            )
        numbers = collapse_statistics(features)
        accuracy = neighbor_accuracy(features, self.labels, self.groups, self.params.neighbors)
        return numbers if accuracy is None else {**numbers, "knn_balanced_accuracy": accuracy}

    @staticmethod
    def warning(numbers: dict[str, float], contrasts: bool) -> str | None:
        """A sentence when the embeddings look collapsed, else None. `contrasts`: as in `chance_warning`."""
        if numbers["embedding_std"] < 0.05 or numbers["effective_rank"] < 1.5:
            return (
                f"embeddings look collapsed (std {numbers['embedding_std']:.3f}, 1 is spread evenly; effective rank "
                f"{numbers['effective_rank']:.1f}). Lower the learning rate"
                f"{', raise the temperature, or use more negatives' if contrasts else ', or use larger batches'}."
            )
        return None


def chance_warning(rows: Sequence[Mapping[str, float]], epochs: int, optimizer: OptimizerParams, contrasts: bool) -> tuple[int, str] | None:
    """(epoch, sentence) for the first epoch behind the first quarter of training whose mean loss is not 1 % below chance.

    Statistics of the backbone cannot show this: the head alone may map all images to one point while the backbone still
    spreads them. A method without a chance level (SimSiam, BYOL) is asked for the spread of its head's outputs instead.

    Args:
        rows: curves so far, with `epoch`, `loss`, and `chance_loss` or `output_spread`. epochs: of the whole run. optimizer: of the
            pretraining. contrasts: the method has negatives and their temperature (`Method.contrasts`).
    """
    for row in rows:
        chance, late = row.get("chance_loss"), 4 * row["epoch"] >= epochs
        if chance is None and late and row.get("output_spread", 1) < 0.1:
            return int(row["epoch"]), (
                f"the head maps all images to nearly one point (output_spread {row['output_spread']:.3f}, 1 is spread evenly): its loss is "
                f"low because it has collapsed. Lower pretrain.optimizer.lr (now {optimizer.lr:g}) or use larger batches."
            )
        if chance is not None and late and chance > 0 and row["loss"] >= 0.99 * chance:
            ways = [f"Lower pretrain.optimizer.lr (now {optimizer.lr:g})"]
            ways += ["take adamw at 0.001"] if (optimizer.name, optimizer.lr) != ("adamw", 0.001) else ["train for more epochs"]
            ways += ["raise the temperature"] if contrasts else []
            meaning = "does not tell the positive from the negatives" if contrasts else "does no better than one output for all images"
            return int(row["epoch"]), (
                f"the loss ({row['loss']:.3f}) has not left chance level ({chance:.3f}) after a quarter of training: the network {meaning}. "
                f"{', '.join(ways[:-1])} or {ways[-1]}."
            )
    return None


class Throughput:
    """Images and seconds since the last reading."""

    def __init__(self) -> None:
        self.images, self.started = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """Count images that went through an encoder."""
        self.images += images

    def read(self) -> tuple[float, float]:
        """(images per second, seconds) since the last reading, and start again."""
        seconds = time.perf_counter() - self.started
        rate = self.images / max(seconds, 1e-9)
        self.images, self.started = 0, time.perf_counter()
        return rate, seconds


def epoch_line(row: dict[str, float | None], epochs: int, remaining: float) -> str:
    """One line for the log: what happened, what is normal, how long it still takes."""
    chance = "" if row.get("chance_loss") is None else f" (chance {row['chance_loss']:.2f})"
    parts = [f"epoch {int(row['epoch'] or 0) + 1}/{epochs}", f"loss {row['loss']:.4f}{chance}"]
    for name, label in (("output_spread", "spread"), ("embedding_std", "std"), ("effective_rank", "rank"), ("knn_balanced_accuracy", "kNN")):
        if row.get(name) is not None:
            parts.append(f"{label} {row[name]:.2f}")
    minutes, seconds = divmod(int(remaining), 60)
    parts += [f"{row['images_per_second']:.0f} images/s", f"ETA {minutes}:{seconds:02d}"]
    return "  ".join(parts)
