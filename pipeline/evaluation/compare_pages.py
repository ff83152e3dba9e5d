"""The picture and the page of a comparison, and the folder with everything: compare.{html,png,csv,md,json}."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from pipeline.evaluation.compare import LOWER_IS_BETTER, Comparison
from pipeline.evaluation.compare_tables import NAMES, as_csv, as_markdown, cannot, grids, headline, is_shown, number, pairs_csv, protocol, rests_on
from pipeline.evaluation.plots import CLASS_COLORS, INK, LINES, MUTED, card
from pipeline.evaluation.report import Picture, p_words, page_environment
from pipeline.files import atomic_write, write_json

__all__ = ["draw_comparison", "draw_curves", "write_comparison"]

ACCENT, SHOWN = "#0b7285", "#c2570c"
MARKERS = "osD^vPX*"
NAME_WIDTH, NAME_LINES = 30, 3


def _wrapped(name: str, stamp: str = "") -> str:
    """A long name on up to three lines, as matplotlib text without mathematics; the stamp on a line of its own."""
    lines = textwrap.wrap(name, NAME_WIDTH, break_on_hyphens=True) or [name]
    if len(lines) > NAME_LINES:
        lines = [*lines[: NAME_LINES - 1], lines[NAME_LINES - 1][: NAME_WIDTH - 1] + "…"]
    return "\n".join([*lines, *(textwrap.wrap(f"[{stamp}]", NAME_WIDTH + 6)[:2] if stamp else [])]).replace("$", r"\$")


def _bar(axes: Axes, low: float | None, high: float | None, y: float, color: str) -> None:
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=color, linewidth=2.6, alpha=0.5, solid_capstyle="round", gid="interval")


def draw_comparison(path: Path, found: Comparison) -> None:
    """Left: value with interval of each row, seeds as small dots. Right: difference to the reference with a zero line."""
    asked = found.settings
    labels = [_wrapped(row.name, row.stamp) for row in found.rows]
    heights = np.array([0.24 + 0.16 * (1 + label.count("\n")) for label in labels])
    places = np.cumsum(heights) - heights / 2
    with card(path, "", figsize=(10.5, 1.5 + float(heights.sum()))) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1])
        for index, (row, y) in enumerate(zip(found.rows, places, strict=True)):
            value, pair = row.values[asked.metric], found.to(row.name)
            color = MUTED if row.name == found.reference else SHOWN if is_shown(pair, asked.confidence) else ACCENT
            if index % 2 == 0:
                for axes in (left, right):
                    axes.axhspan(y - heights[index] / 2, y + heights[index] / 2, color="#f4f6f8", linewidth=0, zorder=0)
            _bar(left, value.low, value.high, y, color)
            seeds = [seed for seed in row.seeds.values() if seed is not None]
            if len(seeds) > 1:
                left.plot(seeds, [y + 0.11] * len(seeds), "o", color=color, markersize=3.2, alpha=0.75, markeredgewidth=0, gid="seeds")
            if value.value is not None:
                left.plot(value.value, y, "D" if row.name == found.reference else "o", color=color, markersize=7.5, markeredgecolor="white", gid="value")
                left.annotate(
                    number(value.value, asked.metric), (1.0, y), xycoords=("axes fraction", "data"), xytext=(-3, 0), textcoords="offset points",
                    ha="right", va="center", fontsize=9, color=INK,
                )
            if pair is None or pair.value is None:
                words = "reference" if pair is None and row.name == found.reference else "" if pair is None else pair.reason
                right.annotate(words, (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=MUTED)
                continue
            _bar(right, pair.low, pair.high, y, color)
            right.plot(pair.value, y, "o", color=color, markersize=7.5, markeredgecolor="white", gid="difference")
            p = "" if pair.p_holm is None else p_words(pair.p_holm).replace("p = ", "p ")
            right.annotate(
                f"{number(pair.value, asked.metric, '+')}   {p}", (1.0, y), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                ha="left", va="center", fontsize=9, color=INK, annotation_clip=False,
            )
        _frame(left, right, found)
        left.set_yticks(places, labels)
        left.set_ylim(places[-1] + heights[-1] / 2, places[0] - heights[0] / 2)
        left.tick_params(axis="y", length=0, labelcolor=INK)
        right.tick_params(axis="y", length=0)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)


def _frame(left: Axes, right: Axes, found: Comparison) -> None:
    asked = found.settings
    name, percent = NAMES[asked.metric], f"{asked.confidence:.0%}"
    lower = ", lower is better" if asked.metric in LOWER_IS_BETTER else ""
    left.set_title(f"{name[0].upper()}{name[1:]} per {asked.level}")
    left.set_xlabel(f"{percent} interval, {found.counts['patients']} {found.who}s{lower}")
    # Room for the number at the right end.
    low, high = left.get_xlim()
    left.set_xlim(low, high + 0.1 * (high - low))
    right.axvline(0, color=INK, linewidth=1.1)
    other = textwrap.shorten(found.reference, 40, placeholder="…").replace("$", r"\$")
    right.set_title(f"Difference to {other}" if not (found.curve and len(found.curve.lines) > 1) else "Difference to the reference line")
    right.set_xlabel(f"paired, {percent} interval; p corrected (Holm)")
    ends = right.get_xlim()
    room = 0.06 * (ends[1] - ends[0])
    right.set_xlim(min(ends[0], -room), max(ends[1], room))


def draw_curves(path: Path, found: Comparison) -> None:
    """The metric against a parameter, one line a group with its interval as a band; beside it the differences to the reference line."""
    curve, asked = found.curve, found.settings
    assert curve is not None
    where, logarithmic, numeric = _positions(curve.values)
    compared = len(curve.lines) > 1
    rows = {row.name: row for row in found.rows}
    stamps = "; ".join(dict.fromkeys(row.stamp for row in found.rows if row.stamp))
    with card(path, stamps, figsize=(10.5 if compared else 6.8, 4.6 + 0.22 * ((len(curve.lines) + 2) // 3))) as figure:
        panels = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
        for index, (line, points) in enumerate(curve.lines.items()):
            color, style, marker = CLASS_COLORS[index % len(CLASS_COLORS)], LINES[index % len(LINES)], MARKERS[index % len(MARKERS)]
            shown = {value: rows[name] for value, name in points.items()}
            own = [(where[value], *_triple(row.values[asked.metric])) for value, row in shown.items() if value in where]
            gaps = [(where[value], *_triple(found.to(row.name))) for value, row in shown.items() if value in where and found.to(row.name)]
            flat = [_triple(row.values[asked.metric]) for value, row in shown.items() if value not in where]
            label = _wrapped(line).replace("\n", " ")
            _line(panels[0], own, flat, numeric, index, len(curve.lines), {"color": color, "linestyle": style, "marker": marker, "label": label})
            for value, row in shown.items():
                seeds = [seed for seed in row.seeds.values() if seed is not None]
                if value in where and len(seeds) > 1:
                    panels[0].plot([where[value]] * len(seeds), seeds, ".", color=color, markersize=4, alpha=0.6, gid="seeds")
            if compared and gaps:
                _line(panels[1], gaps, [], numeric, index, len(curve.lines), {"color": color, "linestyle": style, "marker": marker})
        name = NAMES[asked.metric]
        panels[0].set_ylabel(f"{name}{' (lower is better)' if asked.metric in LOWER_IS_BETTER else ''}")
        panels[0].set_title(f"{name[0].upper()}{name[1:]} per {asked.level}")
        if compared:
            panels[1].axhline(0, color=INK, linewidth=1.1)
            panels[1].set_title(f"Difference to {_wrapped(found.reference)}")
        for axes in panels:
            if logarithmic:
                axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(list(where.values())))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(list(where.values()), [textwrap.shorten(value, 14, placeholder="…").replace("$", r"\$") for value in curve.values])
            axes.set_xlabel(curve.key.replace("$", r"\$") + (" (logarithmic)" if logarithmic else ""))
        figure.legend(loc="outside lower center", ncols=min(3, len(curve.lines)))


def _triple(one: Any) -> tuple[float, float, float]:
    """value, low, high as numbers; NaN where undefined."""
    return tuple(float("nan") if value is None else float(value) for value in (one.value, one.low, one.high))  # type: ignore[return-value]


def _positions(values: Sequence[str]) -> tuple[dict[str, float], bool, bool]:
    """Where values stand on the axis, whether it is logarithmic (they span more than a decade), whether they are numbers."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return {value: float(place) for place, value in enumerate(values)}, False, False
    low, high = min(numbers.values()), max(numbers.values())
    return numbers, low > 0 and high > 10 * low, True


