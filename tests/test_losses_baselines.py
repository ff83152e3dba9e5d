"""Losses of the baseline methods: value and gradient against lightly in float64, Cycle-Contrast against a slow loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, VICRegLoss

from pipeline import losses_baselines as ours
from pipeline.data.clips import two_frames
from pipeline.models import heads
from pipeline.models.momentum import cosine_momentum


def rows(*shape: int, seed: int) -> torch.Tensor:
    """Correlated columns with a mean, so that no statistic is trivial."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(*shape, generator=generator, dtype=torch.float64)
    mixing = torch.randn(shape[-1], shape[-1], generator=generator, dtype=torch.float64)
    return raw @ mixing / shape[-1] ** 0.5 + 0.3


def assert_same(one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    """Value and gradients of two functions agree to the precision of float64."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    first, second = one(*leaves), other(*leaves)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(value, leaves, allow_unused=True) for value in (first, second))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("batch", "dim"), [(2, 3), (8, 5), (16, 40)])
def test_losses_of_two_views__equal_lightly(batch: int, dim: int) -> None:
    z1, z2 = rows(batch, dim, seed=1), rows(batch, dim, seed=2)
    lightly = NegativeCosineSimilarity()
    assert_same(ours.negative_cosine, lambda p, z: lightly(p, z.detach()), z1, z2)
    for redundancy in (0.0051, 0.5):
        barlow = BarlowTwinsLoss(redundancy)
        assert_same(lambda a, b, r=redundancy: dim * ours.barlow_twins(a, b, r), barlow, z1, z2)
    for weights in ((25.0, 25.0, 1.0), (1.0, 2.0, 3.0)):
        assert_same(lambda a, b, w=weights: ours.vicreg(a, b, w)[0], VICRegLoss(*weights), 0.4 * z1, 0.7 * z2)


def test_vicreg__terms_add_up() -> None:
    z1, z2 = 0.4 * rows(6, 4, seed=1), 0.4 * rows(6, 4, seed=2)
    loss, terms = ours.vicreg(z1, z2, (25.0, 10.0, 2.0))
    assert float(loss) == pytest.approx(float(25 * terms["invariance"] + 10 * terms["variance"] + 2 * terms["covariance"]))
    assert min(float(term) for term in terms.values()) > 0


@pytest.mark.parametrize("views", [2, 5])
def test_dino__equals_lightly_with_its_centre(views: int) -> None:
    """Loss and gradient over three steps; the centre moves between them as the method moves it."""
    reference, center = DINOLoss(12, center_momentum=0.8).double(), torch.zeros(12, dtype=torch.float64)
    for step in range(3):
        student, teacher = rows(views, 3, 12, seed=step), rows(2, 3, 12, seed=step + 50)
        before = reference.center.clone()

        def lightly(s: torch.Tensor, t: torch.Tensor, before: torch.Tensor = before) -> torch.Tensor:
            reference.center.data = before
            return reference(list(t), list(s), teacher_temp=0.0625)  # exact in lightly's float32

        leaf = student.clone()
        assert_same(
            lambda s, t=teacher, c=center: ours.dino_cross_entropy(s, t, c, 0.1, 0.0625), lambda s, t=teacher: lightly(s, t), leaf
        )
        center = 0.8 * center + 0.2 * teacher.mean((0, 1))
        torch.testing.assert_close(center, reference.center.flatten(), rtol=1e-12, atol=1e-12)


def test_dino__teacher_temperature_warms_up_like_lightly() -> None:
    for epochs in (1, 2, 7):
        wanted = DINOLoss(4, 0.04, 0.07, epochs).teacher_temp_schedule.tolist()
        found = [ours.linear_warmup(0.04, 0.07, epochs, epoch) for epoch in range(epochs + 2)]
        assert found[:epochs] == pytest.approx(wanted if epochs > 1 else [0.07], rel=1e-6)
        assert found[epochs:] == [0.07, 0.07]
    assert ours.linear_warmup(0.04, 0.07, 0, 0) == 0.07


def slow_cycle(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, allowed: torch.Tensor, support: int) -> torch.Tensor:
    """Cross-entropy of the way back, sample by sample."""
    total = torch.zeros((), dtype=query.dtype)
    for q, k, may in zip(query, key, allowed, strict=True):
        others = [row for row, ok in zip(queue, may, strict=True) if ok]
        if not others:
            continue  # no neighbour: nothing to tell apart
        near = sorted(others, key=lambda row: -float(row @ q.detach()))[:support]
        weights = [torch.exp(row @ q / 0.1) for row in near]
        mixed = sum(w * row for w, row in zip(weights, near, strict=True)) / sum(weights)
        neighbor = mixed / mixed.norm()
        right = torch.exp(neighbor @ k / 0.2)
        total = total - torch.log(right / (right + sum(torch.exp(neighbor @ row / 0.2) for row in others)))
    return total / len(query)


@pytest.mark.parametrize("support", [1, 3, 50])
def test_cycle_logits__equal_slow_loop_with_gradient(support: int) -> None:
    query, key, queue = (torch.nn.functional.normalize(rows(n, 6, seed=n), dim=1) for n in (4, 4, 9))
    allowed = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[2] = False

    def fast(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        logits, neighbor = ours.cycle_logits(
            q, k, queue, support=support, neighbor_temperature=0.1, temperature=0.2, allowed=allowed
        )
        assert logits.shape == (4, 10)
        assert neighbor.detach().norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1])
        return torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))

    assert_same(fast, lambda q, k: slow_cycle(q, k, queue, allowed, support), query, key)


def test_output_spread__one_for_even_directions_zero_for_one() -> None:
    even = torch.eye(8).repeat(3, 1) * torch.tensor([1.0, -1.0] * 12)[:, None]
    assert float(ours.output_spread(5 * even)) == pytest.approx(1, rel=0.1)
    assert float(ours.output_spread(torch.ones(6, 8) * torch.arange(1.0, 7)[:, None])) == pytest.approx(0, abs=1e-6)


def test_cosine_momentum__from_start_to_one() -> None:
    assert [cosine_momentum(0.9, step, 4) for step in (-1, 0, 2, 4, 9)] == pytest.approx([0.9, 0.9, 0.95, 1, 1])
    assert cosine_momentum(0.9, 1, 4) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)


def test_heads__sizes_biases_and_the_frozen_last_layer() -> None:
    head = heads.bn_mlp([6, 5, 4, 3], last_norm=True)
    assert [type(part).__name__ for part in head] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert head[-1].weight is None
    assert [part.bias is None for part in head if isinstance(part, torch.nn.Linear)] == [True, True, True]
    assert heads.bn_mlp([6, 4])[0].bias is not None
    both = heads.SideBySide([torch.nn.Linear(6, 2), torch.nn.Linear(6, 3)])
    assert both(torch.ones(4, 6)).shape == (4, 5)
    last = heads.dino_head(6, 5, 4, 7)[-1]
    plain = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 7, bias=False))
    with torch.no_grad():
        plain.parametrizations.weight.original0.fill_(1)
        plain.parametrizations.weight.original1.copy_(last.weight)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(last(x), plain(torch.nn.functional.normalize(x, dim=1)))
    for frozen in (True, False):
        last.zero_grad()
        last.frozen = frozen
        last(x).square().sum().backward()
        assert bool(last.weight.grad.any()) is not frozen


def test_two_frames__within_the_radius_and_never_the_same() -> None:
    rng = np.random.default_rng(0)
    for radius in (1, 3, None):
        pairs = np.array([two_frames(9, radius, rng) for _ in range(300)])
        apart = np.abs(pairs[:, 0] - pairs[:, 1])
        assert pairs.dtype == np.int64
        assert (apart.min(), apart.max()) == (1, radius or 8)
        assert (pairs.min(), pairs.max()) == (0, 8)
    assert len(set(two_frames(9, 0, rng).tolist())) == 1
    assert two_frames(1, None, rng).tolist() == [0, 0]
