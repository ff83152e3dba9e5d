"""Golden arrays of the published UCL program: bank, losses, sampler, schedules, momentum, whole steps, fine-tuning rules.

Tolerances: float64 1e-9, float32 1e-5, both relative to the largest entry of the array; index sets, bank contents and
pointers exact.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from golden_tools import Mismatch, close, exact, tensor
from torch import nn

from pipeline import losses
from pipeline.data.clips import anchor_interval, distance_window, negative_candidates, positive_candidates
from pipeline.evaluation.metrics import confusion_matrix, malignancy_metrics, select_epoch
from pipeline.methods.base import ClipBatch, MethodContext, Progress
from pipeline.methods.ucl import UCL, UCLParams
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier
from pipeline.models.momentum import EmbeddingBank, ema_update
from pipeline.parameters import OptimizerParams
from pipeline.training.optim import build_optimizer, learning_rate

Case = dict[str, np.ndarray]


def filled_bank(rows: np.ndarray, pointer: int = 0) -> EmbeddingBank:
    bank = EmbeddingBank(len(rows), rows.shape[1], dtype=tensor(rows).dtype)
    bank.rows.copy_(tensor(rows))
    bank.pointer = pointer
    return bank


def check_objective(case: Case, settings: dict[str, Any], bank: EmbeddingBank, allowed: torch.Tensor | None, prefix: str = "") -> None:
    """Cross-video negative, logits, loss and gradients of one process, from raw embeddings."""
    want = {name.removeprefix(prefix): value for name, value in case.items() if name.startswith(prefix)}
    raw_q, raw_negatives = (tensor(want[k]).requires_grad_() for k in ("q_raw", "negs_raw"))
    q, negatives = losses.l2_normalize(raw_q), losses.l2_normalize(raw_negatives)
    q.retain_grad()
    negatives.retain_grad()
    positive = losses.l2_normalize(tensor(want["pos_raw"])).detach()
    temperature = settings["tau"] if settings["tau_soft"] == -1 else settings["tau_soft"]
    mean = settings.get("mean_neighbors", False)
    z_hat, rows, exists = losses.cross_video_negative(
        q, bank.rows, support=settings["support"], temperature=temperature, allowed=allowed, mode="mean" if mean else "soft_topk"
    )
    intra = None if settings["phase"] == "cross_only" else negatives
    logits = losses.ucl_logits(q, positive, intra, z_hat, settings["tau"], exists)
    loss = losses.first_column_cross_entropy(logits)
    loss.backward()
    kind = want["q_raw"].dtype
    close("cross_neg", z_hat, want["cross_neg"], kind)
    close("logits", logits, want["logits"], kind)
    close("loss", loss, want["loss"], kind)
    close("grad_q", q.grad, want["grad_q"], kind)
    close("grad_q_raw", raw_q.grad, want["grad_q_raw"], kind)
    zero = torch.zeros_like(negatives)
    close("grad_negs_raw", zero if raw_negatives.grad is None else raw_negatives.grad, want["grad_negs_raw"], kind)
    if "grad_negs" in want:
        close("grad_negs", zero if negatives.grad is None else negatives.grad, want["grad_negs"], kind)
    if "loss_per_sample" in want:
        close("loss_per_sample", losses.first_column_cross_entropy(logits, "none"), want["loss_per_sample"], kind)
    if "support_idx" in want and not mean and settings.get("bank_mode") != "zeros":
        exact("support_idx", rows, want["support_idx"])


def check_loss(case: Case, settings: dict[str, Any]) -> None:
    bank = filled_bank(case["bank_before"], int(case["ptr_before"]))
    incoming = losses.l2_normalize(tensor(case["negs_raw"])).flatten(0, 1)
    bank.write(incoming, torch.zeros(len(incoming), dtype=torch.int64), "official")
    close("bank_after", bank.rows, case["bank_after"])
    exact("ptr_after", bank.pointer, case["ptr_after"])
    check_objective(case, settings, bank, None)


def check_loss_two_ranks(case: Case, settings: dict[str, Any]) -> None:
    """Both processes write into one bank in rank order; each then has its own loss."""
    bank = filled_bank(case["r0.bank_before"], int(case["r0.ptr_before"]))
    incoming = torch.cat([losses.l2_normalize(tensor(case[f"r{r}.negs_raw"])).flatten(0, 1) for r in (0, 1)])
    bank.write(incoming, torch.zeros(len(incoming), dtype=torch.int64), "official")
    for rank in (0, 1):
        close("bank_after", bank.rows, case[f"r{rank}.bank_after"])
        exact("ptr_after", bank.pointer, case[f"r{rank}.ptr_after"])
        check_objective(case, settings, bank, None, f"r{rank}.")


def check_loss_exclude_own(case: Case, settings: dict[str, Any]) -> None:
    bank = filled_bank(case["bank"])
    bank.videos = torch.where(tensor(case["bank_valid"]), tensor(case["bank_video_ids"]), -1)
    allowed = bank.allowed(tensor(case["video_ids"]), exclude_own=True, mask_unwritten=True)
    check_objective(case, settings, bank, allowed)


def check_bank(case: Case, settings: dict[str, Any]) -> None:
    ranks = [""] if settings["world_size"] == 1 else ["r0.", "r1."]
    bank = filled_bank(np.zeros((settings["bank_size"], settings["dim"]), case[f"{ranks[0]}incoming"].dtype))
    begin = 0
    for step, count in enumerate(case["counts"]):
        rows = torch.cat([tensor(case[f"{r}incoming"][begin : begin + count]) for r in ranks])
        begin += int(count)
        written = bank.write(rows, torch.zeros(len(rows), dtype=torch.int64), "official")
        exact(f"bank after step {step}", bank.rows, case["bank_after"][step])
        exact(f"pointer after step {step}", bank.pointer, case["ptr_after"][step])
        exact(f"refused at step {step}", not written, case["write_refused"][step])


def check_momentum(case: Case, settings: dict[str, Any]) -> None:
    class Flat(nn.Module):
        def __init__(self, weights: np.ndarray, statistics: np.ndarray) -> None:
            super().__init__()
            self.weight = nn.Parameter(tensor(weights))
            self.register_buffer("statistics", tensor(statistics))

    key, query = Flat(case["key_before"], case["key_bn_buffers_before"]), Flat(case["query"][0], case["query_bn_buffers"])
    for step, weights in enumerate(case["query"]):
        query.weight.data.copy_(tensor(weights))
        ema_update(key, query, settings["m"])
        close(f"key after step {step}", key.weight, case["key_after"][step])
    exact("key statistics", key.statistics, case["key_bn_buffers_after"])


def check_sampler(case: Case, settings: dict[str, Any]) -> None:
    if "anchor_first" in case:
        for row, frames in enumerate(case["num_frames"]):
            first, end = anchor_interval(int(frames))
            if not case["official_raises"][row]:
                exact(f"anchor interval of {frames} frames", (first, end), (case["anchor_first"][row], case["anchor_end_exclusive"][row]))
            elif first < end:
                raise Mismatch(f"anchor interval of {frames} frames: [{first}, {end}), expected none")
        return
    for row, frames in enumerate(case["num_frames"]):
        n, a, radius = int(frames), int(case["anchor"][row]), settings["pos_radius"]
        positives = positive_candidates(n, a, radius)
        negatives = negative_candidates(n, a, float(case["low"][row]), float(case["high"][row]), radius)
        exact(f"positives of row {row}", positives, case["pos_flat"][case["pos_offsets"][row] : case["pos_offsets"][row + 1]])
        exact(f"negatives of row {row}", negatives, case["neg_flat"][case["neg_offsets"][row] : case["neg_offsets"][row + 1]])


def check_schedule(case: Case, settings: dict[str, Any]) -> None:
    epochs, start = settings["epochs"], settings["decay_start"]
    params = OptimizerParams(lr=settings["base_lr"], per_epoch=True)
    method = UCLParams(cross_only_epochs=settings["cross_only_epochs"])
    for row, epoch in enumerate(int(e) for e in case["epoch"]):
        close(f"lr of epoch {epoch}", learning_rate(params, epochs, epoch), case["lr"][row])
        exact(f"phase of epoch {epoch}", epoch < method.cross_only_epochs, case["cross_only"][row])
        for name, decay, floors in (
            ("cosine", "cosine_compounded", None), ("clipped", "cosine_compounded", (0.03, 0.07)), ("step", "steps", None)
        ):
            got = distance_window(epoch, decay=decay, decay_start=start, decay_epochs=epochs - start, floors=floors)
            for side, value in zip(("low", "high"), got, strict=True):
                close(f"{name}_{side} of epoch {epoch}", value, case[f"{name}_{side}"][row])


def check_finetune_gb(case: Case, settings: dict[str, Any]) -> None:
    params = OptimizerParams(
        lr=settings["base_lr"], constant_epochs=settings["warmup"], schedule_epochs=settings["T_max"], min_lr=settings["eta_min"],
        per_epoch=True,
    )
    close("lr", [learning_rate(params, settings["epochs"], e) for e in range(settings["epochs"])], case["lr"])
    backbone, features = build_backbone("resnet10")
    network = Classifier(
        backbone, "resnet10", features, 3, head="mlp", trainable="all", batchnorm="official_eval_after_first_epoch"
    )
    modes = []
    for epoch in range(settings["epochs"]):
        network.training_mode(epoch)
        modes.append(network.training)
    exact("module_in_train_mode", modes, case["module_in_train_mode"])
    for fold in sorted({name.split(".")[0] for name in case if name[0] == "f" and "." in name}):
        truth, predicted = case[f"{fold}.y_true"], case[f"{fold}.y_pred"]
        numbers = [malignancy_metrics(confusion_matrix(truth, row, 3)) for row in predicted]
        for ours, theirs in (("accuracy_3class", "acc3"), ("specificity", "spec"), ("sensitivity", "sens")):
            close(f"{fold}.{theirs}", [n[ours] or 0.0 for n in numbers], case[f"{fold}.{theirs}"])
        best = select_epoch([(n["specificity"], n["sensitivity"]) for n in numbers], "harmonic_mean")
        exact(f"{fold}.best_epoch", best, case[f"{fold}.best_epoch"])
        shown = [round(numbers[best][k] or 0.0, 4) for k in ("accuracy_2class", "specificity", "sensitivity", "accuracy_3class")]
        exact(f"{fold}.printed", shown, case[f"{fold}.best_printed_acc2_spec_sens_acc3"])


def check_finetune_pocus(case: Case, settings: dict[str, Any]) -> None:
    params = OptimizerParams(lr=settings["base_lr"], schedule_epochs=settings["T_max"], min_lr=settings["eta_min"], per_epoch=True)
    close("lr", [learning_rate(params, settings["epochs"], int(e)) for e in case["epoch"]], case["lr"])


class TinyTrunk(nn.Module):
    """f = tanh(BN(x W^T + b)), without BN when the case says so. [B, d_in] -> [B, d_feat]."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = nn.Linear(settings["d_in"], settings["d_feat"])
        self.bn = nn.BatchNorm1d(settings["d_feat"]) if settings["bn"] else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.bn(self.trunk(x)))


