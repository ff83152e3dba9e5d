"""params.yaml as typed, frozen models: one class a section, checked before anything runs, all problems reported at once.

The parameters of a method live in its own file (`pipeline/methods/<name>.py`); this module asks the registry for them.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.files import hash_bytes
from pipeline.registry import METHODS

__all__ = [
    "AugmentationParams", "Config", "DataParams", "EvaluateParams", "ExtractParams", "FinetuneParams", "LaunchParams",
    "OptimizerParams", "PhantomParams", "PretrainParams", "Section", "SourceParams", "SplitParams", "TrackingParams",
    "fingerprint", "load_config",
]


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or bool in get_args(annotation)


class Section(BaseModel):
    """Base of every parameter model: frozen, no unknown keys, finite numbers.

    A number may be written as text, because YAML reads 1e-3 as text; true and false are no numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"got {value}; a number or text is wanted here (quote the word if text is meant)")
        return value


class PhantomParams(Section):
    """The embedded default data: synthetic lung-ultrasound clips."""

    patients: int = Field(24, ge=6)
    clips_per_patient: int = Field(2, ge=1)
    seconds: float = Field(3.0, gt=0)
    frames_per_second: float = Field(12.0, gt=0)
    size: int = Field(160, ge=48)
    """Side of the written videos in pixels."""
    seed: int = Field(0, ge=0, lt=2**32)


class SourceParams(Section):
    """One folder of videos, still images or frame folders."""

    path: str
    labels: str = "auto"
    """Labels table relative to `path`; `auto` finds `*.csv` tables there, `none` means unlabelled."""


class DataParams(Section):
    """Which folders are read, and what their tables mean."""

    source: str = "data/phantom"
    """The labelled corpus: what is evaluated, and by default also what is pretrained on. Stored as source `main`."""
    labels: str = "auto"
    path_column: str = "auto"
    label_column: str = "auto"
    patient_column: str = "auto"
    group: Literal["patient", "video"] = "patient"
    """The unit that may not be divided by a split. `video` is for data without patient identities and is said loudly."""
    media: Literal["all", "video", "image"] = "all"
    include: dict[str, list[str | int | float]] = Field(default_factory=dict)
    """Keep only rows of the labels table whose column holds one of these values, e.g. `probe: [convex]`."""
    classes: list[str] = Field(default_factory=list)
    """Labels to be told apart, in order; empty means all that are found. Other labels stay as unlabelled video."""
    pseudonym_key: str = ""
    """Key of the hash that replaces patient names of the table everywhere behind extraction."""
    extra_sources: dict[str, SourceParams] = Field(default_factory=dict)
    """Further folders for pretraining, by name."""
    phantom: PhantomParams = Field(default_factory=PhantomParams)


class ExtractParams(Section):
    """From files to the frame store."""

    frames_per_second: float | None = Field(None, gt=0)
    """Frames kept per second of video; null keeps every decoded frame."""
    max_frames: int | None = Field(None, ge=1)
    """At most this many frames a video, evenly spaced over the kept ones; null for no cap."""
    short_side: int = Field(256, ge=16, le=4096)
    """Stored frames are shrunk so that the short side has this many pixels; smaller frames are stored as they are."""
    color: Literal["gray", "rgb"] = "gray"
    jpeg_quality: int = Field(95, ge=1, le=100)
    on_error: Literal["fail", "quarantine"] = "quarantine"
    """`quarantine` leaves unreadable files out and lists them; `fail` stops after all files were tried."""
    workers: int | Literal["auto"] = "auto"
    max_pixels: int = Field(50_000_000, ge=1)
    """A frame larger than this (width x height) is refused before it is decoded further."""


class SplitParams(Section):
    """Patient-grouped, stratified folds."""

    folds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=2)
    """Outer folds by number: 0, 1, ... k-1. DVC runs one pretraining and one fine-tuning item per fold."""
    inner_folds: int = Field(3, ge=2)
    """Training patients are divided into this many parts; one of them is the inner validation part."""
    seed: int = Field(0, ge=0, lt=2**32)
    file: str | None = None
    """A split made elsewhere (see the README for its form); it is checked, not trusted."""
    rare_classes: Literal["exclude", "fail"] = "exclude"
    """What to do with a class that has fewer patients than folds."""

    @field_validator("folds")
    @classmethod
    def _numbered(cls, value: list[int]) -> list[int]:
        if value != list(range(len(value))):
            raise ValueError(f"must be the numbers 0 to k-1 in order, for example [0, 1, 2, 3, 4]; got {value}")
        return value


