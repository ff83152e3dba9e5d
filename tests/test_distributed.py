"""Two processes compute what one computes: losses, gradients, banks, curves; and a run of two can be continued."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from training_kit import (
    CPU,
    StopAfter,
    make_config,
    make_method,
    make_project,
    make_run,
    make_store,
    never,
    run_stage,
    stage_command,
    stage_environment,
    toy_loader,
)

from pipeline import distributed
from pipeline.data.store import FrameStore
from pipeline.errors import StoppedError
from pipeline.methods.base import ClipBatch, Method, Progress
from pipeline.registry import METHODS
from pipeline.training.pretrain import StepModule

TRAINED = [name for name in METHODS.names() if METHODS.get(name).trains]
PHASES = {"cross_only": 0, "intra": 3}
SAME_IN_ALL_EPOCHS = ("barlow", "byol", "cycle", "moco", "simclr", "simsiam", "vicreg")
CASES = [(name, phase) for name in TRAINED for phase in PHASES if phase == "intra" or name not in SAME_IN_ALL_EPOCHS]

OPTIMIZER = {"name": "sgd", "lr": 0.01, "weight_decay_end": 0.1, "no_decay": ["bias", "norm"], "clip_norm": 0.5, "warmup_lr": 0.001, "warmup_epochs": 1}


def one_method(name: str) -> Method:
    """Without batch norm, in double precision: what is left of a difference is a mistake."""
    return make_method(name, batch=4, norm=False, double=True)


def global_batches(store: FrameStore, method: Method, epoch: int, rank: int = 0, world: int = 1) -> list[ClipBatch]:
    made = toy_loader(store, type(method), method.params, rank=rank, world=world, batch=4, samples_per_video=2)
    found = list(made.epoch(epoch, CPU))[:3]
    return [ClipBatch({r: x.double() for r, x in b.frames.items()}, b.video, b.label, b.numbers) for b in found]


def three_steps(name: str, epoch: int, store: FrameStore) -> dict[str, Any]:
    """Losses, gradients of each step and the final bank, over however many processes there are."""
    rank, world = distributed.rank(), distributed.world_size()
    method = one_method(name)
    module: torch.nn.Module = StepModule(method)
    if world > 1:
        module = DistributedDataParallel(module)
    optimizer = torch.optim.SGD([w for w in method.networks.parameters() if w.requires_grad], lr=0.01)
    found: dict[str, Any] = {"loss": [], "grad": []}
    for step, batch in enumerate(global_batches(store, method, epoch, rank, world)):
        method.before_step(Progress(epoch, step))
        optimizer.zero_grad()
        loss, _ = module(batch, Progress(epoch, step))
        loss.backward()
        found["loss"].append(float(distributed.reduce_mean(loss)))
        found["grad"].append(
            torch.cat([w.grad.flatten() for w in method.networks.parameters() if w.requires_grad])[::97].clone()
        )
        optimizer.step()
    return {**found, "extra": {k: v.clone() for k, v in method.extra_state().items()}, "video": batch.video}


def collectives() -> dict[str, Any]:
    """Gathers and reductions with values that tell the rank."""
    rank = distributed.rank()
    x = (torch.arange(6.0).reshape(3, 2) + 100 * rank).requires_grad_()
    everyone = distributed.gather_with_gradient(x)
    (everyone * torch.arange(12.0).reshape(6, 2) * (rank + 1)).sum().backward()
    grad = x.grad.clone()
    shared = distributed.gather_with_gradient(x)
    # The gathered rows are read twice: the sum over processes must not spoil the other reader's gradient.
    (second,) = torch.autograd.grad((shared * 2).sum() + (shared**2).sum(), x)
    last = (torch.arange(24.0).reshape(2, 3, 2, 2) + 1000 * rank).to(memory_format=torch.channels_last)
    return {
        "gathered": everyone.detach(),
        "grad": grad,
        "second": second,
        "x": x.detach(),
        "empty": distributed.all_gather_rows(torch.empty(1, 0)),
        "channels_last": distributed.all_gather_rows(last),
        "sliced": distributed.all_gather_rows(last[:, 1]),
        "mean": float(distributed.reduce_mean(torch.tensor(float(rank)))),
        "highest": distributed.highest(2 * rank, CPU),
        "rank": (distributed.rank(), distributed.world_size(), distributed.is_main()),
    }


class Identity(torch.nn.Module):
    """Stands for a network: the first value of the image, as a unit vector of angle `value`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = x.flatten(1)[:, :1]
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Counting(Identity):
    """Adds the position inside the forward pass, so that a row tells where it was processed."""

    seen: list[torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), x.flatten(1)[:, 0].clone()]
        return super().forward(x)


