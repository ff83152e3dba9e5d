"""How fast reading, augmentation, loading, a UCL step and start-up are; prints the tables of docs/performance.md.

    python benchmarks/training.py [--quick] [--only reading step ...] [--repeats 5] [--sizes 112 224]
                                  [--backbone resnet18] [--threads N] [--device auto]

`--quick` takes about a minute and shows that everything runs; its numbers are too few to be quoted. Trust CPU times and
the ratios inside one table; wall times need a quiet machine. Uses phantom clips in a temporary folder, needs no data.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import cv2
import torch
from harness import print_header, print_load
from pixels import augmentation, reading
from startup import startup
from steps import loading, ucl_steps

from pipeline.cli import run_stage
from pipeline.reproducibility import configure_torch
from pipeline.distributed import pick_device

PARTS = ("reading", "augmentation", "loader", "step", "startup")


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of reading, augmentation, loading, UCL step and start-up.")
    parser.add_argument("--quick", action="store_true", help="about one minute: fewer repeats, 64 px only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; default: all")
    parser.add_argument("--repeats", type=int, help="measured passes of each case (default 5; quick 2)")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels of loader and step (default 112 224)")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch and the loader")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    repeats = options.repeats or (2 if options.quick else 5)
    sizes = options.sizes or ([64] if options.quick else [112, 224])
    device = pick_device(options.device)
    configure_torch(options.threads)
    # OpenCV's own threads would compete with the loader's; the pipeline runs it with one, too.
    cv2.setNumThreads(1)
    print_header(options.threads, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "reading" in options.only:
            reading(folder, repeats, options.quick)
        if "augmentation" in options.only:
            augmentation(folder, repeats, options.quick)
        for size in sizes:
            if "loader" in options.only:
                loading(folder, repeats, options.quick, device, options.backbone, size, options.threads)
            if "step" in options.only:
                ucl_steps(repeats, device, options.backbone, size)
    if "startup" in options.only:
        startup(1 if options.quick else repeats)
    print()
    print_load("at the end")


if __name__ == "__main__":
    sys.exit(run_stage(main))
