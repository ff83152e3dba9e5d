"""Stage 3: self-supervised pretraining of the encoder of one outer fold.

    python stages/pretrain.py --fold 0
    torchrun --standalone --nproc-per-node=2 stages/pretrain.py --fold 0     (what it does itself for several GPUs)

Reads data/frames and data/splits.json, writes models/encoders/fold<K>. Start it again after an interruption: it continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A queued experiment runs in a copy of the project: its own code comes before the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import run_stage  # noqa: E402
from pipeline.config import load_config  # noqa: E402


def main() -> None:
    """Pretrain one fold's encoder."""
    parser = argparse.ArgumentParser(description="Pretrain the encoder of one outer fold.")
    parser.add_argument("--fold", type=int, required=True, help="outer fold, 0 to k-1")
    arguments = parser.parse_args()
    config = load_config()
    from pipeline.training.pretrain_stage import run_pretrain_stage

    print(run_pretrain_stage(config, arguments.fold, Path(__file__)))


if __name__ == "__main__":
    sys.exit(run_stage(main))
