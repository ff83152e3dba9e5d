"""One self-contained HTML page from the results: words a clinician reads, tables, pictures as data URIs, no scripts.

Computes nothing but sentences; the numbers come from `pipeline.evaluation.evaluate`. Everything from outside (class
names, warnings, parameters) passes through Jinja's autoescape.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipeline.config import Config
from pipeline.data.splits import FRAME_LEVEL, VIDEO_LEVEL
from pipeline.evaluation.plots import DPI
from pipeline.files import atomic_write
from pipeline.tracking_context import environment_tags

__all__ = [
    "FeatureSection",
    "Picture",
    "ReportContent",
    "Section",
    "Table",
    "cautions",
    "headline_sentence",
    "init_name",
    "init_names",
    "interval_words",
    "network_words",
    "page_environment",
    "run_words",
    "stamp_words",
    "verdict",
    "write_report",
]

METRIC_NAMES = {
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "macro_auroc": "AUROC",
}


@dataclass(frozen=True)
class Picture:
    """A PNG on disk, with the text for readers who do not see it and the caption for those who do."""

    path: Path
    alt: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of ready-made cells; columns named in `numeric` are set right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One topic of the page: paragraphs, a warning or "", pictures, tables, and where it stands."""

    key: str
    """Also the anchor of its link."""
    title: str
    words: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    warning: str = ""
    after: str = "folds"
    """The fixed section it follows: classes, folds, errors, training or made."""
    layout: str = "pair"
    """Pictures side by side (`pair`), one under another (`wide`), small ones in a grid (`panels`), or one beside its caption (`solo`)."""
    note: str = ""
    """Small print under the tables."""
    folded: bool = False
    """Each table behind its title, to be opened; on paper all are open."""


@dataclass(frozen=True)
class FeatureSection:
    """What the encoders see before fine-tuning: a sentence of numbers, a warning or "", maps, tables, rows of neighbours.

    A row is {query, neighbors} with image, label, video, frame and patient; neighbours have similarity and same_label too.
    """

    init: str
    words: str
    warning: str
    maps: Sequence[Picture]
    tables: Sequence[Table]
    rows: Sequence[Mapping[str, Any]]


@dataclass
class ReportContent:
    """Everything the page shows. `metrics` is the content of details.json."""

    title: str
    metrics: Mapping[str, Any]
    classes: Sequence[str]
    confidence: float
    verdict: Mapping[str, str] | None
    cautions: Sequence[str]
    stamps: Sequence[str]
    pictures: Mapping[str, Sequence[Picture]]
    tables: Mapping[str, Sequence[Table]]
    wrong: Sequence[Mapping[str, Any]] = ()
    right: Sequence[Mapping[str, Any]] = ()
    wrong_total: int = 0
    """Videos that most of their networks judge wrongly."""
    wrong_mean: float = 0.0
    """Videos that one network judges wrongly, mean over seeds and repeats."""
    parameters: Sequence[tuple[str, str]] = ()
    commands: Sequence[tuple[str, str]] = ()
    seeds: str = ""
    warnings: Sequence[str] = ()
    features: FeatureSection | None = None
    sections: Sequence[Section] = ()
    environment: Sequence[tuple[str, str]] = field(default_factory=lambda: environment())


def number(value: Any, digits: int = 2) -> str:
    """`0.71`, a true minus sign, or a dash for what is undefined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(value: Any, digits: int = 2) -> str:
    """`+0.12` or `−0.03`."""
    text = number(value, digits)
    return text if text.startswith(("−", "–")) or float(text) == 0 else f"+{text}"


def percent(value: float) -> str:
    """`95 %`, with a space that does not break."""
    return f"{100 * value:.2g}\u00a0%" if value < 0.1 else f"{100 * value:.3g}\u00a0%"


def p_words(value: float | None) -> str:
    """`p = 0.03`, `p < 0.001` or `p > 0.99`."""
    if value is None:
        return "p undefined"
    # An estimate from random exchanges, or one corrected, is no certainty.
    return "p < 0.001" if value < 0.001 else "p > 0.99" if value > 0.99 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def interval_words(values: Mapping[str, Any], metric: str, confidence: float) -> str:
    """`0.71 (95 % interval 0.60 to 0.81)`; says so where no interval could be computed."""
    low, high = values.get(f"{metric}_low"), values.get(f"{metric}_high")
    if low is None or high is None:
        reason = values.get("undefined", {}).get(f"{metric} interval", "too few patients")
        return f"{number(values.get(metric))} (no interval: {reason})"
    return f"{number(values.get(metric))} ({percent(confidence)} interval {number(low)} to {number(high)})"


def plural(count: int, noun: str) -> str:
    """`1 patient`, `24 patients`, `2 classes`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}".replace(",", "\u202f")


