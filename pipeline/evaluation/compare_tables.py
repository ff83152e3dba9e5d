"""A comparison in words and tables: for the terminal, Markdown, CSV, JSON, and for the page that `compare_pages` makes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.compare import LOWER_IS_BETTER, Comparison, Row
from pipeline.evaluation.compare_numbers import METRICS, Difference, permutations
from pipeline.files import csv_text

__all__ = ["NAMES", "Grid", "as_csv", "as_markdown", "cannot", "grids", "headline", "is_shown", "number", "pairs_csv", "protocol", "rests_on"]

NAMES = {
    "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "macro_f1": "macro F1", "macro_auroc": "AUROC", "log_loss": "log loss",
    "brier": "Brier score",
}
COLUMNS = 6
LEVEL_WORDS = {"video": "videos", "patient": "{who}s (once for each label)", "frame": "frames"}


@dataclass(frozen=True)
class Grid:
    """A table of ready-made cells; `numeric` names columns that are set right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()
    note: str = ""


def number(value: float | None, metric: str, sign: str = "") -> str:
    """`0.71`, `+0.05`, or a dash; three digits where a metric is no share."""
    if value is None:
        return "-"
    digits = 3 if metric in LOWER_IS_BETTER else 2
    # + 0.0 turns -0.0 into 0.0
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _interval(value: float | None, low: float | None, high: float | None, metric: str, sign: str = "") -> str:
    """`0.71 (0.55 to 0.85)`."""
    ends = f" ({number(low, metric, sign)} to {number(high, metric, sign)})" if low is not None and high is not None else ""
    return number(value, metric, sign) + ends


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else ">0.99" if value > 0.99 else f"{value:.3f}"


def _name(row: Row) -> str:
    return f"{row.name} [{row.stamp}]" if row.stamp else row.name


def rests_on(found: Comparison) -> str:
    """`30 patients, 89 videos, 5 folds, 3 seeds`."""
    counts, level = found.counts, found.settings.level
    units = {"video": "video", "patient": "judgement", "frame": "frame"}[level]
    words = [(counts["patients"], found.who), (counts["units"], units), (counts["folds"], "fold"), (counts["repeats"], "repeat"), (counts["seeds"], "seed")]
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in words if word != "repeat" or count > 1)


def grids(found: Comparison) -> list[Grid]:
    """The main table, the other metrics, all pairs if asked for, tests of single classes, and parameters that differ."""
    result = [_main(found), _others(found)]
    if found.settings.all_pairs and len(found.rows) > 2:
        result.append(_matrix(found))
    if found.pairs and any(name.startswith("DeLong") for pair in found.pairs for name in pair.others) and len(found.classes) > 2:
        result.append(_delong(found))
    if set(found.differing) - _named(found):
        result.append(_differing(found))
    return result


def _named(found: Comparison) -> set[str]:
    """Parameters that the names of rows or methods tell already: a table of them alone would repeat these."""
    known = set(found.differing.get("pretrain.init", ())) <= {"random", "imagenet"}
    return {"pretrain.method", *(["pretrain.init"] if known else []), *([found.curve.key] if found.curve else [])}


def _main(found: Comparison) -> Grid:
    metric, name = found.settings.metric, NAMES[found.settings.metric]
    percent = f"{found.settings.confidence:.0%}"
    other = "the reference" if found.curve and len(found.curve.lines) > 1 else found.reference
    folded = any(pair.folds for pair in found.pairs)
    beside = next((test for pair in found.pairs for test in pair.others if test == "McNemar" or len(found.classes) == 2), "")
    columns = ["experiment", "method", f"{name} ({percent} interval)", f"minus {other} ({percent} interval)", "p", "p (Holm)"]
    columns += [f"p ({beside.partition(',')[0]})"] if beside else []
    columns += ["p (over folds)"] if folded else []
    rows = []
    for row in found.rows:
        value, pair = row.values[metric], found.to(row.name)
        cells = [_name(row), row.method, _interval(value.value, value.low, value.high, metric)]
        if pair is None:
            cells += ["reference" if row.name == found.reference or found.curve else "", *[""] * (len(columns) - len(cells) - 1)]
        else:
            cells += [_interval(pair.value, pair.low, pair.high, metric, "+"), _p(pair.p), _p(pair.p_holm)]
            cells += [_p(pair.others.get(beside, {}).get("p_value"))] if beside else []
            cells += [_p((pair.folds or {}).get("p_value"))] if folded else []
        rows.append(cells)
    lower = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    units = LEVEL_WORDS[found.settings.level].format(who=found.who)
    return Grid(f"{name[0].upper()}{name[1:]} of {units}{lower}: {rests_on(found)}", columns, rows, columns[2:])


def _others(found: Comparison) -> Grid:
    names = [name for name in METRICS if name != found.settings.metric]
    columns = ["experiment", *(NAMES[name] + (" (lower is better)" if name in LOWER_IS_BETTER else "") for name in names)]
    rows = [
        [row.name, *(_interval(row.values[name].value, row.values[name].low, row.values[name].high, name) for name in names)] for row in found.rows
    ]
    return Grid("Other metrics", columns, rows, columns[1:])


