"""Pictures of the evaluation as PNG files: confusion, ROC and precision-recall, folds, comparison, learning curves, gallery.

Every function takes plain tables and draws on a white card, so that the pictures are legible on light and dark pages
and on paper. Colours are safe for colour-blind readers and never the only mark: line style or marker differs too.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from pipeline.files import atomic_write  # noqa: E402

__all__ = [
    "CLASS_COLORS",
    "DPI",
    "INIT_COLORS",
    "INK",
    "MUTED",
    "RULE",
    "card",
    "draw_class_curves",
    "draw_comparison",
    "draw_confusion",
    "draw_curve",
    "draw_folds",
    "draw_gallery",
    "plain_text",
    "readable",
]

INK, MUTED, RULE = "#1c2733", "#5d6b7a", "#d5dce3"
INIT_COLORS = {"pretrained": "#0b7285", "random": "#c2570c", "majority": "#7a8794"}
INIT_MARKERS = {"pretrained": "o", "random": "s", "majority": "D"}
# Okabe and Ito 2008, without the yellow that vanishes on white.
CLASS_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"]
LINES = ["-", "--", "-.", ":"]
DPI = 170
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#eceff2",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


def readable(name: str) -> str:
    """`val_balanced_accuracy` -> `val balanced accuracy`; slashes become spaces too."""
    return name.replace("_", " ").replace("/", " ").strip()


def plain_text(text: str, width: int = 26) -> str:
    """A name from outside as matplotlib text: no mathematics between dollar signs, not longer than `width`."""
    short = textwrap.shorten(text, width, placeholder="…") if " " in text else text
    short = short if len(short) <= width else short[: width - 1] + "…"
    return short.replace("$", r"\$")


def _on(background: Sequence[float]) -> str:
    """Text colour for a background (r, g, b, a in 0..1): whichever of ink and white contrasts more (WCAG luminance)."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in background[:3]]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (light + 0.05) > (light + 0.05) / 0.065 else INK


@contextmanager
def card(path: Path, stamp: str, **size: Any) -> Iterator[plt.Figure]:
    """A figure in the house style (keywords as in `plt.figure`), saved with the stamp above it, and always closed."""
    with plt.rc_context(STYLE), warnings.catch_warnings():
        # A class name in a script the font lacks is drawn as boxes; the report's tables show it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = plt.figure(**size)
        try:
            yield figure
            if stamp:
                title = figure.get_suptitle()
                figure.suptitle(
                    f"{title}\n{stamp}" if title else stamp,
                    x=0.01,
                    ha="left",
                    fontsize=9,
                    color="#a61e1e",
                    fontweight="bold",
                )
            # No software or date field: equal results give equal bytes, and DVC sees no change.
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
            atomic_write(path, picture.getvalue())
        finally:
            plt.close(figure)


def draw_confusion(path: Path, matrix: np.ndarray, classes: Sequence[str], title: str, stamp: str = "") -> None:
    """One confusion matrix; `matrix` float [K, K] of counts (rows are the truth); cells show count and row percent."""
    matrix = np.asarray(matrix, dtype=float)
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros_like(matrix), where=total > 0)
    side = 1.3 + (0.98 if len(classes) < 5 else 0.75) * len(classes)
    room = 0.04 * max(0, min(32, max(map(len, classes))) - 12)
    with card(path, stamp, figsize=(side + 0.9 + room, side)) as figure:
        axes = figure.add_subplot()
        shades = axes.imshow(share, cmap="GnBu", vmin=0, vmax=1.15)
        names = [plain_text(name, 18) for name in classes]
        fits = max(map(len, names)) < (15 if len(classes) < 5 else 9)
        turned = {} if fits else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(classes)), names, **turned)
        axes.set_yticks(range(len(classes)), [plain_text(name, 32) for name in classes])
        axes.set(xlabel="Predicted", ylabel="Truth")
        axes.set_title(title)
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for row in range(len(classes)):
            for column in range(len(classes)):
                color = _on(shades.cmap(shades.norm(share[row, column])))
                bold = "bold" if row == column else "normal"
                axes.text(
                    column,
                    row - 0.08,
                    f"{matrix[row, column]:.3g}",
                    ha="center",
                    va="center",
                    color=color,
                    fontsize=14,
                    fontweight=bold,
                )
                axes.text(
                    column, row + 0.24, f"{share[row, column]:.0%}", ha="center", va="center", color=color, fontsize=9
                )


def _called(init: str, called: Mapping[str, str] | None) -> str:
    return (called or {}).get(init, init)


