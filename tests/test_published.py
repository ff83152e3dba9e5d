"""Weights of published programs: the format is recognised, every trunk tensor lands, anything else is one clear error."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

from pipeline.checkpoint import export_encoder, read_state_dict
from pipeline.config import Config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.backbones import build_backbone, build_trunk, imagenet_state
from pipeline.models.catalog import BackboneInfo, describe, names
from pipeline.models.published import detect_format, load_trunk, to_extras, to_trunk
from pipeline.preflight import check_named_files

TINY = BackboneInfo("tiny", "vit", 16, (2,), 8, 2)
Tensors = dict[str, torch.Tensor]


def renamed(tensors: Tensors, prefix: str, **more: Any) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()} | more


def resnet(seed: int = 1) -> Tensors:
    return build_backbone("resnet10", seed)[0].state_dict()


def vit(seed: int = 1) -> Tensors:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in build_trunk(TINY, 32).state_dict().items()}


def like_ucl(trunk: Tensors) -> Any:
    heads = {"module.q_cycle_fc.0.weight": torch.ones(2), "module.negatives": torch.ones(3), "module.encoder_q.fc.0.weight": torch.ones(2)}
    return {"epoch": 60, "arch": "resnet", "state_dict": renamed(trunk, "module.encoder_q.") | renamed(resnet(5), "module.encoder_k.") | heads}


def like_moco(trunk: Tensors) -> Any:
    extra = renamed(resnet(5), "module.encoder_k.") | {"module.queue": torch.ones(3)}
    return {"epoch": 200, "state_dict": renamed(trunk, "module.encoder_q.") | extra, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}


def like_uscl(trunk: Tensors) -> Any:
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    split = {name: name.partition(".") for name in trunk}
    halves = {f"features.{numbers[split[n][0]]}.{split[n][2]}": v.half() if v.is_floating_point() else v for n, v in trunk.items()}
    return halves | {"l1.weight": torch.ones(2), "fc.bias": torch.ones(2)}


def like_hico(trunk: Tensors) -> Any:
    return renamed(trunk, "features.R18.") | {"features.R18.fc.weight": torch.ones(2), "features.toplayer.weight": torch.ones(2), "lf.bias": torch.ones(2)}


def like_msn(trunk: Tensors) -> Any:
    head = {"module.fc.fc1.weight": torch.ones(2), "module.fc.bn1.bias": torch.ones(2)}
    return {
        "target_encoder": renamed(trunk, "module.") | head, "encoder": renamed(vit(5), "module.") | head,
        "prototypes": torch.ones(3, 2), "opt": {"state": {}, "param_groups": []}, "epoch": 100,
    }


def like_dino(trunk: Tensors) -> Any:
    head = {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_g": torch.ones(2)}
    return {
        "student": renamed(renamed(vit(5), "backbone.") | head, "module."), "teacher": renamed(trunk, "backbone.") | head,
        "epoch": 100, "args": argparse.Namespace(arch="vit_small"),
    }


def with_head(trunk: Tensors) -> Any:
    return trunk | {"head.weight": torch.ones(2), "head.bias": torch.ones(2)}


def with_fc(trunk: Tensors) -> Any:
    return trunk | {"fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}


FILES: list[tuple[str, Callable[[Tensors], Any], bool, str, int]] = [
    ("US_UCL", like_ucl, False, "state_dict.module.encoder_q.", 3 + 72),
    ("MoCo", like_moco, False, "state_dict.module.encoder_q.", 1 + 72),
    ("MoCo v3", lambda t: {"state_dict": renamed(t, "module.base_encoder.")}, True, "state_dict.module.base_encoder.", 0),
    ("USCL", like_uscl, False, "features.", 2),
    ("HiCo", like_hico, False, "features.R18.", 3),
    ("MSN", like_msn, True, "target_encoder.module.", 2 + 30 + 2 + 1),
    ("DINO", like_dino, True, "teacher.backbone.", 2 + 30 + 2),
    ("timm vision transformer", with_head, True, "", 2),
    ("timm vision transformer", lambda t: {"model": t}, True, "model.", 0),
    ("torchvision ResNet", with_fc, False, "", 2),
    ("torchvision ResNet", lambda t: renamed(t, "module."), False, "module.", 0),
    ("trunk with a head", lambda t: renamed(t, "backbone.") | {"head.weight": torch.ones(2)}, False, "backbone.", 1),
    ("trunk with a head", lambda t: renamed(t, "encoder."), False, "encoder.", 0),
]


@pytest.mark.parametrize(("name", "make", "transformer", "prefix", "unused"), FILES, ids=[f"{f[0]}-{f[3]}" for f in FILES])
def test_to_trunk__files_of_known_programs(
    tmp_path: Path, name: str, make: Callable[[Tensors], Any], transformer: bool, prefix: str, unused: int
) -> None:
    """The published network of the file and no other: not the key network, the student, or a head."""
    trunk = vit() if transformer else resnet()
    torch.save(make(trunk), tmp_path / "published.pth.tar")
    tensors = read_state_dict(tmp_path / "published.pth.tar")
    state, report = to_trunk(tensors, TINY if transformer else "resnet10", 32)
    assert detect_format(tensors) == report.format == name
    assert (report.prefix, report.matched, len(report.unexpected), report.missing) == (prefix, len(trunk), unused, [])
    assert f"format {name} (prefix '{prefix}'): {len(trunk)} tensors of the trunk matched, 0 missing, {unused} not used" in str(report)
    assert state.keys() == trunk.keys()
    for key, value in trunk.items():
        torch.testing.assert_close(state[key], value.half().float() if name == "USCL" and value.is_floating_point() else value, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "name", "matched"), [("uscl", "USCL", 120), ("hico", "HiCo", 120)])
def test_to_trunk__names_of_the_official_networks(shared: Path, method: str, name: str, matched: int) -> None:
    index = json.loads((shared / "golden" / method / "checkpoint_keys.json").read_text(encoding="utf-8"))["keys"]
    tensors = {entry["key"]: torch.full(entry["shape"], float(i % 7)) for i, entry in enumerate(index)}
    state, report = to_trunk(tensors, "resnet18")
    assert (report.format, report.matched) == (name, matched)
    wanted = {entry["torchvision_key"]: entry["key"] for entry in index if entry["torchvision_key"]}
    assert state.keys() == {key for key in wanted if not key.startswith("fc.")}
    assert all(torch.equal(state[key], tensors[wanted[key]]) for key in state)


def test_to_trunk__torchvision_transformer_computes_the_same() -> None:
    torch.manual_seed(0)
    plain = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 64, num_classes=3).eval()
    state, report = to_trunk(plain.state_dict(), TINY, 32)
    ours = build_trunk(TINY, 32).eval()
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.heads(ours(images)), plain(images), rtol=1e-5, atol=1e-6)
    assert report.format == "torchvision vision transformer"


@pytest.mark.parametrize(("backbone", "theirs"), [("vit_tiny", "vit_tiny_patch16_224"), ("resnet18", "resnet18")])
def test_load_trunk__timm_model_with_its_classifier(backbone: str, theirs: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(theirs, num_classes=5).eval()
    ours = build_backbone(backbone, 1)[0].eval()
    report = load_trunk(ours, model.state_dict(), "timm.safetensors")
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(images), model.forward_head(model.forward_features(images), pre_logits=True), rtol=1e-5, atol=1e-5)
    assert len(report.unexpected) == 2


@pytest.mark.parametrize(("plain", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_to_trunk__averaged_weights_of_timm_training(tmp_path: Path, plain: str, average: str) -> None:
    """As timm's own loader takes them, and the report says so."""
    torch.save({"epoch": 3, "arch": "x", plain: vit(5), average: vit()}, tmp_path / "last.pth.tar")
    state, report = to_trunk(read_state_dict(tmp_path / "last.pth.tar"), TINY, 32)
    assert all(torch.equal(state[name], value) for name, value in vit().items())
    assert f"read from the file's container '{average}'" in str(report)
    assert "container" not in str(to_trunk(vit(), TINY, 32)[1])


