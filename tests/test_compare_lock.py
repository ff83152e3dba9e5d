"""`sonoscope compare` of folders and DVC's revisions: results with the parameters they were made with, whatever params.yaml says by now."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_compare import FAST, nowhere, project, refused

from pipeline.evaluation.compare import compare
from pipeline.evaluation.compare_lock import folder_digest
from pipeline.evaluation.compare_sources import read_experiment

__all__ = ["nowhere"]  # a fixture, for every test here


def lock_results(folder: Path, params: dict[str, Any], more: dict[str, Any] | None = None) -> None:
    """A dvc.lock that says the results in the folder were made with `params`; `more` are further stages."""
    evaluate = {
        "deps": [{"path": "data/splits.json", "md5": "1"}], "params": {"params.yaml": params},
        "outs": [{"path": "reports/evaluate", "md5": folder_digest(folder / "reports/evaluate")}],
    }
    (folder / "dvc.lock").write_text(json.dumps({"stages": {**(more or {}), "evaluate": evaluate}}))


def test_made_with__what_dvc_recorded_and_not_what_params_yaml_says_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"pretrain": {"method": "ucl", "seed": 0, "sources": ["main"]}, "methods.ucl": {"temperature": 0.1}, "finetune": {"seeds": [0]}}
    split = {"params": {"params.yaml": {"split": {"seed": 5}, "data.group": "video"}}, "outs": [{"path": "data/splits.json", "md5": "1"}]}
    one = Path(project(tmp_path / "one", params={"pretrain": {"method": "simclr"}, "split": {"seed": 0}}))
    lock_results(one, made, {"split": split})
    found = read_experiment(str(one))
    assert (found.params["pretrain.method"], found.params["methods.ucl.temperature"], found.params["split.seed"]) == ("ucl", "0.1", "5")
    assert found.params["data.group"] == "video" and "methods.simclr.temperature" not in found.params
    told = capsys.readouterr().err
    assert "pretrain.method ucl (params.yaml: simclr), data.group video (params.yaml: patient), split.seed 5 (params.yaml: 0); dvc repro" in told
    assert "methods." not in told

    lock_results(one, made, {"split": {**split, "outs": [{"path": "data/splits.json", "md5": "2"}]}})
    assert read_experiment(str(one)).params["split.seed"] == "0"
    assert "split ran again after the results were made" in capsys.readouterr().err

    (one / "reports/evaluate/metrics.json").write_text(json.dumps({"stamp": "none", "by": "hand"}))
    assert read_experiment(str(one)).params["pretrain.method"] == "simclr"
    assert "is not what dvc.lock records" in capsys.readouterr().err

    for odd in ("[1", "stages: [a]", "stages: {evaluate: {params: [b]}}", "stages: {evaluate: {params: {params.yaml: {pretrain: 3}}}}", "stages: 3"):
        (one / "dvc.lock").write_text(odd)
        assert read_experiment(str(one)).params["pretrain.method"] == "simclr"


def test_dvc__experiments_revisions_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A project with two commits whose results are in DVC's cache, read without touching the working tree."""
    # DVC keeps writing to the standard output that it met first, which is an earlier test's.
    caplog.set_level("CRITICAL", "dvc")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.delenv("DVC_ROOT")

    def run(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)

    run("git", "init", "-q")
    run("git", "config", "user.email", "a@b")
    run("git", "config", "user.name", "a")
    from dvc.repo import Repo

    repo = Repo.init()
    (home / "dvc.yaml").write_text("stages:\n  evaluate:\n    cmd: 'true'\n    params: [pretrain, finetune]\n    outs: [reports/evaluate]\n")
    for name, right in (("one", 0.5), ("two", 1.0)):
        project(tmp_path / f"made-{name}", right, params={"pretrain": {"sources": ["main"]}})
        if (home / "reports").exists():
            shutil.rmtree(home / "reports")
        (tmp_path / f"made-{name}" / "reports").rename(home / "reports")
        (home / "params.yaml").write_bytes((tmp_path / f"made-{name}" / "params.yaml").read_bytes())
        repo.commit("evaluate", force=True)
        run("git", "add", "-A")
        run("git", "commit", "-q", "-m", name)
        run("git", "tag", name)
    before = (home / "params.yaml").stat().st_mtime_ns
    capsys.readouterr()
    read_experiment("workspace")
    found = compare(["one", "HEAD"], FAST)
    assert found.pairs[0].value == pytest.approx(0.5) and (home / "params.yaml").stat().st_mtime_ns == before
    assert capsys.readouterr().err == "", "DVC's digest of the results, and its parameters, are those of the folder"
    edited = json.loads((home / "params.yaml").read_text())
    (home / "params.yaml").write_text(json.dumps({**edited, "finetune": {**edited["finetune"], "epochs": 3}, "pretrain": {**edited["pretrain"], "seed": 4}}))
    assert read_experiment("workspace").params["pretrain.seed"] == "0" == read_experiment(".").params["pretrain.seed"]
    told = capsys.readouterr().err
    assert "warning: workspace: its results" in told and "warning: .: its results" in told and "pretrain.seed 0 (params.yaml: 4)" in told
    for path in sorted((home / ".dvc/cache/files").rglob("*")):
        if path.is_file() and not path.name.endswith(".dir"):
            path.chmod(0o644)
            path.unlink()
    refused(["one", "HEAD"], "'one' is known, but its reports/evaluate/predictions_video.csv is not there .*dvc pull")
