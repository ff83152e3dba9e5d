"""Losses against slow, obvious loops over a grid of settings, against an independent library, and at their edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pipeline import losses

GRID = list(itertools.product([1, 3, 5], [1, 2, 6], [1, 2, 4, 9], [0.07, 0.5]))
"""Anchors, bank rows, support, temperature."""


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return losses.l2_normalize(torch.randn(*shape, generator=generator, dtype=dtype))


def slow_cross_negative(
    q: torch.Tensor, bank: torch.Tensor, support: int, temperature: float, allowed: torch.Tensor
) -> torch.Tensor:
    """Rows one by one, as the sentences of the method say it; differentiable in `q`."""
    answers = []
    for anchor, may in zip(q, allowed, strict=True):
        scored = sorted(((float(anchor.detach() @ row), i) for i, row in enumerate(bank) if may[i]), reverse=True)[
            :support
        ]
        if not scored:
            answers.append(torch.zeros_like(anchor))
            continue
        raw = [torch.exp((anchor @ bank[i]) / temperature) for _, i in scored]
        answers.append(sum(w / sum(raw) * bank[i] for w, (_, i) in zip(raw, scored, strict=True)))
    return torch.stack(answers)


@pytest.mark.parametrize(("batch", "rows", "support", "temperature"), GRID)
def test_cross_video_negative__equals_slow_loop_with_gradient(
    batch: int, rows: int, support: int, temperature: float
) -> None:
    """Value and gradient, with a mask that leaves some anchors fewer rows than the support, or none."""
    q, bank = unit(batch, 8, seed=rows).requires_grad_(), unit(rows, 8, seed=100 + batch)
    generator = torch.Generator().manual_seed(support)
    for allowed in (torch.ones(batch, rows, dtype=torch.bool), torch.rand(batch, rows, generator=generator) < 0.5):
        fast, chosen, exists = losses.cross_video_negative(
            q, bank, support=support, temperature=temperature, allowed=allowed
        )
        slow = slow_cross_negative(q, bank, support, temperature, allowed)
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
        assert exists.tolist() == allowed.any(1).tolist()
        assert chosen.shape == (batch, min(support, rows))
        mix = unit(batch, 8, seed=7)
        (ours,) = torch.autograd.grad((fast * mix).sum(), q)
        if allowed.any():
            (theirs,) = torch.autograd.grad((slow * mix).sum(), q)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        else:
            assert not ours.any()


def test_cross_video_negative__gradcheck_through_the_weights() -> None:
    q, bank = unit(3, 6).requires_grad_(), unit(9, 6, seed=1)
    allowed = torch.ones(3, 9, dtype=torch.bool)
    allowed[1, 2:] = False
    assert torch.autograd.gradcheck(
        lambda x: losses.cross_video_negative(x, bank, support=4, temperature=0.3, allowed=allowed)[0], (q,)
    )


def test_cross_video_negative__formula_of_the_gradient() -> None:
    """d(q z_hat)/dq = z_hat + sum_i w_i (s_i - s_bar) b_i / tau_s; detached weights would leave only the first term."""
    q, bank, tau = unit(1, 5).requires_grad_(), unit(6, 5, seed=2), 0.07
    z_hat, rows, _ = losses.cross_video_negative(q, bank, support=3, temperature=tau)
    (gradient,) = torch.autograd.grad((q * z_hat).sum(), q)
    chosen = bank[rows[0]]
    s = (chosen @ q[0]).detach()
    w = (s / tau).softmax(0)
    second = (w * (s - (w * s).sum())) @ chosen / tau
    torch.testing.assert_close(gradient[0], z_hat[0].detach() + second)
    assert second.norm() > 0.05, "the test must be able to see a detached weight"


def test_cross_video_negative__bank_is_constant_and_z_hat_short() -> None:
    q, bank = unit(4, 8).requires_grad_(), unit(6, 8, seed=3).requires_grad_()
    z_hat, _, _ = losses.cross_video_negative(q, bank, support=4, temperature=0.5)
    z_hat.sum().backward()
    assert bank.grad is None
    assert bool((z_hat.norm(dim=1) < 1 - 1e-6).all()), "a mean of different unit rows is shorter than 1 and stays so"


def test_cross_video_negative__mean_mode_takes_every_row() -> None:
    q, bank = unit(2, 8).requires_grad_(), unit(6, 8, seed=3)
    bank[4:] = 0
    z_hat, rows, exists = losses.cross_video_negative(q, bank, support=2, temperature=0.1, mode="mean")
    torch.testing.assert_close(z_hat, bank.mean(0).expand(2, 8))
    assert rows.shape == (2, 0)
    assert exists.all()
    assert not z_hat.requires_grad


@pytest.mark.parametrize("intra", [False, True])
def test_ucl_logits__no_allowed_row_drops_the_column(intra: bool) -> None:
    """Minus infinity in the last column; in the cross-only phase such an anchor has loss 0; gradients stay finite."""
    q, bank = unit(3, 8, dtype=torch.float32).requires_grad_(), unit(4, 8, seed=1, dtype=torch.float32)
    allowed = torch.tensor([[True] * 4, [False] * 4, [True, False, False, False]])
    z_hat, _, exists = losses.cross_video_negative(q, bank, support=3, temperature=0.07, allowed=allowed)
    negatives = unit(3, 2, 8, seed=5, dtype=torch.float32) if intra else None
    logits = losses.ucl_logits(q, unit(3, 8, seed=2, dtype=torch.float32), negatives, z_hat, 0.07, exists)
    assert logits.shape == (3, 4 if intra else 2)
    assert torch.isinf(logits).nonzero().tolist() == [[1, logits.shape[1] - 1]]
    each = losses.first_column_cross_entropy(logits, "none")
    assert torch.isfinite(each).all()
    if not intra:
        assert each[1] == 0
    losses.first_column_cross_entropy(logits).backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad[0].any()
    if not intra:
        assert not q.grad[1].any()


def test_ucl_logits__columns_and_own_negatives_only() -> None:
    """Every entry by hand: positive first, own negatives in order, cross-video last, one temperature for all."""
    q, positive, negatives, z_hat = unit(2, 4), unit(2, 4, seed=1), unit(2, 3, 4, seed=2), unit(2, 4, seed=3) * 0.5
    logits = losses.ucl_logits(q, positive, negatives, z_hat, 0.2)
    for b in range(2):
        expected = [q[b] @ positive[b], *(q[b] @ negatives[b, k] for k in range(3)), q[b] @ z_hat[b]]
        torch.testing.assert_close(logits[b], torch.stack(expected) / 0.2)


def test_first_column_cross_entropy__uniform_logits_are_chance() -> None:
    assert float(losses.first_column_cross_entropy(torch.zeros(3, 5))) == pytest.approx(math.log(5))
    each = losses.first_column_cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), "none")
    torch.testing.assert_close(each, torch.tensor([math.log(1 + math.exp(-2)), math.log(2)]))


@pytest.mark.parametrize(("batch", "temperature"), list(itertools.product([2, 3, 8], [0.1, 0.5])))
def test_nt_xent__equals_lightly_and_a_slow_loop(batch: int, temperature: float) -> None:
    ntx = pytest.importorskip("lightly.loss").NTXentLoss(temperature=temperature)
    # Raw, because lightly normalises inside: the gradients must be those of the same function.
    raw, z2 = (
        torch.randn(batch, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        unit(batch, 8, seed=1).float(),
    )
    z1 = losses.l2_normalize(raw)
    ours = losses.nt_xent((z1, z2), (z1, z2), temperature)
    theirs = ntx(raw, z2)
    torch.testing.assert_close(ours, theirs)
    (expected,) = torch.autograd.grad(theirs, raw)
    torch.testing.assert_close(torch.autograd.grad(ours, raw)[0], expected, rtol=1e-4, atol=1e-6)
    everyone = torch.cat([z1, z2]).detach()
    total = 0.0
    for i in range(2 * batch):
        j = (i + batch) % (2 * batch)
        below = sum(math.exp(float(everyone[i] @ everyone[k]) / temperature) for k in range(2 * batch) if k != i)
        total -= math.log(math.exp(float(everyone[i] @ everyone[j]) / temperature) / below)
    assert float(ours.detach()) == pytest.approx(total / (2 * batch), rel=1e-5)


def test_nt_xent__shares_of_two_processes_average_to_the_whole() -> None:
    z1, z2 = unit(6, 8), unit(6, 8, seed=1)
    whole = losses.nt_xent((z1, z2), (z1, z2), 0.3)
    parts = [losses.nt_xent((z1[o : o + 3], z2[o : o + 3]), (z1, z2), 0.3, offset=o) for o in (0, 3)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_nt_xent__one_sample_has_no_negatives() -> None:
    z1, z2 = unit(1, 8).requires_grad_(), unit(1, 8, seed=1)
    loss = losses.nt_xent((z1, z2), (z1, z2), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.isfinite(z1.grad).all()


@pytest.mark.parametrize("batch", [1, 4])
def test_info_nce_logits__equal_slow_version(batch: int) -> None:
    q, key, queue = unit(batch, 8), unit(batch, 8, seed=1), unit(7, 8, seed=2)
    allowed = torch.rand(batch, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    logits = losses.info_nce_logits(q, key, queue, 0.2, allowed)
    for b in range(batch):
        assert float(logits[b, 0]) == pytest.approx(float(q[b] @ key[b]) / 0.2)
        for m in range(7):
            expected = float(q[b] @ queue[m]) / 0.2 if allowed[b, m] else -math.inf
            assert float(logits[b, 1 + m]) == pytest.approx(expected)


def test_info_nce_logits__loss_equals_lightlys_memory_bank() -> None:
    """The same cross-entropy as lightly computes with a bank of the same keys."""
    ntx = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2, memory_bank_size=(5, 8))
    q, key, queue = (unit(n, 8, seed=s, dtype=torch.float32) for n, s in ((4, 0), (4, 1), (5, 2)))
    ntx.memory_bank.bank = queue
    ntx.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    ours = losses.first_column_cross_entropy(losses.info_nce_logits(q, key, queue, 0.2))
    torch.testing.assert_close(ours, ntx(q, key))


def test_info_nce_logits__nothing_allowed_is_zero_loss_with_zero_gradient() -> None:
    q = unit(2, 8).requires_grad_()
    logits = losses.info_nce_logits(q, unit(2, 8, seed=1), unit(3, 8, seed=2), 0.2, torch.zeros(2, 3, dtype=torch.bool))
    loss = losses.first_column_cross_entropy(logits)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not q.grad.any()


def test_l2_normalize__zero_row_stays_finite() -> None:
    raw = torch.zeros(1, 4, requires_grad=True)
    losses.l2_normalize(raw).sum().backward()
    assert torch.isfinite(raw.grad).all()
