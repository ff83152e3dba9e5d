"""The pretraining loop: any method, any number of processes, exact resume, live quality, exported encoder.

One optimiser step is `accumulate` micro-batches; the checkpoint holds everything the next step depends on (weights,
optimiser, momentum copies, banks, every process's random state, position in the epoch, partial sums of the curves), so an
interrupted run ends with the same bits as an uninterrupted one on a CPU.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pipeline import distributed
from pipeline.checkpoint import export_encoder, latest_checkpoint, save_checkpoint, save_tensors
from pipeline.config import Config
from pipeline.data.frames import FrameCache
from pipeline.data.loader import ClipLoader, SamplingPlan
from pipeline.data.transforms import STATISTICS, working_size
from pipeline.errors import PipelineError, StoppedError
from pipeline.files import write_curves
from pipeline.methods.base import ClipBatch, Method, MethodContext, Progress
from pipeline.models.backbones import build_backbone
from pipeline.models.catalog import describe
from pipeline.models.published import KeyReport, initial_tensors, load_trunk, to_extras
from pipeline.registry import METHODS
from pipeline.reproducibility import collect_rng_states, restore_rng_state, seed_everything
from pipeline.training.inputs import PretrainInputs
from pipeline.training.monitor import Monitor, Throughput, chance_warning, epoch_line
from pipeline.training.optim import apply_schedule, build_optimizer, clip_gradients

__all__ = ["Pretraining", "StepModule", "initial_backbone"]


def initial_backbone(config: Config) -> tuple[nn.Module, int, KeyReport | None]:
    """The trunk before pretraining, as `pretrain.init` says, with its feature size and what was loaded."""
    backbone, features = build_backbone(config.pretrain.backbone, config.pretrain.seed, config.pretrain.image_size)
    if config.pretrain.init == "random":
        return backbone, features, None
    tensors, source = initial_tensors(config.pretrain.backbone, config.pretrain.init)
    return backbone, features, load_trunk(backbone, tensors, source, allow_missing=config.pretrain.init_allow_missing)


class StepModule(nn.Module):
    """What DistributedDataParallel wraps: all networks of the method, with the whole step as one forward pass."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.networks = method.networks
        self._method = method

    def forward(self, batch: ClipBatch, progress: Progress) -> tuple[torch.Tensor, dict[str, Any]]:
        output = self._method.step(batch, progress)
        return output.loss, output.metrics


