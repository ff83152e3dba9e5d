"""Golden arrays of the published MSN and EndoSSL programs: loss, balancing, schedules, transformer, whole steps, phase metrics.

Tolerances: 1e-5 for float64, 1e-4 for float32, 1e-12 for schedules, relative to max(1, largest entry) for values and to the
largest entry for gradients; whole training steps 1e-4; patch counts exact. `*_f32` scalars are what a naive program gives
(some are inf), so float32 results are compared with the float64 values instead.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from golden_tools import close, exact, tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.evaluation.phases import (
    macro_scores,
    per_phase_means,
    per_video_scores,
    phase_metrics,
)
from pipeline.losses_msn import (
    MSNTerms,
    log_assignment,
    log_sharpen,
    log_sinkhorn,
    msn_loss,
)
from pipeline.methods.base import ClipBatch, MethodContext, Progress
from pipeline.methods.msn import MSN, MSNParams, linear_momentum, sharpening
from pipeline.models.catalog import BackboneInfo
from pipeline.models.patches import class_token, kept_patches
from pipeline.models.vit import ClassTokenViT, resample_positions
from pipeline.parameters import OptimizerParams
from pipeline.training.optim import apply_schedule, build_optimizer, clip_gradients

Case = dict[str, np.ndarray]


def near(name: str, got: Any, want: np.ndarray, tolerance: float = 1e-5) -> None:
    """Largest difference relative to max(1, largest entry)."""
    want = np.asarray(want, np.float64)
    close(name, got, want, tolerance=tolerance * max(1.0, 1.0 / max(float(np.abs(want).max()), 1e-12)))


def gradient(name: str, got: Any, want: np.ndarray, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest entry, which counts as 0.01 at least (a zero gradient is rounding)."""
    close(name, got, want, tolerance=tolerance * max(1.0, 1e-2 / max(float(np.abs(want).max()), 1e-12)))


def loss_of(anchors: torch.Tensor, targets: torch.Tensor, prototypes: torch.Tensor, settings: dict[str, Any]) -> MSNTerms:
    return msn_loss(
        anchors, targets, prototypes, temperature=settings["tau"], sharpen=settings["T"],
        sinkhorn_iterations=3 if settings["sinkhorn"] else 0, me_max_weight=settings["memax_weight"] if settings["me_max"] else 0.0,
        entropy_weight=settings["ent_weight"] if settings["use_entropy"] else 0.0, smoothing=settings["label_smoothing"],
    )


