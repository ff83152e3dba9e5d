"""`sonoscope compare`: paired differences on equal folds, refusal of unequal ones, unknown experiments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import DataError
from pipeline.evaluation.compare import compare, read_experiment


def project(folder: Path, right: float, *, method: str = "ucl", patients: int = 24, fold_shift: int = 0, stamp: str = "none") -> str:
    """A project folder whose model is right for a share of the patients, two videos each."""
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(patients):
        label = "ab"[patient % 2]
        good = patient < right * patients
        for clip in range(2):
            p = rng.uniform(0.6, 0.9)
            hit = p if good else 1 - p
            rows.append({
                "init": "pretrained", "seed": 0, "fold": (patient + fold_shift) % 3, "part": "test", "video": f"{patient:08x}{clip:08x}",
                "patient": f"P{patient:010x}", "label": label, "p_a": hit if label == "a" else 1 - hit, "p_b": hit if label == "b" else 1 - hit,
            })
    results = folder / "reports" / "evaluate"
    results.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(results / "predictions_video.csv", index=False)
    (results / "metrics.json").write_text(json.dumps({"stamp": stamp}))
    (folder / "params.yaml").write_text(f"pretrain: {{method: {method}}}\n")
    return str(folder)


def test_compare__difference_interval_and_corrected_p(tmp_path: Path) -> None:
    names = [project(tmp_path / "random", 0.5, method="random"), project(tmp_path / "good", 1.0), project(tmp_path / "same", 0.5)]
    result = compare(names, replicates=300)
    base, good, same = result["rows"]
    assert base["metrics"]["balanced_accuracy"].value == pytest.approx(0.5) and "difference" not in base
    assert good["difference"].difference == pytest.approx(0.5) and good["difference"].low > 0.25
    assert good["p"] < 0.01 and good["p_holm"] == pytest.approx(min(1, 2 * good["p"]))
    assert same["difference"].difference == 0 and same["p"] == 1
    lines = result["text"].splitlines()
    assert len(lines) == 5 and "minus" in lines[0] and "random" in lines[0] and "+0.50" in lines[3]


def test_compare__the_start_is_part_of_the_name(tmp_path: Path) -> None:
    """ImageNet weights without pretraining are not called random."""
    names = [project(tmp_path / "plain", 0.5, method="random, init: imagenet"), project(tmp_path / "from", 0.5, method="ucl, init: imagenet")]
    assert [row["method"] for row in compare(names, replicates=200)["rows"]] == ["imagenet", "ucl from imagenet"]


def test_compare__unequal_folds_are_refused_by_an_example(tmp_path: Path) -> None:
    names = [project(tmp_path / "one", 0.5), project(tmp_path / "two", 0.5, fold_shift=1)]
    with pytest.raises(DataError, match=r"not judged on the same folds: 96 rows differ, for example video 0{8}0{8} \(fold"):
        compare(names)


def test_compare__too_few_unknown_or_unfinished(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two"):
        compare([project(tmp_path / "one", 0.5)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Run the evaluate stage there first"):
        read_experiment(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no initialisation 'random'; found: pretrained"):
        read_experiment(str(tmp_path / "one"), "random")


def test_compare__stamp_is_carried(tmp_path: Path) -> None:
    names = [project(tmp_path / "one", 0.5), project(tmp_path / "two", 1.0, stamp="transductive pretraining")]
    assert "[transductive pretraining]" in compare(names, replicates=200)["text"]
