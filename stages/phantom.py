"""Write the embedded default data: phantom lung-ultrasound videos and their labels.csv into data/phantom.

    python stages/phantom.py        (parameters: data.phantom of params.yaml)
"""

from __future__ import annotations

import sys
from pathlib import Path

# A queued experiment runs in a copy of the project: its own code comes before the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import run_stage  # noqa: E402
from pipeline.config import load_config  # noqa: E402
from pipeline.data.synthetic import write_phantoms  # noqa: E402


def main() -> None:
    folder = Path("data/phantom")
    rows = write_phantoms(folder, load_config().data.phantom)
    patients, warnings = len({row.patient for row in rows}), sum(bool(row.warning) for row in rows)
    print(f"phantom: {len(rows)} clips of {patients} patients in {folder}, {warnings} warnings")


if __name__ == "__main__":
    sys.exit(run_stage(main))
