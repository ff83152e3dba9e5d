"""`sonoscope protocols`: the same data and model under the usual protocols, so that one sees how much the shortcuts flatter.

Every protocol is an ordinary experiment (`dvc exp run`) that differs in three parameters; the table reads the finished ones.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError, DataError, PipelineError, some
from pipeline.evaluation.compare import with_holm
from pipeline.evaluation.compare_numbers import Difference, Measured, difference
from pipeline.evaluation.compare_rules import same_rules, told_apart
from pipeline.evaluation.compare_sources import Experiment, Finder, Level, read_experiment
from pipeline.evaluation.compare_tables import NAMES
from pipeline.registry import did_you_mean

__all__ = ["PROTOCOLS", "Protocol", "choose_protocols", "commands", "run_protocols", "show_protocols"]

KEYS = ("data.group", "finetune.selection", "pretrain.scope")
METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auroc")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Protocol:
    """One way of judging; `values` are those of `KEYS`."""

    key: str
    title: str
    values: tuple[str, str, str]

    @property
    def overrides(self) -> list[str]:
        """`-S key=value ...`"""
        return [word for key, value in zip(KEYS, self.values, strict=True) for word in ("-S", f"{key}={value}")]


PROTOCOLS = (
    Protocol("patient-inner", "patients apart, epoch by inner patients (honest)", ("patient", "inner", "fold")),
    Protocol("patient-test", "patients apart, best epoch on test", ("patient", "best_on_test", "fold")),
    Protocol("video-inner", "videos apart, epoch by inner videos", ("video", "inner", "fold")),
    Protocol("video-test", "videos apart, best epoch on test (often published)", ("video", "best_on_test", "fold")),
    Protocol("frame-test", "frames apart, best epoch on test", ("frame", "best_on_test", "fold")),
    Protocol("patient-transductive", "patients apart, pretraining has seen the test videos", ("patient", "inner", "all")),
)
"""The honest one first. The last is run only when asked for: it needs an encoder of its own."""
HONEST = ("inner", "nested", "last")
"""Selections that never see the test patients; of the rows that also keep patients apart and pretrain by fold, others are compared with the first."""
USUAL = tuple(protocol.key for protocol in PROTOCOLS[:-1])


def choose_protocols(keys: Sequence[str]) -> list[Protocol]:
    """Protocols by key, in the order of `PROTOCOLS`; the usual five for [].

    Raises:
        ConfigError: an unknown key.
    """
    known = {protocol.key: protocol for protocol in PROTOCOLS}
    for key in keys:
        if key not in known:
            raise ConfigError(f"protocols --rows: unknown protocol '{key}'. Allowed: {', '.join(known)}.{did_you_mean(key, known)}")
    wanted = set(keys or USUAL)
    return [protocol for protocol in PROTOCOLS if protocol.key in wanted]


def commands(overrides: Sequence[str], chosen: Sequence[Protocol], *, prefix: str = "protocol", queue: bool = False) -> dict[str, list[str]]:
    """The command of every experiment, by its name.

    Args:
        overrides: `key=value` for all of them, as `dvc exp run -S` takes them.
        queue: put them into DVC's queue; otherwise each is run in a copy of the project, and params.yaml stays as it is.

    Raises:
        ConfigError: an override sets what the protocols differ in.
    """
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        if key in KEYS:
            raise ConfigError(f"protocols: {key} is what the protocols differ in and cannot be set for all of them; --rows chooses protocols")
    shared = [word for override in overrides for word in ("-S", override)]
    return {
        f"{prefix}-{protocol.key}": [
            "dvc", "exp", "run", "--queue" if queue else "--temp", "--name", f"{prefix}-{protocol.key}", *shared, *protocol.overrides,
        ]
        for protocol in chosen
    }


def run_protocols(overrides: Sequence[str], chosen: Sequence[Protocol], *, prefix: str = "protocol", queue: bool = False) -> list[str]:
    """Run the experiments one after another, or queue them. Returns their names.

    Raises:
        ConfigError: as `commands`.
        PipelineError: an experiment of such a name exists, or one has failed.
    """
    words = commands(overrides, chosen, prefix=prefix, queue=queue)
    finder = Finder()
    taken = [name for name in words if finder.knows(name)]
    finder.close()
    if taken:
        raise PipelineError(
            f"protocols: {', '.join(taken)} exist{'s' if len(taken) == 1 else ''} already. `sonoscope protocols --show {' '.join(taken)}` shows "
            f"the table; another --prefix, --rows for those that are missing, or `dvc exp remove` makes room for new ones"
        )
    for name, command in words.items():
        print(f"$ {shlex.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if code:
            raise PipelineError(
                f"protocols: {name} ended with exit code {code}; its own message stands above. Put that right and run the others with --rows"
            )
    return list(words)


def _protocol_of(experiment: Experiment) -> Protocol:
    """Which protocol made an experiment; one of none of the listed kinds is described by its values."""
    group, selection, scope = (experiment.params.get(key, "") for key in KEYS)
    # A split by frame shows all videos to pretraining, whatever the scope.
    found = [one for one in PROTOCOLS if one.values[:2] == (group, selection) and (one.values[2] == scope or group == "frame")]
    if found:
        return found[0]
    other = Protocol("-", f"{group}s apart, selection {selection}" + (", transductive" if scope == "all" else ""), (group, selection, scope))
    return replace(other, title=f"{other.title} (honest)") if _honest(other) else other


def _honest(protocol: Protocol) -> bool:
    """Whether its numbers hold for new patients."""
    group, selection, scope = protocol.values
    return group == "patient" and selection in HONEST and scope == "fold"


def _cell(value: float | None, low: float | None = None, high: float | None = None, sign: str = "") -> str:
    """`0.71 (0.55 to 0.85)`, or a dash."""
    if value is None:
        return "–"
    # + 0.0 turns -0.0 into 0.0
    shown, *ends = (None if number is None else f"{round(number, 2) + 0.0:{sign}.2f}" for number in (value, low, high))
    return str(shown) if None in ends else f"{shown} ({ends[0]} to {ends[1]})"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _gap(row: Experiment, honest: Experiment, metric: str) -> tuple[str, Difference | None, str]:
    """Difference to the honest row as a cell and, where it is tested, with its p; and why there is no test (or "", or "folds" for the protocol's own)."""
    if row.classes != honest.classes:
        return "–", None, f"{row.name} tells apart other classes ({', '.join(row.classes)}), so nothing is subtracted."
    first, second = (Measured(one.name, one.table, one.classes) for one in (row, honest))
    try:
        same_rules([honest.name, row.name], [honest.table, row.table], [honest.classes, row.classes])
    except DataError as error:
        values = [one.intervals(CONFIDENCE)[metric].value for one in (first, second)]
        plain = None if None in values else values[0] - values[1]
        # Other things kept apart make other folds, which is what the protocol is; anything else is worth its own words.
        mine, theirs = (_protocol_of(one).values[0] for one in (row, honest))
        said = "folds" if mine != theirs else (
            f"No test for {row.name}, so the difference is that of the two values; `sonoscope compare` refuses it, too: {str(error).removeprefix('compare: ')}"
        )
        return _cell(plain, sign="+"), None, said
    gap = difference(first, second, metric, confidence=CONFIDENCE)
    return _cell(gap.value, gap.low, gap.high, "+"), gap, ""


def show_protocols(names: Sequence[str], *, initialisation: str = "pretrained", level: Level = "video", prefix: str = "protocol") -> str:
    """The table of finished experiments as Markdown, with its notes. Without names: those of `prefix` that exist.

    Raises:
        DataError: none or an unknown experiment, or predictions that cannot be trusted.
    """
    finder = Finder()
    wanted = list(names) or [name for one in PROTOCOLS if finder.knows(name := f"{prefix}-{one.key}")]
    if not wanted:
        finder.close()
        raise DataError(f"protocols: there is no experiment {prefix}-patient-inner or any other of that prefix; run `sonoscope protocols` first")
    rows = [read_experiment(name, initialisation, level, finder) for name in wanted]
    finder.close()
    rows.sort(key=_place)
    return _markdown(rows, level)


def _place(row: Experiment) -> tuple[int, int]:
    """Where a row stands: honest ones first, by `HONEST`, the others by `PROTOCOLS`, unknown ones last."""
    protocol = _protocol_of(row)
    if _honest(protocol):
        return 0, HONEST.index(protocol.values[1])
    return 1, PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)


