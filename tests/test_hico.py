"""What is special to HiCo: its losses against slow loops, levels and projectors, objectives, fine-tuning heads, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_kit import make_method

from pipeline import losses
from pipeline.data.clips import ClipBatch
from pipeline.errors import CheckpointError, ConfigError
from pipeline.methods.base import Method, MethodContext, Progress, Setting
from pipeline.methods.hico import HiCo, HiCoParams
from pipeline.models.backbones import build_backbone
from pipeline.models.catalog import LEVEL_HEADS
from pipeline.models.classifier import Classifier
from pipeline.models.levels import WIDTH, Pyramid, map_side, published_extras, stage_channels, stage_maps
from pipeline.presets import load_preset
from pipeline.registry import HEADS

LEVELS = ("local", "medium", "global")


def unit_rows(rows: int, seed: int, dim: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def two_views(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = ({level: unit_rows(rows, 10 * view + i) for i, level in enumerate(LEVELS)} for view in (0, 1))
    return first, second


def toy_batch(labels: list[int], size: int = 32, seed: int = 0) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    frames = {"boundary": torch.randn(count, 2, 3, size, size, generator=generator), "anchor": torch.randn(count, 1, 3, size, size, generator=generator)}
    return ClipBatch(frames, torch.arange(count), torch.tensor(labels), {"weight": torch.rand(count, 2, generator=generator)})


# --- losses -----------------------------------------------------------------------------------------------------------


def slow_nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float, videos: list[int]) -> float:
    rows, names, total = torch.cat([a, b]), videos + videos, 0.0
    for r in range(len(rows)):
        partner = (r + len(a)) % len(rows)
        others = [k for k in range(len(rows)) if k == partner or names[k] != names[r]]
        weights = [math.exp(float(rows[r] @ rows[k]) / temperature) for k in others]
        total -= math.log(math.exp(float(rows[r] @ rows[partner]) / temperature) / sum(weights))
    return total / len(rows)


@pytest.mark.parametrize("pairing", ["within_view", "cross_view"])
@pytest.mark.parametrize("videos", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_hierarchical_contrast__equals_a_slow_loop(pairing: Any, videos: list[int]) -> None:
    views, temperature = two_views(5), 0.3
    terms = losses.hierarchical_contrast(views, views, temperature, pairing, videos=torch.tensor(videos))

    def slow(a: int, level: str, b: int, other: str) -> float:
        return slow_nt_xent(views[a][level], views[b][other], temperature, videos)

    expected = {f"{level}_{level}": slow(0, level, 1, level) for level in LEVELS}
    mate = {"within_view": (0, 1), "cross_view": (1, 0)}[pairing]
    for level in ("medium", "local"):
        expected[f"global_{level}"] = slow(0, "global", mate[0], level) + slow(1, "global", mate[1], level)
    expected["peer"] = sum(expected[f"{level}_{level}"] for level in LEVELS)
    expected["cross"] = expected["global_medium"] + expected["global_local"]
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-12)


def slow_soft_ce(logits: torch.Tensor, labels: list[int], alpha: float, form: str) -> float:
    known = [b for b, label in enumerate(labels) if label >= 0]
    classes, total = logits.shape[1], 0.0
    for b in known:
        for k in range(classes):
            right = float(k == labels[b])
            if form == "sum_to_one":
                target = 1 - alpha if right else alpha / (classes - 1)
            else:
                target = (1 - alpha) * right + alpha / (len(known) - 1)
            total -= target * float(logits[b].log_softmax(0)[k])
    return total / len(known)


@pytest.mark.parametrize("form", ["sum_to_one", "batch_divisor"])
@pytest.mark.parametrize(("labels", "classes"), [([0, 1, 2, 1], 3), ([-1, 1, -1, 0, 1], 2), ([3, -1, 2, 2], 12)])
def test_softened_cross_entropy__equals_a_slow_loop(form: Any, labels: list[int], classes: int) -> None:
    logits = torch.randn(len(labels), classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = losses.softened_cross_entropy(logits, torch.tensor(labels), 0.2, form=form)
    assert float(got) == pytest.approx(slow_soft_ce(logits, labels, 0.2, form), rel=1e-12)


@pytest.mark.parametrize("form", ["sum_to_one", "batch_divisor"])
def test_softened_cross_entropy__no_labelled_row_is_zero_and_one_is_defined(form: Any) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    none = losses.softened_cross_entropy(logits, torch.tensor([-1, -1, -1]), 0.2, form=form)
    none.backward()
    assert float(none.detach()) == 0
    assert not logits.grad.any()
    one = losses.softened_cross_entropy(logits.detach(), torch.tensor([-1, 2, -1]), 0.2, form=form)
    hard = F.cross_entropy(logits[1:2].detach(), torch.tensor([2]))
    assert torch.isfinite(one)
    # alpha / (1 - 1) has no value: the published form falls back to the hard target.
    assert (float(one) == pytest.approx(float(hard))) == (form == "batch_divisor")


def test_soft_targets__row_sums() -> None:
    labels, rows = torch.tensor([0, 3]), torch.tensor(32)
    assert losses.soft_targets(labels, 12, 0.2, rows).sum(1).tolist() == pytest.approx([1, 1])
    published = losses.soft_targets(labels, 12, 0.2, rows, "batch_divisor").sum(1)
    assert published.tolist() == pytest.approx([0.8 + 12 * 0.2 / 31] * 2)


@pytest.mark.parametrize("form", ["sum_to_one", "batch_divisor"])
def test_softened_cross_entropy__processes_with_unequal_labels_average_to_one_process(form: Any) -> None:
    """All labels on the first of two processes: the mean of both losses is that of the whole batch."""
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2, 1, -1, -1, -1])
    parts = [
        losses.softened_cross_entropy(logits[half], labels[half], 0.2, form=form, rows=torch.tensor(3), processes=2)
        for half in (slice(0, 3), slice(3, 6))
    ]
    assert float(parts[1]) == 0
    assert float(sum(parts) / 2) == pytest.approx(float(losses.softened_cross_entropy(logits, labels, 0.2, form=form)), rel=1e-12)
