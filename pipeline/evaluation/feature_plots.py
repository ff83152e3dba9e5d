"""Pictures of features: the map coloured by label and by patient, and rows of nearest neighbours. Used by report and command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from pipeline.evaluation.plots import CLASS_COLORS, INK, MUTED, RULE, card, plain_text

__all__ = ["draw_map", "draw_neighbors"]

MARKERS = "osD^vP*X"
SAME, OTHER = "#1b6e3c", "#a61e1e"
"""Frames of neighbours of the query's label and of another one; a tick or cross says the same without colour."""


def draw_map(
    path: Path, places: np.ndarray, labels: Sequence[str], groups: Sequence[str], is_test: np.ndarray, title: str, stamp: str = ""
) -> None:
    """Videos on a plane twice: coloured by label, and by patient with lines that join a patient's videos.

    Args:
        places: float [N, 2] from `two_dimensions`. labels, groups: of each video. is_test: bool [N]; the others are drawn faintly.
    """
    with card(path, stamp, figsize=(7.4, 4.1)) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        left, right = figure.subplots(1, 2)
        _by_label(left, places, np.array(labels), is_test)
        _by_patient(right, places, np.array(groups), is_test)
        for axes in (left, right):
            # The axes of such a map have no meaning, so they carry no numbers.
            axes.set(xticks=[], yticks=[])
            axes.margins(0.06)
            for spine in axes.spines.values():
                spine.set(visible=True, color=RULE)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _by_label(axes: Axes, places: np.ndarray, labels: np.ndarray, is_test: np.ndarray) -> None:
    axes.set_title("by label: colour and shape as in the legend\n", fontsize=9)
    for number, name in enumerate(dict.fromkeys(sorted(labels))):
        style = {"color": CLASS_COLORS[number % len(CLASS_COLORS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}
        part = labels == name
        axes.plot(*places[part & ~is_test].T, **style, markersize=4, alpha=0.3, markeredgewidth=0)
        axes.plot(*places[part & is_test].T, **style, markersize=7, markeredgecolor="white", label=plain_text(str(name)))
    axes.plot([], [], "o", color=MUTED, markersize=4, alpha=0.4, markeredgewidth=0, label="small, faint: training")


def _by_patient(axes: Axes, places: np.ndarray, groups: np.ndarray, is_test: np.ndarray) -> None:
    tested = sorted(set(groups[is_test]))
    shown = f"{len(tested)} test patients" if len(tested) != 1 else "1 test patient"
    axes.set_title(f"by patient: {shown}, each with its own\ncolour and shape; small, grey: training patients", fontsize=9)
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, max(1, len(tested))))
    for name in sorted(set(groups)):
        own = places[groups == name]
        place = tested.index(name) if name in tested else None
        color, alpha = (MUTED, 0.25) if place is None else (colors[place], 1.0)
        centre = own.mean(axis=0)
        for point in own if len(own) > 1 else ():
            axes.plot(*np.stack([centre, point]).T, color=color, alpha=0.5 * alpha, linewidth=1.2, zorder=1)
        marker = "o" if place is None else MARKERS[place % len(MARKERS)]
        size, edge = (4, "none") if place is None else (7, "white")
        axes.plot(*own.T, marker=marker, linestyle="none", color=color, alpha=alpha, markersize=size, markeredgecolor=edge)


def draw_neighbors(path: Path, rows: Sequence[Mapping[str, Any]], title: str, stamp: str = "") -> None:
    """Queries at the left, their neighbours at the right, best first.

    Args:
        rows: each with `query` {image, label, name} and `neighbors`, a list of {image, label, similarity, same_label (or None
            where a label is unknown), same_patient (or None), name}; images uint8 [H, W] or [H, W, 3], or None.
    """
    across = max(len(row["neighbors"]) for row in rows)
    with card(path, stamp, figsize=(1.55 * (across + 1) + 0.5, 2.05 * len(rows) + 0.4)) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        grid = figure.add_gridspec(len(rows), across + 2, width_ratios=[1, 0.08, *([1] * across)])
        for place, row in enumerate(rows):
            query = row["query"]
            axes = figure.add_subplot(grid[place, 0])
            _thumbnail(axes, query["image"], INK, f"query\n{_label(query['label'])}\n{query['name']}")
            for column, found in enumerate(row["neighbors"]):
                axes = figure.add_subplot(grid[place, column + 2])
                sign, color = {True: ("✓ ", SAME), False: ("✗ ", OTHER), None: ("", MUTED)}[found["same_label"]]
                patient = {True: "same patient", False: "other patient", None: "patient unknown"}[found["same_patient"]]
                text = f"{sign}{_label(found['label'])}  {found['similarity']:.2f}\n{patient}\n{found['name']}"
                _thumbnail(axes, found["image"], color, text, bold=found["same_patient"] is True)


def _label(name: str) -> str:
    return plain_text(name, 14) if name else "no label"


def _thumbnail(axes: Axes, image: np.ndarray | None, color: str, text: str, bold: bool = False) -> None:
    """One frame with a coloured border and up to three lines below; an empty card where there is no picture."""
    shown = np.full((8, 8), 235, np.uint8) if image is None else image
    # Squares, so that all rows have equal height and the words below have room.
    height, width = shown.shape[:2]
    side = max(height, width)
    margins = [((side - length) // 2, side - length - (side - length) // 2) for length in (height, width)]
    axes.imshow(np.pad(shown, [*margins, (0, 0)][: shown.ndim]), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=2.2)
    axes.set_xlabel(text, fontsize=7.5, color=color, fontweight="bold" if bold else "normal")