class ReplayedUCL(UCL):
    """UCL whose batch shuffle is read from the case instead of drawn."""

    orders: np.ndarray

    def permutation(self, rows: int, progress: Progress) -> torch.Tensor:
        return tensor(self.orders[progress.step].astype(np.int64))


def _weights(method: UCL, which: str) -> dict[str, torch.Tensor]:
    """Tensors of the query or key network under the names of the goldens."""
    part = "" if which == "q" else "key_"
    trunk, head = method.networks[f"{part}backbone"].state_dict(), method.networks[f"{part}head"].state_dict()
    names = {"head1": "0", "head2": "2"}
    return trunk | {f"{new}.{kind}": head[f"{old}.{kind}"] for new, old in names.items() for kind in ("weight", "bias")}


def replay_trajectory(rank: int, case: Case, settings: dict[str, Any]) -> None:
    """All steps of one case in this process, under DistributedDataParallel when there are two."""
    from pipeline.training.pretrain import StepModule

    world = settings["ws"]
    mine = "" if world == 1 else f"r{rank}."
    params = UCLParams(
        temperature=settings["tau"], soft_nn_temperature=settings["tau_soft"], support_size=settings["support"],
        num_negatives=settings["num_negatives"], embedding_dim=settings["dim"], momentum=settings["m"],
        bank_size=settings["bank_size"], bank_exclude_own_video=False, bank_mask_unwritten=False, bank_overflow="official",
        key_batch_includes_second_crop=True,
    )
    context = MethodContext(settings["d_feat"], 60, 1, settings["batch_per_rank"] * world)
    method = ReplayedUCL(TinyTrunk(settings).double(), params, context)
    method.networks.double()
    method.orders = case["shuffle_perm"]
    for which in ("q", "k"):
        for name, value in _weights(method, which).items():
            if f"init.{which}.{name}" in case:
                value.copy_(tensor(case[f"init.{which}.{name}"]))
    module: nn.Module = StepModule(method)
    if world > 1:
        module = nn.parallel.DistributedDataParallel(module)
    optimizer = build_optimizer(OptimizerParams(lr=settings["lr"]), method.networks)
    seen: list[torch.Tensor] = []
    plain = method.logits
    method.logits = lambda batch, progress: (seen.append((out := plain(batch, progress))[0].detach()), out)[1]  # type: ignore[method-assign]
    schedule = OptimizerParams(lr=settings["lr"], per_epoch=True)
    for step, epoch in enumerate(e for e, _, count in settings["epochs"] for _ in range(count)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, 60, epoch)
        arrays = {role: tensor(case[f"{mine}{name}"][step]) for role, name in
                  (("anchor", "anchor"), ("second", "anchor_2nd"), ("positive", "pos"), ("negatives", "negs"))}
        frames = {role: x if role == "negatives" else x[:, None] for role, x in arrays.items()}
        batch = ClipBatch(frames, torch.arange(len(arrays["anchor"])), torch.full((len(arrays["anchor"]),), -1))
        progress = Progress(epoch, step)
        method.before_step(progress)
        optimizer.zero_grad()
        loss, _ = module(batch, progress)
        loss.backward()
        optimizer.step()
        close(f"logits of step {step}", seen[-1], case[f"{mine}logits_step{step}"])
        close(f"loss of step {step}", loss, case[f"{mine}loss"][step])
        close(f"bank of step {step}", method.bank.rows, case["bank_after"][step])
        exact(f"pointer of step {step}", method.bank.pointer, case["ptr_after"][step])
    for which in ("q", "k"):
        for name, value in _weights(method, which).items():
            for key in (f"final.{which}.{name}", f"{mine}final.{which}.{name}"):
                if key in case:
                    close(key, value, case[key])