def check_loss(case: Case, settings: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        anchors, targets, prototypes = (tensor(case[k]).to(dtype) for k in ("anchors", "target_in", "prototypes"))
        anchors.requires_grad_()
        prototypes.requires_grad_()
        terms = loss_of(anchors, targets, prototypes, settings)
        terms.total.backward()
        tau, smooth = settings["tau"], settings["label_smoothing"]
        target_log = log_assignment(targets, prototypes, tau, smooth)
        near("anchor_probs", log_assignment(anchors, prototypes, tau, smooth).exp(), case["anchor_probs"], tolerance)
        near("target_probs", target_log.exp(), case["target_probs"], tolerance)
        near("target_sharpened", log_sharpen(target_log, settings["T"]).exp(), case["target_sharpened"], tolerance)
        near("targets", terms.targets.exp(), case["targets"], tolerance)
        wanted = {"total": terms.total, "ce": terms.cross_entropy, "log_max_t": terms.target_max, "log_min_t": terms.target_min}
        wanted |= {"me_max": terms.me_max} if settings["me_max"] else {}
        wanted |= {"entropy": terms.entropy} if settings["use_entropy"] else {}
        for name, value in wanted.items():
            near(f"{name} in {dtype}", value, case[name], tolerance)
        exact("log_np", float(terms.clusters), float(case["log_np"]))
        gradient(f"grad_anchors in {dtype}", anchors.grad, case["grad_anchors"], tolerance)
        gradient(f"grad_prototypes in {dtype}", prototypes.grad, case["grad_prototypes"], tolerance)


def check_sinkhorn(case: Case, settings: dict[str, Any]) -> None:
    for name in (name for name in case if name.startswith("out_")):
        near(name, log_sinkhorn(tensor(case["q"]).log(), int(name.removeprefix("out_"))).exp(), case[name])


def check_sharpen(case: Case, settings: dict[str, Any]) -> None:
    for row, temperature in enumerate(case["T"]):
        near(f"T = {temperature}", log_sharpen(tensor(case["p"]).log(), float(temperature)).exp(), case["out"][row])


def optimizer_params(settings: dict[str, Any]) -> OptimizerParams:
    return OptimizerParams(
        name="adamw", lr=settings["lr"], warmup_lr=settings["start_lr"], min_lr=settings["final_lr"], stretch=settings.get("stretch", 1.25),
        warmup_epochs=settings["warmup_epochs"], weight_decay=settings["weight_decay"], weight_decay_end=settings["final_weight_decay"],
        no_decay=["one_dimensional"], clip_norm=settings.get("clip_grad", 0.0),
    )


def method_params(settings: dict[str, Any], **more: Any) -> MSNParams:
    return MSNParams(
        sharpen=settings["start_sharpen"], sharpen_end=settings["final_sharpen"], momentum=settings["start_momentum"],
        momentum_end=settings["final_momentum"], stretch=settings.get("stretch", 1.25), **more,
    )


def check_schedule(case: Case, settings: dict[str, Any]) -> None:
    params, method, each = optimizer_params(settings), method_params(settings), settings["steps_per_epoch"]
    network = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "prototypes": torch.nn.Linear(2, 2, bias=False)})
    optimizer = build_optimizer(params, network, MSN.exempt)
    place = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    groups = [place[id(w)] for w in (network["encoder"].weight, network["encoder"].bias, network["prototypes"].weight)]
    total = settings["epochs"] * each
    for step in range(len(case["momentum"])):
        close(f"momentum of step {step}", linear_momentum(method, step, total), case["momentum"][step], tolerance=1e-12)
        close(f"sharpen_T of step {step}", sharpening(method, step, total), case["sharpen_T"][step], tolerance=1e-12)
    for step in range(len(case["lr"])):
        rate = apply_schedule(optimizer, params, settings["epochs"], step / each, each)
        close(f"lr of step {step}", rate, case["lr"][step], tolerance=1e-12)
        close(f"weight decay of step {step}", groups[0]["weight_decay"], case["weight_decay"][step], tolerance=1e-12)
        got = [*(group["lr"] for group in groups), *(group["weight_decay"] for group in groups)]
        close(f"groups of step {step}", got, case["groups"][step], tolerance=1e-12)


def check_patch_keep(case: Case, settings: dict[str, Any]) -> None:
    exact("keep", [[kept_patches(int(n), float(drop)) for drop in case["drop"]] for n in case["num_patches"]], case["keep"])


def check_pos_interp(case: Case, settings: dict[str, Any]) -> None:
    for name in (name for name in case if name.startswith("out_")):
        near(name, resample_positions(tensor(case["pos_embed"]), int(name.removeprefix("out_"))), case[name])


class ReplayedMSN(MSN):
    """MSN whose choice of patches is read from the case."""

    order: np.ndarray

    def permutation(self, rows: int, progress: Progress) -> torch.Tensor:
        return tensor(self.order)


def tiny_method(settings: dict[str, Any], params: MSNParams, context: MethodContext) -> ReplayedMSN:
    """The transformer of the vit cases under MSN, float64."""
    info = BackboneInfo("tiny", "vit", settings["dim"], (settings["depth"],), settings["patch"], settings["heads"])
    method = ReplayedMSN(ClassTokenViT(info, settings["img_size"]), params, context)
    method.networks.double()
    return method


