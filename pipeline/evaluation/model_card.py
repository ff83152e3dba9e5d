"""What an evaluation knows about itself, in words, and the model card made of it (Mitchell et al., FAccT 2019).

The card describes the procedure that all folds share. A card of one file of weights, with how to load it, is that of
`pipeline.export.card`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import pretraining_name
from pipeline.evaluation.parts import Context
from pipeline.evaluation.report import (
    METRIC_NAMES,
    cautions,
    environment,
    init_name,
    interval_words,
    network_words,
    percent,
    plural,
)
from pipeline.tracking_context import git_revision

__all__ = ["NOT_FOR", "USE", "markdown_table", "model_card", "run_facts"]

USE = "Research on the kind of video it was trained on; a start for further training."
NOT_FOR = (
    "**Not** a medical device: not for diagnosis, triage, treatment or any decision about a patient. Not for other organs, probes, machines "
    "or populations without evaluation on them. Not for telling who a patient is. It was trained on the patients of one corpus; expect it "
    "to be worse elsewhere."
)
_SELECTION = {
    "inner": "the epoch was chosen on inner validation {unit}s, who are neither trained on nor tested",
    "nested": "epoch and grid were chosen over all inner folds, then trained again on all training {unit}s",
    "last": "the last epoch was taken, nothing was chosen",
    "best_on_test": "the epoch was chosen on the test {unit}s themselves (optimistic)",
}

_JOINED = {
    "attention": "frames joined to videos by the attention that fine-tuning has learnt, videos to {unit}s by their mean",
    "top_k": "frame probabilities joined to videos and videos to {unit}s by the mean of the most certain ones of each class (evaluate.top_k)",
}
_CALIBRATION = {
    "none": "None (evaluate.calibration: none)",
    "temperature": "Temperature scaling, fitted on inner validation {unit}s, shown beside the uncalibrated values",
    "platt": "Platt scaling, fitted on inner validation {unit}s, shown beside the uncalibrated values",
    "impossible": "None, for want of inner validation {unit}s apart from those tested",
}


def run_facts(context: Context) -> dict[str, str]:
    """Phrases that the checklists and the card are filled with; no name, path or identity."""
    config, metrics, splits, unit = context.config, context.metrics, context.splits, context.unit
    pretrain, tuned, extract, joined = config.pretrain, config.finetune, config.extract, config.evaluate.aggregation
    selection = context.items[0].card.selection
    first, shown = metrics["headline_init"], config.evaluate.explanations
    excluded = [f"class {name} was left out ({reason})" for name, reason in splits.excluded_classes.items()]
    rows = context.store.manifest.rows if context.store is not None else []
    kept = f"frames stored {extract.color}, short side at most {extract.short_side} pixels, outside of the scan area: {extract.mask.mode}"
    failing = metrics[first]["video"]
    wrong = sum(map(sum, failing["confusion"])) - sum(failing["confusion"][place][place] for place in range(len(splits.classes)))
    start = pretrain.init if pretrain.init in ("random", "imagenet") else "a weights file"
    trained = pretrain.method != "random"
    begun = f"pretraining from {start}" if trained else f"no pretraining, weights as they are: {start}"
    made = f"pretrained by {pretraining_name(pretrain.method, pretrain.init)}" if trained else "from scratch" if start == "random" else f"from {start} weights"
    return {
        "title": config.evaluate.title, "unit": unit, "classes": ", ".join(splits.classes), "headline": metrics["headline"],
        "patients": str(metrics["patients"]), "videos": str(metrics["videos"]), "manifest": splits.manifest_digest[:12],
        "revision": git_revision()[:12] or "unknown", "labelled": "frame" if context.recordings else "video",
        "stamp_line": f"**{metrics['stamp']}**" if metrics["stamp"] else "No number of this run is stamped as too good for new patients.",
        "included": f"{len(rows)} videos in the store, {len(splits.unlabelled)} of them without a label that is told apart" if rows else "not recorded",
        "size": _size(context),
        "preparation": kept, "missing": f"videos without a label that is told apart serve pretraining only ({len(splits.unlabelled)}); "
        + ("; ".join(excluded) or "no class was left out"),
        "input": f"frames of {pretrain.image_size} × {pretrain.image_size} pixels",
        "protocol": f"{_division(context)}, {_sides(context)}, split seed {splits.seed}",
        "disjoint": _sides(context),
        "model": f"{pretrain.backbone} {made}, fine-tuned ({_chosen(context, 'trainable')}, head {_chosen(context, 'head')})",
        "selection": _SELECTION[selection].format(unit=unit),
        "parts": "inner validation: learning curves; test: all tables" if selection in ("inner", "nested") else
        "test: all tables; no part was held back for validation",
        "initial": f"{begun}; compared: {', '.join(init_name(metrics, init) for init in context.inits)}",
        "training": (f"pretraining {pretrain.epochs} epochs ({pretrain.optimizer.name}), scope {pretrain.scope}" if trained else "no pretraining")
        + f"; fine-tuning {'at most ' if selection == 'nested' else ''}{_chosen(context, 'epochs')} epochs "
        f"({_chosen(context, 'optimizer.name')}), seeds {', '.join(map(str, tuned.seeds))}",
        "subgroups": ", ".join(config.evaluate.subgroups) or "none asked for (evaluate.subgroups)",
        "measures": ", ".join(METRIC_NAMES.values()) + ", precision-recall, calibration, decision curve",
        "uncertainty": f"{percent(config.evaluate.confidence)} intervals by linearisation over {unit}s; of differences, curves and calibration "
        f"from {config.evaluate.bootstrap} bootstrap samples of whole {unit}s; paired permutation test",
        "prediction": _JOINED.get(joined, f"frame probabilities joined to videos and videos to {{unit}}s by {joined}").format(unit=unit) + "; "
        + ("every frame by networks that had trained on other frames of its video" if splits.by_frame else
           "every video by networks that had not trained on it"),
        "calibration": _CALIBRATION[config.evaluate.calibration if _apart(context) else "impossible"].format(unit=unit),
        "thresholds": f"thresholds fitted on inner validation {unit}s" if _apart(context) else
        f"no thresholds, for want of inner validation {unit}s",
        "other": f"Same source, other {unit}s" if not splits.stamp else f"Same source, {splits.stamp}",
        "imbalance": _chosen(context, "class_weights", {"balanced": "loss weighted by class frequency", "none": "none: the loss is not weighted"}),
        "limits": f"one source, no external validation, {plural(metrics['patients'], unit)}" + (f", {metrics['stamp']}" if metrics["stamp"] else ""),
        "question": "Answered by a paired comparison" if "difference" in metrics else "Not compared in this run",
        "frames": f"{_chosen(context, 'frames_per_video')} frames a video and epoch in training, {tuned.eval_frames_per_video} evenly spaced ones in testing",
        "privacy": "names replaced by keyed pseudonyms; file metadata is not stored" if config.data.pseudonym_key else
        "names replaced by pseudonyms without a secret key (data.pseudonym_key is empty)",
        "software": ", ".join(f"{key} {value}" for key, value in environment() if key != "lock"),
        "robustness": f"{plural(metrics['seeds'], 'seed')}, {splits.words}",
        "explained": f"maps of up to {shown} cases, with measures of what they are worth" if shown else "none in this run",
        "flow": f"{metrics['patients']} {unit}s with {metrics['videos']} labelled videos tested, {metrics['frames']} frames judged; "
        "files set aside are counted there",
        "failures": f"{wrong:.3g} of {metrics['videos']} videos judged wrongly by the {network_words(metrics, first)}, the most certain shown with frames",
    }


def _chosen(context: Context, key: str, words: Mapping[str, str] | None = None) -> str:
    """Value of a key of fine-tuning that networks really had: with counts where nested selection chose differently; `words` of values instead of them."""
    first: Any = context.config.finetune
    for part in key.split("."):
        first = getattr(first, part)
    items = [item for item in context.items if item.card.init == context.inits[0]]
    nested = [(item.card.model_extra or {}).get("nested") or {} for item in items]
    counts = Counter(str(one.get("values", {}).get(key, first)) for one in nested).most_common()
    said = [((words or {}).get(value, value), count) for value, count in counts]
    return said[0][0] if len(said) == 1 else ", ".join(f"{value} in {count} of {len(items)} networks" for value, count in said)


def _size(context: Context) -> str:
    """How many videos were used of those there are, and by what the others were left out."""
    splits, data = context.splits, context.config.data
    rows = context.store.manifest.rows if context.store is not None else []
    used = f"{plural(len(splits.labels), 'labelled video')} of {plural(len(splits.groups_of(splits.labels)), context.unit)}"
    labelled = sum(bool(row.label) for row in rows)
    whole = "" if not rows else ", all in the store that have a label" if labelled == len(splits.labels) else f", of {labelled} in the store"
    limits = [name for name, given in (("data.include", data.include), ("data.media", data.media != "all")) if given]
    chosen = f"; the store holds what {' and '.join(limits)} {'keeps' if len(limits) == 1 else 'keep'}" if limits else ""
    left = f"; without class {', '.join(splits.excluded_classes)}" if splits.excluded_classes else ""
    return used + whole + left + chosen


def _apart(context: Context) -> bool:
    """Whether models have inner validation patients apart from those tested."""
    return {item.card.selection for item in context.items} <= {"inner", "nested"} and not context.splits.stamp


def _division(context: Context) -> str:
    return f"cross-validation, {context.splits.words}" if len(context.splits.folds) > 1 else "one fixed division into training and test"


def _sides(context: Context) -> str:
    stamp = context.splits.stamp
    return stamp or f"no {context.unit} is in training and test of a fold"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table; bars and line breaks in cells are taken care of."""
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *(line(row) for row in rows)]


