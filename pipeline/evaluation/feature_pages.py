"""The report's section on features: what the encoders see before fine-tuning, as maps, neighbours, numbers and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore
from pipeline.evaluation.feature_plots import draw_map, draw_neighbors
from pipeline.evaluation.neighbors import FoldFeatures, feature_numbers, nearest, read_features, two_dimensions
from pipeline.evaluation.predictions import Item
from pipeline.evaluation.report import FeatureSection, Picture, Table, init_name, network_words, number, percent

__all__ = ["FeatureResults", "feature_results", "feature_section"]

MAX_MAPS, MAX_POINTS = 3, 600
"""Folds drawn, and videos a map: t-SNE of 600 takes two seconds on one core."""
QUERIES_A_CLASS, MAX_QUERIES = 2, 8


@dataclass(frozen=True)
class FeatureResults:
    """Features of every initialisation (fold by fold, under the first seed) and the numbers over them."""

    folds: Mapping[str, Sequence[FoldFeatures]]
    numbers: Mapping[str, Mapping[str, Any]]


def feature_results(
    items: Sequence[Item], splits: Splits, inits: Sequence[str], k: int, whole: Mapping[str, str] | None = None
) -> FeatureResults:
    """Read features.npz of the items; an initialisation counts when all its folds have one. `whole`: see `feature_numbers`.

    Nothing in a split by frame: without training videos that are not tested as well there are no neighbours to look at.

    Raises:
        DataError: see `neighbors.read_features`.
    """
    folds: dict[str, list[FoldFeatures]] = {}
    for init in [] if splits.by_frame else inits:
        own = [item for item in items if item.card.init == init]
        # The encoder is the same for every seed of fine-tuning.
        own = [item for item in own if item.card.seed == own[0].card.seed]
        found = [read_features(item.folder / "features.npz", splits.fold(item.card.fold), splits) for item in own]
        known = [one for one in found if one is not None]
        if known and len(known) == len(splits.folds):
            folds[init] = sorted(known, key=lambda one: one.fold)
    return FeatureResults(folds, {init: feature_numbers(found, splits, k, whole) for init, found in folds.items()})


def feature_section(
    results: FeatureResults, splits: Splits, store: FrameStore | None, folder: Path, metrics: Mapping[str, Any]
) -> FeatureSection | None:
    """Draw maps and neighbours of the first initialisation into `folder`; None where there are no features."""
    if not results.folds:
        return None
    init, folds = next(iter(results.folds.items()))
    numbers, stamp, encoder = results.numbers[init], metrics["stamp"], network_words(metrics, init, "encoder")
    unit = splits.unit
    rows = _neighbor_rows(folds, splits, store, numbers["neighbors"]) if store is not None else []
    if rows:
        draw_neighbors(folder / "neighbors.png", rows, f"Test frames and their nearest training frames, {encoder}", stamp)
    return FeatureSection(
        init=init, words=_sentence(numbers, encoder, unit) + _untrained(results.numbers, unit), warning=_warning(numbers, unit), rows=rows,
        maps=[_map(one, splits, folder, encoder, stamp) for one in folds[:MAX_MAPS]],
        tables=[_table(results, unit, metrics), _class_table(results, splits, metrics)],
    )


def _map(one: FoldFeatures, splits: Splits, folder: Path, encoder: str, stamp: str) -> Picture:
    kept = _thinned(one.is_test)
    videos = [one.videos[row] for row in kept]
    labels, groups = [splits.labels[video] for video in videos], [splits.groups[video] for video in videos]
    path = folder / f"map_fold{one.fold}.png"
    places = two_dimensions(one.by_video()[kept])
    draw_map(path, places, labels, groups, one.is_test[kept], f"Fold {one.fold}: videos under its {encoder}", stamp)
    tested = int(one.is_test[kept].sum())
    alt = (
        f"Map of {tested} test and {len(kept) - tested} training videos of fold {one.fold} by similarity, drawn twice: coloured by "
        f"label, and by patient with lines between the videos of a patient. The table below says the same in numbers."
    )
    return Picture(path, alt, "")


def _thinned(is_test: np.ndarray) -> np.ndarray:
    """Rows to draw: all test videos as far as there is room, and evenly spaced training videos beside them."""
    tested, others = np.flatnonzero(is_test), np.flatnonzero(~is_test)
    tested = tested[:: -(-len(tested) // MAX_POINTS)] if len(tested) else tested
    room = max(0, MAX_POINTS - len(tested))
    if len(others) > room:
        others = others[np.linspace(0, len(others) - 1, room).round().astype(int)]
    return np.sort(np.concatenate([tested, others]))


def _neighbor_rows(folds: Sequence[FoldFeatures], splits: Splits, store: FrameStore, k: int) -> list[dict[str, Any]]:
    """Some test frames of every class, chosen by place and not by outcome, with their nearest training frames."""
    rows = []
    each = max(1, min(QUERIES_A_CLASS, MAX_QUERIES // len(splits.classes)))
    for name in splits.classes[:MAX_QUERIES]:
        places = [
            (one, row) for one in folds for row, video in enumerate(one.videos) if one.is_test[row] and splits.labels[video] == name
        ]
        for place in np.unique(np.linspace(0, len(places) - 1, each + 2).round().astype(int)[1:-1]):
            rows.append(_one_row(*places[place], splits, store, k))
    return rows


def _one_row(one: FoldFeatures, video: int, splits: Splits, store: FrameStore, k: int) -> dict[str, Any]:
    own = np.flatnonzero(one.owner == video)
    query = own[len(own) // 2]
    gallery = np.flatnonzero(~one.is_test[one.owner])
    found, values = nearest(one.vectors[query : query + 1], one.vectors[gallery], one.owner[gallery], k)
    truth = splits.labels[one.videos[video]]

    def shown(row: int) -> dict[str, Any]:
        name, frame = one.videos[one.owner[row]], int(one.frame[row])
        return {
            "image": store.frame(name, frame), "label": splits.labels[name], "video": name, "frame": frame,
            "patient": splits.groups[name], "name": f"{name[:8]} · frame {frame}",
        }

    neighbors = [
        {**shown(gallery[row]), "similarity": float(value), "same_label": splits.labels[one.videos[one.owner[gallery[row]]]] == truth,
         "same_patient": False}
        for row, value in zip(found[0], values[0], strict=True) if row >= 0
    ]
    return {"query": {**shown(query), "fold": one.fold}, "neighbors": neighbors}


def _sentence(numbers: Mapping[str, Any], encoder: str, unit: str) -> str:
    """The numbers of the first initialisation in words."""
    parts = []
    if numbers["same_patient"] is not None:
        parts.append(
            f"the nearest other video of a test video is of the same {unit} in {percent(numbers['same_patient'])} of cases "
            f"({percent(numbers['same_patient_chance'])} by chance; {numbers['same_patient_videos']} videos whose {unit} has others)"
        )
    else:
        parts.append(f"no {unit} has two recordings, so it cannot be said whether {unit}s are recognised")
    if numbers["precision"] is not None:
        parts.append(
            f"of the {numbers['neighbors']} nearest training frames of a test frame, all of other {unit}s, "
            f"{percent(numbers['precision'])} show its class ({percent(numbers['precision_chance'])} by chance)"
        )
    return f"Under the {encoder} " + ", and ".join(parts) + "."


def _untrained(numbers: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """What pretraining changed, for the two questions of `_sentence`; nothing without an untrained network."""
    values = {init: (found["same_patient"], found["precision"]) for init, found in numbers.items()}
    if not {"pretrained", "random"} <= set(values) or None in values["pretrained"] + values["random"]:
        return ""
    return f" For the untrained network it is {percent(values['random'][0])} (same {unit}) and {percent(values['random'][1])} (same class)."


def _warning(numbers: Mapping[str, Any], unit: str) -> str:
    if not numbers["patients_dominate"]:
        return ""
    return (
        f"The encoder recognises {unit}s more surely than classes. A classifier on top of it can learn who is shown instead of what is shown. "
        f"The numbers of this report are not inflated by that, because no classifier was trained on a {unit} it is tested on; numbers of "
        f"a split by frame or by video would be. More {unit}s will help more than more videos of each."
    )


def _table(results: FeatureResults, unit: str, metrics: Mapping[str, Any]) -> Table:
    inits = list(results.numbers)
    first = results.numbers[inits[0]]
    k = first["neighbors"]
    lines = [
        (f"Nearest video is of the same {unit}", "same_patient"),
        (f"{k} nearest training frames show the same class (precision@{k})", "precision"),
        ("Silhouette by class", "silhouette_label"),
        (f"Silhouette by {unit}", "silhouette_patient"),
    ]
    rows = [
        [text, *(number(results.numbers[init][key]) for init in inits), number(first.get(f"{key}_chance", 0.0))] for text, key in lines
    ]
    columns = ["Test videos of all folds", *(init_name(metrics, init, capital=True) for init in inits), "Chance"]
    note = (
        f"Before fine-tuning; neighbours by cosine. Silhouette: 1 where groups lie tight and apart, 0 where they mix. High values by "
        f"{unit} and low ones by class are the warning sign; the untrained network shows how much of either is in the pictures themselves. "
        f"A dash: not defined, because no {unit} has two recordings or only one class or {unit} was tested."
    )
    return Table("Does the encoder see classes or identities?", columns, rows, columns[1:], note)


def _class_table(results: FeatureResults, splits: Splits, metrics: Mapping[str, Any]) -> Table:
    inits = list(results.numbers)
    classes = {init: results.numbers[init]["per_class"] for init in inits}
    rows = [
        [name, classes[inits[0]][name]["frames"], *(number(classes[init][name]["precision"]) for init in inits),
         number(classes[inits[0]][name]["precision_chance"])]
        for name in splits.classes
    ]
    columns = ["Class", "Test frames", *(init_name(metrics, init, capital=True) for init in inits), "Chance"]
    return Table(f"Precision@{results.numbers[inits[0]]['neighbors']} by class", columns, rows, columns[1:])