def _markdown(rows: Sequence[Experiment], level: str) -> str:
    honest = rows[0] if _honest(_protocol_of(rows[0])) else None
    metric = METRICS[0]
    titles = [_protocol_of(row).title for row in rows]
    columns = ["protocol", *(NAMES[name] for name in METRICS), f"{NAMES[metric]} minus honest", "p", "p (Holm)", "stamp"]
    gaps = {id(row): _gap(row, honest, metric) for row in rows if honest is not None and row is not honest}
    pairs = {key: pair for key, (_, pair, _) in gaps.items() if pair}
    tested = dict(zip(pairs, with_holm(list(pairs.values())), strict=True))
    lines, untested, notes = [], [], []
    for row in rows:
        measured = Measured(row.name, row.table, row.classes).intervals(CONFIDENCE)
        gap, _, why = gaps.get(id(row), ("" if row is honest else "–", None, ""))
        pair = tested.get(id(row))
        ps = ["" if row is honest else "–"] * 2 if pair is None else [_p(pair.p), _p(pair.p_holm)]
        cells = [_cell(one.value, one.low, one.high) for one in (measured[name] for name in METRICS)]
        title = _protocol_of(row).title
        lines.append([f"{title}: {row.name}" if titles.count(title) > 1 else title, *cells, gap, *ps, row.stamp or "none"])
        if why == "folds":
            untested.append(row.name)
        elif why:
            notes.append(why)
    base = honest or rows[0]
    if level != "frame" and any(row.params.get("data.group") == "frame" for row in rows):
        notes.append(f"In the split by frame a {level} counts once a fold, by the frames which that fold tests.")
    for row in rows:
        others = told_apart(row.params, base.params, KEYS)
        if others:
            notes.append(f"{row.name} differs from {base.name} in more than the protocol: {some(others, 6)}.")
    return "\n".join([
        *(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines)), "",
        f"Per {level}; {_rests_on(base)}. Intervals: {CONFIDENCE:.0%} over patients; where only videos are kept apart, over videos, which that "
        "protocol takes for independent.",
        *([f"p: permutation test by patients; p (Holm): corrected for the {len(tested)} tests of this table."] if len(tested) > 1 else []),
        *([f"No test for {', '.join(untested)}: the folds are not those of {base.name}, so the difference is that of the two values."]
          if untested else []),
        *([f"No row is honest (patients apart, selection {' or '.join(HONEST)}, no transductive pretraining), so nothing is subtracted."]
          if honest is None else []),
        *notes,
    ])


def _rests_on(row: Experiment) -> str:
    """`30 patients, 89 videos, 5 folds, 1 seed` of the row that others are compared with."""
    table = row.table
    repeats, folds = table["repeat"].nunique(), table["fold"].nunique()
    unit = "patient" if row.params.get("data.group") == "patient" else "group"
    counts = [(table["patient"].nunique(), unit), (table["unit"].nunique(), "unit"), (folds // repeats, "fold"), (table["seed"].nunique(), "seed")]
    words = [f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts]
    return ", ".join(words) + (f", {repeats} repeats" if repeats > 1 else "")
