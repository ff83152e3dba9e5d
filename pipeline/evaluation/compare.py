"""Several experiments on the same patients: one row each, and paired differences to one of them with corrected p values.

    sonoscope compare EXPERIMENT EXPERIMENT ...        (names of `dvc exp show`, revisions, folders, MLflow runs)
    sonoscope compare A-s0+A-s1 B=B-s0+B-s1            (seeds of one experiment as one row)

Refuses what was not judged on the same videos in the same folds, and says what differs. `compare_pages` shows the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from pipeline.errors import DataError, some
from pipeline.evaluation.compare_numbers import METRICS, Difference, Measured, difference
from pipeline.evaluation.compare_rules import SEEDS, Group, joined, same_rules, tables_of, together, unequal
from pipeline.evaluation.compare_sources import Experiment, Finder, Level, read_experiment
from pipeline.evaluation.statistics import Interval, holm
from pipeline.registry import did_you_mean
from pipeline.tracking_context import short_keys

__all__ = ["LOWER_IS_BETTER", "Comparison", "Curve", "Row", "Settings", "compare", "compare_by", "with_holm"]

LOWER_IS_BETTER = ("log_loss", "brier")
@dataclass(frozen=True)
class Settings:
    """What is asked of a comparison."""

    metric: str = "balanced_accuracy"
    level: Level = "video"
    initialisation: str = "pretrained"
    reference: str | None = None
    """Name of a row; None for the first."""
    all_pairs: bool = False
    join_seeds: bool = False
    replicates: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise DataError(f"compare: unknown metric '{self.metric}'. Allowed: {', '.join(METRICS)}.{did_you_mean(self.metric, METRICS)}")


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    name: str
    method: str
    stamp: str
    members: tuple[str, ...]
    values: Mapping[str, Interval]
    """By metric: mean over seeds and repeats, interval over patients."""
    seeds: Mapping[str, float | None]
    """The chosen metric of each seed."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name, "method": self.method, "stamp": self.stamp, "members": list(self.members),
            "values": {name: interval.as_dict() for name, interval in self.values.items()}, "seeds": dict(self.seeds),
        }


@dataclass(frozen=True)
class Curve:
    """Rows as points of lines over one parameter."""

    key: str
    values: Sequence[str]
    """Of the parameter, in order."""
    lines: Mapping[str, Mapping[str, str]]
    """By line: value to name of the row. A line whose only value is "" does not know the parameter and is the same everywhere."""
    against: Mapping[str, str]
    """By row: the row it is compared with."""


