"""The model card of exported weights: MODEL_CARD.md for people, MODEL_CARD.json for programs, commands that load them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.model_card import NOT_FOR, USE, markdown_table
from pipeline.evaluation.report import stamp_words

__all__ = ["load_snippet", "render_card"]

_OTHER_WEIGHTS = " Pretraining started from other weights (`start` below), whose licence applies as well."


def _torch_network(about: Mapping[str, Any], library: str) -> list[str]:
    """Lines that build the library's network for the weights, classifier included."""
    network, classes = about["network"], len(about["classes"])
    linear = about["head"] == "linear"
    if library == "timm":
        name, patch = network["timm_name"], network["patch_size"]
        size = f", img_size={network['image_size']}" if patch else ""
        # timm has names for the usual patch sizes only; the others are the same network with another one.
        size += f", patch_size={patch}" if patch and f"patch{patch}_" not in name else ""
        lines = ["import timm", "import torch", "", f"network = timm.create_model({name!r}, num_classes={classes if linear else 0}{size})"]
        top = "head" if network["patch_size"] else "fc"
    elif network["name"]:
        count = f", num_classes={classes}" if linear else ""
        lines = ["import torch", "import torchvision", "", f"network = torchvision.models.get_model({network['name']!r}, weights=None{count})"]
        top = "fc"
    else:
        lines = ["import torch", "from torchvision.models.resnet import BasicBlock, ResNet", ""]
        lines += [f"network = ResNet(BasicBlock, {network['blocks']}" + (f", num_classes={classes})" if linear else ")")]
        top = "fc"
    if not classes:
        return lines + ([f"network.{top} = torch.nn.Identity()"] if library != "timm" else [])
    if not linear:
        layers = f"torch.nn.Linear({network['feature_dim']}, 256), torch.nn.ReLU(), torch.nn.Dropout(0.4), torch.nn.Linear(256, {classes})"
        lines += [f"network.{top} = torch.nn.Sequential({layers})"]
    return lines


def load_snippet(about: Mapping[str, Any], form: str, file: str) -> str:
    """Python that loads `file` (of the form torchvision, timm, safetensors or onnx) and runs it on `images`."""
    result = "logits" if about["classes"] else "features"
    if form == "onnx":
        return "\n".join([
            "import onnxruntime", "", f"session = onnxruntime.InferenceSession({file!r}, providers=['CPUExecutionProvider'])",
            f"({result},) = session.run(None, {{'images': images}})",
        ])
    library = form if form in ("torchvision", "timm") else about["network"]["library"]
    lines = _torch_network(about, library)
    if form == "safetensors":
        lines.insert(0, "from safetensors.torch import load_file")
        lines.append(f"network.load_state_dict(load_file({file!r}))")
    else:
        lines.append(f"network.load_state_dict(torch.load({file!r}, weights_only=True))")
    lines += ["network.eval()", "with torch.no_grad():", f"    {result} = network(torch.as_tensor(images))"]
    return "\n".join(lines)


def _table(rows: Mapping[str, Any]) -> list[str]:
    return markdown_table(["", ""], [[name, f"{value:.4g}" if isinstance(value, float) else value] for name, value in rows.items()])


def _metrics(about: Mapping[str, Any]) -> list[str]:
    found = about["metrics"]
    if not found:
        return ["No result is known for these weights: evaluate them on patients they have not seen before you rely on them."]
    values, rows = found["values"], {}
    for name, value in values.items():
        if name.endswith(("_low", "_high")):
            continue
        rows[name] = f"{value:.4g}"
        if f"{name}_low" in values and found.get("confidence"):
            rows[name] += f" ({found['confidence']:.0%} interval {values[f'{name}_low']:.3g} to {values[f'{name}_high']:.3g})"
    return [f"Source: {found['source']}.", "", *_table(rows)]


def _labels(about: Mapping[str, Any]) -> str:
    """What pretraining knew: nothing, or the labels of so many patients; classes with their labelled videos."""
    told = about["pretraining_labels"]
    if told is None:
        return "not recorded"
    if not told["videos"]:
        return "none"
    counts = ", ".join(f"{name} {count}" for name, count in told["videos"].items())
    return f"labels of {told['patients']} patients ({sum(told['videos'].values())} videos: {counts})"


