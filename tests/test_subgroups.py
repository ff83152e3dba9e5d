"""Sub-groups: a worse one is found, equal ones are not; columns are carried, refused and grouped; small levels say why."""

from __future__ import annotations

import csv
import html
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_experiment import FakeExperiment
from scipy import stats

from pipeline.config import Config
from pipeline.data import attributes
from pipeline.data.attributes import (
    check_columns,
    from_manifest,
    grouped,
    read_attributes,
    write_attributes,
)
from pipeline.data.labels import read_labelled_media
from pipeline.data.manifest import Manifest
from pipeline.data.store import FrameStore
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.metrics import Scores, classification_metrics
from pipeline.evaluation.subgroups import compare_with_rest, subgroups_part
from pipeline.evaluation.weighted import influence
from pipeline.parameters import DataParams


@pytest.fixture(autouse=True)
def _only_this_part(monkeypatch):
    monkeypatch.setattr(evaluation, "PARTS", (subgroups_part,))


def judged(fake: FakeExperiment, columns: dict[str, dict[str, str]], change=lambda row, place: row):
    """Metrics, page and table of an evaluation with these columns beside the manifest."""
    output, store = fake.root / "reports/evaluate", fake.store()
    rows = [change(row, place) for place, row in enumerate(store.manifest.rows)]
    Manifest(rows).write(store.folder / "manifest.csv")
    cells = {row.path: {name: values.get(row.video, "") for name, values in columns.items()} for row in rows}
    write_attributes(fake.root / "reports/extract/attributes.csv", {name: name for name in columns}, rows, cells)
    metrics = evaluation.evaluate(fake.config, fake.folders, fake.splits, FrameStore(store.folder), output)
    table = list(csv.DictReader((output / "subgroups.csv").open(encoding="utf-8", newline="")))
    return metrics, html.unescape((output / "report.html").read_text(encoding="utf-8")), table


def experiment(root: Path, *names: str, **more) -> FakeExperiment:
    return FakeExperiment(root, params={"evaluate": {"bootstrap": 400, "subgroups": list(names)}}, **more)


def spoil(fake: FakeExperiment, videos: set[str]) -> None:
    """Make the first network guess wrongly for these videos."""
    def change(table):
        bad = table["video"].isin(videos)
        table.loc[bad, ["p_a", "p_b"]] = np.where(table.loc[bad, ["label"]].to_numpy() == "a", [[0.1, 0.9]], [[0.9, 0.1]])
        return table

    for fold in fake.splits.folds:
        fake.edit_table(f"pretrained-seed0-fold{fold.fold}", change)


def test_worse_sub_group__is_found_and_said_loudly(tmp_path):
    fake = experiment(tmp_path, "probe", "reader", patients=48, skill={"pretrained": 3.0, "random": 0.5})
    number = {video: int(video[:8], 16) for video in fake.labels}
    probe = {video: "linear" if number[video] % 12 < 4 else "convex" for video in fake.labels}
    reader = {video: f"r{number[video] // 12}" for video in fake.labels}
    spoil(fake, {video for video in fake.labels if probe[video] == "linear" and number[video] % 12 < 3})
    metrics, page, table = judged(fake, {"probe": probe, "reader": reader})
    found = metrics["subgroups"]["probe"]["levels"]
    assert found["linear"]["comparison"]["clearly_worse"] and not found["convex"]["comparison"]["clearly_worse"]
    assert found["linear"]["comparison"]["difference"] == -found["convex"]["comparison"]["difference"] < -0.5
    assert found["linear"]["balanced_accuracy_high"] < found["convex"]["balanced_accuracy_low"]
    # Two probes are one comparison: with four readers five in all.
    assert found["linear"]["comparison"]["p_holm"] == pytest.approx(5 * found["linear"]["comparison"]["p"])
    assert "Clearly worse for probe linear (16 patients): balanced accuracy" in page
    assert metrics["headline_parts"]["subgroups.clearly_worse"] == 1
    assert {(row["column"], row["level"]) for row in table} == {("probe", "convex"), ("probe", "linear"), *(("reader", f"r{i}") for i in range(4))}