@dataclass(frozen=True)
class Comparison:
    """All that was found."""

    settings: Settings
    rows: Sequence[Row]
    reference: str
    pairs: Sequence[Difference]
    """First minus second: every row minus the reference, or all pairs."""
    counts: Mapping[str, int]
    """patients, units, folds (of one repeat), repeats, seeds."""
    classes: Sequence[str]
    differing: Mapping[str, Sequence[str]]
    """Parameters that are not equal in all rows, with the value of each row ("" where a row has none)."""
    warnings: Sequence[str] = field(default_factory=list)
    curve: Curve | None = None
    who: str = "patient"
    """What is kept whole, drawn and exchanged: `patient`, or `group` where some patients are unknown or not kept apart."""

    def to(self, name: str) -> Difference | None:
        """The difference of a row to the row it is compared with: the reference, or on a curve its point at the same value."""
        other = self.curve.against.get(name, "") if self.curve else self.reference
        return next((pair for pair in self.pairs if (pair.first, pair.second) == (name, other)), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        asked = self.settings
        return {
            "schema": 1, "metric": asked.metric, "level": asked.level, "initialisation": asked.initialisation, "reference": self.reference,
            "replicates": asked.replicates, "confidence": asked.confidence, "seed": asked.seed, "all_pairs": asked.all_pairs,
            "lower_is_better": asked.metric in LOWER_IS_BETTER, "counts": dict(self.counts), "who": self.who, "classes": list(self.classes),
            "rows": [row.as_dict() for row in self.rows], "differences": [pair.as_dict() for pair in self.pairs],
            "differing_parameters": {key: list(values) for key, values in self.differing.items()}, "warnings": list(self.warnings),
            "curve": asdict(self.curve) if self.curve else None,
        }


def _words(name: str, finder: Finder, settings: Settings) -> tuple[str, list[Experiment]]:
    """`A`, `A+B` or `NAME=A+B`: what the row is called ("" for: find a name), and its experiments.

    A name that exists as it is written wins, since revisions may hold both characters.
    """
    def read(one: str) -> Experiment:
        return read_experiment(one, settings.initialisation, settings.level, finder)

    if not {"=", "+"} & set(name) or finder.knows(name):
        one = read(name)
        return one.name, [one]
    label, _, rest = name.partition("=") if "=" in name else ("", "", name)
    members = [read(part) for part in rest.split("+")] if all(rest.split("+")) else []
    if not members or ("=" in name and not label):
        raise DataError(f"compare: '{name}': write A+B+C or NAME=A+B+C, without spaces")
    return label, members


def measure(groups: Sequence[Group], settings: Settings) -> tuple[list[Measured], list[Row]]:
    """Rows with all metrics.

    Raises:
        DataError: see `same_rules`.
    """
    tables = tables_of(groups)
    same_rules([group.name for group in groups], tables, [group.members[0].classes for group in groups])
    measured, rows = [], []
    for group, table in zip(groups, tables, strict=True):
        one = Measured(group.name, table, group.members[0].classes, group.trained)
        rows.append(
            Row(
                group.name, group.members[0].method, group.stamp, tuple(member.name for member in group.members),
                one.intervals(settings.confidence), one.by_seed(settings.metric),
            )
        )
        measured.append(one)
    return measured, rows


def with_holm(pairs: Sequence[Difference]) -> list[Difference]:
    """The pairs with p values corrected over all of them that have one."""
    corrected = iter(holm([pair.p for pair in pairs if pair.p is not None]))
    return [replace(pair, p_holm=next(corrected)) if pair.p is not None else pair for pair in pairs]


def compare(names: Sequence[str], settings: Settings | None = None, finder: Finder | None = None) -> Comparison:
    """Metrics of every row and paired differences.

    Args:
        names: experiments; `A+B` or `NAME=A+B` joins experiments that differ only in their seeds.

    Raises:
        DataError: fewer than two rows, unknown names, experiments that cannot be joined or were judged under other rules.
    """
    settings = settings or Settings()
    found = _read(names, settings, finder or Finder())
    if settings.join_seeds:
        groups = together([one for _, members in found for one in members])
    else:
        groups = [joined(members, label) for label, members in found]
    called = _distinct([group.name for group in groups])
    if len(groups) < 2:
        raise DataError("compare: give at least two experiments; the first is the one the others are compared with (--reference names another)")
    reference = _reference(settings, called)
    place = called.index(reference)
    if settings.all_pairs:
        # The reference comes second in its pairs, so that its differences read as elsewhere.
        order = [place, *(index for index in range(len(called)) if index != place)]
        wanted = [(second, first) for first, second in combinations(order, 2)]
    else:
        wanted = [(index, place) for index in range(len(called)) if index != place]
    return _result(groups, settings, reference, wanted)


def compare_by(names: Sequence[str], key: str, settings: Settings | None = None, finder: Finder | None = None) -> Comparison:
    """Rows as points over one parameter: one line for each set of all other parameters; seeds are joined by themselves.

    Every point is compared with the reference line at the same value (or, with a single line, with the reference point).

    Raises:
        DataError: as `compare`; the parameter is unknown or has one value only.
    """
    settings = settings or Settings()
    groups = together([one for _, members in _read(names, settings, finder or Finder()) for one in members])
    key = _known_key(key, groups)
    values = sorted({group.params[key] for group in groups if key in group.params}, key=_in_order)
    if len(values) < 2:
        raise DataError(f"compare: {key} is {values[0]} in all experiments given; --by needs experiments that differ in it")
    lines: list[list[Group]] = []
    # What a method is decides which block of parameters it has.
    without = {key} if key != "pretrain.method" else {name for group in groups for name in group.params if name.startswith("methods.")} | {key}
    for group in groups:
        home = next((line for line in lines if not unequal(line[0].params, group.params, without)), None)
        lines.append([group]) if home is None else home.append(group)
    named = dict(zip(_line_names(lines, without), lines, strict=True))
    points = [
        (line, group.params.get(key, ""), replace(group, name=f"{line}, {group.params[key]}" if key in group.params else line))
        for line, members in named.items() for group in sorted(members, key=lambda one: _in_order(one.params.get(key, "")))
    ]
    called = [group.name for _, _, group in points]
    if len(named) > 1:
        base = _reference(settings, list(named))
        home = {value: group.name for line, value, group in points if line == base}
        against = {group.name: home.get(value, home.get("", "")) for line, value, group in points if line != base}
    else:
        base = _reference(settings, called)
        against = {name: base for name in called if name != base}
    wanted = [(called.index(name), called.index(other)) for name, other in against.items() if other]
    curve = Curve(key, values, {line: {value: group.name for one, value, group in points if one == line} for line in named}, against)
    return _result([group for _, _, group in points], settings, base, wanted, curve)


def _read(names: Sequence[str], settings: Settings, finder: Finder) -> list[tuple[str, list[Experiment]]]:
    try:
        return [_words(name, finder, settings) for name in names]
    finally:
        finder.close()


def _distinct(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"compare: two rows are called '{twice[0]}'; give each a name: NAME=EXPERIMENT")
    return names


def _reference(settings: Settings, names: Sequence[str]) -> str:
    reference = settings.reference or names[0]
    if reference not in names:
        raise DataError(f"compare: --reference '{reference}' is none of {', '.join(names)}.{did_you_mean(reference, names)}")
    return reference


def _known_key(key: str, groups: Sequence[Group]) -> str:
    """The full name of a parameter; its last part is enough where only one has it."""
    keys = sorted({name for group in groups for name in group.params})
    near = [name for name in keys if name == key or name.endswith(f".{key}")]
    if key in keys or len(near) == 1:
        return key if key in keys else near[0]
    if key in SEEDS:
        raise DataError(f"compare: --by {key}: seeds are repeats of one experiment and are joined, not drawn one by one")
    found = f" It may be {' or '.join(near)}." if near else did_you_mean(key, keys)
    raise DataError(f"compare: --by {key}: no experiment given has this parameter.{found}")


def _in_order(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _line_names(lines: Sequence[Sequence[Group]], without: Iterable[str]) -> list[str]:
    """The method, and where that is not enough the parameters in which lines of one method differ."""
    names = [line[0].members[0].method for line in lines]
    known = {key for line in lines for group in line for key in group.params}
    result = []
    for name, line in zip(names, lines, strict=True):
        peers = [other[0].params for other, called in zip(lines, names, strict=True) if called == name]
        keys = sorted({key for peer in peers for key in unequal(peers[0], peer, without)})
        result.append(", ".join([name, *(f"{short} {line[0].params.get(key, '-')}" for key, short in short_keys(keys[:3], known).items())]))
    return [f"{name} ({result[:place].count(name) + 1})" if result.count(name) > 1 else name for place, name in enumerate(result)]


def _result(
    groups: Sequence[Group], settings: Settings, reference: str, wanted: Sequence[tuple[int, int]], curve: Curve | None = None
) -> Comparison:
    measured, rows = measure(groups, settings)
    pairs = [
        difference(
            measured[one], measured[two], settings.metric, replicates=settings.replicates, confidence=settings.confidence, seed=settings.seed,
        )
        for one, two in wanted
    ]
    return Comparison(
        settings, rows, reference, with_holm(pairs), _counts(measured[0]), measured[0].classes, _differing(groups),
        _warnings(groups, settings, len(pairs)), curve, "group" if any(name.startswith("V") for name in measured[0].patients) else "patient",
    )


def _counts(one: Measured) -> dict[str, int]:
    table = one.table
    counted = {key: int(table[key].nunique()) for key in ("fold", "repeat", "seed")}
    counted["fold"] = int(table.groupby("repeat")["fold"].nunique().max())
    return {"patients": len(one.patients), "units": int(table["unit"].nunique()), **{f"{key}s": count for key, count in counted.items()}}


def _differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Parameters in which rows differ; those of a method only where several rows use it."""
    params = [group.params for group in groups]
    keys = sorted({key for one in params for key in one})
    values = {key: [one.get(key, "") for one in params] for key in keys}
    return {key: row for key, row in values.items() if len({value for value in row if value or not key.startswith("methods.")} - {""}) > 1}


def _warnings(groups: Sequence[Group], settings: Settings, pairs: int) -> list[str]:
    lines = []
    stamps: dict[str, list[str]] = {}
    for group in groups:
        stamps.setdefault(group.stamp or "no stamp", []).append(group.name)
    if len(stamps) > 1:
        listed = "; ".join(f"{stamp}: {some(names, 4)}" for stamp, names in stamps.items())
        lines.append(f"the rows were not made under the same rules ({listed}); a stamped number may be better than it would be for new patients")
    if len({(group.params.get("evaluate.aggregation"), group.params.get("finetune.pooling")) for group in groups}) > 1 and settings.level != "frame":
        lines.append("the rows join frames to videos in different ways (evaluate.aggregation, finetune.pooling)")
    if pairs > 40:
        lines.append(f"{pairs} pairs: after Holm's correction for so many only very small p values remain; a few comparisons planned beforehand say more")
    return lines
