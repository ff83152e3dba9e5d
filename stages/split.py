"""Divide the labelled videos into patient-grouped outer and inner folds; nothing of one patient lies on two sides.

    python stages/split.py        (parameters: data and split of params.yaml)

Reads data/frames/*/, writes data/splits.json and reports/split/.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A queued experiment runs in a copy of the project: its own code comes before the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import run_stage  # noqa: E402
from pipeline.config import fingerprint, load_config  # noqa: E402
from pipeline.data.split_report import describe_folds, describe_warnings, run_split  # noqa: E402
from pipeline.tracking import open_tracker  # noqa: E402


def main() -> None:
    config = load_config()
    output, reports = Path("data/splits.json"), Path("reports/split")
    with open_tracker(config, "split", fingerprint=fingerprint(config.data, config.split)) as tracker:
        tracker.log_params({"split": config.split.model_dump(mode="json", exclude={"file"})})
        splits, metrics = run_split(config, Path("data/frames"), output, reports)
        tracker.log_metrics({key: value for key, value in metrics.items() if isinstance(value, int)})
        tracker.log_dataset("main", splits.manifest_digest, metrics["videos"], "split")
        for path in (output, reports / "balance.csv", *reports.glob("balance.png")):
            tracker.log_artifact(path, "split")
        tracker.write_sidecar(Path("reports/runs/split.json"))
    if splits.warnings:
        print(describe_warnings(splits, Path("data/frames/main")), file=sys.stderr)
    print(describe_folds(splits, metrics))
    print(
        f"split: {splits.words} in {output}, {metrics['warnings']} warnings; balance in "
        f"{reports / 'balance.png'}"
    )


if __name__ == "__main__":
    sys.exit(run_stage(main))
