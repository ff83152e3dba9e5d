"""Pixels and batches: views by hand, and batches that depend on nothing but seed, epoch and video."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from training_kit import CPU, make_store, toy_loader

from pipeline.data import transforms
from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.loader import epoch_order, sample_generator
from pipeline.data.store import FrameStore
from pipeline.data.transforms import View, draw_view, evaluation_view, normalize, render, resize_frame, working_size
from pipeline.errors import DataError
from pipeline.evaluation.features import evenly_spaced, render_centre
from pipeline.methods.simclr import SimCLR, SimCLRParams
from pipeline.methods.ucl import UCL, UCLParams
from pipeline.parameters import AugmentationParams

VIEWS = {"crop": "resized", "horizontal_flip": 0.5, "jitter": 0.8, "blur": 0.5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=7, frames=[20, 12, 16])


def loader(store: FrameStore, **changes):
    settings = {"batch": 4, "augmentation": VIEWS, "working": 40, "samples_per_video": 2, **changes}
    return toy_loader(store, UCL, UCLParams(), **settings)


def flat(found) -> dict[str, torch.Tensor]:
    """All rows of a list of batches, one tensor a role, with video and label."""
    return {
        **{role: torch.cat([b.frames[role] for b in found]) for role in found[0].frames},
        "video": torch.cat([b.video for b in found]),
        "label": torch.cat([b.label for b in found]),
    }


def assert_same(one, other) -> None:
    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# --- views ----------------------------------------------------------------------------------------------------------


def picture(height: int = 48, width: int = 64, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (height, width) if channels == 1 else (height, width, 3)
    return rng.integers(0, 256, shape, np.uint8)


def rendered(frame: np.ndarray, view: View, size: int = 32) -> np.ndarray:
    out = np.zeros((size, size, *frame.shape[2:]), np.uint8)
    render(frame, view, size, out)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_render__crop_and_flip_are_exact(channels: int) -> None:
    frame = picture(channels=channels)
    window = frame[5:37, 9:41]
    np.testing.assert_array_equal(rendered(frame, View(9, 5, 32, 32)), window)
    np.testing.assert_array_equal(rendered(frame, View(9, 5, 32, 32, flip=True)), window[:, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("gain", "offset"), [(1.3, 0.0), (0.7, 0.0), (1.0, 19.0), (1.3, -60.0), (0.7, 64.0)])
def test_render__gain_turns_about_mid_grey(gain: float, offset: float, channels: int) -> None:
    """Rounded to the nearest level and clipped, at most one level from real numbers."""
    frame = picture(32, 32, channels)
    expected = np.clip((frame.astype(float) - 128) * gain + 128 + offset, 0, 255)
    got = rendered(frame, View(0, 0, 32, 32, gain=gain, offset=offset))
    assert np.abs(got - expected).max() <= 0.51


def test_render__blur_smooths_and_keeps_the_mean() -> None:
    frame = picture(32, 32)
    got = rendered(frame, View(0, 0, 32, 32, sigma=1.0))
    assert got.std() < 0.5 * frame.std()
    assert abs(float(got.mean()) - float(frame.mean())) < 3
    np.testing.assert_array_equal(rendered(frame, View(0, 0, 32, 32, sigma=0.1)), frame)


def test_render__does_not_write_into_the_frame() -> None:
    frame = picture(32, 32)
    before = frame.copy()
    rendered(frame, View(0, 0, 32, 32, flip=True, gain=1.2, offset=3.0, sigma=1.0))
    np.testing.assert_array_equal(frame, before)


@pytest.mark.parametrize("crop", ["random", "resized", "center"])
def test_draw_view__stays_inside_and_keeps_its_promises(crop: str) -> None:
    params = AugmentationParams(
        crop=crop, scale=(0.4, 1.0), ratio=(0.8, 1.25), brightness=0.3, contrast=0.2, blur=0.5, jitter=0.5
    )
    views = [draw_view(params, np.random.default_rng(seed), (40, 56), 32) for seed in range(400)]
    for view in views:
        assert view.left >= 0
        assert view.top >= 0
        assert view.left + view.width <= 56
        assert view.top + view.height <= 40
        assert 0.8 <= view.gain <= 1.2
        assert abs(view.offset) <= 64 * 0.3
        if crop == "resized":
            assert 0.38 * 40 * 56 <= view.width * view.height <= 40 * 56 or view.width == view.height == 40
            assert 0.75 <= view.width / view.height <= 1.34
        else:
            assert (view.width, view.height) == (32, 32)
    assert 0.4 < np.mean([v.flip for v in views]) < 0.6
    assert 0.4 < np.mean([v.gain != 1 for v in views]) < 0.6
    assert 0.4 < np.mean([v.sigma > 0 for v in views]) < 0.6
    if crop == "center":
        assert {(v.left, v.top) for v in views} == {(12, 4)}


def test_draw_view__small_crops_are_blurred_by_as_many_pixels() -> None:
    """As published: 0.1 to 2 pixels for anchors of 224 and of 96 pixels alike; everything else of the view stays."""
    params = AugmentationParams(blur=1.0)
    for seed in range(20):
        small, plain = (draw_view(params, np.random.default_rng(seed), (256, 256), 96, size) for size in (224, None))
        large = draw_view(params, np.random.default_rng(seed), (256, 256), 224)
        assert small.sigma == large.sigma == pytest.approx(plain.sigma * 224 / 96)
        assert small._replace(sigma=0.0) == plain._replace(sigma=0.0)


def test_draw_view__one_option_leaves_the_others_alone() -> None:
    """Sweeping the blur must not reshuffle crops and flips."""
    for seed in range(20):
        one, other = (
            draw_view(AugmentationParams(blur=b), np.random.default_rng(seed), (40, 56), 32) for b in (0.0, 1.0)
        )
        assert (one.left, one.top, one.width, one.flip, one.gain, one.offset) == (
            other.left,
            other.top,
            other.width,
            other.flip,
            other.gain,
            other.offset,
        )
        assert one.sigma == 0 < other.sigma


def test_resize_frame__short_side_square_and_no_copy() -> None:
    assert resize_frame(picture(48, 64), 24).shape == (24, 32)
    assert resize_frame(picture(48, 64, 3), 24, "square").shape == (24, 24, 3)
    same = picture(32, 40)
    assert resize_frame(same, 32) is same
    flat_grey = np.full((480, 640), 77, np.uint8)
    assert (resize_frame(flat_grey, 112) == 77).all()
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert abs(int(resize_frame(stripes, 16)[4, 4]) - 128) <= 1, "area averaging does not alias"


@pytest.mark.parametrize(
    ("statistics", "mean", "std"),
    [("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("uscl", (0.5,) * 3, (0.25,) * 3), ("half", (0.5,) * 3, (0.5,) * 3)],
)
def test_normalize__grey_fills_three_channels_colour_moves(statistics: str, mean: tuple, std: tuple) -> None:
    grey = torch.from_numpy(np.stack([picture(32, 32)] * 2))
    colour = torch.from_numpy(np.stack([picture(32, 32, 3)] * 2))
    for x in (grey, grey[:, None], colour, colour[:, None]):
        got = normalize(x, statistics)
        planes = x[..., None].expand(*x.shape, 3) if x.shape[-1] != 3 else x
        expected = ((planes.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).movedim(-1, -3)
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_working_size__room_for_a_zoom() -> None:
    assert working_size(AugmentationParams(crop="resized"), 112) == 140
    assert working_size(AugmentationParams(crop="random"), 112) == 112


def test_render_centre__sees_the_whole_short_side(store: FrameStore) -> None:
    frames = FrameCache(gather_videos([store]), 40)
    got = render_centre(frames, [(0, 3)], 32)
    expected = cv2.resize(frames.frame(0, 3), (32, 32), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(got[0], expected)
    assert evaluation_view((40, 56), 40) == View(8, 0, 40, 40)
    assert evenly_spaced(10, 2) == [2, 7]
    assert evenly_spaced(3, 5) == [0, 1, 2]


def test_transforms__module_starts_without_torch() -> None:
    assert "LazyModule" in Path(transforms.__file__).read_text()


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_frame_cache__over_budget_gives_the_same_pixels(tmp_path: Path, channels: int) -> None:
    store = make_store(tmp_path, patients=3, frames=9, side=600, channels=channels)
    held, fresh = (FrameCache(gather_videos([store]), 500, budget_mb=budget) for budget in (64, 1))
    assert (held.cached, fresh.cached) == (True, False)
    for video in range(3):
        for number in (0, 4, 8):
            np.testing.assert_array_equal(held.frame(video, number), fresh.frame(video, number))
    assert held.frame_shape == (() if channels == 1 else (3,))


def test_frame_cache__grey_and_colour_together_are_colour(tmp_path: Path) -> None:
    grey = make_store(tmp_path / "g", patients=2, frames=3)
    colour = make_store(tmp_path / "c", patients=2, frames=3, channels=3, first=50)
    frames = FrameCache(gather_videos([grey, colour]), 32)
    assert {frames.frame(v, 0).shape for v in range(4)} == {(32, 32, 3)}
    assert [r.video for r in frames.videos] == sorted(r.video for r in frames.videos)


def test_gather_videos__copies_once_and_only_what_is_wanted(tmp_path: Path) -> None:
    one, copy = make_store(tmp_path / "a", patients=3, frames=3), make_store(tmp_path / "b", patients=4, frames=3)
    refs = gather_videos([one, copy])
    assert len(refs) == 4
    assert sum(ref.store is one for ref in refs) == 3
    assert [r.video for r in gather_videos([one], [refs[0].video, "f" * 16])] == [refs[0].video]
    assert all(0 <= ref.number < 2**63 for ref in refs)


# --- batches --------------------------------------------------------------------------------------------------------


def test_epoch_order__every_video_once_a_round() -> None:
    order = epoch_order(7, 3, epoch=2, seed=5)
    assert order.shape == (21, 2)
    for number in range(3):
        part = order[7 * number : 7 * number + 7]
        assert sorted(part[:, 0]) == list(range(7))
        assert (part[:, 1] == number).all()
    assert (order == epoch_order(7, 3, 2, 5)).all()
    assert (order != epoch_order(7, 3, 3, 5)).any()
    assert (order != epoch_order(7, 3, 2, 6)).any()


def test_loader__threads_and_cache_change_nothing(store: FrameStore) -> None:
    base = list(loader(store).epoch(1, CPU))
    assert_same(base, list(loader(store, threads=3).epoch(1, CPU)))
    over = loader(store, budget_mb=0)
    assert over.frames.cached is False
    assert_same(base, list(over.epoch(1, CPU)))


def test_loader__two_processes_read_what_one_reads(store: FrameStore) -> None:
    """Step by step, the shares of the processes put together are the batch of one."""
    whole = list(loader(store, samples_per_video=4).epoch(1, CPU))
    shares = [list(loader(store, samples_per_video=4, rank=r, world=2).epoch(1, CPU)) for r in (0, 1)]
    for step, batch in enumerate(whole):
        assert_same([batch], [share[step] for share in shares])


def test_loader__accumulation_divides_the_same_batch(store: FrameStore) -> None:
    whole = list(loader(store, samples_per_video=4).epoch(1, CPU))
    parts = list(loader(store, samples_per_video=4, accumulate=2).epoch(1, CPU))
    assert len(parts) == 2 * len(whole)
    for step, batch in enumerate(whole):
        assert_same([batch], parts[2 * step : 2 * step + 2])
    both = [list(loader(store, samples_per_video=4, accumulate=2, rank=r, world=2).epoch(1, CPU)) for r in (0, 1)]
    for number, micro in enumerate(parts):
        assert_same([micro], [share[number] for share in both])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loader__starts_in_the_middle(store: FrameStore, accumulate: int) -> None:
    whole = list(loader(store, accumulate=accumulate).epoch(3, CPU))
    for first in range(4):
        assert_same(whole[first * accumulate :], list(loader(store, accumulate=accumulate).epoch(3, CPU, first)))
    assert list(loader(store, accumulate=accumulate).epoch(3, CPU, 4)) == []


def test_loader__last_batch_is_filled_up_from_the_start_of_the_epoch(store: FrameStore) -> None:
    """14 samples: 4 + 4 + 4 + 2; three processes need equal shares, and batch norm more than one row each."""
    order = epoch_order(7, 2, 1, 0)

    def videos(**changes) -> list[list[int]]:
        worlds = changes.get("world", 1)
        shares = [list(loader(store, rank=r, **changes).epoch(1, CPU)) for r in range(worlds)]
        return [[int(v) for share in shares for v in share[step].video] for step in range(len(shares[0]))]

    number = [loader(store).frames.videos[v].number for v in order[:, 0]]
    assert videos() == [number[:4], number[4:8], number[8:12], number[12:]]
    assert videos(batch=6, world=3)[-1] == number[12:] + number[:4]
    assert videos(batch=13)[-1] == [number[13], number[0]], "never one row alone where the batch size allows more"
    assert videos(batch=1)[3] == [number[3]]
    assert videos(batch=5, world=2)[0] == number[:5] + number[:1]
    assert [len(v) for v in videos(batch=100)] == [14]


def test_loader__labels_videos_and_roles(store: FrameStore) -> None:
    made = loader(store)
    assert (made.samples_per_epoch, made.steps_per_epoch) == (14, 4)
    batch = next(iter(made.epoch(0, CPU)))
    assert {role: tuple(x.shape) for role, x in batch.frames.items()} == {
        "anchor": (4, 1, 3, 32, 32),
        "positive": (4, 1, 3, 32, 32),
        "negatives": (4, 3, 3, 32, 32),
    }
    known = {ref.number: int(label) for ref, label in zip(made.frames.videos, made.labels, strict=True)}
    assert batch.label.tolist() == [known[int(v)] for v in batch.video]
    moved = batch.to(torch.device("meta"))
    assert moved.video.device.type == moved.frames["anchor"].device.type == "meta"


def test_loader__samples_epochs_and_seeds_differ(store: FrameStore) -> None:
    """The same video gives other views in another round, epoch or seed; two views of one frame differ."""
    made = toy_loader(store, SimCLR, SimCLRParams(), batch=14, augmentation=VIEWS, working=40, samples_per_video=2)
    other = toy_loader(
        store, SimCLR, SimCLRParams(), batch=14, augmentation=VIEWS, working=40, samples_per_video=2, seed=1
    )
    batch, later, seeded = next(made.epoch(0, CPU)), next(made.epoch(1, CPU)), next(other.epoch(0, CPU))

    def first(found, turn: int = 0) -> torch.Tensor:
        row = (found.video == batch.video[0]).nonzero()[turn, 0]
        return found.frames["view"][row]

    images = [first(batch), first(batch, 1), first(later), first(seeded)]
    assert len({x.numpy().tobytes() for x in images}) == 4
    assert not torch.equal(images[0][0], images[0][1])
    draws = [sample_generator(*key).random() for key in ((0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (0, 1, 2, 4))]
    assert len(set(draws)) == 4


def test_loader__colour_batches(tmp_path: Path) -> None:
    store = make_store(tmp_path, patients=3, frames=12, channels=3)
    batch = next(loader(store, samples_per_video=1).epoch(0, CPU))
    assert batch.frames["negatives"].shape == (4, 3, 3, 32, 32) or batch.frames["negatives"].shape == (3, 3, 3, 32, 32)
    assert not torch.equal(batch.frames["anchor"][:, :, 0], batch.frames["anchor"][:, :, 2])


def test_loader__a_damaged_frame_names_the_video(tmp_path: Path) -> None:
    store = make_store(tmp_path, patients=3, frames=12)
    made = loader(store, budget_mb=0)
    victim = made.frames.videos[1].video
    tar = tmp_path / f"{victim}.tar"
    raw = bytearray(tar.read_bytes())
    index = np.load(tmp_path / f"{victim}.idx.npy")
    for offset, length in index:
        raw[offset : offset + length] = bytes(length)
    tar.write_bytes(raw)
    with pytest.raises(DataError, match=f"frame .* of video {victim} is damaged"):
        list(made.epoch(0, CPU))
    with pytest.raises(DataError, match=victim):
        loader(FrameStore(tmp_path), budget_mb=64)


def test_loader__an_unexpected_error_names_the_video(store: FrameStore) -> None:
    class Picky(SimCLR):
        @classmethod
        def draw(cls, params, num_frames, epoch, epochs, rng):
            if num_frames == 16:
                raise ValueError("a must be greater than 0")
            return {"view": np.array([0, 1])}

    made = toy_loader(store, Picky, SimCLRParams(), batch=7)
    victims = [ref.video for ref in made.frames.videos if ref.row.frames == 16]
    with pytest.raises(
        DataError, match=r"video (\w+): no sample could be made of it \(ValueError: a must be greater than 0\)"
    ) as caught:
        list(made.epoch(0, CPU))
    assert any(victim in str(caught.value) for victim in victims)


def test_loader__measures_the_wait(store: FrameStore) -> None:
    made = loader(store)
    list(made.epoch(0, CPU))
    assert 0 < made.waited < 30
