"""What is special to HiCo: its losses against slow loops, levels and projectors, objectives, fine-tuning heads, refusals."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import goldens_hico
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from golden_tools import Mismatch
from torch.nn.parallel import DistributedDataParallel
from training_kit import make_config, make_method, make_project
from weights_kit import hico_file

from pipeline import distributed, losses
from pipeline.checkpoint import read_state_dict
from pipeline.data.clips import ClipBatch
from pipeline.errors import CheckpointError, ConfigError
from pipeline.files import read_json
from pipeline.methods.base import MethodContext, Progress, Setting
from pipeline.methods.hico import HiCo, HiCoParams
from pipeline.models.backbones import build_backbone
from pipeline.models.catalog import LEVEL_HEADS
from pipeline.models.classifier import Classifier
from pipeline.models.levels import WIDTH, LevelProjector, Pyramid, map_side, pooled, stage_channels, stage_maps
from pipeline.models.published import to_extras
from pipeline.preflight import check_named_files
from pipeline.presets import load_preset
from pipeline.registry import HEADS
from pipeline.training.finetune_stage import run_finetune_stage
from pipeline.training.pretrain import StepModule
from pipeline.training.pretrain_stage import run_pretrain_stage

LEVELS = ("local", "medium", "global")


def unit_rows(rows: int, seed: int, dim: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def two_views(rows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = ({level: unit_rows(rows, 10 * view + i) for i, level in enumerate(LEVELS)} for view in (0, 1))
    return first, second


def toy_batch(labels: list[int], size: int = 32, seed: int = 0) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    frames = {"boundary": torch.randn(count, 2, 3, size, size, generator=generator), "anchor": torch.randn(count, 1, 3, size, size, generator=generator)}
    return ClipBatch(frames, torch.arange(count), torch.tensor(labels), {"weight": torch.rand(count, 2, generator=generator)})


# --- losses -----------------------------------------------------------------------------------------------------------


def slow_nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float, videos: list[int]) -> float:
    rows, names, total = torch.cat([a, b]), videos + videos, 0.0
    for r in range(len(rows)):
        partner = (r + len(a)) % len(rows)
        others = [k for k in range(len(rows)) if k == partner or names[k] != names[r]]
        weights = [math.exp(float(rows[r] @ rows[k]) / temperature) for k in others]
        total -= math.log(math.exp(float(rows[r] @ rows[partner]) / temperature) / sum(weights))
    return total / len(rows)


@pytest.mark.parametrize("pairing", ["within_view", "cross_view"])
@pytest.mark.parametrize("videos", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_hierarchical_contrast__equals_a_slow_loop(pairing: Any, videos: list[int]) -> None:
    views, temperature = two_views(5), 0.3
    terms = losses.hierarchical_contrast(views, views, temperature, pairing, videos=torch.tensor(videos))

    def slow(a: int, level: str, b: int, other: str) -> float:
        return slow_nt_xent(views[a][level], views[b][other], temperature, videos)

    expected = {f"{level}_{level}": slow(0, level, 1, level) for level in LEVELS}
    mate = {"within_view": (0, 1), "cross_view": (1, 0)}[pairing]
    for level in ("medium", "local"):
        expected[f"global_{level}"] = slow(0, "global", mate[0], level) + slow(1, "global", mate[1], level)
    expected["peer"] = sum(expected[f"{level}_{level}"] for level in LEVELS)
    expected["cross"] = expected["global_medium"] + expected["global_local"]
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-12)


def slow_soft_ce(logits: torch.Tensor, labels: list[int], alpha: float, form: str) -> float:
    known = [b for b, label in enumerate(labels) if label >= 0]
    classes, total = logits.shape[1], 0.0
    for b in known:
        for k in range(classes):
            right = float(k == labels[b])
            if form == "sum_to_one":
                target = 1 - alpha if right else alpha / (classes - 1)
            else:
                target = (1 - alpha) * right + alpha / (len(known) - 1)
            total -= target * float(logits[b].log_softmax(0)[k])
    return total / len(known)


@pytest.mark.parametrize("form", ["sum_to_one", "batch_divisor"])
@pytest.mark.parametrize(("labels", "classes"), [([0, 1, 2, 1], 3), ([-1, 1, -1, 0, 1], 2), ([3, -1, 2, 2], 12)])
def test_softened_cross_entropy__equals_a_slow_loop(form: Any, labels: list[int], classes: int) -> None:
    logits = torch.randn(len(labels), classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = losses.softened_cross_entropy(logits, torch.tensor(labels), 0.2, form=form)
    assert float(got) == pytest.approx(slow_soft_ce(logits, labels, 0.2, form), rel=1e-12)


@pytest.mark.parametrize("form", ["sum_to_one", "batch_divisor"])
def test_softened_cross_entropy__no_labelled_row_is_zero_and_one_is_defined(form: Any) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    none = losses.softened_cross_entropy(logits, torch.tensor([-1, -1, -1]), 0.2, form=form)
    none.backward()
    assert float(none.detach()) == 0
    assert not logits.grad.any()
    one = losses.softened_cross_entropy(logits.detach(), torch.tensor([-1, 2, -1]), 0.2, form=form)
    hard = F.cross_entropy(logits[1:2].detach(), torch.tensor([2]))
    assert torch.isfinite(one)
    # alpha / (1 - 1) has no value: the published form falls back to the hard target.
    assert (float(one) == pytest.approx(float(hard))) == (form == "batch_divisor")


def test_soft_targets__row_sums() -> None:
    labels, rows = torch.tensor([0, 3]), torch.tensor(32)
    assert losses.soft_targets(labels, 12, 0.2, rows).sum(1).tolist() == pytest.approx([1, 1])
    published = losses.soft_targets(labels, 12, 0.2, rows, "batch_divisor").sum(1)
    assert published.tolist() == pytest.approx([0.8 + 12 * 0.2 / 31] * 2)


@pytest.mark.parametrize("form", ["sum_to_one", "batch_divisor"])
def test_softened_cross_entropy__processes_with_unequal_labels_average_to_one_process(form: Any) -> None:
    """All labels on the first of two processes: the mean of both losses is that of the whole batch."""
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 2, 1, -1, -1, -1])
    parts = [
        losses.softened_cross_entropy(logits[half], labels[half], 0.2, form=form, rows=torch.tensor(3), processes=2)
        for half in (slice(0, 3), slice(3, 6))
    ]
    assert float(parts[1]) == 0
    assert float(sum(parts) / 2) == pytest.approx(float(losses.softened_cross_entropy(logits, labels, 0.2, form=form)), rel=1e-12)


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
@pytest.mark.parametrize("size", [(64, 64), (52, 75)])
def test_stage_maps__are_those_of_the_trunk(name: str, size: tuple[int, int]) -> None:
    backbone, features = build_backbone(name)
    backbone.eval()
    images = torch.randn(2, 3, *size)
    maps = stage_maps(backbone, images)
    assert [m.shape[1] for m in maps] == stage_channels(backbone)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // 2**k) for side in size) for k in (2, 3, 4, 5)]
    torch.testing.assert_close(pooled(maps), backbone(images))
    assert pooled(maps).shape == (2, features)


def test_pyramid__makes_what_is_wanted_and_nothing_else() -> None:
    """Every weight of any choice of maps receives gradient from these maps."""
    maps = [torch.randn(1, channels, side, side) for channels, side in zip((64, 128, 256, 512), (16, 8, 4, 2), strict=True)]
    for wanted in (["p2", "p3", "p5"], ["p2", "p4", "p5"], ["p5"], ["p3"], ["p2", "p3", "p4", "p5"]):
        for smooth in (False, True):
            pyramid = Pyramid((64, 128, 256, 512), wanted, smooth_p5=smooth)
            found = pyramid(maps)
            assert sorted(found) == wanted
            sum(m.sum() for m in found.values()).backward()
            assert all(weight.grad is not None for weight in pyramid.parameters())
            assert ("p5" in pyramid.smooth) == (smooth and "p5" in wanted)
            for name, m in found.items():
                assert m.shape == (1, WIDTH, *[map_side(name, 64)] * 2)


def test_projector__gap_takes_any_size_flatten_keeps_positions() -> None:
    gap, flat = LevelProjector("gap", 4, 8), LevelProjector("flatten", 4, 8)
    assert gap(torch.randn(2, WIDTH, 5, 3)).shape == flat(torch.randn(2, WIDTH, 4, 4)).shape == (2, 8)
    image = torch.randn(1, WIDTH, 4, 4)
    turned = image.flip(3)
    torch.testing.assert_close(gap(image), gap(turned))
    assert not torch.allclose(flat(image), flat(turned))
    torch.testing.assert_close(flat(image.to(memory_format=torch.channels_last)), flat(image))


# --- method -----------------------------------------------------------------------------------------------------------

CHOICES: list[dict[str, Any]] = [
    {"objective": "self"},
    {"objective": "self", "peer_weight": 1.0},
    {"objective": "supervised"},
    {"objective": "supervised", "classifier_input": "global", "smooth_p5": True},
    {"classifier_input": "global", "medium_level": "p4", "smooth_p5": True},
    {"projector_pool": "flatten", "cross_level": "within_view", "soft_label": "batch_divisor"},
    {"peer_weight": 0.0, "pair": {"variant": "two_coefficients"}},
]


@pytest.mark.parametrize("changes", CHOICES, ids=str)
@pytest.mark.parametrize("labels", [[0, 1, -1, 1], [-1, -1, 1, -1], [-1, -1, -1, -1]], ids=["half", "one", "none"])
def test_step__any_choice_reaches_every_weight_with_any_labels(changes: dict[str, Any], labels: list[int]) -> None:
    method = make_method("hico", batch=4, **changes)
    output = method.step(toy_batch(labels), Progress(0, 0))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    lacking = [name for name, weight in method.networks.named_parameters() if weight.grad is None]
    assert not lacking, "DistributedDataParallel would wait for these for ever"
    assert all(torch.isfinite(weight.grad).all() for weight in method.networks.parameters())
    assert ("pyramid" in method.networks) == bool(method.params.maps())
    if changes.get("objective") == "supervised" and not any(label >= 0 for label in labels):
        assert float(output.loss.detach()) == 0


def test_step__is_the_sum_of_its_terms() -> None:
    method = make_method("hico", batch=4, peer_weight=0.25, supervised_weight=0.3)
    output = method.step(toy_batch([0, 1, -1, 1]), Progress(0, 0))
    m = {name: float(value) for name, value in output.metrics.items()}
    assert m["peer"] == pytest.approx(m["local_local"] + m["medium_medium"] + m["global_global"], rel=1e-6)
    assert m["cross"] == pytest.approx(m["global_medium"] + m["global_local"], rel=1e-6)
    assert float(output.loss.detach()) == pytest.approx(0.25 * m["peer"] + 0.75 * m["cross"] + 0.3 * 2 * m["cross_entropy"], rel=1e-6)
    assert m["labelled"] == 0.75


def test_step__supervised_is_the_mean_of_two_plain_cross_entropies() -> None:
    method = make_method("hico", batch=3, objective="supervised", alpha=0.2, norm=False)
    batch = toy_batch([0, -1, 1])
    batch.numbers["weight"] = torch.ones(3, 2)
    loss = method.step(batch, Progress(0, 0)).loss
    views = [method.embed(batch.frames["boundary"][:, k])[1] for k in (0, 1)]
    expected = sum(F.cross_entropy(logits[[0, 2]], torch.tensor([0, 1])) for logits in views) / 2
    torch.testing.assert_close(loss, expected)


def test_views__pass_separately_through_batch_norm() -> None:
    """Running statistics after a step are those of the two views one after the other, not of both together."""
    method = make_method("hico", batch=4)
    method.step(toy_batch([0, 1, 0, 1]), Progress(0, 0))
    assert int(method.backbone.bn1.num_batches_tracked) == 2


def test_step__bfloat16_networks_keep_losses_in_float32() -> None:
    exact, fast = make_method("hico", batch=4), make_method("hico", batch=4)
    fast.autocast = True
    one, two = (method.step(toy_batch([0, 1, -1, 1]), Progress(0, 0)) for method in (exact, fast))
    two.loss.backward()
    assert two.loss.dtype == two.metrics["peer"].dtype == torch.float32
    assert float(two.loss.detach()) != float(one.loss.detach())
    assert float(two.loss.detach()) == pytest.approx(float(one.loss.detach()), rel=0.02)


def _one_step(rank: int, world: int) -> dict[str, Any]:
    """Loss and gradients of a batch of four whose labels are all among the first two."""
    method = make_method("hico", batch=4, norm=False, double=True, soft_label="batch_divisor")
    whole = toy_batch([1, 0, -1, -1])
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    frames = {role: x[share].double() for role, x in whole.frames.items()}
    batch = ClipBatch(frames, whole.video[share], whole.label[share], {"weight": whole.numbers["weight"][share]})
    module: torch.nn.Module = StepModule(method)
    if world > 1:
        module = DistributedDataParallel(module)
    loss, metrics = module(batch, Progress(0, 0))
    loss.backward()
    grads = torch.cat([w.grad.flatten()[::53] for w in method.networks.parameters()])
    mean = {name: float(distributed.reduce_mean(torch.as_tensor(value, dtype=torch.float64))) for name, value in metrics.items()}
    return {"loss": float(distributed.reduce_mean(loss)), "grads": grads, "metrics": mean, "chance": float(method.chance_loss(Progress(0, 0)))}


def _process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(_one_step(rank, 2), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes__labels_on_one_only_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_process, (port, tmp_path), nprocs=2)
    alone = _one_step(0, 1)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        torch.testing.assert_close(found["grads"], alone["grads"], rtol=1e-7, atol=1e-11)
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
        assert found["chance"] == pytest.approx(alone["chance"], rel=1e-6)


def setting(**changes: Any) -> Setting:
    return Setting(**{"backbone": "resnet18", "image_size": 64, "batch_size": 8, "scope": "fold", "labelled": {"a": 3, "b": 2}, **changes})


def test_problems__one_clear_line_each() -> None:
    assert HiCo.problems(HiCoParams(), setting()) == []
    assert HiCo.problems(HiCoParams(), setting(labelled=None)) == []
    (levels,) = HiCo.problems(HiCoParams(), setting(backbone="vit_small"))
    assert levels.startswith("pretrain.method: hico wants features of several levels, and vit_small has one. Allowed for pretrain.backbone here: resnet10")
    (alone,) = HiCo.problems(HiCoParams(), setting(batch_size=1))
    assert alone.startswith("pretrain.batch_size: 1 sample a forward pass (batch_size / accumulate) leaves HiCo no video to contrast")
    for labelled in ({}, {"a": 5}, {"a": 5, "b": 0}):
        (unlabelled,) = HiCo.problems(HiCoParams(), setting(labelled=labelled))
        assert unlabelled.startswith("methods.hico.objective: semi learns from labels, and pretraining may see")
        assert unlabelled.endswith("or set it to self.")
        assert HiCo.problems(HiCoParams(objective="self"), setting(labelled=labelled)) == []
    assert len(HiCo.problems(HiCoParams(), setting(backbone="vit_small", batch_size=1, labelled={}))) == 3


def test_check__flattened_projectors_are_told_with_their_size() -> None:
    context = MethodContext(512, 10, 10, 32, image_size=224)
    assert HiCo.check(HiCoParams(), context, 50) == []
    (large,) = HiCo.check(HiCoParams(projector_pool="flatten"), context, 50)
    assert "260 million weights" in large


def test_preset__is_the_published_recipe() -> None:
    values = load_preset("hico_official").values
    own = {key.removeprefix("methods.hico."): value for key, value in values.items() if key.startswith("methods.hico.")}
    published = {
        "cross_level": "within_view", "medium_level": "p3", "smooth_p5": False, "classifier_input": "pooled", "soft_label": "batch_divisor",
        "projector_pool": "flatten", "peer_weight": 0.5, "alpha": 0.2, "supervised_weight": 0.2, "temperature": 0.5, "pair.variant": "official",
    }
    assert published.items() <= own.items()
    assert (values["pretrain.init"], values["finetune.head"], values["finetune.trainable"]) == ("imagenet", "hico_official", "layer4.1")


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def classifier(head: str, extras: dict[str, torch.Tensor] | None, size: int = 32, name: str = "resnet10", **changes: Any) -> Classifier:
    backbone, features = build_backbone(name, 1, size)
    settings = {"trainable": "last_block", "batchnorm": "frozen", **changes}
    return Classifier(backbone, name, features, 3, head=head, image_size=size, extras=extras, **settings)


def test_heads__the_list_of_those_that_take_levels_is_true() -> None:
    assert [name for name in HEADS.names() if getattr(HEADS.get(name), "takes_levels", False)] == list(LEVEL_HEADS)


CHANGES: list[dict[str, Any]] = [
    {}, {"projector_pool": "flatten"}, {"smooth_p5": True},
    {"classifier_input": "global"}, {"objective": "self"}, {"medium_level": "p4"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_heads__load_what_pretraining_left(changes: dict[str, Any]) -> None:
    """hico_pyramid: everything there is; hico_official: the pyramid alone."""
    extras = make_method("hico", **changes).exports()
    for head in LEVEL_HEADS:
        network = classifier(head, extras)
        state = network.head.state_dict()
        for name, value in extras.items():
            own = name.replace("classifier.0.", "features.")
            if own not in state:
                continue
            same = state[own].shape == value.shape and torch.equal(state[own], value)
            assert same == (name.startswith("pyramid.") or head == "hico_pyramid"), (head, name)
        assert ("pyramid.smooth.p5.weight" in state) == bool(changes.get("smooth_p5"))
        trained = {name for name, weight in network.head.named_parameters() if weight.requires_grad}
        assert trained == {f"{part}.{kind}" for part in ("pyramid.lateral.p5", "linear") for kind in ("weight", "bias")}
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 3)
        assert not network.cacheable


@pytest.mark.parametrize("gone", ["lf", "l4", "l3", "features.smooth1", "features.smooth2", "features.latlayer3"])
def test_heads__a_file_of_the_published_program_is_whole(gone: str) -> None:
    """What our pretraining may leave out is in every whole file of the program."""
    file = hico_file({"conv1.weight": torch.zeros(1)})
    for head in LEVEL_HEADS:
        assert float(classifier(head, to_extras(file)).head.pyramid.smooth["p4"].bias.detach().mean()) == 1
    part = to_extras({name: value for name, value in file.items() if name != f"{gone}.bias"})
    for head in LEVEL_HEADS:
        if head == "hico_official" and gone.startswith("l"):
            classifier(head, part)
        else:
            with pytest.raises(CheckpointError, match=r"1 of them are missing: [\w.]+.bias\. They would stay random and frozen"):
                classifier(head, part)


def test_heads__refuse_what_they_cannot_use() -> None:
    with pytest.raises(CheckpointError, match="hico_pyramid wants the pyramid and projectors that HiCo pretraining leaves"):
        classifier("hico_pyramid", {})
    with pytest.raises(CheckpointError, match="hico_official wants the pyramid that HiCo pretraining leaves .* a random pyramid would stay frozen"):
        classifier("hico_official", {})
    assert classifier("hico_official", None).head.linear.in_features == 5 * WIDTH
    flat = make_method("hico", projector_pool="flatten").exports()
    with pytest.raises(CheckpointError, match="Flattened projectors fit one image size only"):
        classifier("hico_pyramid", flat, size=64)
    both = ("weight", "bias")
    first = ("pyramid.lateral.p5.weight", "pyramid.lateral.p5.bias", "levels.p2.hidden.weight")
    part = {name: value for name, value in make_method("hico").exports().items() if name in first}
    official = [f"pyramid.{name}.{what}" for name in ("lateral.p2", "lateral.p3", "lateral.p4", "smooth.p2", "smooth.p3") for what in both]
    with pytest.raises(CheckpointError, match=f"hico_official wants 14 tensors .* and 10 of them are missing: {', '.join(official)}. They would stay random"):
        classifier("hico_official", part)
    projectors = ["levels.p2.hidden.bias", *(f"levels.{name}.hidden.{what}" for name in ("p3", "p5") for what in both)]
    with pytest.raises(CheckpointError, match=f"hico_pyramid wants 24 tensors .* and 15 of them are missing: {', '.join([*official, *projectors])}. They"):
        classifier("hico_pyramid", part)
    with pytest.raises(ConfigError, match="finetune.head: hico_official wants features of several levels, and vit_tiny has one"):
        classifier("hico_official", None, name="vit_tiny")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_preflight__a_head_of_several_levels_wants_a_resnet(tmp_path: Path) -> None:
    config = make_config(tmp_path, pretrain__backbone="vit_tiny", finetune__head="hico_official", data__source=str(tmp_path))
    with pytest.raises(ConfigError, match="finetune.head: hico_official wants features of several levels, and vit_tiny has one"):
        check_named_files(config)


def test_stages__extras_travel_from_pretraining_to_the_head(project: Path) -> None:
    """And a method without any removes those of the method before it."""
    settings = {"pretrain__epochs": 1, "finetune__head": "hico_pyramid", "finetune__epochs": 1}
    config, _ = make_project(project, pretrain__method="hico", **settings)
    encoder, finetuned = project / "models/encoders/fold0", project / "models/finetuned/pretrained-seed0-fold0"
    run_pretrain_stage(config, 0, Path("pretrain.py"))
    run_finetune_stage(config, "pretrained", 0, 0)
    extras, model = read_state_dict(encoder / "extras.safetensors"), read_state_dict(finetuned / "model.safetensors")
    for name in ("pyramid.lateral.p2.weight", "levels.p3.hidden.weight"):
        assert torch.equal(model[f"head.{name}"], extras[name])
    assert torch.equal(model["head.features.weight"], extras["classifier.0.weight"])
    assert not torch.equal(model["head.pyramid.lateral.p5.weight"], extras["pyramid.lateral.p5.weight"]), "it trains"
    other = make_config(project, pretrain__method="simclr", **settings)
    run_pretrain_stage(other, 0, Path("pretrain.py"))
    assert sorted(path.name for path in encoder.glob("*.safetensors")) == ["encoder.safetensors"]
    with pytest.raises(CheckpointError, match="finetune.head: hico_pyramid wants the pyramid"):
        run_finetune_stage(other, "pretrained", 0, 0)


def test_stages__no_labels_is_said_before_training(project: Path) -> None:
    config, _ = make_project(project, pretrain__method="hico", pretrain__scope="all")
    with pytest.raises(ConfigError, match="methods.hico.objective: semi learns from labels, and pretraining may see 0 labelled videos"):
        run_pretrain_stage(config, 0, Path("pretrain.py"))
    assert not (project / "models").exists()


def test_stages__a_published_file_brings_its_pyramid(project: Path) -> None:
    """pretrain.method: random with a HiCo file: trunk and pyramid are handed on as they are."""
    source = make_method("hico")
    laterals = {"toplayer": "p5", "latlayer1": "p4", "latlayer2": "p3", "latlayer3": "p2"}
    file = {f"features.R18.{name}": value for name, value in source.backbone.state_dict().items()}
    for theirs, ours in laterals.items():
        file |= {f"features.{theirs}.{kind}": source.exports()[f"pyramid.lateral.{ours}.{kind}"] for kind in ("weight", "bias")}
    torch.save(file, project / "best_model.pth")
    config, _ = make_project(project, pretrain__method="random", pretrain__init="best_model.pth")
    run_pretrain_stage(config, 0, Path("pretrain.py"))
    extras = read_state_dict(project / "models/encoders/fold0/extras.safetensors")
    assert len(extras) == 8
    assert all(torch.equal(value, source.exports()[name]) for name, value in extras.items())
    assert "format HiCo" in read_json(project / "models/encoders/fold0/card.json")["init_report"]
    assert to_extras({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}) == {}


# --- published arrays -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared: Path) -> Path:
    folder = shared / "golden/hico"
    if not folder.is_dir():
        pytest.skip("the shared folder has no golden/hico")
    return folder


def test_goldens__all_but_the_large_network(published: Path) -> None:
    """The program `tests/check_goldens.py` also checks the network at 224 pixels."""
    index = read_json(published / "index.json")
    assert goldens_hico.recognises(index)
    found = [(name, check) for name, _, check in goldens_hico.cases(published, index) if not name.startswith("network")]
    assert len(found) >= 25
    for _, check in found:
        check()


@pytest.mark.parametrize("kind", ["hierarchical", "soft_ce", "step_total", "fpn", "lr_pretrain", "finetune_metrics"])
def test_goldens__a_wrong_number_is_noticed(published: Path, kind: str) -> None:
    index = read_json(published / "index.json")
    check = next(check for name, _, check in goldens_hico.cases(published, index) if name.startswith(kind))
    case, settings = check.args
    results = [name for name in case if not name.startswith(("local_i", "medium_", "global_i", "global_j", "local_j", "logits", "labels", "predictions"))]
    for name in {"hierarchical": ["global_local", "grad_local_j", "cross_view_gm"], "step_total": ["total", "grad_logits_i"]}.get(kind, results):
        wrong = {**case, name: case[name] + (1 if case[name].dtype.kind == "i" else 1e-3 * (abs(case[name]).max() + 1))}
        with pytest.raises(Mismatch):
            goldens_hico.CHECKS[kind](wrong, settings)
