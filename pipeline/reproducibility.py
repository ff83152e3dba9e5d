"""Seeds, states of the random generators, and what the results were computed with."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from pipeline.distributed import all_gather_rows, rank

__all__ = ["collect_rng_states", "configure_torch", "restore_rng_state", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. Sampling does not use these: it has generators of its own per video."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def configure_torch(threads: int) -> None:
    """CPU threads of this process; on GPUs the fastest kernels, which are not bit-reproducible between runs (CPUs are)."""
    torch.set_num_threads(max(1, threads))
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def collect_rng_states(device: torch.device) -> dict[str, Any]:
    """torch's generator states of all processes, as byte tensors on the CPU: {"cpu": [W, n], "cuda": [W, m]}.

    Every process must call it; every process gets all states, and rank 0 saves them.
    """
    def gathered(state: torch.Tensor) -> torch.Tensor:
        return all_gather_rows(state[None].to(device)).cpu()

    states = {"cpu": gathered(torch.get_rng_state())}
    if device.type == "cuda":
        states["cuda"] = gathered(torch.cuda.get_rng_state(device))
    return states


def restore_rng_state(states: dict[str, Any], device: torch.device) -> bool:
    """Set this process's generators from `collect_rng_states`; False when the number of processes differs."""
    if rank() >= len(states["cpu"]):
        return False
    # Cloned: torch reads a generator's state from the beginning of the storage, whatever row of it is given.
    torch.set_rng_state(states["cpu"][rank()].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][rank()].clone(), device)
    return True
