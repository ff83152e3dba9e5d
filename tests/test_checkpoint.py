"""Checkpoints survive damage, full disks and strangers; foreign weights are named for what they are."""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.checkpoint import (
    export_encoder,
    latest_checkpoint,
    load_checkpoint,
    read_state_dict,
    save_checkpoint,
)
from pipeline.errors import CheckpointError
from pipeline.models.backbones import build_backbone

MARK = "0123456789abcdef"


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(40, 7, generator=generator), "n": torch.tensor(step)}
    return {"fingerprint": MARK, "networks": weights, "rows": "[]", "epoch": step, "seconds": 1.5}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Every write beyond `size` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_save_checkpoint__round_trip_keeps_the_two_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / "state-0000000099.part").write_bytes(b"left behind by a kill")
        save_checkpoint(tmp_path, step, state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-0000000003.pt", "state-0000000004.pt"]
    found, skipped = latest_checkpoint(tmp_path, MARK)
    assert skipped == []
    assert found["epoch"] == 4
    assert torch.equal(found["networks"]["w"], state(4)["networks"]["w"])


def test_latest_checkpoint__falls_back_behind_damaged_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, state(3))
    save_checkpoint(tmp_path, 4, state(4))
    newest = tmp_path / "state-0000000004.pt"
    newest.write_bytes(newest.read_bytes()[:700])
    found, skipped = latest_checkpoint(tmp_path, MARK)
    assert found["epoch"] == 3
    assert len(skipped) == 1
    assert re.fullmatch(
        r"state-0000000004\.pt: not a readable checkpoint \(\w+\)\. Delete it to start over\.", skipped[0]
    )


def test_save_checkpoint__damaged_newer_files_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """After falling back to an older state, the next states have lower step numbers than the damaged files."""
    for name in ("state-0000000008.pt", "state-0000000009.pt"):
        (tmp_path / name).write_bytes(b"damaged")
    save_checkpoint(tmp_path, 3, state(3))
    assert latest_checkpoint(tmp_path, MARK)[0]["epoch"] == 3
    save_checkpoint(tmp_path, 4, state(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-0000000003.pt", "state-0000000004.pt"]


def test_load_checkpoint__no_damage_goes_unnoticed(tmp_path: Path) -> None:
    """Cut, flipped and blanked files: the same tensors, or a CheckpointError; never other numbers or a traceback."""
    path = save_checkpoint(tmp_path, 1, state(1))
    raw, rng, refused = path.read_bytes(), random.Random(0), 0
    for attempt in range(200):
        damaged = bytearray(raw)
        at = rng.randrange(len(raw))
        if attempt % 3 == 0:
            del damaged[at:]
        elif attempt % 3 == 1:
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
        path.write_bytes(damaged)
        try:
            got = load_checkpoint(path, MARK)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(got["networks"]["w"], state(1)["networks"]["w"])
        try:
            read_state_dict(path)
        except CheckpointError:
            pass
    assert refused > 120


def test_load_checkpoint__foreign_fingerprint_and_format(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(1))
    with pytest.raises(
        CheckpointError,
        match=f"belongs to another run \\(fingerprint {MARK}, this run has ffff\\).*delete it to start over",
    ):
        load_checkpoint(path, "ffff")
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="not a Sonoscope checkpoint of format 1"):
        load_checkpoint(path, MARK)


def test_save_checkpoint__full_disk_keeps_the_last_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    with largest_file(1500), pytest.raises(CheckpointError) as refused:
        save_checkpoint(tmp_path, 2, state(2))
    text = str(refused.value)
    assert text.startswith("state-0000000002.pt: could not be written (")
    assert "GiB free in the scratch folder). Free some space and start the same command again: it continues" in text
    assert [p.name for p in tmp_path.iterdir()] == ["state-0000000001.pt"]
    assert latest_checkpoint(tmp_path, MARK)[0]["epoch"] == 1


def test_save_checkpoint__no_space_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="could not be written \\(No space left on device; "):
        save_checkpoint(tmp_path, 2, state(2))
    assert list(tmp_path.iterdir()) == []


