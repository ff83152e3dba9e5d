"""`sonoscope export`: weights of ours as a file that torchvision, timm, safetensors or an ONNX runtime loads without us.

Every file is loaded again by the library it is for and compared with our own network on pictures before it counts as written.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint import read_state_dict, save_tensors
from pipeline.data.transforms import normalize
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.export.card import render_card
from pipeline.export.facts import LIBRARY_HEADS, Weights, about, check_form, find_weights
from pipeline.files import atomic_write, read_json, write_json
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier
from pipeline.scorer import build_network, head_name
from pipeline.tracking_context import git_revision

__all__ = ["FORMS", "TOLERANCE", "export", "library_network", "load_network", "plain_state", "sample_images"]

FORMS = {"torchvision": ".pth", "timm": ".pth", "safetensors": ".safetensors", "onnx": ".onnx"}
TOLERANCE = 1e-4
"""Largest difference between the outputs of the exported network and ours on the sample images: as a share of the largest
output where that exceeds 1, since float32 keeps seven digits of it and no more."""


def load_network(weights: Weights, image_size: int | None = None) -> nn.Module:
    """Our own network with these weights, in evaluation mode. Images [B, 3, H, W] -> features [B, F] or outputs of `Classifier`.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
    """
    card, state = weights.card, read_state_dict(weights.path, "export")
    try:
        backbone, features = build_backbone(card["backbone"], image_size=card["image_size"])
        network: nn.Module = backbone
        if weights.kind == "classifier":
            head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
            network = Classifier(
                backbone, card["backbone"], features, len(card["classes"]), head=card["head"], trainable="linear", batchnorm="frozen",
                image_size=card["image_size"], extras=None if card["head"] in LIBRARY_HEADS else head,
                pooling=card.get("pooling", "mean"),
            )
    except ConfigError as error:
        raise CheckpointError(f"export: the card beside the weights does not fit this version. {error}") from None
    _load_strictly(network, state, f"{weights.path} into {card['backbone']}")
    if image_size and image_size != card["image_size"] and getattr(network, "info", None) and card["head"] not in LIBRARY_HEADS:
        raise CheckpointError(f"export: --image-size {image_size}: the head {card['head']} works at {card['image_size']} pixels only")
    return network.eval()


def _load_strictly(network: nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    wanted = network.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    if missing or extra or wrong:
        kinds = {"missing": missing, "too many": extra, "of another shape": wrong}
        found = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
        raise CheckpointError(f"export: {what}: tensors do not fit: {'; '.join(found)}. Is the card beside the weights theirs?")
    network.load_state_dict(state)


def plain_state(weights: Weights, table: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors under the names of torchvision (`fc.` for the classifier) or, for a transformer, timm (`head.`)."""
    state = read_state_dict(weights.path, "export")
    if weights.kind == "encoder":
        return state
    if weights.card["head"] not in LIBRARY_HEADS:
        raise CheckpointError(
            f"export: the head {weights.card['head']} takes several levels of features, which no classifier of torchvision or timm does. "
            f"Use --to onnx, or export the encoder alone (models/encoders/fold<K>)."
        )
    top = head_name(table)
    return {
        name.removeprefix("backbone.") if name.startswith("backbone.") else f"{top}.{name.removeprefix('head.')}": value
        for name, value in state.items()
    }


