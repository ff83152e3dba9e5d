"""What the report shows besides numbers: cases with frames, tables of classes, folds, patients, data; learning curves.

Reads the store, the split and `curves.csv` files; draws nothing and decides nothing about metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.splits import Fold, Splits
from pipeline.data.store import FrameStore
from pipeline.evaluation.predictions import probability_columns
from pipeline.evaluation.report import METRIC_NAMES, Table, init_name, number, p_words, signed

__all__ = [
    "CURVE_NAMES",
    "choose_cases",
    "chosen_words",
    "class_tables",
    "comparison_table",
    "curve_columns",
    "data_tables",
    "fold_tables",
    "judged_videos",
    "patient_table",
    "phase_tables",
    "read_curves",
    "training_table",
]

MAX_WRONG, FRAMES_SHOWN, MAX_PATIENTS, MAX_PANELS = 12, 3, 300, 6
PREFERRED = ("loss", "knn", "std", "rank", "balanced_accuracy", "macro_f1", "accuracy", "alignment", "uniformity")
"""Curves worth a panel first; everything else that varies follows."""
CURVE_NAMES = {
    "loss": "Loss",
    "knn_balanced_accuracy": "Neighbours' vote, balanced accuracy",
    "embedding_std": "Embedding spread (std)",
    "effective_rank": "Effective rank",
    "accuracy": "Accuracy of the pretext task",
    "train_loss": "Training loss",
    "validation_loss": "Validation loss",
    "validation_balanced_accuracy": "Validation balanced accuracy",
    "validation_macro_f1": "Validation macro F1",
    "validation_accuracy": "Validation accuracy",
}
TECHNICAL = (
    "chance_loss",
    "lr",
    "learning_rate",
    "seconds",
    "per_second",
    "throughput",
    "momentum",
    "eta",
    "memory",
    "wait",
    "epoch",
    "step",
)


def judged_videos(videos: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """One row a video of one initialisation: columns video, patient, label, and those of `_joined`."""
    return _joined(videos, ["video", "patient", "label"], classes)


def _joined(table: pd.DataFrame, keys: list[str], classes: Sequence[str]) -> pd.DataFrame:
    """One row a unit: the answer that most of its networks gave (one a seed and repeat; in a split by frame one a fold that
    tests some of its frames), not that of their mean, which is a network that nobody trained.

    Columns: `keys` (label among them), fold (of the first repeat), p_<class> (means), predicted (of equally many answers the more probable one),
    certainty (mean probability of the predicted class), networks, right (how many of them were), correct.
    """
    columns = probability_columns(classes)
    answers = np.eye(len(classes))[table[columns].to_numpy().argmax(axis=1)]
    votes = [f"votes {name}" for name in columns]
    table = pd.concat([table[[*keys, "fold", *columns]], pd.DataFrame(answers, table.index, votes)], axis=1)
    joined = table.groupby(keys, as_index=False).agg({"fold": "min", **dict.fromkeys(columns, "mean"), **dict.fromkeys(votes, "sum")})
    counts, values, rows = joined[votes].to_numpy(), joined[columns].to_numpy(), np.arange(len(joined))
    chosen = (counts + values / 2).argmax(axis=1)
    joined["predicted"] = [classes[index] for index in chosen]
    joined["certainty"] = values[rows, chosen]
    joined["networks"] = counts.sum(axis=1).astype(int)
    joined["right"] = counts[rows, [classes.index(name) for name in joined["label"]]].astype(int)
    joined["correct"] = joined["predicted"] == joined["label"]
    return joined.drop(columns=votes)


def choose_cases(
    judged: pd.DataFrame, frames: pd.DataFrame, classes: Sequence[str], store: FrameStore | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Videos for the gallery: the most certain errors, and of each class the most and the least certain right answer.

    Args:
        judged: result of `judged_videos`.
        frames: frame rows of the same initialisation (columns video, frame).
        store: where the pictures come from; None gives cases without pictures.

    Returns:
        Wrong and right cases: images (uint8 arrays), frames, video, patient, fold, truth, predicted, probabilities
        [(class, p)], probability, correct, networks, networks_right.
    """
    wrong = judged[~judged["correct"]].sort_values(["certainty", "video"], ascending=[False, True]).head(MAX_WRONG)
    right: list[pd.Series] = []
    for name in classes:
        part = judged[judged["correct"] & (judged["label"] == name)].sort_values(
            ["certainty", "video"], ascending=[False, True]
        )
        right += [part.iloc[index] for index in ([0, len(part) - 1] if len(part) > 1 else range(len(part)))]

    def case(row: pd.Series) -> dict[str, Any]:
        known = np.sort(frames.loc[frames["video"] == row["video"], "frame"].unique())
        shown = [
            int(known[index]) for index in np.unique(np.linspace(0, len(known) - 1, FRAMES_SHOWN).round().astype(int))
        ]
        return {
            "images": store.frames(row["video"], shown) if store is not None else [],
            "frames": shown,
            "video": row["video"],
            "patient": row["patient"],
            "fold": int(row["fold"]),
            "truth": row["label"],
            "predicted": row["predicted"],
            "probability": float(row["certainty"]),
            "correct": bool(row["correct"]),
            "networks": int(row["networks"]),
            "networks_right": int(row["right"]),
            "probabilities": [(name, float(row[f"p_{name}"])) for name in classes],
        }

    return [case(row) for _, row in wrong.iterrows()], [case(row) for row in right]