def test_table__no_interval_has_its_reason_and_patients_of_two_groups_are_explained(tmp_path):
    fake = experiment(tmp_path, "probe")
    probe = {video: f"clip{int(video[8:], 16)}" for video in fake.labels}
    spoil(fake, {video for video in fake.labels if probe[video] == "clip1"})
    metrics, page, _ = judged(fake, {"probe": probe})
    found = metrics["subgroups"]["probe"]["levels"]["clip1"]
    assert found["balanced_accuracy"] == 0 and found["balanced_accuracy_low"] is None and found["no_interval"]
    assert f"No interval of balanced accuracy: clip1: {found['no_interval']}" in page
    assert "Patients add up to more than 12: one with videos in several of these groups counts in each." in page


def test_table__a_difference_without_interval_has_its_reason(tmp_path):
    fake = experiment(tmp_path, "site", patients=24, skill={"pretrained": 0.5})
    _, page, _ = judged(fake, {"site": {video: "few" if int(video[:8], 16) in (0, 2, 4, 6, 1) else "many" for video in fake.labels}})
    assert "No interval of the difference: few, many: on one side class b comes from 1 patient: how patients differ cannot be seen." in page


def test_levels__seeds_are_averaged_as_in_the_main_table(tmp_path):
    fake = experiment(tmp_path, "probe", patients=48, seeds=[0, 1])
    metrics, _, _ = judged(fake, {"probe": {video: "linear" if int(video[:8], 16) < 24 else "convex" for video in fake.labels}})
    found = metrics["subgroups"]["probe"]["levels"]["linear"]
    table = pd.read_csv(tmp_path / "reports/evaluate/predictions_video.csv", dtype={"video": str}).query("init == 'pretrained'")
    own = table[[int(video[:8], 16) < 24 for video in table["video"]]]
    each = [classification_metrics(Scores.from_table(part, fake.classes))["macro_auroc"] for _, part in own.groupby("seed")]
    assert found["macro_auroc"] == pytest.approx(np.mean(each)) and found["videos"] == 48
    assert found["macro_auroc"] != pytest.approx(classification_metrics(Scores.from_table(own, fake.classes))["macro_auroc"], abs=1e-9)


def test_null__the_test_keeps_its_level_with_unequal_classes():
    """A sub-group with other shares of the classes, one of which is hard; both sides are judged equally well."""
    rng, rejected = np.random.default_rng(5), 0
    for _ in range(150):
        labels = np.array([0] * 6 + [1] * 18 + [0] * 16 + [1] * 8)
        right = rng.random(48) < np.where(labels == 0, 0.9, 0.5)
        probabilities = np.eye(2)[np.where(right, labels, 1 - labels)]
        scores = Scores(labels, probabilities, np.array([f"P{i}" for i in range(48)]), ("a", "b"))
        inside, rest = (Scores(labels[part], scores.probabilities[part], scores.patients[part], ("a", "b")) for part in (slice(24), slice(24, 48)))
        rejected += compare_with_rest(inside, rest, replicates=199)["p"] <= 0.05
    assert rejected <= 15  # 7.5 expected; 16 or more come once in 200 times


