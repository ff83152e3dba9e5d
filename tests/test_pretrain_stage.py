"""The pretrain stage: killed and continued processes, scratch folders that never meet, results that are handed over."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_kit import (
    ListTracker,
    make_config,
    make_project,
    make_store,
    never,
    run_stage,
    stage_command,
    stage_environment,
)

from pipeline.data.splits import Splits
from pipeline.data.splitting import make_splits
from pipeline.data.store import FrameStore
from pipeline.errors import DataError
from pipeline.training import pretrain_stage
from pipeline.training.inputs import open_pretrain_inputs
from pipeline.training.pretrain import Pretraining

# --- the stage, as processes ----------------------------------------------------------------------------------------

SLOW = {"pretrain__epochs": 3, "pretrain__checkpoint_seconds": 0, "pretrain__samples_per_video": 3}


def wait_for_state(folder: Path, process: subprocess.Popen, count: int) -> None:
    """Until the run has saved state number `count`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(int(p.stem.split("-")[1]) >= count for p in folder.glob(".scratch/pretrain/*/state-*.pt")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no checkpoint appeared")


def result(folder: Path, fold: int = 0) -> tuple[dict[str, torch.Tensor], str]:
    encoder = folder / f"models/encoders/fold{fold}"
    return load_file(str(encoder / "encoder.safetensors")), (encoder / "curves.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose fold 0 was pretrained in one go by the stage."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_project(folder, **SLOW)
    done = run_stage(folder, "pretrain", "--fold", "0")
    assert done.returncode == 0, done.stderr
    assert "pretrain fold 0: done; encoder in models/encoders/fold0" in done.stdout
    return folder


def test_stage__killed_and_terminated_runs_end_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL after the first states, start again, SIGTERM (saves, exit status 2, says how to go on), start again."""
    make_project(tmp_path, **SLOW)
    start = {
        "cwd": tmp_path,
        "env": stage_environment(tmp_path),
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    first = subprocess.Popen(stage_command("pretrain", "--fold", "0"), **start)
    wait_for_state(tmp_path, first, 2)
    first.kill()
    first.communicate()
    second = subprocess.Popen(stage_command("pretrain", "--fold", "0"), **start)
    wait_for_state(tmp_path, second, 7)
    second.send_signal(signal.SIGTERM)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2, err
    assert "continuing at epoch 1/3, step" in out
    assert "error: pretrain: stopped by SIGTERM; the state is saved. Start the same command again to continue." in err
    assert "Traceback" not in err
    assert not (tmp_path / "models").exists()
    last = run_stage(tmp_path, "pretrain", "--fold", "0")
    assert last.returncode == 0, last.stderr
    weights, curves = result(tmp_path)
    expected, expected_curves = result(undisturbed)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert curves == expected_curves
    assert list(tmp_path.glob(".scratch/pretrain/*/state-*")) == []


def test_stage__card_and_sidecar(undisturbed: Path) -> None:
    card = json.loads((undisturbed / "models/encoders/fold0/card.json").read_text())
    splits = Splits.read(undisturbed / "data/splits.json")
    assert card["groups"] == splits.groups_of(splits.fold(0).train)
    assert not set(card["groups"]) & set(splits.groups_of(splits.fold(0).test))
    known = {
        "method": "ucl",
        "scope": "fold",
        "transductive": False,
        "fold": 0,
        "epochs": 3,
        "world_size": 1,
        "videos": 6,
    }
    assert {key: card[key] for key in known} == known
    sidecar = json.loads((undisturbed / "reports/runs/pretrain-fold0.json").read_text())
    assert sidecar["fingerprint"] == card["fingerprint"]


def test_stage__finished_result_is_reused_with_this_runs_facts(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start trains nothing; fold, scope and names of patients are those of the asking run, not of the first.

    Otherwise a new pseudonym key would leave old names in the card, and the check for leaks would compare nothing.
    """
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    shutil.rmtree(tmp_path / "models")
    path = tmp_path / "data/splits.json"
    for group in set(Splits.read(path).groups.values()):
        path.write_text(path.read_text().replace(group, "Pfeed" + group[-6:]))
    config = make_config(tmp_path, **SLOW)
    monkeypatch.setattr(pretrain_stage, "_pretrain_here", None)  # would fail if it were called
    line = pretrain_stage.run_pretrain_stage(config, 0, Path("stages/pretrain.py"))
    assert line == "pretrain fold 0: finished result reused; encoder in models/encoders/fold0"
    card = json.loads((tmp_path / "models/encoders/fold0/card.json").read_text())
    assert len(card["groups"]) == 6
    assert all(group.startswith("Pfeed") for group in card["groups"])
    assert card["pretrain"]["batch_size"] == config.pretrain.batch_size and card["pretrain"]["optimizer"]["lr"] == config.pretrain.optimizer.lr
    monkeypatch.setenv("RANK", "1")
    shutil.rmtree(tmp_path / "models")
    pretrain_stage.run_pretrain_stage(config, 0, Path("stages/pretrain.py"))
    assert not (tmp_path / "models").exists(), "only the first of several processes writes"


def test_card__names_a_weights_file_by_its_content_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"abc")
    config = make_config(tmp_path, pretrain__init=str(tmp_path / "w.pth"), data={"pseudonym_key": "hush", "source": str(tmp_path)})
    text = json.dumps(pretrain_stage._settings(config))
    assert "weights file, SHA-256 ba7816bf" in text and "hush" not in text and str(tmp_path) not in text and "w.pth" not in text


# --- scratch folders ------------------------------------------------------------------------------------------------


def marks(folder: Path, monkeypatch: pytest.MonkeyPatch, splits: Splits, fold: int = 0, **changes: object) -> str:
    monkeypatch.chdir(folder)
    return open_pretrain_inputs(make_config(folder, **changes), splits, fold).fingerprint


def test_fingerprint__sweep_points_and_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes the encoder changes the folder; what does not, does not; equal videos share one result."""
    _, splits = make_project(tmp_path)
    base = marks(tmp_path, monkeypatch, splits)
    different = [
        {"methods__ucl__temperature": 0.1},
        {"pretrain__seed": 1},
        {"pretrain__epochs": 4},
        {"pretrain__method": "moco"},
        {"pretrain__batch_size": 8},
        {"extract__short_side": 64},
        {"pretrain__scope": "all"},
        {"methods__ucl__augmentation": {"blur": 0.5}},
    ]
    found = [marks(tmp_path, monkeypatch, splits, **change) for change in different]
    assert len({base, *found}) == len(different) + 1
    same = [
        {"methods__moco__temperature": 0.5},
        {"pretrain__checkpoint_seconds": 1},
        {"pretrain__monitor": {"every_epochs": 2}},
        {"finetune__epochs": 9},
        {"pretrain__memory_budget_mb": 1},
        {"launch__threads": 2},
        {"tracking__experiment": "x"},
    ]
    assert {marks(tmp_path, monkeypatch, splits, **change) for change in same} == {base}
    assert marks(tmp_path, monkeypatch, splits, 1) != base
    everything = {marks(tmp_path, monkeypatch, splits, fold, pretrain__scope="all") for fold in (0, 1, 2)}
    assert len(everything) == 1, "with scope all the folds share one encoder"


def test_inputs__folds_with_equal_videos_share_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretraining on a further source alone: no test patient lies in it, so all folds see the same."""
    config, _ = make_project(tmp_path, data__extra_sources={"more": {"path": "x"}}, pretrain__sources=["more"])
    extra = make_store(tmp_path / "data/frames/more", 4, first=100, source="more", labelled=False)
    splits = make_splits(FrameStore(tmp_path / "data/frames/main").manifest, config, extra={"more": extra.manifest})
    monkeypatch.chdir(tmp_path)
    inputs = [open_pretrain_inputs(config, splits, fold) for fold in (0, 1, 2)]
    assert len({i.fingerprint for i in inputs}) == 1
    assert len(inputs[0].videos) == 4
    assert inputs[0].labels == [-1] * 4


def test_inputs__split_by_frame_is_transductive_and_knows_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, splits = make_project(tmp_path, frames=24, data__group="frame", pretrain__method="simclr")
    seen = open_pretrain_inputs(config, splits, 1)
    assert sorted(ref.video for ref in seen.videos) == sorted(splits.groups) and seen.scope == "all"
    assert set(seen.labels) == {-1} and seen.fingerprint == open_pretrain_inputs(config, splits, 0).fingerprint
    untrained = open_pretrain_inputs(make_config(tmp_path, data__group="frame", pretrain__method="random"), splits, 1)
    assert untrained.scope == "none", "nothing is trained, so nothing has been seen"
    told = open_pretrain_inputs(make_config(tmp_path, data__group="frame", pretrain__method="uscl"), splits, 1)
    assert told.target_counts() == {}


def test_inputs__scope_decides_who_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, splits = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    inside = open_pretrain_inputs(config, splits, 1)
    assert not {r.video for r in inside.videos} & set(splits.fold(1).test)
    assert set(inside.labels) == {0, 1}
    outside = open_pretrain_inputs(make_config(tmp_path, pretrain__scope="all"), splits, 1)
    assert len(outside.videos) == 9
    assert set(outside.labels) == {-1}, "no monitor may look at test labels"


def test_inputs__short_videos_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, splits = make_project(tmp_path, frames=[12, 7, 12], pretrain__epochs=1)
    monkeypatch.chdir(tmp_path)
    inputs = open_pretrain_inputs(config, splits, 0)
    assert 0 < len(inputs.left_out) < 6
    run = Pretraining(config, inputs, tmp_path / "scratch", ListTracker(), threads=1)
    run.train(never())
    run.export(tmp_path / "scratch/out")
    reason = "videos are left out, because they have fewer frames than ucl samples from"
    expected = f"{len(inputs.left_out)} of 6 {reason}: {inputs.left_out[0]}"
    assert f"warning: {expected}" in capsys.readouterr().out
    card = json.loads((tmp_path / "scratch/out/card.json").read_text())
    assert card["too_short"] == inputs.left_out
    assert any(w.startswith(expected) for w in card["warnings"])
    assert len(open_pretrain_inputs(make_config(tmp_path, pretrain__method="simclr"), splits, 0).videos) == 6


def test_inputs__all_videos_too_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, splits = make_project(tmp_path, frames=5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refused:
        open_pretrain_inputs(config, splits, 0)
    assert str(refused.value) == (
        "pretrain: no video is left for method ucl: of 6 videos in main, 6 have fewer than the 8 "
        "frames it samples from. Extract "
        "more frames (extract.frames_per_second, extract.max_frames) or choose a method for single "
        "frames (simclr, moco)."
    )
    relaxed = make_config(tmp_path, methods__ucl__short_video="relax")
    assert len(open_pretrain_inputs(relaxed, splits, 0).videos) == 6


def test_stage__foreign_weights_end_with_a_sentence(tmp_path: Path) -> None:
    """As the user meets it: exit status 2, one line, no traceback."""
    torch.save({"blocks.0.attn.weight": torch.ones(2)}, tmp_path / "vit.pth")
    make_project(tmp_path, pretrain__init="vit.pth")
    done = run_stage(tmp_path, "pretrain", "--fold", "0")
    assert done.returncode == 2
    assert re.match(r"error: pretrain\.init: vit\.pth: the names are those of no known program", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
