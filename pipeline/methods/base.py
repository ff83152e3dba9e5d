"""The contract of a self-supervised method: what it samples, what a step computes, what it exports.

A method is one file: a frozen `Params` class and one class registered under the method's name. It never logs, steps the
optimiser, saves, or knows the loop. This file and the method files do not import torch when they are read, because
`Params` must be checkable in a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.data import clips
from pipeline.data.clips import ClipBatch, ViewRule
from pipeline.parameters import AugmentationParams, Section
from pipeline.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline import distributed
    from pipeline.config import Config
    from pipeline.models import heads, momentum
else:
    torch = LazyModule("torch")
    distributed = LazyModule("pipeline.distributed")
    heads = LazyModule("pipeline.models.heads")
    momentum = LazyModule("pipeline.models.momentum")

__all__ = [
    "ClipBatch", "Method", "MethodContext", "MethodParams", "MomentumMethod", "PairMethod", "PairParams", "Progress",
    "Setting", "StepOutput", "ViewRule", "full_precision", "slow_twin_warning",
]


class MethodParams(Section):
    """Parameters every method has."""

    augmentation: AugmentationParams = Field(default_factory=AugmentationParams)
    """How each drawn frame becomes a view."""

    def suited(self, backbone: str, image_size: int) -> MethodParams:
        """These parameters with `auto` values that depend on the backbone written out."""
        return self


@dataclass(frozen=True)
class MethodContext:
    """What a method must know of the run it is built for."""

    feature_dim: int
    epochs: int
    steps_per_epoch: int
    global_batch: int
    """Samples of one optimiser step over all processes."""
    seed: int = 0
    image_size: int = 224
    classes: int = 0
    """Classes of the labels in `ClipBatch.label`; 0 where the method reads none (`Method.label_share`)."""
    samples_per_pass: int | None = None
    """Different samples of one forward pass over all processes; None: as many as `global_batch`."""

    @property
    def forward_batch(self) -> int:
        """Samples a loss over the gathered batch compares: accumulation (`pretrain.accumulate`) makes them fewer than `global_batch`."""
        return self.global_batch if self.samples_per_pass is None else self.samples_per_pass


@dataclass(frozen=True)
class Setting:
    """What a run offers a method, for `Method.problems`: known from params.yaml alone, or from the videos too."""

    backbone: str
    """A name of `pipeline.models.catalog`."""
    image_size: int
    batch_size: int
    """Samples of one forward pass over all processes: pretrain.batch_size / pretrain.accumulate."""
    scope: str
    labelled: dict[str, int] | None = None
    """Labelled videos a class that pretraining may see (classes without any too); None where not known yet."""

    @classmethod
    def of(cls, config: Config, labelled: dict[str, int] | None) -> Setting:
        """What these parameters offer."""
        pretrain = config.pretrain
        batch = max(1, pretrain.batch_size // pretrain.accumulate)
        return cls(pretrain.backbone, pretrain.image_size, batch, pretrain.scope, labelled)

    def lonely(self, why: str) -> list[str]:
        """The line for a method that wants several samples in a forward pass, where there is one; `why` ends its first sentence."""
        line = (
            f"pretrain.batch_size: 1 sample a forward pass (batch_size / accumulate) {why}. Use at least 2 for each of pretrain.accumulate, "
            f"better 32."
        )
        return [line] if self.batch_size < 2 else []


@dataclass(frozen=True)
class Progress:
    """Where training stands: 0-based epoch and 0-based optimiser step over the whole run."""

    epoch: int
    step: int


@dataclass
class StepOutput:
    """Scalar loss (mean over the local samples, with gradient) and numbers worth a curve (detached)."""

    loss: torch.Tensor
    metrics: dict[str, Any] = field(default_factory=dict)


class Method:
    """Base class. Subclasses set `Params`, fill `networks` in `__init__`, and implement `draw` and `step`."""

    Params: ClassVar[type[MethodParams]] = MethodParams
    trains: ClassVar[bool] = True
    """False for the baselines that only export an initialisation."""

    exempt: ClassVar[tuple[str, ...]] = ()
    """Beginnings of parameter names in `networks` that are neither decayed nor clipped (prototypes of MSN)."""

    autocast: bool = False
    """Set by the loop: run the networks in bfloat16."""
    networks: nn.ModuleDict
    """Everything with weights; `backbone` is exported, parameters with requires_grad are optimised."""

    def __init__(self, backbone: nn.Module, params: Any, context: MethodContext) -> None:
        self.params, self.context = params, context
        self.networks = torch.nn.ModuleDict({"backbone": backbone})

    @classmethod
    def min_frames(cls, params: Any) -> int:
        """Shortest video, in frames, that this method can sample from."""
        return 1

    @classmethod
    def label_share(cls, params: Any) -> float:
        """Share of the labelled videos whose class this method reads in `ClipBatch.label`; 0 for a self-supervised method."""
        return 0.0

    @classmethod
    def contrasts(cls, params: Any) -> bool:
        """Whether the loss sets each sample against negatives, at `temperature`: warnings advise on what a method has."""
        return False

    @classmethod
    def leaves_pyramid(cls, params: Any) -> bool:
        """Whether `exports` holds the pyramid and projectors that the fine-tuning heads `hico_*` continue from."""
        return False

    @classmethod
    def draw(cls, params: Any, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sample: role -> int64 [K] frame indices, each of which becomes one augmented view (`views` says how).

        A floating array [K] is no role but random numbers of this sample; they reach `step` in `ClipBatch.numbers`.
        """
        raise NotImplementedError(f"{cls.__name__} is abstract: a method says which frames it samples")

    @classmethod
    def views(cls, params: Any, image_size: int) -> dict[str, ViewRule]:
        """Roles whose views differ from `image_size` and `params.augmentation` (focal crops, shared views)."""
        return {}

    @classmethod
    def problems(cls, params: Any, setting: Setting) -> list[str]:
        """What makes this run impossible, one line each (key, found, allowed): raised before anything is computed."""
        return []

    @classmethod
    def check(cls, params: Any, context: MethodContext, videos: int) -> list[str]:
        """Warnings about parameter values that do not suit this run (shown once, before training)."""
        return []

    def project(self, images: torch.Tensor, prefix: str = "") -> torch.Tensor:
        """Outputs of trunk and head. [B, 3, H, W] -> [B, D], float32 (float64 stays).

        `prefix` picks the momentum twin (`key_`). Only the networks run in bfloat16; what is computed of them needs the mantissa.
        """
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            raw = self.networks[f"{prefix}head"](self.networks[f"{prefix}backbone"](images))
        return full_precision(raw)

    def encode(self, images: torch.Tensor, prefix: str = "") -> torch.Tensor:
        """`project` with rows of unit length (epsilon 1e-12)."""
        return torch.nn.functional.normalize(self.project(images, prefix), dim=-1, eps=1e-12)

    def permutation(self, rows: int, progress: Progress) -> torch.Tensor:
        """Order of the gathered key batch, the same on every process without communication. int64 [rows]."""
        generator = torch.Generator().manual_seed((self.context.seed * 1_000_003 + progress.step) % 2**63)
        return torch.randperm(rows, generator=generator)

    def encode_keys(self, images: torch.Tensor, progress: Progress, shuffle: bool) -> torch.Tensor:
        """Embeddings of the momentum network, without gradient. [B, 3, H, W] -> [B, D].

        With several processes the rows are shuffled among them, so that the positive of an anchor is not normalised with
        the same batch statistics (MoCo, section 3.3); alone the shuffle changes nothing and is skipped.
        """
        world, rank, rows = distributed.world_size(), distributed.rank(), len(images)
        with torch.no_grad():
            if world == 1 or not shuffle:
                return self.encode(images, "key_")
            everyone = distributed.all_gather_rows(images)
            order = self.permutation(len(everyone), progress).to(images.device)
            mine = everyone[order][rank * rows : (rank + 1) * rows]
            keys = distributed.all_gather_rows(self.encode(mine, "key_"))
            return keys[order.argsort()][rank * rows : (rank + 1) * rows]

    def before_step(self, progress: Progress) -> None:
        """Called once before each optimiser step's first micro-batch (momentum averages)."""

    def finish(self, progress: Progress) -> None:
        """Called once behind the last optimiser step, with the progress of the step that would follow, on a state that no
        checkpoint holds: where an average is exported, the part of it that `before_step` would have added."""

    def compile(self) -> None:
        """Compile the trunk in place (pretrain.compile); a method that calls parts of it compiles those."""
        self.networks["backbone"].compile()

    def step(self, batch: ClipBatch, progress: Progress) -> StepOutput:
        """Loss of one micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: a method computes a loss")

    def chance_loss(self, progress: Progress) -> float | torch.Tensor | None:
        """What a network with one constant output would have lost in the step just made: log(number of logits), for instance.

        Told in the log, so that a user can judge. A tensor where the number lies on the device. None where that output is the
        loss's own minimum (SimSiam, BYOL): such a method reports the metric `output_spread` instead, 0 when it has collapsed.
        """
        raise NotImplementedError(f"{type(self).__name__} is abstract: a method knows its chance loss")

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Tensors beside the weights that an exact resume needs (banks, queues, pointers)."""
        return {}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `extra_state`."""

    def move_extra_state(self, device: torch.device) -> None:
        """Put the tensors of `extra_state` on the device of the networks."""

    def exports(self) -> dict[str, torch.Tensor]:
        """Tensors beside the trunk that a fine-tuning head may want; written to `extras.safetensors` where there are any."""
        return {}

    @property
    def backbone(self) -> nn.Module:
        """The trunk to export, with plain torchvision names."""
        return self.networks["backbone"]


class PairParams(MethodParams):
    """Parameters of methods that compare two views."""

    positive_radius: int | None = Field(0, ge=0)
    """The second view shows a frame at most so many frames away; 0: the same frame, as published; null: anywhere in the video."""


class PairMethod(Method):
    """A method of two views that go through the networks one after the other, each with its own batch-norm statistics."""

    Params = PairParams

    @classmethod
    def draw(cls, params: PairParams, num_frames: int, epoch: int, epochs: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"view": clips.two_frames(num_frames, params.positive_radius, rng)}

    @classmethod
    def problems(cls, params: PairParams, setting: Setting) -> list[str]:
        return setting.lonely("leaves the batch norm of the projection head nothing to average")

    def two_outputs(self, batch: ClipBatch, prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of trunk and head for the first and the second view, [B, D] each."""
        images = batch.frames["view"]
        return self.project(images[:, 0], prefix), self.project(images[:, 1], prefix)