def weights_of(method: MSN, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of the anchor or target (`key_`) network under the published names."""
    head = {f"fc.{name}": value for name, value in method.networks[f"{prefix}head"].state_dict().items()}
    return dict(method.networks[f"{prefix}backbone"].state_dict()) | head


def load(method: MSN, case: Case, beginning: str) -> None:
    """Put stored weights into both networks; every stored name must exist and every weight be stored."""
    stored = {name.removeprefix(beginning): tensor(value) for name, value in case.items() if name.startswith(beginning)}
    for prefix in ("", "key_"):
        ours = weights_of(method, prefix)
        exact("weight names", sorted(stored), sorted(ours))
        for name, value in ours.items():
            value.copy_(stored[name])


def anchor_batch(target: np.ndarray, random: np.ndarray, focal: np.ndarray) -> ClipBatch:
    """target, random: [B, 3, H, W]; focal: [F, B, 3, h, w]."""
    count = len(target)
    frames = {"target": tensor(target)[:, None], "random": tensor(random)[:, None], "focal": tensor(focal).transpose(0, 1)}
    none = torch.full((count,), -1)
    return ClipBatch({k: v.double() for k, v in frames.items()}, torch.arange(count), none, {"patches": torch.zeros(count, 1 + len(focal))})


def check_vit(case: Case, settings: dict[str, Any]) -> None:
    _, hidden, _, dim = settings["head"]
    params = MSNParams(
        random_drop=settings["patch_drop"], shared_mask=True, focal_views=2, focal_size=16, hidden_dim=hidden, embedding_dim=dim, prototypes=2
    )
    method = tiny_method(settings, params, MethodContext(settings["dim"], 1, 1, 4))
    load(method, case, "weights/module.")
    method.networks.eval()
    seen: list[torch.Tensor] = []
    method.networks["backbone"].norm.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 0]))
    with torch.no_grad():
        for side in sorted(name.removeprefix("images_") for name in case if name.startswith("images_")):
            images = tensor(case[f"images_{side}"]).double()
            near(f"cls_norm_{side}", class_token(method.networks["backbone"], images), case[f"cls_norm_{side}"])
            near(f"cls_norm_{side} by the plain forward pass", method.networks["backbone"](images), case[f"cls_norm_{side}"])
            near(f"cls_prenorm_{side}", seen[-1], case[f"cls_prenorm_{side}"])
            near(f"head_eval_{side}", method.embed(images), case[f"head_eval_{side}"])
        method.networks.train()
        method.order = case["drop_perm"]
        sides = sorted(int(name.removeprefix("images_")) for name in case if name.startswith("images_"))
        small, large = case[f"images_{sides[0]}"], case[f"images_{settings['img_size']}"]
        batch = anchor_batch(large, large, np.stack([small, small[::-1]]))
        near("train_multiview", method.embed_anchors(batch, Progress(0, 0)), case["train_multiview"])
    for name in (name for name in case if name.startswith("after_train/")):
        near(name, weights_of(method)[name.removeprefix("after_train/")], case[name])


def model_of(case: Case, heads: int) -> dict[str, Any]:
    """Settings of the transformer in a train case, from the shapes of its weights; only the heads leave no trace there."""
    embedding = case["init/patch_embed.proj.weight"]
    return {
        "dim": len(embedding), "patch": embedding.shape[-1], "heads": heads, "img_size": case["step0/target_images"].shape[-1],
        "depth": sum(name.startswith("init/blocks.") and name.endswith("norm1.weight") for name in case),
        "head": [len(embedding), *(len(case[f"init/fc.fc{k}.weight"]) for k in (1, 2, 3))],
    }


def check_train(case: Case, settings: dict[str, Any], heads: int) -> None:
    model = model_of(case, heads)
    _, hidden, _, dim = model["head"]
    epochs, each = settings["epochs"], settings["steps_per_epoch"]
    params = method_params(
        settings, random_drop=settings["patch_drop"], shared_mask=True, random_views=settings["random_anchors"],
        focal_views=settings["focal"], focal_size=16, hidden_dim=hidden, embedding_dim=dim, prototypes=settings["K"],
        temperature=settings["tau"], sinkhorn_iterations=3 if settings["sinkhorn"] else 0, me_max_weight=settings["memax_weight"],
    )
    method = tiny_method(model, params, MethodContext(model["dim"], epochs, each, settings["B"]))
    load(method, case, "init/")
    method.networks["prototypes"].weight.data.copy_(tensor(case["init_prototypes"]))
    method.networks.train()
    schedule = optimizer_params(settings)
    optimizer = build_optimizer(schedule, method.networks, method.exempt)
    check_groups(method, optimizer, settings["parameter_groups"])
    steps = len(case["log"])
    outputs: list[torch.Tensor] = []
    for part in ("head", "key_head"):
        method.networks[part].register_forward_hook(lambda module, given, out: outputs.append(out.detach()))
    for step in range(steps):
        images, progress = {k: case[f"step{step}/{k}"] for k in ("target_images", "anchor_images", "focal_images")}, Progress(step // each, step)
        method.order = case[f"step{step}/drop_perm"]
        method.before_step(progress)
        optimizer.zero_grad()
        terms = method.loss(anchor_batch(*images.values()), progress)
        rate = apply_schedule(optimizer, schedule, epochs, step / each, each)
        terms.total.backward()
        norm = clip_gradients(optimizer, schedule)
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        optimizer.step()
        numbers = [terms.total, terms.cross_entropy, terms.me_max, terms.entropy, norm, rate, decay]
        numbers += [linear_momentum(params, step, epochs * each), sharpening(params, step, epochs * each)]
        near(f"log of step {step}", torch.stack([torch.as_tensor(number).detach() for number in numbers]), case["log"][step], 1e-4)
        if step == 0:
            random, focal, target = outputs
            near("anchor_out", torch.cat([random, focal]), case["step0/anchor_out"], 1e-4)
            near("target_out", target, case["step0/target_out"], 1e-4)
    method.finish(Progress(steps // each, steps))
    for beginning, prefix in (("final_anchor/", ""), ("final_target/", "key_")):
        for name, value in weights_of(method, prefix).items():
            near(beginning + name, value, case[beginning + name], 1e-4)
    near("final_prototypes", method.networks["prototypes"].weight, case["final_prototypes"], 1e-4)


def check_groups(method: MSN, optimizer: torch.optim.Optimizer, wanted: dict[str, list[str]]) -> None:
    """Which weights are decayed and which are clipped."""
    names = {id(weight): name for name, weight in method.networks.named_parameters()}
    found: dict[str, list[str]] = {"decayed": [], "not_decayed": [], "prototypes": []}
    for group in optimizer.param_groups:
        kind = "prototypes" if not group["clip"] else "decayed" if group["decay"] else "not_decayed"
        for weight in group["params"]:
            name = names[id(weight)].removeprefix("backbone.").replace("head.", "fc.", 1).replace("prototypes.weight", "prototypes")
            found[kind].append(name)
    for kind, members in wanted.items():
        exact(kind, sorted(found[kind]), sorted(members))


def _toy_rank(rank: int, port: int, case: Case, settings: dict[str, Any], folder: str) -> None:
    """One process of a two-process case: its loss terms and gradients, through DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=settings["world_size"])
    encoder = torch.nn.Linear(settings["D_in"], settings["D"], bias=False).double()
    encoder.weight.data.copy_(tensor(case["weight"]))
    parallel = DistributedDataParallel(encoder)  # kept: without it the gradients would not be averaged
    anchors = parallel(tensor(case["x"][rank]).double())
    anchors.retain_grad()
    prototypes = tensor(case["prototypes"]).double().requires_grad_()
    terms = loss_of(anchors, tensor(case["target_in"][rank]).double(), prototypes, settings)
    terms.total.backward()
    found = {
        "ce": terms.cross_entropy, "me_max": terms.me_max, "entropy": terms.entropy, "total": terms.total, "targets": terms.targets.exp(),
        "grad_anchors": anchors.grad, "grad_prototypes_local": prototypes.grad, "grad_weight": encoder.weight.grad,
    }
    np.savez(Path(folder, f"rank{rank}.npz"), **{name: value.detach().numpy() for name, value in found.items()})
    torch.distributed.destroy_process_group()


