"""Can the probabilities be trusted? Calibration, thresholds and net benefit of an evaluation, and the report's section.

Everything that is fitted is fitted item by item on its inner validation patients; test rows are only judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.calibration import BINS
from pipeline.evaluation.calibration_plots import draw_decision_curves, draw_reliability
from pipeline.evaluation.calibration_results import DONE, RATES, RAW, Fitted, Judged, judge, nothing_fitted, write_calibration
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.report import Picture, Section, Table, init_name, network_words, number, percent, plural, run_words, signed

__all__ = ["calibration_part"]

MAX_PANELS, MAX_ROWS = 6, 40
"""Classes drawn, and rows of the table of items; the files hold all."""
NAMES = {
    "log_loss": "Log loss",
    "brier": "Brier score",
    "reliability": "– reliability (0 is best)",
    "resolution": "– resolution (more is better)",
    "uncertainty": "– uncertainty (of the labels)",
    "within": "– within bins",
    "ece": "Calibration error, bins of equal counts",
    "ece_equal_width": "Calibration error, bins of equal width",
    "ece_by_chance": "Calibration error by luck alone",
}


def calibration_part(context: Context) -> Part:
    """Fit, judge, write calibration*.csv and decision_curve*.csv, draw, and describe.

    Raises:
        DataError: `evaluate.positive_class` is none of the classes.
    """
    settings, classes = context.config.evaluate, context.splits.classes
    if settings.positive_class is not None and settings.positive_class not in classes:
        raise DataError(f"evaluate.positive_class: got {settings.positive_class!r}; allowed: null, {', '.join(classes)}")
    wanted = [settings.positive_class] if settings.positive_class else list(classes)
    judged = {init: judge(context, init, wanted) for init in context.inits}
    first = context.inits[0]
    numbers: dict[str, Any] = {
        "method": settings.calibration, "rule": _rule(context), "positive_class": settings.positive_class,
        "caution": _caution(context, judged[first]), **{init: one.numbers for init, one in judged.items()},
    }
    write_calibration(context, judged, wanted)
    values = {
        init: {f"{name}{end}": state[name] for name in ("ece", "brier", "log_loss") for state, end in _ends(one)} for init, one in judged.items()
    }
    headline = {f"calibration.{init}.{name}": value for init, found in values.items() for name, value in found.items()}
    compact = {init: {name: value for name, value in found.items() if name.startswith("ece")} for init, found in values.items()}
    return Part("calibration", numbers, _section(context, judged, wanted), compact, headline)


def _ends(one: Judged) -> list[tuple[Mapping[str, Any], str]]:
    """Numbers of each state and the ending of their names."""
    return [(one.numbers["before"], ""), *([(one.numbers["after"], "_calibrated")] if one.changed else [])]


def _rule(context: Context) -> str:
    rule = context.config.evaluate.threshold
    return "largest sensitivity + specificity" if rule.rule == "youden" else f"{rule.rule} of at least {rule.target:g}"


def _caution(context: Context, first: Judged) -> str:
    """What a probability of this report is worth, from the facts."""
    before, after = first.numbers["before"], first.last
    if not first.changed:
        return (
            f"Probabilities are not calibrated ({_reasons(first.items)}); a 0.9 does not mean nine in ten. Certainty and share of right answers "
            f"differ by {number(before['ece'])} on average over the test videos ({number(before['ece_by_chance'])} would be luck)."
        )
    some = "" if all(one.calibrator.fitted for one in first.items) else f" in {first.numbers['items_calibrated']} of {len(first.items)} models"
    return (
        f"Probabilities beside the cases are the network's own; a 0.9 does not mean nine in ten. Calibrated on inner validation patients{some}, "
        f"certainty and share of right answers differ by {number(after['ece'])} on average over the test videos ({number(before['ece'])} before; "
        f"{number(after['ece_by_chance'])} would be luck), and that holds for this collection only."
    )


def _reasons(items: Sequence[Fitted]) -> str:
    found = list(dict.fromkeys(one.calibrator.reason for one in items if one.calibrator.reason))
    return found[0] if len(found) == 1 else f"{found[0]}; and {plural(len(found) - 1, 'other reason')}"


def _section(context: Context, judged: Mapping[str, Judged], wanted: Sequence[str]) -> Section:
    first = judged[context.inits[0]]
    tables = [_state_table(context, judged), _line_table(context, first)]
    # Without patients to fit on, both would be dashes; the words say why.
    if not all(nothing_fitted(one.items) for one in judged.values()):
        tables += [_threshold_table(context, judged, wanted), _item_table(context, judged)]
    return Section(
        key="calibration", title="Can the probabilities be trusted?", words=_words(context, first),
        pictures=[_reliability_picture(context, first), _decision_picture(context, first, wanted)], tables=tables, after="folds", layout="wide",
    )


def _words(context: Context, first: Judged) -> list[str]:
    settings, before, after = context.config.evaluate, first.numbers["before"], first.last
    unit = context.unit
    error = f"{number(before['ece'])} as predicted" + (f" and {number(after['ece'])} after calibration" if first.changed else "")
    trust = (
        f"A probability can be trusted when, of all videos for which the network is 80 % sure, about 80 % are judged rightly. How far certainty and "
        f"truth lie apart on average, the expected calibration error, is {error}; {number(after['ece_by_chance'])} would be seen by luck alone with "
        f"these {plural(context.metrics['videos'], 'video')} of {plural(context.metrics['patients'], unit)} if every probability were right."
    )
    counts = sorted({one.calibrator.patients for one in first.items})
    spread = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if first.changed:
        method = {"temperature": "Temperature scaling (one number a model)", "platt": "Platt scaling (a slope and an offset a class)"}
        fitted = (
            f"{method[settings.calibration]} was fitted for each model on its own {spread} inner validation {unit}s and never on test {unit}s; a prior "
            f"holds it near no change where {unit}s are few. "
        )
        chosen = {"inner": "training epoch", "nested": "recipe and the training epoch"}.get(context.config.finetune.selection)
        if chosen:
            fitted += f"The same {unit}s chose the {chosen}, which makes certainty look a little better there than on new {unit}s. "
        fitted += (
            "It changes the answer for no video, so accuracy, F1 and confusion per video hold for it too; AUROC and what is averaged per "
            f"{unit}, where probabilities themselves count, may differ a little." if not first.numbers["answers_changed"] else
            f"It changes the answer for {plural(first.numbers['answers_changed'], 'video')}; all other numbers of this report are those of the "
            "network as it is."
        )
        fitted += f" {_change_words(context, first.numbers['difference'])}"
    else:
        fitted = f"Nothing was calibrated{'' if any(one.calibrator.patients for one in first.items) else ', and no threshold was chosen'}: "
        fitted += f"{_reasons(first.items)}."
    benefit = (
        "The decision curve counts what acting on the network gains: videos rightly called, minus videos wrongly called at the price that the threshold "
        "stands for (at 0.2, four wrong calls cancel one right one). The network is worth using only at thresholds where its line lies above both "
        "calling everyone and calling no one. The share of each class here is that of this collection, not of a clinic; net benefit and predictive "
        "values change with it."
    )
    return [trust, fitted, benefit]


def _change_words(context: Context, change: Mapping[str, float | None]) -> str:
    """Whether calibration helped on the test patients."""
    value, low, high = (change[f"log_loss{end}"] for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return "Whether it helped on the test videos cannot be said: no interval could be computed."
    said = f"{signed(value)} ({percent(context.config.evaluate.confidence)} interval {signed(low)} to {signed(high)})"
    if high < 0:
        return f"It helped: log loss on the test videos changed by {said}."
    if low > 0:
        return f"It did harm: log loss on the test videos changed by {said}. The probabilities as predicted are the better ones here."
    return f"Log loss on the test videos changed by {said}, which shows neither gain nor harm."


def _reliability_picture(context: Context, first: Judged) -> Picture:
    init = context.inits[0]
    path = context.output / "pictures/reliability.png"
    panels = {f"{init_name(context.metrics, init, capital=True)}, {state}": rows for (state, name), rows in first.points.items() if not name}
    draw_reliability(path, panels, init, context.metrics[init]["stamp"])
    spoken = "; ".join(
        f"{title}: " + ", ".join(f"{number(row['probability'])} sure, {number(row['frequency'])} right" for row in rows) for title, rows in panels.items()
    )
    all_runs = f", all {runs} counted" if (runs := run_words(context.metrics)) else ""
    return Picture(
        path, f"Reliability diagram. {spoken}.",
        f"Dots: groups of test videos of about equal size, from the least to the most certain (bars below: videos in the group{all_runs}); lines: "
        f"{percent(context.config.evaluate.confidence)} intervals over {context.unit}s (none where all videos of a group are alike); "
        "dotted: perfect. Dots below it mean too sure, dots above it too modest.",
    )


def _decision_picture(context: Context, first: Judged, wanted: Sequence[str]) -> Picture:
    path = context.output / "pictures/decision_curve.png"
    init, shown = context.inits[0], list(wanted)[:MAX_PANELS]
    draw_decision_curves(path, {name: first.curves[name] for name in shown}, context.metrics[init]["stamp"])
    spoken = []
    for name in shown:
        curve = list(first.curves[name].values())[-1]
        better = curve["threshold"][curve["net_benefit"] > np.maximum(curve["treat_all"], 0) + 1e-12]
        spoken.append(f"{name}: " + (f"above both between thresholds {better[0]:.2f} and {better[-1]:.2f}" if len(better) else "nowhere above both"))
    left = f" The first {MAX_PANELS} of {len(wanted)} classes are drawn; decision_curve_all.csv has all." if len(wanted) > MAX_PANELS else ""
    return Picture(
        path,
        f"Decision curves of the {network_words(context.metrics, init)} against calling everyone and calling no one. {'; '.join(spoken)}.",
        f"{network_words(context.metrics, init, capital=True)}, each class against the rest, out-of-fold videos; shaded: "
        f"{percent(context.config.evaluate.confidence)} band over {context.unit}s.{left}",
    )


def _range(values: Mapping[str, Any], name: str) -> str:
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    text = number(values[name])
    return text if low is None or high is None or values[name] is None else f"{text} ({number(low)} to {number(high)})"


def _state_table(context: Context, judged: Mapping[str, Judged]) -> Table:
    columns, cells = ["Per video"], []
    for init, one in judged.items():
        for key, state in (("before", RAW), ("after", DONE)) if one.changed else (("before", RAW),):
            columns.append(f"{init_name(context.metrics, init, capital=True)}, {state}")
            cells.append(one.numbers[key])
    rows = [[words, *(_range(values, name) for values in cells)] for name, words in NAMES.items()]
    gains = [
        f"{init_name(context.metrics, init)}: log loss {_range(one.numbers['difference'], 'log_loss')}, "
        f"Brier score {_range(one.numbers['difference'], 'brier')}"
        for init, one in judged.items() if one.numbers["difference"]
    ]
    note = (
        f"Lower is better, but for resolution. Brier score = reliability − resolution + uncertainty + within bins, summed over classes (Murphy 1973). "
        f"Calibration error: {BINS} bins of the certainty of the answer; with few videos much of it is luck, which the last row estimates."
    )
    if gains:
        note += f" Change by calibration with {percent(context.config.evaluate.confidence)} interval, below 0 a gain: {'; '.join(gains)}."
    return Table("Quality of the probabilities", columns, rows, columns[1:], note)


def _line_table(context: Context, first: Judged) -> Table:
    columns = ["Class", "Probabilities", "Mean probability", "Share of videos", "Slope", "Intercept"]
    rows = []
    for name in context.splits.classes:
        for key, state in (("before", RAW), ("after", DONE)) if first.changed else (("before", RAW),):
            values = first.numbers[key]["per_class"][name]
            rows.append([name, state, number(values["said"]), number(values["seen"]), _range(values, "slope"), _range(values, "intercept")])
    note = (
        "Each class against the rest. Slope 1 is right; below 1 the probabilities are too extreme, above 1 too modest. Intercept 0 is right; below 0 "
        "the class is given too much probability on the whole (Van Calster 2019). A dash: the class is told apart without error, or seen too rarely, "
        "so that no line can be fitted."
    )
    return Table(f"Slope and intercept, {network_words(context.metrics, context.inits[0])}", columns, rows, columns[2:], note)


def _threshold_table(context: Context, judged: Mapping[str, Judged], wanted: Sequence[str]) -> Table:
    columns = ["Class", "Network", "Thresholds", "Sensitivity", "Specificity", "PPV", "NPV"]
    rows, reasons, least = [], {}, []
    for name in wanted:
        for init, one in judged.items():
            values = one.numbers["thresholds"][name]
            found = sorted({number(value) for value in values["thresholds"] if value is not None})
            spread = "\u00a0to\u00a0".join(dict.fromkeys([found[0], found[-1]])) if found else "–"
            rows.append([name, init_name(context.metrics, init), spread, *(_range(values, rate) for rate in RATES)])
            if values["reason"]:
                reasons[f"{init_name(context.metrics, init, capital=True)}: {values['reason']}."] = None
        least.append(f"{name} {min(one.numbers['thresholds'][name]['least_positive_patients'] for one in judged.values())}")
    note = (
        f"A video is called a class when its probability reaches the threshold that the model's inner validation {context.unit}s gave "
        f"({_rule(context)}); test videos are only counted. Each class against the rest; {percent(context.config.evaluate.confidence)} intervals over "
        f"{context.unit}s. PPV and NPV hold for the share of the class in these data only. Fewest validation {context.unit}s of the class behind a "
        f"threshold: {', '.join(least)}; a handful makes a rough one."
    )
    if any(one.numbers["thresholds"][name][rate] is not None and one.numbers["thresholds"][name][f"{rate}_low"] is None
           for one in judged.values() for name in wanted for rate in RATES):
        reasons[f"No interval: all {context.unit}s concerned gave the same result, or there is only one."] = None
    return Table("At one threshold", columns, rows, columns[3:], " ".join([note, *reasons]))


def _item_table(context: Context, judged: Mapping[str, Judged]) -> Table:
    items = [one for found in judged.values() for one in found.items]
    classes = list(context.splits.classes)[:MAX_PANELS]
    platt = context.config.evaluate.calibration == "platt"
    remarks = any(one.calibrator.reason for one in items)
    columns = ["Network", "Seed", "Fold", f"{context.unit.capitalize()}s", "Videos", "Temperature", *(["Offsets"] if platt else []), *classes]
    rows = []
    for one in items[:MAX_ROWS]:
        card, fit = one.item.card, one.calibrator
        offsets = [" ".join(number(value) for value in fit.bias) if fit.fitted else "–"] if platt else []
        rows.append([
            init_name(context.metrics, card.init), card.seed, card.fold, fit.patients, fit.units, number(1 / fit.scale if fit.fitted else None), *offsets,
            *(number(one.thresholds[name]) for name in classes), *([fit.reason] if remarks else []),
        ])
    note = (
        f"{context.unit.capitalize()}s and videos: inner validation. Temperature above 1: the network was too sure; below 1: too modest. "
        "Classes: their thresholds."
    )
    if len(items) > MAX_ROWS or len(context.splits.classes) > len(classes):
        note += " details.json has all models and classes."
    numeric = columns[1:]
    return Table("What was fitted, model by model", [*columns, *(["Remark"] if remarks else [])], rows, numeric, note)
