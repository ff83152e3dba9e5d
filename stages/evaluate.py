"""Judge the fine-tuned models of all folds and write metrics, tables, plots and the report.

    python stages/evaluate.py        (parameters: evaluate, finetune and split.folds of params.yaml)

Reads models/finetuned/*, data/splits.json and data/frames/main; writes reports/evaluate/.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A queued experiment runs in a copy of the project: its own code comes before the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import run_stage  # noqa: E402
from pipeline.config import fingerprint, load_config  # noqa: E402
from pipeline.data.splits import Splits  # noqa: E402
from pipeline.data.store import FrameStore  # noqa: E402
from pipeline.evaluation.evaluate import evaluate, headline_metrics, log_results, stage_records  # noqa: E402
from pipeline.evaluation.records import log_folds  # noqa: E402
from pipeline.tracking import link_skipped, open_tracker  # noqa: E402


def main() -> None:
    config = load_config()
    splits = Splits.read(Path("data/splits.json"))
    store = FrameStore(Path("data/frames/main"))
    folders = [card.parent for card in Path("models/finetuned").glob("*/card.json")]
    output = Path("reports/evaluate")
    with open_tracker(config, "evaluate", fingerprint=fingerprint(config.evaluate, splits.manifest_digest)) as tracker:
        stages = link_skipped(tracker, only=stage_records(config))
        metrics = evaluate(config, folders, splits, store, output, stages)
        log_results(tracker, metrics, output)
        tracker.write_sidecar(Path("reports/runs/evaluate.json"), metrics=headline_metrics(metrics))
        log_folds(config, metrics)
    print(f"evaluate: {metrics['headline']}. Report: {output / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_stage(main))
