"""The candidates of `finetune.grid`: every combination of the listed values, each a checked recipe. No torch."""

from __future__ import annotations

import itertools
import math
from typing import Any

from pydantic import BaseModel

from pipeline.parameters import FinetuneParams
from pipeline.registry import did_you_mean

__all__ = ["candidates", "grid_lines", "replaced"]

FIXED = (
    "source", "initialisations", "seeds", "label_fraction", "selection", "selection_metric", "grid", "pooling", "eval_frames_per_video",
    "augmentation.resize", "augmentation.crop", "augmentation.margin", "augmentation.normalization",
)
"""Keys no grid may hold: they say what is asked, on which data, or how frames are prepared for every network alike."""
LIMIT = 256


def replaced(params: FinetuneParams, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `params` with the (known) dotted keys of `values` put in, not yet checked; the grid itself is left out."""
    result = params.model_dump(exclude={"grid"})
    for key, value in values.items():
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner[part]
        inner[last] = value
    return result


def _read(params: Any, key: str) -> Any:
    for part in key.split("."):
        params = getattr(params, part)
    return params.model_dump(mode="json") if isinstance(params, BaseModel) else params


def candidates(params: FinetuneParams) -> list[tuple[dict[str, Any], FinetuneParams]]:
    """(values of the grid's keys, recipe) of every combination, the last key changing fastest; without a grid `params` alone."""
    if not params.grid:
        return [({}, params)]
    found = []
    for chosen in itertools.product(*params.grid.values()):
        recipe = FinetuneParams.model_validate(replaced(params, dict(zip(params.grid, chosen, strict=True))))
        found.append(({key: _read(recipe, key) for key in params.grid}, recipe))
    return found


def grid_lines(params: FinetuneParams) -> list[str]:
    """What is wrong with the grid itself, one line each; whether its values are allowed is asked of the model (`config.py`)."""
    grid, lines = params.grid, []
    if grid and params.selection != "nested":
        lines.append(
            f"finetune.grid: {', '.join(grid)} to choose from, but finetune.selection is {params.selection}. Use selection: nested, which "
            f"chooses on inner folds, or an empty grid"
        )
    for key, values in grid.items():
        own: Any = params
        for part in key.split("."):
            known = list(type(own).model_fields) if isinstance(own, BaseModel) else []
            if part not in known:
                allowed = f"Allowed here: {', '.join(known)}" if known else "What stands before the last dot is no section"
                lines.append(f"finetune.grid.{key}: unknown key '{part}'.{did_you_mean(part, known)} {allowed}")
                break
            own = getattr(own, part)
        else:
            if isinstance(own, BaseModel):
                lines.append(f"finetune.grid.{key}: is a section; name single keys, such as {key}.{next(iter(type(own).model_fields))}")
            elif key in FIXED:
                lines.append(f"finetune.grid.{key}: cannot be chosen by a grid, because all candidates must answer the same question")
        if not values:
            lines.append(f"finetune.grid.{key}: got []; at least one value is needed")
        if any(value in values[:place] for place, value in enumerate(values)):
            lines.append(f"finetune.grid.{key}: got {values}; every value may stand there once")
    if (count := math.prod(len(values) for values in grid.values())) > LIMIT:
        lines.append(f"finetune.grid: {count} combinations; allowed: {LIMIT}. Every one is trained on every inner fold")
    return lines
