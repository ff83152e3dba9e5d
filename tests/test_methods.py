"""Every registered method: repeatable loss, gradient, exact state, learning without collapse, export, advice."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from training_kit import BACKBONES_OF_TESTS, CPU, make_method, make_store, toy_loader

from pipeline.config import Config
from pipeline.data.clips import draw_indices
from pipeline.data.store import FrameStore
from pipeline.evaluation.features import collapse_statistics
from pipeline.methods.base import Method, MethodContext, Progress, Setting
from pipeline.methods.cycle import CycleContrastParams
from pipeline.methods.hico import HiCo, HiCoParams
from pipeline.methods.moco import MoCo, MoCoParams
from pipeline.methods.simclr import SimCLR, SimCLRParams
from pipeline.methods.ucl import UCL, UCLParams
from pipeline.models.backbones import build_backbone
from pipeline.models.momentum import EmbeddingBank
from pipeline.parameters import AugmentationParams
from pipeline.registry import METHODS

TRAINED = [name for name in METHODS.names() if METHODS.get(name).trains]
INTRA = 3
"""An epoch in which every part of UCL's loss is active."""
FAST = {
    "ucl": {"cross_only_epochs": 0, "momentum": 0.9},
    "moco": {"queue_size": 24, "momentum": 0.9},
    "cycle": {"queue_size": 24, "support_size": 24},
    "msn": {"prototypes": 8},
    # The views of the toy set are not augmented: two of one frame are the same image, which leaves nothing to learn.
    **dict.fromkeys(("simsiam", "byol", "barlow", "vicreg"), {"positive_radius": None}),
}
"""Parameters for runs of a few dozen steps."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=8, frames=24, side=32)


def batches(method: Method, store: FrameStore, epoch: int = INTRA, **plan) -> list:
    loader = toy_loader(store, type(method), method.params, batch=plan.pop("batch", 8), **plan)
    return list(loader.epoch(epoch, CPU))


def train(method: Method, store: FrameStore, steps: int, rate: float = 1e-3) -> list[float]:
    """Loss of each step over views that change from epoch to epoch."""
    optimizer = torch.optim.AdamW([w for w in method.networks.parameters() if w.requires_grad], lr=rate)
    history = []
    for step in range(steps):
        (batch,) = batches(method, store, INTRA + step, epochs=1000)
        method.before_step(Progress(INTRA, step))
        output = method.step(batch, Progress(INTRA, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append(float(output.loss.detach()))
    return history


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("epoch", [0, INTRA])
def test_step__finite_loss_and_gradient_to_every_weight(name: str, epoch: int, store: FrameStore) -> None:
    """The second step, when banks and queues are filled; momentum copies get none."""
    method = make_method(name)
    for step in range(2):
        (batch,) = batches(method, store, epoch)
        method.networks.zero_grad()
        method.before_step(Progress(epoch, step))
        output = method.step(batch, Progress(epoch, step))
        output.loss.backward()
    assert output.loss.shape == ()
    assert torch.isfinite(output.loss)
    for key, weight in method.networks.named_parameters():
        assert weight.requires_grad == (not key.startswith("key_")), key
        if weight.requires_grad:
            assert torch.isfinite(weight.grad).all(), key
    assert float(next(method.networks["backbone"].parameters()).grad.abs().sum()) > 0
    for key, value in output.metrics.items():
        assert torch.isfinite(torch.as_tensor(value)), key
        assert not torch.as_tensor(value).requires_grad, key
    chance = method.chance_loss(Progress(epoch, 1))
    assert "output_spread" in output.metrics if chance is None else float(chance) > 0


@pytest.mark.parametrize("name", TRAINED)
def test_compile__reaches_what_a_step_runs(name: str, store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some methods call parts of the trunk, which a compiled trunk would not notice."""
    method, compiled, called = make_method(name), [], set()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    method.compile()
    for module in compiled:
        module.register_forward_hook(lambda module, given, output: called.add(module))
    (batch,) = batches(method, store)
    method.step(batch, Progress(INTRA, 0))
    assert called == set(compiled) and called
    reached = sum(weight.numel() for module in compiled for weight in module.parameters())
    assert reached > 0.9 * sum(weight.numel() for weight in method.networks["backbone"].parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_step__same_seed_same_bits_other_seed_other_bits(name: str, store: FrameStore) -> None:
    def history(seed: int) -> list[float]:
        return train(make_method(name, seed=seed), store, 3)

    assert history(1) == history(1)
    assert history(1) != history(2)


@pytest.mark.parametrize("name", TRAINED)
def test_state__networks_and_extra_state_are_all_there_is(name: str, store: FrameStore) -> None:
    """A method rebuilt from its state gives the next losses bit for bit, gradients included."""
    method = make_method(name, seed=1)
    train(method, store, 3)
    twin = make_method(name, seed=2)
    twin.networks.load_state_dict(copy.deepcopy(method.networks.state_dict()))
    twin.load_extra_state(copy.deepcopy(method.extra_state()))
    twin.context = method.context
    assert train(method, store, 3) == train(twin, store, 3)


@pytest.mark.parametrize("name", TRAINED)
def test_training__loss_falls_without_collapse(name: str, store: FrameStore) -> None:
    """Eight structured clips in 30 steps: well below the start and chance, and the backbone still spreads them."""
    method = make_method(name, **FAST.get(name, {}))
    history = train(method, store, 30)
    # The first losses of methods with a queue have few negatives, because it fills up.
    start, end = history[4] if hasattr(method, "bank") else history[0], sum(history[-5:]) / 5
    chance = method.chance_loss(Progress(INTRA, 0))
    assert end < 0.85 * start, history
    assert chance is None or end < 0.85 * float(chance), history
    method.backbone.eval()
    images = torch.cat([b.frames[next(iter(b.frames))][:, 0] for b in batches(method, store)])
    with torch.no_grad():
        numbers = collapse_statistics(method.backbone(images))
    # A transformer of four patches orders these clips by their brightness, which is one direction.
    assert numbers["effective_rank"] > (1.2 if name in BACKBONES_OF_TESTS else 2), numbers
    assert numbers["embedding_std"] > 0.1, numbers


@pytest.mark.parametrize("name", METHODS.names())
def test_export__plain_names_of_torchvision(name: str) -> None:
    """What is exported loads into torchvision's network with only its classifier missing, or wholly into timm's."""
    kind, trunk = METHODS.get(name), BACKBONES_OF_TESTS.get(name, "resnet18")
    backbone, features = build_backbone(trunk)
    method = kind(backbone, kind.Params(), MethodContext(features, 2, 2, 4))
    if trunk != "resnet18":
        timm.create_model(f"{trunk}_patch16_224", num_classes=0).load_state_dict(method.backbone.state_dict())
        return
    missing = torchvision.models.resnet18().load_state_dict(method.backbone.state_dict(), strict=False)
    assert sorted(missing.missing_keys) == ["fc.bias", "fc.weight"]
    assert missing.unexpected_keys == []


@pytest.mark.parametrize("name", TRAINED)
def test_draw__is_a_pure_function_of_its_generator(name: str) -> None:
    import numpy as np

    kind = METHODS.get(name)
    params = kind.Params()
    one, other = (kind.draw(params, 40, 5, 20, np.random.default_rng(3)) for _ in range(2))
    assert {role: x.tolist() for role, x in one.items()} == {role: x.tolist() for role, x in other.items()}
    shortest = kind.min_frames(params)
    for seed in range(20):
        for numbers in kind.draw(params, shortest, 5, 20, np.random.default_rng(seed)).values():
            assert numbers.min() >= 0
            assert numbers.dtype.kind == "f" or numbers.max() < shortest
    assert draw_indices(np.arange(3), 2, np.random.default_rng(0)).dtype == np.int64


# --- UCL ------------------------------------------------------------------------------------------------------------


def test_ucl__negatives_carry_gradient_only_when_they_are_in_the_loss(store: FrameStore) -> None:
    """With the anchors' embeddings cut off, gradient can only come through the intra-video negatives."""
    for epoch, expected in ((0, False), (INTRA, True)):
        method = make_method("ucl")
        (batch,) = batches(method, store, epoch)
        negatives = method._embed_negatives(batch, method.cross_only(epoch))
        assert negatives.requires_grad is expected
        assert negatives.shape == (8, 3, 16)


def test_ucl__bank_holds_this_batch_and_excludes_the_own_video(store: FrameStore) -> None:
    method = make_method("ucl", batch=8)
    (batch,) = batches(method, store)
    _, metrics = method.logits(batch, Progress(INTRA, 0))
    assert method.bank.videos.tolist() == batch.video.repeat_interleave(3).tolist()
    assert float(metrics["own_video_support"]) == 0
    official = make_method("ucl", batch=8, bank_exclude_own_video=False)
    _, metrics = official.logits(batch, Progress(INTRA, 0))
    assert float(metrics["own_video_support"]) > 0, "the published program lets own frames in"


def test_ucl__one_video_alone_has_no_cross_negative(store: FrameStore) -> None:
    """Batch of one, automatic bank: zero loss in the first phase, finite afterwards, gradients finite."""
    for epoch in (0, INTRA):
        method = make_method("ucl", batch=1, norm=False)
        batch = batches(method, store, epoch, batch=1)[0]
        output = method.step(batch, Progress(epoch, 0))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert (float(output.loss.detach()) == 0) == (epoch == 0)
        assert all(torch.isfinite(w.grad).all() for w in method.networks.parameters() if w.grad is not None)


def test_ucl__key_encoder_for_negatives(store: FrameStore) -> None:
    method = make_method("ucl", negatives_encoder="key")
    (batch,) = batches(method, store)
    assert not method._embed_negatives(batch, False).requires_grad
    method.step(batch, Progress(INTRA, 0)).loss.backward()
    assert float(method.backbone.conv1.weight.grad.abs().sum()) > 0, "through the anchors"


def test_ucl__second_crop_only_shifts_key_statistics(store: FrameStore) -> None:
    """Without batch norm the loss is the same with and without it."""
    plain, second = (make_method("ucl", norm=False, key_batch_includes_second_crop=flag) for flag in (False, True))
    results = []
    for method in (plain, second):
        (batch,) = batches(method, store)
        results.append(method.step(batch, Progress(INTRA, 0)).loss.detach())
    torch.testing.assert_close(*results)


def test_ucl__mean_neighbours_and_its_chance(store: FrameStore) -> None:
    method = make_method("ucl", cross_negative="mean", bank_size=10)
    (batch,) = batches(method, store)
    assert torch.isfinite(method.step(batch, Progress(INTRA, 0)).loss)
    assert method.chance_loss(Progress(0, 0)) == math.log(2)
    assert method.chance_loss(Progress(INTRA, 0)) == math.log(5)


# --- chance, momentum, bank -----------------------------------------------------------------------------------------


def constant(head: torch.nn.Module) -> None:
    """Give every output of a head, or of each of several side by side, one value."""
    parts = head.values() if isinstance(head, torch.nn.ModuleDict) else head if isinstance(head, torch.nn.ModuleList) else [head]
    for part in parts:
        last = [layer for layer in part.modules() if isinstance(layer, torch.nn.Linear)][-1]
        torch.nn.init.zeros_(last.weight)
        if last.bias is not None:
            torch.nn.init.ones_(last.bias)


@pytest.mark.parametrize("name", TRAINED)
def test_chance_loss__is_what_a_constant_head_loses(name: str, store: FrameStore) -> None:
    """All embeddings equal: the loss is exactly what the method calls chance, also with half batches.

    Methods without such a number have their smallest loss there, and a spread of 0.
    """
    method = make_method(name, batch=8)
    for part in ("head", "key_head", "classifier", "levels", "prototypes"):
        if part in method.networks:
            constant(method.networks[part])
    for step, batch in enumerate(batches(method, store, accumulate=2)):
        assert len(batch.video) == 4
        output, chance = method.step(batch, Progress(INTRA, step)), method.chance_loss(Progress(INTRA, step))
        if chance is None:
            assert float(output.metrics["output_spread"]) == pytest.approx(0, abs=1e-5)
        else:
            assert float(output.loss.detach()) == pytest.approx(float(chance), abs=1e-5)


@pytest.mark.parametrize("name", ["ucl", "moco"])
def test_momentum__moves_weights_and_leaves_statistics(name: str, store: FrameStore) -> None:
    method = make_method(name, momentum=0.75)
    with torch.no_grad():
        for weight in method.backbone.parameters():
            weight.add_(1)
    old = method.networks["key_backbone"].conv1.weight.clone()
    statistics = method.networks["key_backbone"].bn1.running_mean.clone()
    method.backbone.bn1.running_mean.add_(5)
    method.before_step(Progress(0, 0))
    torch.testing.assert_close(method.networks["key_backbone"].conv1.weight, old + 0.25)
    assert torch.equal(method.networks["key_backbone"].bn1.running_mean, statistics)


def test_bank__keeps_the_newest_rows_where_the_ring_has_them() -> None:
    """Against a list that remembers everything, for many sizes of writes."""
    bank, written = EmbeddingBank(7, 2), []
    for turn, count in enumerate([3, 3, 3, 7, 1, 20, 5, 15]):
        rows = torch.full((count, 2), float(turn)) + torch.arange(count)[:, None] / 100
        videos = torch.arange(count) + 100 * turn
        assert bank.write(rows, videos) is True
        written += zip(rows.tolist(), videos.tolist(), strict=True)
        assert bank.pointer == len(written) % 7
        for age in range(1, min(7, len(written)) + 1):
            slot = (len(written) - age) % 7
            assert bank.rows[slot].tolist() == written[-age][0]
            assert int(bank.videos[slot]) == written[-age][1]
    other = EmbeddingBank(7, 2)
    other.load(bank.state())
    assert torch.equal(other.rows, bank.rows)
    assert other.pointer == bank.pointer


def test_bank__masks() -> None:
    bank = EmbeddingBank(4, 2)
    bank.write(torch.ones(3, 2), torch.tensor([5, 5, 6]))
    asked = torch.tensor([5, 6, 7])
    allowed = bank.allowed(asked, exclude_own=True, mask_unwritten=True)
    assert allowed.tolist() == [[False, False, True, False], [True, True, False, False], [True, True, True, False]]
    assert bank.allowed(asked, exclude_own=False, mask_unwritten=False) is None
    assert bank.allowed(asked, exclude_own=False, mask_unwritten=True).tolist() == [[True, True, True, False]] * 3
    assert bank.allowed(asked, exclude_own=True, mask_unwritten=False)[:, 3].all()


# --- advice ---------------------------------------------------------------------------------------------------------


def context(epochs: int = 60, steps: int = 2, batch: int = 32) -> MethodContext:
    return MethodContext(512, epochs, steps, batch)


def test_check__ucl() -> None:
    (slow,) = UCL.check(UCLParams(), context(), 64)
    assert slow == (
        "methods.ucl.momentum = 0.999: in 120 steps the momentum network moves only 11% of the way to the trained one, so its outputs stay "
        "close to the initialisation's. Consider 0.958."
    )
    assert UCL.check(UCLParams(momentum=0.99), context(), 64) == []
    (unused,) = UCL.check(UCLParams(momentum=0.9), context(epochs=8, steps=20), 64)
    assert unused.startswith(
        "methods.ucl.cross_only_epochs = 10 is not below pretrain.epochs = 8: the intra-video negatives are never used"
    )
    (alone,) = UCL.check(UCLParams(momentum=0.9), context(batch=1), 64)
    assert alone.startswith(
        "pretrain.batch_size = 1 with methods.ucl.bank_size = auto: the bank holds the anchor's own video only"
    )


def test_check__moco_and_simclr() -> None:
    slow, large = MoCo.check(MoCoParams(), context(), 64)
    assert slow.startswith("methods.moco.momentum = 0.999: in 120 steps the momentum network moves only 11%")
    assert large.startswith("methods.moco.queue_size = 4096 is larger than the 3840 keys of the whole run")
    assert MoCo.check(MoCoParams(momentum=0.9, queue_size=64), context(), 64) == []
    (alone,) = MoCo.check(MoCoParams(momentum=0.9, queue_size=64), context(), 1)
    assert alone.startswith("methods.moco.queue_exclude_own_video: true with a single video leaves no negatives")
    assert MoCo.check(MoCoParams(momentum=0.9, queue_size=64, queue_exclude_own_video=False), context(), 1) == []
    (alone,) = SimCLR.check(SimCLRParams(), replace(context(), samples_per_pass=1), 1)
    assert alone.startswith("an epoch has 1 sample, so SimCLR has no negatives")
    assert SimCLR.check(SimCLRParams(), context(), 64) == []


@pytest.mark.parametrize("name", TRAINED)
def test_problems__one_sample_a_forward_pass(name: str) -> None:
    """Refused where it leaves no loss or no batch norm of the head, whatever one optimiser step adds up; queues, banks and centres outlast it."""
    backbone = BACKBONES_OF_TESTS.get(name, "resnet10")

    def lines(batch: int, accumulate: int) -> list[str]:
        section = {"method": name, "backbone": backbone, "image_size": 224, "batch_size": batch, "accumulate": accumulate}
        checked = Config.model_validate({"pretrain": section})
        return METHODS.get(name).problems(checked.method_params, Setting.of(checked, None))

    for batch, accumulate in ((1, 1), (4, 4)):
        found = lines(batch, accumulate)
        assert len(found) == (name not in ("moco", "cycle", "ucl", "dino")), found
        assert all(line.startswith("pretrain.batch_size: 1 sample a forward pass (batch_size / accumulate) leaves ") for line in found)
    assert lines(8, 4) == []


def test_check__a_single_video_has_no_negatives() -> None:
    (line,) = UCL.check(UCLParams(momentum=0.9), context(batch=1), 1)
    assert line.startswith("methods.ucl.bank_exclude_own_video: true with a single video leaves no cross-video negative")
    (line,) = HiCo.check(HiCoParams(), context(), 1)
    assert line.startswith("1 video: HiCo has no negatives")
    assert HiCo.check(HiCoParams(objective="supervised"), context(), 1) == []


def test_params__neighbours_come_out_of_the_queue() -> None:
    with pytest.raises(ValueError, match=r"support_size \(5000\) must be at most queue_size \(1024\)"):
        CycleContrastParams(support_size=5000)
    with pytest.raises(ValueError, match=r"support_size \(4\) must be at most bank_size \(3\)"):
        UCLParams(bank_size=3)
    assert UCLParams(bank_size=3, cross_negative="mean").bank_size == 3


def test_methods__one_file_each_without_torch() -> None:
    """The parameters of every method are readable in a process that has not imported torch (checked in test_config)."""
    for name in METHODS.names():
        kind = METHODS.get(name)
        assert Path(__import__(kind.__module__, fromlist=["x"]).__file__).name == f"{name}.py"
        assert isinstance(kind.Params().augmentation, AugmentationParams)
