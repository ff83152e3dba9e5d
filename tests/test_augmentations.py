"""Rarer changes of a view: against Pillow, torchvision and by hand; what is off changes nothing, what is on draws behind the rest."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from pydantic import ValidationError
from torchvision.transforms import functional as tv
from training_kit import ROOT

from pipeline.data import photometry, randaugment
from pipeline.data.transforms import Look, View, content_box, draw_view, frame_view, render, resize_frame
from pipeline.parameters import AugmentationParams, RandAugmentParams

OPTIONS: dict[str, dict[str, Any]] = {
    "saturation": {"saturation": 0.8}, "hue": {"hue": 0.2}, "grayscale": {"grayscale": 1.0}, "solarize": {"solarize": 1.0},
    "torchvision": {"jitter_style": "torchvision"}, "sharpen": {"optional": {"sharpen": 3}}, "rotation": {"optional": {"rotation": 30}},
    "shift": {"optional": {"shift": 0.2}}, "bezier": {"optional": {"bezier": 1.0}}, "cutout": {"optional": {"cutout_holes": 3}},
    "outpaint": {"optional": {"outpaint": 1.0}}, "randaugment": {"optional": {"randaugment": {"layers": 3, "magnitude": 7}}},
}


def picture(height: int = 80, width: int = 96, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours over the whole range."""
    shape = (height, width) if channels == 1 else (height, width, 3)
    rough = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=shape), (0, 0), 3)
    return np.clip((rough - rough.mean()) / rough.std() * 60 + 128, 0, 255).astype(np.uint8)


def rendered(frame: np.ndarray, view: View, size: int = 64) -> np.ndarray:
    out = np.zeros((size, size, *frame.shape[2:]), np.uint8)
    render(frame, view, size, out)
    return out


def drawn(seed: int, shape: tuple[int, int] = (80, 96), size: int = 64, **options: Any) -> View:
    return draw_view(AugmentationParams(**options), np.random.default_rng(seed), shape, size)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draw_view__defaults_draw_what_they_always_drew() -> None:
    """Numbers of the first release: results of existing settings stay, and the generator is left where it was."""
    wanted = [
        (View(27, 47, 179, 222, False, 1.0261749948792538, 16.706781073450298), 0.002738500170148095),
        (View(1, 7, 284, 232, False, 1.196621556292265, -3.486753163424207), 0.027559113243068367),
        (View(48, 35, 218, 238, True, 0.812740644019962, -17.08236951041018), 0.6574330148755926),
    ]
    for seed, (view, following) in enumerate(wanted):
        rng = np.random.default_rng(seed)
        got = frame_view(AugmentationParams(), rng, np.zeros((280, 333), np.uint8), 224)
        assert got._replace(gain=0, offset=0) == view._replace(gain=0, offset=0)
        assert (got.gain, got.offset) == pytest.approx((view.gain, view.offset), rel=1e-12)
        assert rng.random() == following


@pytest.mark.parametrize("name", OPTIONS)
def test_draw_view__an_option_changes_nothing_else(name: str) -> None:
    """The crop and the other draws stay, also those of other options."""
    for seed in range(20):
        alone, look = drawn(seed, **OPTIONS[name]), vars(drawn(seed, **OPTIONS[name]).look)
        assert alone._replace(look=None) == drawn(seed, jitter=0.8 if name != "torchvision" else 0)
        own = {key for key, value in look.items() if str(value) != str(getattr(Look(hole_side=look["hole_side"]), key))}
        for other in OPTIONS.keys() - {name, "torchvision"}:
            options = {**OPTIONS[other], **OPTIONS[name]}
            options["optional"] = {**OPTIONS[other].get("optional", {}), **OPTIONS[name].get("optional", {})}
            both, disturbs = drawn(seed, **options), {"jitter", "move"}  # which two options may share
            assert both._replace(look=None) == alone._replace(look=None)
            assert all(str(vars(both.look)[key]) == str(look[key]) for key in own - disturbs)


