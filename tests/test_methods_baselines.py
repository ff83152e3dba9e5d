"""What is particular to the baseline methods: vision transformers, DINO's teacher and crops, refusals and advice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import CPU, make_config, make_method, make_run, make_store, never, toy_loader

from pipeline.data.store import FrameStore
from pipeline.methods.barlow import BarlowTwins, BarlowTwinsParams
from pipeline.methods.base import ClipBatch, Method, MethodContext, Progress, Setting
from pipeline.methods.byol import BYOL, BYOLParams
from pipeline.methods.cycle import CycleContrast, CycleContrastParams
from pipeline.methods.dino import DINO, DINOParams
from pipeline.methods.vicreg import VICReg, VICRegParams
from pipeline.models import momentum
from pipeline.models.backbones import build_backbone
from pipeline.registry import METHODS

START = Progress(0, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=4, frames=8, side=32)


def first_batch(method: Method, store: FrameStore, **plan: Any) -> ClipBatch:
    return next(iter(toy_loader(store, type(method), method.params, **plan).epoch(0, CPU)))


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_vision_transformer__learns_from_every_view(name: str, store: FrameStore) -> None:
    """Large and small crops go through one network; gradient reaches its patches, and the teacher's gets none."""
    small = {"local_views": 2, "local_size": 16, "output_dim": 16, "hidden_dim": 16} if name == "dino" else {"hidden_dim": 16}
    kind = METHODS.get(name)
    backbone, features = build_backbone("vit_tiny", image_size=32)
    method = kind(backbone, kind.Params(**small), MethodContext(features, 2, 2, 4, image_size=32))
    batch = first_batch(method, store)
    if name == "dino":
        assert batch.frames["local"].shape == (4, 2, 3, 16, 16)
    loss = method.step(batch, START).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert float(backbone.patch_embed.proj.weight.grad.abs().sum()) > 0
    assert not any(key.startswith("key_") for key, weight in method.networks.named_parameters() if weight.grad is not None)


@pytest.mark.parametrize("name", ["simsiam", "byol"])
def test_two_views__the_target_gets_no_gradient(name: str, store: FrameStore) -> None:
    """With the guesses cut off nothing would learn: all gradient comes through the predictor."""
    method = make_method(name, batch=4)
    method.networks["predictor"].requires_grad_(False)
    for layer in method.networks["predictor"]:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)
    method.step(first_batch(method, store), START).loss.backward()
    assert not float(method.networks["backbone"].conv1.weight.grad.abs().sum())


