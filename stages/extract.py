"""Turn the videos, stills and frame folders of one source into a frame store.

    python stages/extract.py [--source main]        (parameters: data and extract of params.yaml)

Writes data/frames/<source>/ and reports/extract/ (for an extra source: reports/extract-<source>/).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A queued experiment runs in a copy of the project: its own code comes before the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import run_stage  # noqa: E402
from pipeline.config import load_config  # noqa: E402
from pipeline.data.extract import extract_source, extraction_fingerprint  # noqa: E402
from pipeline.data.manifest import Manifest  # noqa: E402
from pipeline.tracking import open_tracker  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Extract one source into data/frames/<source>.")
    parser.add_argument("--source", default="main", help="main (data.source) or a key of data.extra_sources")
    source, config = parser.parse_args().source, load_config()
    item, name = (None, "extract") if source == "main" else (source, f"extract-{source}")
    output, reports = Path("data/frames", source), Path("reports", name)
    with open_tracker(config, "extract", item, fingerprint=extraction_fingerprint(config.extract)) as tracker:
        tracker.log_params({"extract": config.extract.model_dump(mode="json")})
        metrics = extract_source(source, config, output, reports)
        tracker.log_metrics(metrics)
        tracker.log_dataset(source, Manifest.read(output / "manifest.csv").digest(), metrics["rows"], "extract")
        # No pictures: frames may show burnt-in names until a person has looked at the sheets.
        tracker.write_sidecar(Path("reports/runs", f"{name}.json"))
    counts = ", ".join(f"{metrics[key]} {key}" for key in ("videos", "images", "frames", "patients", "quarantined"))
    print(f"extract: {counts} in {output}; pictures in {reports}")


if __name__ == "__main__":
    sys.exit(run_stage(main))