def _matrix(found: Comparison) -> Grid:
    names, metric = [row.name for row in found.rows], found.settings.metric
    known: dict[tuple[str, str], tuple[float | None, Difference]] = {}
    for pair in found.pairs:
        known[pair.first, pair.second] = (pair.value, pair)
        known[pair.second, pair.first] = (None if pair.value is None else -pair.value, pair)
    rows = [
        [
            f"{place + 1}: {one}",
            *("" if one == other else f"{number(known[one, other][0], metric, '+')} (p {_p(known[one, other][1].p_holm)})" for other in names),
        ]
        for place, one in enumerate(names)
    ]
    heads = [str(place + 1) for place in range(len(names))]
    note = f"p values corrected by Holm over all {len(found.pairs)} pairs."
    return Grid(f"All pairs: {NAMES[metric]} of the row minus that of the column", ["experiment", *heads], rows, heads, note)


def _delong(found: Comparison) -> Grid:
    columns = ["experiment", "minus", *(f"{name} against the rest" for name in found.classes)]
    rows = []
    for pair in found.pairs:
        tests = [pair.others.get(f"DeLong, {name}", {}) for name in found.classes]
        cells = [_interval(test.get("difference"), test.get("low"), test.get("high"), "macro_auroc", "+") + f", p {_p(test.get('p_value'))}" for test in tests]
        rows.append([pair.first, pair.second, *cells])
    return Grid(f"AUROC of each class: DeLong's test over {found.who}s (not corrected for several classes)", columns, rows, columns[2:])


def _differing(found: Comparison) -> Grid:
    keys = sorted(found.differing, key=lambda key: (key.startswith("methods."), key))
    shown, more = keys[:COLUMNS], len(keys) - COLUMNS
    rows = [[row.name, *(found.differing[key][place] or "-" for key in shown)] for place, row in enumerate(found.rows)]
    return Grid("Parameters that differ", ["experiment", *shown], rows, note=f"{more} more parameters differ (compare.json lists them)." if more > 0 else "")


def headline(found: Comparison) -> str:
    """What may be said after correction, in a sentence or two."""
    asked, pairs = found.settings, [pair for pair in found.pairs if pair.value is not None]
    if not pairs:
        return f"No difference in {NAMES[asked.metric]} can be computed: see the table for why."
    shown = [pair for pair in pairs if is_shown(pair, asked.confidence)]
    what = f"{len(pairs)} differences in {NAMES[asked.metric]}"
    if not shown and len(pairs) == 1:
        return f"A difference in {NAMES[asked.metric]} is not shown: the data are compatible with none."
    if not shown:
        return f"None of the {what} is shown: after correction for their number the data are compatible with no difference."
    listed = "; ".join(
        f"{pair.first} against {pair.second} {_interval(pair.value, pair.low, pair.high, asked.metric, '+')}, corrected p {_p(pair.p_holm)}"
        for pair in shown[:3]
    )
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    if len(pairs) == 1:
        return f"The difference in {NAMES[asked.metric]} is shown: {listed}."
    return f"{len(shown)} of {what} {'is' if len(shown) == 1 else 'are'} shown after correction: {listed}{more}."


def is_shown(pair: Difference | None, confidence: float) -> bool:
    """Whether interval and corrected test agree that there is a difference."""
    if pair is None or pair.p_holm is None or pair.low is None or pair.high is None:
        return False
    return pair.p_holm <= 1 - confidence and (pair.low > 0 or pair.high < 0)


def protocol(found: Comparison) -> list[str]:
    """How the numbers came about, in sentences."""
    asked, counts, who = found.settings, found.counts, found.who
    several = counts["seeds"] > 1 or counts["repeats"] > 1
    stamped = ", except where a stamp says otherwise" if any(row.stamp for row in found.rows) else ""
    unit = "frame" if asked.level == "frame" else "video"
    bare = asked.initialisation == "pretrained" and {row.method for row in found.rows} & {"random", "imagenet", "weights file"}
    other = "; in rows without pretraining what the column of methods names" if bare else ""
    lines = [
        f"All rows were judged on the same {rests_on(found)}; labels, {who}s and folds were checked to be equal. Every {unit} was judged by "
        f"networks fine-tuned without its {who}{stamped} (initialisation: {asked.initialisation}{other}).",
        *(["A group is a patient, or a single video (with its copies) where patients are unknown or not kept apart (data.group: video): then other videos "
           "of the patient may have been trained on, and videos count as independent."] if who == "group" else []),
        "Folds are pooled before a metric is computed" + ("; the value is the mean over seeds and repeats." if several else "."),
        f"Intervals of values ({asked.confidence:.0%}): linearised over {who}s, as in the report. Intervals of differences: expanded percentiles of "
        f"{asked.replicates} bootstrap samples that draw whole {who}s with replacement, all their videos and seeds together; both rows meet the same draws.",
        f"p: two-sided permutation test that exchanges the two rows' predictions {who} by {who} ({_exchanges(found)}). p (Holm): corrected for "
        f"{len(found.pairs)} comparison{'' if len(found.pairs) == 1 else 's'}.",
    ]
    folds = next((pair.folds for pair in found.pairs if pair.folds and pair.folds.get("p_value") is not None), None)
    if folds:
        lines.append(
            f"p (over folds): corrected resampled t-test (Nadeau and Bengio 2003) on {folds['count']} fold differences"
            f"{', means over seeds' if counts['seeds'] > 1 else ''}, test/training = {folds['test_over_train']:.2f}"
            f"{' (the inner validation part is no training)' if folds['trained'] < 1 else ''}; a question of its own (what would "
            "other folds give?), with little power for few folds. Not corrected."
        )
    if any("McNemar" in pair.others for pair in found.pairs):
        lines.append(
            f"p (McNemar): from the units where only one of the two is right, clustered by {who} (Obuchowski 1998); mid-p where each {who} gives "
            "one unit. Not corrected."
        )
    if any(name.startswith("DeLong") for pair in found.pairs for name in pair.others):
        lines.append(f"DeLong: clustered by {who} (Obuchowski 1997)" + (", all seeds pooled. Not corrected." if several else ". Not corrected."))
    return lines