class Pretraining:
    """One run, from its inputs to its exported encoder.

    Args:
        tracker: logs metrics and parameters; a null object on all processes but the first.
        scratch: folder of this run's checkpoints, named by its fingerprint.
    """

    def __init__(self, config: Config, inputs: PretrainInputs, scratch: Path, tracker: Any, *, threads: int = 2) -> None:
        self.config, self.inputs, self.scratch, self.tracker = config, inputs, scratch, tracker
        self.started, self.earlier_seconds = time.monotonic(), 0.0
        params = config.pretrain
        self.device = distributed.pick_device(config.launch.device)
        seed_everything(params.seed)
        kind = METHODS.get(params.method)
        augmentation = config.method_params.augmentation
        labels = np.array(inputs.labels, np.int64)
        plan = SamplingPlan(
            kind, config.method_params, augmentation, params.image_size, params.epochs, params.batch_size, params.accumulate,
            params.samples_per_video, params.seed,
        )
        sizes = [working_size(rule.augmentation, rule.size) for rule in kind.views(config.method_params, params.image_size).values()]
        frames = FrameCache(
            inputs.videos, max([working_size(augmentation, params.image_size), *sizes]), mode=augmentation.resize,
            budget_mb=params.memory_budget_mb, threads=threads,
        )
        self.loader = ClipLoader(
            frames, np.array(inputs.targets, np.int64), plan, rank=distributed.rank(), world=distributed.world_size(), threads=threads
        )
        backbone, features, self.init_report = initial_backbone(config)
        if self.init_report and distributed.is_main():
            mean, std = STATISTICS[augmentation.normalization]
            print(
                f"pretrain.init: {self.init_report}; inputs are normalised as `{augmentation.normalization}` (mean {mean}, std {std}): "
                f"set methods.{params.method}.augmentation.normalization as these weights were trained", flush=True,
            )
        self.context = MethodContext(
            features, params.epochs, self.loader.steps_per_epoch, params.batch_size, params.seed, params.image_size,
            len(inputs.target_classes), self.loader.samples_per_pass,
        )
        self.method: Method = kind(backbone, config.method_params, self.context)
        self.contrasts = kind.contrasts(config.method_params)
        self.monitor = Monitor(params.monitor, frames, labels, inputs.groups, params.image_size)
        self.rows: list[dict[str, Any]] = []
        self.epoch, self.step_in_epoch, self.sums = 0, 0, defaultdict(float)
        self.warnings: list[str] = []
        if kind.trains:
            self._prepare_training()

    def _prepare_training(self) -> None:
        params, method = self.config.pretrain, self.method
        self.warnings = [*type(method).check(self.config.method_params, self.context, len(self.inputs.videos)), *self._size_warnings()]
        if params.sync_batchnorm and distributed.world_size() > 1:
            if self.device.type != "cuda":
                raise PipelineError("pretrain.sync_batchnorm: true needs GPUs (torch has no synchronised batch norm on CPUs); set it to false")
            method.networks = nn.SyncBatchNorm.convert_sync_batchnorm(method.networks)
        method.networks.to(self.device, memory_format=torch.channels_last)
        method.move_extra_state(self.device)
        method.autocast = params.precision == "bfloat16" or (
            params.precision == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        if params.compile:
            method.compile()
        method.networks.train()
        self.optimizer = build_optimizer(params.optimizer, method.networks, method.exempt)
        self.step_module: nn.Module = StepModule(method)
        if distributed.world_size() > 1:
            self.step_module = DistributedDataParallel(
                self.step_module, device_ids=[self.device] if self.device.type == "cuda" else None, gradient_as_bucket_view=True
            )

    def _size_warnings(self) -> list[str]:
        """Videos that are left out and batches that have to be filled up; PipelineError where batch norm could not work."""
        params, short, world = self.config.pretrain, self.inputs.left_out, distributed.world_size()
        parts, warnings = world * params.accumulate, []
        small = sum(min(ref.row.stored_width, ref.row.stored_height) < params.image_size for ref in self.inputs.videos)
        if small > len(self.inputs.videos) // 2:
            warnings.append(
                f"pretrain.image_size = {params.image_size}: {small} of {len(self.inputs.videos)} videos are stored smaller and will be "
                f"enlarged. Raise extract.short_side (now {self.config.extract.short_side}) if the files have more pixels."
            )
        if short:
            shown = ", ".join(short[:4]) + (" ..." if len(short) > 4 else "")
            warnings.append(
                f"{len(short)} of {len(short) + len(self.inputs.videos)} videos are left out, because they have fewer frames than "
                f"{params.method} samples from: {shown}"
            )
        if params.batch_size % parts:
            warnings.append(
                f"pretrain.batch_size = {params.batch_size} is not a multiple of {world} processes x {params.accumulate} micro-batches: "
                f"every step is filled up to {-(-params.batch_size // parts) * parts} with repeated samples"
            )
        # Rows that batch norm averages; synchronised, it sees those of all processes.
        sync = params.sync_batchnorm
        rows = max(1, params.batch_size // parts) * (world if sync else 1)
        two = 2 * params.accumulate * (1 if sync else world)
        where = f"({world} processes x {params.accumulate} micro-batches)"
        if params.image_size <= 32 and rows < 2 and describe(params.backbone).family == "resnet":
            raise PipelineError(
                f"pretrain.batch_size: {params.batch_size} gives each forward pass one image {where}, and pretrain.image_size {params.image_size} "
                f"ends in one pixel: batch norm has nothing to average. Use at least {two} samples, or images above 32 pixels."
            )
        if rows > 2 or not any(isinstance(part, nn.BatchNorm1d) for part in self.method.networks.modules()):
            return warnings
        if rows < 2:
            raise PipelineError(
                f"pretrain.batch_size: {params.batch_size} gives each forward pass one sample {where}, and the batch norm in the head of "
                f"{params.method} has nothing to average. Use at least {two}, better {16 * two}."
            )
        warnings.append(
            f"pretrain.batch_size = {params.batch_size} gives each forward pass two samples {where}: of two numbers the batch norm in the head of "
            f"{params.method} keeps only which is larger, and its gradients are erratic. Use at least {2 * two}, better {16 * two}."
        )
        return warnings

    # --- state -------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """Everything the next step depends on; every process must call it."""
        return {
            "fingerprint": self.inputs.fingerprint, "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
            "world_size": distributed.world_size(), "networks": self.method.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(), "extra": self.method.extra_state(),
            "rng": collect_rng_states(self.device), "rows": json.dumps(self.rows), "sums": self._gathered_sums(),
            "seconds": self.seconds(),
        }

    def _gathered_sums(self) -> dict[str, torch.Tensor]:
        """Partial sums of the curves: name -> float64 [W], one entry a process."""
        names = list(self.sums)  # in order of appearance, which is that of the columns and equal in all processes
        mine = torch.tensor([float(self.sums[name]) for name in names], dtype=torch.float64, device=self.device)
        return dict(zip(names, distributed.all_gather_rows(mine[None]).T.cpu(), strict=True))

    def seconds(self) -> float:
        """Time spent on this run so far, earlier starts included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def save(self) -> None:
        """Write a checkpoint (first process); all processes must call it."""
        state = self._state()
        if distributed.is_main():
            save_checkpoint(self.scratch, self.epoch * self.context.steps_per_epoch + self.step_in_epoch, state)
        distributed.barrier()

    def resume(self) -> bool:
        """Continue from the newest checkpoint of this fingerprint, if there is one."""
        state, skipped = latest_checkpoint(self.scratch, self.inputs.fingerprint)
        self.warnings += [f"checkpoint not used: {line}" for line in skipped]
        if state is None:
            return False
        self.method.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_extra_state(state["extra"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.rows, self.earlier_seconds = json.loads(state["rows"]), state["seconds"]
        same = state["world_size"] == distributed.world_size()
        sums = {name: float(values[distributed.rank()] if same else values.mean()) for name, values in state["sums"].items()}
        self.sums = defaultdict(float, sums)
        if not same or not restore_rng_state(state["rng"], self.device):
            self.warnings.append(
                f"the checkpoint was written by {state['world_size']} processes and {distributed.world_size()} continue it: every sample "
                f"is seen as planned, but batch-norm statistics and rounding differ from an uninterrupted run."
            )
        return True

    # --- loop --------------------------------------------------------------------------------------------------------

    def train(self, stop: distributed.StopFlag) -> None:
        """Run the remaining epochs.

        Raises:
            StoppedError: a signal asked to stop; the state is saved.
            PipelineError: the loss is not finite.
        """
        params = self.config.pretrain
        if self.resume() and distributed.is_main():
            print(f"continuing at epoch {self.epoch + 1}/{params.epochs}, step {self.step_in_epoch}", flush=True)
        if distributed.is_main():
            for warning in [*self.warnings]:
                print(f"warning: {warning}", flush=True)
        total = params.epochs * self.context.steps_per_epoch
        first = self.epoch * self.context.steps_per_epoch + self.step_in_epoch
        bar = tqdm(
            total=total, initial=first, desc=f"pretrain {params.method}",
            unit="step", disable=None if distributed.is_main() else True, mininterval=1.0,
        )
        self.saved_at, self.clock = time.monotonic(), time.monotonic()
        with bar:
            while self.epoch < params.epochs:
                self._train_epoch(stop, bar)
                done = self.epoch * self.context.steps_per_epoch + self.context.steps_per_epoch
                remaining = (time.monotonic() - self.clock) / max(1, done - first) * (total - done)
                self._finish_epoch(remaining)
        self.save()
        # Behind the checkpoint, so that a finished run that starts again does it once as well.
        self.method.finish(Progress(self.epoch, total))
        if self.rows and type(self.method).finish is not Method.finish:
            # The last row was measured before that; curves and card are to describe what is exported.
            measured = self._measure()
            self.rows[-1] |= measured
            if distributed.is_main():
                self.tracker.log_metrics(measured, step=self.epoch - 1)

    def _train_epoch(self, stop: distributed.StopFlag, bar: tqdm) -> None:
        params, steps = self.config.pretrain, self.context.steps_per_epoch
        throughput, waited = Throughput(), self.loader.waited
        batches = self.loader.epoch(self.epoch, self.device, self.step_in_epoch)
        while self.step_in_epoch < steps:
            progress = Progress(self.epoch, self.epoch * steps + self.step_in_epoch)
            rate = apply_schedule(self.optimizer, params.optimizer, params.epochs, self.epoch + self.step_in_epoch / steps, steps)
            self.method.before_step(progress)
            self.optimizer.zero_grad(set_to_none=True)
            for micro in range(params.accumulate):
                batch = next(batches)
                throughput.add(sum(x.shape[0] * x.shape[1] for x in batch.frames.values()))
                last = micro == params.accumulate - 1
                quiet = nullcontext() if last or distributed.world_size() == 1 else self.step_module.no_sync()
                with quiet:
                    loss, metrics = self.step_module(batch, progress)
                    (loss / params.accumulate).backward()
                self._add("loss", loss, params.accumulate)
                for name, value in metrics.items():
                    self._add(name, value, params.accumulate)
            norm = clip_gradients(self.optimizer, params.optimizer)
            self.optimizer.step()
            self.step_in_epoch += 1
            if norm is not None:
                self._add("gradient_norm", norm, 1)
            self._add("learning_rate", rate, 1)
            if (chance := self.method.chance_loss(progress)) is not None:
                self._add("chance_loss", chance, 1)
            bar.update()
            self._maybe_save(stop)
        rate, seconds = throughput.read()
        self.speed = {
            "images_per_second": rate * distributed.world_size(), "epoch_seconds": seconds,
            "data_wait_share": (self.loader.waited - waited) / max(seconds, 1e-9),
        }

    def _add(self, name: str, value: Any, parts: int) -> None:
        """Sum a metric over the epoch. Kept as a tensor so that a GPU need not stop for every number."""
        if isinstance(value, torch.Tensor):
            value = value.detach().double() if self.device.type == "cpu" else value.detach().float()
        self.sums[name] = self.sums[name] + value / parts

    def _maybe_save(self, stop: distributed.StopFlag) -> None:
        due = time.monotonic() - self.saved_at >= self.config.pretrain.checkpoint_seconds
        wish = distributed.highest(2 if stop.raised is not None else int(due), self.device)
        if wish:
            self.save()
            self.saved_at = time.monotonic()
        if wish == 2:
            name = stop.raised.name if stop.raised else "a signal to another process"
            raise StoppedError(f"pretrain: stopped by {name}; the state is saved. Start the same command again to continue.")

    def _finish_epoch(self, remaining: float) -> None:
        """Averages of the epoch, live quality, one log line, and on to the next epoch."""
        params, steps = self.config.pretrain, self.context.steps_per_epoch
        row: dict[str, Any] = {"epoch": self.epoch}
        for name, total in self.sums.items():
            mean = torch.as_tensor(total / steps, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
            row[name] = float(distributed.reduce_mean(mean.to(self.device)))
        if not np.isfinite(row["loss"]):
            warmer = f"raise methods.{params.method}.temperature, " if hasattr(self.config.method_params, "temperature") else ""
            raise PipelineError(
                f"pretrain: the loss is not finite in epoch {self.epoch + 1} (learning rate {row['learning_rate']:.3g}). Lower "
                f"pretrain.optimizer.lr, {warmer}or set pretrain.precision to float32."
            )
        last = self.epoch + 1 == params.epochs
        measured: dict[str, float] = {}
        if self.epoch % params.monitor.every_epochs == 0 or last:
            measured = self._measure()
            self._warn(self.monitor.warning(measured, self.contrasts))
        row |= measured
        self.rows.append(row)
        stuck = chance_warning(self.rows, params.epochs, params.optimizer, self.contrasts)
        if stuck and stuck[0] == self.epoch:
            self._warn(stuck[1])
        shown = {**row, **self.speed}
        if distributed.is_main():
            tqdm.write(epoch_line(shown, params.epochs, remaining))
            self.tracker.log_metrics({k: v for k, v in shown.items() if k != "epoch"}, step=self.epoch)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, defaultdict(float)

    def _measure(self) -> dict[str, float]:
        return self.monitor.measure(self.method.backbone, self.device, self.config.method_params.augmentation.normalization)

    def _warn(self, sentence: str | None) -> None:
        if sentence and distributed.is_main():
            tqdm.write(f"warning: epoch {self.epoch + 1}: {sentence}")

    # --- result ------------------------------------------------------------------------------------------------------

    def _extras(self) -> dict[str, torch.Tensor]:
        """What goes beside the trunk: the method's own, or, where nothing is trained, that of the weights file."""
        params = self.config.pretrain
        if self.method.trains or params.init == "random":
            return self.method.exports()
        return to_extras(initial_tensors(params.backbone, params.init)[0])

    def export(self, folder: Path) -> None:
        """Write encoder.safetensors, card.json, curves.csv and, where the method has any, extras.safetensors into `folder` (first process)."""
        params, inputs = self.config.pretrain, self.inputs
        stuck = chance_warning(self.rows, params.epochs, params.optimizer, self.contrasts)
        last = {k: v for k, v in (self.rows[-1] if self.rows else {}).items() if k != "epoch"}
        card = {
            "schema": 1, "fingerprint": inputs.fingerprint, "method": params.method, "backbone": params.backbone,
            "init": params.init if params.init in ("random", "imagenet") else "weights file",
            "init_format": self.init_report.format if self.init_report else None,
            "init_report": str(self.init_report) if self.init_report else None,
            "image_size": params.image_size, "normalization": self.config.method_params.augmentation.normalization,
            "epochs": params.epochs if self.method.trains else 0, "steps": self.epoch * self.context.steps_per_epoch,
            "seed": params.seed, "scope": params.scope, "transductive": params.scope == "all",
            "videos": len(inputs.videos), "labelled_videos": inputs.target_counts(), "frames": sum(ref.row.frames for ref in inputs.videos),
            "too_short": inputs.left_out, "groups": sorted(set(inputs.groups)), "label_groups": inputs.target_groups, "world_size": distributed.world_size(),
            "device": self.device.type, "torch": torch.__version__, "seconds": round(self.seconds(), 1),
            "parameters": self.config.method_params.model_dump(mode="json"), "final": last,
            "extract": self.config.extract.model_dump(mode="json", exclude={"workers": True, "on_error": True, "mask": {"review"}}),
            "working_size": self.monitor.frames.size,
            "warnings": [*self.warnings, *([stuck[1]] if stuck else [])],
        }
        export_encoder(folder, self.method.backbone.state_dict(), card)
        if extras := self._extras():
            save_tensors(folder / "extras.safetensors", extras, {"schema": 1, "method": params.method})
        write_curves(folder / "curves.csv", self.rows or [{"epoch": 0}])