class OptimizerParams(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    schedule_epochs: int | None = Field(None, ge=1)
    """Period of the cosine; null means the number of epochs, so that it ends with training."""
    constant_epochs: int = Field(0, ge=0)
    """Epochs at full learning rate before the cosine begins."""
    min_lr: float = Field(0.0, ge=0)
    warmup_epochs: int = Field(0, ge=0)
    """Epochs of linear warm-up from lr / (warmup_epochs + 1)."""
    per_epoch: bool = False
    """Change the rate once an epoch (as the published recipes do) instead of every step."""


class AugmentationParams(Section):
    """Random views of a frame. The defaults keep what an ultrasound image means: no hue, no vertical flip, mild zoom."""

    resize: Literal["short_side", "square"] = "short_side"
    """Working size before cropping: keep the aspect ratio, or squeeze to a square."""
    crop: Literal["random", "resized", "center"] = "resized"
    """`random`: a window of the image size; `resized`: a window of random area and aspect, resized; `center`: fixed."""
    margin: float = Field(1.25, ge=1, le=2)
    """For `resized`: frames are held at this multiple of the image size, so that a zoomed crop has pixels to show."""
    scale: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (0.8, 1.25)
    horizontal_flip: float = Field(0.5, ge=0, le=1)
    brightness: float = Field(0.3, ge=0, le=1)
    contrast: float = Field(0.3, ge=0, le=1)
    jitter: float = Field(0.8, ge=0, le=1)
    """Probability of the brightness and contrast change."""
    blur: float = Field(0.3, ge=0, le=1)
    """Probability of a Gaussian blur, sigma 0.1 to 2 pixels at 224 pixels and in proportion below."""
    normalization: Literal["imagenet", "uscl"] = "imagenet"
    """`imagenet`: mean .485 .456 .406, std .229 .224 .225; `uscl`: mean 0.5, std 0.25."""

    @model_validator(mode="after")
    def _ranges(self) -> AugmentationParams:
        for name, (low, high), top in (("scale", self.scale, 1.0), ("ratio", self.ratio, 100.0)):
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} must satisfy 0 < low <= high <= {top:g}; got [{low:g}, {high:g}]")
        return self


class MonitorParams(Section):
    """What is measured while pretraining."""

    every_epochs: int = Field(5, ge=1)
    neighbors: int = Field(5, ge=1)
    frames_per_video: int = Field(3, ge=1)
    max_videos: int = Field(200, ge=2)


class PretrainParams(Section):
    """Self-supervised pretraining."""

    method: str = "ucl"
    scope: Literal["fold", "all"] = "fold"
    """`fold`: one encoder per outer fold that never saw its test patients; `all`: transductive, and said so everywhere."""
    sources: list[str] = Field(default_factory=lambda: ["main"], min_length=1)
    backbone: str = "resnet18"
    init: str = "random"
    """`random`, `imagenet` (from a local cache, never downloaded silently), or a path to weights."""
    image_size: int = Field(112, ge=32, le=1024)
    epochs: int = Field(60, ge=1)
    batch_size: int = Field(32, ge=1)
    """Samples of one optimiser step over all processes (the global batch)."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches a step; in-batch negatives are then those of one micro-batch."""
    samples_per_video: int = Field(1, ge=1)
    """Samples drawn from a video in one epoch; the published UCL draws one."""
    seed: int = Field(0, ge=0, lt=2**32)
    optimizer: OptimizerParams = Field(default_factory=OptimizerParams)
    monitor: MonitorParams = Field(default_factory=MonitorParams)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 autocast on GPUs that have it and float32 elsewhere (bfloat16 is many times slower on CPUs)."""
    compile: bool = False
    sync_batchnorm: bool = False
    """Batch-norm statistics over all processes instead of each its own."""
    memory_budget_mb: int = Field(4096, ge=1)
    """Decoded frames are held in memory up to this size; beyond it they are decoded when needed."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints; 0 saves after every step."""

    @model_validator(mode="after")
    def _divides(self) -> PretrainParams:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        return self


