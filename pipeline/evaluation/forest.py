"""Forest plot: one value with its interval a line, as for sub-groups and for models beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.plots import INIT_COLORS, INK, MUTED, RULE, card, plain_text

__all__ = ["draw_forest"]


def draw_forest(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    *,
    line: float | None = None,
    line_name: str = "",
    chance: float | None = None,
    stamp: str = "",
) -> None:
    """Draw rows from top to bottom, on a scale from 0 to 1.

    Args:
        rows: each with `name`; `value`, `low` and `high` (None where undefined); optionally `note` (right of the scale),
            `strong` (coloured, not grey), and `head` (a heading without value).
        line: value of a solid vertical line, such as that of all patients, called `line_name` in the legend.
        chance: value of guessing, a dotted line.
    """
    with card(path, stamp, figsize=(6.6, 1.3 + 0.36 * len(rows))) as figure:
        axes = figure.add_subplot()
        if chance is not None:
            axes.axvline(chance, color=MUTED, linestyle=":", linewidth=1.2, label=f"guessing ({chance:.2f})")
        if line is not None:
            axes.axvline(line, color=INIT_COLORS["pretrained"], linewidth=1.2, alpha=0.6, label=f"{line_name} ({line:.2f})")
        for place, row in enumerate(rows):
            if row.get("head"):
                axes.axhline(place - 0.55, color=RULE, linewidth=0.8)
                continue
            _row(axes, place, row)
        names = axes.set_yticks(range(len(rows)), [plain_text(str(row["name"]), 34) for row in rows])
        for row, name in zip(rows, names, strict=True):
            name.label1.set_color(INK)
            name.label1.set_fontweight("bold" if row.get("head") else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.7))
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        if line is not None or chance is not None:
            figure.legend(loc="outside lower center", ncols=2)


def _row(axes: Any, place: int, row: Mapping[str, Any]) -> None:
    color = INIT_COLORS["pretrained"] if row.get("strong", True) else INIT_COLORS["majority"]
    value, low, high = row.get("value"), row.get("low"), row.get("high")
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color=color, linewidth=2.2, alpha=0.55, solid_capstyle="round")
    if value is not None:
        axes.plot(value, place, "o", color=color, markersize=7, markeredgecolor="white")
    note = row.get("note") or ("" if value is None else f"{value:.2f}")
    axes.annotate(
        note, (1.0, place), xytext=(6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center", fontsize=8.5,
        color=INK if value is not None else MUTED, annotation_clip=False,
    )
