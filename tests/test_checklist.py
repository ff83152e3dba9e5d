"""Checklists and model card: complete, filled with this run's facts, the rest left to the authors, nothing private."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from fake_experiment import FakeExperiment

from pipeline.data.manifest import Manifest
from pipeline.data.store import FrameStore
from pipeline.evaluation.checklist import CLAIM, TO_FILL, TRIPOD_AI, filled
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.model_card import markdown_table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    fake = FakeExperiment(
        tmp_path_factory.mktemp("checklist"), classes=["a|b", "c"],
        params={"data": {"pseudonym_key": "top-secret-key", "source": "/home/clinic/videos"}, "evaluate": {"bootstrap": 100, "title": "Lung study"}},
    )
    for folder in fake.folders:
        fake.edit_card(folder.name, selection="best_on_test", stamp="optimistic (selected on test)")
    metrics = evaluate(fake.config, fake.folders, fake.splits, fake.store(), fake.root / "out")
    return metrics, *((fake.root / "out" / name).read_text(encoding="utf-8") for name in ("checklist.md", "model_card.md", "report.html"))


def test_lists__hold_every_item_once():
    """TRIPOD+AI: 27 items with letters, 52 in all; CLAIM 2024: 44."""
    numbers = [row[0] for row in TRIPOD_AI]
    assert [int(number) for number in dict.fromkeys(re.sub(r"\D", "", number) for number in numbers)] == list(range(1, 28))
    assert len(numbers) == len(set(numbers)) == 52
    assert [row[0] for row in CLAIM] == [str(number) for number in range(1, 45)]


def test_lists__what_no_run_can_know_is_left_to_the_authors():
    rows = {number: answer for number, _, answer, _ in filled(TRIPOD_AI, dict.fromkeys(re.findall(r"{(\w+)}", str(TRIPOD_AI)), "x"))}
    assert {rows[number] for number in ("3a", "5b", "17", "18a", "18b", "18d", "19")} == {TO_FILL}
    assert TO_FILL not in {rows[number] for number in ("2", "12a", "13", "23a")}


def test_files__tell_of_this_run(written):
    metrics, checklist, card, page = written
    for text in (checklist, card):
        assert metrics["headline"] in text and "Lung study" in text and "optimistic (selected on test)" in text
        assert "top-secret-key" not in text and "/home/clinic" not in text and "http" not in text
    # Epochs chosen on test patients leave nobody to fit anything on.
    assert "no thresholds, for want of inner validation patients" in checklist and "fitted on inner" not in checklist
    assert "Same source, other patients" in checklist and "linearisation over patients" in card
    assert "keyed pseudonyms" in checklist and " pretrained by ucl, fine-tuned (" in checklist
    titles = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert titles == [
        "Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data", "Quantitative analyses",
        "Ethical considerations", "Caveats and recommendations",
    ]
    # A bar in a class name does not break a row.
    assert "a\\|b" in card and all(line.count("|") - line.count("\\|") in (4, 5) for line in card.splitlines() if line.startswith("|"))
    assert metrics["checklist"]["CLAIM 2024"] == {"filled": 44 - checklist_left(CLAIM), "to_fill": checklist_left(CLAIM), "items": 44}


def test_files__a_split_by_frame_is_not_called_anything_better(tmp_path):
    params = {"data": {"group": "frame"}, "evaluate": {"bootstrap": 100, "explanations": 0}}
    fake = FakeExperiment(tmp_path, group="frame", frames=12, params=params)
    evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "out")
    assert "Each fold tests other frames of the same videos" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for name in ("checklist.md", "model_card.md"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "had trained on other frames of its video" in text and "had not trained on it" not in text
        assert "fitted on inner" not in text and "other groups" not in text


def lists_of(fake: FakeExperiment, store: FrameStore | None = None) -> tuple[str, str]:
    """checklist.md and model_card.md of an evaluation."""
    evaluate(fake.config, fake.folders, fake.splits, store, fake.root / "out")
    return tuple((fake.root / "out" / name).read_text(encoding="utf-8") for name in ("checklist.md", "model_card.md"))


def answer(checklist: str, number: str, topic: str) -> str:
    return next(line.split(" | ")[2] for line in checklist.splitlines() if line.startswith(f"| {number} | {topic}"))


def test_model__is_what_nested_selection_chose(tmp_path):
    fake = FakeExperiment(tmp_path, params={"evaluate": {"bootstrap": 100, "explanations": 0}, "finetune": {
        "selection": "nested", "grid": {"trainable": ["linear", "last_block"], "class_weights": ["balanced", "none"]}, "trainable": "last_block",
    }})
    for folder in fake.folders:
        fold = int(folder.name[-1])
        values = {"trainable": "linear", "class_weights": "none" if fold else "balanced"}
        candidates = [{"values": values, "score": 0.7}]
        groups = sorted({*fake.splits.groups_of(fake.splits.fold(fold).train)})
        fake.edit_card(folder.name, selection="nested", train_groups=groups, validation_groups=groups, trainable="linear", grid=fake.config.finetune.grid,
                       nested={"values": values, "score": 0.7, "candidates": candidates})
    for text in lists_of(fake):
        assert "fine-tuned (linear, head linear)" in text and "last_block" not in text and "fine-tuning at most" in text
    checklist = lists_of(fake)[0]
    assert answer(checklist, "13", "Class imb") == "none: the loss is not weighted in 2 of 3 networks, loss weighted by class frequency in 1 of 3 networks"
    assert answer(checklist, "37", "Perf").endswith("inner validation: learning curves; test: all tables")


def test_frames_and_patients__are_joined_as_the_report_says(tmp_path):
    params = {"evaluate": {"bootstrap": 100, "explanations": 0, "aggregation": "attention"}, "finetune": {"pooling": "attention"}}
    fake = FakeExperiment(tmp_path, params=params)
    for folder in fake.folders:
        fake.edit_card(folder.name, pooling="attention")
        fake.edit_table(folder.name, lambda table: table.assign(weight=0.25))
    for text in lists_of(fake):
        assert "by the attention that fine-tuning has learnt, videos to patients by their mean" in text and "patients by attention" not in text


@pytest.mark.parametrize("selection", ["last", "best_on_test"])
def test_sample_and_parts__as_they_were_used(tmp_path, selection):
    params = {"evaluate": {"bootstrap": 100, "explanations": 0}, "data": {"include": {"probe": ["convex"]}}, "finetune": {"selection": selection}}
    fake = FakeExperiment(tmp_path, params=params)
    for folder in fake.folders:
        fake.edit_card(folder.name, selection=selection, stamp="optimistic (selected on test)" if selection == "best_on_test" else None, validation_groups=[])
        fake.edit_table(folder.name, lambda table: table[table["part"] == "test"])
    checklist = lists_of(fake, fake.store())[0]
    whole = "24 labelled videos of 12 patients, all in the store that have a label; the store holds what data.include keeps; "
    for number, topic in (("10", "Sample size"), ("21", "Intended sample size")):
        assert answer(checklist, number, topic) == f"{whole}whether and how the size was calculated beforehand: to be filled by you"
    assert "convex" not in checklist and "no class was left out" in answer(checklist, "11", "Missing")
    assert answer(checklist, "37", "Perf") == "Training: loss in the learning curves; test: all tables; no part was held back for validation"
    assert answer(checklist, "26", "Choice").startswith("the last epoch was taken" if selection == "last" else "the epoch was chosen on the test patients")
    rows = fake.store().manifest.rows
    Manifest([*rows, replace(rows[0], video="f" * 16, path="f.mp4", label="c")]).write(tmp_path / "data/frames/main/manifest.csv")
    fake.splits = replace(fake.splits, excluded_classes={"c": "not in the chosen classes"}, unlabelled=["f" * 16])
    checklist = lists_of(fake, FrameStore(tmp_path / "data/frames/main"))[0]
    assert "24 labelled videos of 12 patients, of 25 in the store; without class c; the store" in answer(checklist, "10", "Sample size")
    assert "class c was left out (not in the chosen classes)" in answer(checklist, "11", "Missing")


def checklist_left(rows) -> int:
    return sum(not row[2] for row in rows)


def test_report__lists_are_folded_and_open_on_paper(written):
    page = written[3]
    section = re.search(r'<section id="checklist">.*?</section>', page, re.DOTALL).group(0)
    assert section.count("<details>") == section.count("</details>") == 2 and "TRIPOD+AI 2024" in section
    assert page.index('id="made"') < page.index('id="checklist"') and 'href="#checklist"' in page
    assert "details::details-content" in page[page.index("@media print"):]


def test_markdown__cells_stay_in_their_row():
    assert markdown_table(["x"], [["a|b\nc"]])[-1] == "| a\\|b c |"
