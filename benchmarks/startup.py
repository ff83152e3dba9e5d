"""Benchmarks of start-up: what a command costs before it does anything, each in a fresh interpreter."""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

STAGES = ("phantom", "extract", "split", "pretrain", "finetune", "evaluate")


def startup(repeats: int) -> None:
    """Imports of the commands and stages, and `dvc repro` when nothing has changed."""
    root = Path(__file__).resolve().parents[1]
    statements = {
        "interpreter alone": "pass",
        "import torch": "import torch",
        "import torchvision": "import torchvision",
        "pipeline.config": "import pipeline.config",
        "pipeline.cli": "import pipeline.cli",
        "sonoscope check": "from pipeline.cli import main; assert main(['check']) == 0",
    }
    for stage in STAGES:
        # Not as __main__: everything is imported and nothing runs.
        run = f"import runpy; runpy.run_path('stages/{stage}.py', run_name='stage')"
        statements[f"stages/{stage}.py, imports"] = run
    # Asked first, which also fills the page cache and writes byte code.
    heavy = {name: _loads_torch(statement, root) for name, statement in statements.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in statements}
    for _ in range(repeats):
        for name, statement in statements.items():
            taken[name].append(_spent([sys.executable, "-c", statement], root))
    print("\n### Start-up, warm, fresh interpreter each\n")
    print("| what | wall ms, median | range | CPU ms, median | imports torch |\n|---|---:|---|---:|---|")
    for name, runs in taken.items():
        wall, cpu = [1000 * run[0] for run in runs], [1000 * run[1] for run in runs]
        print(
            f"| {name} | {statistics.median(wall):.0f} | {min(wall):.0f} to {max(wall):.0f} "
            f"| {statistics.median(cpu):.0f} | {heavy[name]} |", flush=True,
        )
    _nothing_to_do(root, repeats)


def _spent(words: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command; CalledProcessError if it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _loads_torch(statement: str, folder: Path) -> str:
    asked = f"{statement}\nimport sys; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    answer = subprocess.check_output([sys.executable, "-c", asked], cwd=folder, text=True)
    return {"True True": "torch, torchvision", "True False": "torch"}.get(answer.splitlines()[-1], "no")


def _nothing_to_do(root: Path, repeats: int) -> None:
    """Time `dvc repro` only where `dvc status` says that it would run nothing."""
    beside = Path(sys.executable).with_name("dvc")
    dvc = str(beside) if beside.exists() else shutil.which("dvc")
    if dvc is None or not (root / ".dvc").is_dir():
        print("\n`dvc repro` not measured: no DVC repository here")
    elif subprocess.run([dvc, "status", "--quiet"], cwd=root, capture_output=True).returncode:
        print("\n`dvc repro` not measured: `dvc status` says that stages would run; run `dvc repro` first")
    else:
        runs = [_spent([dvc, "repro"], root) for _ in range(repeats)]
        wall = [run[0] for run in runs]
        print(
            f"\n`dvc repro` with nothing to do: {statistics.median(wall):.2f} s ({min(wall):.2f} to {max(wall):.2f}), "
            f"CPU {statistics.median(run[1] for run in runs):.2f} s"
        )
