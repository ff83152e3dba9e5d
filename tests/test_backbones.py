"""Backbones: the catalog says what is built, plain names outside, vision transformers of any image size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from training_kit import make_config, make_run, make_store, never

from pipeline.checkpoint import export_encoder
from pipeline.errors import ConfigError
from pipeline.models.backbones import build_backbone, build_trunk
from pipeline.models.catalog import BackboneInfo, describe, last_block, names, part_names, within
from pipeline.models.published import to_trunk
from pipeline.models.vit import resample_positions, vit_stages

TIMM = {
    "vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224", "vit_small_8": "vit_small_patch8_224",
    "vit_base": "vit_base_patch16_224", "vit_base_8": "vit_base_patch8_224", "vit_base_32": "vit_base_patch32_224",
    "vit_large": "vit_large_patch16_224", "vit_large_32": "vit_large_patch32_224", "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2", "dinov2_large": "vit_large_patch14_dinov2",
}


@pytest.mark.parametrize("name", names())
def test_catalog__says_what_is_built(name: str) -> None:
    """Names and shapes are those of timm and torchvision; parts cover all parameters, each one once."""
    info = describe(name)
    with torch.device("meta"):
        network = build_trunk(info, 224)
        if info.family == "vit":
            # MSN's own patches of 4 and 7 pixels are sizes of timm's larger ones.
            own = {} if name in TIMM else {"patch_size": info.patch_size}
            theirs = timm.create_model(TIMM.get(name, TIMM[name.rpartition("_")[0]] if own else ""), num_classes=0, img_size=224, **own).state_dict()
        else:
            theirs = getattr(torchvision.models, name if name != "resnet10" else "resnet18")().state_dict()
    ours = network.state_dict()
    if name == "resnet10":
        theirs = {k: v for k, v in theirs.items() if k in ours}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    for parameter, _ in network.named_parameters():
        assert len([part for part in part_names(info) if within(parameter, part)]) == 1, parameter
    assert network(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, info.feature_dim)


def test_catalog__needs_no_torch() -> None:
    code = "import sys; from pipeline.registry import BACKBONES; print(BACKBONES.names(), 'torch' in sys.modules, 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vit_tiny" in done.stdout and done.stdout.strip().endswith("False False")


def test_last_block__of_both_families() -> None:
    assert last_block(describe("resnet18")) == ("layer4.1",) and last_block(describe("resnet50")) == ("layer4.2",)
    assert last_block(describe("vit_large")) == ("blocks.23", "norm")
    assert within("blocks.1.norm1.bias", "blocks.1") and not within("blocks.11.norm1.bias", "blocks.1") and within("x", "")


@pytest.mark.parametrize("name", ["resnet10", "vit_tiny"])
def test_build_backbone__depends_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    one = build_backbone(name, 3, 32)[0].state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the global random state is left alone"
    other = build_backbone(name, 3, 32)[0].state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    first = next(key for key in one if key.endswith("weight"))
    assert not torch.equal(one[first], build_backbone(name, 4, 32)[0].state_dict()[first])


def test_build_backbone__image_that_the_patches_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"pretrain.image_size: 40 pixels .* patches of vit_tiny \(16 pixels\). Use 32 or 48."):
        build_backbone("vit_tiny", 0, 40)
    with pytest.raises(ConfigError, match="Use 16 or 32"):
        build_backbone("vit_tiny", 0, 8)


def test_vit__outputs_are_timms_at_the_native_size() -> None:
    ours = build_backbone("vit_tiny", 0)[0].eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_vit__outputs_of_the_official_network_at_other_sizes(shared: Path) -> None:
    """Class token of a published checkpoint for images of its own size and of two others."""
    index = json.loads((shared / "golden/msn/index.json").read_text(encoding="utf-8"))["cases"]
    entry = next(case for case in index if case["kind"] == "vit")
    case, settings = np.load(shared / "golden/msn" / entry["file"]), entry["settings"]
    info = BackboneInfo("golden", "vit", settings["dim"], (settings["depth"],), settings["patch"], settings["heads"])
    weights = {name.removeprefix("weights/"): torch.from_numpy(case[name]) for name in case if name.startswith("weights/")}
    state, report = to_trunk(weights, info, settings["img_size"])
    assert (report.format, report.missing) == ("MSN", [])
    network = build_trunk(info, settings["img_size"]).double().eval()
    network.load_state_dict(state)
    for size in (32, 24, 16):
        images = torch.from_numpy(case[f"images_{size}"]).double()
        torch.testing.assert_close(network(images).detach().numpy(), case[f"cls_norm_{size}"], rtol=1e-6, atol=1e-6)


def test_resample_positions__keeps_the_class_and_does_not_antialias() -> None:
    table = torch.randn(1, 1 + 14 * 14, 4)
    assert torch.equal(resample_positions(table, 14), table)
    small = resample_positions(table, 6)
    grid = table[:, 1:].reshape(1, 14, 14, 4).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(grid, size=6, mode="bicubic", align_corners=False)
    torch.testing.assert_close(small[:, 1:], plain.permute(0, 2, 3, 1).reshape(1, 36, 4))
    assert torch.equal(small[:, 0], table[:, 0])


def test_vit_stages__are_the_same_function_with_the_same_parameters() -> None:
    network = build_backbone("vit_tiny", 0, 32)[0].eval()
    images = torch.randn(2, 3, 48, 32)
    tokens = images
    for _, module in vit_stages(network):
        tokens = module(tokens)
    assert torch.equal(tokens, network(images))
    held = {id(p) for _, module in vit_stages(network) for p in module.parameters()}
    assert held == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("method", ["simclr", "ucl"])
def test_pretraining__continues_from_a_timm_file_with_any_method(tmp_path: Path, method: str) -> None:
    """A timm model with its classifier, another image size: loaded, trained, exported, and said in the card."""
    given = timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict()
    torch.save(given, tmp_path / "timm.pth")
    config = make_config(
        tmp_path, pretrain__method=method, pretrain__backbone="vit_tiny", pretrain__init=str(tmp_path / "timm.pth"), pretrain__epochs=1
    )
    store = make_store(tmp_path / "store", patients=4)
    run = make_run(config, store, tmp_path / "scratch")
    before = run.method.backbone.state_dict()["blocks.5.attn.qkv.weight"].clone()
    assert torch.equal(before, given["blocks.5.attn.qkv.weight"])
    assert run.init_report is not None and run.init_report.grid == (14, 2)
    run.train(never())
    run.export(tmp_path / "result")
    card = json.loads((tmp_path / "result/card.json").read_text(encoding="utf-8"))
    assert card["init_format"] == "timm vision transformer" and "150 tensors of the trunk matched" in card["init_report"]
    assert not torch.equal(before, run.method.backbone.state_dict()["blocks.5.attn.qkv.weight"])


def test_export__vit_loads_into_timm_with_nothing_missing(tmp_path: Path) -> None:
    network, _ = build_backbone("vit_tiny", 0, 64)
    export_encoder(tmp_path, network.state_dict(), {})
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    plain.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(plain(images), network.eval()(images), rtol=1e-5, atol=1e-5)
