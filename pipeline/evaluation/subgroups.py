"""Part: the same metrics in sub-groups of the videos (probe, source, sex, ...), each against all other videos.

A sub-group is compared on the classes that it and the rest both have. Intervals resample patients; the test exchanges
patients of equal labels between sub-group and rest; Holm's rule covers all comparisons of the evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.attributes import MANIFEST, from_manifest, read_attributes
from pipeline.errors import DataError
from pipeline.evaluation.forest import draw_forest
from pipeline.evaluation.metrics import Scores, classification_metrics
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.plots import readable
from pipeline.evaluation.report import (
    METRIC_NAMES,
    Picture,
    Section,
    Table,
    number,
    p_words,
    percent,
    plural,
    signed,
)
from pipeline.evaluation.statistics import (
    WeightedMetrics,
    draw_patients,
    expanded_percentiles,
    holm,
    patient_intervals,
)
from pipeline.evaluation.summary import average
from pipeline.evaluation.weighted import influence
from pipeline.files import atomic_write
from pipeline.registry import did_you_mean

__all__ = ["compare_with_rest", "subgroups_part"]

KEY = "subgroups"
METRICS = tuple(METRIC_NAMES)
METRIC = "balanced_accuracy"
"""The metric that is compared and drawn."""
FEWEST_PATIENTS = 5
UNKNOWN = "not given"


def compare_with_rest(
    inside: Scores, rest: Scores, *, replicates: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Balanced accuracy of a sub-group minus that of all other units, on the classes both have.

    A patient may have units on both sides; resampling draws him with all of them, and percentiles are expanded as those of
    all differences. The test exchanges patients between the sides who have the same labels and stand on one side only,
    because the sides may differ in how many patients of a class they have; it is a random permutation test with the
    observed arrangement counted in.

    Returns:
        difference, difference_low, difference_high, p (None where undefined), classes (compared), no_interval and reason (why
        there is no interval; no difference or p).
    """
    result: dict[str, Any] = dict.fromkeys(("difference", "difference_low", "difference_high", "p")) | {"classes": [], "no_interval": "", "reason": ""}
    common = np.intersect1d(inside.labels, rest.labels)
    result["classes"] = [inside.classes[place] for place in common]
    if len(common) < 2:
        return {**result, "reason": "sub-group and rest have fewer than two classes in common"}
    left, right = (_only(scores, common) for scores in (inside, rest))
    people = sorted({*left.patients.tolist(), *right.patients.tolist()})
    engines = [WeightedMetrics(scores, people) for scores in (left, right)]
    weights = np.vstack([np.ones((1, len(people))), draw_patients(len(people), replicates, seed)])
    values = engines[0].values(weights, [METRIC])[METRIC] - engines[1].values(weights, [METRIC])[METRIC]
    result["difference"] = float(values[0])
    sides = [influence(scores, [METRIC], people)[METRIC] for scores in (left, right)]
    low, high, _, reason = expanded_percentiles(values[1:], confidence, sides[0].minus_other_patients(sides[1]))
    result |= {"difference_low": low, "difference_high": high, "no_interval": reason}
    result["p"] = _exchanged(left, right, abs(values[0]), replicates, seed)
    if result["p"] is None:
        result["reason"] = "no p value, because no two patients of the same classes lie wholly on different sides"
    return result


def _only(scores: Scores, labels: np.ndarray) -> Scores:
    kept = np.isin(scores.labels, labels)
    return Scores(scores.labels[kept], scores.probabilities[kept], scores.patients[kept], scores.classes)


