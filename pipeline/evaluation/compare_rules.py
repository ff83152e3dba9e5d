"""Which experiments form one row of a comparison, and which rows may be compared: refused with what differs, how much, and what to do."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from pipeline.errors import DataError, some
from pipeline.evaluation.compare_sources import Experiment

__all__ = ["SEEDS", "Group", "joined", "same_rules", "tables_of", "together", "told_apart", "unequal"]

SEEDS = ("pretrain.seed", "finetune.seeds")
BESIDE = re.compile(
    r"evaluate\.(bootstrap|confidence|seed|neighbors)$|extract\.workers$|pretrain\.(memory_budget_mb|checkpoint_seconds|monitor\.)|(launch|tracking)\."
)
"""Parameters that say how and where, or what is written about a result: two experiments may differ in them and be the same."""
MANY = 12


@dataclass(frozen=True)
class Group:
    """Experiments that differ only in their seeds."""

    name: str
    members: tuple[Experiment, ...]

    @property
    def stamp(self) -> str:
        """All that makes these numbers better than they would be for a new patient."""
        return ", ".join(dict.fromkeys(part for one in self.members for part in one.stamp.split(", ") if part))

    @property
    def params(self) -> dict[str, str]:
        """The parameters all members share."""
        return {key: value for key, value in self.members[0].params.items() if key not in SEEDS and not BESIDE.match(key)}

    @property
    def trained(self) -> float:
        """Share of a fold's training part that is trained on: with selection `inner` one of split.inner_folds parts only chooses the epoch."""
        parts = self.params.get("split.inner_folds", "")
        held = self.params.get("finetune.selection") == "inner" and parts.isdecimal() and int(parts) > 1
        return 1 - 1 / int(parts) if held else 1.0

    @property
    def seeds(self) -> list[int]:
        """Seeds of the rows of `table`."""
        return sorted({int(seed) for one in self.members for seed in one.table["seed"].unique()})


def _common(names: Sequence[str]) -> str:
    """What names of one series share: `ucl-s0`, `ucl-s1` give `ucl`."""
    return re.sub(r"[-_ .]*(seed|s)?[-_ .]*$", "", os.path.commonprefix(list(names))) or "+".join(names)


def joined(members: Sequence[Experiment], name: str = "") -> Group:
    """Experiments as one row.

    Raises:
        DataError: they differ in more than their seeds (naming the keys), or one is there twice.
    """
    group = Group(name or _common([one.name for one in members]), tuple(members))
    first = members[0]
    for other in members[1:]:
        keys = told_apart(first.params, other.params)
        if keys:
            shown = ", ".join(f"{key} ({first.params.get(key, 'not there')} and {other.params.get(key, 'not there')})" for key in keys[:6])
            raise DataError(
                f"compare: '{first.name}' and '{other.name}' cannot be one row: they differ in more than {' and '.join(SEEDS)}: {shown}"
                f"{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}. Give them as two rows (a space instead of +)."
            )
    for one, other in combinations(members, 2):
        if all(one.params.get(key) == other.params.get(key) for key in SEEDS):
            raise DataError(f"compare: '{one.name}' and '{other.name}' have the same parameters and the same seeds: one of them is enough")
    return group


def unequal(one: Mapping[str, str], other: Mapping[str, str], without: Iterable[str] = SEEDS) -> list[str]:
    """Keys in which results may differ, sorted."""
    keys = {key for key in {*one, *other} if one.get(key) != other.get(key)}
    return sorted(key for key in keys - set(without) if not BESIDE.match(key))


def told_apart(one: Mapping[str, str], other: Mapping[str, str], without: Iterable[str] = SEEDS) -> list[str]:
    """`unequal` for a sentence: of two methods the name alone, as each has a block of its own, whose keys would bury what matters."""
    keys = unequal(one, other, without)
    if "pretrain.method" not in keys:
        return keys
    return ["pretrain.method", *(key for key in keys if key != "pretrain.method" and not key.startswith("methods."))]


def together(experiments: Sequence[Experiment]) -> list[Group]:
    """Experiments that differ only in their seeds as one row each, in the order of their first ones."""
    groups: list[list[Experiment]] = []
    for one in experiments:
        home = next((group for group in groups if not unequal(group[0].params, one.params)), None)
        groups.append([one]) if home is None else home.append(one)
    return [joined(group) if len(group) > 1 else Group(group[0].name, (group[0],)) for group in groups]


