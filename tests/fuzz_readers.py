"""Damaged and hostile files for every reader: no crash, no hang, no unbounded memory, every failure named in one sentence.

    python tests/fuzz_readers.py --cases 2000 --seed 0           (or: make fuzz CASES=20000 SEED=3)
    python tests/fuzz_readers.py --only 1234 --seed 0 --keep DIR  (one case again; its file is left in DIR)

A case is a pure function of its number and the seed. Each runs in a process with the limits of an extraction worker and
must end within 20 s and 2 GiB, with frames or with a PipelineError that names the file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import fuzz_folders  # noqa: E402
import fuzz_seeds  # noqa: E402
import sample_dicom  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline.data.extract import Task, extract_one  # noqa: E402
from pipeline.data.labels import read_labelled_media  # noqa: E402
from pipeline.data.limits import limit_process  # noqa: E402
from pipeline.data.manifest import Manifest, VideoRow  # noqa: E402
from pipeline.data.store import FrameStore  # noqa: E402
from pipeline.errors import LONGEST_LINE, PipelineError  # noqa: E402
from pipeline.parameters import DataParams, ExtractParams  # noqa: E402

__all__ = ["Outcome", "fuzz", "run_case"]

SECONDS = 20
PEAK_MIB = 2048
LONGEST = 6000
"""Characters a case may print."""
LINES = 60
"""Of one error; several problems are listed in one."""
PARAMS = (
    ExtractParams(), ExtractParams(color="rgb"), ExtractParams(max_frames=2), ExtractParams(frames_per_second=3, short_side=16),
    ExtractParams(max_pixels=2000),
)


@dataclass
class Outcome:
    """What became of one case: `read`, `refused` (with a good error), `lost` (the decoding process ended, as the pool allows), or `wrong`."""

    case: int
    what: str
    end: str
    detail: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0


# --- one case --------------------------------------------------------------------------------------------------------


def _complaint(text: str, names: list[str], hidden: list[str]) -> str:
    """What is wrong with an error's text; empty if nothing."""
    for secret in (*sample_dicom.SECRETS, "Traceback", 'File "', *hidden):
        if secret in text:
            return f"holds {secret!r}"
    if not any(name in text for name in names):
        return "does not name the file"
    lines = text.replace(names[0], "").split("\n")
    if len(lines) > LINES or max(map(len, lines)) > LONGEST_LINE + 10:
        return f"has {len(text)} characters"
    if any(ord(letter) < 32 and letter not in "\n\t" or ord(letter) == 127 for letter in text):
        return "holds control characters"
    return ""


def _extract_folder(root: Path, work: Path, case: int, note: Callable[[str], None]) -> Iterator[str]:
    """Everything in a source folder through the extraction; yields what went wrong, and nothing for frames or good errors."""
    note("survey")
    try:
        found = read_labelled_media("main", DataParams(source=str(root)))
    except PipelineError as error:
        note("refused")
        complaint = _complaint(str(error), [str(root)], [])
        yield from [f"{complaint}: {error}"] if complaint else []
        return
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    for item in found.media:
        note("extract")
        result = extract_one(Task(item, PARAMS[case % len(PARAMS)], found.labels[item.path].fps, scratch))
        if result.fatal:
            yield f"stops the whole run: {result.fatal}"
        elif result.reason:
            note("refused")
            complaint = _complaint(f"{item.path}: {result.reason}", [item.path], [str(root)])
            if "\n" in result.reason:
                complaint = "has several lines"
            yield from [f"{complaint}: {result.reason}"] if complaint else []
        else:
            facts = result.facts
            row = VideoRow(
                video=result.video, source="main", path=item.path, sha256=result.sha256, patient="", label="", kind=item.kind, frames=facts.frames,
                frames_decoded=facts.frames_decoded, frames_claimed=facts.frames_claimed, fps=facts.fps, fps_source=facts.fps_source,
                width=facts.width, height=facts.height, stored_width=facts.stored_width, stored_height=facts.stored_height,
                channels=facts.channels, bytes=result.bytes,
            )
            Manifest([row]).write(scratch / "manifest.csv")
            frame = FrameStore(scratch).frame(result.video, facts.frames - 1)
            if frame.shape[:2] != (facts.stored_height, facts.stored_width):
                yield f"stored {frame.shape} where the facts say {facts}"
            complaint = _complaint("; ".join([item.path, *facts.warnings, *result.notes]), [item.path], [str(root)])
            yield from [f"warning {complaint}: {facts.warnings}"] if complaint else []


