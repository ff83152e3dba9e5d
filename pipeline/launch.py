"""How a training stage starts its processes: in this one, or torchrun on this machine.

A stage calls `launch` with its own file; under torchrun (by hand, Slurm, or this module) `WORLD_SIZE` is set and the stage
runs as one of the workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from pipeline.errors import ConfigError, PipelineError, StoppedError
from pipeline.parameters import LaunchParams

__all__ = ["is_worker", "launch", "process_count", "threads_per_process", "worker_rank"]


def is_worker() -> bool:
    """True in a process that torchrun has started."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def worker_rank() -> int:
    """Number of this process as torchrun has set it, 0 without torchrun; needs no process group and no torch."""
    return int(os.environ.get("RANK", "0"))


def process_count(params: LaunchParams) -> int:
    """Processes to start on this machine: the given number, or one per GPU (one without a GPU)."""
    if params.processes != "auto":
        if params.processes < 1:
            raise ConfigError(f"launch.processes: got {params.processes}; allowed: auto, or a number from 1 up")
        return params.processes
    if params.device == "cpu":
        return 1
    import torch  # here, because stages that find a finished result never need it

    return max(1, torch.cuda.device_count())


def threads_per_process(params: LaunchParams, processes: int | None = None) -> int:
    """CPU threads of a process: the given number, or the cores shared among the processes of this machine.

    `processes` is how many there will be; None asks torchrun's environment how many there are.
    """
    if params.threads != "auto":
        return max(1, params.threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def launch(script: Path, arguments: list[str], processes: int, threads: int) -> None:
    """Run `script` under torchrun with `processes` workers and wait; signals are passed on so that workers can save.

    Raises:
        StoppedError: it was asked to stop by a signal. PipelineError: a worker failed; its own message stands above.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=0",
        str(script), *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHELASTIC_ERROR_FILE": os.devnull}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    child = subprocess.Popen(command, env=environment)

    stopped: list[str] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stopped.append(signal.Signals(number).name)
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = child.wait()
    except KeyboardInterrupt:
        # The terminal has sent SIGINT to the workers as well: they save and leave.
        stopped.append("SIGINT")
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and stopped:
        raise StoppedError(
            f"{script.name}: stopped by {stopped[0]}; each worker says above whether it has saved its state. Start the same command "
            f"again to continue."
        )
    if code:
        raise PipelineError(f"{script.name}: {processes} processes were started and at least one failed (exit status {code}); see above.")
