"""Predictions of the fine-tuned models: read, cross-checked against the split, refused when they cannot be trusted.

Nothing here computes a metric. What passes is safe to count: every test video of every fold exactly once per
initialisation, seed and repeat, no patient on both sides, true labels, true probabilities. In a split by frame the same
holds for single frames, and only for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.splits import Splits
from pipeline.errors import DataError, LeakageError, some

__all__ = ["Item", "ItemCard", "check_items", "item_name", "read_items", "test_rows"]

KEYS = ["init", "seed", "fold", "part", "video", "patient", "frame", "label"]
RECIPE = ("backbone", "image_size", "trainable", "head", "label_fraction", "selection", "pooling", "grid")
"""Card keys that must agree in all items, or a difference between initialisations would be one of recipes; but for keys of the grid,
which nested selection chooses for each item."""
SUM_TOLERANCE = 1e-4
"""Probabilities are written as float32: a softmax over some hundred classes sums to 1 within far less than this."""


class ItemCard(BaseModel):
    """What one fine-tuning item says about itself (card.json, schema 1); unknown keys are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    schema_: int
    init: str
    seed: int
    fold: int
    classes: list[str]
    train_groups: list[str]
    validation_groups: list[str] = []
    test_groups: list[str]
    pretrain_groups: list[str] = []
    pretrain_scope: str = "none"
    selection: str = "inner"
    selected_epoch: int | None = None
    stamp: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Item:
    """One fine-tuned model: `<init>-seed<S>-fold<K>`, its card and its table of predictions (one row a frame)."""

    name: str
    folder: Path
    card: ItemCard
    table: pd.DataFrame

    @property
    def test(self) -> pd.DataFrame:
        """Rows of the outer test videos."""
        return self.table[self.table["part"] == "test"]


def item_name(init: str, seed: int, fold: int) -> str:
    """Folder name of a fine-tuning item."""
    return f"{init}-seed{seed}-fold{fold}"


def probability_columns(classes: Sequence[str]) -> list[str]:
    """Names of the probability columns, in class order."""
    return [f"p_{name}" for name in classes]


def read_items(folders: Iterable[Path]) -> list[Item]:
    """Read `card.json` and `predictions.csv` of every folder, sorted by name.

    Raises:
        DataError: a file is missing or malformed, a probability is not a number in [0, 1], rows do not sum to 1, or the
            rows belong to another item than the card says.
    """
    return [_read_item(Path(folder)) for folder in sorted(folders, key=lambda path: Path(path).name)]


def _read_item(folder: Path) -> Item:
    card = _read_card(folder / "card.json")
    table = _read_table(folder / "predictions.csv", card)
    name = item_name(card.init, card.seed, card.fold)
    if folder.name != name:
        raise DataError(
            f"{folder.name}/card.json: describes item '{name}'. Folders must not be renamed; run finetune again."
        )
    return Item(name, folder, card, table)


