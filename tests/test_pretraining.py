"""The pretraining loop: exact resume from any step, what is warned of and refused, monitors, initial weights."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_kit import (
    ListTracker,
    StopAfter,
    make_config,
    make_inputs,
    make_run,
    make_store,
    never,
)

from pipeline import distributed
from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.store import FrameStore
from pipeline.data.transforms import resize_frame
from pipeline.errors import CheckpointError, PipelineError, StoppedError
from pipeline.methods.base import StepOutput
from pipeline.methods.ucl import UCL
from pipeline.parameters import MonitorParams, OptimizerParams
from pipeline.training import pretrain as pretrain_module
from pipeline.training.monitor import Monitor, chance_warning, epoch_line
from pipeline.training.pretrain import initial_backbone

TIMES = ("images_per_second", "epoch_seconds", "data_wait_share")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=6, frames=[20, 12, 30])


def finish(run, stop=None) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Train to the end; returns the exported tensors and the curves."""
    run.train(stop or never())
    folder = run.scratch / "out"
    run.export(folder)
    return load_file(str(folder / "encoder.safetensors")), list(csv.DictReader((folder / "curves.csv").open()))


def interrupted(config, store: FrameStore, scratch: Path, stops: list[int]):
    """The same run, stopped after the given numbers of further steps, each time started anew."""
    for steps in stops:
        with pytest.raises(
            StoppedError, match="pretrain: stopped by .*the state is saved. Start the same command again to continue."
        ):
            make_run(config, store, scratch).train(StopAfter(steps))
    return finish(make_run(config, store, scratch))


def assert_same(one, other) -> None:
    weights, curves = one
    assert weights.keys() == other[0].keys()
    for name, value in weights.items():
        assert torch.equal(value, other[0][name]), name
    assert curves == other[1]


# --- exact resume ---------------------------------------------------------------------------------------------------


def test_curves__the_last_row_describes_what_is_exported(store: FrameStore, tmp_path: Path) -> None:
    """DINO exports an average that still moves behind the last optimiser step."""
    run = make_run(make_config(tmp_path, pretrain__method="dino"), store, tmp_path / "a")
    _, curves = finish(run)
    measured = run.monitor.measure(run.method.backbone, run.device, run.config.method_params.augmentation.normalization)
    assert {name: float(curves[-1][name]) for name in measured} == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("method", ["ucl", "moco", "simclr", "byol", "dino", "cycle"])
def test_resume__bit_identical_from_any_step(store: FrameStore, tmp_path: Path, method: str) -> None:
    """3 epochs of 3 steps, stopped in the first step, in the middle of an epoch, at its end, and three times over."""
    config = make_config(tmp_path, pretrain__method=method)
    whole = finish(make_run(config, store, tmp_path / "a"))
    assert len(whole[1]) == 3
    assert_same(whole, interrupted(config, store, tmp_path / "b", [0, 3, 2]))


@pytest.mark.parametrize(
    "optimizer", [{"name": "adamw", "lr": 0.001}, {"name": "sgd", "lr": 0.01, "warmup_epochs": 1}], ids=["adamw", "sgd"]
)
def test_resume__bit_identical_with_accumulation_and_optimisers(
    store: FrameStore, tmp_path: Path, optimizer: dict
) -> None:
    changes = {"pretrain__optimizer": optimizer, "pretrain__accumulate": 2, "pretrain__epochs": 2}
    config = make_config(tmp_path, **changes, methods__ucl__bank_size=20)
    whole = finish(make_run(config, store, tmp_path / "a"))
    assert_same(whole, interrupted(config, store, tmp_path / "b", [1, 2]))