def test_draw_view__probabilities_and_ranges() -> None:
    looks = [
        drawn(
            seed, jitter=0.7, saturation=0.4, hue=0.1, brightness=0.2, contrast=0.3, grayscale=0.2, solarize=0.4,
            jitter_style="torchvision", optional={"bezier": 0.6, "outpaint": 0.3, "rotation": 10, "shift": 0.1, "cutout_holes": 2},
        ).look
        for seed in range(600)
    ]
    for share, wanted in (
        (np.mean([bool(look.jitter) for look in looks]), 0.7), (np.mean([look.grayscale for look in looks]), 0.2),
        (np.mean([look.solarize for look in looks]), 0.4), (np.mean([look.curve is not None for look in looks]), 0.6),
        (np.mean([look.outpaint is not None for look in looks]), 0.3),
        (np.mean([look.curve[1] for look in looks if look.curve]), 0.5),
    ):
        assert abs(share - wanted) < 0.07
    changes = [dict(look.jitter) for look in looks if look.jitter]
    for name, low, high in (("brightness", 0.8, 1.2), ("contrast", 0.7, 1.3), ("saturation", 0.6, 1.4), ("hue", -0.1, 0.1)):
        values = [change[name] for change in changes]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high >= max(values) > high - 0.05 * (high - low)
    assert len({tuple(change) for change in changes}) == 24, "every order"
    moves = np.array([look.move for look in looks])
    assert (np.abs(moves).max(0) <= (10, 0.1, 0.1)).all()
    assert (np.abs(moves).max(0) > (9.5, 0.095, 0.095)).all()
    assert all(0 <= place < 64 for look in looks for hole in look.holes for place in hole)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_render__every_option_does_something_and_spares_the_frame(name: str, channels: int) -> None:
    frame = picture(channels=channels)
    before, options = frame.copy(), {"horizontal_flip": 0, "jitter": 1, "blur": 0, **OPTIONS[name]}
    changed = 0
    for seed in range(10):
        view = drawn(seed, **options)
        one, other = rendered(frame, view), rendered(frame, view)
        np.testing.assert_array_equal(one, other)
        changed += not np.array_equal(one, rendered(frame, view._replace(look=None)))
    np.testing.assert_array_equal(frame, before)
    only_colour = channels == 1 and name in ("saturation", "hue", "grayscale")
    assert changed == 0 if only_colour else changed >= 9


def test_draw_view__unlike_options_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"trim_border needs crop: resized.*got crop: random"):
        AugmentationParams(crop="random", optional={"trim_border": True})
    with pytest.raises(ValidationError, match="hue"):
        AugmentationParams(hue=0.6)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "amount", "theirs", "levels"),
    [
        ("brightness", 1.6, tv.adjust_brightness, 1), ("brightness", 0.3, tv.adjust_brightness, 1),
        ("contrast", 0.2, tv.adjust_contrast, 1), ("contrast", 1.8, tv.adjust_contrast, 1),
        ("saturation", 0.2, tv.adjust_saturation, 2), ("saturation", 1.8, tv.adjust_saturation, 2),
        ("hue", 0.2, tv.adjust_hue, 9), ("hue", -0.5, tv.adjust_hue, 9), ("hue", 0.0, tv.adjust_hue, 9),
    ],
)
def test_adjust__as_torchvision(change: str, amount: float, theirs: Any, levels: int) -> None:
    """Within what rounding to levels costs; the hue is counted in 256 steps, as in Pillow, and so compared with real numbers."""
    frame = picture()
    if change == "hue":
        real = theirs(torch.from_numpy(frame).movedim(-1, 0).float() / 255, amount)
        wanted = (255 * real).movedim(0, -1).numpy()
    else:
        wanted = np.asarray(theirs(Image.fromarray(frame), amount)).astype(float)
    difference = np.abs(photometry.adjust(frame, change, amount) - wanted)
    assert difference.max() <= levels
    assert difference.mean() < 1


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize__as_pillow(channels: int) -> None:
    frame = picture(channels=channels)
    np.testing.assert_array_equal(photometry.solarize(frame), np.asarray(ImageOps.solarize(Image.fromarray(frame), 128)))


