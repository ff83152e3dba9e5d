"""Part: what can be guessed without the picture's content, from facts of the file and from the scan area alone.

A random forest learns the classes from such facts on each fold's training videos and answers its test videos, as the
networks do. Where it comes near a network, the network's value proves nothing about the content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier

from pipeline.data.manifest import VideoRow
from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore
from pipeline.errors import DataError
from pipeline.evaluation.forest import draw_forest
from pipeline.evaluation.metrics import Scores, classification_metrics
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.predictions import probability_columns
from pipeline.evaluation.report import (
    METRIC_NAMES,
    Picture,
    Section,
    Table,
    init_name,
    interval_words,
    number,
    percent,
    plural,
    signed,
)
from pipeline.evaluation.statistics import paired_bootstrap, patient_intervals
from pipeline.evaluation.summary import average

__all__ = ["area_facts", "file_facts", "predict", "shortcuts_part"]

KEY = "shortcuts"
METRICS = tuple(METRIC_NAMES)
TREES, SMALLEST_LEAF = 200, 2
"""Of each forest; leaves of two videos keep a forest from learning single videos by heart."""
FRAMES_LOOKED_AT = 3
DARK = 10
"""Grey levels up to this count as outside of the scan area where extraction made no mask."""
BY_FRAME = "in a split by frame every tested video is also trained on, so these models would know each video by heart"
DIFFER = {"file": "in how the videos were recorded or stored", "area": "in place, shape or brightness of the scan area"}
NAMES = {"file": "facts of the file", "area": "scan area and brightness"}
MEANING = {
    "file": "kind and extension of the file, width, height, aspect, frames a second, number of frames, duration, colour or grey, source",
    "area": "share, box, centre and geometry of the scan area, mean brightness and tint within it",
}


def file_facts(rows: Sequence[VideoRow]) -> pd.DataFrame:
    """What is known of each video without looking at its pixels: float64 table by video id, NaN where unknown.

    The size of the stored file is no such fact: how well a JPEG compresses depends on what it shows.
    """
    numbers = pd.DataFrame(
        {
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "aspect": [row.width / row.height if row.height else np.nan for row in rows],
            "frames a second": [row.fps for row in rows],
            "number of frames": [row.frames_decoded for row in rows],
            "duration": [row.frames_decoded / row.fps if row.fps else np.nan for row in rows],
            "colour": [row.channels == 3 for row in rows],
        },
        index=[row.video for row in rows], dtype=np.float64,
    )
    words = {
        "kind": [row.kind for row in rows],
        "extension": [PurePosixPath(row.path.rpartition("#")[0] or row.path).suffix.lower() for row in rows],
        "rate from": [row.fps_source for row in rows],
        "source": [row.source for row in rows],
    }
    return pd.concat([numbers, *(_switches(name, values, numbers.index) for name, values in words.items())], axis=1)


def area_facts(store: FrameStore, rows: Sequence[VideoRow]) -> pd.DataFrame:
    """Place and shape of the scan area of each video, its mean brightness and tint: float64 table by video id.

    The area is the mask of extraction; without one, what is brighter than black in any of a few frames. Lengths are
    shares of the picture's sides.

    Raises:
        DataError: a frame or mask is damaged.
    """
    numbers = pd.DataFrame([_area(store, row) for row in rows], index=[row.video for row in rows], dtype=np.float64)
    return pd.concat([numbers, _switches("geometry", [row.mask for row in rows], numbers.index)], axis=1)


def _area(store: FrameStore, row: VideoRow) -> dict[str, float]:
    places = np.unique(np.linspace(0, row.frames - 1, FRAMES_LOOKED_AT).round().astype(int))
    frames = np.stack(store.frames(row.video, places.tolist())).astype(np.float64)
    grey = frames.mean(-1) if frames.ndim == 4 else frames
    mask = store.mask(row.video)
    area = mask if mask is not None else (grey > DARK).any(0)
    if not area.any():
        return {"share": 0.0, "brightness": float(grey.mean())}
    y, x = np.nonzero(area)
    height, width = area.shape
    found = {
        "share": area.mean(), "left": x.min() / width, "right": (x.max() + 1) / width, "top": y.min() / height,
        "bottom": (y.max() + 1) / height, "centre x": x.mean() / width, "centre y": y.mean() / height,
        "brightness": grey[:, area].mean(),
    }
    if frames.ndim == 4:
        red, green, blue = frames[:, area].mean((0, 1))
        found |= {"red tint": red - green, "blue tint": blue - green}
    return {name: float(value) for name, value in found.items()}


def _switches(name: str, values: Sequence[str], index: pd.Index) -> pd.DataFrame:
    """One column of 0 and 1 a value."""
    table = pd.get_dummies(pd.Series(list(values), index=index), dtype=np.float64)
    return table.rename(columns=lambda value: f"{name} {value}".strip())


def predict(facts: pd.DataFrame, splits: Splits, seed: int = 0) -> tuple[pd.DataFrame, dict[str, float]]:
    """Answers of a forest to the test videos of every fold, learned from the fold's training videos alone.

    A class without training videos gets probability 0; facts unknown for a video take the training median.

    Args:
        facts: numbers by video id, such as `file_facts` gives.

    Returns:
        A table with repeat, fold, video, patient, label and p_<class>, and how much each fact was used (sum 1; empty when none).
    """
    classes, tables = list(splits.classes), []
    used = pd.Series(0.0, index=facts.columns)
    for fold in splits.folds:
        train, test = facts.loc[list(fold.train)], facts.loc[list(fold.test)]
        middle = train.median().fillna(0.0)
        forest = RandomForestClassifier(
            TREES, min_samples_leaf=SMALLEST_LEAF, class_weight="balanced", random_state=seed, n_jobs=1,
        )
        forest.fit(train.fillna(middle).to_numpy(), [splits.labels[video] for video in fold.train])
        answers = pd.DataFrame(forest.predict_proba(test.fillna(middle).to_numpy()), columns=list(forest.classes_))
        table = answers.reindex(columns=classes, fill_value=0.0).set_axis(probability_columns(classes), axis=1)
        about = {
            "repeat": fold.repeat, "fold": fold.fold, "video": list(fold.test), "patient": [splits.groups[video] for video in fold.test],
            "label": [splits.labels[video] for video in fold.test],
        }
        tables.append(pd.concat([pd.DataFrame(about), table], axis=1))
        used = used + forest.feature_importances_
    total = float(used.sum())
    return pd.concat(tables, ignore_index=True), {name: value / total for name, value in used.items()} if total else {}


def _judge(context: Context, facts: pd.DataFrame) -> dict[str, Any]:
    """Metrics with intervals of the answers to these facts, and the first network's lead over them."""
    settings, splits = context.config.evaluate, context.splits
    facts = facts.loc[list(splits.labels)]
    facts = facts.loc[:, facts.nunique(dropna=False) > 1]
    if facts.empty:
        return {"reason": "all videos are alike in these facts, so there is nothing to guess from", "facts": []}
    table, used = predict(facts, splits, settings.seed)
    # Repeats one by one and averaged, as everywhere: ranking their videos together would be another AUROC.
    runs = [Scores.from_table(part, splits.classes) for _, part in table.groupby("repeat")]
    how = {"replicates": settings.bootstrap, "confidence": settings.confidence, "seed": settings.seed}
    values = average([classification_metrics(one) for one in runs])
    intervals = patient_intervals(runs, METRICS, confidence=settings.confidence)
    result: dict[str, Any] = {"facts": list(facts.columns), "patients": values["patients"], "videos": int(table["video"].nunique())}
    result["undefined"] = {}
    for name in METRICS:
        low, high, reason = intervals[name].low, intervals[name].high, intervals[name].reason
        result |= {name: values[name], f"{name}_low": low, f"{name}_high": high}
        if reason:
            result["undefined"][f"{name} interval"] = reason
    result["used_most"] = dict(sorted(used.items(), key=lambda item: -item[1])[:3])
    videos = context.tables["video"]
    own = videos[videos["init"] == context.inits[0]]
    network = list(Scores.by_run(own, splits.classes).values())
    lead = paired_bootstrap(network, runs, "balanced_accuracy", **how)
    result |= {"network_lead": lead.difference, "network_lead_low": lead.low, "network_lead_high": lead.high}
    # Where there is no interval, the value stands for it.
    low, high = (result["balanced_accuracy"] if end is None else end for end in (result["balanced_accuracy_low"], result["balanced_accuracy_high"]))
    result["reaches_network"] = bool(high >= context.metrics[context.inits[0]]["video"]["balanced_accuracy"])
    result["beats_guessing"] = bool(low > 1 / len(splits.classes))
    return result