def _exchanges(found: Comparison) -> str:
    if any(pair.exact for pair in found.pairs):
        return f"all {2 ** found.counts['patients']} exchanges"
    counts = found.counts
    drawn = permutations(found.settings.metric, 2 * counts["units"] * counts["seeds"] * counts["repeats"])
    return f"{drawn:,} random exchanges".replace(",", " ")


def cannot(found: Comparison) -> list[str]:
    """What cannot be concluded, strongest first."""
    patients = found.counts["patients"]
    lines = [f"Warning: {line}." for line in found.warnings]
    stamps = sorted({part for row in found.rows for part in row.stamp.split(", ") if part})
    if stamps:
        lines.append(f"Stamped rows ({'; '.join(stamps)}) do not say how well new patients would be judged.")
    lines.append("A difference that is not shown is not shown to be absent: look at the interval for how large it may still be.")
    lines.append(
        f"{patients} {found.who}s of one collection: nothing is said about other hospitals, scanners or patient groups"
        + (", and with so few the interval is the message, not the number." if patients < 100 else ".")
    )
    if found.counts["seeds"] == 1:
        lines.append(
            "One seed a row: what another start of the same training would give is in no interval, and differences of a few hundredths are often no "
            "more than that (join seeds: NAME=A-s0+A-s1+A-s2)."
        )
    lines.append(f"The rows are a choice: leaving out what did badly, or tuning settings on these {found.who}s, makes the best of them look better than it is.")
    return lines


def as_markdown(found: Comparison, *, full: bool = True) -> str:
    """Tables with padded columns; `full` adds what can and cannot be concluded and how."""
    parts = []
    for grid in grids(found) if full else grids(found)[: 3 if found.settings.all_pairs and len(found.rows) > 2 else 2]:
        parts += [f"**{grid.title}**" if full else grid.title, _text(grid), *([grid.note] if grid.note else [])]
    if full:
        listed = [("Result", [headline(found)]), ("How", protocol(found)), ("What cannot be concluded", cannot(found))]
        parts += [f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in listed]
    return "\n\n".join(parts) + "\n"


def _text(grid: Grid) -> str:
    cells = [[re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in row] for row in [grid.columns, *grid.rows]]
    widths = [max(len(row[place]) for row in cells) for place in range(len(grid.columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def as_csv(found: Comparison) -> str:
    """One line a row, unrounded; text that a spreadsheet would take for a formula is shielded."""
    asked, counts = found.settings, found.counts
    place = {name: (line, value) for line, points in found.curve.lines.items() for value, name in points.items()} if found.curve else {}
    columns = ["experiment", "method", "stamp", "members", "seed_values", "level", "initialisation", *counts]
    columns += [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    columns += ["compared_with", "metric", *_PAIR] + (["line", found.curve.key] if found.curve else [])
    rows = []
    for row in found.rows:
        cells: list[Any] = [row.name, row.method, row.stamp, " ".join(row.members), " ".join(row.seeds), asked.level, asked.initialisation, *counts.values()]
        for name in METRICS:
            cells += [row.values[name].value, row.values[name].low, row.values[name].high]
        pair = found.to(row.name)
        cells += [pair.second, asked.metric, *_pair(pair)] if pair else ["", asked.metric, *[""] * len(_PAIR)]
        rows.append(cells + list(place.get(row.name, ())))
    return csv_text(columns, rows)


def pairs_csv(found: Comparison) -> str:
    """One line a difference."""
    return csv_text(["first", "second", "metric", *_PAIR], [[pair.first, pair.second, found.settings.metric, *_pair(pair)] for pair in found.pairs])


_PAIR = ("difference", "difference_low", "difference_high", "p", "p_holm", "p_folds", "fold_differences", "p_other", "other_test")


def _pair(pair: Difference) -> list[Any]:
    folds, others = pair.folds or {}, list(pair.others.items())
    other = (others[0][1]["p_value"], others[0][0]) if len(others) == 1 else ("", "")
    return [pair.value, pair.low, pair.high, pair.p, pair.p_holm, folds.get("p_value"), folds.get("count"), *other]
