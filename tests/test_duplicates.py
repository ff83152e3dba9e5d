"""Planted copies of a clip are found, relatives are left apart, and the split stage keeps copies in one fold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.config import Config
from pipeline.data.duplicates import find_near_duplicates, print_video
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