def shortcuts_part(context: Context) -> Part:
    """Numbers, warnings and the section of the shortcut baselines."""
    facts: dict[str, pd.DataFrame] = {}
    reasons: dict[str, str] = {}
    if context.splits.by_frame:
        reasons = dict.fromkeys(NAMES, BY_FRAME)
    elif context.store is None:
        reasons = dict.fromkeys(NAMES, "the frame store is not there")
    else:
        rows = [row for row in context.store.manifest.rows if row.video in context.splits.labels]
        lacking = set(context.splits.labels) - {row.video for row in rows}
        if lacking:
            raise DataError(
                f"{context.store.folder}: {plural(len(lacking), 'video')} of the split not in the manifest, such as {min(lacking)}. "
                "Run `dvc repro split`."
            )
        facts["file"] = file_facts(rows)
        try:
            facts["area"] = area_facts(context.store, rows)
        except DataError as error:
            reasons["area"] = str(error)
    numbers = {name: _judge(context, facts[name]) if name in facts else {"reason": reasons[name], "facts": []} for name in NAMES}
    found = {name: one for name, one in numbers.items() if "balanced_accuracy" in one}
    warnings = [line for name, one in found.items() if one["reaches_network"] for line in [_warning(context, name, one)]]
    ends = ("", "_low", "_high")
    return Part(
        KEY,
        numbers,
        _section(context, numbers, found, warnings),
        compact={name: {f"balanced_accuracy{end}": one[f"balanced_accuracy{end}"] for end in ends} for name, one in found.items()},
        headline={f"{KEY}.{name}.balanced_accuracy": one["balanced_accuracy"] for name, one in found.items()},
        warnings=warnings,
        cautions=_cautions(context, {name: one for name, one in found.items() if one["reaches_network"]}),
    )


