"""Stage 4: fine-tune one initialisation on one outer fold and predict its test patients.

    python stages/finetune.py --init pretrained --seed 0 --fold 0

Reads data/frames, data/splits.json and models/encoders/fold<K>; writes models/finetuned/<init>-seed<S>-fold<K>.
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
    """Fine-tune one fold."""
    parser = argparse.ArgumentParser(description="Fine-tune one initialisation on one outer fold.")
    parser.add_argument("--init", choices=["pretrained", "random"], required=True, help="where the trunk's weights come from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, required=True, help="outer fold, 0 to k-1")
    arguments = parser.parse_args()
    config = load_config()
    from pipeline.training.finetune_stage import run_finetune_stage

    print(run_finetune_stage(config, arguments.init, arguments.seed, arguments.fold))


if __name__ == "__main__":
    sys.exit(run_stage(main))