class Payload:
    """What an attacker puts into a weights file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "read", [lambda p: read_state_dict(p), lambda p: load_checkpoint(p, MARK)], ids=["weights", "checkpoint"]
)
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, read) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"state_dict": Payload(mark)}, path)
    with pytest.raises(CheckpointError, match="evil.pt"):
        read(path)
    assert not mark.exists()


def test_read_state_dict__messages(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"pretrain\.init: .*imagnet does not exist\. Allowed: random, imagenet, or a weights file",
    ):
        read_state_dict(tmp_path / "imagnet")
    with pytest.raises(CheckpointError, match=r"is a folder; name the weights file in it\. Allowed: random, imagenet, or a weights file"):
        read_state_dict(tmp_path)
    torch.save({"state_dict": Payload(tmp_path / "x")}, tmp_path / "code.pth")
    with pytest.raises(
        CheckpointError,
        match="code.pth is refused: it holds Python objects that would run code.*ask its author for a state dict",
    ):
        read_state_dict(tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.safetensors is not a readable weights file"):
        read_state_dict(tmp_path / "text.safetensors")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match=r"numbers\.pt holds no named tensors\. Allowed: a state dict"):
        read_state_dict(tmp_path / "numbers.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_state_dict(tmp_path / "tensor.pt")


def test_export_encoder__plain_torchvision_names(tmp_path: Path) -> None:
    """Loads into torchvision's own network with only `fc` missing, also from channels-last memory."""
    network, features = build_backbone("resnet18", 3)
    network.to(memory_format=torch.channels_last)
    export_encoder(tmp_path, network.state_dict(), {"backbone": "resnet18"})
    plain = torchvision.models.resnet18()
    missing = plain.load_state_dict(load_file(str(tmp_path / "encoder.safetensors")), strict=False)
    assert sorted(missing.missing_keys) == ["fc.bias", "fc.weight"]
    assert missing.unexpected_keys == []
    plain.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(images), network.eval()(images))
    assert features == 512
    assert json.loads((tmp_path / "card.json").read_text()) == {"backbone": "resnet18"}


def test_save_tensors__equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    """The library orders metadata at random, which would give one result many hashes."""
    tensors = {"conv.weight": torch.randn(3, 5), "bn.num_batches_tracked": torch.tensor(7), "bn.bias": torch.zeros(2, dtype=torch.float16)}
    written = set()
    for turn in range(12):
        order = dict(reversed(tensors.items())) if turn % 2 else tensors
        checkpoint.save_tensors(tmp_path / "w.safetensors", order, {"schema": 1, "backbone": "résnet"})
        written.add((tmp_path / "w.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sonoscope"]) == {"schema": 1, "backbone": "résnet"} and file.metadata()["format"] == "pt"
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_alone_in__a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from pipeline.files import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(float(sys.argv[2])); print(time.monotonic(), flush=True)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "1.0"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "in\n"
    second = subprocess.run([sys.executable, "-c", script, str(tmp_path), "0"], capture_output=True, text=True, check=True)
    lines = second.stdout.splitlines()
    assert lines[0].startswith("another process computes the same result") and lines[1] == "in"
    assert float(first.communicate()[0].splitlines()[-1]) <= float(lines[-1])


def test_read_state_dict__files_that_would_grow_in_memory(tmp_path: Path) -> None:
    """A megabyte of zeros in a file of a few kB: torch itself never compresses."""
    torch.save({"conv1.weight": torch.zeros(2**18)}, tmp_path / "plain.pth")
    assert read_state_dict(tmp_path / "plain.pth")["conv1.weight"].shape == (2**18,)
    with zipfile.ZipFile(tmp_path / "plain.pth") as given, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in given.infolist():
            packed.writestr(entry.filename, given.read(entry))
    assert (tmp_path / "packed.pth").stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="pretrain.init: packed.pth is refused: its entries are compressed or overlap"):
        read_state_dict(tmp_path / "packed.pth")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "old.pth")["a"].sum() == 3
