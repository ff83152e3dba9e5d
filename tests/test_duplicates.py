"""Planted copies of a clip are found, relatives are left apart, and the split stage keeps copies in one fold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.config import Config
from pipeline.data import duplicates
from pipeline.data.duplicates import NearDuplicate, VideoPrint, find_near_duplicates, print_video
from pipeline.data.manifest import Manifest, VideoRow, pseudonym
from pipeline.data.split_report import run_split
from pipeline.data.splits import Splits
from pipeline.data.store import write_video
from pipeline.errors import DataError


def video_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def three_folds() -> Config:
    return Config.model_validate({"split": {"folds": [0, 1, 2]}})


def clip(seed: int, frames: int = 12, size: int = 96) -> list[np.ndarray]:
    """Moving speckle under a fixed sector, the same for all seeds: what makes clips of one machine look alike."""
    rng = np.random.default_rng(seed)
    world = cv2.GaussianBlur(rng.normal(size=(size + 2 * frames, size + 2 * frames)).astype(np.float32), (0, 0), 2.0)
    world = 110 + 60 * world / world.std()
    rows, columns = np.mgrid[:size, :size] / size
    sector = (np.hypot(rows + 0.2, columns - 0.5) < 1.1) & (np.abs(columns - 0.5) < 0.15 + 0.6 * rows)
    steps = rng.integers(0, 3, (frames, 2)).cumsum(0)
    return [np.clip(world[y : y + size, x : x + size] * sector, 0, 255).astype(np.uint8) for y, x in steps]


def copy_of(frames: list[np.ndarray], cut: int, quality: int) -> list[np.ndarray]:
    """Cropped by `cut` pixels a side, enlarged and compressed again."""
    again = []
    for frame in frames:
        larger = cv2.resize(frame[cut:-cut, cut:-cut], (120, 120))
        again.append(
            cv2.imdecode(cv2.imencode(".jpg", larger, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)
        )
    return again


def store(folder: Path, name: str, patient: str, label: str, frames: list[np.ndarray]) -> VideoRow:
    """Write one clip into a frame store; returns its manifest row."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    count = write_video(folder, digest[:16], (cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames))
    height, width = frames[0].shape
    return VideoRow(
        video=digest[:16],
        source="main",
        path=f"{name}.mp4",
        sha256=digest,
        patient=pseudonym(patient, ""),
        label=label,
        kind="video",
        frames=count,
        frames_decoded=count,
        frames_claimed=count,
        fps=10.0,
        fps_source="container",
        width=width,
        height=height,
        stored_width=width,
        stored_height=height,
        channels=1,
        bytes=(folder / f"{digest[:16]}.tar").stat().st_size,
    )


def test_near_duplicates__copies_found_relatives_left_apart() -> None:
    clips = {f"v{seed}": clip(seed) for seed in range(12)}
    clips["copy"] = copy_of(clips["v3"], 5, 60)
    # One view at two moments: the anatomy is the same, what moves is not.
    view = np.mean(clip(50, frames=2), axis=0)
    for name, seed in (("before", 100), ("after", 101)):
        clips[name] = [(0.7 * view + 0.3 * moving).astype(np.uint8) for moving in clip(seed)]
    clips["still"] = [clips["v5"][4]]
    clips["flat1"], clips["flat2"] = [np.zeros((96, 96), np.uint8)] * 9, [np.full((96, 96), 7, np.uint8)] * 9
    prints = {}
    for name, frames in clips.items():
        count = 9 if len(frames) > 1 else 1
        prints[name] = print_video(name, [frames[int((i + 0.5) * len(frames) / count)] for i in range(count)])
    found = find_near_duplicates(prints)
    assert [(pair.first, pair.second) for pair in found] == [("copy", "v3")]
    assert found[0].motion > 0.65 and found[0].similarity > 0.7


def _slow_search(first: list[np.ndarray], second: list[np.ndarray], scales: list[float]) -> tuple[float, float]:
    side, best, best_scale = len(first[0]), -1.0, 1.0
    window = int(side * duplicates.WINDOW)
    start = (side - window) // 2
    for scale in scales:
        size = round(window * scale)
        if not 8 <= size <= side:
            continue
        found = np.zeros((side - size + 1,) * 2, np.float32)
        for left, right in zip(first, second, strict=True):
            patch = cv2.resize(left[start : start + window, start : start + window], (size, size))
            match = cv2.matchTemplate(right, patch, cv2.TM_CCOEFF_NORMED)
            found += np.where(np.isfinite(match), match, 0.0) if patch.std() > 0.1 else 0.0
        if float(found.max()) / len(first) > best:
            best, best_scale = float(found.max()) / len(first), scale
    return best, best_scale


def _slow_compare(first: VideoPrint, second: VideoPrint, distance: int) -> NearDuplicate | None:
    d, left, right = duplicates, first.frames.astype(np.float32), second.frames.astype(np.float32)
    if len(left) != len(right):
        return None
    some = slice(1, None, 3) if len(left) == d.FRAMES else slice(None)
    coarse, scale = _slow_search(d._details(left[some], d.COARSE_SIDE), d._details(right[some], d.COARSE_SIDE), list(d.SCALES))
    fine, scale = _slow_search(d._details(left, d.SIDE), d._details(right, d.SIDE), [scale * factor for factor in d.FINE_SCALES])
    if len(left) == 1:
        alike = coarse >= d.COARSE_SIMILARITY and fine >= d.MIN_STILL_SIMILARITY and distance <= d.MAX_STILL_HASH_DISTANCE
        return NearDuplicate(first.video, second.video, distance, fine, None) if alike else None
    motion, _ = _slow_search(d._details(left - left.mean(0), d.SIDE), d._details(right - right.mean(0), d.SIDE), [scale])
    alike = coarse >= d.COARSE_SIMILARITY and fine >= d.MIN_SIMILARITY and motion >= d.MIN_MOTION
    return NearDuplicate(first.video, second.video, distance, fine, motion) if alike else None


