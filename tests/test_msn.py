"""MSN: its loss in every precision, which patches are seen, what moves the target network, and runs that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import check_goldens
import goldens_msn
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_kit import (
    CPU,
    StopAfter,
    make_config,
    make_method,
    make_run,
    make_store,
    never,
    toy_loader,
)

from pipeline.data.clips import ClipBatch
from pipeline.data.store import FrameStore
from pipeline.errors import StoppedError
from pipeline.losses_msn import log_assignment, log_sinkhorn, msn_loss
from pipeline.methods.base import Progress, Setting
from pipeline.methods.msn import MSN, MSNParams, linear_momentum
from pipeline.models.backbones import build_backbone
from pipeline.models.patches import class_token, draw_patches, kept_patches

FIRST = Progress(0, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=4, frames=6, side=32)


def one_batch(method: MSN, store: FrameStore) -> ClipBatch:
    (batch,) = toy_loader(store, MSN, method.params, batch=4).epoch(0, CPU)
    return batch


def problems(backbone: str = "vit_small", size: int = 224, batch: int = 32, **changes: Any) -> list[str]:
    return MSN.problems(MSNParams(**changes), Setting(backbone, size, batch, "fold"))


def random_rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_goldens__all_reproduced(shared: Path) -> None:
    folder = shared / "golden/msn"
    if not folder.is_dir():
        pytest.skip("the shared folder has no golden/msn")
    passed, failed = check_goldens.check_folder(folder, goldens_msn)
    assert passed >= 55
    assert failed == 0


@pytest.mark.parametrize("sinkhorn", [0, 3])
def test_msn_loss__equals_lightly_with_gradients(sinkhorn: int) -> None:
    loss = pytest.importorskip("lightly.loss").MSNLoss(temperature=0.1, sinkhorn_iterations=sinkhorn, regularization_weight=1.7)
    results = []
    for ours in (True, False):
        anchors, targets, prototypes = random_rows(1, 12, 8), random_rows(2, 4, 8), random_rows(3, 6, 8)
        anchors.requires_grad_()
        prototypes.requires_grad_()
        if ours:
            total = msn_loss(anchors, targets, prototypes, sharpen=0.3, sinkhorn_iterations=sinkhorn, me_max_weight=1.7).total
        else:
            total = loss(anchors, targets, prototypes, target_sharpen_temperature=0.3)
        total.backward()
        results.append([total.detach(), anchors.grad, prototypes.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.005])
def test_msn_loss__float32_keeps_up_where_probabilities_underflow(temperature: float) -> None:
    """tau * T far below what exp() can show in float32: finite, and equal to float64."""
    inputs = [random_rows(seed, rows, 16) for seed, rows in ((1, 12), (2, 4), (3, 32))]
    found = {}
    for dtype in (torch.float64, torch.float32):
        anchors, targets, prototypes = (x.detach().clone().to(dtype) for x in inputs)
        anchors.requires_grad_()
        terms = msn_loss(anchors, targets, prototypes, temperature=temperature, entropy_weight=0.5)
        terms.total.backward()
        found[dtype] = (terms.total.detach().double(), anchors.grad.double())
    for got, want in zip(found[torch.float32], found[torch.float64], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_msn_loss__mean_entropy_has_the_gradient_of_its_definition() -> None:
    anchors, targets, prototypes = random_rows(4, 10, 8).requires_grad_(), random_rows(5, 5, 8), random_rows(6, 7, 8)
    terms = msn_loss(anchors, targets, prototypes)
    (ours,) = torch.autograd.grad(terms.me_max, anchors)
    mean = log_assignment(anchors, prototypes, 0.1).exp().mean(0)
    plain = np.log(7) + (mean * mean.log()).sum()
    torch.testing.assert_close(terms.me_max, plain)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, anchors)[0])


def test_sinkhorn__an_unused_column_stays_unused() -> None:
    log_p = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]).log()
    balanced = log_sinkhorn(log_p, 50).exp()
    assert balanced[:, 2].tolist() == [0, 0]
    torch.testing.assert_close(balanced.sum(0)[:2], torch.ones(2), rtol=1e-3, atol=1e-3)


def test_patches__depend_on_the_images_number_alone() -> None:
    both = draw_patches(16, 9, torch.tensor([0.25, 0.75]))
    assert torch.equal(both[1], draw_patches(16, 9, torch.tensor([0.75]))[0])
    assert sorted(set(both[0].tolist())) == sorted(both[0].tolist())
    assert both[0].tolist() != both[1].tolist()
    assert [kept_patches(196, drop) for drop in (0.15, 0.3, 0.5, 0.7, 0.9)] == [166, 137, 98, 58, 19]


def test_patches__every_patch_and_every_pair_equally_often() -> None:
    """Drawn without a generator and without reading a number back (no `tolist`), which would make a GPU wait."""
    seeds = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    kept = draw_patches(9, 4, seeds)
    seen = torch.zeros(len(seeds), 9).scatter_(1, kept, 1.0)
    assert (seen.sum(1) == 4).all()
    pairs = seen.T @ seen / len(seeds)
    assert (pairs.diagonal() - 4 / 9).abs().max() < 0.015
    assert (pairs[~torch.eye(9, dtype=bool)] - 4 / 9 * 3 / 8).abs().max() < 0.015
    places = torch.stack([(kept == patch).float().mean(0) for patch in range(9)])
    assert (places - 1 / 9).abs().max() < 0.01, "the order is random as well"
    assert torch.equal(draw_patches(9, 4, torch.tensor([1.0, 0.0])), draw_patches(9, 4, torch.tensor([1.0, 0.0])))
    assert draw_patches(784, 235, seeds[:3]).shape == (3, 235)
    with torch.device("meta"):
        assert draw_patches(9, 4, torch.empty(5)).device.type == "meta"


def test_class_token__from_all_patches_is_the_plain_forward_pass() -> None:
    vit, _ = build_backbone("vit_tiny", 0, 64)
    vit.eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(class_token(vit, images, order), vit(images), rtol=1e-4, atol=1e-5)
        dropped = images.clone()
        dropped[:, :, :16, :16] = 7  # patch 0
        kept = torch.arange(1, 16).expand(2, -1)
        assert torch.equal(class_token(vit, images, kept), class_token(vit, dropped, kept))


def test_masks__one_for_each_image_or_one_for_all(store: FrameStore) -> None:
    for shared_mask in (False, True):
        method = make_method("msn", shared_mask=shared_mask, random_drop=0.5)
        batch = one_batch(method, store)
        images, seeds = batch.frames["random"][:, 0], batch.numbers["patches"][:, 0]
        kept = method._kept(images, seeds, 0.5, FIRST)
        assert kept.shape == (4, 2)
        assert (len({tuple(row.tolist()) for row in kept}) == 1) == shared_mask
    assert method._kept(images, seeds, 0.0, FIRST) is None


def test_step__random_and_focal_anchors_have_batch_norms_of_their_own(store: FrameStore) -> None:
    """Running statistics are updated twice in the anchor network and once in the target network, which is in training mode."""
    method = make_method("msn")
    method.step(one_batch(method, store), FIRST)
    assert int(method.networks["head"].bn1.num_batches_tracked) == 2
    assert int(method.networks["key_head"].bn1.num_batches_tracked) == 1
    assert method.embed_anchors(one_batch(method, store), FIRST).shape == (4 * 3, 16)


def test_target__moves_behind_each_step_and_is_exported(store: FrameStore) -> None:
    method = make_method("msn", momentum=0.75)
    old = method.backbone.norm.weight.clone()
    with torch.no_grad():
        method.networks["backbone"].norm.weight.add_(1)
    method.before_step(FIRST)
    assert torch.equal(method.backbone.norm.weight, old), "no optimiser step has been made yet"
    method.before_step(Progress(0, 1))
    torch.testing.assert_close(method.backbone.norm.weight, old + 0.25)
    assert linear_momentum(method.params, 30, 60) == pytest.approx(0.75 + 0.25 * 30 / 75)
    assert not any(weight.requires_grad for weight in method.backbone.parameters())


def test_prototypes__can_be_frozen(store: FrameStore) -> None:
    for freeze in (True, False):
        method = make_method("msn", freeze_prototypes=freeze)
        method.step(one_batch(method, store), FIRST).loss.backward()
        assert (method.networks["prototypes"].weight.grad is None) == freeze
        assert float(method.networks["prototypes"].weight.detach().abs().max()) <= 16**-0.5


def test_views__focal_anchors_are_small_parts(store: FrameStore) -> None:
    method = make_method("msn")
    batch = one_batch(method, store)
    assert {role: tuple(x.shape[1:]) for role, x in batch.frames.items()} == {
        "target": (1, 3, 32, 32), "random": (1, 3, 32, 32), "focal": (2, 3, 16, 16),
    }
    assert batch.numbers["patches"].shape == (4, 3)
    rule = MSN.views(method.params, 32)["focal"]
    assert (rule.size, rule.augmentation.scale) == (16, (0.05, 0.3))


def test_problems__say_what_to_change() -> None:
    assert problems() == []
    (line,) = problems("resnet18")
    assert line.startswith("pretrain.backbone: resnet18 has no patches to mask; method msn needs a vision transformer: ")
    assert "vit_small" in line
    wrong = problems(size=100, focal_size=50)
    assert [line.split(":")[0] for line in wrong] == ["pretrain.image_size", "methods.msn.focal_size"]
    assert "Use 96 or 112" in wrong[0]
    (line,) = problems(size=32, focal_size=16, random_drop=0.9)
    assert line == "methods.msn.random_drop: 0.9 drops all 4 patches of an image of 32 pixels; at most 0.75 leaves one"
    (line,) = problems(batch=1)
    assert line.startswith("pretrain.batch_size: 1 sample a forward pass (batch_size / accumulate) leaves the batch norm")
    assert [MSNParams().drop(width) for width in (384, 768, 1024)] == [0.15, 0.3, 0.6]
    with pytest.raises(ValueError, match="at least one anchor view is needed"):
        MSNParams(random_views=0, focal_views=0)


def test_pretraining__resumes_exactly_and_exports_the_target(store: FrameStore, tmp_path: Path) -> None:
    """Masks, averages and schedules are functions of the step: stopped after three steps, the run ends with the same bits."""
    changes = {
        "pretrain__method": "msn", "pretrain__backbone": "vit_tiny", "pretrain__epochs": 2,
        "pretrain__optimizer": {"name": "adamw", "lr": 0.001, "weight_decay_end": 0.4, "no_decay": ["one_dimensional"], "clip_norm": 3.0,
                                "warmup_epochs": 1, "warmup_lr": 0.0002, "stretch": 1.25},
    }
    config = make_config(tmp_path, **changes)
    whole = make_run(config, store, tmp_path / "whole")
    whole.train(never())
    with pytest.raises(StoppedError):
        make_run(config, store, tmp_path / "parts").train(StopAfter(3))
    parts = make_run(config, store, tmp_path / "parts")
    parts.train(never())
    again = make_run(config, store, tmp_path / "parts")
    again.train(never())  # killed before the export: the last average is made once, not twice
    for name, value in parts.method.networks.state_dict().items():
        assert torch.equal(again.method.networks.state_dict()[name], value), name
    assert parts.rows == whole.rows
    for name, value in whole.method.networks.state_dict().items():
        assert torch.equal(parts.method.networks.state_dict()[name], value), name
    assert {"cross_entropy", "me_max", "clusters", "gradient_norm", "embedding_std"} <= whole.rows[-1].keys()
    whole.export(tmp_path / "out")
    exported = load_file(str(tmp_path / "out/encoder.safetensors"))
    target, trained = (whole.method.networks[name].state_dict()["blocks.0.mlp.fc1.weight"] for name in ("key_backbone", "backbone"))
    assert torch.equal(exported["blocks.0.mlp.fc1.weight"], target)
    assert not torch.equal(target, trained)
    steps = 2 * whole.context.steps_per_epoch
    saved = torch.load(sorted((tmp_path / "parts").glob("state-*.pt"))[-1], weights_only=True)["networks"]
    before, rate = saved["key_backbone.blocks.0.mlp.fc1.weight"], linear_momentum(whole.method.params, steps - 1, steps)
    torch.testing.assert_close(target, rate * before + (1 - rate) * trained)
    assert not torch.equal(target, before), "the last step reaches the average"
