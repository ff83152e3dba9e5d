"""The golden arrays are reproduced, and the program that compares them notices mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import check_goldens
import goldens_ucl
import numpy as np
import pytest
import torch

from pipeline import losses

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ucl(shared: Path) -> Path:
    folder = shared / "golden/ucl"
    if not folder.is_dir():
        pytest.skip("the shared folder has no golden/ucl")
    return folder


def excerpt(ucl: Path, target: Path, file_name: str, cases: int) -> Path:
    """A golden folder with the first cases of one file only."""
    target.mkdir()
    index = json.loads((ucl / "index.json").read_text())
    entry = {**index["files"][file_name], "cases": index["files"][file_name]["cases"][:cases]}
    (target / "index.json").write_text(json.dumps({**index, "files": {file_name: entry}}))
    (target / file_name).write_bytes((ucl / file_name).read_bytes())
    return target


def test_program__all_published_arrays(ucl: Path, tmp_path: Path) -> None:
    """As a user starts it: a process of its own; folders of another format are named, not failed."""
    (tmp_path / "ucl").symlink_to(ucl)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/index.json").write_text(json.dumps({"files": {"unheard_of.npz": {}}}))
    command = [sys.executable, check_goldens.__file__, "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "other: not in the format of any suite, not checked" in done.stdout
    passed, failed = re.search(r"(\d+) passed, (\d+) failed$", done.stdout.rstrip()).groups()
    assert int(passed) >= 72
    assert failed == "0"


def test_main__counts_and_exit_status(
    ucl: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any folder of the format, or one that holds such folders; a wrong number is a failure."""
    good = excerpt(ucl, tmp_path / "good", "schedule.npz", 1)
    monkeypatch.setattr(sys, "argv", ["check", "--root", str(tmp_path)])
    assert check_goldens.main() == 0
    assert capsys.readouterr().out.rstrip().endswith("1 passed, 0 failed")
    with np.load(good / "schedule.npz") as arrays:
        changed = {name: array.copy() for name, array in arrays.items()}
    name = next(name for name in changed if name.endswith("lr"))
    changed[name][0] *= 1 + 1e-6
    np.savez(good / "schedule.npz", **changed)
    assert check_goldens.main() == 1
    assert capsys.readouterr().out.rstrip().endswith("0 passed, 1 failed")
    monkeypatch.setattr(sys, "argv", ["check", "--root", str(tmp_path / "nowhere")])
    assert check_goldens.main() == 1
    assert "no golden folder found" in capsys.readouterr().out


def detached_weights(q, bank, *, support, temperature, allowed=None, mode="soft_topk"):
    z_hat, rows, exists = CORRECT["cross_video_negative"](
        q.detach(), bank, support=support, temperature=temperature, allowed=allowed, mode=mode
    )
    return z_hat, rows, exists


def renormalised(*args, **kwargs):
    z_hat, rows, exists = CORRECT["cross_video_negative"](*args, **kwargs)
    return losses.l2_normalize(z_hat), rows, exists


def temperature_only_on_positive(q, positive, negatives, z_hat, temperature, exists=None):
    logits = CORRECT["ucl_logits"](q, positive, negatives, z_hat, temperature, exists)
    return torch.cat([logits[:, :1], logits[:, 1:] * temperature], dim=1)


def cross_before_intra(q, positive, negatives, z_hat, temperature, exists=None):
    logits = CORRECT["ucl_logits"](q, positive, negatives, z_hat, temperature, exists)
    return torch.cat([logits[:, :1], logits[:, -1:], logits[:, 1:-1]], dim=1)


def weights_with_temperature_one(q, bank, **settings):
    return CORRECT["cross_video_negative"](q, bank, **{**settings, "temperature": 1.0})


CORRECT = {name: getattr(losses, name) for name in ("cross_video_negative", "ucl_logits", "l2_normalize")}


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("cross_video_negative", detached_weights),
        ("cross_video_negative", renormalised),
        ("cross_video_negative", weights_with_temperature_one),
        ("ucl_logits", temperature_only_on_positive),
        ("ucl_logits", cross_before_intra),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_check_folder__notices_deliberate_mistakes(
    ucl: Path, tmp_path: Path, name: str, mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = excerpt(ucl, tmp_path / "few", "loss.npz", 8)
    assert check_goldens.check_folder(folder, goldens_ucl) == (8, 0)
    monkeypatch.setattr(losses, name, mistake)
    _, failed = check_goldens.check_folder(folder, goldens_ucl)
    assert failed > 0