def test_resume__saving_after_every_step_changes_nothing(store: FrameStore, tmp_path: Path) -> None:
    config = make_config(tmp_path, pretrain__epochs=2)
    often = make_config(tmp_path, pretrain__epochs=2, pretrain__checkpoint_seconds=0)
    whole = finish(make_run(config, store, tmp_path / "a"))
    assert_same(whole, finish(make_run(often, store, tmp_path / "b")))
    names = sorted(p.name for p in (tmp_path / "b").glob("state-*"))
    assert names == ["state-0000000005.pt", "state-0000000006.pt"]


def test_resume__a_finished_run_is_finished(store: FrameStore, tmp_path: Path) -> None:
    """Killed between the last step and the export: nothing is trained again."""
    config = make_config(tmp_path, pretrain__epochs=2)
    whole = finish(make_run(config, store, tmp_path / "a"))
    assert_same(whole, finish(make_run(config, store, tmp_path / "a"), StopAfter(0)))


def test_resume__damaged_newest_falls_back_with_a_warning(
    store: FrameStore, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = make_config(tmp_path, pretrain__checkpoint_seconds=0, pretrain__epochs=2)
    whole = finish(make_run(config, store, tmp_path / "a"))
    with pytest.raises(StoppedError):
        make_run(config, store, tmp_path / "b").train(StopAfter(5))
    newest = sorted((tmp_path / "b").glob("state-*.pt"))[-1]
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 4
    newest.write_bytes(raw)
    run = make_run(config, store, tmp_path / "b")
    assert_same(whole, finish(run))
    out = capsys.readouterr().out
    assert f"warning: checkpoint not used: {newest.name}: not a readable checkpoint" in out
    assert "continuing at epoch 2/2, step 2" in out


def test_resume__foreign_fingerprint_is_not_used(store: FrameStore, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(StoppedError):
        make_run(config, store, tmp_path / "b").train(StopAfter(1))
    inputs = make_inputs(store, "f" * 16)
    run = pretrain_module.Pretraining(config, inputs, tmp_path / "b", ListTracker(), threads=1)
    assert run.resume() is False
    assert "belongs to another run (fingerprint 0123456789abcdef, this run has ffffffffffffffff)" in run.warnings[-1]


def test_resume__full_disk_while_saving(store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, the earlier state stays, and the same command continues to the same result."""
    config = make_config(tmp_path, pretrain__checkpoint_seconds=0, pretrain__epochs=2)
    whole = finish(make_run(config, store, tmp_path / "a"))
    real, calls = torch.save, []

    def full(*args: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            CheckpointError,
            match=r"state-0000000004\.pt: could not be written \(No space left on device.*continues from the last",
        ):
            make_run(config, store, tmp_path / "b").train(never())
    assert_same(whole, finish(make_run(config, store, tmp_path / "b")))


def test_resume__seconds_of_earlier_starts_count(store: FrameStore, tmp_path: Path) -> None:
    config = make_config(tmp_path, pretrain__epochs=1)
    run = make_run(config, store, tmp_path / "b")
    run.started -= 100
    with pytest.raises(StoppedError):
        run.train(StopAfter(0))
    again = make_run(config, store, tmp_path / "b")
    finish(again)
    assert 100 < json.loads((tmp_path / "b/out/card.json").read_text())["seconds"] < 200


# --- what is told and refused ---------------------------------------------------------------------------------------


def test_train__loss_that_is_not_finite(store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = UCL.step

    def broken(self, batch, progress):
        output = plain(self, batch, progress)
        return StepOutput(output.loss * (math.nan if progress.step == 1 else 1), output.metrics)

    monkeypatch.setattr(UCL, "step", broken)
    with pytest.raises(PipelineError) as refused:
        make_run(make_config(tmp_path), store, tmp_path / "a").train(never())
    text = str(refused.value)
    assert text.startswith("pretrain: the loss is not finite in epoch 1 (learning rate ")
    assert "Lower pretrain.optimizer.lr, raise methods.ucl.temperature, or set pretrain.precision to float32." in text


def test_train__diverging_run_ends_with_a_sentence(store: FrameStore, tmp_path: Path) -> None:
    """A rate that blows up in the last step of an epoch leaves a finite loss and a broken backbone."""
    config = make_config(
        tmp_path,
        pretrain__optimizer={"lr": 1e30},
        pretrain__epochs=1,
        pretrain__samples_per_video=1,
        pretrain__batch_size=6,
    )
    with pytest.raises(
        PipelineError,
        match=r"^pretrain: the (loss is|backbone gives numbers that are) not finite.*pretrain\.optimizer\.lr",
    ):
        make_run(config, store, tmp_path / "a").train(never())


def test_train__collapse_is_said(
    store: FrameStore, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_module.Monitor, "measure", lambda *_: {"embedding_std": 0.001, "effective_rank": 1.2})
    make_run(make_config(tmp_path, pretrain__epochs=1), store, tmp_path / "a").train(never())
    assert (
        "warning: epoch 1: embeddings look collapsed (std 0.001, 1 is spread evenly; effective "
        "rank 1.2). Lower the learning rate, "
        "raise the temperature, or use more negatives."
    ) in capsys.readouterr().out


def test_monitor__healthy_and_collapsed_backbones(store: FrameStore) -> None:
    frames = FrameCache(gather_videos([store]), 32)
    labels = np.array([int(r.row.label == "b") for r in frames.videos])
    monitor = Monitor(MonitorParams(frames_per_video=3), frames, labels, [r.row.patient for r in frames.videos], 32)

    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 8) + 1e-4 * x.mean((1, 2, 3))[:, None]

    class Pixels(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 0].flatten(1)

    cpu = torch.device("cpu")
    assert "embeddings look collapsed" in monitor.warning(monitor.measure(Constant(), cpu, "imagenet"), True)
    healthy = monitor.measure(Pixels(), cpu, "imagenet")
    assert monitor.warning(healthy, True) is None
    assert monitor.warning({"embedding_std": 0.01, "effective_rank": 1.0}, False).endswith("Lower the learning rate, or use larger batches.")
    assert healthy["knn_balanced_accuracy"] == 1.0, "the two classes differ in brightness"
    unlabelled = Monitor(MonitorParams(), frames, np.full(len(frames), -1), [""] * len(frames), 32)
    assert "knn_balanced_accuracy" not in unlabelled.measure(Pixels(), cpu, "imagenet")
    broken = torch.nn.Sequential(Pixels(), torch.nn.Threshold(1e9, math.nan))
    with pytest.raises(PipelineError, match="the backbone gives numbers that are not finite"):
        monitor.measure(broken, cpu, "imagenet")


def test_chance_warning__once_and_behind_the_first_quarter() -> None:
    def rows(*losses: float) -> list[dict[str, float]]:
        return [{"epoch": e, "loss": loss, "chance_loss": 1.6} for e, loss in enumerate(losses)]

    sgd = OptimizerParams(name="sgd", lr=0.03)
    assert chance_warning(rows(2.0, 1.9, 1.0, 1.0), 8, sgd, True) is None, "the first quarter may do as it likes"
    assert chance_warning(rows(1.5, 1.4, 1.58), 8, sgd, True) is None, "more than 1 % below"
    epoch, text = chance_warning(rows(1.0, 1.0, 1.59, 1.6), 8, sgd, True)
    assert epoch == 2, "the first such epoch, however long the curve has become"
    assert text == (
        "the loss (1.590) has not left chance level (1.600) after a quarter of training: the "
        "network does not tell the positive from "
        "the negatives. Lower pretrain.optimizer.lr (now 0.03), take adamw at 0.001 or raise the temperature."
    )
    _, text = chance_warning(rows(1.0, 1.0, 1.59, 1.6), 8, sgd, False)
    assert text.endswith("the network does no better than one output for all images. Lower pretrain.optimizer.lr (now 0.03) or take adamw at 0.001.")
    _, text = chance_warning(rows(1.0, 1.0, 1.59, 1.6), 8, OptimizerParams(name="adamw", lr=0.001), True)
    assert text.endswith("Lower pretrain.optimizer.lr (now 0.001), train for more epochs or raise the temperature."), "not what is set already"
    assert chance_warning([{"epoch": 7, "loss": 0.0, "chance_loss": 0.0}], 8, sgd, True) is None, (
        "no negatives, no chance level"
    )
    flat = [{"epoch": e, "loss": -0.9, "output_spread": spread} for e, spread in enumerate([0.01, 0.5, 0.5, 0.05])]
    assert chance_warning(flat[:3], 8, sgd, False) is None
    epoch, text = chance_warning(flat, 8, sgd, False)
    assert epoch == 3
    assert text.startswith("the head maps all images to nearly one point (output_spread 0.050, 1 is spread evenly)")


def test_train__head_collapse_is_said_once(store: FrameStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A head that maps everything to one point sits exactly at chance, while the backbone's statistics look healthy."""
    config = make_config(
        tmp_path, pretrain__epochs=4, pretrain__optimizer={"lr": 1e-12}, methods__ucl__cross_only_epochs=0
    )
    run = make_run(config, store, tmp_path / "a")
    for name in ("head", "key_head"):
        torch.nn.init.zeros_(run.method.networks[name][2].weight)
        torch.nn.init.ones_(run.method.networks[name][2].bias)
    finish(run)
    out = capsys.readouterr().out
    assert run.rows[-1]["loss"] == pytest.approx(math.log(5), rel=1e-3)
    assert out.count("has not left chance level (1.609)") == 1
    assert "warning: epoch 2: the loss (1.609)" in out
    assert "look collapsed" not in out
    assert "has not left chance level" in json.loads((tmp_path / "a/out/card.json").read_text())["warnings"][-1]


def test_train__batch_that_the_accumulation_does_not_divide(store: FrameStore, tmp_path: Path) -> None:
    """Only a process count can do that; parameters that contradict each other are refused before."""
    run = make_run(make_config(tmp_path), store, tmp_path / "a")
    assert run.warnings == []
    with pytest.raises(
        PipelineError,
        match=r"pretrain\.batch_size: 1 gives each forward pass one image.*batch norm has nothing to average",
    ):
        make_run(make_config(tmp_path, pretrain__batch_size=1), store, tmp_path / "a")
    lonely = make_config(tmp_path, pretrain__batch_size=2, pretrain__accumulate=2, pretrain__image_size=40, pretrain__method="byol")
    with pytest.raises(PipelineError, match=r"the batch norm in the head of byol has nothing to average\. Use at least 4"):
        make_run(lonely, store, tmp_path / "a")


def test_train__two_samples_for_the_batch_norm_of_a_head(store: FrameStore, tmp_path: Path) -> None:
    """Of two rows it keeps the sign alone. 4 samples in 2 micro-batches are such a pass, and so is what the method is told."""
    for method, told in (("byol", 1), ("simclr", 0)):
        config = make_config(tmp_path, pretrain__accumulate=2, pretrain__method=method)
        run = make_run(config, store, tmp_path / method)
        assert (run.context.global_batch, run.context.forward_batch) == (4, 2)
        assert len([line for line in run.warnings if "gives each forward pass two samples (1 processes x 2 micro-batches)" in line]) == told
    few = make_run(make_config(tmp_path, pretrain__batch_size=64), store, tmp_path / "few")
    assert few.context.forward_batch == 12, "6 videos, 2 samples of each"


def test_train__synchronised_batch_norm_averages_over_all_processes(
    store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        make_run(make_config(tmp_path, pretrain__method="byol", pretrain__sync_batchnorm=sync), store, tmp_path / str(sync)) for sync in (True, False)
    ]
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert not [line for line in runs[0]._size_warnings() if "samples (4 processes" in line]
    with pytest.raises(PipelineError, match=r"one image \(4 processes x 1 micro-batches\), and .* at least 8 samples"):
        runs[1]._size_warnings()


def test_train__last_batch_of_one_sample(tmp_path: Path) -> None:
    """13 samples in batches of 4: the last one is filled up, because batch norm cannot average one pixel."""
    store = make_store(tmp_path / "s", patients=13, frames=8, side=32)
    for method in ("ucl", "simclr", "moco"):
        config = make_config(tmp_path, pretrain__samples_per_video=1, pretrain__epochs=1, pretrain__method=method)
        run = make_run(config, store, tmp_path / method)
        assert run.context.steps_per_epoch == 4
        finish(run)
        assert np.isfinite(run.rows[0]["loss"])


def test_train__metrics_are_logged_once_an_epoch(store: FrameStore, tmp_path: Path) -> None:
    tracker = ListTracker()
    run = make_run(make_config(tmp_path), store, tmp_path / "a", tracker)
    run.train(never())
    assert [step for step, _ in tracker.metrics] == [0, 1, 2]
    last = tracker.metrics[-1][1]
    wanted = {
        "loss",
        "chance_loss",
        "learning_rate",
        "embedding_std",
        "effective_rank",
        "knn_balanced_accuracy",
        *TIMES,
    }
    assert wanted <= set(last)
    assert last["learning_rate"] == pytest.approx(
        0.01 * np.mean([(1 + math.cos(math.pi * (2 + s / 3) / 3)) / 2 for s in range(3)])
    )
    assert [m["chance_loss"] for _, m in tracker.metrics] == pytest.approx([math.log(2), math.log(5), math.log(5)])


def test_epoch_line__is_readable() -> None:
    row = {"epoch": 3, "loss": 1.23456, "chance_loss": 1.609, "embedding_std": 0.5, "images_per_second": 812.4}
    assert epoch_line(row, 16, 75) == "epoch 4/16  loss 1.2346 (chance 1.61)  std 0.50  812 images/s  ETA 1:15"
    row = {"epoch": 3, "loss": -0.9, "output_spread": 0.81, "images_per_second": 812.4}
    assert epoch_line(row, 16, 75) == "epoch 4/16  loss -0.9000  spread 0.81  812 images/s  ETA 1:15"


def test_initial_backbone__same_in_every_process_and_from_a_file(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    torch.manual_seed(5)
    one, features, report = initial_backbone(config)
    torch.manual_seed(6)
    other, _, _ = initial_backbone(config)
    assert (features, report) == (512, None)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    torch.save(
        {"state_dict": {f"module.encoder_q.{k}": v + 1 for k, v in one.state_dict().items()}},
        tmp_path / "given.pth.tar",
    )
    given, _, report = initial_backbone(make_config(tmp_path, pretrain__init=str(tmp_path / "given.pth.tar")))
    assert (report.format, report.prefix) == ("MoCo", "state_dict.module.encoder_q.")
    assert torch.equal(given.conv1.weight, one.conv1.weight + 1)


def test_pretrain_init__says_how_inputs_are_normalised(store: FrameStore, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save(initial_backbone(make_config(tmp_path))[0].state_dict(), tmp_path / "trunk.pth")
    augmentation = {"normalization": "half"}
    make_run(make_config(tmp_path, pretrain__init=str(tmp_path / "trunk.pth"), methods__ucl__augmentation=augmentation), store, tmp_path / "s")
    assert "inputs are normalised as `half` (mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5))" in capsys.readouterr().out


def test_pick_device__cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.pick_device("auto").type == "cpu"
    with pytest.raises(
        PipelineError, match=r"launch\.device: cuda was asked for, but torch sees no GPU.*allowed: auto, cpu"
    ):
        distributed.pick_device("cuda")


def test_resize_frame__never_below_the_asked_size() -> None:
    for height, width in ((41, 40), (33, 200), (300, 47)):
        assert min(resize_frame(np.zeros((height, width), np.uint8), 32).shape) == 32