def comparison_table(metrics: Mapping[str, Any], inits: Sequence[str], unit: str) -> list[Table]:
    """One table a level: every initialisation, the majority class, and the paired difference."""
    tables = []
    for level in ("video", "patient", "frame"):
        rows = []
        for key, name in METRIC_NAMES.items():
            row: list[Any] = [name]
            for init in inits:
                values = metrics[init][level]
                row.append(_with_interval(values, key))
            row.append(number(metrics["majority"][level].get(key)))
            difference = metrics.get("difference", {}).get(level)
            if difference and key in difference:
                ends = f" ({signed(difference[key + '_low'])} to {signed(difference[key + '_high'])})"
                row.append(signed(difference[key]) + (ends if difference[key + "_low"] is not None else ""))
                row.append(p_words(difference[key + "_p"]).removeprefix("p = ").removeprefix("p "))
            elif difference:
                row += ["–", "–"]
            rows.append(row)
        columns = ["Metric", *(init_name(metrics, init, capital=True) for init in inits), "Majority class"]
        if metrics.get("difference", {}).get(level):
            columns += [f"{init_name(metrics, 'pretrained', capital=True)} − random", "p"]
        tables.append(
            Table(f"Per {unit if level == 'patient' else level}", columns, rows, columns[1:], _stamp_note(metrics))
        )
    if "difference" in metrics:
        note = (
            f"p: two-sided permutation test, exchanging the two networks' answers {unit} by {unit}. The question was "
            f"balanced accuracy per video; the other p values are not corrected for their number. Intervals come from drawing {unit}s anew: where "
            "few differ, one way may find a difference and the other not, and only what both find counts as shown."
        )
        tables[-1] = replace(tables[-1], note=" ".join(filter(None, (tables[-1].note, note))))
    return tables


def _with_interval(values: Mapping[str, Any], key: str) -> str:
    """`0.71 (0.60 to 0.81)`, or the bare value where there is no interval."""
    if values[f"{key}_low"] is None:
        return number(values[key])
    return f"{number(values[key])} ({number(values[f'{key}_low'])} to {number(values[f'{key}_high'])})"


def _stamp_note(metrics: Mapping[str, Any]) -> str:
    return f"All values: {metrics['stamp']}." if metrics["stamp"] else ""


def class_tables(metrics: Mapping[str, Any], inits: Sequence[str], classes: Sequence[str]) -> list[Table]:
    """Recall, precision, F1 and AUROC of every class per video, one table an initialisation."""
    columns = ["Class", "Videos", "Recall", "Precision", "F1", "AUROC"]
    tables = []
    for init in inits:
        values = metrics[init]["video"]
        rows = [
            [
                name,
                f"{part['support']:g}",
                number(part["recall"]),
                number(part["precision"]),
                number(part["f1"]),
                number(part["auroc"]),
            ]
            for name, part in ((name, values["per_class"][name]) for name in classes)
        ]
        reasons = "; ".join(sorted(set(values["undefined"].values())))
        note = " ".join(
            text for text in (f"Undefined: {reasons}." if reasons else "", _stamp_note(metrics[init])) if text
        )
        tables.append(Table(f"Per class and video, {init_name(metrics, init)}", columns, rows, columns[1:], note))
    return tables


