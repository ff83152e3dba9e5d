"""Extraction killed at random moments, and on a disk that is really full: what is left, and whether the next run heals it.

    python tests/fuzz_extraction.py --kills 20 --disks 12 --seed 0        (or: make fuzz)

A kill may cost the videos in flight only; nothing half-written may be visible in a store; the next run must finish the
rest and give the same bytes as a run that nobody disturbed. The small disks need root on Linux (a tmpfs is mounted).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import sample_media  # noqa: E402

__all__ = ["Trial", "full_disk", "small_disk"]

RUN = """
import sys
from pathlib import Path
from pipeline.cli import run_stage
from pipeline.config import Config
from pipeline.data.extract import extract_source
from pipeline.parameters import DataParams, ExtractParams

def main():
    config = Config(data=DataParams(source=sys.argv[1], pseudonym_key="k"), extract=ExtractParams(workers=2, short_side=120))
    extract_source("main", config, Path("frames"), Path("report"))

if __name__ == "__main__":
    sys.exit(run_stage(main))
"""


class Trial:
    """Videos, and extractions of them in folders of their own."""

    def __init__(self, folder: Path, videos: int = 12, frames: int = 40) -> None:
        self.folder, self.videos = folder, videos
        for seed in range(videos):
            sample_media.write_video(folder / "clips" / f"{seed}.avi", frames, size=(320, 240), seed=seed)
        (folder / "run.py").write_text(RUN)
        started = time.perf_counter()
        assert self.run(folder / "undisturbed").returncode == 0
        self.seconds = time.perf_counter() - started
        self.expected = store_bytes(folder / "undisturbed")

    def start(self, project: Path) -> subprocess.Popen[str]:
        """Start an extraction in a project folder."""
        project.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "DVC_ROOT"}
        environment["PYTHONPATH"] = str(HERE.parent)
        command = [sys.executable, str(self.folder / "run.py"), str(self.folder / "clips")]
        return subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self, project: Path) -> subprocess.CompletedProcess[str]:
        """An extraction to its end."""
        process = self.start(project)
        _, said = process.communicate(timeout=300)
        return subprocess.CompletedProcess([], process.returncode, "", said)

    def kill(self, project: Path, finished: int, delay: float) -> int:
        """Kill the first process of an extraction `delay` seconds after it has finished so many videos; how many there are then.

        At most the videos in flight may be lost: what was finished before stays, and all that is visible is whole.
        """
        process = self.start(project)
        while process.poll() is None and len(list(project.glob(".scratch/extract/*/*.json"))) < finished:
            time.sleep(0.002)
        time.sleep(delay)
        before = len(list(project.glob(".scratch/extract/*/*.json")))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        wait_for_workers(project)
        left = check_left(project, self.expected)
        assert left >= before, f"{before} videos were finished, {left} are left"
        return left

    def heal(self, project: Path) -> None:
        """The next run finishes the rest and gives the same bytes; nothing that was finished is done again."""
        before = {path: path.stat().st_mtime_ns for path in project.glob(".scratch/extract/*/*.json")}
        done = self.run(project)
        assert done.returncode == 0, done.stderr
        after = store_bytes(project)
        differing = sorted(name for name in {*after, *self.expected} if after.get(name) != self.expected.get(name))
        assert not differing, f"the healed store differs from an undisturbed one in {differing}"
        assert {path: path.stat().st_mtime_ns for path in before} == before, "finished videos were done again"


def store_bytes(project: Path) -> dict[str, bytes]:
    """Every file of the frame store by name."""
    return {path.name: path.read_bytes() for path in sorted((project / "frames").iterdir())}


def wait_for_workers(project: Path) -> None:
    """Until the workers have followed their parent: nothing in the scratch folder grows any more."""
    state = None
    for _ in range(60):
        time.sleep(0.4)
        now = sorted((path.name, path.stat().st_size) for path in project.glob(".scratch/extract/*/*"))
        if now == state:
            return
        state = now


def check_left(project: Path, expected: dict[str, bytes]) -> int:
    """Finished videos in what a disturbed run has left. Every visible tar is whole, and a manifest stands only over all its files."""
    for tar in [*project.glob(".scratch/extract/*/*.tar"), *project.glob("frames/*.tar")]:
        assert tar.read_bytes() == expected[tar.name], f"half-written: {tar}"
        with tarfile.open(tar) as archive:
            assert archive.getnames()
        assert tar.with_suffix(".idx.npy").is_file(), f"a tar without its index: {tar}"
    if (project / "frames/manifest.csv").is_file():
        assert store_bytes(project) == expected, "a manifest over an incomplete store"
    return len(list(project.glob(".scratch/extract/*/*.json")))


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """`folder` as a file system of this size; False where this process may not mount one."""
    folder.mkdir()
    options = f"size={kilobytes}k,mode=755"
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(trial: Trial, project: Path, kilobytes: int) -> str | None:
    """One extraction on a disk of this size, then with more room. What the first said, "" if it had room; None without such a disk."""
    with small_disk(project, kilobytes) as mounted:
        if not mounted:
            return None
        done = trial.run(project)
        if done.returncode == 0:
            return ""
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert "the disk is full" in errors[0] and "start again" in errors[0], errors[0]
        check_left(project, trial.expected)
        parts = [path.name for path in project.rglob("*.part")]
        assert not parts, f"halves were left: {parts}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(project)], check=True)
        trial.heal(project)
        return errors[0]


def main() -> None:
    """Run all trials; any that fails ends the program with its reason."""
    parser = argparse.ArgumentParser(description="Extraction, killed and without room.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--disks", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(prefix="sonoscope-kill-") as name:
        folder = Path(name)
        trial = Trial(folder, videos=24, frames=60)
        print(f"undisturbed: {trial.videos} videos in {trial.seconds:.1f} s")
        for number in range(options.kills):
            target, delay = int(rng.integers(trial.videos + 1)), float(rng.uniform(0, 0.15))
            finished = trial.kill(folder / f"kill{number}", target, delay)
            trial.heal(folder / f"kill{number}")
            print(f"killed {delay:.2f} s behind video {target}: {finished} of {trial.videos} finished; the next run did the rest, bytes equal", flush=True)
        whole = sum(len(data) for data in trial.expected.values()) // 1024
        for number, kilobytes in enumerate(rng.integers(20, int(1.3 * whole) + 200, options.disks).tolist()):
            said = full_disk(trial, folder / f"disk{number}", kilobytes)
            if said is None:
                print("small disks: left out, a tmpfs cannot be mounted here")
                break
            print(f"disk of {kilobytes} KiB (store {whole}): {said.replace(str(folder), '') or 'room enough'}", flush=True)


if __name__ == "__main__":
    main()