def draw_class_curves(
    path: Path, grid: np.ndarray, curves: Mapping[str, Any], areas: Mapping[str, tuple[str, str]], name: str, stamp: str = "",
    called: Mapping[str, str] | None = None,
) -> None:
    """One class against the rest: ROC above, precision and recall below, a line and a band an initialisation.

    Args:
        grid: places of the bands. curves: `pipeline.evaluation.curves.Curve` by initialisation. areas: (AUROC, average precision) as
            shown, by initialisation. called: shown names of initialisations, here and below.
    """
    with card(path, stamp, figsize=(3.5, 7.4 + 0.3 * len(curves))) as figure:
        figure.suptitle(plain_text(name, 34), x=0.01, ha="left", fontweight="bold", fontsize=11)
        upper, lower = figure.subplots(2, 1)
        upper.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
        lower.axhline(next(iter(curves.values())).prevalence, color=MUTED, linestyle=":", linewidth=1)
        for init, curve in curves.items():
            style = {"color": INIT_COLORS.get(init, INK), "linestyle": "--" if init == "random" else "-"}
            for axes, (x, y), band, area in (
                (upper, (0, 1), curve.roc_band, areas[init][0]), (lower, (2, 3), curve.pr_band, areas[init][1]),
            ):
                if band is not None:
                    axes.fill_between(grid, *band, color=style["color"], alpha=0.16, linewidth=0)
                steps = {} if axes is upper else {"drawstyle": "steps-pre"}
                axes.plot(curve.points[:, x], curve.points[:, y], **style, **steps, label=f"{_called(init, called)}: {area}")
        upper.set(xlabel="1 − specificity", ylabel="Sensitivity")
        lower.set(xlabel="Recall (sensitivity)", ylabel="Precision")
        for axes, word in ((upper, "AUROC"), (lower, "average precision")):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
            # Below the axes: inside, it would cover a curve.
            axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.17), title=word, title_fontsize=9, alignment="left", borderaxespad=0)


def _interval(
    axes: Axes, x: float, row: Mapping[str, Any], init: str, label: str | None = None, size: float = 7
) -> None:
    color = INIT_COLORS.get(init, INK)
    if np.isfinite(row["low"]) and np.isfinite(row["high"]):
        axes.plot([x, x], [row["low"], row["high"]], color=color, linewidth=2.2, alpha=0.55, solid_capstyle="round")
    axes.plot(
        x, row["value"], INIT_MARKERS.get(init, "o"), color=color, markersize=size, label=label, markeredgecolor="white"
    )


def draw_folds(
    path: Path,
    folds: pd.DataFrame,
    pooled: pd.DataFrame,
    metric: str,
    chance: float,
    confidence: float,
    stamp: str = "",
    called: Mapping[str, str] | None = None,
) -> None:
    """A dot a fold with its interval, and the pooled value at the right.

    Args:
        folds: columns init, fold, value, low, high (NaN where undefined).
        pooled: columns init, value, low, high.
        chance: value of guessing, drawn as a line.
    """
    numbers = sorted(folds["fold"].unique())
    inits = list(pooled["init"])
    with card(path, stamp, figsize=(max(6.0, 0.8 * len(numbers) + 2.4), 3.8)) as figure:
        axes = figure.add_subplot()
        axes.axhline(chance, color=MUTED, linestyle=":", linewidth=1.2, label="guessing")
        for index, init in enumerate(inits):
            shift = (index - (len(inits) - 1) / 2) * 0.22
            for row in folds[folds["init"] == init].to_dict("records"):
                _interval(axes, numbers.index(row["fold"]) + shift, row, init)
            row = pooled[pooled["init"] == init].iloc[0].to_dict()
            _interval(axes, len(numbers) + 0.3 + shift, row, init, label=_called(init, called), size=9)
        axes.axvline(len(numbers) - 0.35, color=RULE, linewidth=1)
        axes.set_xticks([*range(len(numbers)), len(numbers) + 0.3], [*(f"fold {fold}" for fold in numbers), "all"])
        axes.set(ylim=(-0.03, 1.03), ylabel=readable(metric).capitalize(), xlim=(-0.5, len(numbers) + 0.8))
        axes.grid(axis="x", visible=False)
        some = np.isfinite([*folds["low"], *pooled["low"]]).any()
        axes.set_title(f"{readable(metric).capitalize()} per video" + (f" with {confidence:.0%} intervals" if some else ""))
        figure.legend(loc="outside lower center", ncols=len(inits) + 1)