@pytest.mark.parametrize("level", sorted(photometry.SHARPEN_LEVELS))
def test_sharpen__as_pillow(level: int) -> None:
    frame, kernel = picture(), np.array(photometry.SHARPEN_LEVELS[level])
    wanted = np.asarray(Image.fromarray(frame).filter(ImageFilter.Kernel((3, 3), kernel.ravel().tolist())))
    difference = np.abs(photometry.sharpen(frame, level).astype(int) - wanted)
    assert difference.max() <= (1 if level == -1 else 0)
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("shape", [(48, 64), (300, 211), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_frame__square_is_pillows_bilinear(shape: tuple[int, int], channels: int) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3) if channels == 3 else shape, np.uint8)
    wanted = np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_frame(frame, 64, "square"), wanted)


def test_bezier_map__ends_and_direction() -> None:
    values, rng = np.linspace(0, 1, 256), np.random.default_rng(0)
    for _ in range(20):
        control = rng.random((2, 2))
        rising, falling = (photometry.bezier_map(values, control, down) for down in (False, True))
        assert (np.diff(rising) >= -1e-12).all()
        assert falling[0] > falling[-1]
        np.testing.assert_allclose([rising[0], rising[-1], falling[0], falling[-1]], [0, 1, 1, 0], atol=1e-12)
    straight = np.array([[1 / 3, 1 / 3], [2 / 3, 2 / 3]])
    np.testing.assert_allclose(photometry.bezier_map(values, straight, False), values, atol=1e-9)
    np.testing.assert_array_equal(photometry.curve(picture(), straight, False), picture())


def test_cut_out__holes_at_the_border_and_odd_sides() -> None:
    frame = np.full((10, 12), 7, np.uint8)
    holed = photometry.cut_out(frame, [(0, 11), (5, 5)], 5)
    wanted = frame.copy()
    wanted[0:2, 9:12] = 0
    wanted[3:7, 3:7] = 0
    np.testing.assert_array_equal(holed, wanted)


@pytest.mark.parametrize("size", [32, 112, 224])
def test_outpaint__windows_of_the_image_in_noise(size: int) -> None:
    frame = np.full((size, size), 7, np.uint8)
    for seed in range(20):
        kept = photometry.outpaint(frame, np.random.default_rng(seed)) == 7
        assert 0.15 < kept.mean() < 0.95
        assert kept[3:-3, 3:-3].any()
        assert kept[:3].mean() < 0.1


def test_warp__quarter_turn_and_shift() -> None:
    frame = picture(64, 64)
    turned = rendered(frame, View(0, 0, 64, 64, look=Look(move=(90.0, 0.0, 0.0))))
    np.testing.assert_array_equal(turned, np.rot90(frame))
    shifted = rendered(frame, View(0, 0, 64, 64, look=Look(move=(0.0, 0.25, -0.125))))
    np.testing.assert_array_equal(shifted[:-8, 16:], frame[8:, :-16])
    assert not shifted[-8:].any()
    assert not shifted[:, :16].any()


# --- black borders ---------------------------------------------------------------------------------------------------


def endoscope(height: int = 120, width: int = 214) -> np.ndarray:
    """A round picture on black with compression noise, 40 pixels of black to the left and right."""
    frame = picture(height, width)
    y, x = np.mgrid[:height, :width]
    outside = ((x - width / 2) / (width / 2 - 40)) ** 2 + ((y - height / 2) / (height * 0.7)) ** 2 > 1
    frame[outside] = np.random.default_rng(1).integers(0, 5, (int(outside.sum()), 3))
    return frame


def test_content_box__black_border_of_a_round_picture() -> None:
    left, top, width, height = content_box(endoscope())
    assert 40 <= left <= 46
    assert 168 <= left + width <= 174
    assert (top, height) == (0, 120)
    assert content_box(endoscope()[..., 0]) == pytest.approx((left, top, width, height), abs=3)
    assert content_box(np.zeros((50, 70, 3), np.uint8)) == (0, 0, 70, 50)
    assert content_box(picture(50, 70)) == (0, 0, 70, 50)


