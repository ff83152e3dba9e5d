"""The scan area: found on synthetic screens of every geometry, doubted where there is none, and on real clips."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import sample_scan as sample

from pipeline.data.outline import Fan, fan_mask, fit_fan
from pipeline.data.sector import activity, find_panes, find_sector
from pipeline.data.video import MediaReader, find_media
from pipeline.parameters import ExtractParams, MaskParams

SURE = 0.92
SIZES = [((400, 300), 0), ((256, 256), 1), ((640, 480), 2)]


@pytest.mark.parametrize("geometry", sample.GEOMETRIES)
@pytest.mark.parametrize(("size", "seed"), SIZES)
def test_find_sector__no_text_and_the_whole_area(geometry: str, size: tuple[int, int], seed: int) -> None:
    clip = sample.scan(geometry, size, seed=seed)
    found = find_sector(clip.frames)
    assert found.geometry == geometry
    assert found.confidence > SURE
    assert not (found.mask & clip.written).any()
    assert (found.mask & clip.sector).sum() >= 0.97 * clip.sector.sum()
    assert found.mask.sum() < 1.1 * clip.sector.sum()


@pytest.mark.parametrize("overlay", sample.OVERLAYS)
def test_find_sector__each_overlay_alone(overlay: str) -> None:
    clip = sample.scan("convex", overlays=(overlay,), seed=3)
    assert not (find_sector(clip.frames).mask & clip.written).any()


@pytest.mark.parametrize("geometry", sample.GEOMETRIES)
@pytest.mark.parametrize("overlay", sample.NEAR)
@pytest.mark.parametrize(("size", "seed"), [((341, 256), 0), ((400, 300), 1), ((456, 256), 2)])
def test_find_sector__what_moves_or_blinks_close_to_the_picture_is_cut(overlay: str, geometry: str, size: tuple[int, int], seed: int) -> None:
    """Traces are lit nearly always, a bar or a name for half of the clip: neither stands still, and both are close by."""
    clip = sample.scan(geometry, size, overlays=(overlay,), seed=seed, gap=4)
    assert (clip.written.sum() > 100) and clip.frames[:, clip.written].max() >= 150
    found = find_sector(clip.frames)
    assert not (found.mask & clip.written).any() or found.confidence < SURE
    assert (found.mask & clip.sector).sum() >= 0.97 * clip.sector.sum()
    assert found.mask.sum() < 1.1 * clip.sector.sum()


@pytest.mark.parametrize("geometry", sample.GEOMETRIES)
@pytest.mark.parametrize("overlay", ["blinking", "late"])
def test_find_sector__writing_that_touches_the_rim_for_a_while_is_cut(overlay: str, geometry: str) -> None:
    clip = sample.scan(geometry, (480, 360), overlays=(overlay,), seed=4, gap=1)
    found = find_sector(clip.frames)
    assert (found.mask & clip.written).sum() <= 0.01 * clip.written.sum() or found.confidence < SURE
    assert (found.mask & clip.sector).sum() >= 0.97 * clip.sector.sum()


def test_find_sector__text_right_beside_the_rim_is_cut() -> None:
    clip = sample.scan("linear", overlays=())
    frames = clip.frames.copy()
    rim = int(np.flatnonzero(clip.sector.any(0))[-1])
    written = np.zeros_like(clip.sector)
    written[100:112, rim + 1 : rim + 30] = True
    frames[:, written] = 230
    found = find_sector(frames)
    assert (found.mask & written).sum() <= 0.05 * written.sum()
    assert (found.mask & clip.sector).sum() >= 0.97 * clip.sector.sum()


def _adversarial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    clip = sample.scan()
    return {
        "all static": np.repeat(clip.frames[:1], 20, 0),
        "all black": np.zeros((20, 200, 300), np.uint8),
        "noise everywhere": rng.integers(0, 255, (20, 200, 300)).astype(np.uint8),
        "text alone": np.repeat(clip.frames[:1] * clip.written, 20, 0),
        "a clock alone": clip.frames * clip.written,
        "a still": clip.frames[:1],
        "two frames": clip.frames[:2],
        "snow": (rng.random((20, 200, 300)) > 0.98).astype(np.uint8) * 255,
    }


@pytest.mark.parametrize("case", list(_adversarial()))
def test_find_sector__is_not_sure_where_there_is_no_picture(case: str) -> None:
    found = find_sector(_adversarial()[case])
    assert found.confidence < 0.8
    assert found.reasons
    assert found.mask.any(), "a doubtful mask never blanks a video"
    assert not (found.mask & ~found.wide).any()


def test_find_sector__black_lead_in_and_cut_do_not_make_text_move() -> None:
    clip = sample.scan("phased", overlays=("text", "bar"))
    frames = np.concatenate([np.zeros_like(clip.frames[:3]), clip.frames])
    found = find_sector(frames)
    assert found.confidence > SURE
    assert not (found.mask & clip.written).any()


def test_find_sector__a_picture_that_fills_the_frame_is_kept_whole() -> None:
    frames = sample.speckle(np.ones((200, 260), bool), 20, np.random.default_rng(1))
    found = find_sector(frames)
    assert found.mask.mean() > 0.98
    assert found.confidence > SURE


def test_find_sector__round_picture_of_an_endoscope_keeps_its_pixels() -> None:
    y, x = np.mgrid[0:240, 0:300]
    circle = (y - 120) ** 2 + (x - 170) ** 2 < 108**2
    frames = sample.speckle(circle, 20, np.random.default_rng(2), shadow=False)
    found = find_sector(frames)
    assert (found.wide & circle).sum() >= 0.97 * circle.sum()


def test_regions__are_looked_at_alone_unless_they_lie() -> None:
    clip = sample.scan("convex")
    rows, columns = np.flatnonzero(clip.sector.any(1)), np.flatnonzero(clip.sector.any(0))
    box = (int(columns[0]) - 2, int(rows[0]) - 2, int(columns[-1]) + 3, int(rows[-1]) + 3)
    found = find_sector(clip.frames, [box])
    assert not (found.mask & clip.written).any()
    assert (found.mask & clip.sector).sum() >= 0.97 * clip.sector.sum()
    half = (0, 0, 150, 150)
    assert (find_sector(clip.frames, [half]).mask & clip.sector).sum() >= 0.97 * clip.sector.sum(), "the header lies"


@pytest.mark.parametrize("geometry", sample.GEOMETRIES)
def test_find_panes__two_pictures_side_by_side(geometry: str) -> None:
    clip = sample.side_by_side(geometry)
    panes = find_panes(clip.frames)
    assert [pane.geometry for pane in panes] == [geometry] * 2
    left, right = (np.flatnonzero(pane.mask.any(0)) for pane in panes)
    assert left[-1] < right[0]
    together = find_sector(clip.frames)
    assert (together.mask & clip.sector).sum() >= 0.97 * clip.sector.sum()
    assert not (together.mask & clip.written).any()
    assert len(find_panes(sample.scan(geometry).frames)) == 1


def test_find_panes__two_regions_of_a_header() -> None:
    clip = sample.side_by_side("linear")
    width = clip.sector.shape[1]
    assert len(find_panes(clip.frames, [(0, 0, width // 2, 240), (width // 2, 0, width, 240)])) == 2
    assert len(find_panes(clip.frames, [(0, 0, width, 120), (0, 120, width, 240)])) == 1, "above one another"


def test_activity__repeated_frames_and_cuts_count_for_nothing() -> None:
    frames = sample.scan("convex", frames=12).frames
    repeated = np.repeat(frames, 3, axis=0)
    assert np.allclose(activity(repeated), activity(frames), atol=0.5)
    cut = frames.copy()
    cut[6:, :20, :20] = 255
    cut[6:] = 255 - cut[6:]
    assert activity(cut)[:20, :20].max() < 2
    assert activity(frames[:1]).max() == 0


def test_fit_fan__gives_the_fan_back() -> None:
    truth = Fan(0.52, -0.1, -0.5, 0.55, 0.2, 0.7)
    area = fan_mask(truth, (120, 160))
    fan, overlap = fit_fan(area)
    again = fan_mask(fan, (120, 160))
    assert overlap > 0.97
    assert (area & again).sum() / (area | again).sum() > 0.95


def test_fan_mask__margin_widens_on_all_sides() -> None:
    fan = Fan(0.5, 0.1, -0.6, 0.6, 0.1, 0.6)
    inner, outer = fan_mask(fan, (150, 200)), fan_mask(fan, (150, 200), 0.02)
    ring = cv2.dilate(inner.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert not (ring & ~outer).any()
    assert outer.sum() < 1.35 * inner.sum()


def test_real_clips__masks_are_sure_and_none_is_empty(shared: Path) -> None:
    media = [item for item in find_media(shared / "data/pocus/videos").media if item.kind == "video"][::8]
    params = ExtractParams(short_side=128, mask=MaskParams(mode="sector"))
    sure, shares = 0, []
    for item in media:
        reader = MediaReader(item, params)
        assert sum(1 for _ in reader.jpegs()) > 0
        assert reader.masker is not None
        report = reader.masker.report
        sure += (report.confidence or 0) >= params.mask.min_confidence
        shares.append(report.share)
    assert len(media) >= 10
    assert sure >= 0.9 * len(media)
    assert min(shares) > 0.2
