"""Compare the public functions with golden arrays of the published programs.

    python tests/check_goldens.py --root DIR

DIR, or folders below it, hold `index.json` and arrays in the format of one of the suites (`goldens_<method>.py`, which say the
tolerances). Prints a line per file and ends with `N passed, M failed`; exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType

import goldens_hico
import goldens_msn
import goldens_ucl
import goldens_uscl
import torch
from golden_tools import Mismatch

SUITES: tuple[ModuleType, ...] = (goldens_ucl, goldens_hico, goldens_uscl, goldens_msn)


def check_folder(folder: Path, suite: ModuleType) -> tuple[int, int]:
    """Check all cases of one folder; returns (passed, failed)."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    passed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for file_name, case, check in suite.cases(folder, index):
        total[file_name] += 1
        try:
            check()
            passed[file_name] += 1
        except Exception as error:
            text = str(error) if isinstance(error, Mismatch) else traceback.format_exc(limit=3)
            print(f"  {file_name} {case}: {text}")
    for file_name, count in total.items():
        print(f"  {file_name}: {passed[file_name]} of {count} cases reproduced")
    return passed.total(), total.total() - passed.total()


def find_folders(root: Path) -> list[tuple[Path, ModuleType | None]]:
    """Golden folders at or below `root`, each with the suite that knows its format."""
    found = []
    for path in sorted([root / "index.json", *root.glob("*/index.json")]):
        if path.is_file():
            index = json.loads(path.read_text(encoding="utf-8"))
            found.append((path.parent, next((suite for suite in SUITES if suite.recognises(index)), None)))
    return found


def main() -> int:
    """Check every folder below --root."""
    parser = argparse.ArgumentParser(description="Compare public functions with golden arrays.")
    parser.add_argument("--root", type=Path, required=True, help="a folder with index.json, or one that holds such folders")
    root = parser.parse_args().root
    torch.set_num_threads(1)
    passed = failed = 0
    folders = find_folders(root)
    for folder, suite in folders:
        if suite is None:
            print(f"{folder.name}: not in the format of any suite, not checked")
            continue
        print(f"{folder.name}:")
        good, bad = check_folder(folder, suite)
        passed, failed = passed + good, failed + bad
    if not any(suite for _, suite in folders):
        print(f"{root}: no golden folder found (expected index.json here or one level below)")
        failed += 1
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
