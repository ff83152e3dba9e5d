"""Which frames are drawn: properties over many lengths and epochs, the curriculum's published table, short videos."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import clips
from pipeline.methods.ucl import UCL, UCLParams

LENGTHS = [*range(8, 60), 100, 247, 888]
OFFICIAL = {"decay": "cosine_compounded", "floor_low": None, "floor_high": None}
VARIANTS = [{}, OFFICIAL, {"decay": "steps"}, {"decay": "cosine", "floor_low": None, "floor_high": None}]

# Epoch, f(e), official low and high, clipped low and high, plain low and high (Basu et al.'s program, 60 epochs).
TABLE = """
30 1.000000 0.200000 0.400000 0.200000 0.400000 0.200000 0.400000
31 0.997261 0.199452 0.398904 0.199452 0.398904 0.199452 0.398904
32 0.989074 0.197273 0.394546 0.197273 0.394546 0.197815 0.395630
35 0.933013 0.171792 0.343585 0.171792 0.343585 0.186603 0.373205
39 0.793893 0.089731 0.179462 0.089731 0.179462 0.158779 0.317557
42 0.654508 0.030981 0.061963 0.030981 0.070000 0.130902 0.261803
43 0.603956 0.018711 0.037423 0.030000 0.070000 0.120791 0.241582
48 0.345492 0.000317 0.000633 0.030000 0.070000 0.069098 0.138197
55 0.066987 6.575e-10 1.315e-09 0.030000 0.070000 0.013397 0.026795
59 0.002739 2.082e-17 4.163e-17 0.030000 0.070000 0.000548 0.001096
"""


def rows() -> list[list[float]]:
    return [[float(cell) for cell in line.split()] for line in TABLE.strip().splitlines()]


def near(value: float, printed: float) -> bool:
    """Equal to what the table prints: six decimals, or four digits where it is tiny."""
    return abs(value - printed) <= (6e-7 if printed >= 1e-4 else 6e-4 * printed)


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"epoch{int(row[0])}")
def test_distance_window__published_table(row: list[float]) -> None:
    epoch, factor = int(row[0]), row[1]
    assert near(clips.decay_factor(epoch, 30, 30), factor)
    variants = [("cosine_compounded", None), ("cosine_compounded", (0.03, 0.07)), ("cosine", None)]
    for (decay, floors), low, high in zip(variants, row[2::2], row[3::2], strict=True):
        got = clips.distance_window(epoch, decay=decay, floors=floors)
        assert near(got[0], low), (decay, got)
        assert near(got[1], high), (decay, got)


def test_distance_window__default_is_the_plain_cosine_with_floors() -> None:
    got = [clips.distance_window(e) for e in range(60)]
    assert all(window == (0.2, 0.4) for window in got[:31])
    assert got[45] == pytest.approx((0.1, 0.2))
    assert got[59] == (0.03, 0.07)
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in zip(got, got[1:], strict=False)), "never grows"


def test_distance_window__steps_and_none() -> None:
    got = [clips.distance_window(e, decay="steps") for e in (0, 29, 30, 49, 50, 59)]
    expected = [(0.2, 0.4), (0.2, 0.4), (0.1, 0.15), (0.1, 0.15), (0.03, 0.07), (0.03, 0.07)]
    np.testing.assert_allclose(got, expected)
    assert clips.distance_window(59, decay="none") == (0.2, 0.4)


def test_distance_window__floor_never_widens_a_narrower_window() -> None:
    """Floors above the starting window must not make the negatives easier once the decay begins."""
    got = [clips.distance_window(e, low=0.01, high=0.05) for e in range(60)]
    assert all(window == pytest.approx((0.01, 0.05)) for window in got)


@pytest.mark.parametrize("changes", VARIANTS, ids=["default", "official", "steps", "plain"])
@pytest.mark.parametrize("epochs", [60, 16])
def test_candidates__never_empty_from_eight_frames_and_apart(changes: dict, epochs: int) -> None:
    """Every length from 8 on, every epoch: some negatives, all inside the video and outside the positives."""
    params = UCLParams(decay_start=epochs // 2, **changes)
    windows = sorted({UCL.window(params, epoch, epochs) for epoch in range(epochs)})
    for n in LENGTHS:
        first, end = clips.anchor_interval(n)
        assert 0 <= first < end <= n
        for anchor in {first, (first + end) // 2, end - 1}:
            positives = clips.positive_candidates(n, anchor)
            assert len(positives) >= 3
            assert anchor not in positives
            assert abs(positives - anchor).max() <= 3
            for low, high in windows:
                negatives = clips.negative_candidates(n, anchor, low, high)
                assert len(negatives) > 0, (n, anchor, low, high)
                assert negatives.dtype == np.int64
                assert negatives.min() >= 0
                assert negatives.max() < n
                assert len(set(negatives)) == len(negatives)
                assert not set(negatives) & {*positives, anchor}


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.4), (0.1, 0.15), (0.03, 0.07), (0.0005, 0.001)])
def test_negative_candidates__distance_bounds_of_both_sides(low: float, high: float) -> None:
    """Published, before clipping: left max(fl, r+1)+1 .. max(fh, r+3), right max(fl, r+1) .. max(ch, r+3)-1."""
    for n in (20, 43, 100, 247):
        for anchor in range(*clips.anchor_interval(n)):
            got = clips.negative_candidates(n, anchor, low, high)
            near_end, far_left, far_right = max(int(low * n), 4), max(int(high * n), 6), max(int(-(-high * n // 1)), 6)
            left = [j for j in range(anchor) if near_end + 1 <= anchor - j <= far_left]
            right = [j for j in range(anchor, n) if near_end <= j - anchor <= far_right - 1]
            assert got.tolist() == left + right, (n, anchor)


def test_negative_candidates__end_state_has_four() -> None:
    """A window that has collapsed: distances 5 and 6 on the left, 4 and 5 on the right."""
    assert clips.negative_candidates(100, 40, 1e-12, 2e-12).tolist() == [34, 35, 44, 45]


def test_anchor_interval__published_bounds() -> None:
    assert clips.anchor_interval(100) == (20, 50)
    assert clips.anchor_interval(43) == (9, 22)
    assert clips.anchor_interval(8) == (2, 4)
    first, end = clips.anchor_interval(2)
    assert first >= end


def test_draw_indices__without_replacement_unless_too_few() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert len(set(clips.draw_indices(np.arange(4), 3, rng))) == 3
    few = clips.draw_indices(np.array([5, 9]), 3, rng)
    assert len(few) == 3
    assert set(few) <= {5, 9}
    repeats = sum(len(set(clips.draw_indices(np.arange(4), 3, rng, replacement=True))) < 3 for _ in range(2000)) / 2000
    assert repeats == pytest.approx(0.625, abs=0.04), "the share the published sampler has in its end state"


@pytest.mark.parametrize("frames", [3, 4, 5, 6, 7])
def test_draw__relax_serves_short_videos(frames: int) -> None:
    """3 to 7 frames: nothing equals the anchor, negatives differ from the positive, far ones where there are any."""
    params = UCLParams(short_video="relax")
    assert UCL.min_frames(params) == 3
    for epoch in (0, 30, 59):
        for seed in range(40):
            roles = UCL.draw(params, frames, epoch, 60, np.random.default_rng(seed))
            anchor, positive = int(roles["anchor"][0]), int(roles["positive"][0])
            everything = np.concatenate(list(roles.values()))
            assert everything.min() >= 0
            assert everything.max() < frames
            assert positive != anchor
            assert not set(roles["negatives"]) & {anchor, positive}
            if any(abs(j - anchor) > 3 for j in range(frames)):
                assert (abs(roles["negatives"] - anchor) > 3).all()


def test_draw__shapes_and_second_crop() -> None:
    roles = UCL.draw(
        UCLParams(num_negatives=5, key_batch_includes_second_crop=True), 50, 0, 60, np.random.default_rng(0)
    )
    assert {role: len(numbers) for role, numbers in roles.items()} == {
        "anchor": 1,
        "positive": 1,
        "negatives": 5,
        "second": 1,
    }
    assert roles["second"].tolist() == roles["anchor"].tolist()


def test_draw__covers_every_candidate() -> None:
    """All anchors, positives and negatives that may come do come, and nothing else."""
    params, n = UCLParams(), 43
    seen = [UCL.draw(params, n, 0, 60, np.random.default_rng(seed)) for seed in range(3000)]
    assert {int(r["anchor"][0]) for r in seen} == set(range(9, 22))
    assert {int(r["positive"][0]) - int(r["anchor"][0]) for r in seen} == {-3, -2, -1, 1, 2, 3}
    for anchor in (9, 15, 21):
        drawn = {int(j) for r in seen if r["anchor"][0] == anchor for j in r["negatives"]}
        assert drawn == set(clips.negative_candidates(n, anchor, 0.2, 0.4).tolist())


def test_draw__narrow_anchor_range_on_a_short_video() -> None:
    """An empty interval takes the nearest frame instead of failing."""
    roles = UCL.draw(UCLParams(anchor_range=(0.97, 0.99)), 8, 0, 60, np.random.default_rng(0))
    assert roles["anchor"].tolist() == [7]


def test_window__decay_ends_with_training() -> None:
    params = UCLParams(decay_start=8, floor_low=None, floor_high=None)
    assert UCL.window(params, 8, 16) == (0.2, 0.4)
    assert UCL.window(params, 12, 16) == pytest.approx((0.1, 0.2))
    assert UCL.window(UCLParams(decay_start=8, decay_epochs=2, decay="cosine"), 12, 16) == (0.03, 0.07)
    assert UCL.window(params, 3, 5) == (0.2, 0.4), "a decay that would begin behind the last epoch never begins"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"low": 0.4, "high": 0.2}, "low (0.4) must be smaller than high (0.2)"),
        ({"floor_low": None}, "floor_low and floor_high must both be numbers or both be null"),
        ({"floor_low": 0.2, "floor_high": 0.1}, "floor_low (0.2) must be smaller than floor_high (0.1)"),
        ({"anchor_range": (0.5, 0.2)}, "anchor_range must satisfy 0 <= start < end <= 1; got [0.5, 0.2]"),
        ({"soft_nn_temperature": 0}, "soft_nn_temperature must be above 0, or -1"),
        ({"bank_size": 0}, "bank_size must be at least 1, or auto; got 0"),
    ],
)
def test_params__contradictions_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        UCLParams(**changes)


def test_params__defaults_are_the_papers() -> None:
    params = UCLParams()
    published = {
        "temperature": 0.07,
        "soft_nn_temperature": 0.07,
        "support_size": 4,
        "num_negatives": 3,
        "momentum": 0.999,
    }
    assert {name: getattr(params, name) for name in published} == published
    assert UCLParams(soft_nn_temperature=-1, temperature=0.3).mixing_temperature == 0.3
    assert "\nimport torch" not in Path(clips.__file__).read_text(encoding="utf-8"), (
        "sampling is read by stages that start without torch"
    )
