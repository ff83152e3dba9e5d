"""Which frames of a video are kept: evenly spaced, in one pass, whatever its length turns out to be."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import numpy as np

from pipeline.parameters import ExtractParams

__all__ = ["Thinner", "source_frames"]

Kept = TypeVar("Kept")


class Thinner(Generic[Kept]):
    """Keeps evenly spaced frames of a sequence of unknown length, in bounded memory and without a second pass.

    Every `stride`-th frame is kept; when eight times the wanted number lie in memory the stride doubles. The final
    choice is exact for short videos and off by at most an eighth of the spacing for long ones; frames between are never
    encoded.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted, self._stride = wanted, 1
        self._kept: list[Kept] = []
        self._seen = 0

    @property
    def kept(self) -> list[Kept]:
        """Frames that may still be chosen."""
        return self._kept

    def wants_next(self) -> bool:
        """Whether the next frame must be encoded; otherwise call `skip`."""
        return self._seen % self._stride == 0

    def skip(self) -> None:
        """Count a frame that is not encoded."""
        self._seen += 1

    def add(self, frame: Kept) -> None:
        """Take the next frame."""
        self._kept.append(frame)
        self._seen += 1
        if len(self._kept) >= 8 * self._wanted:
            self._kept = self._kept[::2]
            self._stride *= 2

    def result(self) -> list[Kept]:
        """At most `wanted` frames, from the first to the last seen; of one wanted frame, the middle one."""
        count = min(self._wanted, self._seen)
        places = np.linspace(0, self._seen - 1, count) if count > 1 else np.full(count, (self._seen - 1) / 2)
        indices = np.minimum(np.rint(places / self._stride).astype(int), len(self._kept) - 1)
        return [self._kept[index] for index in dict.fromkeys(indices.tolist())]


def source_frames(decoded: int, fps: float | None, params: ExtractParams) -> list[int]:
    """Numbers of the stored frames among the decoded ones: what `MediaReader` keeps of so many frames at that rate."""
    step = None if params.frames_per_second is None or fps is None else params.frames_per_second / fps
    reached = range(decoded) if step is None else [math.floor(index * step + 1e-9) for index in range(decoded)]
    kept = [index for index in range(decoded) if index == 0 or step is None or reached[index] > reached[index - 1]]
    if params.max_frames is None:
        return kept
    thinner: Thinner[int] = Thinner(params.max_frames)
    for index in kept:
        if thinner.wants_next():
            thinner.add(index)
        else:
            thinner.skip()
    return thinner.result()
