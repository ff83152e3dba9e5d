"""What the frame store costs DVC, against one file a frame; and how fast single frames are read from it.

    python benchmarks/store.py [--videos 160] [--frames 100] [--large-videos 5000] [--large-frames 200] [--folder DIR]

Makes a store of 160 x 100 frames in both layouts, and one of 5000 x 200 frames as tars only, in throw-away DVC projects
(2 GB of disk; `--large-videos 0` leaves the large one out). Prints Markdown tables: seconds, files and megabytes that DVC
hashed. One file a frame is not made at the large size: its column there is the small one times the ratio of frames, without the
start-up of DVC (`dvc root`), which is counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from pipeline.cli import run_stage
from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.store import FrameStore, write_video

# DVC as it is, with a count of what it hashes.
COUNTING = """
import atexit, json, os, sys
import dvc_data.hashfile.hash as module
real, taken = module._hash_file, [0, 0]
def counted(path, fs, *others, **named):
    if os.path.isfile(path):
        taken[0] += 1
        taken[1] += os.path.getsize(path)
    return real(path, fs, *others, **named)
module._hash_file = counted
atexit.register(lambda: open(os.environ["COUNTS"], "w").write(json.dumps(taken)))
from dvc.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Cost:
    """Of one DVC command: wall seconds, and files and bytes it hashed."""

    seconds: float
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.files} files, {self.bytes / 1e6:.1f} MB"


class Project:
    """A throw-away repository with the project's own DVC settings, and `frames` as what DVC tracks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.frames = folder, folder / "frames"
        self._environment = {**os.environ, "DVC_SITE_CACHE_DIR": str(folder / "site"), "COUNTS": str(folder / "counts")}
        folder.mkdir(parents=True)
        for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
            subprocess.run(command, cwd=folder, env=self._environment, check=True)
        shutil.copyfile(Path(__file__).resolve().parents[1] / ".dvc" / "config", folder / ".dvc" / "config")

    def dvc(self, *command: str) -> Cost:
        """Run one DVC command; a failure ends the benchmark."""
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *command, "--quiet"], cwd=self.folder, env=self._environment, stdout=subprocess.DEVNULL, check=False
        )
        # `status --quiet` ends with 1 where something has changed.
        if done.returncode and command[0] != "status":
            raise SystemExit(f"dvc {' '.join(command)} ended with {done.returncode}")
        files, size = json.loads((self.folder / "counts").read_text())
        return Cost(time.perf_counter() - started, files, size)

    def forget(self) -> None:
        """Lose DVC's memory of what it has hashed: another machine, or a cleaned temporary folder."""
        shutil.rmtree(self.folder / "site", ignore_errors=True)


def _jpegs(side: int) -> list[bytes]:
    """Ten small grey pictures as JPEG."""
    rng = np.random.default_rng(0)
    pictures = [cv2.GaussianBlur(rng.integers(0, 255, (side, side), np.uint8), (5, 5), 2) for _ in range(10)]
    return [cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for picture in pictures]


def _frame(jpegs: list[bytes], video: int, frame: int) -> bytes:
    """A frame no other video has: decoders ignore what follows the end mark."""
    return jpegs[frame % len(jpegs)] + video.to_bytes(4, "little") + frame.to_bytes(4, "little")


def _add_tar(folder: Path, jpegs: list[bytes], video: int, frames: int, side: int) -> VideoRow:
    name = f"{video + 1:016x}"
    write_video(folder, name, (_frame(jpegs, video, frame) for frame in range(frames)))
    return VideoRow(
        video=name, source="main", path=f"{video:06d}.mp4", sha256=f"{video + 1:064x}", patient="", label="", kind="video", frames=frames,
        frames_decoded=frames, frames_claimed=frames, fps=25.0, fps_source="container", width=side, height=side, stored_width=side,
        stored_height=side, channels=1, bytes=(folder / f"{name}.tar").stat().st_size,
    )


def _add_files(folder: Path, jpegs: list[bytes], video: int, frames: int) -> None:
    target = folder / f"{video + 1:016x}"
    target.mkdir()
    for frame in range(frames):
        (target / f"{frame:05d}.jpg").write_bytes(_frame(jpegs, video, frame))


