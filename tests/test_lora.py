"""Low-rank adapters and frozen transformers: nothing changes at first, only adapters and head train, files are plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import make_data
from training_kit import CPU, ListTracker, make_config, make_project, make_store

from pipeline.data.store import FrameStore
from pipeline.errors import ConfigError
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier
from pipeline.models.lora import add_lora, merged_state
from pipeline.training.finetune import Finetuning
from pipeline.training.finetune_stage import run_finetune_stage


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=8, frames=6)


def make_network(trainable: str, seed: int = 0, **options: float) -> Classifier:
    backbone, features = build_backbone("vit_tiny", seed, 32)
    torch.manual_seed(seed)
    return Classifier(backbone, "vit_tiny", features, 2, head="linear", trainable=trainable, batchnorm="frozen", **options)


def make_finetuning(tmp_path: Path, store: FrameStore, trainable: str, **changes: object) -> Finetuning:
    settings = {f"finetune__{k}": v for k, v in {"optimizer": {"name": "adam", "lr": 0.003}, "selection": "last", **changes}.items()}
    params = make_config(tmp_path, **settings).finetune
    network = make_network(trainable)
    return Finetuning(network, make_data(store), params, seed=0, size=32, device=CPU)


def test_add_lora__is_exactly_the_frozen_network_at_first() -> None:
    plain, _ = build_backbone("vit_tiny", 0, 32)
    adapted, _ = build_backbone("vit_tiny", 0, 32)
    trained = add_lora(adapted, rank=4, alpha=8.0)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), adapted.eval()(images))
    assert len(trained) == 12 * 2 * 2 and all(".parametrizations.weight.0." in name for name in trained)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 12 * 4 * ((192 + 576) + (192 + 192))


def test_add_lora__change_is_alpha_over_rank_times_up_down() -> None:
    """Against the two-branch form of the paper: W x + (alpha / r) B A x."""
    backbone, _ = build_backbone("vit_tiny", 0, 32)
    layer = backbone.blocks[3].attn.proj
    before = layer.weight.detach().clone()
    add_lora(backbone, rank=2, alpha=6.0)
    pair = layer.parametrizations.weight[0]
    torch.nn.init.normal_(pair.up)
    x = torch.randn(5, 192)
    wanted = x @ before.T + layer.bias + 3.0 * (x @ pair.down.T) @ pair.up.T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_merged_state__plain_names_bit_for_bit() -> None:
    network = make_network("lora", lora_rank=4)
    for name, parameter in network.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.1)
    other = make_network("linear", seed=1)
    assert merged_state(network).keys() == other.state_dict().keys()
    other.load_state_dict(merged_state(network))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), other.eval()(images))
    plain = make_network("linear")
    assert merged_state(plain).keys() == plain.state_dict().keys(), "without adapters nothing is changed"


@pytest.mark.parametrize("trainable", ["linear", "lora", "last_block", "blocks.11", "norm", "all"])
def test_training__only_the_chosen_parts_move(store: FrameStore, tmp_path: Path, trainable: str) -> None:
    run = make_finetuning(tmp_path, store, trainable, epochs=2)
    before = {k: v.clone() for k, v in run.network.state_dict().items()}
    run.train(ListTracker(), "test")
    moved = {k.removeprefix("backbone.") for k, v in run.network.state_dict().items() if not torch.equal(v, before[k])}
    assert {"head.weight", "head.bias"} <= moved
    inside = {name for name in moved if not name.startswith("head.")}
    assert bool(inside) == (trainable != "linear")
    if trainable == "lora":
        assert inside == set(run.network.trained_names)
    parts = {"last_block": ("blocks.11.", "norm."), "blocks.11": ("blocks.11.",), "norm": ("norm.",)}.get(trainable, ("",))
    assert all(name.startswith(parts) for name in inside)


@pytest.mark.parametrize(
    ("trainable", "cached", "last"), [("linear", True, (192,)), ("last_block", True, (5, 192)), ("lora", False, None), ("all", False, None)]
)
def test_finetuning__frozen_transformer_is_computed_once(
    store: FrameStore, tmp_path: Path, trainable: str, cached: bool, last: tuple[int, ...] | None
) -> None:
    """Whole-trunk features where only the classifier trains; tokens of four patches and the class where the last block does."""
    run = make_finetuning(tmp_path, store, trainable, epochs=2, cached_views=1)
    assert run.cached == cached
    run.train(ListTracker(), "test")
    if last:
        assert run._views[0][1].shape[1:] == last
    uncached = run.params.model_copy(update={"cached_views": 0})
    direct = Finetuning(run.network, run.data, uncached, seed=0, size=32, device=CPU)
    assert not direct.cached
    wanted = direct.predict("test").probabilities
    torch.testing.assert_close(torch.tensor(run.predict("test").probabilities), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_classifier__lora_is_for_transformers() -> None:
    backbone, features = build_backbone("resnet10")
    with pytest.raises(ConfigError, match="lora adapts the attention of vision transformers; pretrain.backbone is resnet10. Use linear"):
        Classifier(backbone, "resnet10", features, 2, head="linear", trainable="lora", batchnorm="frozen")
    with pytest.raises(ConfigError, match="no parameter of vit_tiny begins with 'blocks.3.conv'"):
        make_network("blocks.3.conv")


def test_stage__adapted_model_is_written_with_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    config, _ = make_project(
        tmp_path, pretrain__backbone="vit_tiny", finetune__trainable="lora", finetune__lora_rank=2, finetune__initialisations=["random"],
        finetune__epochs=1, finetune__selection="last",
    )
    assert "done" in run_finetune_stage(config, "random", 0, 0)
    found = load_file(tmp_path / "models/finetuned/random-seed0-fold0/model.safetensors")
    assert found.keys() == make_network("linear").state_dict().keys()
    untrained, _ = build_backbone("vit_tiny", config.pretrain.seed, 32)
    assert torch.equal(found["backbone.blocks.0.mlp.fc1.weight"], untrained.blocks[0].mlp.fc1.weight)
    assert not torch.equal(found["backbone.blocks.0.attn.qkv.weight"], untrained.blocks[0].attn.qkv.weight)