def _warnings(about: Mapping[str, Any]) -> list[str]:
    lines = []
    if about["transductive"]:
        lines.append(
            "**Transductive**: pretraining saw frames of every patient of the corpus, test patients included (without their labels). "
            "Results on this corpus are too good for new patients."
        )
    if about["stamp"]:
        lines += [f"**{about['stamp']}**", *stamp_words(about["stamp"]), "The numbers are too good for new patients."]
    return [line for text in lines for line in (text, "")]


def _preprocessing(about: Mapping[str, Any]) -> list[str]:
    rules = about["preprocessing"]
    size = rules["size"]
    stored = ", ".join(f"{key} {value}" for key, value in rules["extraction"].items())
    shrink = f"shrink so that the short side has {rules['stored_short_side']} pixels if it has more; " if rules["stored_short_side"] else ""
    side = rules["working_size"]
    fit = f"resize to {side} x {side}" if rules["resize"] == "square" else f"resize the short side to {side} pixels, cut out the central square"
    last = f"; bring it to {size} x {size} (linear)" if side != size else ""
    colour = {"gray": "convert to grey; ", "rgb": "RGB; "}.get(rules["color"], "(grey or RGB: not recorded); ")
    return [
        f"1. {colour}{shrink}{fit} (area averaging when shrinking){last}.",
        f"2. Divide by 255, subtract {rules['mean']}, divide by {rules['std']} per channel ({rules['normalization']}).",
        f"3. Give the network float32 [B, 3, {size}, {size}]; grey fills the three channels.",
        *(["", f"Frames of the training videos were stored with {stored}."] if stored else []),
    ]


def render_card(about: Mapping[str, Any], exported: Mapping[str, Any]) -> str:
    """MODEL_CARD.md. `exported`: form, file, git_revision, check (what was compared, with the largest difference)."""
    network, training = about["network"], about["training"]
    classifier = about["kind"] == "classifier"
    result = f"logits of the classes {', '.join(about['classes'])}" if classifier else f"features, {network['feature_dim']} numbers an image"
    facts = {
        "kind": about["kind"], "backbone": network["backbone"], "head": about["head"] or "none", "gives": result,
        "pretraining": training.get("method", about["name"].rsplit(", ")[-1]), "scope of pretraining": about["scope"],
        "labels in pretraining": _labels(about),
        "outer fold": "unknown" if about["fold"] is None else about["fold"], "fingerprint": about["fingerprint"],
    }
    settings = {key: value for key, value in training.items() if key not in ("method", "parameters")}
    settings |= {f"method: {key}": value for key, value in (training.get("parameters") or {}).items()}
    known = {"none": " without labels", "not recorded": ""}.get(_labels(about), f" with {_labels(about)}")
    intro = [
        f"# {about['name']}", "",
        f"{'A classifier of' if classifier else 'An encoder for'} ultrasound or endoscopy frames, trained by Sonoscope"
        f"{'' if classifier else known}. File: `{exported['file']}` ({exported['form']}).", "", *_warnings(about),
    ]
    use = [USE, "", NOT_FOR]
    licence = [
        "Licence of the training data: **to be filled in** by whoever shares this file (may weights trained on these data be passed on?).", "",
        f"Licence of these weights: **to be filled in**.{_OTHER_WEIGHTS if training['start'] != 'random' else ''}",
    ]
    size = about["preprocessing"]["size"]
    load = [
        f"`images` is float32 [B, 3, {size}, {size}], prepared as described below.", "",
        "```python", load_snippet(about, exported["form"], exported["file"]), "```",
    ]
    made = {**about["versions"], "git revision at export": exported["git_revision"] or "unknown", "check": exported["check"]}
    sections = {
        "What it is": _table(facts), "Load it": load, "Preprocessing": _preprocessing(about), "Intended use": use, "Data": _table(about["data"]),
        "Results": _metrics(about), "Training": _table(settings), "Licence": licence, "Made with": _table(made),
    }
    return "\n".join(intro + [line for title, lines in sections.items() for line in (f"## {title}", "", *lines, "")])
