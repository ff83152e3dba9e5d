"""Batches for pretraining: what each process reads at each step is a pure function of (seed, epoch, video id).

So results depend neither on the number of threads nor on when a run was interrupted, and two processes read together
exactly what one would read alone.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data.clips import ClipBatch, ViewRule
from pipeline.data.frames import FrameCache
from pipeline.data.transforms import frame_view, normalize, render
from pipeline.errors import DataError, PipelineError
from pipeline.parameters import AugmentationParams

__all__ = ["ClipLoader", "SamplingPlan", "epoch_order", "sample_generator"]


def sample_generator(seed: int, epoch: int, video: int, sample: int = 0) -> np.random.Generator:
    """The random numbers of one sample of one video in one epoch: frames and views come from it, in a fixed order."""
    return np.random.default_rng([seed, epoch, video, sample])


def epoch_order(videos: int, samples: int, epoch: int, seed: int) -> np.ndarray:
    """Order of one epoch: int64 [videos * samples, 2] of (video, sample). Every video comes `samples` times.

    Each of the `samples` rounds passes over all videos once, so that the copies of a video lie far apart.
    """
    rng = np.random.default_rng([seed, epoch])
    rounds = [np.stack([rng.permutation(videos), np.full(videos, s)], axis=1) for s in range(samples)]
    return np.concatenate(rounds).astype(np.int64)


@dataclass(frozen=True)
class SamplingPlan:
    """What is drawn: the method's rule and the sizes of an epoch."""

    method: Any
    """A `pipeline.methods.base.Method` class; only its `draw` and `views` are used."""
    params: Any
    augmentation: AugmentationParams
    image_size: int
    epochs: int
    batch_size: int
    """Samples of one optimiser step over all processes."""
    accumulate: int = 1
    samples_per_video: int = 1
    seed: int = 0

    def rules(self) -> Mapping[str, ViewRule]:
        """How the frames of each role are rendered; a role the method does not name gets its ordinary views."""
        own = self.method.views(self.params, self.image_size)
        return defaultdict(lambda: ViewRule(self.image_size, self.augmentation), own)


class ClipLoader:
    """Micro-batches of one process, rendered ahead by threads.

    Args:
        frames: pixels. labels: int64 [videos], -1 where unlabelled. plan: what to draw.
        rank, world: which share of each batch to read. threads: rendering threads. ahead: micro-batches prepared ahead.
    """

    def __init__(
        self, frames: FrameCache, labels: np.ndarray, plan: SamplingPlan, *, rank: int = 0, world: int = 1, threads: int = 2, ahead: int = 3
    ) -> None:
        self.frames, self.labels, self.plan = frames, labels, plan
        self.rank, self.world, self.threads, self.ahead = rank, world, max(1, threads), ahead
        self.rules = plan.rules()
        self.waited = 0.0
        """Seconds the training loop has waited for data."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch over all processes, before padding."""
        return len(self.frames) * self.plan.samples_per_video

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; the last one may be smaller."""
        return -(-self.samples_per_epoch // self.plan.batch_size)

    @property
    def samples_per_pass(self) -> int:
        """Different samples of one forward pass over all processes, in the largest step of an epoch."""
        step = min(self.plan.batch_size, self.samples_per_epoch)
        return min(self.world * self._rows(step), self.samples_per_epoch)

    def _rows(self, samples: int) -> int:
        """Rows of a micro-batch of one process in a step of so many samples.

        All processes need equally many, and batch norm more than one where the batch size allows it.
        """
        parts = self.world * self.plan.accumulate
        return max(-(-samples // parts), 2 if self.plan.batch_size >= 2 * parts else 1)

    def _micro_batches(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        """(video, sample) pairs of this process, micro-batch by micro-batch."""
        plan = self.plan
        order = epoch_order(len(self.frames), plan.samples_per_video, epoch, plan.seed)
        parts = self.world * plan.accumulate
        for step in range(first_step, self.steps_per_epoch):
            chunk = order[step * plan.batch_size : (step + 1) * plan.batch_size]
            # A batch that is too small is filled up with the first samples of the epoch.
            chunk = np.concatenate([chunk, np.resize(order, (self._rows(len(chunk)) * parts - len(chunk), 2))])
            for micro in np.split(chunk, plan.accumulate):
                yield np.split(micro, self.world)[self.rank]

    def _render(self, pair: np.ndarray, epoch: int, out: dict[str, np.ndarray], row: int) -> None:
        """Draw and render one sample into row `row` of the output arrays."""
        plan, index = self.plan, int(pair[0])
        rng = sample_generator(plan.seed, epoch, self.frames.videos[index].number, int(pair[1]))
        roles = plan.method.draw(plan.params, self.frames.num_frames(index), epoch, plan.epochs, rng)
        for role, numbers in roles.items():
            if numbers.dtype.kind == "f":
                out[role][row] = numbers
                continue
            rule, view = self.rules[role], None
            for k, number in enumerate(numbers):
                frame = self.frames.frame(index, int(number))
                if view is None or not rule.linked:
                    view = frame_view(rule.augmentation, rng, frame, rule.size, plan.image_size)
                render(frame, view, rule.size, out[role][row, k])

    def _submit(self, pool: ThreadPoolExecutor, pairs: np.ndarray, epoch: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[Future[None]]]:
        plan, out = self.plan, {}
        for role, numbers in plan.method.draw(plan.params, 100, epoch, plan.epochs, np.random.default_rng(0)).items():
            drawn = numbers.dtype.kind == "f"
            size = 0 if drawn else self.rules[role].size
            shape = () if drawn else (size, size, *self.frames.frame_shape)
            out[role] = np.empty((len(pairs), len(numbers), *shape), np.float32 if drawn else np.uint8)
        return pairs, out, [pool.submit(self._render, pair, epoch, out, row) for row, pair in enumerate(pairs)]

    def epoch(self, epoch: int, device: torch.device, first_step: int = 0) -> Iterator[ClipBatch]:
        """Micro-batches of one epoch on the device, from optimiser step `first_step` on (`accumulate` a step)."""
        pending: deque[Any] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            plan = self._micro_batches(epoch, first_step)
            for pairs in plan:
                pending.append(self._submit(pool, pairs, epoch))
                if len(pending) > self.ahead:
                    yield self._finish(pending.popleft(), device)
            while pending:
                yield self._finish(pending.popleft(), device)

    def _finish(self, item: Any, device: torch.device) -> ClipBatch:
        pairs, out, futures = item
        start = time.perf_counter()
        for pair, future in zip(pairs, futures, strict=True):
            try:
                future.result()
            except PipelineError:
                raise
            except Exception as error:
                video = self.frames.videos[int(pair[0])].video
                raise DataError(f"video {video}: no sample could be made of it ({type(error).__name__}: {error})") from error
        self.waited += time.perf_counter() - start
        frames, drawn = {}, {}
        for role, array in out.items():
            tensor = torch.from_numpy(array)
            if device.type == "cuda":
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            if array.dtype == np.uint8:
                frames[role] = normalize(tensor, self.rules[role].augmentation.normalization)
            else:
                drawn[role] = tensor
        numbers = torch.tensor([self.frames.videos[int(v)].number for v in pairs[:, 0]], dtype=torch.int64)
        labels = torch.from_numpy(self.labels[pairs[:, 0]].astype(np.int64))
        return ClipBatch(frames, numbers.to(device), labels.to(device), drawn)