def draw_comparison(
    path: Path, rows: pd.DataFrame, names: Mapping[str, str], chance: float, confidence: float, stamp: str = "",
    called: Mapping[str, str] | None = None,
) -> None:
    """Initialisations side by side, one line a metric.

    Args:
        rows: columns init, metric, value, low, high (NaN where undefined).
        names: what a metric is called.
        chance: balanced accuracy of guessing, drawn as a line.
    """
    metrics = list(dict.fromkeys(rows["metric"]))
    inits = list(dict.fromkeys(rows["init"]))
    with card(path, stamp, figsize=(6.0, 1.5 + 0.7 * len(metrics))) as figure:
        axes = figure.add_subplot()
        axes.axvline(chance, color=MUTED, linestyle=":", linewidth=1.2, label=f"guessing ({chance:.2f})")
        for index, init in enumerate(inits):
            shift = (index - (len(inits) - 1) / 2) * 0.22
            color = INIT_COLORS.get(init, INK)
            for row in rows[rows["init"] == init].to_dict("records"):
                y = metrics.index(row["metric"]) + shift
                label = _called(init, called) if row["metric"] == metrics[0] else None
                if np.isfinite(row["low"]) and np.isfinite(row["high"]):
                    axes.plot(
                        [row["low"], row["high"]],
                        [y, y],
                        color=color,
                        linewidth=2.2,
                        alpha=0.55,
                        solid_capstyle="round",
                    )
                if np.isfinite(row["value"]):
                    axes.plot(
                        row["value"],
                        y,
                        INIT_MARKERS.get(init, "o"),
                        color=color,
                        markersize=8,
                        label=label,
                        markeredgecolor="white",
                    )
                    end = row["high"] if np.isfinite(row["high"]) else row["value"]
                    axes.annotate(
                        f"{row['value']:.2f}",
                        (end, y),
                        xytext=(6, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8.5,
                        color=color,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                    )
        axes.set_yticks(range(len(metrics)), [names.get(name, readable(name)) for name in metrics])
        axes.set(xlim=(-0.02, 1.08), ylim=(len(metrics) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        axes.set_title("Per video" + (f", with {confidence:.0%} intervals" if np.isfinite(rows["low"]).any() else ""))
        figure.legend(loc="outside lower center", ncols=len(inits) + 1)


def draw_curve(
    path: Path,
    curves: Mapping[str, pd.DataFrame],
    column: str,
    title: str,
    groups: Mapping[str, str] | None = None,
    chance: str | None = None,
    stamp: str = "",
    called: Mapping[str, str] | None = None,
) -> None:
    """One quantity over training, one line a run.

    Args:
        curves: by run name, a table with a column `x` (epoch or step); a run may lack the column.
        column: what is drawn.
        groups: initialisation of every run; runs of one initialisation share colour and legend entry.
        chance: a further column drawn dotted, taken from the first run that has it.
    """
    with card(path, stamp, figsize=(3.6, 2.7)) as figure:
        axes = figure.add_subplot()
        labelled: set[str] = set()
        for number, (name, table) in enumerate(curves.items()):
            if column not in table.columns:
                continue
            part = table[["x", column]].dropna()
            group = groups[name] if groups else name
            color = INIT_COLORS.get(group, CLASS_COLORS[number % len(CLASS_COLORS)])
            line = LINES[number % len(LINES)] if not groups else "--" if group == "random" else "-"
            axes.plot(
                part["x"],
                part[column],
                color=color,
                linestyle=line,
                linewidth=1.5,
                alpha=0.85,
                label=None if group in labelled else plain_text(_called(group, called)),
                marker="." if len(part) < 30 else None,
            )
            labelled.add(group)
        table = next((table for table in curves.values() if chance in table.columns), None)
        if table is not None:
            axes.plot(table["x"], table[chance], color=MUTED, linestyle=":", linewidth=1.2, label="guessing")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(str(next(iter(curves.values())).attrs.get("x", "epoch")), color=MUTED)
        if len(labelled) <= 6:
            axes.legend(fontsize=8)


def draw_gallery(path: Path, cases: Sequence[Mapping[str, Any]], title: str, stamp: str = "") -> None:
    """Frames of chosen videos, one row a video.

    Args:
        cases: each with `images` (uint8 arrays [H, W] or [H, W, 3]), `truth`, `predicted`, `probability`, `correct`.
    """
    across = max(len(case["images"]) for case in cases)
    with card(path, stamp, figsize=(1.7 * across + 3.0, 1.75 * len(cases) + 0.5)) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        grid = figure.add_gridspec(len(cases), across + 1, width_ratios=[1.6, *([1] * across)])
        for row, case in enumerate(cases):
            text = figure.add_subplot(grid[row, 0])
            text.axis("off")
            word, color = ("right", "#1b6e3c") if case["correct"] else ("wrong", "#a61e1e")
            text.text(
                0,
                0.5,
                f"{word}\ntruth: {plain_text(case['truth'])}\npredicted: {plain_text(case['predicted'])}"
                f"\np = {case['probability']:.2f}",
                va="center",
                fontsize=9,
                color=color,
            )
            for column, image in enumerate(case["images"]):
                axes = figure.add_subplot(grid[row, column + 1])
                axes.imshow(image, cmap="gray", vmin=0, vmax=255)
                axes.axis("off")