def test_load_trunk__positions_of_another_grid() -> None:
    torch.manual_seed(0)
    small, report = to_trunk(vit(), TINY, 64)
    assert small["pos_embed"].shape == (1, 65, 16) and report.grid == (4, 8)
    assert "positions resampled from 4x4 to 8x8 patches" in str(report)
    assert torch.equal(small["pos_embed"][:, 0], vit()["pos_embed"][:, 0])
    crooked = vit() | {"pos_embed": torch.ones(1, 14, 16)}
    with pytest.raises(CheckpointError, match=r"pretrain.init: x.pth: pos_embed: a table of shape \(1, 14, 16\)"):
        to_trunk(crooked, TINY, 64, source="x.pth")


def test_to_trunk__official_dinov2_file() -> None:
    """37 x 37 positions and a token for masked patches, which features do not need; a plain transformer it is not."""
    network = build_trunk(describe("dinov2_small"), 518)
    official = network.state_dict() | {"mask_token": torch.zeros(1, 384)}
    state, report = to_trunk(official, "dinov2_small", 112)
    assert report.grid == (37, 8) and report.unexpected == ["mask_token"] and len(state) == len(official) - 1
    with pytest.raises(CheckpointError, match=r"24 tensors in the file are no part of it \(blocks.0.ls1.gamma.* It fits pretrain.backbone: dinov2_small"):
        to_trunk(official, "vit_small", 112)


