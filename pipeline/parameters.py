"""The sections of params.yaml as frozen models: one class a section, with the meaning of every key.

`config.py` reads the file into them; the parameters of a method live in its own file (`pipeline/methods/<name>.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

__all__ = [
    "AugmentationParams", "DataParams", "EvaluateParams", "ExtractParams", "FinetuneParams", "LaunchParams", "MaskParams",
    "MonitorParams", "OptimizerParams", "OptionalViewParams", "PhantomParams", "PretrainParams", "RandAugmentParams", "Section", "SourceParams",
    "SplitParams", "TrackingParams",
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
    frame_labels: str = ""
    """Labels of single frames: annotation file of each video, e.g. `phase_annotations/{stem}-phase.txt`; empty for none."""
    frame_label_stride: int = Field(1, ge=1)
    """Rows of the annotation from one frame of the source to the next: 25 for pictures taken once a second of 25."""
    group: Literal["patient", "video", "frame"] = "patient"
    """The unit that may not be divided by a split. `video` is for data without patient identities; `video` with known patients and
    `frame` (frames of one video on both sides) only reproduce published splits, and every number says so."""
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


class MaskParams(Section):
    """What is made black outside the scan area before anything is stored, and what happens where that is not sure."""

    mode: Literal["sector", "none"] = "none"
    """`sector` finds the scan area of each video from what moves (and from DICOM regions); `none` keeps frames as they are.

    params.yaml turns it on; none is what a file or an encoder's card without this section means."""
    min_confidence: float = Field(0.92, ge=0, le=1)
    """Masks below this go to the review list, and `low_confidence` says what is done with the video."""
    min_confidence_still: float = Field(0.73, ge=0, le=1)
    """The same for stills and frozen clips, whose masks are told by brightness alone and never surer than 0.75; 1 lists all of them."""
    low_confidence: Literal["wide", "mask", "keep", "exclude"] = "wide"
    """`wide`: black outside the hull of everything that may belong to the picture; `mask`: the doubtful mask; `keep`: nothing is cut."""
    dual: Literal["keep", "larger", "left", "right", "exclude"] = "keep"
    """Two pictures side by side: keep both, one of them, or leave the video out."""
    doppler: Literal["keep", "exclude"] = "keep"
    """Colour Doppler."""
    crop: bool = False
    """Cut stored frames to the box around the mask."""
    review: str | None = None
    """A CSV file with a person's decisions: path or video, decision (accept, keep, exclude, box), x0, y0, x1, y1."""


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
    mask: MaskParams = Field(default_factory=MaskParams)


class SplitParams(Section):
    """Patient-grouped, stratified folds."""

    folds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    """Outer folds by number: 0, 1, ... k-1. DVC runs one pretraining and one fine-tuning item per fold. One fold alone is a fixed
    division into training and test, which `file` must give."""
    repeats: int = Field(1, ge=1)
    """How often the cross-validation is repeated with another division. `folds` lists the folds of all repeats: 0 to 14 for three
    repeats of five folds."""
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

    @property
    def per_repeat(self) -> int:
        """Folds of one division."""
        return len(self.folds) // self.repeats

    @property
    def words(self) -> str:
        """`5 folds`, or `5 folds x 3 repeats`."""
        return f"{self.per_repeat} folds" + (f" x {self.repeats} repeats" if self.repeats > 1 else "")

    @model_validator(mode="after")
    def _equal_repeats(self) -> SplitParams:
        if self.repeats > 1 and (len(self.folds) % self.repeats or self.per_repeat < 2):
            # A short list is meant as the folds of one repeat, a long one as those of all.
            wanted = len(self.folds) if len(self.folds) < 3 * self.repeats else round(len(self.folds) / self.repeats)
            raise ValueError(
                f"folds must list the folds of all {self.repeats} repeats, each with as many and at least 2; it has {len(self.folds)}. "
                f"For {self.repeats} repeats of {wanted} folds write folds: {list(range(self.repeats * wanted))}"
            )
        return self

    @model_validator(mode="after")
    def _one_fold_is_given(self) -> SplitParams:
        if len(self.folds) < 2 and self.file is None:
            raise ValueError("folds: [0] is a fixed division into training and test, which split.file must give; or use at least two folds")
        return self