def _slow_pairs(prints: dict[str, VideoPrint]) -> dict[tuple[str, str], int]:
    """Each print's nearest by hash, one print after the other."""
    pairs = {}
    for own in sorted(prints):
        distances = {other: int((prints[own].hash != prints[other].hash).sum()) for other in sorted(prints) if other != own}
        for other in sorted(distances, key=distances.__getitem__)[: duplicates.NEAREST]:
            if distances[other] <= duplicates.MAX_HASH_DISTANCE:
                pairs[min(own, other), max(own, other)] = distances[other]
    return pairs


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates__are_those_of_the_slow_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random prints around a few clips and stills: unlike, alike, copied with more and more noise, and without any detail."""
    rng = np.random.default_rng(seed)
    prints = {}
    for number in range(45):
        kind, noise = number % 5, 3.0 * (number // 5) + 1
        frames = np.stack(clip(seed + kind, frames=9, size=64)[: 1 if kind == 3 else 9]).astype(np.float32)
        frames = np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8) if kind != 4 else np.full_like(frames, number, np.uint8)
        known = print_video(f"{rng.integers(1000):03d}-{number}", list(frames))
        flips = rng.random(64) < 0.01 * noise
        prints[known.video] = VideoPrint(known.video, known.hash ^ flips, known.frames)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    found = find_near_duplicates(prints)
    pairs = sorted(_slow_pairs(prints).items())
    expected = [_slow_compare(prints[first], prints[second], distance) for (first, second), distance in pairs]
    assert found == [pair for pair in expected if pair is not None] and 3 < len(found) < len(pairs)
    assert {pair.motion is None for pair in found} == {True, False}


@pytest.mark.parametrize("count", [2, 60, 300])
def test_propose__is_the_slow_loop(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(count)
    base = rng.normal(size=64)
    hashes = base + rng.normal(size=(count, 64)) * 0.7 > 0
    hashes[count // 2] = hashes[0]
    monkeypatch.setattr(duplicates, "_BLOCK", 32)
    prints = {f"{row:03d}": VideoPrint("", own, np.zeros(0)) for row, own in enumerate(hashes)}
    wanted = {(int(first), int(second)): distance for (first, second), distance in _slow_pairs(prints).items()}
    assert duplicates._propose(hashes) == wanted


def test_run_split__planted_copy_across_two_patients_ends_in_one_fold(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        label = "ab"[number % 2]
        frames = copy_of(clip(0), 4, 70) if number == 7 else clip(number)
        rows.append(store(tmp_path / "frames" / "main", str(number), f"p{number}", label, frames))
    Manifest(rows).write(tmp_path / "frames" / "main" / "manifest.csv")
    splits, metrics = run_split(three_folds(), tmp_path / "frames", tmp_path / "splits.json", tmp_path / "reports")
    home = {video: fold.fold for fold in splits.folds for video in fold.test}
    assert home[video_id("0")] == home[video_id("7")]
    assert splits.groups[video_id("0")] == splits.groups[video_id("7")]
    assert any(video_id("0") in warning and video_id("7") in warning for warning in splits.warnings)
    assert (metrics["near_duplicate_pairs"], metrics["patients"], metrics["videos"], metrics["frames"]) == (
        1,
        11,
        12,
        144,
    )
    assert Splits.read(tmp_path / "splits.json") == splits
    assert (
        (tmp_path / "reports" / "balance.csv")
        .read_text()
        .startswith("fold,repeat,part,class,patients,videos,frames\n0,0,test,a,")
    )
    picture = (tmp_path / "reports" / "balance.png").read_bytes()
    run_split(three_folds(), tmp_path / "frames", tmp_path / "splits.json", tmp_path / "reports")
    assert (tmp_path / "reports" / "balance.png").read_bytes() == picture


def test_run_split__missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="manifest.csv: not found. Run the extract stage"):
        run_split(three_folds(), tmp_path, tmp_path / "splits.json", tmp_path / "reports")


def test_near_duplicates__known_copies_among_real_lung_clips(shared: Path) -> None:
    """Two recordings occur twice, cropped and encoded differently; clips of the same sessions are no copies."""
    folder = shared / "data" / "pocus" / "videos"
    names = [
        "convex/Pneu_Avi_Video_002.mp4", "convex/Pneu_northumbria_1009_vid1.avi", "linear/Vir_prospective_file1.mp4",
        "linear/label_uncertain/Vir_or_Pneu_prospective_file4.mp4", "convex/Pneu_Avi_Video_003.mp4",
        "convex/Cov_convex_volpecelli_sonographic_v3.mov", "convex/Cov_convex_volpecelli_sonographic_v4.mov",
        "convex/Pneu_northumbria_0409_set2_vid3.avi", "convex/Pneu_northumbria_0409_set2_vid4.avi",
    ]  # fmt: skip
    prints = {}
    for name in names:
        reader = cv2.VideoCapture(str(folder / name))
        frames = []
        while (read := reader.read())[0]:
            frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2GRAY))
        prints[name] = print_video(name, [frames[int((i + 0.5) * len(frames) / 9)] for i in range(9)])
    found = {(pair.first, pair.second) for pair in find_near_duplicates(prints)}
    assert found == {(names[0], names[1]), (names[2], names[3])}