def global_loss(case: Case, settings: dict[str, Any]) -> tuple[MSNTerms, torch.Tensor, torch.Tensor]:
    """One process on the concatenated batch (view by view): terms, encoder weight and prototypes with gradients."""
    world, views, images = settings["world_size"], settings["num_views"], settings["B"]
    x = tensor(case["x"]).double().reshape(world, views, images, -1).transpose(0, 1).flatten(0, 2)
    weight, prototypes = (tensor(case[name]).double().requires_grad_() for name in ("weight", "prototypes"))
    terms = loss_of(x @ weight.T, tensor(case["target_in"]).double().flatten(0, 1), prototypes, settings)
    terms.total.backward()
    return terms, weight, prototypes


def check_ddp(case: Case, settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_toy_rank, (port, case, settings, folder), nprocs=settings["world_size"])
        ranks = [dict(np.load(Path(folder, f"rank{rank}.npz"))) for rank in range(settings["world_size"])]
    terms, weight, prototypes = global_loss(case, settings)
    ours = {"ce": terms.cross_entropy, "me_max": terms.me_max, "entropy": terms.entropy, "total": terms.total}
    skipped = {name for name, used in (("entropy", settings["use_entropy"]), ("me_max", settings["me_max"])) if not used}
    for name, value in ours.items():
        if name not in skipped:
            near(f"global_{name}", value, case[f"global_{name}"])
            near(f"mean {name}", np.mean([rank[name] for rank in ranks]), case[f"global_{name}"])
    gradient("global_grad_weight", weight.grad, case["global_grad_weight"])
    gradient("global_grad_prototypes", prototypes.grad, case["global_grad_prototypes"])
    for name in ranks[0]:
        if name not in skipped:
            want = case[name] if name != "grad_weight" else np.stack([case[name]] * len(ranks))
            near(name, np.stack([rank[name] for rank in ranks]), want)
    summed = sum(rank["grad_prototypes_local"] for rank in ranks)
    gradient("grad_prototypes_summed", summed, case["grad_prototypes_summed"])
    gradient("mean of the prototypes' gradients", summed / len(ranks), case["global_grad_prototypes"])


