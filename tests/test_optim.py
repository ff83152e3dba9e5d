"""Optimiser options: schedules against published numbers, who decays and is clipped, exact resume with all of them on."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from training_kit import StopAfter, make_config, make_run, make_store, never

from pipeline.errors import StoppedError
from pipeline.methods.simclr import SimCLR
from pipeline.parameters import OptimizerParams
from pipeline.training.optim import apply_schedule, build_optimizer, clip_gradients, learning_rate, weight_decay

ALL = {
    "name": "adamw", "lr": 0.002, "weight_decay": 0.04, "weight_decay_end": 0.4, "warmup_epochs": 1, "warmup_lr": 0.0005,
    "stretch": 1.25, "no_decay": ["one_dimensional"], "clip_norm": 0.5, "min_lr": 1e-6,
}


class Tiny(nn.Module):
    """Every kind of weight: token, convolution, norms, linear layer, prototypes and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.scale = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)
        self.after = nn.LayerNorm(4)
        self.prototypes = nn.Linear(4, 3, bias=False)
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)


def decayed(optimizer: torch.optim.Optimizer, network: nn.Module) -> set[str]:
    """Names of the weights that decay."""
    ids = {id(weight) for group in optimizer.param_groups if group["weight_decay"] for weight in group["params"]}
    return {name for name, weight in network.named_parameters() if id(weight) in ids}


@pytest.mark.parametrize("epochs", [1, 5, 60])
def test_learning_rate__defaults_are_the_plain_rule(epochs: int) -> None:
    params = OptimizerParams(lr=0.1, warmup_epochs=2, constant_epochs=1, min_lr=0.01)
    for epoch in np.arange(0, epochs, 0.25):
        progress = min(max(epoch - 3, 0), max(1, epochs - 3)) / max(1, epochs - 3)
        wanted = 0.1 * (epoch + 1) / 3 if epoch < 2 else 0.01 + 0.09 * (1 + math.cos(math.pi * progress)) / 2
        assert learning_rate(params, epochs, epoch, 4) == pytest.approx(wanted, rel=1e-12)
        assert weight_decay(params, epochs, epoch, 4) == params.weight_decay


def test_schedules__as_published_for_msn(shared: Path) -> None:
    """Rate and decay of every step, of each of the three groups, to 12 digits."""
    folder = shared / "golden/msn"
    if not folder.is_dir():
        pytest.skip("needs golden/msn in the shared data folder")
    cases = [c for c in json.loads((folder / "index.json").read_text())["cases"] if c["kind"] == "schedule"]
    assert len(cases) >= 3
    for case in cases:
        s = case["settings"]
        params = OptimizerParams(
            name="adamw", lr=s["lr"], warmup_lr=s["start_lr"], warmup_epochs=s["warmup_epochs"], min_lr=s["final_lr"],
            weight_decay=s["weight_decay"], weight_decay_end=s["final_weight_decay"], stretch=s["stretch"],
            no_decay=["one_dimensional"],
        )
        network = nn.ModuleDict({"backbone": nn.Linear(2, 2), "prototypes": nn.Linear(2, 2, bias=False)})
        optimizer = build_optimizer(params, network, ("prototypes",))
        with np.load(folder / case["file"], allow_pickle=False) as arrays:
            for step, (rate, decay, groups) in enumerate(zip(arrays["lr"], arrays["weight_decay"], arrays["groups"], strict=True)):
                where = step / s["steps_per_epoch"]
                assert learning_rate(params, s["epochs"], where, s["steps_per_epoch"]) == pytest.approx(rate, rel=1e-12)
                assert weight_decay(params, s["epochs"], where, s["steps_per_epoch"]) == pytest.approx(decay, rel=1e-12)
                apply_schedule(optimizer, params, s["epochs"], where, s["steps_per_epoch"])
                got = [g["lr"] for g in optimizer.param_groups] + [g["weight_decay"] for g in optimizer.param_groups]
                assert got == pytest.approx(groups.tolist(), rel=1e-12)


def test_learning_rate__plateau_as_published_for_uscl(shared: Path) -> None:
    folder = shared / "golden/uscl"
    if not folder.is_dir():
        pytest.skip("needs golden/uscl in the shared data folder")
    with np.load(folder / "lr_pretrain.npz", allow_pickle=False) as arrays:
        for rates in arrays.values():
            params = OptimizerParams(lr=rates[0], constant_epochs=10, schedule_epochs=len(rates), per_epoch=True)
            assert [learning_rate(params, len(rates), e) for e in range(len(rates))] == pytest.approx(rates.tolist(), rel=1e-6)