def test_comparison__interval_is_widened_as_that_of_two_samples():
    """One unit a patient: the widening is that of Welch's test, each class of each side with its own n / (n - 1)."""
    labels = np.repeat([0, 1, 0, 1], [6, 5, 9, 10])
    right = np.arange(30) % 3 > 0
    scores = Scores(labels, np.eye(2)[np.where(right, labels, 1 - labels)], np.array([f"P{i:02d}" for i in range(30)]), ("a", "b"))
    inside, rest = (Scores(labels[part], scores.probabilities[part], scores.patients[part], ("a", "b")) for part in (slice(11), slice(11, 30)))
    sides = [influence(part, ["balanced_accuracy"], sorted(scores.patients))["balanced_accuracy"] for part in (inside, rest)]
    both = sides[0].minus_other_patients(sides[1])
    plain = np.array([right[labels_of].mean() * (1 - right[labels_of].mean()) / size / 4 for labels_of, size in
                      ((slice(6), 6), (slice(6, 11), 5), (slice(11, 20), 9), (slice(20, 30), 10))])
    sizes = np.array([6, 5, 9, 10])
    exact = plain * sizes / (sizes - 1)
    factor, degrees = both.widening
    assert both.carriers.tolist() == [6, 5, 9, 10]
    assert factor == pytest.approx(np.sqrt(exact.sum() / plain.sum())) and degrees == pytest.approx(exact.sum() ** 2 / (exact**2 / (sizes - 1)).sum())
    found = compare_with_rest(inside, rest, replicates=4000)
    half = stats.t.ppf(0.975, degrees) * np.sqrt(exact.sum())
    assert (found["difference_high"] - found["difference_low"]) / 2 == pytest.approx(half, rel=0.1)
    lonely = compare_with_rest(Scores(*(part[5:11] for part in (inside.labels, inside.probabilities, inside.patients)), ("a", "b")), rest, replicates=200)
    assert lonely["difference_low"] is None and lonely["no_interval"] == "on one side class a comes from 1 patient: how patients differ cannot be seen"


def test_comparison__patients_on_both_sides_and_missing_classes():
    def scores(labels, patients, right):
        labels = np.array(labels)
        return Scores(labels, np.eye(3)[np.where(right, labels, (labels + 1) % 3)], np.array(patients), ("a", "b", "c"))

    inside = scores([0, 1, 0, 1], ["p", "q", "r", "s"], [True] * 4)
    rest = scores([0, 1, 2, 2], ["p", "q", "t", "u"], [True, False, True, True])
    found = compare_with_rest(inside, rest, replicates=200)
    assert found["classes"] == ["a", "b"] and found["difference"] == 0.5
    assert found["p"] is None, "p and q stand on both sides, r and s on one: nobody can change sides"
    only_c = scores([2, 2], ["t", "u"], [True, True])
    assert "fewer than two classes in common" in compare_with_rest(inside, only_c)["reason"]


def test_levels__few_patients_one_class_unknown_and_all_equal(tmp_path):
    fake = experiment(tmp_path, "site", "vendor", "mask", patients=20)
    number = {video: int(video[:8], 16) for video in fake.labels}
    site = {video: "small" if number[video] < 3 else "one" if number[video] % 2 else "" for video in fake.labels}
    metrics, page, _ = judged(fake, {"site": site, "vendor": dict.fromkeys(fake.labels, "X")})
    found = metrics["subgroups"]["site"]["levels"]
    assert list(found) == ["one", "small", "not given"]
    assert found["small"]["reason"] == "fewer than 5 patients" and found["small"]["patients"] == 3
    assert found["one"]["reason"] == "all videos have the class b" and "balanced_accuracy" not in found["one"]
    assert "small: fewer than 5 patients" in page and "Vendor: not shown, because all videos have the value 'X'" in page
    assert "Mask: not shown, because all videos have the value 'none'" in page
    assert "NaN" not in (fake.root / "reports/evaluate/details.json").read_text()


def test_part__no_column_no_store_and_one_that_was_not_carried(tmp_path):
    fake = experiment(tmp_path / "a")
    metrics, page, _ = _without_table(fake)
    assert "subgroups" not in metrics and 'id="subgroups"' not in page
    metrics, page, _ = _without_table(experiment(tmp_path / "b", "mask"))
    assert "Mask: not shown, because the frame store is not there" in page
    fake = experiment(tmp_path / "c", "probe")
    with pytest.raises(DataError, match=r"column 'probe' was not carried through extraction.*dvc repro extract"):
        evaluation.evaluate(fake.config, fake.folders, fake.splits, fake.store(), fake.root / "reports/evaluate")


