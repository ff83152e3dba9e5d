"""Benchmarks of the training loop: the loader alone, the wait for data in real steps, the UCL step against others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Taken, compare, make_store, print_table, ratio
from reference_step import ReferenceStep

from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.loader import ClipLoader, SamplingPlan
from pipeline.data.transforms import working_size
from pipeline.methods.base import ClipBatch, MethodContext, Progress
from pipeline.methods.ucl import UCL, UCLParams
from pipeline.models.backbones import build_backbone
from pipeline.parameters import OptimizerParams
from pipeline.training.optim import build_optimizer

VIDEOS, BATCH = 32, 8
IMAGES = BATCH * (1 + 1 + UCLParams().num_negatives)
"""Images that go through an encoder in one step of ours."""
OPTIMIZER = OptimizerParams(name="sgd", lr=0.003)
PHASES = {"cross_only": 0, "full": UCLParams().cross_only_epochs}
"""An epoch of each phase of the published schedule."""


class OurStep:
    """One UCL optimiser step as the pretraining loop does it."""

    def __init__(self, backbone: str, device: torch.device, *, bfloat16: bool = False) -> None:
        trunk, features = build_backbone(backbone)
        self.method = UCL(trunk, UCLParams(), MethodContext(features, 60, VIDEOS // BATCH, BATCH))
        self.method.networks.to(device, memory_format=torch.channels_last).train()
        self.method.bank.to(device)
        self.method.autocast = bfloat16
        self.optimizer = build_optimizer(OPTIMIZER, self.method.networks)

    def __call__(self, batch: ClipBatch, epoch: int) -> None:
        progress = Progress(epoch, epoch * (VIDEOS // BATCH))
        self.method.before_step(progress)
        self.optimizer.zero_grad(set_to_none=True)
        self.method.step(batch, progress).loss.backward()
        self.optimizer.step()


class BareStep:
    """The same images through the same network, gradients only where the loss needs them, and nothing else."""

    def __init__(self, backbone: str, device: torch.device) -> None:
        self.trunk = build_backbone(backbone)[0].to(device, memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(OPTIMIZER, self.trunk)

    def __call__(self, batch: ClipBatch, epoch: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(epoch == PHASES["full"]):
            negatives = self.trunk(batch.frames["negatives"].flatten(0, 1)).mean()
        loss = self.trunk(batch.frames["anchor"].flatten(0, 1)).mean()
        with torch.no_grad():
            self.trunk(batch.frames["positive"].flatten(0, 1))
        (loss + negatives).backward()
        self.optimizer.step()


def make_loader(folder: Path, size: int, threads: int, quick: bool) -> ClipLoader:
    """UCL's own sampling (random crops, nothing else) from 32 phantom videos held in memory."""
    frames, side = (12, size) if quick else (24, max(256, size))
    store = make_store(folder / f"loader{size}", videos=VIDEOS, frames=frames, size=side, color=False)
    params = UCLParams()
    frames = FrameCache(gather_videos([store]), working_size(params.augmentation, size), threads=threads)
    plan = SamplingPlan(UCL, params, params.augmentation, size, 60, BATCH)
    return ClipLoader(frames, np.full(VIDEOS, -1), plan, threads=threads)


def random_batch(size: int, device: torch.device) -> ClipBatch:
    """One batch with all roles any of the steps reads, already on the device."""
    roles = {"anchor": 1, "second": 1, "positive": 1, "negatives": UCLParams().num_negatives}
    frames = {role: torch.randn(BATCH, count, 3, size, size, device=device) for role, count in roles.items()}
    return ClipBatch(frames, torch.arange(BATCH, device=device), torch.full((BATCH,), -1, device=device))


def without_second(batch: ClipBatch) -> ClipBatch:
    """The roles of our default step."""
    return ClipBatch({role: x for role, x in batch.frames.items() if role != "second"}, batch.video, batch.label)


