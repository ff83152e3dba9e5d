"""What nested selection chose in every fold: recipe, epoch and inner scores, with a warning where the folds do not agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.content import chosen_words
from pipeline.evaluation.parts import Context, Part
from pipeline.evaluation.predictions import Item
from pipeline.evaluation.report import Section, Table, init_name, number, plural

__all__ = ["choices_part"]

KEY = "choices"
MAX_ROWS = 40
"""Candidates shown; cards hold all."""


def _nested(item: Item) -> Mapping[str, Any]:
    return (item.card.model_extra or {}).get("nested") or {}


def _numbers(items: Sequence[Item]) -> dict[str, Any]:
    """Of one initialisation: how often each recipe was chosen, the range of the epochs, the number of models."""
    found = Counter(chosen_words(_nested(item)["values"]) for item in items)
    name, count = found.most_common(1)[0]
    epochs = [int(item.card.selected_epoch or 0) + 1 for item in items]
    return {
        "models": len(items), "candidates": len(_nested(items[0])["candidates"]), "chosen": dict(found.most_common()),
        "most_chosen": name, "most_chosen_models": count, "epochs_low": min(epochs), "epochs_high": max(epochs),
        "patients_low": min(len(item.card.validation_groups) for item in items),
    }


def _warnings(called: str, one: Mapping[str, Any], epochs: int, unit: str) -> list[str]:
    """Where less than half of the models chose the same recipe, or their epochs lie more than half of the training apart."""
    lines, judged = [], f"{plural(one['patients_low'], unit)} a fold"
    if one["models"] > 1 and one["most_chosen_models"] * 2 < one["models"]:
        lines.append(
            f"nested selection did not settle on one recipe ({called}): of {one['models']} networks only {one['most_chosen_models']} took the most "
            f"frequent choice ({one['most_chosen']}). The numbers judge the procedure that chooses, not one recipe, and with {judged} to choose on "
            f"much of the choice is chance"
        )
    if (one["epochs_high"] - one["epochs_low"]) * 2 > epochs:
        lines.append(
            f"the numbers of epochs that nested selection chose lie far apart ({called}): {one['epochs_low']} to {one['epochs_high']} of {epochs}. "
            f"With {judged} to choose on much of that is chance; a smoother finetune.selection_metric (loss) or a lower learning rate may help"
        )
    return lines


def _candidates(items: Sequence[Item], called: str) -> Table:
    """Inner scores of every candidate at its best epoch, a column for each model, best mean first."""
    tables = [_nested(item)["candidates"] for item in items]
    metric = _metric(items)
    rows = []
    for place, candidate in enumerate(tables[0]):
        scores = [table[place]["score"] for table in tables]
        known = [score for score in scores if score is not None]
        mean = sum(known) / len(known) if len(known) == len(scores) else None
        chosen = sum(_nested(item)["values"] == candidate["values"] for item in items)
        rows.append((mean, [chosen_words(candidate["values"]), number(mean, 3), chosen, *(number(score, 3) for score in scores)]))
    better = 1 if metric == "loss" else -1
    rows.sort(key=lambda row: (row[0] is None, better * (row[0] or 0)))
    names = [f"seed {item.card.seed}, fold {item.card.fold}" for item in items]
    more = f" The first {MAX_ROWS} of {len(rows)}." if len(rows) > MAX_ROWS else ""
    note = f"{metric.replace('_', ' ')}, mean over inner folds at each candidate's best epoch; a dash: its training did not stay finite.{more}"
    columns = ["Recipe", "Mean", "Times chosen", *names]
    return Table(f"Candidates, {called}", columns, [cells for _, cells in rows[:MAX_ROWS]], columns[1:], note)


def _metric(items: Sequence[Item]) -> str:
    return str(((items[0].card.model_extra or {}).get("finetune") or {}).get("selection_metric", "balanced_accuracy"))


def choices_part(context: Context) -> Part | None:
    """Numbers, warnings and the section of nested selection; None where the models were not chosen by it."""
    items = {init: [item for item in context.items if item.card.init == init and _nested(item)] for init in context.inits}
    items = {init: own for init, own in items.items() if own}
    if not items:
        return None
    numbers = {init: _numbers(own) for init, own in items.items()}
    epochs = context.config.finetune.epochs
    warnings = [line for init, one in numbers.items() for line in _warnings(init_name(context.metrics, init), one, epochs, context.unit)]
    count = numbers[next(iter(numbers))]["candidates"]
    recipes = f"each of {plural(count, 'candidate recipe')}" if count > 1 else "the recipe"
    words = [
        f"Within the training {context.unit}s of every fold, {recipes} was trained on every inner fold and judged on the rest. The best mean score chose "
        f"recipe and number of epochs, a network was trained anew on all training {context.unit}s with them, and only that one saw the test "
        f"{context.unit}s, once.",
        f"Scores of this section are the best of many and on {context.unit}s who took part in the choice: they say nothing about new {context.unit}s.",
    ]
    columns = ["Model", "Recipe chosen", "Epochs", "Inner score"]
    rows = [
        [item.name, chosen_words(_nested(item)["values"]), int(item.card.selected_epoch or 0) + 1, number(_nested(item)["score"], 3)]
        for own in items.values() for item in own
    ]
    tables = [Table("Choices", columns, rows, columns[2:])]
    tables += [_candidates(own, init_name(context.metrics, init)) for init, own in items.items() if count > 1]
    section = Section(
        KEY, "How the recipe was chosen", words, tables=tables, warning=" ".join(f"{line[0].upper()}{line[1:]}." for line in warnings),
        after="training", folded=True,
    )
    return Part(KEY, numbers, section, warnings=warnings)