def test_build_optimizer__one_group_by_default() -> None:
    network = Tiny()
    optimizer = build_optimizer(OptimizerParams(weight_decay=0.1), network)
    assert len(optimizer.param_groups) == 1
    assert decayed(optimizer, network) == {name for name, weight in network.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("words", "free"),
    [
        (["bias"], {"norm.bias", "layer.bias", "after.bias"}),
        (["norm"], {"norm.weight", "norm.bias", "after.weight", "after.bias"}),
        (["one_dimensional"], {"norm.weight", "norm.bias", "scale", "layer.bias", "after.weight", "after.bias"}),
        (["bias", "token"], {"norm.bias", "layer.bias", "after.bias", "cls_token"}),
    ],
)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_no_decay__frees_what_it_names(name: str, words: list[str], free: set[str]) -> None:
    network = Tiny()
    params = OptimizerParams(name=name, weight_decay=0.1, weight_decay_end=0.3, no_decay=words)
    optimizer = build_optimizer(params, network, ("prototypes",))
    free = free | {"prototypes.weight", "still"}
    for epoch in (0, 9):
        apply_schedule(optimizer, params, 10, epoch, 1)
        assert decayed(optimizer, network) == {name for name, _ in network.named_parameters()} - free
    largest = max(group["weight_decay"] for group in optimizer.param_groups)
    assert largest == pytest.approx(0.3)


def test_no_decay__unknown_word_names_the_allowed() -> None:
    with pytest.raises(ValidationError, match=r"no_decay[\s\S]*'bias', 'norm', 'one_dimensional' or 'token'"):
        OptimizerParams(no_decay=["biases"])


def test_clip_gradients__together_but_for_the_exempt() -> None:
    network = Tiny()
    optimizer = build_optimizer(OptimizerParams(no_decay=["bias"]), network, ("prototypes",))
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, 2.0)
    inside = [weight for name, weight in network.named_parameters() if name not in ("prototypes.weight", "still")]
    before = 2 * math.sqrt(sum(weight.numel() for weight in inside))
    assert clip_gradients(optimizer, OptimizerParams()) is None
    assert float(clip_gradients(optimizer, OptimizerParams(clip_norm=before + 1))) == pytest.approx(before)
    assert all((weight.grad == 2).all() for weight in network.parameters())
    assert float(clip_gradients(optimizer, OptimizerParams(clip_norm=0.5))) == pytest.approx(before)
    assert math.sqrt(sum(float(weight.grad.square().sum()) for weight in inside)) == pytest.approx(0.5, rel=1e-4)
    assert (network.prototypes.weight.grad == 2).all()


# --- in the loops ----------------------------------------------------------------------------------------------------


def finish(run: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    run.train(never())
    run.export(run.scratch / "out")
    with (run.scratch / "out/curves.csv").open() as file:
        return load_file(str(run.scratch / "out/encoder.safetensors")), list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pretrain__resume_is_exact_with_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    """Also with exempt weights, and whether or not a step has several micro-batches."""
    monkeypatch.setattr(SimCLR, "exempt", ("head.0",))
    store = make_store(tmp_path / "store", patients=6)
    config = make_config(
        tmp_path, pretrain__method="simclr", pretrain__optimizer=ALL, pretrain__epochs=2, pretrain__accumulate=accumulate
    )
    whole, curves = finish(make_run(config, store, tmp_path / "a"))
    for steps in (1, 2):
        with pytest.raises(StoppedError):
            make_run(config, store, tmp_path / "b").train(StopAfter(steps))
    run = make_run(config, store, tmp_path / "b")
    parts, other = finish(run)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert curves == other
    assert all(float(row["gradient_norm"]) > 0.5 for row in curves), "the norm before clipping is a curve"
    steps = run.context.steps_per_epoch
    last = weight_decay(config.pretrain.optimizer, 2, 2 - 1 / steps, steps)
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, last}
    assert 0.3 < last < 0.4


def test_pretrain__clipping_bounds_the_step(tmp_path: Path) -> None:
    """Plain SGD moves the weights by no more than rate x norm a step."""
    store = make_store(tmp_path / "store", patients=4)
    optimizer = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "clip_norm": 1e-3}
    config = make_config(
        tmp_path, pretrain__method="simclr", pretrain__optimizer=optimizer, pretrain__epochs=1, pretrain__samples_per_video=1
    )
    run = make_run(config, store, tmp_path / "a")
    before = [weight.detach().clone() for weight in run.method.networks.parameters()]
    run.train(never())
    pairs = zip(before, run.method.networks.parameters(), strict=True)
    moved = math.sqrt(sum(float((old - new.detach()).square().sum()) for old, new in pairs))
    assert run.context.steps_per_epoch == 1
    assert moved == pytest.approx(1e-3, rel=0.01)
