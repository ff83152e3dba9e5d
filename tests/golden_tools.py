"""How golden arrays are compared (relative to the largest entry of an array, or exactly), and weights and images made by formula."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Mismatch", "close", "exact", "formula_image", "formula_weight", "released_cases", "tensor"]


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


def _wave(offset: int) -> np.ndarray:
    """2 q_m / 10006 - 1 with q_m = (7 m^2 + 13 m + offset) mod 10007: it repeats after 10007 values."""
    m = np.arange(10007, dtype=np.int64)
    return 2 * ((7 * m * m + 13 * m + offset) % 10007) / 10006 - 1


def _repeated(once: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The values, again and again, in row-major order."""
    return torch.from_numpy(np.resize(once.astype(str(dtype).removeprefix("torch.")), tuple(shape)))


def formula_weight(key: str, shape: Sequence[int], salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The weight, bias or statistic that stands for the tensor `key` of a published network (README of its goldens)."""
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    wave = _wave(zlib.crc32(key.encode()) % 10007 + 1000 * salt)
    if kind == "weight" and len(shape) != 1:
        fan_in = np.prod(shape, dtype=np.int64) / shape[0]
        return _repeated(np.sqrt(6 / fan_in) * wave, shape, dtype)
    scale, shift = {"running_var": (0.2, 1.0), "running_mean": (0.1, 0.0), "bias": (0.05, 0.0), "weight": (0.1, 1.0)}[kind]
    return _repeated(shift + scale * wave, shape, dtype)


def formula_image(number: int, shape: Sequence[int], salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Image `number` (0-based) of shape [C, H, W]."""
    return _repeated(_wave(100 * (number + 1) + 1000 * salt), shape, dtype)


def _unknown() -> None:
    raise Mismatch("no check for this kind of file")


def released_cases(
    folder: Path, index: Any, checks: Mapping[str, Callable[..., None]], facts: Mapping[str, Callable[..., None]]
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(file, case, check) of the format that USCL's and HiCo's arrays share: `.npz` cases by `id`, and JSON files of facts.

    `checks` by the beginning of a file's name, the longest deciding; `facts` by the name of a JSON file.
    """
    for file_name, content in sorted(index["files"].items()):
        matching = [name for name in checks if file_name.startswith(name)]
        with np.load(folder / file_name, allow_pickle=False) as arrays:
            for entry in content["cases"]:
                case = {name: arrays[array["key"]] for name, array in entry["arrays"].items()}
                run = partial(checks[max(matching, key=len)], case, entry["settings"]) if matching else _unknown
                yield file_name, entry["id"], run
    for path in sorted(folder.glob("*.json")):
        if path.name != "index.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            yield path.name, "all", partial(facts[path.stem], content) if path.stem in facts else _unknown