def tables_of(groups: Sequence[Group]) -> list[pd.DataFrame]:
    """The rows' predictions, seeds as text: `2`, or `1/2` (pretraining/fine-tuning) where one seed of fine-tuning goes with several encoders."""
    clash = any(len(group.seeds) < sum(one.table["seed"].nunique() for one in group.members) for group in groups)
    tables = []
    for group in groups:
        parts = []
        for one in group.members:
            before = f"{one.params['pretrain.seed']}/" if clash else ""
            parts.append(one.table.assign(seed=before + one.table["seed"].astype(str)))
        tables.append(pd.concat(parts).sort_values(["seed", "repeat", "unit", "fold"], kind="stable", ignore_index=True))
    return tables


# --- what may be compared ---


def same_rules(names: Sequence[str], tables: Sequence[pd.DataFrame], classes: Sequence[Sequence[str]]) -> None:
    """Refuse rows that were not judged on the same units, labels, patients, folds and seeds; say what differs and what to do.

    Raises:
        DataError: naming two rows, what differs, how much of it, and examples.
    """
    first, table = names[0], tables[0]
    for name, other, called in zip(names[1:], tables[1:], classes[1:], strict=True):
        both = f"compare: '{name}' and '{first}'"
        if tuple(called) != tuple(classes[0]):
            raise DataError(f"{both} tell apart different classes: {', '.join(called)} and {', '.join(classes[0])}. Use equal data.classes and labels.")
        for key, advice in (("seed", "give the missing runs (NAME=A+B joins seeds), or leave the others out"), ("repeat", "use equal split.repeats")):
            found, wanted = set(other[key]), set(table[key])
            if found != wanted:
                raise DataError(
                    f"{both} have different {key}s: {some(sorted(found), MANY)} and {some(sorted(wanted), MANY)}. Differences are paired by {key}: {advice}."
                )
        _same_units(both, name, first, other, table)
        _same_folds(both, name, first, other, table)


def _same_units(both: str, name: str, first: str, other: pd.DataFrame, table: pd.DataFrame) -> None:
    mine, theirs = (part.drop_duplicates("unit").set_index("unit") for part in (other, table))
    odd = [(side, sorted(set(one.index) - set(two.index))) for side, one, two in ((name, mine, theirs), (first, theirs, mine))]
    if any(units for _, units in odd):
        listed = "; ".join(f"{len(units)} only in '{side}', such as {some(units)}" for side, units in odd if units)
        raise DataError(f"{both} were not judged on the same data: {listed}. Run both with equal data, extract and split parameters.")
    for column, advice in (("label", "the labels table has changed"), ("patient", "the patient column, data.group or data.pseudonym_key has changed")):
        unequal = mine.index[mine[column] != theirs.loc[mine.index, column]]
        if len(unequal):
            raise DataError(
                f"{both} differ in the {column} of {len(unequal)} of {len(mine)} units, such as {unequal[0]} ({mine.loc[unequal[0], column]} and "
                f"{theirs.loc[unequal[0], column]}): {advice}. Run both again with the same data."
            )


def _same_folds(both: str, name: str, first: str, other: pd.DataFrame, table: pd.DataFrame) -> None:
    keys = ["unit", "fold", "repeat", "seed"]
    found, wanted = (set(part[keys].itertuples(index=False, name=None)) for part in (other, table))
    if found == wanted:
        return
    moved = sorted(found - wanted)
    units = sorted({unit for unit, *_ in found ^ wanted})
    folds = sorted({fold for _, fold, *_ in found ^ wanted})
    numbers = [len(set(part["fold"])) for part in (other, table)]
    unit, fold, repeat, seed = moved[0] if moved else min(wanted - found)
    where = sorted(one[1] for one in wanted if (one[0], one[2], one[3]) == (unit, repeat, seed))
    amount = f"{numbers[0]} folds and {numbers[1]} folds; " if numbers[0] != numbers[1] else ""
    raise DataError(
        f"{both} were not judged on the same folds: {amount}{len(units)} of {len(set(table['unit']))} units are tested in other folds (folds "
        f"{some(folds, MANY)}), for example {unit}: fold {fold} in '{name}', fold {some(where)} in '{first}' (seed {seed}, repeat {repeat}). Run both "
        "with equal split parameters (split.folds, split.seed, split.file) and data."
    )