def _has_bfloat16(device: torch.device) -> bool:
    """Where the pretraining loop computes in bfloat16 by itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def loading(
    folder: Path, repeats: int, quick: bool, device: torch.device, backbone: str, size: int, threads: int
) -> None:
    """The loader alone, then whole epochs of training against the same steps on one batch that is there already."""
    loader = make_loader(folder, size, threads, quick)
    epochs = 4 if quick else 20

    def alone() -> int:
        return sum(len(batch.video) for epoch in range(epochs) for batch in loader.epoch(epoch, device))

    # On a busy machine torch's threads spin at their barriers for longer than the little work between takes.
    torch.set_num_threads(1)
    taken = compare({"ClipLoader": alone}, repeats)
    torch.set_num_threads(threads)
    title = f"Loader alone, UCL sampling (5 views a sample), {VIDEOS} videos in memory, {size} px"
    print_table(f"{title}, {threads} rendering threads, 1 of torch", taken, "samples")

    bfloat16 = _has_bfloat16(device)
    step, resident = OurStep(backbone, device, bfloat16=bfloat16), without_second(random_batch(size, device))
    rounds = (1 if quick else 2) if device.type == "cpu" else 25
    shares: list[tuple[float, float]] = []

    def loop() -> int:
        start, waited, fetching = time.perf_counter(), loader.waited, 0.0
        for _ in range(rounds):
            batches = loader.epoch(PHASES["full"], device)
            while True:
                before = time.perf_counter()
                batch = next(batches, None)
                fetching += time.perf_counter() - before
                if batch is None:
                    break
                step(batch, PHASES["full"])
        total = time.perf_counter() - start
        shares.append(((loader.waited - waited) / total, fetching / total))
        return rounds * loader.steps_per_epoch * IMAGES

    def no_loading() -> int:
        for _ in range(rounds * loader.steps_per_epoch):
            step(resident, PHASES["full"])
        return rounds * loader.steps_per_epoch * IMAGES

    names = ("batch already on the device", "training loop with loader")
    taken = compare(dict(zip(names, (no_loading, loop), strict=True)), repeats)
    precision = "bfloat16" if bfloat16 else "float32"
    title = f"Training with the full loss, {backbone}, {size} px, {BATCH} videos a step, {precision}"
    print_table(title, taken, "images")
    kept = ratio(taken[names[1]].rates, taken[names[0]].rates)
    print(f"\nthroughput kept: {kept[0]:.1%} ({kept[1]:.1%} to {kept[2]:.1%})")
    for label, column in (("waiting for rendered views", 0), ("whole hand-over, normalisation included", 1)):
        values = [share[column] for share in shares[1:]]
        print(f"share of the loop, {label}: {statistics.median(values):.2%} ({min(values):.2%} to {max(values):.2%})")


def ucl_steps(repeats: int, device: torch.device, backbone: str, size: int) -> None:
    """Our step, the reference-like one and the bare network on the same batch, for both phases of the loss."""
    torch.manual_seed(0)
    batch = random_batch(size, device)
    ours, bare = OurStep(backbone, device), BareStep(backbone, device)
    reference = ReferenceStep(backbone, device, batch=BATCH, negatives=UCLParams().num_negatives)
    mine = without_second(batch)
    halved = OurStep(backbone, device, bfloat16=True) if _has_bfloat16(device) else None

    def once(function: Callable[..., Any], *arguments: Any) -> Callable[[], int]:
        def case() -> int:
            for _ in range(1 if device.type == "cpu" else 10):
                function(*arguments)
            return 1 if device.type == "cpu" else 10

        return case

    cases: dict[str, Callable[[], int]] = {}
    for phase, epoch in PHASES.items():
        cases[f"reference-like, {phase}"] = once(reference, batch.frames, phase == "cross_only")
        cases[f"sonoscope, {phase}"] = once(ours, mine, epoch)
        cases[f"bare network, {phase}"] = once(bare, mine, epoch)
        if halved:
            cases[f"sonoscope in bfloat16, {phase}"] = once(halved, mine, epoch)
    _print_steps(f"UCL step, {backbone}, {size} px, {BATCH} videos, 3 negatives", compare(cases, repeats))


def _print_steps(title: str, taken: dict[str, Taken]) -> None:
    print(f"\n### {title}\n\n| case | s a step, median | range | CPU s, median | range |\n|---|---:|---|---:|---|")
    for name, case in taken.items():
        wall, cpu = [t / 1000 for t in case.wall_ms], [t / 1000 for t in case.cpu_ms]
        print(
            f"| {name} | {statistics.median(wall):.3f} | {min(wall):.3f} to {max(wall):.3f} "
            f"| {statistics.median(cpu):.3f} | {min(cpu):.3f} to {max(cpu):.3f} |"
        )
    print("\n| ratio, pass by pass | wall, median | range | CPU, median | range |\n|---|---:|---|---:|---|")
    for phase in PHASES:
        for slow, fast in (("reference-like", "sonoscope"), ("sonoscope", "bare network")):
            a, b = taken[f"{slow}, {phase}"], taken[f"{fast}, {phase}"]
            wall, cpu = ratio(a.wall, b.wall), ratio(a.cpu, b.cpu)
            print(
                f"| {slow} / {fast}, {phase} | {wall[0]:.2f} | {wall[1]:.2f} to {wall[2]:.2f} "
                f"| {cpu[0]:.2f} | {cpu[1]:.2f} to {cpu[2]:.2f} |", flush=True,
            )
