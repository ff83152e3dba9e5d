"""Golden arrays of the published HiCo program: losses, whole steps, pyramid, networks, names, schedules, fold metrics.

Tolerance 1e-5 relative, `network_224` 1e-3 (single precision). Every file and array is checked; `network_224` builds 1.1 GB
of weights. Shapes alone are computed on torch's meta device, which holds no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import close, exact, formula_image, formula_weight, released_cases, tensor

from pipeline import losses
from pipeline.data.clips import ClipBatch
from pipeline.evaluation.metrics import Scores, classification_metrics, select_epoch
from pipeline.methods.base import MethodContext, Progress
from pipeline.methods.hico import HiCo, HiCoParams
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier
from pipeline.models.levels import Pyramid, pooled, stage_channels, stage_maps
from pipeline.models.published import to_extras, to_trunk
from pipeline.parameters import OptimizerParams
from pipeline.training.optim import build_optimizer, learning_rate

Case = dict[str, np.ndarray]
TOLERANCE = 1e-5
LEVELS = ("local", "medium", "global")
TRUNK = "features.R18."
OFFICIAL: dict[str, Any] = {
    "cross_level": "within_view", "medium_level": "p3", "smooth_p5": False, "classifier_input": "pooled", "soft_label": "batch_divisor",
    "projector_pool": "flatten",
}
near = partial(close, tolerance=TOLERANCE)


PARTS = ("toplayer", "latlayer1", "latlayer2", "latlayer3", "smooth1", "smooth2", "smooth3")
BESIDE = [f"{part}.{kind}" for part in (*(f"features.{part}" for part in PARTS), "l2", "l3", "l4", "l5", "l22", "l33", "l55", "lf", "fc")
          for kind in ("weight", "bias")]
# The importer is asked name by name; the trunk's first convolution shows it whose file this is.
NAMES = {next(iter(to_extras({f"{TRUNK}conv1.weight": torch.zeros(1), name: torch.zeros(1)}))): name for name in BESIDE}
"""Our names of what HiCo has beside its trunk, to the published ones."""


def official_name(ours: str) -> str:
    """The published name of a tensor of `HiCo.networks`."""
    return TRUNK + ours.removeprefix("backbone.") if ours.startswith("backbone.") else NAMES[ours]


def official_method(image_size: int, classes: int, backbone: str = "resnet18", **changes: Any) -> HiCo:
    """HiCo with every option as published."""
    trunk, features = build_backbone(backbone)
    return HiCo(trunk, HiCoParams(**{**OFFICIAL, **changes}), MethodContext(features, 300, 27, 32, 0, image_size, classes))


# --- losses -----------------------------------------------------------------------------------------------------------


def _embeddings(case: Case) -> list[dict[str, torch.Tensor]]:
    return [{level: tensor(case[f"{level}_{view}"]).double().requires_grad_() for level in LEVELS} for view in "ij"]


def _check_gradients(case: Case, raw: list[dict[str, torch.Tensor]]) -> None:
    for view, embeddings in zip("ij", raw, strict=True):
        for level, rows in embeddings.items():
            near(f"grad_{level}_{view}", rows.grad, case[f"grad_{level}_{view}"])


def check_hierarchical(case: Case, settings: dict[str, Any]) -> None:
    raw = _embeddings(case)
    unit = tuple({level: losses.l2_normalize(rows) for level, rows in view.items()} for view in raw)
    terms = losses.hierarchical_contrast(unit, unit, settings["temperature"], "within_view")
    for name, value in terms.items():
        near(name, value, case[name])
    total = settings["peer_weight"] * terms["peer"] + settings["cross_weight"] * terms["cross"]
    near("total", total, case["total"])
    total.backward()
    _check_gradients(case, raw)
    figure = losses.hierarchical_contrast(unit, unit, settings["temperature"], "cross_view")
    near("cross_view_gm", figure["global_medium"], case["cross_view_gm"])
    near("cross_view_gl", figure["global_local"], case["cross_view_gl"])


def check_soft_ce(case: Case, settings: dict[str, Any]) -> None:
    logits, labels = tensor(case["logits"]).double().requires_grad_(), tensor(case["labels"])
    alpha, rows = settings["alpha"], torch.tensor(len(labels))
    targets = losses.soft_targets(labels, logits.shape[1], alpha, rows, "batch_divisor")
    near("soft_targets", targets, case["soft_targets"])
    near("row_sum", targets.sum(1), np.broadcast_to(case["row_sum"], len(labels)))
    loss = losses.softened_cross_entropy(logits, labels, alpha, form="batch_divisor")
    near("loss", loss, case["loss"])
    loss.backward()
    near("grad_logits", logits.grad, case["grad_logits"])
    near("loss_hard", losses.softened_cross_entropy(logits, labels, 0.0), case["loss_hard"])


class ReplayedHiCo(HiCo):
    """HiCo whose network outputs are read from the case."""

    outputs: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]

    def embed(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return next(self.outputs)


def check_step_total(case: Case, settings: dict[str, Any]) -> None:
    trunk, features = build_backbone("resnet10")
    params = HiCoParams(
        **OFFICIAL, temperature=settings["temperature"], alpha=settings["alpha"], supervised_weight=settings["lambda"], embedding_dim=settings["D"],
    )
    method = ReplayedHiCo(trunk, params.model_copy(update={"projector_pool": "gap"}), MethodContext(features, 1, 1, settings["N"], classes=settings["K"]))
    raw = _embeddings(case)
    logits = [tensor(case[f"logits_{view}"]).double().requires_grad_() for view in "ij"]
    method.outputs = zip(raw, logits, strict=True)
    labels = np.where(case["labels"] == 9999, -1, case["labels"]).astype(np.int64)
    frames = {"boundary": torch.zeros(len(labels), 2, 3, 1, 1), "anchor": torch.zeros(len(labels), 1, 3, 1, 1)}
    batch = ClipBatch(frames, torch.arange(len(labels)), tensor(labels), {"weight": torch.ones(len(labels), 2)})
    output = method.step(batch, Progress(0, 0))
    near("total", output.loss, case["total"])
    contrastive = 0.5 * output.metrics["peer"] + 0.5 * output.metrics["cross"]
    near("contrastive", contrastive, case["contrastive"])
    near("mean of soft_ce", output.metrics["cross_entropy"], (case["soft_ce_i"] + case["soft_ce_j"]) / 2)
    output.loss.backward()
    _check_gradients(case, raw)
    for view, rows in zip("ij", logits, strict=True):
        own = losses.softened_cross_entropy(rows, tensor(labels), settings["alpha"], form="batch_divisor")
        near(f"soft_ce_{view}", own, case[f"soft_ce_{view}"])
        near(f"grad_logits_{view}", rows.grad, case[f"grad_logits_{view}"])


# --- networks ---------------------------------------------------------------------------------------------------------

STEP = {"p2": 4, "p3": 2, "p4": 1, "p5": 1}
"""Every how many rows and columns of a pyramid map are in the case."""


def check_fpn(case: Case, settings: dict[str, Any]) -> None:
    trunk, _ = build_backbone("resnet18")
    pyramid = Pyramid(stage_channels(trunk))
    for prefix, module in (("backbone.", trunk), ("pyramid.", pyramid)):
        names = {name: official_name(prefix + name).removeprefix("features.") for name in module.state_dict()}
        module.double().load_state_dict({
            name: formula_weight(official, module.state_dict()[name].shape, settings["salt"]) for name, official in names.items()
        })
        module.train(settings["mode"] == "train")
    images = torch.stack([formula_image(i, settings["image"], settings["salt"]) for i in range(settings["batch"])])
    with torch.no_grad():
        stages = stage_maps(trunk, images)
        maps = pyramid(stages)
    near("pooled", pooled(stages), case["pooled"])
    for name, found in maps.items():
        exact(f"shape of {name}", found.shape, settings["shapes"][name])
        near(name, found[:, : case[name].shape[1], :: STEP[name], :: STEP[name]], case[name])


def check_network(case: Case, settings: dict[str, Any]) -> None:
    with torch.device("meta"):  # without 270 million random numbers that are not wanted
        method = official_method(settings["image"][-1], case["logits"].shape[1])
    own = method.networks.to_empty(device="cpu").state_dict()
    for name, value in own.items():
        value.copy_(formula_weight(official_name(name), value.shape, settings["salt"], torch.float32))
    method.networks.train(settings["mode"] == "train")
    images = torch.stack([formula_image(i, settings["image"], settings["salt"], torch.float32) for i in range(settings["batch"])])
    with torch.no_grad():
        embeddings, logits = method.embed(images)
    for name, value in {**embeddings, "logits": logits}.items():
        close(name, value, case[name], tolerance=1e-3)


def check_fpn_shapes(content: dict[str, Any]) -> None:
    for backbone, sizes in content["shapes"].items():
        with torch.device("meta"):
            trunk, _ = build_backbone(backbone)
            pyramid = Pyramid(stage_channels(trunk))
            for size, shapes in sizes.items():
                stages = stage_maps(trunk, torch.zeros(2, 3, *map(int, size.split("x"))))
                maps = {name: list(found.shape[1:]) for name, found in pyramid(stages).items()}
                exact(f"{backbone} {size}: names", sorted({*maps, "pooled"}), sorted(shapes))
                for name, shape in maps.items():
                    exact(f"{backbone} {size}: {name}", shape, shapes[name])
                exact(f"{backbone} {size}: pooled", [*pooled(stages).shape[1:], 1, 1], shapes["pooled"])


# --- names ------------------------------------------------------------------------------------------------------------


def check_checkpoint_keys(content: dict[str, Any]) -> None:
    """The file's names and shapes are those of our networks; parameters no loss reaches do not exist here."""
    listed = {entry["key"]: entry for entry in content["keys"]}
    classes = listed["fc.weight"]["shape"][0]
    with torch.device("meta"):
        full = {official_name(name): value for name, value in official_method(224, classes).networks.state_dict().items()}
    reached = {key for key, entry in listed.items() if entry["receives_gradient"]}
    exact("tensors", sorted(full), sorted(reached | {key for key, entry in listed.items() if entry["receives_gradient"] is None}))
    for key, value in full.items():
        exact(f"shape of {key}", value.shape, listed[key]["shape"])
    whole = {key: torch.zeros(entry["shape"]) for key, entry in listed.items()}
    trunk, report = to_trunk(whole, "resnet18")
    exact("format", report.format, "HiCo")
    plain = {entry["torchvision_key"] for entry in listed.values()} - {None, "fc.weight", "fc.bias"}
    exact("torchvision_key", sorted(trunk), sorted(plain))
    exact("what is beside the trunk", sorted(to_extras(whole)), sorted(ours for ours, key in NAMES.items() if key in listed))
    method = official_method(32, classes, projector_pool="gap")
    images = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = ClipBatch({"boundary": images, "anchor": images[:, :1]}, torch.arange(2), torch.arange(2), {"weight": torch.full((2, 2), 0.5)})
    method.step(batch, Progress(0, 0)).loss.backward()
    found = {official_name(name) for name, weight in method.networks.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    exact("receives_gradient", sorted(found), sorted(reached))


def _finetuning_name(ours: str) -> str:
    """The published name of a tensor of our fine-tuning network."""
    part = ours.removeprefix("head.")
    if part.startswith("linear."):
        return part
    return official_name(part.replace("features.", "classifier.0.") if ours.startswith("head.") else ours)


def _finetuning_step(classes: int) -> tuple[set[str], set[str], set[str]]:
    """(names that keep the values of a checkpoint, that have a gradient, that one step changes), at 32 pixels to be quick."""
    source = official_method(32, 2)
    with torch.no_grad():
        for weight in source.networks.parameters():
            weight.add_(1)
    checkpoint = {official_name(f"backbone.{name}"): value for name, value in source.backbone.state_dict().items()}
    checkpoint |= {official_name(name): value for name, value in source.exports().items()}
    trunk, features = build_backbone("resnet18", 1)
    trunk.load_state_dict(to_trunk(checkpoint, "resnet18")[0])
    network = Classifier(
        trunk, "resnet18", features, classes, head="hico_official", trainable="layer4.1", batchnorm="train", image_size=32,
        extras=to_extras(checkpoint),
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    named = {name: _finetuning_name(name) for name in before}
    kept = {named[n] for n, v in before.items() if named[n] in checkpoint and torch.equal(v, checkpoint[named[n]])}
    network.training_mode(0)
    optimizer = build_optimizer(OptimizerParams(name="adam", lr=0.01), network)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(network(images), torch.arange(4) % classes).backward()
    optimizer.step()
    gradient = {named[n] for n, weight in network.named_parameters() if weight.grad is not None}
    return kept, gradient, {named[n] for n, value in network.state_dict().items() if not torch.equal(value, before[n])}


def check_finetune_parameters(content: dict[str, Any]) -> None:
    """Without the program's second classifier, which trains in name only, and the trunk's own: nothing they compute is used."""
    unused = {p["name"] for p in content["parameters"] if p["trainable"] and not p["received_gradient"]}
    unused |= {f"{TRUNK}fc.weight", f"{TRUNK}fc.bias"}
    listed = {p["name"]: p for p in content["parameters"] if p["name"] not in unused}
    classes = listed["linear.bias"]["shape"][0]
    with torch.device("meta"):
        trunk, features = build_backbone("resnet18")
        network = Classifier(
            trunk, "resnet18", features, classes, head="hico_official", trainable="layer4.1", batchnorm="train", image_size=224
        )
    found = {_finetuning_name(name): weight for name, weight in network.named_parameters()}
    exact("parameters", sorted(found), sorted(listed))
    for name, weight in found.items():
        exact(f"shape of {name}", weight.shape, listed[name]["shape"])
        exact(f"trainable: {name}", weight.requires_grad, listed[name]["trainable"])
    exact("trainable", sorted(n for n, w in found.items() if w.requires_grad), sorted(set(content["trainable"]) - unused))
    kept, gradient, changed = _finetuning_step(classes)
    exact("received_gradient", sorted(gradient), sorted(n for n, p in listed.items() if p["received_gradient"]))
    # The 3x3 on Q4 is in the published file, though nothing ever trained it; our pretraining does not make it.
    untrained = {"features.smooth1.weight", "features.smooth1.bias"}
    exact("checkpoint_keys_kept", sorted(kept), sorted(set(content["checkpoint_keys_kept"]) - untrained - unused))
    exact("checkpoint_keys_dropped", sorted(kept & set(content["checkpoint_keys_dropped"])), [])
    exact("kept_keys_equal_in_network", bool(kept), content["kept_keys_equal_in_network"])
    exact("state_changed_by_training", sorted(changed), sorted(content["state_changed_by_training"]))


# --- schedules and metrics --------------------------------------------------------------------------------------------


def check_lr_pretrain(case: Case, settings: dict[str, Any]) -> None:
    epochs = settings["epochs"]
    params = OptimizerParams(lr=settings["base_lr"], constant_epochs=10, schedule_epochs=epochs, per_epoch=True)
    near("lr", [learning_rate(params, epochs, epoch) for epoch in range(epochs)], case["lr"])


def check_lr_finetune(case: Case, settings: dict[str, Any]) -> None:
    epochs = settings["epochs"]
    params = OptimizerParams(lr=settings["base_lr"], schedule_epochs=epochs, per_epoch=True)
    near("lr", [learning_rate(params, epochs, epoch) for epoch in range(epochs)], case["lr"])


def _scores(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, Any]:
    units = np.array([str(i) for i in range(len(labels))])
    return classification_metrics(Scores(labels.astype(np.int64), np.eye(classes)[predicted], units, tuple(map(str, range(classes)))))


def check_finetune_metrics(case: Case, settings: dict[str, Any]) -> None:
    classes, chosen = settings["classes"], []
    for fold, (labels, epochs) in enumerate(zip(case["labels"], case["predictions"], strict=True)):
        best = select_epoch([float((row == labels).mean()) for row in epochs])
        exact(f"best_epoch of fold {fold}", best, case["best_epoch"][fold])
        numbers = _scores(labels, epochs[best], classes)
        exact(f"best_confusion of fold {fold}", numbers["confusion"], case["best_confusion"][fold])
        rows = [[numbers["per_class"][name][metric] for name in numbers["classes"]] for metric in ("precision", "recall", "f1")]
        near(f"fold_metrics of fold {fold}", rows, case["fold_metrics"][fold])
        chosen.append(epochs[best])
    total = _scores(case["labels"].ravel(), np.concatenate(chosen), classes)
    exact("total_confusion", total["confusion"], case["total_confusion"])
    for metric in ("precision", "recall"):
        near(f"total_{metric}", [total["per_class"][name][metric] for name in total["classes"]], case[f"total_{metric}"])
    near("total_accuracy", total["accuracy"], case["total_accuracy"])


CHECKS: dict[str, Callable[[Case, dict[str, Any]], None]] = {
    "hierarchical": check_hierarchical, "soft_ce": check_soft_ce, "step_total": check_step_total, "fpn": check_fpn, "network": check_network,
    "lr_pretrain": check_lr_pretrain, "lr_finetune": check_lr_finetune, "finetune_metrics": check_finetune_metrics,
}
FACTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "fpn_shapes": check_fpn_shapes, "checkpoint_keys": check_checkpoint_keys, "finetune_parameters": check_finetune_parameters,
}
"""Files of facts beside index.json, which does not list them."""
OWN = ("hierarchical", "soft_ce", "step_total", "fpn")
"""Files that only HiCo has; the others also come from its parent, USCL."""


def recognises(index: Any) -> bool:
    """Whether `index.json` describes cases of this format."""
    files = index.get("files") if isinstance(index, dict) else None
    return isinstance(files, dict) and any(name.startswith(OWN) for name in files) and all(
        isinstance(f, dict) and all("id" in c for c in f.get("cases", [])) for f in files.values()
    )


def cases(folder: Path, index: Any) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(file, case, check) of every case; the check raises where the arrays are not reproduced."""
    yield from released_cases(folder, index, CHECKS, FACTS)
