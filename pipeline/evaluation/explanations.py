"""Where the networks looked, on some wrong and right cases, and how much of it lies outside the scan area.

A map is weak evidence, so the section measures two things beside showing pictures: the share of heat where there is no
ultrasound, and how much the maps resemble those of a network that has learned nothing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import spearmanr

from pipeline.data.store import FrameStore
from pipeline.data.transforms import evaluation_view, render, resize_frame
from pipeline.evaluation import content
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.predictions import Item
from pipeline.evaluation.report import Picture, Section, network_words, number, percent, plural, run_words
from pipeline.export.facts import LIBRARY_HEADS
from pipeline.files import atomic_write

__all__ = ["explanations_part", "scan_area"]

TITLE = "Where did the network look?"
MEASURED = 64
"""Videos whose maps are measured, one frame each, spread over all test videos: some seconds on two cores."""
RANDOM_NETWORKS = 3
DARK = 8
"""Grey levels at most where a picture holds nothing; JPEG leaves a few."""
WEAK = (
    "Such maps prove little. They are coarse, another method would draw others, and a sensible map does not show that the answer came "
    "about for a sensible reason. They are good for one thing: finding networks that look where there is nothing to see."
)
SIDE, GAP = 300, 4
"""Pixels of one picture of a pair, and between the two."""
GOOD, BAD, EDGE = (27, 110, 60), (166, 26, 26), (92, 196, 214)


@dataclass(frozen=True)
class _Case:
    """One frame of one test video, as its fold's network receives it, and what that network answered."""

    row: Mapping[str, Any]
    """Of `content.judged_videos`."""
    frame: int
    image: np.ndarray
    area: np.ndarray
    """bool [S, S]: the scan area."""
    heat: np.ndarray | None = None
    """float64 [g, g]."""

    @property
    def outside(self) -> float | None:
        """Share of the heat outside the scan area; None without heat or without an outside."""
        wide = cv2.resize(self.heat, self.area.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return float(wide[~self.area].sum() / wide.sum()) if wide.sum() > 0 and (~self.area).mean() > 0.01 else None


def explanations_part(context: Context) -> Part | None:
    """Maps of `evaluate.explanations` cases and the measurements; None when switched off, words where there is nothing to show."""
    if not context.config.evaluate.explanations:
        return None
    items, why = _usable(context)
    if why:
        return Part("explanations", {"reason": why}, Section("look", TITLE, [f"Not shown: {why}."], after="errors"))
    import torch  # noqa: F401  (a report of predictions alone does without)

    from pipeline.evaluation.saliency import load_network, random_network

    init = context.inits[0]
    videos = context.tables["video"]
    # One network's own answers: maps of one under the verdict of several would explain what it did not say.
    own = videos[(videos["init"] == init) & (videos["seed"] == _first_seed(context)) & (videos["repeat"] == videos["repeat"].min())]
    own = own[own["fold"] == own.groupby("video")["fold"].transform("min")]
    judged = content.judged_videos(own, context.splits.classes)
    frames = context.tables["frame"][context.tables["frame"]["init"] == init]
    shown = _shown(judged, frames, context)
    some = judged.sort_values(["fold", "video"]).iloc[np.unique(np.linspace(0, len(judged) - 1, MEASURED).round().astype(int))]
    wanted = {(row["fold"], row["video"]): row for row in [*shown, *some.to_dict("records")]}
    by_fold: dict[int, list[_Case]] = {}
    for (fold, _), row in wanted.items():
        by_fold.setdefault(fold, []).append(_prepare(row, frames, context.store, _card(items[fold])))
    cases: list[_Case] = []
    numbers = {name: place for place, name in enumerate(context.splits.classes)}
    for fold, own in by_fold.items():
        network = load_network(items[fold].folder, _card(items[fold]))
        maps = network.maps(_stack(own), [numbers[case.row["predicted"]] for case in own])
        cases += [replace(case, heat=heat) for case, heat in zip(own, maps, strict=True)]
    chance = []
    for seed in range(RANDOM_NETWORKS):
        empty = random_network(_card(items[cases[0].row["fold"]]), seed)
        chance.append(empty.maps(_stack(cases), [numbers[case.row["predicted"]] for case in cases]))
    found = _numbers(cases, chance, init) | {"kind": "attention" if network.stage == 0 else "gradient", "stage": network.stage, "cells": maps.shape[1]}
    keys = [(row["fold"], row["video"]) for row in shown]
    drawn = [next(case for case in cases if (case.row["fold"], case.row["video"]) == key) for key in keys]
    return Part("explanations", found, _section(context, drawn, found, _card(items[drawn[0].row["fold"]])))


def _card(item: Item) -> dict[str, Any]:
    return item.card.model_dump()


def _first_seed(context: Context) -> int:
    return next(item.card.seed for item in context.items if item.card.init == context.inits[0])


def _usable(context: Context) -> tuple[dict[int, Item], str]:
    """Item by fold (headline initialisation, first seed), and why nothing can be shown ("" when something can)."""
    init, seed = context.inits[0], _first_seed(context)
    items = {item.card.fold: item for item in context.items if (item.card.init, item.card.seed) == (init, seed)}
    if context.store is None:
        return items, "the frames are not there, only predictions"
    lacking = [item.name for item in items.values() if not (item.folder / "model.safetensors").is_file()]
    if lacking:
        return items, f"the weights of {plural(len(lacking), 'model')} are not there, only predictions ({lacking[0]})"
    for item in items.values():
        card = _card(item)
        missing = [key for key in ("backbone", "image_size", "head") if key not in card]
        if missing:
            return items, f"the card of {item.name} does not say its {' and '.join(missing)}"
        if card["head"] not in LIBRARY_HEADS:
            return items, f"the head {card['head']} reads four levels of features at once, and no single map stands for all of them"
    return items, ""


def _shown(judged: pd.DataFrame, frames: pd.DataFrame, context: Context) -> list[dict[str, Any]]:
    """Up to half the cases wrong, the most certain first; then right ones, the most certain of each class first."""
    count = context.config.evaluate.explanations
    ordered = judged.sort_values(["certainty", "video"], ascending=[False, True])
    wrong = ordered[~ordered["correct"]].head((count + 1) // 2)
    right = ordered[ordered["correct"]].copy()
    right["turn"] = right.groupby("label").cumcount()
    right = right.sort_values(["turn", "certainty", "video"], ascending=[True, False, True]).head(count - len(wrong))
    return [*wrong.to_dict("records"), *right.to_dict("records")]


def _prepare(row: Mapping[str, Any], frames: pd.DataFrame, store: FrameStore, card: Mapping[str, Any]) -> _Case:
    """The middle judged frame of a video, cut and resized as for prediction."""
    known = np.sort(frames.loc[(frames["video"] == row["video"]) & (frames["fold"] == row["fold"]), "frame"].unique())
    frame = int(known[len(known) // 2])
    rules, size = card.get("preprocessing") or {}, int(card["image_size"])

    def seen(picture: np.ndarray) -> np.ndarray:
        held = resize_frame(picture, rules.get("working_size", size), rules.get("resize", "short_side"))
        out = np.empty((size, size, *held.shape[2:]), np.uint8)
        render(held, evaluation_view(held.shape[:2], min(held.shape[:2])), size, out)
        return out

    area = scan_area(store, row["video"], known)
    return _Case(row, frame, seen(store.frame(row["video"], frame)), seen(np.where(area, 255, 0).astype(np.uint8)) > 127)


def scan_area(store: FrameStore, video: str, frames: Sequence[int]) -> np.ndarray:
    """bool [H, W]: the mask that extraction found, else what is not black from the border inwards in any of the frames."""
    mask = store.mask(video)
    if mask is not None:
        return mask
    pictures = store.frames(video, frames)
    brightest = np.maximum.reduce([picture.max(axis=2) if picture.ndim == 3 else picture for picture in pictures])
    # Dark vessels and cysts lie inside; only darkness that reaches the border is outside.
    padded = np.pad((brightest <= DARK).astype(np.uint8), 1, constant_values=1)
    _, parts = cv2.connectedComponents(padded, connectivity=4)
    return (parts != parts[0, 0])[1:-1, 1:-1]


def _stack(cases: Sequence[_Case]) -> np.ndarray:
    """Pictures as one array; grey ones become RGB where others are."""
    images = [case.image for case in cases]
    if len({image.ndim for image in images}) > 1:
        images = [cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image for image in images]
    return np.stack(images)


def _numbers(cases: Sequence[_Case], chance: Sequence[np.ndarray], init: str) -> dict[str, Any]:
    """Means over the measured videos; None where no map has heat, or no picture an outside."""
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    with_outside = [case for case in cases if case.outside is not None]
    alike: list[float] = []
    for maps in chance:
        for case, other in zip(cases, maps, strict=True):
            if np.ptp(case.heat) > 0 and np.ptp(other) > 0:
                alike.append(float(spearmanr(case.heat.ravel(), other.ravel()).statistic))
    return {
        "init": init, "videos": len(cases), "patients": len({case.row["patient"] for case in cases}),
        "without_heat": sum(bool(case.heat.sum() <= 0) for case in cases), "videos_with_outside": len(with_outside),
        "outside_area": mean([float((~case.area).mean()) for case in with_outside]),
        "outside_heat": mean([case.outside for case in with_outside]),
        "outside_heat_wrong": mean([case.outside for case in with_outside if not case.row["correct"]]),
        "outside_heat_right": mean([case.outside for case in with_outside if case.row["correct"]]),
        "random_correlation": mean(alike),
    }


def _draw(case: _Case) -> np.ndarray:
    """RGB [SIDE + 4, 2 SIDE + 4, 3]: the frame, and the frame under its map with the edge of the scan area; a bar says right or wrong."""
    def large(picture: np.ndarray, how: int = cv2.INTER_CUBIC) -> np.ndarray:
        return cv2.resize(picture, (SIDE, SIDE), interpolation=how)

    plain = large(case.image)
    plain = cv2.cvtColor(plain, cv2.COLOR_GRAY2RGB) if plain.ndim == 2 else plain
    heat = large(case.heat).clip(0)
    heat = heat / heat.max() if heat.max() > 0 else heat
    colours = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    strength = 0.75 * heat[..., None] ** 0.7
    mixed = (plain * (1 - strength) + colours * strength).round().astype(np.uint8)
    lines, _ = cv2.findContours(large(case.area.astype(np.uint8), cv2.INTER_NEAREST), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    mixed = cv2.drawContours(np.ascontiguousarray(mixed), lines, -1, EDGE, 1)
    pair = np.hstack([plain, np.full((SIDE, GAP, 3), 255, np.uint8), mixed])
    return np.vstack([np.full((GAP, pair.shape[1], 3), GOOD if case.row["correct"] else BAD, np.uint8), pair])


def _section(context: Context, cases: Sequence[_Case], found: Mapping[str, Any], card: Mapping[str, Any]) -> Section:
    folder, pictures = context.output / "pictures", []
    folder.mkdir(parents=True, exist_ok=True)
    for place, case in enumerate(cases, start=1):
        row, word = case.row, "right" if case.row["correct"] else "wrong"
        path = folder / f"look_{place:02d}_{word}.png"
        picture = io.BytesIO()
        # A palette of 256 colours: a third of the bytes, and no visible loss on grey with one scale of heat.
        Image.fromarray(_draw(case)).quantize(256, dither=Image.Dither.NONE).save(picture, "PNG", optimize=True)
        atomic_write(path, picture.getvalue())
        told = f"{word.capitalize()}: predicted {row['predicted']} ({number(row['certainty'])})" + ("" if row["correct"] else f", truth {row['label']}")
        outside = "" if case.outside is None else f" Heat outside the scan area: {percent(case.outside)}."
        said = f"{told}. Fold {row['fold']}, {context.unit} {row['patient']}, video {row['video']}, frame {case.frame}."
        alt = f"Frame {case.frame} of video {row['video']}, class {row['label']}, judged {word}ly as {row['predicted']}, and the same frame under its heat map."
        pictures.append(Picture(path, alt + outside, said + outside))
    return Section(
        "look", TITLE, _words(found, card, context.unit, _networks(context, found["init"])), pictures,
        warning=_warning(found), after="errors", layout="pair",
        note="Left the frame as the network received it, right the same frame with its map, bright where the heat is; the line is the edge of the "
        "scan area. Chosen by certainty: the most certain errors, then the most certain right answers of each class.",
    )


def _networks(context: Context, init: str) -> str:
    words = network_words(context.metrics, init)
    return f"{words} (of {run_words(context.metrics)} the first)" if run_words(context.metrics) else words


def _words(found: Mapping[str, Any], card: Mapping[str, Any], unit: str, network: str) -> list[str]:
    cells = f"{found['cells']} × {found['cells']} cells"
    if found["kind"] == "attention":
        rule = f"Attention rollout: how much each patch ({cells}) reaches the class token through all blocks. It is the same for every class: what was " \
            "looked at, not what for."
    else:
        rule = f"Grad-CAM: which cells ({cells}, stage {found['stage']} of 4) raise the score of the class that was answered." + (
            "" if found["stage"] == 4 else " The last stage has too few cells at this image size, so an earlier one is read, cell by cell (HiResCAM)."
        )
    if card.get("pooling") == "attention":
        rule += " The network joins the frames of a video by learnt weights; these maps are of single frames."
    lines = [
        f"{rule} Every frame was explained by the {network} of its own fold"
        + ("." if "-level split" in (card.get("stamp") or "") else f", which had never seen that {unit}."),
        WEAK,
    ]
    measured = f"{plural(found['videos'], 'test video')} of {plural(found['patients'], unit)}, one frame each"
    if found["outside_heat"] is None:
        lines.append(f"Measured on {measured}: no frame has black surroundings, so no heat can lie there.")
    else:
        sides = ", ".join(
            f"{percent(found[f'outside_heat_{word}'])} where the answer was {word}" for word in ("right", "wrong") if found[f"outside_heat_{word}"] is not None
        )
        lines.append(
            f"Measured on {measured}: {percent(found['outside_heat'])} of the heat lies outside the scan area ({sides}); the outside is "
            f"{percent(found['outside_area'])} of the picture, which is what a map without any preference would put there."
        )
    if found["random_correlation"] is not None:
        lines.append(
            f"Check against maps that show the picture only: their rank correlation with the maps of {RANDOM_NETWORKS} networks of random weights is "
            f"{number(found['random_correlation'])} (1: the same map whatever was learned; near 0: what was learned decides)."
        )
    return lines


def _warning(found: Mapping[str, Any]) -> str:
    heat, area = found["outside_heat"], found["outside_area"]
    if heat is None or heat < area:
        return ""
    return (
        "The networks put at least as much heat outside the scan area as a map without any preference would. They may be reading the "
        "border, the shape of the mask or what is left of text, not the tissue: see what the baselines of file facts and scan area reach."
    )