def library_network(table: Mapping[str, Any], library: str, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network of `library` (torchvision or timm) with a `plain_state`, in evaluation mode."""
    network = build_network({**table, "network": {**table["network"], "library": library}})
    _load_strictly(network, state, f"the weights into {library}'s {table['network']['backbone']}")
    return network.eval()


def sample_images(size: int, statistics: str, count: int = 4) -> torch.Tensor:
    """Normalised test pictures: half noise, half smooth fans as of a convex probe. float32 [2 count, 3, size, size], seeded."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    angle, depth = np.arctan2(x - 0.5, y + 0.2), np.hypot(x - 0.5, y + 0.2)
    pictures = [rng.integers(0, 256, (size, size)) for _ in range(count)]
    for _ in range(count):
        tissue = 0.5 + 0.5 * np.sin(rng.uniform(20, 60) * depth + 4 * np.sin(rng.uniform(2, 9) * angle))
        pictures.append(255 * tissue * rng.uniform(0.6, 1, (size, size)) * (np.abs(angle) < 0.6))
    return normalize(torch.from_numpy(np.stack(pictures).astype(np.uint8)), statistics)


def _onnx_bytes(network: nn.Module, images: torch.Tensor, result: str, opset: int | None) -> bytes:
    """The network as one ONNX file with a free batch size."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PipelineError(f'export: --to onnx needs the package {error.name}: pip install "sonoscope[export]"') from None
    target = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        shape = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
        program = torch.onnx.export(
            network, (images[:2],), dynamo=True, input_names=["images"], output_names=[result], dynamic_shapes=(shape,),
            opset_version=opset, external_data=False, verbose=False,
        )
        program.save(str(path), external_data=False)
        target.write(path.read_bytes())
    return target.getvalue()


def _run_onnx(data: bytes, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # One, several, and the rest: the batch is free.
    parts = [images[:1], images[1:4], images[4:]]
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"images": part})[0] for part in parts])
    except Exception as error:  # the runtime has a class of error for each of its codes
        raise PipelineError(f"export: onnxruntime cannot run the exported network ({str(error)[:300]}); another --opset may help") from None


def _difference(found: np.ndarray, wanted: np.ndarray, form: str) -> str:
    """The largest difference in words; refused above TOLERANCE."""
    difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    scale = float(np.abs(wanted).max())
    if not difference <= TOLERANCE * max(1.0, scale):
        raise PipelineError(
            f"export: the {form} file gives other numbers than the original network (largest difference {difference:.2g}, outputs up to "
            f"{scale:.2g}, allowed {TOLERANCE:g} of that); nothing was written. Please report it with the versions that `sonoscope doctor` prints."
        )
    return f"{len(wanted)} pictures, largest difference to the original output {difference:.2g} (outputs up to {scale:.2g})"


def _written(table: dict[str, Any], weights: Weights, form: str, part: Path, images: torch.Tensor, opset: int | None) -> str:
    """Write the weights of one form to `part` and compare; returns what was found."""
    network = load_network(weights, images.shape[-1])
    with torch.no_grad():
        wanted = network(images).numpy()
    if form == "onnx":
        data = _onnx_bytes(network, images, "logits" if table["classes"] else "features", opset)
        atomic_write(part, data)
        return _difference(_run_onnx(data, images.numpy()), wanted, form)
    state = plain_state(weights, table)
    if form == "safetensors":
        save_tensors(part, state, {"schema": 1, "backbone": table["network"]["backbone"], "classes": table["classes"]})
    else:
        buffer = io.BytesIO()
        torch.save({name: value.clone() for name, value in state.items()}, buffer)
        atomic_write(part, buffer.getvalue())
    library = table["network"]["library"] if form == "safetensors" else form
    with torch.no_grad():
        found = library_network(table, library, read_state_dict(part, "export"))(images)
    return _difference(found.numpy(), wanted, form)


def export(target: Path, form: str, out: Path | None = None, *, image_size: int | None = None, opset: int | None = None) -> list[str]:
    """Export the weights in `target` (see `find_weights`) and their model card; returns lines that say what was written.

    Args:
        form: one of FORMS. out: file to write; by default exports/<name of the folder>-<form>/<backbone>-<kind>.<suffix>.
            MODEL_CARD.md and MODEL_CARD.json are written beside it. image_size: side of the images, default that of training.
        opset: of ONNX; None leaves it to torch.

    Raises:
        CheckpointError: not weights of ours, or not of the wanted form. PipelineError: a package is missing, or the exported
            network gives other numbers than ours.
    """
    weights = find_weights(target)
    if form not in FORMS:
        raise PipelineError(f"export: --to {form}: allowed are {', '.join(FORMS)}")
    check_form(weights, form)
    table = about(weights)
    size = image_size or table["preprocessing"]["size"]
    rules = table["preprocessing"]
    rules["working_size"] = round(rules["working_size"] * _fitting_size(table, size) / rules["size"])
    rules["size"] = size
    folder_name = f"{weights.path.resolve().parent.name}-{form}"
    out = Path(out or Path("exports") / folder_name / f"{weights.card['backbone']}-{weights.kind}{FORMS[form]}")
    if out.suffix != FORMS[form]:
        raise PipelineError(f"export: --out {out.name}: a file for {form} ends in {FORMS[form]}")
    _refuse_other_card(out)
    images = sample_images(size, table["preprocessing"]["normalization"])
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        part = folder / out.name
        check = _written(table, weights, form, part, images, opset)
        exported = {"form": form, "file": out.name, "git_revision": git_revision(), "check": check}
        os.replace(part, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    atomic_write(out.with_name("MODEL_CARD.md"), render_card(table, exported))
    write_json(out.with_name("MODEL_CARD.json"), table | {"export": exported})
    return [f"{out}: {out.stat().st_size / 1e6:.1f} MB, {form}; {check}", f"{out.with_name('MODEL_CARD.md')}: what it is and how to load it"]


def _refuse_other_card(out: Path) -> None:
    """A folder has one card, and it must be that of the file."""
    card = out.with_name("MODEL_CARD.json")
    if card.is_file() and (other := read_json(card).get("export", {}).get("file")) != out.name:
        raise PipelineError(f"export: {out.parent} holds the model card of {other}. Give another folder (--out), or delete the card.")


def _fitting_size(table: Mapping[str, Any], size: int) -> int:
    """`size`, if the network takes images of it."""
    network = table["network"]
    if network["patch_size"] and size != network["image_size"]:
        raise CheckpointError(
            f"export: --image-size {size}: {network['backbone']} has learnt positions for images of {network['image_size']} pixels; leave it out"
        )
    if size < 32:
        raise CheckpointError(f"export: --image-size {size}: at least 32 pixels are needed")
    return size
