"""The report's part on nested selection: what was chosen, scores of candidates, warnings where folds disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_experiment import FakeExperiment

from pipeline.errors import DataError
from pipeline.evaluation.evaluate import evaluate

GRID = {"trainable": ["linear", "last_block", "all"]}


def nested(fake: FakeExperiment, chosen: list[int], epochs: list[int]) -> None:
    """Cards as nested selection writes them: the place of the chosen candidate and the epoch of every fold."""
    for fold, (place, epoch) in enumerate(zip(chosen, epochs, strict=True)):
        table = [
            {"values": {"trainable": name}, "epoch": 1, "score": 0.9 if n == place else 0.5, "inner": [0.5, 0.5]}
            for n, name in enumerate(GRID["trainable"])
        ]
        table[(place + 1) % 3] |= {"epoch": None, "score": None, "inner": None}
        for init in fake.skill:
            fake.edit_card(
                f"{init}-seed0-fold{fold}", selection="nested", selected_epoch=epoch, trainable=GRID["trainable"][place], grid=GRID,
                nested={"values": {"trainable": GRID["trainable"][place]}, "score": 0.9, "candidates": table},
            )


def judged(folder: Path, chosen: list[int], epochs: list[int]) -> tuple[dict, str]:
    fake = FakeExperiment(folder, params={"finetune": {"epochs": 20, "selection": "nested", "grid": GRID}})
    nested(fake, chosen, epochs)
    numbers = evaluate(fake.config, fake.folders, fake.splits, None, folder / "out")
    return numbers, (folder / "out/report.html").read_text(encoding="utf-8")


def test_choices__folds_that_agree_are_shown_without_a_warning(tmp_path: Path) -> None:
    numbers, page = judged(tmp_path, [1, 1, 0], [9, 12, 10])
    assert numbers["choices"]["pretrained"] == {
        "models": 3, "candidates": 3, "chosen": {"trainable last_block": 2, "trainable linear": 1}, "most_chosen": "trainable last_block",
        "most_chosen_models": 2, "epochs_low": 10, "epochs_high": 13, "patients_low": 4,
    }
    assert "How the recipe was chosen" in page and "Candidates, pretrained" in page and "Recipe chosen" in page
    assert "did not settle" not in page and "lie far apart" not in page
    assert json.loads((tmp_path / "out/details.json").read_text())["choices"] == numbers["choices"]


def test_choices__folds_that_choose_differently_are_a_warning(tmp_path: Path) -> None:
    _, page = judged(tmp_path, [0, 1, 2], [1, 4, 19])
    assert "nested selection did not settle on one recipe (pretrained): of 3 networks only 1 took the most frequent choice" in page
    assert "lie far apart (random): 2 to 20 of 20" in page


def test_choices__recipes_may_differ_in_keys_of_the_grid_only(tmp_path: Path) -> None:
    fake = FakeExperiment(tmp_path, params={"finetune": {"selection": "nested", "grid": GRID}})
    nested(fake, [0, 1, 1], [3, 3, 3])
    fake.edit_card("random-seed0-fold1", head="mlp")
    fake.edit_card("random-seed0-fold2", head="linear")
    with pytest.raises(DataError, match="items were trained with different head"):
        evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")


def test_choices__no_section_without_nested_selection(tmp_path: Path) -> None:
    fake = FakeExperiment(tmp_path)
    assert "choices" not in evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")
