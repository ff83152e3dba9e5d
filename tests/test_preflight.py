"""Everything params.yaml names is looked for before anything runs, and all that is missing is said at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from weights_kit import hico_file

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.preflight import check_named_files

ROOT = Path(__file__).resolve().parents[1]


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(sections)


def test_preflight__everything_missing_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    broken = config(
        data={"source": str(tmp_path / "none"), "extra_sources": {"more": {"path": str(tmp_path / "clip.mp4")}}},
        split={"file": "no/split.json"}, pretrain={"init": "no/weights.pth"},
    )
    with pytest.raises(ConfigError) as error:
        check_named_files(broken)
    text = str(error.value)
    assert text.startswith("params.yaml: 4 problems") and "data.source:" in text and "does not exist. Give a folder" in text
    assert "data.extra_sources.more.path:" in text and "is a file, not a folder" in text
    assert "split.file: no/split.json does not exist" in text and "pretrain.init: no/weights.pth does not exist" in text


def test_preflight__phantoms_need_not_exist_yet_and_relative_paths_are_explained() -> None:
    check_named_files(config())
    with pytest.raises(ConfigError, match="queued experiment a relative path"):
        check_named_files(config(data={"source": "nowhere/clips"}))


def test_preflight__a_folder_is_no_weights_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 problem\n  pretrain.init: .* is a folder; name the weights file in it. Allowed: random, imagenet"):
        check_named_files(config(pretrain={"init": str(tmp_path)}))


@pytest.mark.parametrize(
    ("pretrain", "start"),
    [
        ({"method": "msn", "backbone": "vit_small", "image_size": 100}, "pretrain.image_size: 100 pixels"),
        ({"method": "msn", "backbone": "dinov2_small", "image_size": 112}, "methods.msn.focal_size: 96 pixels"),
        ({"backbone": "nothing", "method": "msn"}, "pretrain.backbone: unknown backbone 'nothing'"),
    ],
)
def test_preflight__each_problem_once_beside_all_others(pretrain: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_named_files(config(pretrain=pretrain, data={"source": "/nowhere/clips"}))
    lines = str(error.value).splitlines()
    assert lines[0] == "params.yaml: 2 problems" and lines[1].startswith("  data.source: ") and lines[2].startswith(f"  {start}")


def test_preflight__what_a_split_by_frame_cannot_go_with(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text("{}")
    mixed = config(data={"group": "frame", "frame_labels": "{stem}.txt"}, split={"file": str(tmp_path / "split.json")}, finetune={"selection": "nested"})
    with pytest.raises(ConfigError) as error:
        check_named_files(mixed)
    text = str(error.value)
    assert "3 problems" in text and "split.file divides videos" in text and "data.frame_labels gives each frame its own" in text
    check_named_files(config(data={"group": "frame"}, finetune={"selection": "best_on_test"}))


def test_preflight__methods_that_read_labels_and_a_folder_that_has_none(tmp_path: Path) -> None:
    """By names alone, and never where the reader of labels could find some."""
    (tmp_path / "ward").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"x")
    bare = {"data": {"source": str(tmp_path)}, "pretrain": {"method": "uscl"}}
    with pytest.raises(ConfigError, match=r"may see labels of 0") as error:
        check_named_files(config(**bare))
    assert f"data.labels: auto, but {tmp_path} has neither a CSV table nor class folders" in str(error.value)
    check_named_files(config(data=bare["data"]))
    check_named_files(config(data={**bare["data"], "frame_labels": "{stem}.txt"}, pretrain={"method": "uscl"}))
    (tmp_path / "labels.csv").write_text("path,label")
    check_named_files(config(**bare))
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "lab").mkdir()
    check_named_files(config(**bare))


def test_preflight__small_crops_of_dino_fit_every_patch() -> None:
    for backbone, size, side in (("dinov2_small", 224, 98), ("dinov2_small", 56, 42), ("vit_small_8", 224, 96), ("resnet18", 224, 96)):
        checked = config(pretrain={"method": "dino", "backbone": backbone, "image_size": size})
        check_named_files(checked)
        assert checked.method_params.local_size == side


@pytest.mark.parametrize("head", ["hico_pyramid", "hico_official"])
def test_preflight__heads_that_continue_from_a_pyramid(head: str, tmp_path: Path) -> None:
    import torch

    from pipeline.methods.hico import HiCoParams

    def lines(initialisations: tuple[str, ...] = ("pretrained", "random"), **pretrain: Any) -> list[str]:
        checked = config(pretrain=pretrain, finetune={"head": head, "initialisations": initialisations})
        checked.methods["hico"] = HiCoParams(objective=pretrain.pop("objective", "semi"))
        try:
            check_named_files(checked)
        except ConfigError as error:
            return str(error).splitlines()[1:]
        return []

    (line,) = lines(method="ucl")
    assert line.startswith(f"  finetune.head: {head} continues from the pyramid that HiCo leaves beside the trunk; pretrain.method ucl leaves none")
    assert lines(method="hico") == lines(("random",), method="ucl") == []
    from pipeline.models.backbones import build_backbone

    trunk = build_backbone("resnet10")[0].state_dict()
    whole = hico_file(trunk)
    part = {name: value for name, value in whole.items() if name.startswith(("features.R18.", "features.toplayer.", "l2."))}
    for name, tensors, problem in (
        ("hico.pth", whole, None), ("plain.pth", trunk, "continues from the pyramid"), ("part.pth", part, "are missing: pyramid.lateral.p2.weight,"),
    ):
        torch.save(tensors, tmp_path / name)
        found = lines(method="random", backbone="resnet10", image_size=32, init=str(tmp_path / name))
        assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])
    torch.save(whole | {"lf.bias": torch.full((256,), float("nan"))}, tmp_path / "nan.pth")
    (line,) = lines(method="random", backbone="resnet10", image_size=32, init=str(tmp_path / "nan.pth"))
    assert line.startswith("  pretrain.init: nan.pth: 1 tensors cannot be weights (classifier.0.bias: not finite)")
    larger = lines(method="random", backbone="resnet10", image_size=64, init=str(tmp_path / "hico.pth"))
    assert (larger == []) if head == "hico_official" else ("Flattened projectors fit one image size only" in larger[0])


@pytest.mark.parametrize("part", ["nrom", "blocks.12"])
def test_preflight__parts_that_weights_may_lack_must_exist(part: str) -> None:
    section = {"backbone": "vit_tiny", "image_size": 64, "init_allow_missing": [part, "norm", "blocks.3.attn"]}
    with pytest.raises(ConfigError, match=rf"1 problem\n  pretrain.init_allow_missing: '{part}' is no part of vit_tiny. Allowed: .* blocks.11, norm"):
        check_named_files(config(pretrain=section))


def test_check_stage__mistyped_method_ends_with_the_nearest_name(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("method: ucl ", "method: ulc ")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "stages" / "check.py")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "unknown method 'ulc'" in done.stderr and "Did you mean 'ucl'?" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"pretrain": {"backbone": "resnet12"}}, r"pretrain.backbone: unknown backbone 'resnet12'. Allowed: .*resnet10, .*Did you mean"),
        ({"finetune": {"head": "liner"}}, r"finetune.head: unknown head 'liner'. Allowed: .*linear, mlp. Did you mean 'linear'"),
        ({"finetune": {"trainable": "lastblock"}}, r"finetune.trainable: 'lastblock' .* Did you mean 'last_block'"),
        ({"finetune": {"trainable": "layer9"}}, r"finetune.trainable: 'layer9' is no part of resnet18"),
        ({"finetune": {"trainable": "layer4.3"}}, r"'layer4.3' is no part of resnet18. Allowed: .* layer3.1, layer4.0, layer4.1."),
        ({"finetune": {"trainable": "lora"}}, r"finetune.trainable: lora adapts .* pretrain.backbone is resnet18"),
        (
            {"pretrain": {"backbone": "vit_small", "image_size": 112}, "finetune": {"trainable": "blocks.12"}},
            r"params.yaml: 1 problem\n  finetune.trainable: 'blocks.12' is no part of vit_small. Allowed: .* blocks.11, norm. Did you mean",
        ),
        (
            {"pretrain": {"backbone": "vit_tiny", "image_size": 120}},
            r"pretrain.image_size: 120 pixels are not divisible by the patches of vit_tiny \(16 pixels\). Use 112 or 128.",
        ),
    ],
)
def test_preflight__names_of_network_parts_without_torch(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_named_files(config(**section))


@pytest.mark.parametrize("trainable", ["linear", "lora", "last_block", "norm", "blocks.11", "blocks.3.", "blocks", "patch_embed.proj"])
def test_preflight__parts_of_a_vision_transformer(trainable: str) -> None:
    check_named_files(config(pretrain={"backbone": "vit_tiny", "image_size": 64}, finetune={"trainable": trainable}))


def test_declared_names__are_those_that_register() -> None:
    from pipeline.registry import HEADS

    assert HEADS.declared() == HEADS.names()
