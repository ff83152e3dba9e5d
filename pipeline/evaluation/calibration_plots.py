"""Pictures of calibration: the reliability diagram and the decision curve, in the style of `pipeline.evaluation.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipeline.evaluation.plots import CLASS_COLORS, INIT_COLORS, INK, MUTED, card, plain_text

__all__ = ["draw_decision_curves", "draw_reliability"]

COLUMNS = 3


def draw_reliability(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]], init: str, stamp: str = "") -> None:
    """A panel a state (as predicted, calibrated): points with bands beside the diagonal, and below them how many videos each stands for.

    Args:
        panels: title to rows of `calibration.reliability_points`.
    """
    color = INIT_COLORS.get(init, INK)
    with card(path, stamp, figsize=(4.0 * len(panels) + 0.3, 5.0)) as figure:
        grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": [5, 1]})
        for (upper, lower), (title, points) in zip(grid.T, panels.items(), strict=True):
            upper.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
            for row in points:
                if row["low"] is not None:
                    upper.plot([row["probability"]] * 2, [row["low"], row["high"]], color=color, linewidth=2.2, alpha=0.4, solid_capstyle="round")
            said, seen, count = ([row[key] for row in points] for key in ("probability", "frequency", "count"))
            upper.plot(said, seen, "o-", color=color, markersize=6, linewidth=1.2, markeredgecolor="white")
            upper.set(xlim=(-0.02, 1.02), ylim=(-0.04, 1.04))
            upper.set_title(title)
            lower.vlines(said, 0, count, color=color, linewidth=4)
            lower.set(xlabel="How sure the network is", ylim=(0, 1.15 * max(count)))
            lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        grid[0][0].set_ylabel("How often it is right")
        grid[1][0].set_ylabel("Videos")


def draw_decision_curves(path: Path, curves: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], stamp: str = "") -> None:
    """A panel a class: net benefit of the network with its band, of calling everyone and of calling no one.

    Args:
        curves: class to {state: result of `calibration.net_benefit`}; the last state has the band and the full line.
    """
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    with card(path, stamp, figsize=(3.5 * columns + (2.0 if columns == 1 else 0.4), 3.3 * rows + 0.5)) as figure:
        for place, (name, states) in enumerate(curves.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            _decision_panel(axes, states, CLASS_COLORS[place % len(CLASS_COLORS)])
            axes.set_title(plain_text(name))
            if place >= len(curves) - columns:
                axes.set_xlabel("Threshold probability")
            if place % columns == 0:
                axes.set_ylabel("Net benefit")
        lines = figure.axes[0].get_legend_handles_labels()
        # Each panel has its own colour; the key shows line styles only.
        keys = figure.legend(*lines, loc="outside lower center", ncols=len(lines[1]), handlelength=2.6)
        for line in keys.get_lines():
            line.set_color(INK)


def _decision_panel(axes: Axes, states: Mapping[str, Mapping[str, np.ndarray]], color: str) -> None:
    *others, (last, curve) = states.items()
    at = curve["threshold"]
    axes.fill_between(at, curve["low"], curve["high"], color=color, alpha=0.16, linewidth=0)
    axes.plot(at, curve["net_benefit"], color=color, label=last)
    for label, other in others:
        axes.plot(at, other["net_benefit"], color=color, linestyle="--", linewidth=1.2, label=label)
    axes.plot(at, curve["treat_all"], color=MUTED, linestyle="-.", linewidth=1.2, label="call everyone")
    axes.axhline(0, color=MUTED, linestyle=":", linewidth=1.4, label="call no one")
    top = max(curve["high"].max(), curve["treat_all"].max(), 0.05)
    axes.set(xlim=(0, 1), ylim=(-0.3 * top, 1.08 * top))