def _read_card(path: Path) -> ItemCard:
    label = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise DataError(f"{label}: not found. Run the finetune stage for this item.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("expected an object")
        card = ItemCard.model_validate({**raw, "schema_": raw.get("schema")})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]).replace("schema_", "schema")
        raise DataError(
            f"{label}: {key}: got {first['input']!r}; {first['msg'].lower()}. Run finetune again."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{label}: not a readable card ({error}). Run finetune again.") from None
    if card.schema_ != 1:
        raise DataError(f"{label}: schema {card.schema_}; this version reads schema 1.")
    return card


def _read_table(path: Path, card: ItemCard) -> pd.DataFrame:
    label = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise DataError(f"{label}: not found. Run the finetune stage for this item.")
    try:
        # Every cell as text first: a class may be called "NA", a video id may look like a number.
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise DataError(f"{label}: not a readable table ({error}). Run finetune again.") from None
    columns = probability_columns(card.classes)
    found = [name for name in raw.columns if name.startswith("p_")]
    absent = [name for name in KEYS if name not in raw.columns]
    if absent or found != columns:
        wanted = ", ".join([*KEYS, *columns])
        raise DataError(f"{label}: columns {', '.join(raw.columns)}; wanted {wanted} (classes as in card.json).")
    if raw.empty:
        raise DataError(f"{label}: holds no predictions.")
    weighed = ["weight"] if "weight" in raw.columns else []
    table = raw[KEYS + weighed].copy()
    for key in ("seed", "fold", "frame"):
        table[key] = _integers(raw[key], label, key)
    for column in [*weighed, *columns]:
        table[column] = pd.to_numeric(raw[column], errors="coerce").astype(float)
    _check_rows(table, columns, card, label)
    return table


def _integers(values: pd.Series, label: str, key: str) -> pd.Series:
    bad = values[~values.str.fullmatch(r"\d{1,12}")]
    if len(bad):
        raise DataError(f"{label}: row {bad.index[0] + 2}, column {key}: got {bad.iloc[0]!r}; allowed: a whole number")
    return values.astype(int)


def _check_rows(table: pd.DataFrame, columns: list[str], card: ItemCard, label: str) -> None:
    """Refuse rows of another item, unknown parts, frames given twice, and what is not a probability."""
    for key, wanted in (("init", card.init), ("seed", card.seed), ("fold", card.fold)):
        foreign = table[table[key] != wanted]
        if len(foreign):
            raise DataError(
                f"{label}: row {foreign.index[0] + 2}, column {key}: got '{foreign[key].iloc[0]}', "
                f"but card.json says '{wanted}'. Run finetune again."
            )
    parts = table[~table["part"].isin(["test", "validation"])]
    if len(parts):
        raise DataError(
            f"{label}: row {parts.index[0] + 2}, column part: got {parts['part'].iloc[0]!r}; allowed: test, validation"
        )
    twice = table[table.duplicated(["video", "frame"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(
            f"{label}: frame {row['frame']} of video {row['video']} is predicted twice. Run finetune again."
        )
    if "weight" in table.columns:
        sums = table.groupby(["part", "video"])["weight"].sum(skipna=False)
        if not ((sums - 1).abs() <= 1e-3).all() or (table["weight"] < 0).any():
            raise DataError(f"{label}: column weight: numbers of at least 0 that sum to 1 in every video are wanted. Run finetune again.")
    values = table[columns].to_numpy()
    bad = ~np.isfinite(values).all(axis=1) | (values < 0).any(axis=1) | (values > 1 + SUM_TOLERANCE).any(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{label}: row {row + 2}: probabilities {values[row].tolist()}; allowed: finite numbers from 0 to 1. "
            f"{int(bad.sum())} of {len(bad)} rows are such: training probably diverged; lower finetune.optimizer.lr."
        )
    off = np.abs(values.sum(axis=1) - 1) > SUM_TOLERANCE
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise DataError(f"{label}: row {row + 2}: probabilities sum to {values[row].sum():.6g}; they must sum to 1.")


def check_items(items: Sequence[Item], splits: Splits, initialisations: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse a set of items that does not make one honest out-of-fold prediction per test video.

    Raises:
        LeakageError: a test group was seen in training, validation or (scope `fold`) pretraining; a video was predicted
            by a fold in which it is not a test video.
        DataError: items are missing, classes, labels or groups disagree with the split, videos are missing or double.
    """
    _check_complete(items, splits, initialisations, seeds)
    for item in items:
        _check_classes(item, splits)
        _check_membership(item, splits)
        if splits.by_frame:
            _check_frames(item, splits)
        else:
            _check_leakage(item, splits)
        _check_labels(item, splits)
    _check_once(items, splits)
    _check_recipe(items)


def _check_recipe(items: Sequence[Item]) -> None:
    """One recipe for all: leftovers of other parameters must not be compared with new results."""
    for key in RECIPE:
        found: dict[str, str] = {}
        for item in items:
            if key in (item.card.model_extra or {}).get("grid", {}):
                continue
            value = item.card.selection if key == "selection" else (item.card.model_extra or {}).get(key)
            if value is not None:
                found.setdefault(json.dumps(value), item.name)
        if len(found) > 1:
            listed = ", ".join(f"{value} ({name})" for value, name in found.items())
            raise DataError(
                f"items were trained with different {key}: {listed}. Run `dvc repro finetune` for all of them."
            )


def _check_complete(
    items: Sequence[Item], splits: Splits, initialisations: Sequence[str], seeds: Sequence[int]
) -> None:
    present = {item.name for item in items}
    wanted = [item_name(init, seed, fold.fold) for init in initialisations for seed in seeds for fold in splits.folds]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DataError(
            f"predictions are missing for {len(missing)} of {len(wanted)} items (initialisation, seed, fold): "
            f"{', '.join(missing)}. Run `dvc repro finetune`; an average over part of the folds is not reported."
        )


def _check_classes(item: Item, splits: Splits) -> None:
    if list(item.card.classes) != list(splits.classes):
        raise DataError(
            f"item {item.name}: classes {', '.join(item.card.classes)} differ from the split's "
            f"{', '.join(splits.classes)}. Run finetune again."
        )


def _check_once(items: Sequence[Item], splits: Splits) -> None:
    """A video may be a test video in one fold of a repeat only, so within (initialisation, seed, repeat) one item predicts it."""
    seen: dict[tuple[str, int, int, str], str] = {}
    for item in [] if splits.by_frame else items:
        for video in item.test["video"].unique():
            key = (item.card.init, item.card.seed, splits.fold(item.card.fold).repeat, video)
            if key in seen:
                raise DataError(
                    f"item {item.name}: video {video} (fold {item.card.fold}) was already predicted by {seen[key]}; "
                    f"each video may be a test video once per initialisation, seed and repeat."
                )
            seen[key] = item.name


def _check_membership(item: Item, splits: Splits) -> None:
    """The test rows are those of the fold's test videos: none missing, none from elsewhere."""
    wanted = set(splits.fold(item.card.fold).test)
    found = set(item.test["video"])
    everywhere = {video for fold in splits.folds for video in fold.test}
    unknown = sorted(found - everywhere)
    if unknown:
        raise DataError(f"item {item.name}: {_some(unknown, 'video')} not in the split. Run split and finetune again.")
    foreign = sorted(found - wanted)
    if foreign:
        groups = sorted({splits.groups[video] for video in foreign})
        raise LeakageError(
            f"item {item.name}, fold {item.card.fold}: {_some(foreign, 'video')} (groups {_some(groups)}) predicted as "
            f"test, but not among the fold's test videos. They do not belong to this split; run finetune again."
        )
    missing = sorted(wanted - found)
    if missing:
        raise DataError(
            f"item {item.name}, fold {item.card.fold}: no prediction for {len(missing)} of {len(wanted)} test videos: "
            f"{_some(missing)}. Run finetune again."
        )


def _check_leakage(item: Item, splits: Splits) -> None:
    """Test groups come from the split, not from the card, so that a wrong card cannot hide an overlap."""
    card = item.card
    test = {splits.groups[video] for video in item.test["video"]} | set(card.test_groups)
    sides = {"training": card.train_groups, "validation": card.validation_groups}
    if card.pretrain_scope == "fold":
        sides["pretraining"] = card.pretrain_groups
    for side, groups in sides.items():
        both = sorted(test & set(groups))
        if both:
            raise LeakageError(
                f"item {item.name}, fold {card.fold}: test groups were seen in {side}: {_some(both)}. "
                f"Numbers from these predictions would be too good; run split, pretrain and finetune again."
            )
    validation = {splits.groups.get(video) for video in item.table.loc[item.table["part"] == "validation", "video"]}
    both = sorted(test & validation)
    if both:
        raise LeakageError(f"item {item.name}, fold {card.fold}: test groups among the validation rows: {_some(both)}.")


def _check_frames(item: Item, splits: Splits) -> None:
    """A split by frame: each frame is predicted by the one fold of a repeat that it was dealt to, and never validates there."""
    fold = splits.fold(item.card.fold)
    for part, video, frame in item.table[["part", "video", "frame"]].itertuples(index=False):
        dealt = splits.part_of_frame(fold, video, int(frame), None)
        if (dealt == "test") != (part == "test"):
            raise LeakageError(
                f"item {item.name}, fold {fold.fold}: frame {frame} of video {video} is predicted as {part}, but the split deals it to "
                f"{'the test part' if dealt == 'test' else 'training'}. These predictions belong to another split; run finetune again."
            )


def _check_labels(item: Item, splits: Splits) -> None:
    """Labels and groups of the table are those of the split."""
    videos = item.table.drop_duplicates(["video", "label", "patient"])
    for video, label, group in zip(videos["video"], videos["label"], videos["patient"], strict=True):
        if splits.labels.get(video) != label:
            raise DataError(
                f"item {item.name}, fold {item.card.fold}: video {video} is labelled {label!r}, "
                f"but the split says {splits.labels.get(video)!r}. Run finetune again."
            )
        if splits.groups.get(video) != group:
            raise DataError(
                f"item {item.name}, fold {item.card.fold}: video {video} is given to group {group!r}, "
                f"but the split says {splits.groups.get(video)!r}. Run finetune again."
            )


def _some(names: Sequence[str], noun: str = "", limit: int = 8) -> str:
    """`video a, b, c and 4 more`."""
    plural = f"{noun}{'s' if noun and len(names) > 1 else ''} " if noun else ""
    return plural + some(names, limit)


def test_rows(items: Sequence[Item], splits: Splits) -> pd.DataFrame:
    """All out-of-fold rows of the items in one table with the repeat of their fold, ordered by init, seed, fold, video, frame."""
    rows = pd.concat([item.test for item in items], ignore_index=True)
    rows.insert(rows.columns.get_loc("fold") + 1, "repeat", rows["fold"].map({fold.fold: fold.repeat for fold in splits.folds}))
    return rows.sort_values(["init", "seed", "fold", "video", "frame"], kind="stable", ignore_index=True)