def _rank_main(rank: int, case: Case, settings: dict[str, Any], port: int, report: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=settings["ws"])
    try:
        replay_trajectory(rank, case, settings)
    except Mismatch as error:
        Path(report, f"rank{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def check_trajectory(case: Case, settings: dict[str, Any]) -> None:
    if settings["ws"] == 1:
        replay_trajectory(0, case, settings)
        return
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(_rank_main, (case, settings, port, folder), nprocs=settings["ws"])
        found = [path.read_text() for path in sorted(Path(folder).iterdir())]
    if found:
        raise Mismatch("; ".join(found))


# The longest matching beginning of a file's name decides, so that `loss_two_ranks.npz` is not read as `loss.npz`.
CHECKS: dict[str, Callable[[Case, dict[str, Any]], None]] = {
    "loss": check_loss, "loss_two_ranks": check_loss_two_ranks, "loss_exclude_own": check_loss_exclude_own, "bank": check_bank,
    "momentum": check_momentum, "trajectory": check_trajectory, "sampler": check_sampler, "schedule": check_schedule,
    "finetune_gb": check_finetune_gb, "finetune_pocus": check_finetune_pocus,
}


def recognises(index: Any) -> bool:
    """Whether `index.json` describes cases of this format."""
    files = index.get("files") if isinstance(index, dict) else None
    return isinstance(files, dict) and any(name.startswith(tuple(CHECKS)) for name in files) and all(
        isinstance(f, dict) and all("case" in c for c in f.get("cases", [])) for f in files.values()
    )


def cases(folder: Path, index: Any) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(file, case, check) of every case; the check raises `Mismatch` where the arrays are not reproduced."""
    for file_name, content in sorted(index["files"].items()):
        matching = [name for name in CHECKS if file_name.startswith(name)]
        with np.load(folder / file_name, allow_pickle=False) as arrays:
            for entry in content["cases"]:
                prefix = f"{entry['case']}." if entry["case"] else ""
                case = {key: arrays[prefix + key] for key in entry["arrays"]}

                def run(case: Case = case, entry: Any = entry) -> None:
                    if not matching:
                        raise Mismatch("no check for this kind of file")
                    CHECKS[max(matching, key=len)](case, entry["settings"])

                yield file_name, entry["case"], run