def init_names(config: Config) -> dict[str, str]:
    """What the initialisations are called where people read them; in files they keep their keys.

    Without pretraining here (pretrain.method: random), `pretrained` stands for a network that starts from scratch or from weights of others.
    """
    start = {"random": "from scratch", "imagenet": "ImageNet weights"}.get(config.pretrain.init, "given weights")
    shown = start if config.pretrain.method == "random" else "pretrained"
    return {name: shown if name == "pretrained" else name for name in config.finetune.initialisations}


def init_name(metrics: Mapping[str, Any], init: str, *, capital: bool = False) -> str:
    """The shown name of an initialisation, from `init_names` in details.json; the key itself where a file has none."""
    name = metrics.get("init_names", {}).get(init, init)
    return name[:1].upper() + name[1:] if capital else name


def network_words(metrics: Mapping[str, Any], init: str, noun: str = "network", *, capital: bool = False) -> str:
    """`pretrained network`, `network from scratch` or `network from ImageNet weights`."""
    name = init_name(metrics, init)
    words = f"{noun} {name}" if name.startswith("from ") else f"{noun} from {name}" if name.endswith(" weights") else f"{name} {noun}"
    return words[:1].upper() + words[1:] if capital else words


def fold_words(metrics: Mapping[str, Any]) -> str:
    """`5 folds`, or `5 folds × 3 repeats`."""
    return plural(metrics["folds"], "fold") + (f" × {metrics['repeats']} repeats" if metrics.get("repeats", 1) > 1 else "")


def run_words(metrics: Mapping[str, Any]) -> str:
    """What judged every video: `2 seeds`, `3 repeats` or `2 seeds × 3 repeats`; "" where it was judged once."""
    counts = [(metrics["seeds"], "seed"), (metrics.get("repeats", 1), "repeat")]
    return " × ".join(plural(count, noun) for count, noun in counts if count > 1)


def headline_sentence(metrics: Mapping[str, Any], confidence: float) -> str:
    """The one sentence a reader takes home, e.g. `Balanced accuracy per video 0.71 (95 % interval 0.60 to 0.81), 24
    patients, 48 videos, 3 folds`, followed by its stamps."""
    values = metrics[metrics["headline_init"]]["video"]
    unit = metrics["unit"]
    parts = [
        f"Balanced accuracy per video {interval_words(values, 'balanced_accuracy', confidence)}",
        plural(metrics["patients"], unit),
        plural(metrics["videos"], "video"),
        fold_words(metrics),
    ]
    if metrics["seeds"] > 1:
        parts.append(f"mean of {metrics['seeds']} seeds")
    stamp = f" – {metrics['stamp']}" if metrics["stamp"] else ""
    return ", ".join(parts) + stamp


def verdict(difference: Mapping[str, Any] | None, confidence: float) -> dict[str, str] | None:
    """Answer to `does pretraining help?` from the paired difference in balanced accuracy per video.

    Returns:
        `answer` (one or two words), `kind` (yes | no | open) and `sentence`; None when nothing was compared.
    """
    if not difference:
        return None
    gain, low, high = (difference.get(f"balanced_accuracy{end}") for end in ("", "_low", "_high"))
    p_value, reason = difference.get("balanced_accuracy_p"), difference.get("balanced_accuracy_reason", "")
    if gain is None:
        return {"answer": "Unknown", "kind": "open", "sentence": f"The difference could not be computed{reason and f': {reason}'}."}
    against = f"{signed(gain)} balanced accuracy per video against the same network without pretraining"
    if low is None or high is None:
        return {"answer": "Not shown", "kind": "open", "sentence": f"{against} ({p_words(p_value)}). There is no interval{reason and f': {reason}'}."}
    numbers = f"{against} ({percent(confidence)} interval {signed(low)} to {signed(high)}, {p_words(p_value)})"
    clear = p_value is not None and p_value <= 1 - confidence
    if low > 0 and clear:
        return {"answer": "Yes", "kind": "yes", "sentence": f"{numbers}. The whole interval lies above zero."}
    if high < 0 and clear:
        return {
            "answer": "No",
            "kind": "no",
            "sentence": f"{numbers}. The whole interval lies below zero: on these data pretraining did harm.",
        }
    if low <= 0 <= high:
        return {
            "answer": "Not shown",
            "kind": "open",
            "sentence": f"{numbers}. The interval contains zero: the data are compatible with a gain and with a loss.",
        }
    return {
        "answer": "Not shown",
        "kind": "open",
        "sentence": f"{numbers}. Interval and test do not agree, so the difference is not taken as shown.",
    }


def stamp_words(stamp: str) -> list[str]:
    """The stamps of a result ("a, b") as sentences; those that have none of their own stand as they are."""
    words = []
    if "optimistic" in stamp:
        words.append("Optimistic (selected on test): the training epoch was chosen on the patients that are reported.")
    if "transductive" in stamp:
        words.append("Transductive pretraining: the encoder has seen the unlabelled videos of the patients that are tested.")
    if FRAME_LEVEL in stamp:
        words.append("Frame-level split: frames of one video are on both sides of every fold, so each network has seen the videos it is tested on.")
    if VIDEO_LEVEL in stamp:
        words.append("Video-level split: videos of one patient are on both sides of a fold, so networks have seen patients they are tested on.")
    known = ("optimistic", "transductive", FRAME_LEVEL, VIDEO_LEVEL)
    others = [part for part in stamp.split(", ") if part and not part.startswith(known)]
    return words + [f"{part[0].upper()}{part[1:]}" for part in others]


