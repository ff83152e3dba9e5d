"""How golden arrays are compared: relative to the largest entry of an array, or exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["Mismatch", "close", "exact", "tensor"]


class Mismatch(AssertionError):
    """An array that differs more than its tolerance allows."""


def close(name: str, got: Any, want: np.ndarray, dtype: Any = None, tolerance: float | None = None) -> None:
    """Largest difference relative to the largest entry, against `tolerance` or that of the stored type (1e-5 float32, 1e-9 else)."""
    got = np.asarray(got.detach().cpu() if isinstance(got, torch.Tensor) else got, dtype=np.float64)
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {got.shape}, expected {want.shape}")
    if not want.size:
        return
    if tolerance is None:
        tolerance = 1e-5 if (dtype or want.dtype) == np.float32 else 1e-9
    error = float(np.abs(got - want).max() / max(float(np.abs(want).max()), 1e-12))
    if not error <= tolerance:
        raise Mismatch(f"{name}: relative error {error:.2e} above {tolerance:.0e}")


def exact(name: str, got: Any, want: Any) -> None:
    """Equal shapes and values."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or not np.array_equal(got, want):
        raise Mismatch(f"{name}: differs, got {got.ravel()[:6]}, expected {want.ravel()[:6]}")


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
