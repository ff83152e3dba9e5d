"""The split stage: near-duplicates, folds, splits.json, and the tables and picture by which a person judges them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.duplicates import NearDuplicate, find_near_duplicates, read_prints
from pipeline.data.manifest import Manifest, read_hints
from pipeline.data.splits import Splits
from pipeline.data.splitting import NO_PATIENT, make_splits
from pipeline.data.store import FrameStore
from pipeline.errors import loud
from pipeline.files import atomic_write, write_json

__all__ = ["balance_rows", "describe_folds", "describe_warnings", "run_split", "split_metrics", "write_balance_plot"]

BALANCE_COLUMNS = ("fold", "repeat", "part", "class", "patients", "videos", "frames")
# Okabe & Ito: told apart by readers with any colour vision, and in grey print by their lightness.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
DARK_COLORS = (0, 7)
SMALLEST_LABELLED = 0.05
"""Part of the tallest bar below which a number would not fit into its piece."""


def run_split(config: Config, stores: Path, output: Path, reports: Path) -> tuple[Splits, dict[str, Any]]:
    """Split the main source of a project and write everything about it.

    Args:
        config: all parameters.
        stores: folder of the frame stores, `<stores>/<source>/manifest.csv`.
        output: splits.json.
        reports: gets metrics.json, balance.csv, balance.png and near_duplicates.csv.

    Returns:
        The splits and the content of metrics.json.

    Raises:
        DataError, LeakageError: see `make_splits`; DataError also for a missing or damaged store.
    """
    manifests: dict[str, Manifest] = {}
    prints = {}
    for source in ("main", *config.data.extra_sources):
        store = FrameStore(stores / source)
        manifests[source] = store.manifest
        prints |= {video: found for video, found in read_prints(store).items() if video not in prints}
        store.close()
    pairs = find_near_duplicates(prints)
    main = manifests.pop("main")
    splits = make_splits(main, config, [(pair.first, pair.second) for pair in pairs], manifests, read_hints(stores / "main"))
    rows = balance_rows(splits, {row.video: row.frames for row in main.rows})
    metrics = split_metrics(splits, rows, len(pairs))
    splits.write(output)
    write_json(reports / "metrics.json", metrics)
    _write_csv(reports / "balance.csv", BALANCE_COLUMNS, rows)
    _write_csv(
        reports / "near_duplicates.csv",
        ("first", "second", "group", "hash_distance", "similarity", "motion"),
        [_pair_row(pair, splits) for pair in pairs],
    )
    if splits.folds:
        write_balance_plot(reports / "balance.png", rows, splits.classes, splits.unit)
    return splits, metrics


def _pair_row(pair: NearDuplicate, splits: Splits) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "group": splits.groups[pair.first],
        "hash_distance": pair.hash_distance,
        "similarity": f"{pair.similarity:.3f}",
        "motion": "" if pair.motion is None else f"{pair.motion:.3f}",
    }


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, out.getvalue())


def balance_rows(splits: Splits, frames: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row for each fold, part and class: patients (groups), videos and stored frames.

    Parts are `test`, `train`, and `validation_<i>` of inner fold i. `frames` is the stored count by video id; in a split by frame
    only the frames that were dealt to the part count.
    """
    rows = []
    for fold in splits.folds:
        parts = {"test": (fold.test, None), "train": (fold.train, None)}
        parts |= {f"validation_{number}": (inner.validation, number) for number, inner in enumerate(fold.inner)}
        for part, (videos, inner) in parts.items():
            for label in splits.classes:
                mine = [video for video in videos if splits.labels[video] == label]
                shown = sum(len(splits.frames_of(fold, part.partition("_")[0], video, frames[video], inner)) for video in mine)
                counts = (len(splits.groups_of(mine)), len(mine), shown)
                rows.append(dict(zip(BALANCE_COLUMNS, (fold.fold, fold.repeat, part, label, *counts), strict=True)))
    return rows


def split_metrics(splits: Splits, rows: Sequence[Mapping[str, Any]], near_duplicates: int) -> dict[str, Any]:
    """Content of metrics.json: totals, and the test part of every fold by class. Every labelled video is tested once a repeat,
    so the test parts of the first repeat add up to the totals."""
    test = [row for row in rows if row["part"] == "test"]
    folds = {}
    for fold in splits.folds:
        mine = [row for row in test if row["fold"] == fold.fold]
        folds[str(fold.fold)] = {
            "repeat": fold.repeat,
            "patients": len(splits.groups_of(fold.test)),
            "videos": len(fold.test),
            "frames": sum(row["frames"] for row in mine),
            "inner_folds": len(fold.inner),
            "classes": {row["class"]: {key: row[key] for key in ("patients", "videos", "frames")} for row in mine},
        }
    return {
        "folds": splits.folds_per_repeat,
        "repeats": splits.repeats,
        "classes": len(splits.classes),
        "excluded_classes": len(splits.excluded_classes),
        "patients": len(splits.groups_of(splits.labels)),
        "videos": len(splits.labels),
        "frames": sum(row["frames"] for row in test if row["repeat"] == 0),
        "unlabelled_videos": len(splits.unlabelled),
        "unlabelled_blocked": len(splits.unlabelled_blocked),
        "near_duplicate_pairs": near_duplicates,
        "warnings": len(splits.warnings),
        "test": folds,
    }