class OptimizerParams(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.03, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end, reached by a cosine over all steps; null keeps it constant."""
    no_decay: list[Literal["bias", "norm", "one_dimensional", "token"]] = Field(default_factory=list)
    """Weights without decay: biases, weights of norm layers, all that are vectors (both of these), class token and positions."""
    clip_norm: float = Field(0.0, ge=0)
    """Gradients of all weights together are shrunk to this norm; 0 for never."""
    schedule: Literal["cosine", "constant"] = "cosine"
    schedule_epochs: int | None = Field(None, ge=1)
    """Period of the cosine; null means the number of epochs, so that it ends with training."""
    constant_epochs: int = Field(0, ge=0)
    """Epochs at full learning rate before the cosine begins."""
    min_lr: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(0, ge=0)
    """Epochs of linear warm-up."""
    warmup_lr: float | None = Field(None, ge=0)
    """Where the warm-up starts; null is lr / (warmup_epochs + 1). With a number, schedules are counted in steps from 1 (MSN)."""
    stretch: float = Field(1.0, ge=1)
    """Schedules are laid out for this many times the epochs, so that training ends before they do (MSN: 1.25)."""
    per_epoch: bool = False
    """Change the rate once an epoch (as the published recipes do) instead of every step."""

    @model_validator(mode="after")
    def _falls(self) -> OptimizerParams:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr:g}) is above lr ({self.lr:g}), so the rate would rise; allowed: 0 to lr")
        return self

    def length_problem(self, epochs: int) -> str | None:
        """Why this schedule does not fit into so many epochs, or None."""
        flat = self.constant_epochs if self.schedule == "cosine" else 0
        if self.warmup_epochs + flat <= epochs:
            return None
        return (
            f"optimizer: warmup_epochs ({self.warmup_epochs:g}) and constant_epochs ({flat}) take longer than all epochs ({epochs}); "
            f"lower them or raise epochs"
        )


class RandAugmentParams(Section):
    """RandAugment without inversion, posterisation and solarisation (arXiv 1909.13719; MSN's phase recognition)."""

    layers: int = Field(3, ge=1)
    """Operations in a row; each is drawn anew, and applied with a probability between 0.2 and 0.8."""
    magnitude: float = Field(7.0, ge=0, le=10)


class OptionalViewParams(Section):
    """What few recipes need of a view; everything is off by default."""

    trim_border: bool = False
    """Leave the black border of a frame out before the random crop (round endoscope images)."""
    sharpen: int = Field(0, ge=-1, le=5)
    """Level of USCL's 3 x 3 kernels: -1 softens, 1 to 5 sharpen, 0 is off. Applied to every view."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Degrees to either side."""
    shift: float = Field(0.0, ge=0, le=0.5)
    """Largest shift in x and in y, as a fraction of the side."""
    bezier: float = Field(0.0, ge=0, le=1)
    """Probability of a random non-linear map of the grey levels (Models Genesis; USCL 0.9), half of them inverting."""
    cutout_holes: int = Field(0, ge=0)
    """Black squares a view, of `cutout_side` pixels at 224 pixels and in proportion below."""
    cutout_side: int = Field(32, ge=2)
    outpaint: float = Field(0.0, ge=0, le=1)
    """Probability that all but five windows becomes noise (Models Genesis)."""
    randaugment: RandAugmentParams | None = None


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
    """Probability that brightness, contrast, saturation and hue change."""
    jitter_style: Literal["linear", "torchvision"] = "linear"
    """`linear`: a gain about mid grey and an offset; `torchvision`: factors, the four changes in random order."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Colour images: factor 1 - s to 1 + s."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Colour images: shift by up to this fraction of the colour circle."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Colour images: probability that the colour is taken away."""
    blur: float = Field(0.3, ge=0, le=1)
    """Probability of a Gaussian blur, sigma 0.1 to 2 pixels at an image size of 224 and in proportion below (small crops: as the image)."""
    solarize: float = Field(0.0, ge=0, le=1)
    """Probability that levels of 128 and above are inverted (BYOL)."""
    normalization: Literal["imagenet", "uscl", "half"] = "imagenet"
    """`imagenet`: mean .485 .456 .406, std .229 .224 .225; `uscl`: mean 0.5, std 0.25; `half`: both 0.5 (most ViTs of timm)."""
    optional: OptionalViewParams = Field(default_factory=OptionalViewParams)

    @property
    def plain(self) -> bool:
        """Whether a view needs nothing beyond crop, flip, brightness, contrast and blur."""
        rare, o = self.jitter_style != "linear" or self.saturation or self.hue or self.grayscale or self.solarize, self.optional
        return not (rare or o.sharpen or o.rotation or o.shift or o.bezier or o.cutout_holes or o.outpaint or o.randaugment)

    @model_validator(mode="after")
    def _ranges(self) -> AugmentationParams:
        if self.optional.trim_border and self.crop != "resized":
            raise ValueError(f"optional.trim_border needs crop: resized, because what is left may be smaller; got crop: {self.crop}")
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
    """`random`, `imagenet` (from a local cache, never downloaded silently), or a path to weights of any known program."""
    init_allow_missing: list[str] = Field(default_factory=list)
    """Parts of the trunk that the weights file may lack, e.g. `norm`; they stay as initialised. Anything else missing is an error."""
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
        if line := self.optimizer.length_problem(self.epochs):
            raise ValueError(line)
        return self

    @field_validator("init_allow_missing")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        if not all(name.strip(". ") for name in value):
            raise ValueError(f"must be names of parts, e.g. [norm]; got {value} (an empty name would mean everything)")
        return value


class FinetuneParams(Section):
    """The supervised recipe, one and the same for every encoder that is compared."""

    source: str = "main"
    initialisations: list[Literal["pretrained", "random"]] = Field(default_factory=lambda: ["pretrained", "random"])
    """Encoders to fine-tune; `random` is the same network untrained, so that every report says what pretraining brings."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default_factory=lambda: [0], min_length=1)
    trainable: str = "last_block"
    """`linear` (classifier only), `last_block`, `all`, `lora` (vision transformers), or a part such as `layer4.1` or `blocks.11`."""
    lora_rank: int = Field(8, ge=1)
    """For `lora`: rank of the change of each attention weight."""
    lora_alpha: float = Field(16.0, gt=0)
    """For `lora`: the change is scaled by lora_alpha / lora_rank."""
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
    pooling: Literal["mean", "attention"] = "mean"
    """`mean`: frames are trained one by one and averaged; `attention`: whole videos, each frame with a learnt weight (Ilse et al., 2018)."""
    selection: Literal["inner", "nested", "last", "best_on_test"] = "inner"
    """`inner`: best epoch on the first inner fold's validation patients; `nested`: best epoch and values of `grid` over all inner folds,
    then trained again on all training patients; `best_on_test` reproduces published numbers and is stamped optimistic."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """For `nested`: dotted keys of this section and the values to choose from, e.g. {optimizer.lr: [0.01, 0.001]}."""
    selection_metric: Literal["balanced_accuracy", "accuracy", "macro_f1", "loss", "malignancy_harmonic_mean"] = "balanced_accuracy"
    """The last one is the published gallbladder rule; it needs the three classes normal, benign, malignant in that order."""
    batchnorm: Literal["frozen", "train", "official_eval_after_first_epoch"] = "frozen"
    """Batch norm of frozen layers: running statistics as pretrained, or updated as the published lung recipe does."""
    optimizer: OptimizerParams = Field(default_factory=lambda: OptimizerParams(name="adam", lr=0.001))
    augmentation: AugmentationParams = Field(default_factory=lambda: AugmentationParams(scale=(0.8, 1.0), blur=0.0))

    @field_validator("grid", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """`optimizer: {lr: [...]}` means `optimizer.lr: [...]`."""
        if not isinstance(value, dict):
            return value
        flat: dict[str, Any] = {}
        for key, one in value.items():
            flat |= {f"{key}.{name}": inner for name, inner in cls._flat(one).items()} if isinstance(one, dict) else {str(key): one}
        return flat

    @field_validator("initialisations", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"must hold at least one value and none twice; got {value}")
        return value

    @model_validator(mode="after")
    def _schedule_fits(self) -> FinetuneParams:
        if line := self.optimizer.length_problem(self.epochs):
            raise ValueError(line)
        return self


class ThresholdParams(Section):
    """How the probability from which on a class is called is chosen on inner validation patients."""

    rule: Literal["youden", "sensitivity", "specificity"] = "youden"
    """`youden`: largest sensitivity + specificity; the others: at least `target` of it, and the most of the other."""
    target: float = Field(0.9, gt=0, lt=1)


class EvaluateParams(Section):
    """Out-of-fold metrics and the report."""

    aggregation: Literal["mean", "max", "vote", "top_k", "attention"] = "mean"
    """How frame probabilities become one probability a video, and videos one a patient; `attention` needs finetune.pooling: attention
    (and takes the mean of a patient's videos)."""
    top_k: float = Field(0.2, gt=0)
    """For `top_k`: the mean of each class's most certain frames, this share of them (below 1) or this many (from 1)."""
    phase_convention: Literal["union", "gt", "all"] = "union"
    """Phases in the macro F1 of a video with labels of frames: those in labels or predictions, in the labels, or all."""
    bootstrap: int = Field(2000, ge=100)
    """Draws of patients for intervals of differences, curves and calibration."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    seed: int = Field(0, ge=0, lt=2**32)
    neighbors: int = Field(5, ge=1, le=50)
    """Nearest training frames a test frame is compared with in the report's section on features."""
    calibration: Literal["none", "temperature", "platt"] = "temperature"
    """How probabilities are made to mean what they say, fitted on inner validation patients; the main numbers are those without it."""
    positive_class: str | None = None
    """The class whose threshold and decision curve are shown; null: each class against the rest."""
    threshold: ThresholdParams = Field(default_factory=ThresholdParams)
    subgroups: list[str] = Field(default_factory=list)
    """Columns by which videos are judged in groups: of the labels table, or one of `pipeline.data.attributes.MANIFEST`."""

    @field_validator("subgroups")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value) or not all(name.strip() for name in value):
            raise ValueError(f"subgroups must be names of columns, none twice; got {value}")
        return value

    explanations: int = Field(8, ge=0, le=48)
    """Cases of the section that shows where the networks looked; 0 leaves it out."""
    title: str = "Sonoscope report"

    @field_validator("top_k")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"got {value:g}; below 1 it is a share of the frames, from 1 a whole number of frames")
        return value


class TrackingParams(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """null: MLFLOW_TRACKING_URI if set, else a SQLite store at the project root."""
    experiment: str = "sonoscope"
    models: bool = True
    """Log encoders and classifiers as MLflow models that score pictures. In the embedded store their weights are links and cost
    no disk; a server receives every file."""
    flush_seconds: float = Field(5.0, gt=0)


class LaunchParams(Section):
    """How a training stage starts its processes."""

    processes: int | Literal["auto"] = "auto"
    """`auto`: one per GPU, one without a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    """CPU threads a process; `auto` divides the cores among the processes."""
    timeout_minutes: float = Field(30.0, gt=0)