def test_frame_view__focal_crops_see_no_border() -> None:
    frame = endoscope()
    trimmed, whole = (
        [
            rendered(frame, frame_view(AugmentationParams(
                scale=(0.05, 0.2), blur=0, jitter=0, optional={"trim_border": trim}), np.random.default_rng(seed), frame, 32), 32)
            for seed in range(200)
        ]
        for trim in (True, False)
    )
    dark = [np.mean([(view < 8).all(2).mean() > 0.5 for view in views]) for views in (trimmed, whole)]
    assert dark[0] < 0.6 * dark[1]
    assert np.mean([(view < 8).all(2).mean() > 0.9 for view in trimmed]) < 0.01


# --- RandAugment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(randaugment.OPERATIONS))
@pytest.mark.parametrize("sign", [1, -1])
def test_randaugment__operations_keep_shape_type_and_range(name: str, sign: int, channels: int) -> None:
    """None of them ends in black and white, which is what levels above 255 gave the published program."""
    frame = picture(channels=channels)
    largest, signed, _ = randaugment.OPERATIONS[name]
    for magnitude in (0, 7, 10):
        amount = largest * magnitude / 10 * (sign if signed else 1)
        out = randaugment.apply_layers(frame, ((name, amount, 0.3, 0.6),))
        assert out.shape == frame.shape
        assert out.dtype == np.uint8
        assert len(np.unique(out)) > 20
    np.testing.assert_array_equal(frame, picture(channels=channels))


def test_randaugment__amounts_as_published() -> None:
    """Magnitude 7 of 10 at 224 pixels: 21 degrees, factors of 1.36, shear 0.21, 70 pixels, holes of 2 x 28, 77 levels."""
    frame = np.full((224, 224), 100, np.uint8)
    seen = {}
    for seed in range(400):
        for name, amount, y, x in randaugment.draw_layers(RandAugmentParams(), np.random.default_rng(seed)):
            seen.setdefault(name, set()).add(round(amount, 6))
            if name == "cutout" and 0.3 < min(y, x) and max(y, x) < 0.7:
                assert (randaugment.apply_layers(frame, ((name, amount, y, x),)) == 128).sum() == 56**2
    assert seen.keys() == randaugment.OPERATIONS.keys()
    assert seen["rotate"] == {21.0, -21.0}
    assert seen["brightness"] == {1.26}, "plus 0.1 is a factor of 1.36"
    assert seen["shear_x"] == seen["shear_y"] == {0.21, -0.21}
    assert seen["translate_x"] == {0.3125, -0.3125}
    assert (randaugment.apply_layers(frame, (("solarize_add", 77.0, 0, 0),)) == 177).all()
    assert (randaugment.apply_layers(frame, (("brightness", 1.26, 0, 0),)) == 136).all()
    moved = randaugment.apply_layers(frame, (("translate_x", 0.3125, 0, 0),))
    assert (moved[:, :70] == 128).all()
    assert (moved[:, 70:] == 100).all()


def test_randaugment__layers_and_their_share() -> None:
    counts = [len(randaugment.draw_layers(RandAugmentParams(layers=4), np.random.default_rng(seed))) for seed in range(500)]
    assert max(counts) == 4
    assert abs(np.mean(counts) / 4 - 0.5) < 0.05
    names = [name for seed in range(2000) for name, *_ in randaugment.draw_layers(RandAugmentParams(), np.random.default_rng(seed))]
    shares = np.array([names.count(name) for name in randaugment.OPERATIONS]) / len(names)
    assert np.abs(shares * 14 - 1).max() < 0.25


def test_photometry__starts_without_torch() -> None:
    code = "import sys, pipeline.data.photometry, pipeline.data.randaugment; print([m for m in ('torch', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