def test_dino__teacher_follows_ever_more_slowly_and_is_exported(store: FrameStore) -> None:
    method = make_method("dino", momentum=0.5)
    student, teacher = method.networks["backbone"].conv1.weight, method.networks["key_backbone"].conv1.weight
    with torch.no_grad():
        student.add_(1)
    gaps = []
    for step in (1, 31, 60):  # 60 steps in all
        before = float((student - teacher).detach().mean())
        method.before_step(Progress(step // 10, step))
        gaps.append(float((student - teacher).detach().mean()) / before)
    assert gaps == pytest.approx([0.5, 0.75, 1], abs=1e-3)
    assert method.backbone is method.networks["key_backbone"]
    assert make_method("dino", export="student").backbone.conv1.weight.requires_grad


def test_dino__last_layer_rests_in_the_first_epoch_and_the_centre_moves(store: FrameStore) -> None:
    method = make_method("dino", batch=4, center_momentum=0.75)
    weight = method.networks["head"][-1].weight
    for epoch, rests in ((0, True), (1, False)):
        method.networks.zero_grad()
        method.before_step(Progress(epoch, 10 * epoch))
        before = method.center.clone()
        batch = first_batch(method, store)
        method.step(batch, Progress(epoch, 10 * epoch)).loss.backward()
        assert bool(weight.grad.any()) is not rests
        with torch.no_grad():
            outputs = method.project(batch.frames["view"].transpose(0, 1).flatten(0, 1), "key_").mean(0)
        torch.testing.assert_close(method.center, 0.75 * before + 0.25 * outputs)


def test_dino__crops_of_two_sizes() -> None:
    params = DINOParams(local_scale=(0.2, 0.3))
    assert [params.side(size) for size in (32, 64, 112, 224)] == [32, 32, 48, 96]
    rule = DINO.views(params, 224)["local"]
    assert (rule.size, rule.augmentation.scale, rule.augmentation.crop) == (96, (0.2, 0.3), "resized")
    assert DINO.views(DINOParams(local_views=0), 224) == {}
    with pytest.raises(ValueError, match="local_scale must satisfy 0 < low <= high <= 1"):
        DINOParams(local_scale=(0.5, 0.2))


def test_cycle__neighbours_and_negatives_come_from_other_videos(store: FrameStore) -> None:
    """The second pass over the same videos: each anchor may use all rows but those of its own video."""
    method = make_method("cycle", batch=4, queue_size=8, support_size=8)
    batch = first_batch(method, store)
    first = method.step(batch, START)
    assert float(first.loss.detach()) == 0, "the queue is empty"
    second = method.step(batch, Progress(0, 1))
    assert float(method.chance_loss(START)) == pytest.approx(1.1 * math.log(4))
    total = second.metrics["intra_loss"] + 0.1 * second.metrics["cycle_loss"]
    torch.testing.assert_close(second.loss.detach(), total)
    assert (CycleContrast.min_frames(CycleContrastParams()), CycleContrast.min_frames(CycleContrastParams(positive_radius=0))) == (2, 1)


# --- refusals and advice ---------------------------------------------------------------------------------------------


def test_problems__batch_of_one_and_crops_that_patches_do_not_divide() -> None:
    for name in ("simsiam", "byol", "barlow", "vicreg"):
        kind = METHODS.get(name)
        (line,) = kind.problems(kind.Params(), Setting("resnet18", 64, 1, "fold"))
        assert line.startswith("pretrain.batch_size: 1 sample a forward pass (batch_size / accumulate) leaves the batch norm")
        assert kind.problems(kind.Params(), Setting("vit_tiny", 64, 2, "fold")) == []
    (line,) = DINO.problems(DINOParams(local_size=40), Setting("vit_tiny", 64, 8, "fold"))
    assert line.startswith("methods.dino.local_size: 40 pixels are not divisible by the patches of vit_tiny (16 pixels). Use 32 or 48.")
    assert DINO.problems(DINOParams(local_size=40), Setting("resnet18", 64, 8, "fold")) == []
    assert DINO.problems(DINOParams(local_size=40, local_views=0), Setting("vit_tiny", 64, 8, "fold")) == []


def test_check__advice_of_the_baselines() -> None:
    short, long = MethodContext(512, 60, 2, 32), MethodContext(512, 600, 100, 32)
    (slow,) = BYOL.check(BYOLParams(), short, 64)
    assert slow.startswith("methods.byol.momentum = 0.996: in 120 steps the momentum network moves only 21% of the way")
    assert slow.endswith("Consider 0.917.")
    assert BYOL.check(BYOLParams(momentum=0.917), short, 64) == BYOL.check(BYOLParams(), long, 64) == []
    slow, blunt = DINO.check(DINOParams(teacher_temperature=0.1), short, 64)
    assert slow.startswith("methods.dino.momentum = 0.996")
    assert blunt.startswith("methods.dino.teacher_temperature = 0.1 is not below student_temperature = 0.1")
    (wide,) = BarlowTwins.check(BarlowTwinsParams(embedding_dim=8192), short, 64)
    assert wide.startswith("methods.barlow.embedding_dim = 8192: a batch of 32 samples cannot decorrelate so many columns")
    assert BarlowTwins.check(BarlowTwinsParams(), short, 64) == []
    (wide,) = BarlowTwins.check(BarlowTwinsParams(), replace(short, samples_per_pass=4), 64)
    assert wide.startswith("methods.barlow.embedding_dim = 1024: a batch of 4 samples cannot decorrelate so many columns")
    assert len(VICReg.check(VICRegParams(variance_weight=0), short, 64)) == 1
    assert VICReg.check(VICRegParams(), short, 64) == []
    slow, alone = CycleContrast.check(CycleContrastParams(), short, 1)
    assert slow.endswith("Consider 0.958.")
    assert alone.startswith("methods.cycle: with a single video")
    assert CycleContrast.check(CycleContrastParams(), long, 64) == []


def test_barlow__the_warned_floor_is_the_least_loss_of_a_batch() -> None:
    """Rows of a simplex have equal off-diagonal energy: the bound of the advice is reached, not merely assumed."""
    from pipeline.losses_baselines import barlow_twins

    z = torch.linalg.svd(torch.eye(4, dtype=torch.float64) - 0.25)[0][:, :3].repeat(1, 5)
    floor = 0.0051 * (15 / 3 - 1)
    assert float(barlow_twins(z, z, 0.0051)) == pytest.approx(floor, rel=1e-3)


def test_dino__last_step_reaches_the_exported_teacher(store: FrameStore, tmp_path: Path) -> None:
    run = make_run(make_config(tmp_path, pretrain__method="dino", pretrain__epochs=1), store, tmp_path / "run")
    run.train(never())
    (state,) = (tmp_path / "run").glob("state-*.pt")
    saved = torch.load(state, weights_only=True)["networks"]
    before, trained = (saved[f"{part}.layer1.0.conv1.weight"] for part in ("key_backbone", "backbone"))
    steps = run.context.steps_per_epoch
    rate = momentum.cosine_momentum(0.9, steps - 1, steps)
    exported = run.method.backbone.layer1[0].conv1.weight
    torch.testing.assert_close(exported, rate * before + (1 - rate) * trained)
    assert not torch.equal(exported, before)
