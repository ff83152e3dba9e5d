"""`sonoscope compare`: joined seeds, paired differences on equal folds, every refusal, curves, pages, DVC and MLflow as sources."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.cli import main
from pipeline.errors import DataError
from pipeline.evaluation.compare import Settings, compare, compare_by
from pipeline.evaluation.compare_numbers import Measured, difference
from pipeline.evaluation.compare_sources import Finder, read_experiment
from pipeline.evaluation.compare_tables import as_csv, as_markdown, cannot, grids, headline, protocol
from pipeline.evaluation.metrics import Scores, aggregate
from pipeline.evaluation.roc_tests import delong_test
from pipeline.evaluation.statistics import paired_bootstrap, permutation_test

FAST = Settings(replicates=200)


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder without DVC and without a store."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "cwd"))
    monkeypatch.setattr("pipeline.evaluation.compare_numbers.permutations", lambda metric, units: 500)


def predictions(
    right: float, *, patients: int = 24, fold_shift: int = 0, seeds: tuple[int, ...] = (0,), repeats: int = 0, start: int = 0, noise: int = 0
) -> pd.DataFrame:
    """A model that is right for a share of the patients (counted from number `start` on), two videos each; `noise` seeds the rest."""
    rng = np.random.default_rng(noise)
    rows = []
    for seed in seeds:
        for repeat in range(max(repeats, 1)):
            for patient in range(patients):
                label = "ab"[patient % 2]
                good = (patient - start - seed) % patients < right * patients
                for clip in range(2):
                    p = rng.uniform(0.6, 0.9)
                    hit = p if good else 1 - p
                    rows.append({
                        "init": "pretrained", "seed": seed, **({"repeat": repeat} if repeats else {}),
                        "fold": (patient // 2 + fold_shift + repeat * (patient // 6)) % 3, "part": "test", "video": f"{patient:08x}{clip:08x}",
                        "patient": f"P{patient:010x}", "label": label, "p_a": hit if label == "a" else 1 - hit, "p_b": hit if label == "b" else 1 - hit,
                    })
    return pd.DataFrame(rows)


def project(folder: Path, right: float = 0.5, *, stamp: str = "none", params: dict[str, Any] | None = None, edit: Callable | None = None, **more: Any) -> str:
    """A project folder with predictions, metrics and parameters."""
    table = predictions(right, **more)
    table = edit(table) if edit else table
    results = folder / "reports" / "evaluate"
    results.mkdir(parents=True)
    frames = pd.concat([table.assign(frame=frame) for frame in range(2)]) if "video" in table else table
    for name, one in (("predictions_video", table), ("predictions", frames)):
        one.to_csv(results / f"{name}.csv", index=False)
    if edit is None:
        aggregate(table, ["a", "b"], "patient").to_csv(results / "predictions_patient.csv", index=False)
    (results / "metrics.json").write_text(json.dumps({"stamp": stamp}))
    seeds = list(more.get("seeds", (0,)))
    given: dict[str, Any] = {"pretrain": {"method": "ucl", "seed": seeds[0]}, "finetune": {"seeds": seeds}}
    for section, values in (params or {}).items():
        given.setdefault(section, {}).update(values)
    (folder / "params.yaml").write_text(json.dumps(given))  # JSON is YAML
    return str(folder)


def refused(names: list[str], match: str, settings: Settings = FAST) -> None:
    with pytest.raises(DataError, match=match):
        compare(names, settings)


# --- numbers ---


def test_compare__difference_interval_and_corrected_p(tmp_path: Path) -> None:
    names = [project(tmp_path / "random", 0.5, params={"pretrain": {"method": "random"}}), project(tmp_path / "good", 1.0), project(tmp_path / "same", 0.5)]
    found = compare(names, FAST)
    assert found.rows[0].values["balanced_accuracy"].value == pytest.approx(0.5) and found.to("random") is None
    good, same = found.to("good"), found.to("same")
    assert good and same and good.value == pytest.approx(0.5) and good.low > 0.25
    assert good.p < 0.01 and good.p_holm == pytest.approx(min(1, 2 * good.p)) and same.value == 0 and same.p == 1
    assert found.counts == {"patients": 24, "units": 48, "folds": 3, "repeats": 1, "seeds": 1}
    # The column of methods tells all that differs.
    assert set(found.differing) == {"pretrain.method"} and "Parameters that differ" not in as_markdown(found)
    assert "(initialisation: pretrained; in rows without pretraining what the column of methods names)" in as_markdown(found)
    text = as_markdown(found, full=False)
    assert "+0.50" in text and "random" in text and "24 patients, 48 videos, 3 folds, 1 seed" in text
    assert headline(found).startswith("1 of 2 differences in balanced accuracy is shown after correction")


def test_compare__agrees_with_the_statistics_of_one_run(tmp_path: Path) -> None:
    """One seed: the same numbers as the functions for a single set of predictions."""
    names = [project(tmp_path / "one", 0.6, noise=1), project(tmp_path / "two", 0.7, noise=2, start=3)]
    for metric in ("balanced_accuracy", "macro_auroc", "brier"):
        found = compare(names, Settings(metric=metric, replicates=300))
        first, second = (Scores.from_table(pd.read_csv(Path(name) / "reports/evaluate/predictions_video.csv"), ["a", "b"]) for name in reversed(names))
        drawn, tested = paired_bootstrap(first, second, metric, replicates=300), permutation_test(first, second, metric, permutations=500)
        pair = found.pairs[0]
        assert (pair.value, pair.low, pair.high) == pytest.approx((drawn.difference, drawn.low, drawn.high))
        assert pair.p == pytest.approx(tested.p_value)


def test_compare__seeds_are_averaged_and_paired(tmp_path: Path) -> None:
    """The value of a row is the mean over its seeds; seeds of one row do not make more patients."""
    parts = [project(tmp_path / f"a-s{seed}", 0.5 + 0.25 * seed, seeds=(seed,)) for seed in range(2)]
    other = project(tmp_path / "b", 0.5, seeds=(0, 1), params={"pretrain": {"seed": 0}})
    found = compare([other, f"A={parts[0]}+{parts[1]}"], FAST)
    row = found.rows[1]
    assert row.name == "A" and row.members == ("a-s0", "a-s1") and found.counts["seeds"] == 2 and found.counts["patients"] == 24
    assert row.seeds == pytest.approx({"0": 0.5, "1": 0.75}) and row.values["balanced_accuracy"].value == pytest.approx(0.625)
    assert found.pairs[0].value == pytest.approx(0.125)


def test_compare__equal_seeds_change_no_interval(tmp_path: Path) -> None:
    table = predictions(0.6, noise=3)
    twice = pd.concat([table.assign(seed=0), table.assign(seed=1)]).assign(repeat=0, unit=lambda t: t["video"])
    once, two = (Measured(name, part, ["a", "b"]) for name, part in (("once", twice[twice["seed"] == 0]), ("two", twice)))
    for name in ("macro_f1", "macro_auroc"):
        left, right = (one.intervals(0.95)[name] for one in (once, two))
        assert (left.value, left.low, left.high) == pytest.approx((right.value, right.low, right.high))
    with pytest.raises(DataError, match="same patients, classes and seeds"):
        difference(once, two, "accuracy")


def test_compare__join_seeds_finds_what_belongs_together(tmp_path: Path) -> None:
    names = [
        project(tmp_path / f"{method}-s{seed}", seeds=(seed,), params={"pretrain": {"method": method}}) for method in ("ucl", "simclr") for seed in range(2)
    ]
    found = compare(names, Settings(replicates=200, join_seeds=True))
    assert [row.name for row in found.rows] == ["ucl", "simclr"] and [len(row.members) for row in found.rows] == [2, 2]


def test_compare__one_seed_of_finetuning_with_several_encoders(tmp_path: Path) -> None:
    """Then the seed of pretraining tells the runs apart."""
    parts = [project(tmp_path / f"a{seed}", params={"pretrain": {"seed": seed}}) for seed in range(2)]
    others = [project(tmp_path / f"b{seed}", params={"pretrain": {"seed": seed, "epochs": 3}}) for seed in range(2)]
    found = compare(["+".join(parts), "+".join(others)], FAST)
    assert set(found.rows[0].seeds) == {"0/0", "1/0"} and found.counts["seeds"] == 2


def test_compare__repeats_and_folds_enter_the_resampled_t(tmp_path: Path) -> None:
    names = [project(tmp_path / "one", 0.5, repeats=2), project(tmp_path / "two", 0.7, repeats=2, start=2)]
    found = compare(names, FAST)
    folds = found.pairs[0].folds
    assert found.counts["repeats"] == 2 and folds["count"] == 6 and folds["test_over_train"] == pytest.approx(0.75, abs=0.1), "a third of training is held back"
    assert found.counts["folds"] == 3 and "3 folds, 2 repeats" in as_markdown(found) and "inner validation part is no training" in as_markdown(found)
    assert 0 < folds["p_value"] <= 1 and any("resampled t-test" in line for line in protocol(found))


def test_compare__delong_and_mcnemar_stand_beside(tmp_path: Path) -> None:
    names = [project(tmp_path / "one", 0.6, noise=1), project(tmp_path / "two", 0.8, noise=2, start=3)]
    found = compare(names, Settings(metric="macro_auroc", replicates=200))
    first, second = (Scores.from_table(pd.read_csv(Path(name) / "reports/evaluate/predictions_video.csv"), ["a", "b"]) for name in reversed(names))
    assert found.pairs[0].others["DeLong, b"]["p_value"] == pytest.approx(delong_test(first, second, 1).p_value)
    assert "p (DeLong)" in as_markdown(found)
    accuracy = compare(names, Settings(metric="accuracy", replicates=200))
    assert accuracy.pairs[0].others["McNemar"]["kind"] == "clustered" and "p (McNemar)" in as_markdown(accuracy)


def test_compare__levels_reference_and_all_pairs(tmp_path: Path) -> None:
    names = [project(tmp_path / name, right, start=place) for place, (name, right) in enumerate((("a", 0.5), ("b", 0.7), ("c", 0.8)))]
    patients = compare(names, Settings(level="patient", replicates=200, reference="c"))
    assert patients.counts["units"] == 24 and {pair.second for pair in patients.pairs} == {"c"} and patients.to("c") is None
    assert compare(names, Settings(level="frame", replicates=200)).counts["units"] == 96
    every = compare(names, Settings(all_pairs=True, replicates=200))
    assert [(pair.first, pair.second) for pair in every.pairs] == [("b", "a"), ("c", "a"), ("c", "b")]
    raw = sorted(pair.p for pair in every.pairs)
    assert min(pair.p_holm for pair in every.pairs) == pytest.approx(min(1, 3 * raw[0]))
    assert any(grid.title.startswith("All pairs") for grid in grids(every))


def test_compare__what_cannot_be_had_is_none(tmp_path: Path) -> None:
    """A perfect model has no interval: its patients do not differ."""
    found = compare([project(tmp_path / "one", 1.0), project(tmp_path / "two", 1.0, noise=1)], FAST)
    value = found.rows[0].values["accuracy"]
    assert value.value == 1 and value.low is None and "same result" in value.reason
    json.dumps(found.as_dict(), allow_nan=False)


def test_compare__the_start_is_part_of_the_name(tmp_path: Path) -> None:
    """ImageNet weights without pretraining are not called random."""
    names = [project(tmp_path / name, params={"pretrain": {"method": method, "init": "imagenet"}}) for name, method in (("plain", "random"), ("from", "ucl"))]
    assert [row.method for row in compare(names, FAST).rows] == ["imagenet", "ucl from imagenet"]


def test_compare__unequal_stamps_are_carried_and_warned_of(tmp_path: Path) -> None:
    names = [project(tmp_path / "one"), project(tmp_path / "two", 0.9, stamp="transductive pretraining")]
    found = compare(names, FAST)
    assert "[transductive pretraining]" in as_markdown(found) and "not made under the same rules" in found.warnings[0]
    assert any("Stamped rows (transductive pretraining)" in line for line in cannot(found))


def test_compare__says_which_parameters_differ(tmp_path: Path) -> None:
    names = [project(tmp_path / "one"), project(tmp_path / "two", params={"finetune": {"label_fraction": 0.5}, "pretrain": {"epochs": 3}})]
    found = compare(names, FAST)
    assert found.differing["finetune.label_fraction"] == ["1", "0.5"] and set(found.differing) == {"finetune.label_fraction", "pretrain.epochs"}


# --- refusals ---


def test_refused__joining_experiments_that_differ_in_more_than_seeds(tmp_path: Path) -> None:
    one, two = project(tmp_path / "one"), project(tmp_path / "two", seeds=(1,), params={"pretrain": {"epochs": 3}})
    refused([one, f"{one}+{two}"], r"differ in more than pretrain.seed and finetune.seeds: pretrain.epochs \(\d+ and 3\)")
    same = project(tmp_path / "same", params={"evaluate": {"bootstrap": 500}, "pretrain": {"memory_budget_mb": 9}})
    other = project(tmp_path / "other", params={"pretrain": {"method": "simclr"}})
    refused([one, f"{one}+{other}"], r"more than pretrain.seed and finetune.seeds: pretrain.method \(ucl and simclr\). Give them as two rows")
    refused([one, f"{one}+{same}"], "same parameters and the same seeds: one of them is enough")
    refused([one, f"{one}+"], "write A.B.C or NAME=A.B.C, without spaces")


def test_refused__unequal_folds(tmp_path: Path) -> None:
    names = [project(tmp_path / "one"), project(tmp_path / "two", fold_shift=1)]
    words = r"not judged on the same folds: 48 of 48 units are tested in other folds \(folds 0, 1, 2\), for example 0{16}: fold 1 in 'two', fold 0 in 'one'"
    refused(names, words)

    def swapped(table: pd.DataFrame) -> pd.DataFrame:
        place = {"P0000000000": 1, "P0000000002": 0}
        return table.assign(fold=[place.get(patient, fold) for patient, fold in zip(table["patient"], table["fold"], strict=True)])

    refused([names[0], project(tmp_path / "three", edit=swapped)], r"4 of 48 units are tested in other folds \(folds 0, 1\)")
    refused([names[0], project(tmp_path / "four", edit=lambda t: t.assign(fold=t["fold"] // 2))], "2 folds and 3 folds")


def test_refused__unequal_patients_labels_classes_seeds_repeats(tmp_path: Path) -> None:
    one = project(tmp_path / "one")
    refused([one, project(tmp_path / "fewer", patients=22)], r"not judged on the same data: 4 only in 'one', such as 0{6}1600000000")
    swap = {"a": "b", "b": "a"}
    other = project(
        tmp_path / "label", edit=lambda t: t.assign(label=[swap[label] if v.startswith("00000003") else label for v, label in zip(t.video, t.label)])
    )
    refused([one, other], r"differ in the label of 2 of 48 units, such as 0000000300000000 \(a and b\): the labels table has changed")
    refused([one, project(tmp_path / "key", edit=lambda t: t.assign(patient="Q" + t.patient))], "differ in the patient of 48 of 48 units.*pseudonym_key")
    third = project(tmp_path / "class", edit=lambda t: t.rename(columns={"p_b": "p_c"}).replace({"label": {"b": "c"}}))
    refused([one, third], "different classes: a, c and a, b")
    refused([one, project(tmp_path / "seeds", seeds=(0, 1))], "different seeds: 0, 1 and 0. Differences are paired by seed: give the missing runs")
    refused([one, project(tmp_path / "repeats", repeats=2)], "different repeats: 0, 1 and 0")


def test_refused__bad_predictions(tmp_path: Path) -> None:
    one = project(tmp_path / "one")

    def broken(name: str, edit: Callable, match: str, **more: Any) -> None:
        refused([one, project(tmp_path / name, edit=edit, **more)], match)

    def first(table: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
        table = table.astype({column: object})
        table.loc[0, column] = value
        return table

    broken("nan", lambda t: first(t, "p_a", float("nan")), r"1 of 48 rows are no probabilities, such as .* of video 0{16}")
    broken("sum", lambda t: first(t, "p_a", 0.99), "1 of 48 rows are no probabilities")
    broken("column", lambda t: t.drop(columns="patient"), "column patient is missing; found: init, seed, fold")
    broken("fold", lambda t: first(t, "fold", "x"), r"fold 'x' \(video 0{16}\); allowed: whole numbers")
    broken("class", lambda t: first(t, "label", "z"), "label 'z' is none of the classes a, b")
    broken("double", lambda t: pd.concat([t, t[:3]]), r"0{16} is predicted 2 times in seed 0, repeat 0; 3 such rows")
    broken("twofold", lambda t: first(t, "fold", 2), "1 patients are tested in more than one fold, such as P0000000000")
    broken("lost", lambda t: t[~((t["seed"] == 1) & (t["fold"] == 2))], r"seed 1, repeat 0 has no prediction for 16 of 48 units \(fold 2\)", seeds=(0, 1))
    broken("patients", lambda t: pd.concat([t, first(t, "patient", "Pother").assign(seed=1)]), "has two values of patient")
    divided = project(tmp_path / "divided", edit=lambda t: first(t, "fold", 2), params={"data": {"group": "video"}})
    assert read_experiment(divided).table["fold"].iloc[0] == 2


def test_refused__too_few_unknown_or_unfinished(tmp_path: Path) -> None:
    one = project(tmp_path / "one")
    refused([one], "at least two")
    refused([one, one], "two rows are called .*; give each a name")
    refused([one, f"B={project(tmp_path / 'b')}"], "--reference 'BB' is none of .*Did you mean 'B'", Settings(reference="BB"))
    refused([one, "nonesuch"], "'nonesuch' is not a folder, not an experiment or revision of this DVC project, and not a run in MLflow.*dvc exp show")
    with pytest.raises(DataError, match="unknown metric 'acuracy'.*Did you mean 'accuracy'"):
        Settings(metric="acuracy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Run the evaluate stage there first"):
        read_experiment(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no initialisation 'random'; found: pretrained. Set --init"):
        read_experiment(one, "random")
    (Path(one) / "params.yaml").write_text("[1, 2")
    with pytest.raises(DataError, match="does not say pretrain.method"):
        read_experiment(one)


# --- curves ---


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    """Two methods at three label fractions, two seeds each."""
    return [
        project(
            tmp_path / f"{method}-{fraction}-s{seed}", right * fraction**0.3, seeds=(seed,),
            params={"pretrain": {"method": method}, "finetune": {"label_fraction": fraction}},
        )
        for method, right in (("random", 0.7), ("ucl", 0.9)) for fraction in (1.0, 0.05, 0.3) for seed in range(2)
    ]


def test_by__one_line_a_method_seeds_joined_differences_paired(sweep: list[str]) -> None:
    found = compare_by(sweep, "label_fraction", FAST)
    assert found.curve and found.curve.key == "finetune.label_fraction" and list(found.curve.values) == ["0.05", "0.3", "1"]
    assert {line: list(points) for line, points in found.curve.lines.items()} == {"random": ["0.05", "0.3", "1"], "ucl": ["0.05", "0.3", "1"]}
    assert [len(row.members) for row in found.rows] == [2] * 6
    assert [(pair.first, pair.second) for pair in found.pairs] == [(f"ucl, {value}", f"random, {value}") for value in ("0.05", "0.3", "1")]
    values = [found.rows[place].values["balanced_accuracy"].value for place in (3, 4, 5)]
    assert values == sorted(values) and found.to("ucl, 1").value > 0


def test_by__one_line_is_compared_with_its_reference_point(sweep: list[str]) -> None:
    found = compare_by(sweep[:6], "finetune.label_fraction", Settings(replicates=200, reference="random, 1"))
    assert [pair.second for pair in found.pairs] == ["random, 1"] * 2


def test_by__methods_without_the_parameter_are_level_lines(tmp_path: Path) -> None:
    names = [project(tmp_path / "random", params={"pretrain": {"method": "random"}})]
    names += [project(tmp_path / f"t{value}", 0.6, params={"methods": {"ucl": {"temperature": value}}}) for value in (0.05, 0.5)]
    found = compare_by(names, "methods.ucl.temperature", FAST)
    assert found.curve and dict(found.curve.lines["random"]) == {"": "random"} and {pair.second for pair in found.pairs} == {"random"}


def test_by__mistakes(sweep: list[str]) -> None:
    for key, match in (
        ("finetune.label_fractoin", "no experiment given has this parameter. Did you mean 'finetune.label_fraction'"),
        ("finetune.seeds", "seeds are repeats"), ("finetune.epochs", "is 20 in all experiments given"), ("lr", "It may be finetune.optimizer.lr or"),
    ):
        with pytest.raises(DataError, match=re.escape(match)):
            compare_by(sweep[:4], key, FAST)


def test_by__lines_are_named_by_keys_that_nothing_else_has(tmp_path: Path) -> None:
    names = [
        project(tmp_path / f"{before}-{after}-{rate}", params={"pretrain": {"epochs": before}, "finetune": {"epochs": after, "label_fraction": rate}})
        for before, after, rate in ((16, 30, 1.0), (16, 30, 0.5), (4, 5, 1.0), (4, 5, 0.5))
    ]
    found = compare_by(names, "label_fraction", FAST)
    assert found.curve and list(found.curve.lines) == ["ucl, finetune.epochs 30, pretrain.epochs 16", "ucl, finetune.epochs 5, pretrain.epochs 4"]


# --- what is written ---


def test_out__page_picture_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [project(tmp_path / f"method_with_a_long_name_number_{place}_$x^2$_and_more_words", 0.4 + 0.2 * place, start=place) for place in range(3)]
    out = tmp_path / "out"
    assert main(["compare", *names[:2], f"<b>X</b>={names[2]}", "--out", str(out), "--all-pairs"]) == 0
    assert "compare.html" in capsys.readouterr().out
    page = (out / "compare.html").read_text()
    assert "<script" not in page and "http" not in re.sub(r"http-equiv", "", page) and "&lt;b&gt;X&lt;/b&gt;" in page and "<b>X</b>" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and 'alt="balanced accuracy of each row' in page and "data:image/png" in page
    assert "What cannot be concluded" in page and "All pairs" in page
    written = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in written["rows"]][2] == "<b>X</b>" and len(written["differences"]) == 3
    assert len(list(csv.DictReader((out / "compare_pairs.csv").open()))) == 3 and "| experiment" in (out / "compare.md").read_text()
    assert not any(str(tmp_path) in path.read_text() for path in out.glob("compare.[!p]*"))


def test_csv__formulas_are_shielded(tmp_path: Path) -> None:
    found = compare([project(tmp_path / "one"), f"+cmd={project(tmp_path / 'two')}"], FAST)
    rows = list(csv.DictReader(as_csv(found).splitlines()))
    assert rows[1]["experiment"] == "'+cmd" and float(rows[1]["difference"]) == found.pairs[0].value and rows[0]["difference"] == ""


@pytest.mark.parametrize("count", [2, 20])
def test_picture__one_row_an_experiment_seeds_as_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from pipeline.evaluation import compare_pages

    names = [f"row number {place} {'x' * 3 * place}={project(tmp_path / str(place), 0.3 + 0.03 * place, start=place, seeds=(0, 1))}" for place in range(count)]
    figure = drawn(monkeypatch, lambda: compare_pages.draw_comparison(tmp_path / "p.png", compare(names, FAST)))
    left, right = figure.axes

    def marks(axes: Any, kind: str) -> list[Any]:
        return [line for line in axes.lines if line.get_gid() == kind]

    assert len(left.get_yticklabels()) == len(marks(left, "value")) == len(marks(left, "interval")) == count
    assert len(marks(left, "seeds")) == count and len(marks(right, "difference")) == count - 1
    boxes = [label.get_window_extent() for label in left.get_yticklabels()]
    assert all(not one.overlaps(other) for one, other in pairwise(boxes)) and min(box.x0 for box in boxes) >= 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_picture__curve_has_a_line_and_a_band_a_group_and_a_logarithmic_axis(sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.evaluation import compare_pages

    figure = drawn(monkeypatch, lambda: compare_pages.draw_curves(tmp_path / "p.png", compare_by(sweep, "finetune.label_fraction", FAST)))
    left, right = figure.axes
    assert left.get_xscale() == "log" and [len([line for line in axes.lines if line.get_gid() == "line"]) for axes in (left, right)] == [2, 1]
    assert [label.get_text() for label in left.get_xticklabels()] == ["0.05", "0.3", "1"]
    assert len([one for one in left.collections if one.get_gid() == "band"]) == 2


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None]) -> Any:
    """The figure that `draw` made, kept open."""
    from pipeline.evaluation import plots

    kept: list[Any] = []
    monkeypatch.setattr(plots.plt, "close", kept.append)
    draw()
    kept[0].canvas.draw()
    return kept[0]


# --- DVC and MLflow ---


def test_mlflow__by_run_name_experiment_name_and_ids(tmp_path: Path, empty_store: Path) -> None:
    store = tmp_path / "cwd" / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.create_experiment("sonoscope", artifact_location=(tmp_path / "artifacts").as_uri())

    def log(name: str, right: float, *, seed: int = 0, finished: bool = True) -> tuple[str, str]:
        folder = Path(project(tmp_path / f"source-{name}-{right}-{seed}", right, seeds=(seed,)))
        tags = {"sonoscope.level": "execution", "sonoscope.execution": "x", "dvc.experiment": name}
        parent = client.create_run(experiment, tags=tags, run_name=f"ucl {name}").info.run_id
        for key, value in {"pretrain.method": "ucl", "pretrain.init": "random", "pretrain.seed": str(seed), "finetune.seeds": f"[{seed}]"}.items():
            client.log_param(parent, key, value)
        child = client.create_run(experiment, tags={"mlflow.parentRunId": parent, "stage": "evaluate", "sonoscope.level": "stage"}).info.run_id
        for file in ("predictions_video.csv", "metrics.json"):
            client.log_artifact(child, str(folder / "reports/evaluate" / file))
        if finished:
            client.set_terminated(child)
            fold = client.create_run(experiment, tags={"mlflow.parentRunId": parent, "stage": "evaluate", "item": "fold 0", "sonoscope.level": "stage"})
            client.set_terminated(fold.info.run_id)
        return parent, child

    one, two = log("tepid-gibe", 0.5), log("bold-newt", 1.0)
    found = compare(["tepid-gibe", "ucl bold-newt"], FAST)
    assert found.pairs[0].value == pytest.approx(0.5) and found.rows[0].method == "ucl"
    by_id = compare([one[0], two[1]], FAST)
    assert by_id.pairs[0].value == found.pairs[0].value
    # A folder and a run are the same kind of thing.
    joined = compare([f"A=tepid-gibe+{project(tmp_path / 'seed1', 0.5, seeds=(1,))}", f"B=bold-newt+{project(tmp_path / 'other1', 0.5, seeds=(1,))}"], FAST)
    assert joined.counts["seeds"] == 2
    log("bold-newt", 0.75), log("slow", 0.5, finished=False)
    refused(["tepid-gibe", "bold-newt"], f"2 runs in MLflow are called 'bold-newt'; give the id of one .newest first.: .*{two[0]}")
    refused(["tepid-gibe", "slow"], "run 'slow' has no finished evaluation")
    refused(["tepid-gibe", "bold-nwt"], "Did you mean 'bold-newt'.*There are: bold-newt, slow, tepid-gibe.")
    client.create_run(experiment, tags={"sonoscope.level": "execution", "dvc.experiment": "workspace"}, run_name="ucl baseline 1898d06")
    refused(["tepid-gibe", "bold-nwt"], "tepid-gibe, 'ucl baseline 1898d06'.")
    refused(["tepid-gibe", "0" * 32], "is not a folder")
    refused(["tepid-gibe", "ucl bold-newt"], "no artifact predictions.csv", Settings(level="frame"))


def test_mlflow__asking_creates_no_store(tmp_path: Path) -> None:
    assert Finder().names() == [] and not (tmp_path / "cwd" / "mlflow.db").exists()