def phase_tables(metrics: Mapping[str, Any], inits: Sequence[str], classes: Sequence[str]) -> list[Table]:
    """Whole videos with a label a frame: macro F1 under every convention and each phase; [] where videos have one label."""
    found = metrics.get("phases")
    if not found:
        return []
    first = found[inits[0]]
    rows: list[list[Any]] = [
        [f"{name}, mean over videos", *(number(found[init][key]) for init in inits)]
        for key, name in (
            ("f1", "Macro F1"), ("f1_sd", "SD of macro F1"), ("accuracy", "Accuracy"), ("precision", "Precision"), ("recall", "Recall"),
        )
    ]
    rows += [
        [f"Macro F1 over {words}", *(number(found[init]["f1_by_convention"][key]) for init in inits)]
        for key, words in (("union", "phases in labels or predictions"), ("gt", "phases in the labels"), ("all", "all phases"))
    ]
    rows += [
        [f"{name}, frames pooled", *(number(found[init]["pooled"][key]) for init in inits)]
        for key, name in (("macro_f1", "Macro F1"), ("weighted_f1", "Weighted F1"), ("accuracy", "Accuracy"))
    ]
    columns = ["Metric", *(init_name(metrics, init, capital=True) for init in inits)]
    judged = f"{first['frames']:g} of {first['frames_stored']:g} stored frames"
    note = f"{first['videos']:g} whole videos; phases counted: {first['convention']}; {judged}."
    if first["frames"] < first["frames_stored"]:
        note += " Raise finetune.eval_frames_per_video to judge all."
    phases = [
        [name, f"{first['per_phase'][name]['videos']:g}", *(number(found[init]["per_phase"][name]["f1"]) for init in inits)] for name in classes
    ]
    return [
        Table("Phases of whole videos", columns, rows, columns[1:], " ".join(filter(None, (note, _stamp_note(metrics))))),
        Table("F1 of each phase, mean over the videos that show it", ["Phase", "Videos", *columns[1:]], phases, ["Videos", *columns[1:]], ""),
    ]


def fold_tables(metrics: Mapping[str, Any], inits: Sequence[str], splits: Splits, unit: str) -> list[Table]:
    """Balanced accuracy of every fold with its interval, and, of several, mean and standard deviation."""
    columns = ["Fold", f"{unit.capitalize()}s", "Videos", *(init_name(metrics, init, capital=True) for init in inits)]
    rows: list[list[Any]] = []
    for fold in splits.folds:
        groups = {splits.groups[video] for video in fold.test}
        row: list[Any] = [_fold_name(splits, fold), len(groups), len(fold.test)]
        for init in inits:
            values = metrics[init]["folds"][str(fold.fold)]
            row.append(_with_interval(values, "balanced_accuracy"))
        rows.append(row)
    if len(splits.folds) > 1:
        means = [metrics[init]["fold_mean"] for init in inits]
        spread = [f"{number(one['balanced_accuracy'])} ± {number(one['balanced_accuracy_sd'])}" for one in means]
        rows.append([f"mean ± SD of {'all ' if splits.repeats > 1 else ''}folds", "", "", *spread])
    for word, count in (("seed", metrics["seeds"]), ("repeat", metrics["repeats"])):
        if count > 1:
            found = [number(metrics[init]["video"][f"balanced_accuracy_{word}_sd"]) for init in inits]
            rows.append([f"SD over {word}s, pooled", "", "", *found])
    absent = [
        f"fold {fold.fold} has no test video of {', '.join(missing)}"
        for fold in splits.folds
        if (missing := [name for name in splits.classes if name not in {splits.labels[video] for video in fold.test}])
    ]
    note = "; ".join(absent)
    note = f"{note[0].upper()}{note[1:]}: its value is the mean over the other classes." if note else ""
    return [
        Table(
            "Balanced accuracy per video",
            columns,
            rows,
            columns[1:],
            " ".join(filter(None, (note, _stamp_note(metrics)))),
        )
    ]


def _fold_name(splits: Splits, fold: Fold) -> str:
    return f"fold {fold.fold}" + (f", repeat {fold.repeat}" if splits.repeats > 1 else "")


