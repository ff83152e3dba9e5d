"""What can be guessed without content: planted shortcuts are found, chance raises no alarm, poor tables are explained."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import numpy as np
import pytest
from fake_experiment import FakeExperiment

from pipeline.data.manifest import Manifest
from pipeline.data.store import FrameStore
from pipeline.errors import DataError
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.metrics import Scores, classification_metrics
from pipeline.evaluation.shortcuts import (
    area_facts,
    file_facts,
    predict,
    shortcuts_part,
)

SURE = {"pretrained": 4.0, "random": 4.0}


@pytest.fixture(autouse=True)
def _only_this_part(monkeypatch):
    monkeypatch.setattr(evaluation, "PARTS", (shortcuts_part,))


def judged(fake: FakeExperiment, change=lambda row, place: row, store: bool = True):
    """Metrics and page of an evaluation whose manifest rows went through `change(row, place)`."""
    output = fake.root / "reports/evaluate"
    frames = None
    if store:
        frames = fake.store()
        rows = [change(row, place) for place, row in enumerate(frames.manifest.rows)]
        Manifest(rows).write(frames.folder / "manifest.csv")
        frames = FrameStore(frames.folder)
    metrics = evaluation.evaluate(fake.config, fake.folders, fake.splits, frames, output)
    return metrics, html.unescape((output / "report.html").read_text(encoding="utf-8"))


def named(metrics):
    """The numbers of both models."""
    return [metrics["shortcuts"][name] for name in ("file", "area")]


def test_planted__the_size_of_the_picture_tells_the_class(tmp_path):
    fake = FakeExperiment(tmp_path, classes=["a", "b", "c"], patients=24, skill=SURE)
    sizes = {"a": 640, "b": 800, "c": 720}
    metrics, page = judged(fake, lambda row, place: replace(row, width=sizes[row.label] + place % 3))
    one = metrics["shortcuts"]["file"]
    assert one["balanced_accuracy"] == 1 and one["reaches_network"] and one["beats_guessing"]
    assert set(one["used_most"]) <= {"width", "aspect"}
    assert "The facts of the file alone give a balanced accuracy of 1.00" in page and "does not prove" in page
    compact = json.loads((tmp_path / "reports/evaluate/metrics.json").read_text())
    assert compact["shortcuts"]["file"]["balanced_accuracy"] == 1
    assert metrics["headline_parts"]["shortcuts.file.balanced_accuracy"] == 1
    # Where nobody can overlook it: among what the numbers may not be used for.
    use = page[page.index('<section id="use"') : page.index('<section id="pretraining"')]
    assert "The value does not show that the picture's content is read" in use and "facts of the file 1.00" in use


def test_null__facts_without_meaning_raise_no_alarm(tmp_path):
    fake = FakeExperiment(tmp_path, patients=40, skill=SURE)
    rng = np.random.default_rng(3)
    metrics, page = judged(fake, lambda row, place: replace(row, width=int(rng.integers(500, 900)), frames_decoded=int(rng.integers(5, 90))))
    one = metrics["shortcuts"]["file"]
    assert not one["reaches_network"] and not one["beats_guessing"]
    assert one["balanced_accuracy_low"] < 0.5 < one["balanced_accuracy_high"] < 0.8
    assert one["network_lead_low"] > 0.1
    assert "The facts of the file alone give" not in page


def test_area__brightness_that_tells_the_class_is_found_and_frames_alike_are_not(tmp_path):
    fake = FakeExperiment(tmp_path, patients=16, skill=SURE)
    metrics, page = judged(fake)
    assert metrics["shortcuts"]["area"]["used_most"] == {"brightness": 1.0}
    assert metrics["shortcuts"]["area"]["reaches_network"] and metrics["shortcuts"]["file"]["facts"] == []
    assert "Facts of the file: no value, because all videos are alike in these facts" in page


def test_weak_network__the_words_are_those_of_guessing(tmp_path):
    fake = FakeExperiment(tmp_path, patients=12, skill={"pretrained": 0.0, "random": 0.0})
    rng = np.random.default_rng(1)
    metrics, page = judged(fake, lambda row, place: replace(row, width=int(rng.integers(500, 900))))
    one = metrics["shortcuts"]["file"]
    assert one["reaches_network"] and not one["beats_guessing"]
    assert "which is no more than guessing" in page


def test_store__none_and_one_that_lacks_videos(tmp_path):
    metrics, page = judged(FakeExperiment(tmp_path / "one"), store=False)
    assert {one["reason"] for one in named(metrics)} == {"the frame store is not there"}
    assert "no value, because the frame store is not there" in page
    fake = FakeExperiment(tmp_path / "two")
    store = fake.store()
    Manifest(store.manifest.rows[:-2]).write(store.folder / "manifest.csv")
    with pytest.raises(DataError, match=r"2 videos of the split not in the manifest.*dvc repro split"):
        evaluation.evaluate(fake.config, fake.folders, fake.splits, FrameStore(store.folder), tmp_path / "out")


def test_repeats__are_averaged_as_in_the_main_table(tmp_path):
    fake = FakeExperiment(tmp_path, patients=24, repeats=2, seeds=[0, 1], skill=SURE)
    widths = np.random.default_rng(4).integers(500, 900, 48)
    metrics, _ = judged(fake, lambda row, place: replace(row, width=int(widths[place]) + 60 * (row.label == "a")))
    rows = fake.store().manifest.rows
    facts = file_facts([replace(row, width=int(widths[place]) + 60 * (row.label == "a")) for place, row in enumerate(rows)])
    table, _ = predict(facts.loc[:, facts.nunique() > 1], fake.splits)
    each = [classification_metrics(Scores.from_table(part, fake.classes))["macro_auroc"] for _, part in table.groupby("repeat")]
    one = metrics["shortcuts"]["file"]
    assert len(each) == 2 and one["macro_auroc"] == pytest.approx(np.mean(each)) and one["videos"] == 48
    lead = metrics["pretrained"]["video"]["balanced_accuracy"] - one["balanced_accuracy"]
    assert one["network_lead"] == pytest.approx(lead)


def test_split_by_frame__no_model_learns_the_videos_it_is_tested_on(tmp_path):
    metrics, page = judged(FakeExperiment(tmp_path, group="frame", frames=24))
    assert all("balanced_accuracy" not in one and "also trained on" in one["reason"] for one in named(metrics))
    assert "no value, because in a split by frame every tested video is also trained on" in page and "Neither reaches" not in page


def test_predict__one_class_in_a_training_part_and_unknown_rates(tmp_path):
    fake = FakeExperiment(tmp_path)
    facts = file_facts([replace(row, fps=None, fps_source="none") for row in fake.store().manifest.rows])
    facts["width"] = np.arange(len(facts))
    assert facts["duration"].isna().all()
    first = fake.splits.folds[0]
    of_a = [video for video in first.train if fake.labels[video] == "a"]
    fake.splits.folds[0] = type(first)(0, first.test, of_a, first.inner)
    table, used = predict(facts, fake.splits)
    own = table[table["fold"] == 0]
    assert (own["p_a"] == 1).all() and (own["p_b"] == 0).all()
    assert np.allclose(table[["p_a", "p_b"]].sum(axis=1), 1) and sum(used.values()) == pytest.approx(1)
    assert sorted(table["video"]) == sorted(fake.labels)


def test_predict__test_videos_never_teach(tmp_path):
    """Labels of a fold's test videos are turned round: its answers stay."""
    fake = FakeExperiment(tmp_path)
    facts = file_facts(fake.store().manifest.rows)
    facts["width"] = np.random.default_rng(0).normal(size=len(facts))
    before, _ = predict(facts, fake.splits)
    for video in fake.splits.folds[1].test:
        fake.splits.labels[video] = "b" if fake.labels[video] == "a" else "a"
    after, _ = predict(facts, fake.splits)
    assert before.loc[before["fold"] == 1, "p_a"].tolist() == after.loc[after["fold"] == 1, "p_a"].tolist()


def test_facts__no_folder_and_no_file_name(tmp_path):
    rows = FakeExperiment(tmp_path).store().manifest.rows
    rows = [replace(row, path=f"{row.label}/{row.patient}/{row.video}.MP4#3", kind="stretch") for row in rows]
    columns = list(file_facts(rows).columns)
    assert "extension .mp4" in columns and not [name for name in columns if "a/" in name or "P0" in name]


def test_area__of_a_dark_video(tmp_path):
    fake = FakeExperiment(tmp_path)
    store = fake.store()
    store.frames = lambda video, places: [np.zeros((64, 64), np.uint8) for _ in places]
    facts = area_facts(store, store.manifest.rows)
    assert (facts["share"] == 0).all() and (facts["brightness"] == 0).all()