def shuffled_keys() -> dict[str, Any]:
    """Keys of 4 images a process: who processed what, and whether every image got its own key back."""
    rank, counting = distributed.rank(), Counting()
    method = Method.__new__(Method)
    method.networks = torch.nn.ModuleDict({"key_backbone": counting, "key_head": torch.nn.Identity()})
    method.context = one_method("moco").context
    images = (torch.arange(4.0) / 10 + rank).reshape(4, 1, 1, 1)
    keys = [method.encode_keys(images, Progress(0, step), True) for step in (0, 1)]
    return {"keys": keys, "expected": Identity()(images), "seen": counting.seen}


def curves(store: FrameStore, folder: Path) -> dict[str, Any]:
    """A run of two processes, and the same stopped in the middle of an epoch and continued."""
    config = make_config(folder / f"config{distributed.rank()}", pretrain__epochs=2, pretrain__optimizer=OPTIMIZER)
    runs = []
    for name, stops in (("whole", []), ("parts", [4])):
        for steps in stops:
            # Only one of the processes is asked to stop; both must save and leave at the same step.
            try:
                make_run(config, store, folder / name).train(StopAfter(steps) if distributed.rank() == 1 else never())
                raise AssertionError("was not stopped")
            except StoppedError as error:
                message = str(error)
        run = make_run(config, store, folder / name)
        run.train(never())
        runs.append(run)
    weights = [run.method.backbone.state_dict() for run in runs]
    # Batch-norm statistics are each process's own until the next forward pass; the first process's are exported.
    same = all(
        torch.equal(weights[0][k], weights[1][k]) for k in weights[0] if distributed.is_main() or "running" not in k
    )
    # Clipped and decayed alike: the same weights in both processes.
    mine = torch.cat([weight.detach().flatten() for weight in runs[0].method.backbone.parameters()])
    everyone = distributed.all_gather_rows(mine[None])
    same = same and bool((everyone == everyone[0]).all())
    return {"same": same, "rows": [run.rows for run in runs], "message": message, "warnings": runs[1].warnings}