def full_precision(rows: torch.Tensor) -> torch.Tensor:
    """bfloat16 as float32, anything else as it is."""
    return rows.float() if rows.dtype == torch.bfloat16 else rows


def slow_twin_warning(key: str, momentum: float, steps: int, rising: bool = False) -> list[str]:
    """A line when a momentum twin hardly moves in a run of so many steps. `rising`: the momentum grows to 1 along a cosine."""
    # Half of the exponent: the mean of 1 - momentum over the rising cosine is half of its start.
    moved = 1 - momentum ** (steps / 2 if rising else steps)
    if moved >= 0.5:
        return []
    better = max(0.9, round(1 - (10 if rising else 5) / max(steps, 1), 3))
    line = (
        f"{key} = {momentum}: in {steps} steps the momentum network moves only {moved:.0%} of the way to the trained one, so its outputs "
        f"stay close to the initialisation's. Consider {better}."
    )
    return [line]


class MomentumMethod(Method):
    """A method with a projection head, a slowly moving twin of trunk and head, and a bank of embeddings (MoCo, UCL).

    With several `projections` the head is so many projections side by side, and the bank holds their embeddings joined.
    """

    def __init__(self, backbone: nn.Module, params: Any, context: MethodContext, bank_rows: int, projections: int = 1) -> None:
        super().__init__(backbone, params, context)
        made = [heads.projection_mlp(context.feature_dim, params.embedding_dim) for _ in range(projections)]
        self.networks["head"] = made[0] if projections == 1 else heads.SideBySide(made)
        self.networks["key_backbone"] = momentum.momentum_copy(self.networks["backbone"])
        self.networks["key_head"] = momentum.momentum_copy(self.networks["head"])
        dtype = next(backbone.parameters()).dtype
        self.bank = momentum.EmbeddingBank(bank_rows, projections * params.embedding_dim, dtype=dtype)

    @classmethod
    def contrasts(cls, params: Any) -> bool:
        return True

    def before_step(self, progress: Progress) -> None:
        for part in ("backbone", "head"):
            momentum.ema_update(self.networks[f"key_{part}"], self.networks[part], self.params.momentum)

    def extra_state(self) -> dict[str, torch.Tensor]:
        return {f"bank.{name}": value for name, value in self.bank.state().items()}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        self.bank.load({name.removeprefix("bank."): value for name, value in state.items()})

    def move_extra_state(self, device: torch.device) -> None:
        self.bank.to(device)