def check_phase_metrics(case: Case, settings: dict[str, Any]) -> None:
    video, label, pred, phases = case["video"], case["label"], case["pred"], settings["num_phases"]
    exact("arg-max of the scores", case["logits"].argmax(1), pred)
    close("per_video_union", per_video_scores(video, label, pred, phases, "union"), case["per_video_union"])
    close("per_video_f1_all7", per_video_scores(video, label, pred, phases, "all")[:, 3], case["per_video_f1_all7"])
    close("per_video_f1_gt_only", per_video_scores(video, label, pred, phases, "gt")[:, 3], case["per_video_f1_gt_only"])
    means = per_phase_means(video, label, pred, phases)
    exact("phases that no video has", np.isnan(means), np.isnan(case["per_phase_mean"]))
    close("per_phase_mean", np.nan_to_num(means), np.nan_to_num(case["per_phase_mean"]))
    numbers = phase_metrics(video, label, pred, [str(k) for k in range(phases)])
    pooled = numbers["pooled"]
    shown = [numbers[k] for k in ("accuracy", "precision", "recall", "f1")] + [pooled[k] for k in ("accuracy", "macro_f1", "weighted_f1")]
    near("unrounded", 100 * np.array(shown), case["unrounded"], 1e-9)
    exact("official", np.round(100 * np.array(shown), 2), case["official"])
    every = macro_scores(label, pred, phases, "all")
    near("monitor", [every[0], pooled["macro_f1_all"], pooled["accuracy"]], case["monitor"], 1e-6)


CHECKS: dict[str, Callable[..., None]] = {
    "loss": check_loss, "sinkhorn": check_sinkhorn, "sharpen": check_sharpen, "schedule": check_schedule, "patch_keep": check_patch_keep,
    "pos_interp": check_pos_interp, "vit": check_vit, "train": check_train, "ddp": check_ddp, "phase_metrics": check_phase_metrics,
}


def recognises(index: Any) -> bool:
    """Whether `index.json` describes cases of this format."""
    entries = index.get("cases") if isinstance(index, dict) else None
    return isinstance(entries, list) and bool(entries) and all(
        isinstance(e, dict) and {"name", "file", "kind", "settings"} <= set(e) and e["kind"] in CHECKS for e in entries
    )


def check_lightly(one: dict[str, Any], folder: Path, entry: dict[str, Any]) -> None:
    """What lightly's MSNLoss gave on the inputs of a case, where it is right."""
    case, settings = dict(np.load(folder / entry["file"], allow_pickle=False)), entry["settings"]
    if "f64" in one:
        total = loss_of(*(tensor(case[k]).double() for k in ("anchors", "target_in", "prototypes")), settings).total
        for name in ("official_total", "lightly_total"):
            near(name, total, np.float64(one["f64"][name]), 1e-9)
        return
    terms, _, _ = global_loss(case, settings)
    near("official_total_one_process_global", terms.total, np.float64(one["official_total_one_process_global"]), 1e-9)
    # lightly has no entropy term; its totals of single processes lack the all-reduce, so they are no reference.
    without = terms.total - settings["ent_weight"] * terms.entropy if settings["use_entropy"] else terms.total
    near("lightly_total_one_process_global", without, np.float64(one["lightly_total_one_process_global"]), 1e-9)


def cases(folder: Path, index: Any) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(file, case, check) of every case; the check raises `Mismatch` where the arrays are not reproduced."""
    # The train cases say "as in the vit case"; a folder without one means the published two heads.
    heads = next((entry["settings"]["heads"] for entry in index["cases"] if entry["kind"] == "vit"), 2)
    for entry in index["cases"]:

        def run(entry: dict[str, Any] = entry) -> None:
            with np.load(folder / entry["file"], allow_pickle=False) as arrays:
                case = {name: arrays[name] for name in entry["arrays"]}
            CHECKS[entry["kind"]](case, entry["settings"], *([heads] if entry["kind"] == "train" else []))

        yield entry["file"], entry["name"], run
    compared = folder / "lightly_compare.json"
    if compared.is_file():
        entries = {entry["name"]: entry for entry in index["cases"]}
        content = json.loads(compared.read_text(encoding="utf-8"))
        for one in [*content["one_process"], *content["two_processes"]]:
            if one["case"] in entries:
                yield compared.name, one["case"], lambda one=one: check_lightly(one, folder, entries[one["case"]])