def _line(
    axes: Axes, points: Sequence[tuple[float, ...]], flat: Sequence[tuple[float, ...]], numeric: bool, index: int, lines: int, style: Mapping[str, Any]
) -> None:
    """Points with a band, or with bars where the axis has no order; a group that does not know the parameter is a level line."""
    for value, low, high in flat:
        axes.axhline(value, color=style["color"], linestyle=":", linewidth=1.6, label=style.get("label"), gid="flat")
        axes.axhspan(low, high, color=style["color"], alpha=0.07, linewidth=0)
    if not points:
        return
    x, value, low, high = (np.array(column, float) for column in zip(*sorted(points), strict=True))
    if numeric and len(x) > 1:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0, gid="band")
        for end in (low, high):
            axes.plot(x, end, color=style["color"], linewidth=0.8, alpha=0.35)
        axes.plot(x, value, markersize=6, markeredgecolor="white", gid="line", **style)
        return
    x = x + (0 if numeric else (index - (lines - 1) / 2) * 0.5 / max(lines, 1))
    axes.vlines(x, low, high, color=style["color"], linewidth=2.4, alpha=0.5)
    axes.plot(x, value, markersize=6.5, markeredgecolor="white", gid="line", **{**style, "linestyle": "none"})


def write_comparison(found: Comparison, folder: Path) -> None:
    """Write compare.html, compare.png, compare.csv, compare.md, compare.json (and compare_pairs.csv for all pairs) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "compare.png"
    (draw_curves if found.curve else draw_comparison)(picture, found)
    atomic_write(folder / "compare.csv", as_csv(found))
    atomic_write(folder / "compare.md", as_markdown(found))
    write_json(folder / "compare.json", {**found.as_dict(), "headline": headline(found), "protocol": protocol(found), "cannot": cannot(found)})
    if found.settings.all_pairs:
        atomic_write(folder / "compare_pairs.csv", pairs_csv(found))
    atomic_write(folder / "compare.html", _page(found, picture))


def _page(found: Comparison, picture: Path) -> str:
    jinja, asked = page_environment(), found.settings
    jinja.filters["minus"] = lambda text: re.sub(r"(?<!\w)-(?=\d)", "−", str(text))
    report = jinja.get_template("report.html.j2")
    # The one style of both pages stands in the report's template.
    style = Markup("".join(report.blocks["style"](report.new_context({}))))
    spoken = "; ".join(f"{row.name} {number(row.values[asked.metric].value, asked.metric)}" for row in found.rows)
    caption = (
        f"Marks: mean over seeds; lines and bands: intervals over {found.who}s; small dots: seeds. " if found.counts["seeds"] > 1
        else f"Marks: values; lines and bands: intervals over {found.who}s. "
    ) + ("" if found.curve else "Diamond: the reference. Orange: shown after correction. ")
    return jinja.get_template("compare.html.j2").render(
        style=style, metric=NAMES[asked.metric], rests_on=rests_on(found), classes=found.classes, warnings=found.warnings, headline=headline(found),
        picture=Picture(picture, f"{NAMES[asked.metric]} of each row with its interval, and differences. {spoken}.", caption.strip()),
        grids=grids(found), cannot=cannot(found)[len(found.warnings):], protocol=protocol(found), curve=found.curve,
        rows=[{"name": row.name, "members": row.members, "joined": len(row.members) > 1} for row in found.rows],
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )
