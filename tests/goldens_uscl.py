"""Golden arrays of the published USCL program: losses, frame pairs, split, schedules, network, names, fine-tuning rules.

Tolerance 1e-5 relative; index sets and counts exact; what the program drew at random is compared as a distribution (chi-square,
refused below p = 1e-4). Every file and array is checked. Where the program's own loss is NaN (no labelled row) ours must be the
contrastive loss alone. Schedules and metrics are those of its successor HiCo, whose checks serve for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import goldens_uscl_images
import numpy as np
import torch
from golden_tools import Mismatch, close, exact, formula_image, formula_weight, released_cases, tensor
from goldens_hico import OWN as OF_HICO
from goldens_hico import check_finetune_metrics, check_lr_finetune, check_lr_pretrain
from scipy.stats import chi2_contingency

from pipeline import losses
from pipeline.data.clips import ClipBatch, PairParams, draw_pair, mixed_pair, sample_triple, sample_weights
from pipeline.methods.base import MethodContext, Progress
from pipeline.methods.uscl import USCL, USCLParams, published_holdout, published_valid_loss
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier
from pipeline.models.published import to_trunk
from pipeline.parameters import OptimizerParams
from pipeline.training.optim import build_optimizer

Case = dict[str, np.ndarray]
UNLABELLED = 9999
TRUNK = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Behind `features.`: the program's numbers and torchvision's names."""
PARTS = {"l1": "head.0", "l2": "head.2", "fc": "classifier", "linear": "head"}
"""Layers behind the trunk: the program's names and ours; `linear` is that of the fine-tuning network."""
near = partial(close, tolerance=1e-5)


def official_method(classes: int, backbone: str = "resnet18", **changes: Any) -> USCL:
    """USCL with every option as published."""
    trunk, features = build_backbone(backbone)
    context = MethodContext(features, 300, 27, 32, classes=classes)
    return USCL(trunk, USCLParams(**{"classifier_input": "projection", **changes}), context)


# --- losses -----------------------------------------------------------------------------------------------------------


def check_ntxent(case: Case, settings: dict[str, Any]) -> None:
    raw = [tensor(case[name]).double().requires_grad_() for name in ("zi", "zj")]
    first, second = raw if settings["similarity"] == "dot_raw" else map(losses.l2_normalize, raw)
    loss = losses.nt_xent((first, second), (first, second), settings["temperature"])
    loss.backward()
    near("loss", loss, case["loss"])
    for name, rows in zip(("zi", "zj"), raw, strict=True):
        near(f"grad_{name}", rows.grad, case[f"grad_{name}"])
    if "sim" in case:
        stacked = torch.cat([second, first]).detach()
        near("sim", stacked @ stacked.T, case["sim"])


def check_semi_total(case: Case, settings: dict[str, Any]) -> None:
    params = USCLParams(temperature=settings["temperature"], supervised_weight=settings["lambda"], embedding_dim=settings["D"])
    method = USCL(torch.nn.Identity(), params, MethodContext(2, 1, 1, settings["N"], classes=settings["K"]))
    z, logits = ([tensor(case[f"{kind}_{view}"]).double().requires_grad_() for view in "ij"] for kind in ("z", "logits"))
    labels = tensor(case["labels"]).long()
    labels[labels == UNLABELLED] = -1
    total, metrics = method.objective(z, logits, labels, torch.arange(len(labels)))
    total.backward()
    labelled = bool((labels >= 0).any())
    near("ntxent", metrics["contrastive"], case["ntxent"])
    near("total", total, case["total"] if labelled else case["ntxent"])
    for view, scores in zip("ij", logits, strict=True):
        near(f"ce_{view}", losses.softened_cross_entropy(scores, labels, 0.0), case[f"ce_{view}"] if labelled else np.zeros(()))
    for kind, both in (("z", z), ("logits", logits)):
        for view, rows in zip("ij", both, strict=True):
            near(f"grad_{kind}_{view}", rows.grad, case[f"grad_{kind}_{view}"])


def check_valid_loss(case: Case, settings: dict[str, Any]) -> None:
    unit, found, begin = losses.l2_normalize(tensor(case["z"]).double()), [], 0
    for size in case["batch_sizes"]:
        views = tuple(unit[tensor(case[f"batch_rows_{view}"][begin : begin + size])] for view in "ij")
        found.append(float(losses.nt_xent(views, views, settings["temperature"])))  # type: ignore[arg-type]
        begin += size
    near("per_batch", found, case["per_batch"])
    near("valid_loss", published_valid_loss(np.array(found)), case["valid_loss"])


# --- frames of a video ------------------------------------------------------------------------------------------------


def drawn_like(indices: list[int], num_frames: int) -> dict[str, np.ndarray]:
    """What `draw_pair` gives where it draws these frame numbers."""
    for seed in range(30 * num_frames**3):
        roles = draw_pair(PairParams(), num_frames, np.random.default_rng(seed))
        first, second = roles["boundary"].tolist()
        if indices == ([first, int(roles["anchor"][0]), second] if num_frames >= 3 else [first, second]):
            return roles
    raise Mismatch(f"indices: {indices} is never drawn from {num_frames} frames")