class FinetuneParams(Section):
    """The supervised recipe, one and the same for every encoder that is compared."""

    source: str = "main"
    initialisations: list[Literal["pretrained", "random"]] = Field(default_factory=lambda: ["pretrained", "random"])
    """Encoders to fine-tune; `random` is the same network untrained, so that every report says what pretraining brings."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default_factory=lambda: [0], min_length=1)
    trainable: str = "last_block"
    """`linear` (classifier only), `last_block`, `all`, or a parameter-name prefix such as `layer4.1`."""
    head: str = "linear"
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(32, ge=1)
    frames_per_video: int = Field(8, ge=1)
    """Random frames a video in one training epoch."""
    cached_views: int = Field(4, ge=0)
    """Augmented views of each training frame whose frozen features are computed once; 0 makes fresh views every epoch."""
    eval_frames_per_video: int = Field(16, ge=1)
    """Evenly spaced frames a video when predicting."""
    class_weights: Literal["balanced", "none"] = "balanced"
    label_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training and inner validation patients whose labels are used, by class."""
    selection: Literal["inner", "last", "best_on_test"] = "inner"
    """`inner`: best epoch on inner validation patients; `best_on_test` reproduces published numbers and is stamped optimistic."""
    selection_metric: Literal["balanced_accuracy", "accuracy", "macro_f1", "loss", "malignancy_harmonic_mean"] = "balanced_accuracy"
    """The last one is the published gallbladder rule; it needs the three classes normal, benign, malignant in that order."""
    batchnorm: Literal["frozen", "train", "official_eval_after_first_epoch"] = "frozen"
    """Batch norm of frozen layers: running statistics as pretrained, or updated as the published lung recipe does."""
    optimizer: OptimizerParams = Field(default_factory=lambda: OptimizerParams(name="adam", lr=0.001))
    augmentation: AugmentationParams = Field(default_factory=lambda: AugmentationParams(scale=(0.8, 1.0), blur=0.0))

    @field_validator("initialisations", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"must hold at least one value and none twice; got {value}")
        return value


class EvaluateParams(Section):
    """Out-of-fold metrics and the report."""

    aggregation: Literal["mean", "max", "vote"] = "mean"
    """How frame probabilities become one probability a video, and videos one a patient."""
    bootstrap: int = Field(2000, ge=100)
    """Patient-level bootstrap replicates."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)
    title: str = "Sonoscope report"


class TrackingParams(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """null: MLFLOW_TRACKING_URI if set, else a SQLite store at the project root."""
    experiment: str = "sonoscope"
    flush_seconds: float = Field(5.0, gt=0)


class LaunchParams(Section):
    """How a training stage starts its processes."""

    processes: int | Literal["auto"] = "auto"
    """`auto`: one per GPU, one without a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    """CPU threads a process; `auto` divides the cores among the processes."""
    timeout_minutes: float = Field(30.0, gt=0)


class Config(Section):
    """All of params.yaml."""

    data: DataParams = Field(default_factory=DataParams)
    extract: ExtractParams = Field(default_factory=ExtractParams)
    split: SplitParams = Field(default_factory=SplitParams)
    pretrain: PretrainParams = Field(default_factory=PretrainParams)
    methods: dict[str, Any] = Field(default_factory=dict)
    """Validated blocks by method name: after loading, values are the methods' own `Params` objects."""
    finetune: FinetuneParams = Field(default_factory=FinetuneParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)
    tracking: TrackingParams = Field(default_factory=TrackingParams)
    launch: LaunchParams = Field(default_factory=LaunchParams)

    @property
    def method_params(self) -> Section:
        """The parameter block of the chosen method."""
        return self.methods[self.pretrain.method]