def _read_other(kind: str, path: Path, work: Path) -> None:
    """The reader of one kind of file that is not media."""
    if kind == "manifest":
        Manifest.read(path)
    elif kind == "store":
        for seed in SEEDS:
            if seed.kind == "store" and seed.name != path.name:
                (work / seed.name).write_bytes(seed.data)
        store = FrameStore(work)
        for row in store.manifest.rows:
            for index in range(min(row.frames, 5)):
                store.frame(row.video, index)
    elif kind == "splits":
        from pipeline.data.splits import Splits

        Splits.read(path)
    elif kind == "given":
        from pipeline.data.given_splits import read_given_split

        read_given_split(path, 2).resolve(Manifest([]), {}, {}, "key")
    elif kind == "annotation":
        from pipeline.data.frame_labels import read_frame_labels

        read_frame_labels(path).at(range(100))
    elif kind == "weights":
        from pipeline.checkpoint import read_state_dict

        read_state_dict(path)
    else:
        from pipeline.config import load_config

        load_config(path)


def run_case(case: int, seed: int, work: Path, note: Callable[[str], None] = lambda text: None) -> tuple[str, list[str]]:
    """Run one case in an empty folder: (what was done, what went wrong). Exceptions that are no PipelineError pass through."""
    if case >= len(SEEDS) and case % 25 == 0 or len(SEEDS) <= case < len(SEEDS) + len(fuzz_folders.CASES):
        name = fuzz_folders.build(work / "source", case - len(SEEDS), seed, SEEDS)
        with fuzz_folders.as_nobody(name.startswith("closed")):
            return f"folder: {name}", list(_extract_folder(work / "source", work, case, note))
    damaged, done = fuzz_seeds.damage(SEEDS, case, seed)
    source = work / "source"
    source.mkdir()
    path = source / damaged.name
    path.write_bytes(damaged.data)
    if damaged.kind in ("media", "labels"):
        return done, list(_extract_folder(source, work, case, note))
    try:
        note(damaged.kind)
        _read_other(damaged.kind, path, source)
    except PipelineError as error:
        note("refused")
        names = [path.name, "split:", "given", "manifest.csv", str(source)] if damaged.kind in ("splits", "given", "store") else [path.name]
        complaint = _complaint(str(error), names, [])
        return done, [f"{complaint}: {str(error)[:300]}"] if complaint else []
    return done, []


# --- processes -------------------------------------------------------------------------------------------------------

SEEDS: list[fuzz_seeds.Seed] = []