def _link_all(source: Path, target: Path) -> None:
    """What the extract stage does after DVC has emptied its output: every finished file is linked again."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)


def _costs(project: Project, scratch: Path, add_one: Callable[[Path], None]) -> dict[str, Cost]:
    """The life of a store of which `scratch` holds the files; `add_one` puts one more video there."""
    costs = {}
    _link_all(scratch, project.frames)
    costs["first commit (`dvc add`)"] = project.dvc("add", "frames")
    costs["`dvc status`, warm"] = project.dvc("status")
    project.forget()
    costs["`dvc status`, nothing remembered"] = project.dvc("status")
    add_one(scratch)
    _link_all(scratch, project.frames)
    costs["commit after one more video"] = project.dvc("add", "frames")
    costs["commit with nothing changed"] = project.dvc("add", "frames")
    shutil.rmtree(project.frames)
    costs["`dvc checkout`"] = project.dvc("checkout")
    return costs


def _tar_store(folder: Path, videos: int, frames: int, side: int) -> tuple[Path, Callable[[Path], None]]:
    """A store of tars with its manifest, and what adds one more video to it."""
    jpegs = _jpegs(side)
    rows = [_add_tar(folder, jpegs, video, frames, side) for video in range(videos)]
    Manifest(rows).write(folder / "manifest.csv")

    def add_one(place: Path) -> None:
        rows.append(_add_tar(place, jpegs, videos, frames, side))
        Manifest(rows).write(place / "manifest.csv")

    return folder, add_one


def _file_store(folder: Path, videos: int, frames: int, side: int) -> tuple[Path, Callable[[Path], None]]:
    """The same frames, one file each."""
    jpegs = _jpegs(side)
    folder.mkdir(parents=True)
    for video in range(videos):
        _add_files(folder, jpegs, video, frames)
    return folder, lambda place: _add_files(place, jpegs, videos, frames)


def _read_rate(read: Callable[[int, int], object], videos: int, frames: int, count: int = 4000) -> float:
    """Frames a second of one process, at random places."""
    rng = np.random.default_rng(1)
    places = list(zip(rng.integers(videos, size=count).tolist(), rng.integers(frames, size=count).tolist(), strict=True))
    started = time.perf_counter()
    for video, frame in places:
        read(video, frame)
    return count / (time.perf_counter() - started)


def _store_rates(folder: Path, videos: int, frames: int) -> tuple[float, float]:
    """Seconds to open a store, and frames a second from it."""
    started = time.perf_counter()
    store = FrameStore(folder)
    opened = time.perf_counter() - started
    names = [row.video for row in store.manifest.rows]
    return opened, _read_rate(lambda video, frame: store.frame(names[video], frame), videos, frames)


def _print(title: str, tars: dict[str, Cost], files: dict[str, Cost], note: str) -> None:
    print(f"\n### {title}\n\n| | tar a video | {note} | ratio of seconds |\n|---|---:|---:|---:|")
    for name, cost in tars.items():
        print(f"| {name} | {cost} | {files[name]} | {files[name].seconds / cost.seconds:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="The frame store and DVC, at scale.")
    parser.add_argument("--videos", type=int, default=160)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--side", type=int, default=64, help="pixels of a frame; the large store has 16")
    parser.add_argument("--large-videos", type=int, default=5000)
    parser.add_argument("--large-frames", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the throw-away projects are made; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sonoscope-store-", dir=options.folder) as name:
        base, size = Path(name), (options.videos, options.frames)
        _, add_tar = _tar_store(base / "tars", *size, options.side)
        _, add_files = _file_store(base / "files", *size, options.side)
        opened, rate = _store_rates(base / "tars", *size)
        file_rate = _read_rate(lambda v, f: cv2.imread(str(base / "files" / f"{v + 1:016x}" / f"{f:05d}.jpg"), cv2.IMREAD_GRAYSCALE), *size)
        tars = _costs(Project(base / "a"), base / "tars", add_tar)
        project = Project(base / "b")
        files = _costs(project, base / "files", add_files)
        total = size[0] * size[1]
        _print(f"{total} frames in {size[0]} videos", tars, files, "file a frame")
        print(f"\nRandom frames, one process: tar {rate:.0f}/s (opening the store {1000 * opened:.0f} ms), one file each {file_rate:.0f}/s")
        if options.large_videos:
            large = (options.large_videos, options.large_frames)
            factor = large[0] * large[1] / total
            start = project.dvc("root").seconds
            scaled = {
                key: replace(
                    cost, seconds=start + max(0.0, cost.seconds - start) * factor, files=round(cost.files * factor), bytes=round(cost.bytes * factor)
                )
                for key, cost in files.items()
            }
            _, add_tar = _tar_store(base / "large", *large, 16)
            opened, rate = _store_rates(base / "large", *large)
            _print(f"{large[0] * large[1]} frames in {large[0]} videos", _costs(Project(base / "c"), base / "large", add_tar), scaled,
                   f"file a frame (not made: the table above times {factor:.1f})")
            print(f"\nRandom frames, one process: {rate:.0f}/s (opening the store {1000 * opened:.0f} ms)")
    print("\nload average at the end: " + ", ".join(f"{value:.1f}" for value in os.getloadavg()))


if __name__ == "__main__":
    sys.exit(run_stage(main))