def test_read_state_dict__options_are_read_but_objects_in_them_are_not(tmp_path: Path) -> None:
    """Files of DINO hold an argparse.Namespace, which is allowed; that opens no door for what else may be in it."""
    torch.save({"teacher": {"a": torch.ones(1)}, "args": argparse.Namespace(path=Path("x"))}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth is refused: it holds Python objects"):
        read_state_dict(tmp_path / "evil.pth")


def test_load_trunk__our_own_export(tmp_path: Path) -> None:
    network, _ = build_backbone("vit_tiny", 3, 32)
    export_encoder(tmp_path, network.state_dict(), {"backbone": "vit_tiny"})
    other, _ = build_backbone("vit_tiny", 4, 48)
    report = load_trunk(other, read_state_dict(tmp_path / "encoder.safetensors"), "encoder.safetensors")
    assert report.unexpected == [] and report.grid == (2, 3)
    assert torch.equal(other.blocks[7].mlp.fc1.weight, network.blocks[7].mlp.fc1.weight)


def test_load_trunk__another_architecture_loads_nothing_and_names_the_right_one() -> None:
    small, _ = build_backbone("resnet10", 0)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    with pytest.raises(CheckpointError) as wide:
        load_trunk(small, build_backbone("resnet50")[0].state_dict(), "resnet50.pth")
    assert "pretrain.init: resnet50.pth (format torchvision ResNet) does not fit this backbone" in str(wide.value)
    assert "have another shape (layer" in str(wide.value) and "It fits pretrain.backbone: resnet50." in str(wide.value)
    # Every tensor of resnet10 is in resnet18, with equal shapes: what is too much in the file must count as well.
    with pytest.raises(CheckpointError, match=r"\d+ tensors in the file are no part of it \(layer1.1.* It fits pretrain.backbone: resnet18"):
        load_trunk(small, build_backbone("resnet18")[0].state_dict(), "resnet18.pth")
    with pytest.raises(CheckpointError, match=r"\d+ tensors are missing \(layer1.1.*It fits pretrain.backbone: resnet10"):
        load_trunk(build_backbone("resnet18")[0], before, "resnet10.pth")
    with pytest.raises(CheckpointError, match="It fits none of the known backbones"):
        load_trunk(small, vit(), "vit.pth")
    scaled = vit() | {"blocks.0.ls1.gamma": torch.ones(16)}
    with pytest.raises(CheckpointError, match=r"1 tensors in the file are no part of it \(blocks.0.ls1.gamma\)"):
        to_trunk(scaled, TINY, 32)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize(
    ("name", "broken", "why"),
    [
        ("norm.weight", lambda t: t.clone().fill_(float("nan")), "not finite"),
        ("norm.weight", lambda t: t.clone().fill_(float("-inf")).half(), "not finite"),
        ("norm.weight", lambda t: t.to(torch.int8), "int8"),
        ("norm.weight", lambda t: t.to(torch.complex64), "complex64"),
        ("norm.weight", lambda t: t.to_sparse(), "not dense"),
        ("norm.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "not dense"),
        ("norm.weight", lambda t: t.to("meta"), "not dense"),
        ("pos_embed", lambda t: torch.ones(1, 1, 1).expand(1, 1 + 2**30, 16), "larger than its data"),
    ],
)
def test_to_trunk__tensors_that_cannot_be_weights(name: str, broken: Callable[[torch.Tensor], torch.Tensor], why: str) -> None:
    tensors = vit()
    with pytest.raises(CheckpointError) as refused:
        to_trunk(tensors | {name: broken(tensors[name])}, TINY, 32, source="odd.pth")
    start = f"pretrain.init: odd.pth: 1 tensors cannot be weights ({name}: {why}). Wanted: dense tensors of finite float16"
    assert str(refused.value).startswith(start) and "\n" not in str(refused.value)
    hico = renamed(resnet(), "features.R18.") | {"features.toplayer.weight": torch.full((2,), float("nan"))}
    with pytest.raises(CheckpointError, match=r"1 tensors cannot be weights \(pyramid.lateral.p5.weight: not finite\)"):
        to_extras(hico)


def test_load_trunk__unknown_names_list_the_formats() -> None:
    with pytest.raises(CheckpointError) as refused:
        to_trunk({"net.first.kernel": torch.ones(2)}, "resnet10", source="odd.pt", key="models/encoders")
    assert str(refused.value).startswith("models/encoders: odd.pt: the names are those of no known program, for example (net.first.kernel)")
    assert "Known: US_UCL, MoCo, MoCo v3, HiCo, USCL," in str(refused.value)


def test_load_trunk__parts_that_may_be_missing_must_be_named() -> None:
    short = {name: value for name, value in vit().items() if not name.startswith("norm.")}
    with pytest.raises(CheckpointError, match=r"2 tensors are missing \(norm.bias, norm.weight\)\..*pretrain.init_allow_missing"):
        to_trunk(short, TINY, 32)
    network = build_trunk(TINY, 32)
    torch.nn.init.constant_(network.norm.weight, 3.0)
    report = load_trunk(network, short, "x", allow_missing=["norm"])
    assert report.missing == ["norm.bias", "norm.weight"] and "2 missing (norm.bias, norm.weight)" in str(report)
    assert network.norm.weight.eq(3).all() and torch.equal(network.cls_token, vit()["cls_token"])
    fewer = {name: value for name, value in vit().items() if not name.startswith("blocks.1.")}
    with pytest.raises(CheckpointError, match="12 tensors are missing"):
        to_trunk(fewer, TINY, 32, allow_missing=["norm", "blocks.10"])


def test_load_trunk__old_files_without_batch_norm_counters() -> None:
    target, _ = build_backbone("resnet10", 2)
    report = load_trunk(target, {k: v for k, v in resnet().items() if not k.endswith("num_batches_tracked")}, "old.pth")
    assert torch.equal(target.conv1.weight, resnet()["conv1.weight"]) and report.missing == []


@pytest.mark.parametrize("backbone", [name for name in names() if describe(name).weights])
def test_imagenet_state__never_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    file = describe(backbone).weights
    with pytest.raises(CheckpointError, match=rf"pretrain\.init: imagenet was asked for, but .*{file} does not exist\. On a machine .*python -c"):
        imagenet_state(backbone)
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"half a download")
    with pytest.raises(CheckpointError, match=rf"{file} is "):
        imagenet_state(backbone)
    torch.save({"model": {"head.weight": torch.ones(2)}}, folder / file)
    assert imagenet_state(backbone).keys() == {"model.head.weight"}


def test_imagenet_state__hugging_face_cache_and_no_weights_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abcd")
    network, _ = build_backbone("vit_tiny", 7)
    export_encoder(tmp_path / "made", network.state_dict(), {})
    (repository / "snapshots/0123abcd").mkdir(parents=True)
    (tmp_path / "made/encoder.safetensors").rename(repository / "snapshots/0123abcd/model.safetensors")
    other, _ = build_backbone("vit_tiny", 8, 64)
    assert load_trunk(other, imagenet_state("vit_tiny"), "imagenet weights").grid == (14, 4)
    with pytest.raises(CheckpointError, match="do not exist for backbone 'resnet10'. Allowed here: random, or a path.*vit_tiny"):
        imagenet_state("resnet10")


def test_preflight__weights_of_another_architecture_end_before_anything_runs(tmp_path: Path) -> None:
    """For files of every kind, not only where names could be read without torch."""
    torch.save(like_ucl(resnet()), tmp_path / "checkpoint_0059.pth.tar")
    pretrain = {"init": str(tmp_path / "checkpoint_0059.pth.tar"), "backbone": "resnet10"}
    check_named_files(Config.model_validate({"pretrain": pretrain}))
    with pytest.raises(ConfigError, match=r"1 problem\n  pretrain.init: checkpoint_0059.pth.tar \(format US_UCL\) does not fit resnet34"):
        check_named_files(Config.model_validate({"pretrain": pretrain | {"backbone": "resnet34"}}))
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigError, match="code.pth is refused"):
        check_named_files(Config.model_validate({"pretrain": pretrain | {"init": str(tmp_path / "code.pth")}}))


def test_preflight__imagenet_weights_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pretrain = {"init": "imagenet", "backbone": "vit_small", "image_size": 112}
    with pytest.raises(ConfigError, match=r"1 problem\n  pretrain.init: imagenet was asked for, but .*deit_small.*import timm; timm.create_model"):
        check_named_files(Config.model_validate({"pretrain": pretrain}))


def test_format__a_network_that_numbers_its_layers_is_not_uscl():
    mobile = {f"features.{i}.conv.0.0.weight": torch.zeros(2, 2, 1, 1) for i in range(1, 6)} | {"features.0.0.weight": torch.zeros(2, 3, 3, 3)}
    with pytest.raises(CheckpointError, match="of no known program"):
        detect_format(mobile)