def _peak_mib() -> float:
    """Largest resident memory since the last call, in MiB; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        Path("/proc/self/clear_refs").write_text("5")
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
    except OSError:
        return 0.0


def _printed(log: Path) -> str:
    text = log.read_text(errors="replace")
    os.truncate(log, 0)
    return text


def _work(pipe: Connection, folder: Path, seed: int) -> None:
    """A worker: cases by number until the pipe closes. Everything it and its libraries print goes to a file that is looked into."""
    # Imported now, so that no case is charged for them.
    import pipeline.checkpoint
    import pipeline.config
    import pipeline.data.splits  # noqa: F401

    Image.init()
    "".encode("utf-8-sig")

    os.umask(0)

    SEEDS[:] = fuzz_seeds.load_seeds(folder / "seeds")
    log, work = folder / f"log{os.getpid()}", folder / f"work{os.getpid()}"
    output = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    own_tmp = folder / f"tmp{os.getpid()}"
    own_tmp.mkdir(mode=0o777)
    tempfile.tempdir = str(own_tmp)
    limit_process(stall_seconds=SECONDS - 5)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o777)
        os.chdir(work)
        before, notes = set(os.listdir(folder)), []

        def note(text: str) -> None:
            notes.append(text)
            pipe.send(text)

        _peak_mib()
        started = time.perf_counter()
        try:
            done, wrong = run_case(case, seed, work, note)
        except Exception:
            done, wrong = "", [traceback.format_exc(limit=-4)]
        seconds, peak = time.perf_counter() - started, _peak_mib()
        if peak > PEAK_MIB:
            wrong.append(f"took {peak:.0f} MiB")
        wrong += [f"left {name} behind" for name in os.listdir(own_tmp)]
        shutil.rmtree(own_tmp)
        own_tmp.mkdir()
        new = {name for name in set(os.listdir(folder)) - before if not name.startswith(("log", "work", "tmp"))}
        wrong += [f"wrote {sorted(new)} outside its folder"] if new else []
        printed = _printed(log)
        if any(word in printed for word in (*sample_dicom.SECRETS, "Traceback")) or len(printed) > LONGEST:
            wrong.append(f"printed: {printed[:500]}")
        pipe.send(Outcome(case, done, "wrong" if wrong else "refused" if "refused" in notes else "read", "; ".join(wrong), seconds, peak))


@dataclass
class _Worker:
    process: multiprocessing.Process
    pipe: Connection
    case: int = -1
    doing: str = ""
    deadline: float = 0.0


def _start(folder: Path, seed: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, folder, seed), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def fuzz(cases: list[int], seed: int, workers: int, folder: Path) -> Iterator[Outcome]:
    """Run cases by number in `workers` processes, in a scratch folder; outcomes in the order they come."""
    fuzz_seeds.save_seeds(folder / "seeds", fuzz_seeds.make_seeds(folder / "made"))
    waiting, team = list(reversed(cases)), [_start(folder, seed) for _ in range(workers)]
    try:
        while waiting or any(worker.case >= 0 for worker in team):
            for worker in team:
                if worker.case < 0 and waiting:
                    worker.case, worker.doing, worker.deadline = waiting.pop(), "start", time.monotonic() + 3 * SECONDS
                    worker.pipe.send(worker.case)
            busy = [worker for worker in team if worker.case >= 0]
            ready = wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                outcome = _hear(worker) if worker.pipe in ready else None
                if outcome is None and time.monotonic() > worker.deadline:
                    worker.process.kill()
                    outcome = Outcome(worker.case, "", "wrong", f"hangs in: {worker.doing}")
                if outcome is not None:
                    yield outcome
                    worker.case = -1
                    if not worker.process.is_alive() or outcome.detail.startswith("hangs"):
                        worker.process.join()
                        team[team.index(worker)] = _start(folder, seed)
    finally:
        for worker in team:
            worker.process.kill()
            worker.process.join()


def _hear(worker: _Worker) -> Outcome | None:
    """The outcome, once there is one. A death while decoding is what the pool of the extraction is made for; any other is a fault."""
    try:
        said = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        end = "lost" if worker.doing == "extract" else "wrong"
        return Outcome(worker.case, "", end, f"process ended with {worker.process.exitcode} in: {worker.doing}")
    if isinstance(said, Outcome):
        return said
    if worker.doing == "start":
        worker.deadline = time.monotonic() + SECONDS
    worker.doing = said
    return None


def main() -> int:
    """Run the cases and print what happened; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description="Fuzz every reader.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="these cases only")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--keep", type=Path, help="with --only: run in this process and leave the files there")
    options = parser.parse_args()
    if options.only and options.keep:
        options.keep.mkdir(parents=True)
        SEEDS[:] = fuzz_seeds.make_seeds(options.keep / "made")
        for case in options.only:
            (options.keep / str(case)).mkdir()
            print(case, *run_case(case, options.seed, options.keep / str(case)))
        return 0
    cases, started, ends, wrong = options.only or list(range(options.first, options.first + options.cases)), time.time(), Counter(), 0
    slowest = largest = None
    with tempfile.TemporaryDirectory(prefix="sonoscope-fuzz-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o777)
        for number, outcome in enumerate(fuzz(cases, options.seed, options.workers, Path(name)), start=1):
            ends[outcome.end] += 1
            slowest = max(slowest or outcome, outcome, key=lambda item: item.seconds)
            largest = max(largest or outcome, outcome, key=lambda item: item.peak_mib)
            if outcome.end in ("wrong", "lost"):
                wrong += outcome.end == "wrong"
                print(f"{outcome.end}: case {outcome.case} ({outcome.what}): {outcome.detail}", flush=True)
            if number % 500 == 0:
                print(f"{number} of {len(cases)} cases, {time.time() - started:.0f} s", flush=True)
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{len(cases)} cases, seed {options.seed}, {time.time() - started:.0f} s: {told}")
    print(f"slowest: case {slowest.case}, {slowest.seconds:.1f} s ({slowest.what}); largest: case {largest.case}, {largest.peak_mib:.0f} MiB ({largest.what})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
