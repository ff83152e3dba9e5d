"""Before the first stage: check params.yaml and everything it names, all problems at once.

    python stages/check.py

Reads params.yaml, writes reports/check.json (always the same content, so a changed parameter re-runs only what uses it).
"""

from __future__ import annotations

import sys
from pathlib import Path

# A queued experiment runs in a copy of the project: its own code comes before the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import run_stage  # noqa: E402
from pipeline.config import load_config  # noqa: E402
from pipeline.files import write_json  # noqa: E402
from pipeline.preflight import check_named_files  # noqa: E402


def main() -> None:
    """Check, or end with a list of problems."""
    check_named_files(load_config())
    write_json(Path("reports/check.json"), {"valid": True})


if __name__ == "__main__":
    sys.exit(run_stage(main))
