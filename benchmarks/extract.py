"""How fast extraction is against a plain OpenCV loop (read in colour, INTER_AREA, imwrite), with equal process counts.

    python benchmarks/extract.py FOLDER [--workers 2] [--repeats 3] [--limit 0] [--short-side 256] [--masks]

Both sides start anew for every repeat, alternate, decode every frame of every video of FOLDER and write to a temporary
folder. Prints frames per second, CPU milliseconds per frame (all processes, start included) and the ratios. A machine
with other work on it distorts the wall times; the CPU times hold better.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2

from pipeline.cli import run_stage
from pipeline.data.extract import Task, extract_one
from pipeline.data.video import Media, find_media
from pipeline.parameters import ExtractParams, MaskParams


def _plain(job: tuple[Media, ExtractParams, Path]) -> int:
    """What everyone writes first; returns the number of frames."""
    media, params, folder = job
    target = folder / media.path.replace("/", "_")
    target.mkdir()
    capture, count = cv2.VideoCapture(os.path.abspath(media.location)), 0
    while True:
        ok, frame = capture.read()
        if not ok:
            return count
        scale = params.short_side / min(frame.shape[:2])
        if scale < 1:
            frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(target / f"{count:05d}.jpg"), frame, [cv2.IMWRITE_JPEG_QUALITY, params.jpeg_quality])
        count += 1


def _ours(job: tuple[Media, ExtractParams, Path]) -> int:
    media, params, folder = job
    return extract_one(Task(media, params, None, folder)).facts.frames


def _masked(job: tuple[Media, ExtractParams, Path]) -> int:
    media, params, folder = job
    return _ours((media, params.model_copy(update={"mask": MaskParams(mode="sector")}), folder))


def _one_thread() -> None:
    cv2.setNumThreads(1)


def _measure(
    function: Callable[..., int], jobs: list[tuple[Media, ExtractParams]], workers: int
) -> tuple[int, float, float]:
    """Frames, wall seconds and CPU seconds of the worker processes."""
    with tempfile.TemporaryDirectory() as name:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        pool = multiprocessing.get_context("spawn").Pool(workers, initializer=_one_thread)
        frames = sum(pool.imap_unordered(function, [(*job, Path(name)) for job in jobs]))
        wall = time.perf_counter() - started
        pool.close()
        pool.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return frames, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="Extraction against a plain OpenCV loop.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=0, help="only this many videos, evenly chosen; 0 for all")
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--masks", action="store_true", help="a third case: with extract.mask.mode sector")
    options = parser.parse_args()
    media = [item for item in find_media(options.folder).media if item.kind == "video"]
    media = media[:: max(1, len(media) // options.limit)][: options.limit] if options.limit else media
    jobs = [(item, ExtractParams(short_side=options.short_side)) for item in media]
    cases = {"plain": _plain, "sonoscope": _ours} | ({"masked": _masked} if options.masks else {})
    taken: dict[str, list[tuple[int, float, float]]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, function in cases.items():
            taken[name].append(_measure(function, jobs, options.workers))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{len(media)} videos, {options.workers} processes of 1 thread, {options.repeats} repeats, load {load}")
    print(f"{'case':<10} {'frames':>7} {'frames/s (median, min to max)':>34} {'CPU ms/frame':>13}")
    for name, runs in taken.items():
        rates = sorted(frames / wall for frames, wall, _ in runs)
        cpu = statistics.median(1000 * seconds / frames for frames, _, seconds in runs)
        shown = f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"
        print(f"{name:<10} {runs[0][0]:>7} {shown:>34} {cpu:>13.3f}")
    for name in list(cases)[1:]:
        pairs = list(zip(taken["plain"], taken[name], strict=True))
        wall = statistics.median(plain[1] / ours[1] for plain, ours in pairs)
        cpu = statistics.median(plain[2] / ours[2] for plain, ours in pairs)
        same = all(plain[0] == ours[0] for plain, ours in pairs)
        print(f"ratio plain / {name}: wall {wall:.2f}x, CPU {cpu:.2f}x; frames {'equal' if same else 'DIFFER'}")


if __name__ == "__main__":
    sys.exit(run_stage(main))