def describe_warnings(splits: Splits, store: Path) -> str:
    """The warnings, one a line. Missing patients stand apart, with the columns that extraction found; `store`: frame store of the main source."""
    hint = read_hints(store).get("patient", "")
    lines = []
    for warning in splits.warnings:
        # The hint quotes a table of this computer: the terminal may show it, splits.json and the report do without.
        lines.append(loud(f"{warning} {hint}".rstrip()) if NO_PATIENT in warning else f"warning: {warning}")
    return "\n".join(lines)


def describe_folds(splits: Splits, metrics: Mapping[str, Any]) -> str:
    """What the folds mean, in a few lines for the console."""
    if not splits.folds:
        return f"{metrics['unlabelled_videos']} unlabelled videos, no folds: `dvc repro pretrain@0` pretrains on all of them"
    units = f"{splits.unit}s"
    judged = units if splits.unit == splits.group == "patient" else f"{units} (data.group: {splits.group})"
    lines = [
        f"{metrics['videos']} labelled videos of {metrics['patients']} {judged}, classes {', '.join(splits.classes)}; "
        f"{metrics['unlabelled_videos']} unlabelled; {splits.words}" + (f" – {splits.stamp}" if splits.stamp else ""),
        "model k is trained without the test part of fold k and judged on it; inner folds choose its epoch:",
    ]
    for number, fold in metrics["test"].items():
        where = f" (repeat {fold['repeat']})" if splits.repeats > 1 else ""
        counts = ", ".join(f"{name} {count['patients']}/{count['videos']}" for name, count in fold["classes"].items())
        lines.append(
            f"  fold {number}{where}: test {fold['patients']} {units}, {fold['videos']} videos, {fold['frames']} frames "
            f"({units}/videos: {counts}); {fold['inner_folds']} inner folds"
        )
    return "\n".join(lines)


def write_balance_plot(path: Path, rows: Sequence[Mapping[str, Any]], classes: Sequence[str], unit: str) -> None:
    """Stacked bars of every fold's test part by class: patients (groups), videos and frames, with the even share as a line.

    `rows` are those of `balance_rows`; `unit` is the word for what is independent, `Splits.unit`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    test = [row for row in rows if row["part"] == "test"]
    folds = sorted({row["fold"] for row in test})
    repeat = {row["fold"]: row["repeat"] for row in test}
    starts = [fold for fold in folds[1:] if repeat[fold] != repeat[fold - 1]]
    figure = Figure(figsize=(min(3.0 + 0.55 * max(len(folds), 4) * 3, 20.0), 3.9), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    titles = {
        "patients": f"{unit}s (with two classes: counted in both)",
        "videos": "videos",
        "frames": "stored frames",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        floor = [0] * len(folds)
        tallest = max(sum(row[key] for row in test if row["fold"] == fold) for fold in folds)
        for position, label in enumerate(classes):
            heights = [next(row[key] for row in test if (row["fold"], row["class"]) == (fold, label)) for fold in folds]
            bars = axes.bar(
                folds,
                heights,
                0.72,
                floor,
                color=COLORS[position % len(COLORS)],
                label=label,
                edgecolor="white",
                hatch="//" if position >= len(COLORS) else None,
            )
            shown = [str(height) if height > SMALLEST_LABELLED * tallest else "" for height in heights]
            dark = position % len(COLORS) in DARK_COLORS
            axes.bar_label(bars, shown, label_type="center", fontsize=7, color="white" if dark else "black")
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
        even = axes.axhline(sum(floor) / len(folds), color="0.35", linestyle="--", linewidth=1)
        for start in starts:
            axes.axvline(start - 0.5, color="0.6", linewidth=0.8)
        axes.set(xlabel="fold (a line between repeats)" if starts else "fold", xticks=folds)
        axes.set_title(title, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.08)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        [*handles, even],
        [*names, "even share"],
        loc="outside lower center",
        ncols=min(len(names) + 1, 6),
        frameon=False,
        fontsize=8,
    )
    figure.suptitle("Test part of every outer fold", fontsize=11)
    out = io.BytesIO()
    # No date, no version: the same split gives the same bytes, so DVC sees no change.
    figure.savefig(out, format="png", metadata={"Software": None})
    atomic_write(path, out.getvalue())
