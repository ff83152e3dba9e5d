"""Nested selection: every candidate recipe on every inner fold of a training part, and the choice of recipe and epoch.

The outer test patients play no part here: they are not even among the data. What is chosen is then trained once more, on the
whole training part (`finetune_stage.py`). Method: Varma & Simon, BMC Bioinformatics 7:91 (2006).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.data.splits import InnerFold
from pipeline.errors import DataError
from pipeline.grid import candidates
from pipeline.parameters import FinetuneParams
from pipeline.training.finetune import Diverged, FinetuneData, Finetuning, Predictions

__all__ = ["Choice", "choose", "inner_data"]

Build = Callable[[FinetuneData, FinetuneParams], Finetuning]


@dataclass(frozen=True)
class Choice:
    """The recipe and epoch with the best mean score over inner folds."""

    params: FinetuneParams
    values: dict[str, Any]
    """The chosen value of every key of the grid."""
    epoch: int
    score: float
    """Mean of finetune.selection_metric over the inner folds. It is the best of many and no estimate of performance."""
    table: list[dict[str, Any]]
    """Every candidate in the grid's order: values, its best epoch, score there, and the scores of the inner folds there; all three None
    for one whose numbers did not stay finite."""
    predictions: Predictions
    """Of the chosen candidate at the chosen epoch: frames of every inner validation video, by networks that never saw its patient."""
    curve: list[dict[str, float]]
    """Validation metrics of the chosen candidate by epoch, means over the inner folds."""


def inner_data(data: FinetuneData, inner: Sequence[InnerFold]) -> list[FinetuneData]:
    """The inner folds of `data.train`, without any test video; those that label_fraction leaves without patients on a side are left out.

    Raises:
        DataError: fewer than two are left, or a video would be validated twice.
    """
    index = {data.frames.videos[video].video: video for video in data.train}
    parts, seen = [], set()
    for fold in inner:
        held = {index[name] for name in fold.validation if name in index}
        if held & seen:
            raise DataError(
                "finetune.selection: nested predicts every training video in one inner fold, but the validation parts of split.file's inner "
                "folds overlap. Give parts that are apart, leave `inner` out of the file, or use selection: inner."
            )
        seen |= held
        rest = [video for video in data.train if video not in held and data.frames.videos[video].video in set(fold.train)]
        if held and rest:
            parts.append(replace(data, train=rest, validation=sorted(held), test=[]))
    if len(parts) < 2:
        raise DataError(
            f"finetune.selection: nested needs at least two inner folds with training and validation patients; there are {len(parts)}. Use "
            f"selection: inner or last, a larger finetune.label_fraction, fewer split.folds, or more patients a class."
        )
    return parts


def _run(build: Build, data: FinetuneData, params: FinetuneParams, title: str) -> tuple[list[dict[str, float]], list[Predictions]]:
    """Validation metrics and predictions of every epoch of one candidate on one inner fold."""
    run = build(data, params)
    scores, predictions = [], []
    for epoch in tqdm(range(params.epochs), desc=title, unit="epoch", disable=None, mininterval=1.0):
        run.rows.append(run.learn(epoch))
        predictions.append(run.predict("validation"))
        scores.append(run.judge(predictions[-1]))
    return scores, predictions


def _joined(parts: Sequence[Predictions]) -> Predictions:
    weights = None if parts[0].weights is None else np.concatenate([part.weights for part in parts if part.weights is not None])
    return Predictions([item for part in parts for item in part.items], np.concatenate([part.probabilities for part in parts]), weights)


def choose(build: Build, parts: Sequence[FinetuneData], params: FinetuneParams, title: str) -> Choice:
    """Train every candidate of `params.grid` on every inner fold and choose candidate and epoch.

    The score of an epoch is the plain mean of `params.selection_metric` over the inner folds, each over the classes that its
    validation patients have. Of equal scores (to 9 digits) the fewest epochs win, then the candidate listed first.

    Args:
        build: makes a fresh, seeded network with its training for some data and a recipe.
        parts: from `inner_data`.

    Raises:
        Diverged: no candidate stayed finite.
    """
    recipes = candidates(params)
    sign = -1.0 if params.selection_metric == "loss" else 1.0
    table: list[dict[str, Any]] = [{} for _ in recipes]
    best: tuple[float, int, int] | None = None
    chosen: Choice | None = None
    failure = Diverged("finetune.grid: no candidate")
    # Candidates with the same frozen layers one after another: what these compute is kept until others come.
    alike = sorted(range(len(recipes)), key=lambda place: (recipes[place][1].trainable, repr(recipes[place][1].augmentation)))
    for place in alike:
        values, recipe = recipes[place]
        name = f"{title}, candidate {place + 1} of {len(recipes)}"
        table[place] = {"values": values, "epoch": None, "score": None, "inner": None}
        try:
            runs = [_run(build, data, recipe, f"{name}, inner fold {number}") for number, data in enumerate(parts)]
        except Diverged as error:
            failure = error
            continue
        scores = np.array([[row[params.selection_metric] for row in rows] for rows, _ in runs])
        means = np.round(sign * scores.mean(0), 9)
        epoch = int(means.argmax())
        score = float(scores[:, epoch].mean())
        table[place] |= {"epoch": epoch, "score": score, "inner": scores[:, epoch].tolist()}
        rank = (-float(means[epoch]), epoch, place)
        if best is None or rank < best:
            curve = [
                {f"validation_{key}": float(np.mean([rows[e][key] for rows, _ in runs])) for key in runs[0][0][e]} for e in range(recipe.epochs)
            ]
            best = rank
            chosen = Choice(recipe, values, epoch, score, table, _joined([predictions[epoch] for _, predictions in runs]), curve)
    if chosen is None:
        raise failure
    return chosen