def cautions(config: Config, metrics: Mapping[str, Any], warnings: Sequence[str]) -> list[str]:
    """What the numbers may not be used for, strongest first, from the facts of this run."""
    lines: list[str] = []
    phantom = Path(config.data.source).as_posix() == "data/phantom"
    if phantom:
        lines.append(
            "The videos are synthetic phantoms. The numbers show that the pipeline works and say nothing of patients."
        )
    if "optimistic" in metrics["stamp"]:
        lines.append(
            "The training epoch was chosen on the same patients that are reported (as some published protocols do). "
            "Expect lower values on new patients; use these numbers only to compare with such publications."
        )
    if "transductive" in metrics["stamp"]:
        lines.append(
            "Pretraining saw the videos (not the labels) of the patients that are tested. Values for patients the "
            "encoder has never seen may be lower."
        )
    if FRAME_LEVEL in metrics["stamp"]:
        lines.append(
            "Frames of the tested videos were trained on (as some published protocols do): the numbers say how well neighbouring frames "
            "are recognised, not how well a new video or patient is. Use them only to compare with such publications."
        )
    elif VIDEO_LEVEL in metrics["stamp"]:
        lines.append(
            "Other videos of the tested patients were trained on (as some published protocols do), and videos were treated as independent: "
            "the values are too high and the intervals too narrow. Use them only to compare with such publications."
        )
    elif metrics["unit"] != "patient":
        whose = "were not given, so videos were" if metrics["group"] == "video" else "were not given for every video; those without were"
        lines.append(
            f"Patient identities {whose} treated as independent. If two of them come from one patient, the values are too high and the intervals "
            "too narrow."
        )
    lines += metrics.get("cautions", [])
    if not phantom:
        lines.append(
            "Not for diagnosis, and not a statement about other hospitals, scanners or patient groups: all patients "
            "come from one collection, and no external validation was made."
        )
    unit = metrics["unit"]
    count = metrics["patients"]
    if metrics[metrics["headline_init"]]["patient"]["accuracy"] == 1:
        bound = 1 - (1 - config.evaluate.confidence) ** (1 / count)
        lines.append(
            f"No {unit} was judged wrongly. That does not mean that errors do not happen: with {plural(count, unit)}, "
            f"an error in {percent(bound)} of {unit}s is still compatible with seeing none."
        )
    if count < 100:
        lines.append(
            f"With {plural(count, unit)} the interval is the message, not the number: two systems whose intervals "
            "overlap widely are not shown to differ."
        )
    if metrics["seeds"] == 1:
        lines.append(
            "One training run per fold: variation between repeated trainings is not in the intervals "
            "(finetune.seeds adds repeats)."
        )
    lines.append(metrics.get("calibration", {}).get("caution", "Probabilities are not calibrated; a 0.9 does not mean nine in ten."))
    if any("excluded" in line for line in warnings):
        lines.append(
            "Rare classes were left out of the evaluation (see warnings); the task was easier than clinical practice."
        )
    return lines


def environment() -> list[tuple[str, str]]:
    """Python, system and package versions; nothing that names the machine."""
    return [(key.removeprefix("env."), value) for key, value in environment_tags().items() if key != "env.cpus"]


def png_uri(path: Path) -> str:
    """The file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii")


def shown_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture in CSS pixels, such that its 10-point text is as large as the page's small text."""
    with Image.open(path) as picture:
        return round(picture.width * 96 / DPI), round(picture.height * 96 / DPI)


def frame_uri(image: np.ndarray, side: int = 220) -> str:
    """A frame (uint8 [H, W] or [H, W, 3]), shrunk to `side` pixels, as a JPEG data URI."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def page_environment() -> Environment:
    """Jinja with the filters of the pages; everything from outside is escaped."""
    jinja = Environment(
        loader=PackageLoader("pipeline.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters.update(number=number, signed=signed, percent=percent, png=png_uri, frame=frame_uri, shown=shown_size)
    jinja.globals.update(plural=plural, fold_words=fold_words, interval_words=interval_words, metric_names=METRIC_NAMES, p_words=p_words)
    jinja.globals.update(init_name=init_name, network_words=network_words, run_words=run_words)
    return jinja


def write_report(path: Path, content: ReportContent) -> None:
    """Render the page and write it atomically; about 1 MB for 20 cases of 3 frames."""
    main = content.metrics[content.metrics["headline_init"]]
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            c=content,
            m=content.metrics,
            main=main,
            headline=headline_sentence(content.metrics, content.confidence),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        )
    )
    atomic_write(path, page)