def patient_table(patients: pd.DataFrame, judged: pd.DataFrame, classes: Sequence[str], unit: str) -> Table:
    """Every (patient, label): how many of its videos were right, and the joint judgement; errors first."""
    counts = judged.assign(share=judged["right"] / judged["networks"]).groupby(["patient", "label"])["share"].agg(["sum", "count"])
    joined = _joined(patients, ["patient", "label"], classes).sort_values(["correct", "certainty", "patient"], ascending=[True, False, True])
    several = bool((joined["networks"] > 1).any())
    rows = []
    for row in joined.head(MAX_PATIENTS).to_dict("records"):
        right, total = counts.loc[(row["patient"], row["label"])]
        rows.append(
            [
                row["patient"],
                row["fold"],
                row["label"],
                row["predicted"],
                number(row["certainty"]),
                f"{round(right, 1):g} of {int(total)}",
                f"right in {row['right']} of {row['networks']}" if several else "right" if row["correct"] else "wrong",
            ]
        )
    note = f"The first {MAX_PATIENTS} of {len(joined)} are shown." if len(joined) > MAX_PATIENTS else ""
    if several:
        words = "Predicted: by most of the networks that judged, with the mean of their probabilities; videos right: mean number"
        note = f"{words}{'; the fold is that of the first repeat' if patients['repeat'].nunique() > 1 else ''}. {note}".strip()
    names = [unit.capitalize(), "Fold", "Truth", "Predicted", "Probability", "Videos right", "Judged"]
    return Table(f"Every {unit}, errors first", names, rows, ["Fold", "Probability", "Videos right"], note)


def _label_budget(items: Sequence[Any]) -> dict[int, str]:
    """Patients whose labels fine-tuning read, by fold: `5`, or `4–5` over seeds; {} where all labels were used."""
    if all((item.card.model_extra or {}).get("label_fraction", 1.0) >= 1 for item in items):
        return {}
    counts: dict[int, set[int]] = {}
    for item in items:
        counts.setdefault(item.card.fold, set()).add(len({*item.card.train_groups, *item.card.validation_groups}))
    return {fold: "–".join(map(str, sorted({min(found), max(found)}))) for fold, found in counts.items()}


def data_tables(splits: Splits, store: FrameStore | None, unit: str, items: Sequence[Any] = ()) -> list[Table]:
    """What was in the store, who is tested where, and with `finetune.label_fraction` how many patients' labels the models used."""
    tables = []
    rows = []
    stored = {row.video: row.frames for row in store.manifest.rows} if store is not None else {}
    for name in splits.classes:
        videos = [video for video, label in splits.labels.items() if label == name]
        groups = {splits.groups[video] for video in videos}
        rows.append([name, len(groups), len(videos), sum(stored.get(video, 0) for video in videos) or "–"])
    more, why = _unlabelled_rows(splits, stored, items)
    names = ["Class", f"{unit.capitalize()}s", "Videos", "Stored frames"]
    tables.append(Table("Videos", names, rows + more, names[1:], f"{why} {_store_note(store)}".strip()))
    columns = [
        "Fold",
        f"Test {unit}s",
        "Test videos",
        *(f"{name}" for name in splits.classes),
        f"Training {unit}s",
        "Training videos",
    ]
    budget = _label_budget(items)
    columns += [f"{unit.capitalize()}s whose labels were used"] if budget else []
    rows = []
    for fold in splits.folds:
        counts = Counter(splits.labels[video] for video in fold.test)
        rows.append(
            [
                _fold_name(splits, fold),
                len({splits.groups[video] for video in fold.test}),
                len(fold.test),
                *(counts[name] for name in splits.classes),
                len({splits.groups[video] for video in fold.train}),
                len(fold.train),
                *([budget[fold.fold]] if budget else []),
            ]
        )
    sides = f"{splits.stamp[0].upper()}{splits.stamp[1:]}." if splits.stamp else f"No {unit} is on both sides of a fold."
    made = f"{splits.words}, manifest {splits.manifest_digest[:12]}, split seed {splits.seed}."
    tables.append(Table("Split: who is tested where", columns, rows, columns[1:], f"{sides} {made}"))
    return tables