def _cautions(context: Context, reaching: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence of all models that come as far as the network; none where no model does."""
    if not reaching:
        return []
    network = number(context.metrics[context.inits[0]]["video"]["balanced_accuracy"])
    values = "; ".join(f"{NAMES[name]} {interval_words(one, 'balanced_accuracy', context.config.evaluate.confidence)}" for name, one in reaching.items())
    return [
        f"The value does not show that the picture's content is read: what sees none of it reaches the network's {network}, within its interval "
        f"({values})."
    ]


def _warning(context: Context, name: str, one: Mapping[str, Any]) -> str:
    """What it means that this model reaches the network."""
    confidence = context.config.evaluate.confidence
    network = number(context.metrics[context.inits[0]]["video"]["balanced_accuracy"])
    value = interval_words(one, "balanced_accuracy", confidence)
    if one["beats_guessing"]:
        mostly = ", ".join(one["used_most"])
        return (
            f"The {NAMES[name]} alone give a balanced accuracy of {value}; the network has {network}. The classes differ {DIFFER[name]} "
            f"(mostly: {mostly}), so the network's value does not prove that it reads the picture's content"
        )
    return (
        f"A model that sees only the {NAMES[name]} has a balanced accuracy of {value}, which is no more than guessing; its interval still "
        f"reaches the network's {network}, so with these few patients the network is not shown to read the picture's content"
    )


def _section(
    context: Context, numbers: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], warnings: Sequence[str]
) -> Section:
    title = "What could be guessed without the picture's content?"
    words = [
        "If patients of one class were recorded with another machine or stored in another way, a network can score well without reading "
        "the picture. Two models that see no content measure this: a random forest learns the classes from each fold's training videos, "
        "by " + "; by ".join(f"{NAMES[name]} ({MEANING[name]})" for name in NAMES) + ". They are judged on the same test videos as the network."
    ]
    words += [f"{NAMES[name].capitalize()}: no value, because {one['reason']}." for name, one in numbers.items() if "reason" in one]
    if found and not warnings:
        words.append("Neither reaches the network: what it knows does not come from these facts alone." if len(found) > 1 else "It does not reach the network.")
    if not found:
        return Section(KEY, title, words)
    pictures = [_picture(context, found)]
    return Section(
        KEY, title, words, pictures, [_table(context, found)], " ".join(f"{line}." for line in warnings), layout="solo",
        note="Other shortcuts remain possible: text within the scan area, machine settings that change the speckle, the order of a protocol.",
    )


def _table(context: Context, found: Mapping[str, Mapping[str, Any]]) -> Table:
    first = context.inits[0]
    shown = ("balanced_accuracy", "macro_auroc")
    columns = ["Model", *(METRIC_NAMES[name] for name in shown), "Network's lead", "Mostly by"]

    def cells(values: Mapping[str, Any]) -> list[str]:
        texts = []
        for name in shown:
            low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
            span = f" ({number(low)} to {number(high)})" if low is not None and high is not None else ""
            texts.append(number(values.get(name)) + span)
        return texts

    rows = [["Most frequent class", *cells(context.metrics["majority"]["video"]), "–", "–"]]
    for name, one in found.items():
        low, high = one["network_lead_low"], one["network_lead_high"]
        span = "" if low is None else f" ({signed(low)} to {signed(high)})"
        rows.append([NAMES[name].capitalize(), *cells(one), signed(one["network_lead"]) + span, ", ".join(one["used_most"]) or "–"])
    rows.append([f"Network ({init_name(context.metrics, first)})", *cells(context.metrics[first]["video"]), "–", "–"])
    patients = plural(context.metrics["patients"], context.unit)
    note = (
        f"Per video, {patients}, {percent(context.config.evaluate.confidence)} intervals over {context.unit}s. Network's lead: "
        "difference in balanced accuracy on the same videos."
    )
    return Table("Guessed without content", columns, rows, columns[1:4], note)


def _picture(context: Context, found: Mapping[str, Mapping[str, Any]]) -> Picture:
    first, name = context.inits[0], "balanced_accuracy"
    path = Path(context.output) / "pictures" / "shortcuts.png"
    rows = [("most frequent class", context.metrics["majority"]["video"], False)]
    rows += [(NAMES[key], one, False) for key, one in found.items()]
    rows.append((f"network ({init_name(context.metrics, first)})", context.metrics[first]["video"], True))
    lines = [
        {"name": text, "strong": strong, "value": values.get(name), "low": values.get(f"{name}_low"), "high": values.get(f"{name}_high")}
        for text, values, strong in rows
    ]
    draw_forest(
        path, lines, "Balanced accuracy per video", line=context.metrics[first]["video"][name], line_name="network",
        chance=context.metrics["chance"], stamp=context.metrics["stamp"],
    )
    spoken = "; ".join(f"{text} {number(values.get(name))}" for text, values, _ in rows)
    return Picture(
        path, f"Balanced accuracy of models that see no content, and of the network: {spoken}.",
        f"Dots: value; lines: {percent(context.config.evaluate.confidence)} intervals over {context.unit}s. The closer the upper dots come "
        "to the network, the less its value says about the content.",
    )
