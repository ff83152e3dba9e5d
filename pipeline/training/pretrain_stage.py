"""The pretrain stage around its loop: processes, scratch folders, finished results, tracking, outputs."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.splits import Splits
from pipeline.errors import ConfigError
from pipeline.export.facts import about, find_weights, input_facts
from pipeline.files import alone_in, copy_into, hash_file, read_json, scratch_folder, write_json
from pipeline.launch import is_worker, launch, process_count, threads_per_process, worker_rank
from pipeline.methods.base import Setting
from pipeline.registry import METHODS
from pipeline.tracking import NullTracker, open_tracker
from pipeline.training.inputs import PretrainInputs, open_pretrain_inputs

__all__ = ["run_pretrain_stage"]

SPLITS = Path("data/splits.json")


def _copy_result(done: Path, output: Path) -> None:
    """Copy a finished result from scratch to the stage's output folder."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "extras.safetensors").unlink(missing_ok=True)  # of another method, which this one does not overwrite
    for path in done.iterdir():
        copy_into(path, output / path.name)


def run_pretrain_stage(config: Config, fold: int, script: Path) -> str:
    """Pretrain the encoder of one fold into models/encoders/fold<K>; returns the closing line.

    A finished result with the same fingerprint is copied at once (folds that may see the same videos share one encoder, and
    so do sweep points that differ only behind pretraining). Otherwise the loop runs here, or under torchrun with several
    processes, and continues from its checkpoint if there is one.

    Raises:
        ConfigError: the method cannot run on these videos (`Method.problems`), with a line for each reason.
    """
    splits = Splits.read(SPLITS)
    inputs = open_pretrain_inputs(config, splits, fold)
    problems = METHODS.get(config.pretrain.method).problems(config.method_params, Setting.of(config, inputs.target_counts()))
    if problems:
        raise ConfigError("\n  ".join([f"pretrain, fold {fold}: method {config.pretrain.method} cannot run with these videos", *problems]))
    scratch = scratch_folder("pretrain", inputs.fingerprint)
    # Workers run under the lock of the process that started them.
    with nullcontext() if is_worker() else alone_in(scratch):
        return _pretrain_once(config, fold, script, inputs, scratch)


def _pretrain_once(config: Config, fold: int, script: Path, inputs: PretrainInputs, scratch: Path) -> str:
    """Reuse, start workers, or train here."""
    output = Path(f"models/encoders/fold{fold}")
    done = scratch / "result"
    reused = (done / "card.json").is_file()
    if not reused and not is_worker() and process_count(config.launch) > 1:
        processes = process_count(config.launch)
        launch(script, ["--fold", str(fold)], processes, threads_per_process(config.launch, processes))
        return f"pretrain fold {fold}: {processes} processes finished; encoder in {output}"
    if not reused:
        _pretrain_here(config, fold, inputs, scratch)
    elif worker_rank() == 0:
        with open_tracker(config, "pretrain", f"fold {fold}", fingerprint=inputs.fingerprint) as tracker:
            _hand_over(config, fold, inputs, done, tracker)
    return f"pretrain fold {fold}: {'finished result reused' if reused else 'done'}; encoder in {output}"


def _pretrain_here(config: Config, fold: int, inputs: PretrainInputs, scratch: Path) -> None:
    """Run the loop in this process (alone or as a torchrun worker) and hand its result over."""
    from pipeline import distributed
    from pipeline.reproducibility import configure_torch
    from pipeline.training.pretrain import Pretraining

    threads = threads_per_process(config.launch)
    configure_torch(threads)
    done = scratch / "result"
    with (
        distributed.process_group(distributed.pick_device(config.launch.device), config.launch.timeout_minutes),
        open_tracker(config, "pretrain", f"fold {fold}", fingerprint=inputs.fingerprint) as tracker,
        distributed.StopFlag() as stop,
    ):
        run = Pretraining(config, inputs, scratch, tracker, threads=threads)
        if run.method.trains:
            run.train(stop)
        if distributed.is_main():
            part = scratch / "result.part"
            shutil.rmtree(part, ignore_errors=True)
            run.export(part)
            # The folder appears under its name only when it is complete; the checkpoints have then done their work.
            shutil.rmtree(done, ignore_errors=True)
            part.rename(done)
            for checkpoint in scratch.glob("state-*"):
                checkpoint.unlink()
            _hand_over(config, fold, inputs, done, tracker)
        distributed.barrier()


def _settings(config: Config) -> dict[str, Any]:
    """The parameters of pretraining for the card, without how it was run; a weights file by its content, not by its path."""
    settings = config.pretrain.model_dump(mode="json", exclude={"monitor", "memory_budget_mb", "checkpoint_seconds"})
    if settings["init"] not in ("random", "imagenet"):
        settings["init"] = f"weights file, SHA-256 {hash_file(Path(settings['init']))}"
    return settings


def _hand_over(config: Config, fold: int, inputs: PretrainInputs, done: Path, tracker: NullTracker) -> None:
    """Copy the finished encoder to the stage's output and tell MLflow what it is (first process)."""
    output = Path(f"models/encoders/fold{fold}")
    _copy_result(done, output)
    card = read_json(output / "card.json")
    # What belongs to this run and not to the shared result. Names of patients above all: another key of the pseudonyms or
    # another split names the same videos' patients differently, and the check for leaks compares these names.
    card |= {
        "fold": fold, "scope": inputs.scope, "transductive": inputs.scope == "all",
        "groups": [] if inputs.scope == "none" else sorted(set(inputs.groups)), "label_groups": inputs.target_groups, "too_short": inputs.left_out,
        "preprocessing": input_facts(config, config.method_params.augmentation), "pretrain": _settings(config),
    }
    write_json(output / "card.json", card)
    tracker.log_dataset(f"pretraining videos fold {fold}", card["fingerprint"], card["videos"], "pretraining")
    tracker.log_metrics({f"final.{k}": v for k, v in card["final"].items() if isinstance(v, int | float)})
    if card.get("init_report"):
        tracker.log_params({"init_format": card["init_format"], "init_report": card["init_report"]})
    tracker.log_metrics({"train.seconds": card["seconds"], "train.steps": card["steps"], "train.videos": card["videos"]})
    tracker.log_artifact(output / "curves.csv")
    tracker.log_model(done / "encoder.safetensors", about(find_weights(output)), "encoder")
    tracker.write_sidecar(Path(f"reports/runs/pretrain-fold{fold}.json"), fingerprint=card["fingerprint"])