def _unlabelled_rows(splits: Splits, stored: Mapping[str, int], items: Sequence[Any]) -> tuple[list[list[Any]], str]:
    """Rows of the videos without a label: those that serve pretraining and those that may not, and why. `stored`: frames by video.

    Only known patients are counted; the group of a video without one is the video, and stands for nobody.
    """
    closed = set() if splits.by_frame or any(item.card.pretrain_scope == "all" for item in items) else set(splits.unlabelled_blocked)
    parts = {
        "without label (pretraining only)": [video for video in splits.unlabelled if video not in closed],
        "without label or patient (left out of pretraining)": [video for video in splits.unlabelled if video in closed],
    }
    rows = []
    for name, videos in parts.items():
        groups = {splits.groups.get(video, "") for video in videos}
        known = len(groups if splits.group == "video" else {group for group in groups if group.startswith("P")})
        if videos:
            rows.append([name, known or "–", len(videos), sum(stored.get(video, 0) for video in videos) or "–"])
    why = "A video of unknown patient might show a test patient, so no fold's encoder sees it (pretrain.scope: fold)." if closed else ""
    return rows, why


def _store_note(store: FrameStore | None) -> str:
    if store is None:
        return ""
    rows = store.manifest.rows
    warned = sum(bool(row.warnings) for row in rows)
    bad = store.folder / "quarantine.csv"
    refused = max(0, len(bad.read_text(encoding="utf-8").splitlines()) - 1) if bad.is_file() else 0
    sizes = Counter((row.stored_width, row.stored_height) for row in rows).most_common(1)[0][0]
    rates = sorted({round(row.fps, 2) for row in rows if row.fps})
    parts = [f"Most frames are stored at {sizes[0]} × {sizes[1]} pixels"]
    if rates:
        parts.append(
            f"{rates[0]:g} frames per second" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g} frames per second"
        )
    parts.append(f"{warned} videos with a warning, {refused} unreadable files left out")
    return ", ".join(parts) + "."


def read_curves(path: Path) -> pd.DataFrame | None:
    """A `curves.csv` with its axis as column `x` (and its name in `attrs["x"]`); None when there is nothing to draw.

    Learning curves are decoration of a result, so a missing or foreign file never stops the evaluation.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError):
        return None
    axis = next((name for name in ("epoch", "step") if name in table.columns), None)
    table.insert(0, "x", table[axis] if axis else np.arange(len(table)))
    numbers = (
        table.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan).dropna(axis="columns", how="all")
    )
    if "x" not in numbers.columns or numbers.shape[1] < 2:
        return None
    numbers = numbers.dropna(subset=["x"])
    numbers.attrs["x"] = axis or "row"
    return numbers


def curve_columns(curves: Mapping[str, pd.DataFrame]) -> list[str]:
    """Up to six columns worth drawing, losses, neighbours and collapse monitors first; constants and timings never."""
    found: dict[str, None] = {}
    for table in curves.values():
        for name in table.columns:
            technical = any(
                name == word or name.endswith(f"_{word}") or name.endswith(f"/{word}") for word in TECHNICAL
            )
            if name != "x" and not technical and table[name].nunique() > 1:
                found.setdefault(str(name))

    def rank(name: str) -> tuple[int, int]:
        places = [index for index, word in enumerate(PREFERRED) if word in name]
        return (min(places) if places else len(PREFERRED), list(found).index(name))

    return sorted(found, key=rank)[:MAX_PANELS]


def chosen_words(values: Mapping[str, Any]) -> str:
    """`optimizer.lr 0.01, trainable linear`; a dash where nothing was chosen."""
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "–"


def training_table(items: Sequence[Any], unit: str) -> Table:
    """How every fine-tuned model came about: chosen epoch, selection rule, pretraining scope, duration."""
    rows = []
    nested = any((item.card.model_extra or {}).get("nested") for item in items)
    for item in items:
        card = item.card
        extra = card.model_extra or {}
        chosen = (extra.get("nested") or {}).get("values") or {}
        rows.append(
            [
                item.name,
                card.method or "–",
                extra.get("pretrain_init") or "–",
                card.pretrain_scope,
                len(card.train_groups),
                card.selection,
                "–" if card.selected_epoch is None else card.selected_epoch,
                number(extra.get("seconds"), 0),
                *([chosen_words(chosen)] if nested else []),
            ]
        )
    trained = f"Training {unit}s"
    columns = ["Model", "Method", "Starting weights", "Pretraining scope", trained, "Epoch chosen by", "Epoch", "Seconds"]
    columns += ["Recipe chosen"] if nested else []
    return Table("Fine-tuned models", columns, rows, [trained, "Epoch", "Seconds"])
