"""The commands of "How it was made": what DVC understands, what differs from the commit, nothing private."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.evaluation.reproduction import commands

PARAMS = {
    "data": {"source": "data/phantom", "pseudonym_key": "", "classes": []}, "tracking": {"uri": None},
    "pretrain": {"epochs": 16, "optimizer": {"lr": "1e-3"}, "compile": False}, "evaluate": {"title": "x"},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_EXP_BASELINE_REV", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    write(PARAMS)
    Path("code.py").write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "start"]):
        subprocess.run(["git", *words], check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def write(params) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params))


def change(**sections) -> None:
    write({name: {**block, **sections.get(name, {})} for name, block in PARAMS.items()})


def test_commands__unchanged_parameters_need_repro_only(project):
    change(pretrain={"optimizer": {"lr": 0.001}}, tracking={"uri": "sqlite:///elsewhere.db"})
    typed = [command for command, _ in commands()]
    assert typed[:3] == [f"git checkout {project}", "pip install --require-hashes -r requirements.lock", "dvc repro"]
    assert "Uncommitted" not in commands()[0][1]


def test_commands__changed_values_as_dvc_reads_them(project):
    change(pretrain={"epochs": 3, "compile": True, "new": 0.5}, data={"classes": ["a b", "c"]})
    typed = [command for command, _ in commands()]
    assert "dvc exp run" in typed[2] and "dvc exp apply" not in " ".join(typed)
    for part in ("-S pretrain.epochs=3", "-S pretrain.compile=true", "-S +pretrain.new=0.5", """-S 'data.classes=["a b",c]'"""):
        assert part in typed[2]


def test_commands__values_survive_dvc_s_own_parser(project):
    hydra = pytest.importorskip("dvc.utils.hydra")
    change(pretrain={"epochs": 3}, data={"classes": ["a b", "c, d", "e"]}, evaluate={"title": "x"})
    import shlex

    words = shlex.split(next(command for command, _ in commands() if command.startswith("dvc exp run")))
    given = [word for word in words[3:] if word != "-S"]
    write(PARAMS)
    hydra.apply_overrides(Path("params.yaml"), given)
    assert yaml.safe_load(Path("params.yaml").read_text())["data"]["classes"] == ["a b", "c, d", "e"]


def test_commands__private_values_are_named_not_shown(project):
    change(data={"source": "/home/clinic/videos", "pseudonym_key": "top-secret"})
    lines = commands()
    assert "clinic" not in str(lines) and "top-secret" not in str(lines)
    assert "-S data.source=..." in lines[2][0] and "data.pseudonym_key" in lines[2][1]


def test_commands__experiment_and_uncommitted_code(project, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "puppy-naps")
    Path("code.py").write_text("2\n")
    lines = commands()
    assert ("dvc exp apply puppy-naps" in [command for command, _ in lines]) and "Uncommitted changes were there as well (code.py)" in lines[0][1]


def test_commands__without_git(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands(experiment="")[0][0] == "dvc repro" and "no git" in commands(experiment="")[0][1]