def process_main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    store = FrameStore(folder / "store")
    found = {
        "collectives": collectives(),
        "shuffle": shuffled_keys(),
        "curves": curves(store, folder),
        "methods": {
            (name, phase): three_steps(name, PHASES[phase], store) for name, phase in CASES
        },
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("two")
    make_store(target / "store", patients=6, frames=[20, 12, 30])
    return target


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two gloo processes found; started once for all tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(process_main, (port, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_methods__two_processes_equal_one(name: str, phase: str, two: list[dict[str, Any]], folder: Path) -> None:
    """Loss, averaged gradient and bank of three optimiser steps, to the precision of float64 sums."""
    alone = three_steps(name, PHASES[phase], FrameStore(folder / "store"))
    for rank in (0, 1):
        share = two[rank]["methods"][name, phase]
        torch.testing.assert_close(torch.tensor(share["loss"]), torch.tensor(alone["loss"]), rtol=1e-6, atol=1e-9)
        for ours, whole in zip(share["grad"], alone["grad"], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-10)
        assert share["extra"].keys() == alone["extra"].keys()
        for key, value in alone["extra"].items():
            torch.testing.assert_close(share["extra"][key], value, rtol=1e-6, atol=1e-9)
    assert alone["grad"][-1].abs().max() > 1e-6
    both = torch.cat([two[rank]["methods"][name, phase]["video"] for rank in (0, 1)])
    assert both.tolist() == alone["video"].tolist()


def test_gather__rank_order_any_memory_layout(two: list[dict[str, Any]]) -> None:
    plain = torch.arange(24.0).reshape(2, 3, 2, 2)
    for rank in (0, 1):
        found = two[rank]["collectives"]
        assert torch.equal(found["gathered"], torch.cat([torch.arange(6.0).reshape(3, 2) + 100 * r for r in (0, 1)]))
        assert torch.equal(found["channels_last"], torch.cat([plain, plain + 1000]))
        assert torch.equal(found["sliced"], torch.cat([plain[:, 1], plain[:, 1] + 1000]))
        assert found["empty"].shape == (2, 0)
        assert found["mean"] == 0.5
        assert found["highest"] == 2
        assert found["rank"] == (rank, 2, rank == 0)


def test_gather_with_gradient__sums_over_processes(two: list[dict[str, Any]]) -> None:
    """Process r weighs row i by i-th numbers times (r + 1); the gradient of a row is the sum over both, 3 times."""
    weights = 3 * torch.arange(12.0).reshape(6, 2)
    for rank in (0, 1):
        found = two[rank]["collectives"]
        assert torch.equal(found["grad"], weights[3 * rank : 3 * rank + 3])
        assert torch.equal(found["second"], 2 * (2 + 2 * found["x"]))


def test_encode_keys__shuffle_is_undone(two: list[dict[str, Any]]) -> None:
    """Every image gets its own key back, though other processes made some of them, in another order each step."""
    for rank in (0, 1):
        found = two[rank]["shuffle"]
        for keys in found["keys"]:
            torch.testing.assert_close(keys, found["expected"])
        foreign = [float(((seen >= 1) != bool(rank)).float().mean()) for seen in found["seen"]]
        assert max(foreign) > 0, "nothing was shuffled"
    first, second = two[0]["shuffle"]["seen"]
    assert first.tolist() != second.tolist()
    together = torch.cat([two[r]["shuffle"]["seen"][0] for r in (0, 1)])
    assert sorted(together.tolist()) == sorted(
        (torch.arange(4.0) / 10).tolist() + (torch.arange(4.0) / 10 + 1).tolist()
    )


def test_resume__two_processes_bit_identical_with_curves(two: list[dict[str, Any]]) -> None:
    """Stopped in the middle of an epoch by a signal to one process: weights and curves as undisturbed."""
    assert all(found["curves"]["same"] for found in two)
    whole, parts = two[0]["curves"]["rows"]
    assert len(whole) == 2
    assert whole == parts
    assert not [line for line in two[0]["curves"]["warnings"] if "checkpoint" in line]
    assert "stopped by a signal to another process" in two[0]["curves"]["message"]
    assert "stopped by SIGTERM" in two[1]["curves"]["message"]


def test_resume__one_process_continues_what_two_began(folder: Path, two: list[dict[str, Any]], tmp_path: Path) -> None:
    """Allowed, and said: the samples are as planned, the bits are not."""
    config = make_config(tmp_path, pretrain__epochs=2, pretrain__optimizer=OPTIMIZER)
    run = make_run(config, FrameStore(folder / "store"), folder / "whole")
    assert run.resume() is True
    assert run.warnings[-1].startswith(
        "the checkpoint was written by 2 processes and 1 continue it: every sample is seen as planned"
    )


def test_world_of_one__needs_no_group() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_with_gradient(x) is x
    assert not distributed.all_gather_rows(x).requires_grad
    assert distributed.highest(1, CPU) == 1
    with distributed.process_group(CPU):
        distributed.barrier()
        assert not dist.is_initialized()


def test_stop_flag__remembers_and_restores() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with distributed.StopFlag() as stop:
        assert stop.raised is None
        signal.raise_signal(signal.SIGUSR1)
        assert stop.raised == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(KeyboardInterrupt), distributed.StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.raised == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_stage__two_processes_terminated_and_continued(tmp_path: Path) -> None:
    """`launch.processes: 2`: the stage starts torchrun, passes SIGTERM on, both save, and the next start goes on."""
    settings = {"pretrain__epochs": 5, "pretrain__checkpoint_seconds": 0, "launch__processes": 2}
    make_project(tmp_path, **settings)
    child = subprocess.Popen(
        stage_command("pretrain", "--fold", "0"),
        cwd=tmp_path,
        env=stage_environment(tmp_path),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob(".scratch/pretrain/*/state-*.pt")) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 2, err
    assert "error: pretrain: stopped by SIGTERM; the state is saved." in err
    assert (
        "error: pretrain.py: stopped by SIGTERM; each worker says above whether it has saved its state."
        in err
    )
    assert not (tmp_path / "models").exists()
    done = run_stage(tmp_path, "pretrain", "--fold", "0")
    assert done.returncode == 0, done.stderr
    assert "continuing at epoch" in done.stdout
    assert "pretrain fold 0: 2 processes finished; encoder in models/encoders/fold0" in done.stdout
    card = json.loads((tmp_path / "models/encoders/fold0/card.json").read_text())
    assert (card["world_size"], card["epochs"]) == (2, 5)
    assert load_file(str(tmp_path / "models/encoders/fold0/encoder.safetensors"))