def _without_table(fake: FakeExperiment):
    metrics = evaluation.evaluate(fake.config, fake.folders, fake.splits, None, fake.root / "reports/evaluate")
    return metrics, html.unescape((fake.root / "reports/evaluate/report.html").read_text(encoding="utf-8")), None


# columns


def folder(root: Path, table: str) -> Path:
    for name in ("a.avi", "b.avi", "c.avi"):
        (root / name).write_bytes(b"RIFF")
    (root / "labels.csv").write_text(table, encoding="utf-8")
    return root


def test_columns__of_the_table_without_paths_and_patients(tmp_path):
    table = "file,label,subject,Probe,age\na.avi,x,Anna,convex,31\nb.avi,y,Berta,'=linear,44\na.avi,x,Anna,,\n"
    found = read_labelled_media("main", DataParams(source=str(folder(tmp_path, table))))
    assert found.columns == ["label", "Probe", "age"]
    assert found.cells["a.avi"] == {"label": "x", "Probe": "convex", "age": "31"} and found.cells["b.avi"]["Probe"] == "=linear"
    assert check_columns(["probe", "mask", "age"], found.columns) == {"probe": "Probe", "age": "age"}
    for name in ("subject", "file"):
        with pytest.raises(ConfigError, match=f"no column '{name}'.*without paths and patients"):
            check_columns([name], found.columns)
    with pytest.raises(ConfigError, match="Did you mean 'Probe'"):
        check_columns(["Prob"], found.columns)


def test_grouped__numbers_texts_and_gaps():
    ages = {f"v{age}": str(age) for age in range(20, 60)} | {"w": ""}
    found = grouped("age", ages)
    assert list(dict.fromkeys(found.values())) == ["below 29", "29 to below 39", "39 to below 49", "49 and above", ""]
    assert found["v29"] == "29 to below 39" and found["w"] == ""
    same = {f"v{i}": "7" for i in range(90)} | {f"w{i}": str(8 + i) for i in range(9)}
    assert set(grouped("x", same).values()) == {"below 8", "8 and above"}
    assert grouped("few", {"a": "1", "b": "2"}) == {"a": "1", "b": "2"}
    with pytest.raises(DataError, match="column 'name' has 21 different texts"):
        grouped("name", {str(i): f"n{i}" for i in range(21)})


def test_written_table__holds_no_exact_ages_and_no_names(tmp_path):
    rows = FakeExperiment(tmp_path, patients=12).store().manifest.rows
    cells = {row.path: {"age": str(30 + place), "nick": f"n{row.patient}", "=x": "@y"} for place, row in enumerate(rows)}
    path = tmp_path / "attributes.csv"
    write_attributes(path, {"age": "age", "=x": "=x"}, rows, cells)
    assert ",31" not in path.read_text() and "below" in path.read_text() and "'@y" in path.read_text()
    assert read_attributes(path)["=x"][rows[0].video] == "@y"
    with pytest.raises(DataError, match="column 'nick' every value belongs to one patient"):
        write_attributes(path, {"nick": "nick"}, rows, cells)
    path.write_text('video,"a\n', encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        read_attributes(path)
    assert read_attributes(tmp_path / "none.csv") == {}


def test_manifest_columns__every_name_gives_a_level(tmp_path):
    rows = [replace(row, fps=None if place % 2 else 25.0) for place, row in enumerate(FakeExperiment(tmp_path).store().manifest.rows)]
    for name in attributes.MANIFEST:
        found = from_manifest(rows, name)
        assert set(found) == {row.video for row in rows}, name
    assert set(from_manifest(rows, "extension").values()) == {".mp4"} and set(from_manifest(rows, "fps").values()) == {"25.0", ""}


def test_parameters__columns_once():
    with pytest.raises(ValueError, match="none twice"):
        Config.model_validate({"methods": {"ucl": {}}, "evaluate": {"subgroups": ["a", "a"]}})
