"""What all benchmarks share: interleaved timing, tables in Markdown, a header that names the machine, sample data.

Cases run A B C, A B C, so that a busy spell of the machine hits all of them. Ratios are taken pass by pass and then
summarised, which cancels slow drifts; the rates of two separate runs of a benchmark should not be compared.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import __version__ as pillow_version

from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.store import FrameStore, write_video
from pipeline.data.synthetic import PhantomClip, draw_patients
from pipeline.parameters import PhantomParams

__all__ = ["Taken", "compare", "make_store", "print_header", "print_load", "print_table", "ratio"]


@dataclass
class Taken:
    """The passes of one case: items handled, wall seconds and CPU seconds (all threads of this process) of each."""

    items: list[int] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Items per second of wall time."""
        return [n / t for n, t in zip(self.items, self.wall, strict=True)]

    @property
    def cpu_ms(self) -> list[float]:
        """Milliseconds of CPU time per item."""
        return [1000 * t / n for n, t in zip(self.items, self.cpu, strict=True)]

    @property
    def wall_ms(self) -> list[float]:
        """Milliseconds of wall time per item."""
        return [1000 * t / n for n, t in zip(self.items, self.wall, strict=True)]


def compare(cases: Mapping[str, Callable[[], int]], repeats: int, warmup: int = 1) -> dict[str, Taken]:
    """Run every case `warmup` times unmeasured, then `repeats` times in turn. A case returns how many items it handled.

    Work queued on a GPU belongs to the case that queued it: the device is synchronised before and after each pass.
    """
    taken = {name: Taken() for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            _synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            items = case()
            _synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warmup:
                taken[name].items.append(items)
                taken[name].wall.append(wall)
                taken[name].cpu.append(cpu)
    return taken


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of slow / fast, pass by pass."""
    values = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(values), min(values), max(values)


def print_table(title: str, taken: Mapping[str, Taken], unit: str, baseline: str | None = None) -> None:
    """One Markdown table: rates, CPU ms per item, and how many times cheaper than `baseline` each case is."""
    print(f"\n### {title}\n")
    last = f" CPU of '{baseline}' / CPU of this |" if baseline else ""
    print(f"| case | {unit}/s, median | range | CPU ms each, median | range |{last}")
    print("|---|---:|---|---:|---|" + ("---:|" if baseline else ""))
    for name, case in taken.items():
        rates, cpu = case.rates, case.cpu_ms
        row = f"| {name} | {statistics.median(rates):.4g} | {min(rates):.4g} to {max(rates):.4g} "
        row += f"| {statistics.median(cpu):.4g} | {min(cpu):.4g} to {max(cpu):.4g} |"
        if baseline:
            middle, low, high = ratio(taken[baseline].cpu_ms, cpu)
            row += f" {middle:.2f} ({low:.2f} to {high:.2f}) |"
        print(row, flush=True)


def print_header(threads: int, device: torch.device) -> None:
    """Versions, machine, threads and load average: without them no number below means anything."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "none used"
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"OpenCV {cv2.__version__}, NumPy {np.__version__}, Pillow {pillow_version}"
    )
    spin = os.environ.get("OMP_WAIT_POLICY", "default")
    print(f"CPU: {_processor()}, {os.cpu_count()} cores; torch threads {threads} (wait policy {spin}); GPU: {where}")
    print_load("at the start")


def print_load(when: str) -> None:
    """The load averages of 1, 5 and 15 minutes, where the system has them."""
    if hasattr(os, "getloadavg"):
        print(f"load average {when}: " + ", ".join(f"{value:.2f}" for value in os.getloadavg()), flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def make_store(folder: Path, *, videos: int, frames: int, size: int, color: bool) -> FrameStore:
    """A frame store of phantom clips, `size` x `size` pixels, JPEG quality 95: the same pixels on every machine."""
    rows = []
    patients = draw_patients(PhantomParams(patients=max(6, videos)))[:videos]
    for number, (label, look) in enumerate(patients):
        clip = PhantomClip(replace(look, aspect=1.0), label, size, frames, 12.0, [0, number])
        pictures = [cv2.merge([p, p, cv2.convertScaleAbs(p, alpha=0.9)]) if color else p for p in clip]
        jpegs = [cv2.imencode(".jpg", p, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for p in pictures]
        video = f"{number + 1:016x}"
        write_video(folder, video, jpegs)
        rows.append(VideoRow(
            video=video, source="main", path=f"{video}.avi", sha256=f"{number + 1:064x}", patient="", label=label,
            kind="video", frames=frames, frames_decoded=frames, frames_claimed=frames, fps=12.0, fps_source="container",
            width=size, height=size, stored_width=size, stored_height=size, channels=3 if color else 1,
            bytes=(folder / f"{video}.tar").stat().st_size,
        ))
    Manifest(rows).write(folder / "manifest.csv")
    return FrameStore(folder)