def _valid_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys allowed beside the last element of `location`, or [] where the schema is open (free dictionaries)."""
    current: Any = model
    for part in location[:-1]:
        if get_origin(current) is dict:
            current = get_args(current)[1]
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        if field is None:
            return []
        current = field.annotation
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _allowed(problem: Mapping[str, Any]) -> str:
    """The `what is allowed` half of one pydantic problem."""
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        return f"allowed: {context['expected']}"
    if problem["type"] == "value_error":
        return str(context.get("error", problem["msg"]))
    return problem["msg"][0].lower() + problem["msg"][1:]


def _problems(model: type[Section], values: Any, prefix: tuple[str, ...] = ()) -> tuple[Section | None, list[str]]:
    """Validate one mapping; returns the model or None, and one line a problem."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        lines: dict[str, str] = {}
        for problem in error.errors():
            # Union branches append tags such as `int` or `literal['auto']` behind the key itself.
            location = tuple(part for part in problem["loc"] if not (isinstance(part, str) and _is_branch(part)))
            key = ".".join(str(part) for part in (*prefix, *location)) or "params.yaml"
            if problem["type"] == "extra_forbidden":
                known = _valid_keys(model, location)
                near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                lines[key] = f"{key}: unknown key (value {problem['input']!r}).{hint} Allowed here: {', '.join(known)}"
            else:
                # Our own validators say themselves what they got; the input of one over several keys is the whole block.
                found = "" if problem["type"] in ("missing", "value_error") else f"got {problem['input']!r}; "
                text = f"{found}{_allowed(problem)}"
                lines[key] = f"{lines[key]}, or {_allowed(problem)}" if key in lines else f"{key}: {text}"
        return None, list(lines.values())


def _is_branch(part: str) -> bool:
    return part in {"int", "float", "str", "bool", "none"} or part.startswith(("literal[", "constrained-", "list[", "dict["))


def _across_sections(config: Config) -> list[str]:
    """Rules that join several sections."""
    known = ["main", *config.data.extra_sources]
    lines = [
        f"pretrain.sources: unknown source '{name}'. Allowed: {', '.join(known)} (main is data.source, the others are the "
        f"keys of data.extra_sources)"
        for name in config.pretrain.sources
        if name not in known
    ]
    if config.finetune.source != "main":
        lines.append(f"finetune.source: got '{config.finetune.source}'; allowed: main (the labelled corpus, data.source)")
    for name in config.data.extra_sources:
        if name == "main" or not name.replace("_", "").replace("-", "").isalnum():
            lines.append(f"data.extra_sources.{name}: a source name is letters, digits, '_' and '-', and not 'main'")
    return lines


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and check params.yaml.

    Returns:
        The frozen configuration, with `methods` holding the validated block of every method that is listed.

    Raises:
        ConfigError: with one line for every problem found, each naming key, value, what is allowed and the nearest key.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: not found. Run from the project folder, where params.yaml lies.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2021-13-45 is a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as data: and pretrain:, found {type(raw).__name__}")
    raw = dict(raw)
    blocks = raw.pop("methods", None) or {}
    config, lines = _problems(Config, raw)
    methods: dict[str, Any] = {}
    if not isinstance(blocks, dict):
        lines.append(f"methods: expected one block per method, found {type(blocks).__name__}")
        blocks = {}
    for name, block in blocks.items():
        try:
            params = METHODS.get(name).Params
        except ConfigError as error:
            lines.append(str(error).replace("pretrain.method", f"methods.{name}", 1))
            continue
        methods[name], more = _problems(params, block or {}, ("methods", name))
        lines += more
    chosen = (raw.get("pretrain") or {}).get("method", "ucl") if isinstance(raw.get("pretrain"), dict) else "ucl"
    if isinstance(chosen, str) and chosen not in methods:
        try:
            methods[chosen] = METHODS.get(chosen).Params()
        except ConfigError as error:
            lines.append(str(error))
    if config is not None:
        lines += _across_sections(config)
    if lines or config is None:
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{path}: {count}\n" + "\n".join(f"  {line}" for line in lines))
    return config.model_copy(update={"methods": methods})


def fingerprint(*parts: Any) -> str:
    """16 hex digits over parameter models and JSON values: equal inputs give equal folders, different ones never meet."""
    canonical = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hash_bytes(json.dumps(canonical, sort_keys=True, ensure_ascii=False))[:16]


def tracking_uri_from_environment() -> str | None:
    """MLFLOW_TRACKING_URI, the field's usual way to name a server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None
