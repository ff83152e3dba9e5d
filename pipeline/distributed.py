"""One process or many: start and stop from torchrun's environment or plain Python, gathers, stop signals.

The same calls work at world size 1 without a process group, so no caller asks whether training is distributed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import PipelineError

__all__ = [
    "StopFlag", "all_gather_rows", "barrier", "gather_with_gradient", "highest", "is_main", "local_rank", "pick_device", "process_group",
    "rank", "reduce_mean", "world_size",
]


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def pick_device(wanted: str) -> torch.device:
    """`auto`: this process's GPU if there is one, else the CPU. Asking for a GPU that is not there is an error."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PipelineError("launch.device: cuda was asked for, but torch sees no GPU. `sonoscope doctor` says why; allowed: auto, cpu.")
    device = torch.device("cuda", local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def is_main() -> bool:
    """True in the one process that writes files and talks to MLflow."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device, timeout_minutes: float = 30.0) -> Iterator[None]:
    """Join the group torchrun describes (nccl on GPUs, gloo on CPUs) and leave it at the end; nothing to do alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, timeout=timedelta(minutes=timeout_minutes), device_id=device if backend == "nccl" else None
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def all_gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, without gradient. [B, ...] -> [W * B, ...]; B is equal on all ranks."""
    if world_size() == 1:
        return x.detach()
    mine = x.detach().contiguous()
    # Not empty_like(x): that would keep a channels-last layout, which the gather would fill in the wrong order.
    parts = [torch.empty(mine.shape, dtype=mine.dtype, device=mine.device) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is the sum over processes of what each computed for these rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # the incoming buffer may have other readers
        dist.all_reduce(grad)
        rows = len(grad) // world_size()
        return grad[rank() * rows : (rank() + 1) * rows]


def gather_with_gradient(x: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, with gradient. [B, D] -> [W * B, D].

    With gradients averaged over processes afterwards, loss and gradient equal those of one process on the whole batch.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over processes, without gradient."""
    if world_size() == 1:
        return value.detach()
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def highest(value: int, device: torch.device) -> int:
    """The largest of one small number over processes, so that all save or stop at the same step."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


class StopFlag:
    """Remembers SIGTERM, SIGINT and SIGUSR1 (what schedulers send before they kill) until the loop can save and leave."""

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.raised: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.raised = signal.Signals(number)

    def __enter__(self) -> StopFlag:
        for number in self.signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