def _exchanged(left: Scores, right: Scores, observed: float, replicates: int, seed: int) -> float | None:
    """Two-sided p value; None where no patient can change sides."""
    both = set(left.patients.tolist()) & set(right.patients.tolist())
    # A patient on both sides stays there: under two names, one a side.
    sides = [np.array([f"{place}{name}" if name in both else f"-{name}" for name in scores.patients.tolist()]) for place, scores in enumerate((left, right))]
    joined = Scores(
        np.concatenate([left.labels, right.labels]), np.concatenate([left.probabilities, right.probabilities]), np.concatenate(sides), left.classes
    )
    engine = WeightedMetrics(joined)
    inside = set(sides[0].tolist())
    start = np.array([name in inside for name in engine.patients], np.float64)
    labels: dict[str, set[int]] = {}
    for name, label in zip(joined.patients.tolist(), joined.labels.tolist(), strict=True):
        labels.setdefault(name, set()).add(label)
    strata: dict[tuple[int, ...], list[int]] = {}
    for place, name in enumerate(engine.patients):
        if name.startswith("-"):
            strata.setdefault(tuple(sorted(labels[name])), []).append(place)
    movable = [places for places in strata.values() if 0 < start[places].sum() < len(places)]
    if not movable:
        return None
    rng = np.random.default_rng(seed)
    chosen = np.repeat(start[None], replicates, axis=0)
    for places in movable:
        chosen[:, places] = rng.permuted(chosen[:, places], axis=1)
    drawn = engine.values(chosen, [METRIC])[METRIC] - engine.values(1 - chosen, [METRIC])[METRIC]
    drawn = drawn[np.isfinite(drawn)]
    return float(((np.abs(drawn) >= observed - 1e-12).sum() + 1) / (len(drawn) + 1))


def _levels(context: Context) -> dict[str, dict[str, str]]:
    """Level of every video, by column."""
    carried = read_attributes(context.output.parent / "extract" / "attributes.csv")
    rows = context.store.manifest.rows if context.store is not None else []
    found = {}
    for name in context.config.evaluate.subgroups:
        if name in carried:
            found[name] = carried[name]
        elif name in MANIFEST:
            found[name] = from_manifest(rows, name)
        else:
            near = did_you_mean(name, [*carried, *MANIFEST])
            raise DataError(f"evaluate.subgroups: column '{name}' was not carried through extraction.{near} Run `dvc repro extract`.")
    return found