def model_card(context: Context, facts: Mapping[str, str]) -> str:
    """model_card.md: the nine topics of Mitchell et al., what the run cannot know marked for its authors."""
    metrics, confidence = context.metrics, context.config.evaluate.confidence
    rows = [
        [METRIC_NAMES[name], *(interval_words(metrics[init]["video"], name, confidence) for init in context.inits)] for name in METRIC_NAMES
    ]
    classes = [
        [name, *(f"{values['per_class'][name]['recall']:.2f}" if values["per_class"][name]["recall"] is not None else "–" for values in
                 (metrics[init]["video"] for init in context.inits))] for name in context.splits.classes
    ]
    called = [init_name(metrics, init) for init in context.inits]
    yours = "*To be filled by you.*"
    topics = {
        "Model details": [
            f"{facts['model']}. Tells apart: {facts['classes']}.", "", f"Made with Sonoscope, commit {facts['revision']}; {facts['software']}.", "",
            f"Version, authors, licence, contact: {yours}", "",
            "Weights of one fold, with how to load them and how pictures are prepared: `sonoscope export models/finetuned/<name>` writes its own card.",
        ],
        "Intended use": [USE, "", NOT_FOR, "", f"Intended users and place in care: {yours}"],
        "Factors": [f"Sub-groups judged: {facts['subgroups']}.", "", f"Groups of people, machines and operators that matter here: {yours}"],
        "Metrics": [f"{facts['measures']}. {facts['uncertainty']}. {facts['prediction']}."],
        "Evaluation data": [f"{facts['flow']}. {facts['protocol']}. Manifest {facts['manifest']}.", "", f"Origin, dates, centres: {yours}"],
        "Training data": [
            f"The training {facts['unit']}s of each fold of the same data; {facts['training']}; {facts['missing']}.", "", f"Origin, consent: {yours}",
        ],
        "Quantitative analyses": [
            facts["headline"] + ".", "", *markdown_table(["Per video", *called], rows), "",
            *markdown_table(["Share of the class recognised", *called], classes), "", "Intervals, calibration and sub-groups: report.html.",
        ],
        "Ethical considerations": [f"{facts['privacy'][0].upper()}{facts['privacy'][1:]}. Approval, consent, risks: {yours}"],
        "Caveats and recommendations": [f"- {line}" for line in cautions(context.config, metrics, context.splits.warnings)],
    }
    intro = [f"# Model card: {facts['title']}", "", facts["stamp_line"], ""]
    return "\n".join(intro + [line for title, lines in topics.items() for line in (f"## {title}", "", *lines, "")])