def check_spg_pairs(case: Case, settings: dict[str, Any]) -> None:
    """The frames and the coefficient the program drew, and whether anything is mixed at all."""
    frames = tensor(case["frames"])
    roles, lam = drawn_like(case["indices"].tolist(), len(frames)), float(case["lam"])
    exact("without mixing", roles["weight"].min() == 1, lam == -1)
    weight = torch.ones(1, 2) if lam == -1 else torch.full((1, 2), lam, dtype=torch.float64)
    views = {role: frames[tensor(roles[role])][None] for role in ("boundary", "anchor")}
    label = torch.tensor([-1 if not settings["labelled"] else int(case["label"])])
    batch = ClipBatch(views, torch.zeros(1, dtype=torch.int64), label, {"weight": weight})
    for number, view in enumerate(mixed_pair(batch), start=1):
        near(f"view{number}", view[0], case[f"view{number}"])
    near("unmixed1", views["boundary"][0, 0], case["unmixed1"])
    near("unmixed2", views["anchor"][0, 0] if len(frames) >= 3 else views["boundary"][0, 1], case["unmixed2"])
    exact("label", UNLABELLED if label < 0 else int(label), case["label"])


def alike(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two tables of counts come from one distribution; what never happens there never happens here."""
    exact(f"{name}: what is never drawn", ours[theirs == 0].sum(), 0)
    seen = theirs > 0
    p = chi2_contingency([ours[seen], theirs[seen]]).pvalue if seen.sum() > 1 else 1.0
    if p < 1e-4:
        raise Mismatch(f"{name}: another distribution, p = {p:.1e}")


def check_spg_distribution(case: Case, settings: dict[str, Any]) -> None:
    frames, draws, rng = settings["frames"], settings["draws"], np.random.default_rng(settings["seed"])
    params = PairParams(alpha=settings["beta"][0], beta=settings["beta"][1])
    triples = np.stack([sample_triple(params, frames, rng) for _ in range(draws)])
    lam = np.stack([sample_weights(params, rng) for _ in range(draws)])
    exact("one coefficient for both views", lam[:, 0], lam[:, 1])
    lam, (first, second, anchor) = lam[:, 0], triples.T
    alike("lam_hist", np.histogram(lam, case["lam_edges"])[0], case["lam_hist"])
    moments = [lam.mean(), lam.var(), (lam < 0.1).mean(), (lam > 0.9).mean()]
    spread = np.sqrt([lam.var(), ((lam - lam.mean()) ** 2).var(), *(share * (1 - share) for share in moments[2:])]) * np.sqrt(2 / draws)
    if (np.abs(moments - case["lam_moments"]) > 5 * spread).any():
        raise Mismatch(f"lam_moments: {moments}, expected {case['lam_moments']} +- {spread}")
    for name, gap in (("first_anchor", first - anchor), ("second_anchor", second - anchor), ("first_second", first - second)):
        alike(f"gap_{name}", np.bincount(np.abs(gap), minlength=frames), case[f"gap_{name}"])
    alike("anchor_rank", np.bincount((triples < anchor[:, None]).sum(1), minlength=3), case["anchor_rank"])
    for name, role, theirs in zip(("first", "anchor", "second"), (first, anchor, second), case["frame_use"], strict=True):
        alike(f"frame_use of {name}", np.bincount(role, minlength=frames), theirs)


def check_video_split(case: Case, settings: dict[str, Any]) -> None:
    training, validation = published_holdout(settings["videos"], settings["valid_fraction"])
    exact("train", training, case["train"])
    exact("valid", validation, case["valid"])


# --- networks ---------------------------------------------------------------------------------------------------------


def our_name(key: str) -> str:
    """The name of a published tensor in our networks."""
    first, number, *rest = key.split(".")
    return ".".join(["backbone", TRUNK[number], *rest] if first == "features" else [PARTS[first], number])


def official_names(method: USCL) -> dict[str, str]:
    """Our name of every tensor of the pretraining networks, and the published one."""
    trunk, parts = ({own: name for name, own in table.items()} for table in (TRUNK, PARTS))
    found = {}
    for name in method.networks.state_dict():
        first, child, *rest = name.split(".")
        part, kind = name.rsplit(".", 1)
        found[name] = ".".join(["features", trunk[child], *rest]) if first == "backbone" else f"{parts[part]}.{kind}"
    return found


def check_network(case: Case, settings: dict[str, Any]) -> None:
    method = official_method(settings["num_classes"])
    method.networks.double().train(settings["mode"].startswith("train"))
    state, names = method.networks.state_dict(), official_names(method)
    published = {key: formula_weight(key, state[name].shape, settings["salt"]) for name, key in names.items()}
    method.backbone.load_state_dict(to_trunk(published, "resnet18")[0])
    heads = {name: published[key] for name, key in names.items() if not name.startswith("backbone.")}
    method.networks.load_state_dict(heads, strict=False)
    images = torch.stack([formula_image(k, settings["image"], settings["salt"]) for k in range(settings["batch"])])
    with torch.no_grad():
        for name, found in zip(("h", "z", "logits"), method.embed(images), strict=True):
            near(name, found, case[name])


def check_checkpoint_keys(content: dict[str, Any]) -> None:
    """The file's trunk under torchvision's names; behind it the layers that a loss reaches, and none of the others."""
    listed = {entry["key"]: entry for entry in content["keys"]}
    tensors = {key: formula_weight(key, entry["shape"], dtype=torch.float32) for key, entry in listed.items()}
    trunk, report = to_trunk(tensors, "resnet18")
    plain = {entry["torchvision_key"]: key for key, entry in listed.items() if entry["torchvision_key"]}
    exact("torchvision names", sorted(trunk), sorted(plain))
    for name, value in trunk.items():
        exact(f"values of {name}", value, tensors[plain[name]])
    exact("not of the trunk", report.unexpected, sorted(set(listed) - set(plain.values())))
    method = official_method(listed["fc.weight"]["shape"][0])
    names = official_names(method)
    for name, value in method.networks.state_dict().items():
        exact(f"shape of {names[name]}", value.shape, listed[names[name]]["shape"])
    images = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = ClipBatch({"boundary": images, "anchor": images[:, :1]}, torch.arange(2), torch.arange(2), {"weight": torch.full((2, 2), 0.5)})
    method.step(batch, Progress(0, 0)).loss.backward()
    reached = [names[name] for name, weight in method.networks.named_parameters() if weight.grad is not None]
    exact("receives_gradient", sorted(reached), sorted(key for key, entry in listed.items() if entry["receives_gradient"]))


def check_finetune_parameters(content: dict[str, Any]) -> None:
    """One step at 32 pixels, to be quick. Without the program's second classifier, which trains in name only."""
    listed = {p["name"]: p for p in content["parameters"] if p["received_gradient"] or not p["trainable"]}
    kept, dropped = content["checkpoint_keys_kept"], content["checkpoint_keys_dropped"]
    source, _ = build_backbone("resnet18", 1)
    shapes = {key: list(value.shape) for key, value in source.state_dict().items()}
    classes = listed["linear.bias"]["shape"][0]
    plain = {key: our_name(key).removeprefix("backbone.") for key in kept}
    checkpoint = {key: formula_weight(key, shapes[name], dtype=torch.float32) for key, name in plain.items()}
    trunk, report = to_trunk(checkpoint | {key: torch.zeros(1) for key in dropped}, "resnet18")
    exact("checkpoint_keys_kept", sorted(trunk), sorted(plain.values()))
    exact("checkpoint_keys_dropped", report.unexpected, sorted(dropped))
    exact("kept_keys_equal_in_network", all(torch.equal(trunk[name], checkpoint[key]) for key, name in plain.items()), True)
    source.load_state_dict(trunk)
    network = Classifier(source, "resnet18", 512, classes, head="linear", trainable="layer4.1", batchnorm="train")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.training_mode(0)
    optimizer = build_optimizer(OptimizerParams(name="adam", lr=0.01, weight_decay=1e-4), network)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(network(images), torch.arange(6) % classes).backward()
    optimizer.step()
    found = dict(network.named_parameters())
    exact("parameters", sorted(found), sorted(map(our_name, listed)))
    for key, entry in listed.items():
        weight = found[our_name(key)]
        exact(f"{key}: shape", weight.shape, entry["shape"])
        exact(f"{key}: trainable", weight.requires_grad, entry["trainable"])
        exact(f"{key}: received_gradient", weight.grad is not None, entry["received_gradient"])
    exact("trainable", sorted(n for n, w in found.items() if w.requires_grad), sorted(our_name(k) for k in content["trainable"] if k in listed))
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    exact("state_changed_by_training", sorted(changed), sorted(map(our_name, content["state_changed_by_training"])))


CHECKS: dict[str, Callable[[Case, dict[str, Any]], None]] = {
    "ntxent": check_ntxent, "semi_total": check_semi_total, "valid_loss": check_valid_loss, "spg_pairs": check_spg_pairs,
    "spg_distribution": check_spg_distribution, "video_split": check_video_split, "network": check_network, "lr_pretrain": check_lr_pretrain,
    "lr_finetune": check_lr_finetune, "finetune_metrics": check_finetune_metrics, **goldens_uscl_images.CHECKS,
}
FACTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "checkpoint_keys": check_checkpoint_keys, "finetune_parameters": check_finetune_parameters,
}
"""Files of facts beside index.json, which does not list them."""


def recognises(index: Any) -> bool:
    """Whether `index.json` describes cases of this format."""
    files = index.get("files") if isinstance(index, dict) else None
    return isinstance(files, dict) and any(name.startswith(tuple(CHECKS)) for name in files) and not any(
        name.startswith(OF_HICO) for name in files
    ) and all(isinstance(f, dict) and f.get("cases") and all("id" in c for c in f["cases"]) for f in files.values())


def cases(folder: Path, index: Any) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(file, case, check) of every case; the check raises `Mismatch` where the arrays are not reproduced."""
    yield from released_cases(folder, index, CHECKS, FACTS)