def _one_level(context: Context, table: pd.DataFrame, inside: np.ndarray, how: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, metrics and comparison of the rows `inside`; `reason` says why there are no metrics."""
    own = table[inside]
    patients, classes = own["patient"].nunique(), own["label"].nunique()
    result: dict[str, Any] = {"patients": int(patients), "videos": int(own["video"].nunique()), "reason": ""}
    if patients < FEWEST_PATIENTS:
        return {**result, "reason": f"fewer than {FEWEST_PATIENTS} {context.unit}s"}
    if classes < 2:
        return {**result, "reason": f"all videos have the class {own['label'].iloc[0]}"}
    scores = Scores.from_table(own, context.splits.classes)
    # Seeds and repeats one by one and averaged, as everywhere: ranking their videos together would be another AUROC.
    runs = list(Scores.by_run(own, context.splits.classes).values())
    values = average([classification_metrics(one) for one in runs])
    intervals = patient_intervals(runs, METRICS, confidence=how["confidence"])
    for name in METRICS:
        result |= {name: values[name], f"{name}_low": intervals[name].low, f"{name}_high": intervals[name].high}
    result["no_interval"] = intervals[METRIC].reason
    others = table[~inside]
    if others["patient"].nunique() < FEWEST_PATIENTS:
        return {**result, "comparison": {"difference": None, "p": None, "reason": f"the rest has fewer than {FEWEST_PATIENTS} {context.unit}s"}}
    return {**result, "comparison": compare_with_rest(scores, Scores.from_table(others, context.splits.classes), **how)}


def _column(context: Context, table: pd.DataFrame, levels: Mapping[str, str]) -> dict[str, Any]:
    settings = context.config.evaluate
    how = {"replicates": settings.bootstrap, "confidence": settings.confidence, "seed": settings.seed}
    level = table["video"].map(lambda video: levels.get(video) or UNKNOWN).to_numpy(str)
    names = sorted(set(level.tolist()), key=_order)
    if len(names) == 1:
        return {"levels": {}, "reason": f"all videos have the value '{names[0]}'" if names[0] != UNKNOWN else "it is not given for any video"}
    found = {name: _one_level(context, table, level == name, how) for name in names}
    first, *others = found.values()
    if len(others) == 1 and all((one.get("comparison") or {}).get("difference") is not None for one in found.values()):
        # Two groups are one comparison seen from both sides.
        one = first["comparison"]
        turned = {end: None if one[key] is None else -one[key] for end, key in
                  (("difference", "difference"), ("difference_low", "difference_high"), ("difference_high", "difference_low"))}
        others[0]["comparison"] = {**one, **turned}
    return {"levels": found, "reason": ""}


def _order(name: str) -> tuple[Any, ...]:
    """Numbers by value, `below 3` before `3 to below 5`, texts by name, what is unknown last."""
    digits = re.search(r"\d+(\.\d+)?(e[+-]\d+)?", name)
    return (name == UNKNOWN, digits is None, float(digits[0]) if digits else 0.0, not name.startswith("below"), name)


def _adjust(numbers: Mapping[str, Any], confidence: float) -> int:
    """Write `p_holm` and `clearly_worse` into the comparisons; the number of tests. A column of two groups counts once."""
    tests: list[list[dict[str, Any]]] = []
    for column in numbers.values():
        comparisons = [one["comparison"] for one in column["levels"].values() if (one.get("comparison") or {}).get("p") is not None]
        tests += [comparisons] if len(column["levels"]) == 2 and comparisons else [[one] for one in comparisons]
    for group, p_value in zip(tests, holm([group[0]["p"] for group in tests]) if tests else [], strict=True):
        for one in group:
            high = one["difference_high"]
            one |= {"p_holm": p_value, "clearly_worse": bool(high is not None and high < 0 and p_value <= 1 - confidence)}
    return len(tests)


def subgroups_part(context: Context) -> Part | None:
    """Numbers, warnings and the section of the sub-groups; None where params.yaml names no column."""
    if not context.config.evaluate.subgroups:
        return None
    table = context.tables["video"]
    table = table[table["init"] == context.inits[0]]
    columns = _levels(context) if context.store is not None else {}
    numbers: dict[str, Any] = {name: _column(context, table, levels) for name, levels in columns.items()}
    if context.store is None:
        numbers = {name: {"levels": {}, "reason": "the frame store is not there"} for name in context.config.evaluate.subgroups}
    tests = _adjust(numbers, context.config.evaluate.confidence)
    judged = [(column, level, one) for column, found in numbers.items() for level, one in found["levels"].items()]
    warnings = [_warning(context, *one) for one in judged if (one[2].get("comparison") or {}).get("clearly_worse")]
    compact = {
        column: {level: one[METRIC] for level, one in found["levels"].items() if METRIC in one} for column, found in numbers.items()
    }
    _write(context, judged)
    return Part(
        KEY, numbers, _section(context, numbers, judged, tests, warnings), compact={name: one for name, one in compact.items() if one},
        headline={f"{KEY}.clearly_worse": float(len(warnings))} if judged else {}, warnings=warnings,
        cautions=[f"{line}." for line in warnings],
    )


def _warning(context: Context, column: str, level: str, one: Mapping[str, Any]) -> str:
    found = one["comparison"]
    return (
        f"Clearly worse for {readable(column)} {level} ({plural(one['patients'], context.unit)}): balanced accuracy {number(one[METRIC])}, "
        f"{signed(found['difference'])} against all other videos ({percent(context.config.evaluate.confidence)} interval "
        f"{signed(found['difference_low'])} to {signed(found['difference_high'])}, {p_words(found['p_holm'])} after Holm)"
    )


def _write(context: Context, judged: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """subgroups.csv, one row a level."""
    rows, stamp = [], context.metrics[context.inits[0]]["stamp"]
    for column, level, one in judged:
        found = one.get("comparison") or {}
        shown = ("patients", "videos", *(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")), "reason")
        compared = ("difference", "difference_low", "difference_high", "p", "p_holm")
        rows.append({"column": column, "level": level, **{key: one.get(key) for key in shown}, **{key: found.get(key) for key in compared}, "stamp": stamp})
    atomic_write(context.output / "subgroups.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def _section(
    context: Context, numbers: Mapping[str, Any], judged: Sequence[tuple[str, str, Mapping[str, Any]]], tests: int, warnings: Sequence[str]
) -> Section:
    title = "Is it as good for every sub-group?"
    words = [f"{readable(column).capitalize()}: not shown, because {found['reason']}." for column, found in numbers.items() if found["reason"]]
    if not judged:
        return Section(KEY, title, words)
    words.insert(0, (
        "Each sub-group of the videos is judged by itself and compared with all other videos, on the classes that both have. "
        + (f"{plural(tests, 'comparison')} could be tested; p values hold for all of them together (Holm). " if tests else "No comparison could be tested. ")
        + "A sub-group of few patients can be much worse without that being shown here: the interval says how much is left open."
    ))
    tables = [_table(context, column, found["levels"]) for column, found in numbers.items() if found["levels"]]
    return Section(KEY, title, words, [_picture(context, numbers)], tables, " ".join(f"{line}." for line in warnings), layout="solo")


def _table(context: Context, column: str, levels: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = (METRIC_NAMES[METRIC], METRIC_NAMES["macro_auroc"], "Against the rest", "p (Holm)")
    columns = [readable(column).capitalize(), f"{context.unit.capitalize()}s", "Videos", *shown]
    rows: list[list[Any]] = []
    reasons: dict[str, list[str]] = {}
    bare: dict[str, list[str]] = {}
    open_gaps: dict[str, list[str]] = {}
    for level, one in levels.items():
        found = one.get("comparison") or {}
        cells = []
        for name in (METRIC, "macro_auroc"):
            low, high = one.get(f"{name}_low"), one.get(f"{name}_high")
            cells.append(number(one.get(name)) + (f" ({number(low)} to {number(high)})" if low is not None and high is not None else ""))
        low, high = found.get("difference_low"), found.get("difference_high")
        gap = signed(found.get("difference")) + (f" ({signed(low)} to {signed(high)})" if low is not None else "")
        rows.append([level, one["patients"], one["videos"], *cells, gap, p_words(found["p_holm"]).removeprefix("p = ").removeprefix("p ")
                     if found.get("p_holm") is not None else "–"])
        if reason := one["reason"] or found.get("reason"):
            reasons.setdefault(reason, []).append(level)
        if reason := one.get("no_interval"):
            bare.setdefault(reason, []).append(level)
        if reason := found.get("no_interval"):
            open_gaps.setdefault(reason, []).append(level)
    note = f"Per video, {percent(context.config.evaluate.confidence)} intervals over {context.unit}s."
    if reasons:
        note += f" No value where there is a dash: {_listed(reasons)}."
    if bare:
        vary = "" if open_gaps else " The difference may still have one, since all other videos vary."
        note += f" No interval of balanced accuracy: {_listed(bare)}.{vary}"
    if open_gaps:
        note += f" No interval of the difference: {_listed(open_gaps)}."
    if sum(one["patients"] for one in levels.values()) > context.metrics["patients"]:
        note += f" {context.unit.capitalize()}s add up to more than {context.metrics['patients']}: one with videos in several of these groups counts in each."
    return Table(f"By {readable(column)}", columns, rows, columns[1:], note)


def _listed(reasons: Mapping[str, Sequence[str]]) -> str:
    """`48, 64: fewer than 3 patients; 80: ...`."""
    return "; ".join(f"{', '.join(levels)}: {reason}" for reason, levels in reasons.items())


def _picture(context: Context, numbers: Mapping[str, Any]) -> Picture:
    lines: list[dict[str, Any]] = []
    for column, found in numbers.items():
        if found["levels"]:
            lines.append({"name": readable(column), "head": True})
        for level, one in found["levels"].items():
            note = f"{one[METRIC]:.2f}  ({one['patients']})" if METRIC in one else f"–  ({one['patients']})"
            lines.append({"name": level, "value": one.get(METRIC), "low": one.get(f"{METRIC}_low"), "high": one.get(f"{METRIC}_high"), "note": note})
    whole = context.metrics[context.inits[0]]["video"][METRIC]
    path = context.output / "pictures" / "subgroups.png"
    draw_forest(
        path, lines, f"Balanced accuracy per video ({context.unit}s)", line=whole, line_name="all videos", chance=context.metrics["chance"],
        stamp=context.metrics["stamp"],
    )
    spoken = "; ".join(f"{line['name']} {number(line['value'])}" for line in lines if line.get("value") is not None)
    return Picture(
        path, f"Balanced accuracy of sub-groups with intervals: {spoken or 'none could be judged'}; all videos {number(whole)}.",
        f"Dots: value; lines: {percent(context.config.evaluate.confidence)} intervals over {context.unit}s; in brackets: number of {context.unit}s.",
    )
