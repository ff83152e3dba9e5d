"""`sonoscope export`: what is written loads in the library it is for and gives the same numbers; the card's own lines run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from fake_experiment import FakeExperiment
from weights_kit import GROUPS, make_classifier, make_encoder

from pipeline.cli import main
from pipeline.errors import CheckpointError, PipelineError
from pipeline.evaluation.evaluate import evaluate
from pipeline.export.facts import about, find_weights
from pipeline.export.formats import export, load_network, sample_images
from pipeline.models.backbones import build_trunk
from pipeline.models.catalog import LEVEL_HEADS, describe, names

torch.set_num_threads(1)


def exported(folder: Path, form: str, out: Path, **options: Any) -> tuple[Path, dict[str, Any], str]:
    """Export and read what was written: the file, the card for programs, the card for people."""
    export(folder, form, out, **options)
    return out, json.loads((out.parent / "MODEL_CARD.json").read_text()), (out.parent / "MODEL_CARD.md").read_text()


def run_card(text: str, folder: Path, images: np.ndarray) -> np.ndarray:
    """Run the Python of a card as a reader would: in the folder of the file, with `images` at hand."""
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet
    names: dict[str, Any] = {"images": images}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(snippet[1], names)
    finally:
        os.chdir(before)
    return np.asarray(names["logits" if "logits" in names else "features"])


def wanted(folder: Path, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return load_network(find_weights(folder))(images).numpy()


@pytest.mark.parametrize(
    ("kind", "backbone", "head", "form"),
    [
        ("encoder", "resnet10", "", "torchvision"), ("encoder", "resnet18", "", "timm"), ("encoder", "vit_tiny", "", "timm"),
        ("encoder", "vit_tiny", "", "safetensors"), ("classifier", "resnet18", "linear", "torchvision"),
        ("classifier", "resnet10", "linear", "safetensors"), ("classifier", "resnet18", "mlp", "timm"),
        ("classifier", "vit_tiny", "mlp", "timm"), ("classifier", "vit_tiny", "linear", "timm"),
    ],
)  # fmt: skip
def test_libraries__the_lines_of_the_card_give_the_same_numbers(tmp_path: Path, kind: str, backbone: str, head: str, form: str) -> None:
    folder = make_encoder(tmp_path / "in", backbone) if kind == "encoder" else make_classifier(tmp_path / "in", backbone, head)
    suffix = "safetensors" if form == "safetensors" else "pth"
    out, _, text = exported(folder, form, tmp_path / f"out/w.{suffix}")
    images = sample_images(32, "imagenet", 2)
    assert np.abs(run_card(text, out.parent, images.numpy()) - wanted(folder, images)).max() < 1e-5


@pytest.mark.parametrize(("kind", "backbone"), [("encoder", "vit_tiny"), ("classifier", "resnet10")])
def test_onnx__same_numbers_for_any_batch(tmp_path: Path, kind: str, backbone: str) -> None:
    pytest.importorskip("onnxruntime")
    folder = make_encoder(tmp_path / "in", backbone) if kind == "encoder" else make_classifier(tmp_path / "in", backbone, "linear")
    out, card, text = exported(folder, "onnx", tmp_path / "out/w.onnx")
    for count in (1, 3):
        images = sample_images(32, "imagenet", count)[-count:]
        assert np.abs(run_card(text, out.parent, images.numpy()) - wanted(folder, images)).max() < 1e-4
    assert "largest difference" in card["export"]["check"]


def test_onnx__other_image_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = make_encoder(tmp_path / "in", "resnet10")
    out, card, text = exported(folder, "onnx", tmp_path / "out/w.onnx", image_size=48)
    images = sample_images(48, "imagenet", 1)
    assert np.abs(run_card(text, out.parent, images.numpy()) - wanted(folder, images)).max() < 1e-4
    assert card["preprocessing"]["size"] == 48 and "48, 48" in text


def test_onnx__a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PipelineError, match=r'onnxruntime.*pip install "sonoscope\[export\]"'):
        export(make_encoder(tmp_path / "in", "resnet10"), "onnx", tmp_path / "out/w.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_onnx__other_numbers_are_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("pipeline.export.formats._run_onnx", lambda data, images: np.full((len(images), 512), 0.5, np.float32))
    with pytest.raises(PipelineError, match="other numbers"):
        export(make_encoder(tmp_path / "in", "resnet10"), "onnx", tmp_path / "out/w.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_card__says_what_it_is_and_names_nobody(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "in", "resnet10", "linear", pretrain_scope="all", stamp="optimistic (selected on test)")
    _, card, text = exported(folder, "torchvision", tmp_path / "out/w.pth")
    for words in ("Transductive", "optimistic (selected on test)", "Not** a medical device", "to be filled in", "grey", "0.485", "a, b"):
        assert words in text, words
    assert card["data"] == {"train_patients": 2, "validation_patients": 1, "test_patients": 2, "pretrain_patients": 5}
    both = text + json.dumps(card)
    assert not [group for group in GROUPS if group in both] and str(tmp_path) not in both
    assert card["metrics"] == {} and "evaluate them" in text


def test_card__says_whose_labels_pretraining_read(tmp_path: Path) -> None:
    told = {"labelled_videos": {"ill": 3, "well": 4, "other": 0}, "label_groups": GROUPS[:2]}
    _, card, text = exported(make_encoder(tmp_path / "in", "resnet10", **told), "torchvision", tmp_path / "out/w.pth")
    assert card["pretraining_labels"] == {"patients": 2, "videos": {"ill": 3, "well": 4}}
    assert "with labels of 2 patients (7 videos: ill 3, well 4)" in text and "without labels" not in text
    assert not [group for group in GROUPS if group in text + json.dumps(card)]
    none = {"labelled_videos": {}, "label_groups": []}
    _, _, text = exported(make_encoder(tmp_path / "none", "resnet10", **none), "torchvision", tmp_path / "none/w.pth")
    assert "without labels" in text
    _, _, text = exported(make_encoder(tmp_path / "old", "resnet10"), "torchvision", tmp_path / "old/w.pth")
    assert "without labels" not in text, "an older card does not say"
    later = {f"pretrain_{name}": value for name, value in told.items()}
    _, card, text = exported(make_classifier(tmp_path / "head", "resnet10", "linear", **later), "torchvision", tmp_path / "head/w.pth")
    assert "| labels in pretraining | labels of 2 patients" in text


def test_card__explains_each_stamp_by_its_own_words(tmp_path: Path) -> None:
    stamp = "encoder pretrained with labels beyond finetune.label_fraction"
    _, _, text = exported(make_classifier(tmp_path / "in", "resnet10", "linear", stamp=stamp), "torchvision", tmp_path / "out/w.pth")
    assert f"**{stamp}**" in text and "epoch was chosen" not in text
    _, _, text = exported(
        make_classifier(tmp_path / "two", "resnet10", "linear", stamp=f"optimistic (selected on test), {stamp}"), "torchvision", tmp_path / "two/w.pth"
    )
    assert "the training epoch was chosen on the patients that are reported" in text and f"\nE{stamp[1:]}" in text


def test_card__results_only_from_the_report_of_these_weights(tmp_path: Path) -> None:
    """Both tables are the stages' own: the report's has columns that a fold's has not, in other places."""
    fake = FakeExperiment(tmp_path)
    evaluate(fake.config, fake.folders, fake.splits, None, tmp_path / "reports/evaluate")
    folder = fake.folder("pretrained-seed0-fold1")
    make_classifier(folder, "resnet10", "linear", fold=1)
    _, card, text = exported(folder, "torchvision", tmp_path / "out/w.pth")
    block = json.loads((tmp_path / "reports/evaluate/details.json").read_text())["pretrained"]["video"]
    assert card["metrics"]["values"] == {key: block[key] for key in ("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", "macro_auroc")}
    assert "all 3 folds" in card["metrics"]["source"] and "12 patients" in card["metrics"]["source"] and "(95% interval " in text
    fake.edit_table("pretrained-seed0-fold1", lambda table: table.assign(p_a=table["p_a"] + 1e-4))
    assert about(find_weights(folder))["metrics"] == {}, "a report of other weights"
    fake.edit_table("pretrained-seed0-fold1", lambda table: table[table["part"] != "test"])
    assert about(find_weights(folder))["metrics"] == {}, "nothing was tested"


@pytest.mark.parametrize("name", names())
def test_backbones__every_one_is_a_network_of_its_library(tmp_path: Path, name: str) -> None:
    """Names and shapes only: no memory is taken."""
    from pipeline.scorer import build_network

    info = describe(name)
    size = 2 * (info.patch_size or 16)
    (tmp_path / "encoder.safetensors").write_bytes(b"")
    (tmp_path / "card.json").write_text(json.dumps({"backbone": name, "image_size": size, "fingerprint": "f", "method": "ucl", "scope": "fold"}))
    table = about(find_weights(tmp_path))
    with torch.device("meta"):
        theirs, ours = build_network(table).state_dict(), build_trunk(info, size).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}


def test_command__refuses_before_torch_is_loaded(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "in", "resnet10")
    code = "import sys; from pipeline.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, "export", str(folder), "--to", "timm"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (2, "False") and "timm knows no resnet10" in done.stderr


def test_state__plain_tensors_and_own_names(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "in", "resnet10", "mlp")
    out, *_ = exported(folder, "torchvision", tmp_path / "out/w.pth")
    state = torch.load(out, weights_only=True)
    assert {name for name in state if name.startswith("fc.")} == {"fc.0.weight", "fc.0.bias", "fc.3.weight", "fc.3.bias"}
    assert all(type(value) is torch.Tensor for value in state.values())


@pytest.mark.parametrize(
    ("make", "form", "options", "words"),
    [
        (lambda p: make_encoder(p, "vit_tiny"), "torchvision", {}, "--to timm"),
        (lambda p: make_encoder(p, "resnet10"), "timm", {}, "timm knows no resnet10"),
        (lambda p: make_encoder(p, "vit_tiny"), "onnx", {"image_size": 64}, "positions for images of 32"),
        (lambda p: make_encoder(p, "resnet10"), "onnx", {"image_size": 8}, "at least 32"),
        (lambda p: make_encoder(p, "resnet10", backbone="resnet11"), "onnx", {}, "resnet11"),
        (lambda p: make_encoder(p, "resnet10", backbone="resnet18"), "torchvision", {}, "missing"),
        (lambda p: make_encoder(p, "resnet10", image_size="32); print('x'"), "torchvision", {}, "whole number"),
        (lambda p: make_classifier(p, "resnet10", "linear", head="mlp"), "torchvision", {}, "do not fit"),
        (lambda p: p, "onnx", {}, "does not exist"),
        (lambda p: p.parent, "onnx", {}, "neither of encoder.safetensors"),
    ],
)  # fmt: skip
def test_mistakes__are_named(tmp_path: Path, make: Any, form: str, options: dict[str, Any], words: str) -> None:
    folder = make(tmp_path / "in")
    with pytest.raises(CheckpointError, match=re.escape(words)):
        export(folder, form, tmp_path / f"out/w{'.onnx' if form == 'onnx' else '.pth'}", **options)
    assert not list((tmp_path / "out").glob("*") if (tmp_path / "out").exists() else [])


def test_mistakes__card_missing_or_broken(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "in", "resnet10")
    (folder / "card.json").write_text('{"backbone": "resnet10"}')
    with pytest.raises(CheckpointError, match="lacks image_size, fingerprint"):
        find_weights(folder)
    (folder / "card.json").unlink()
    with pytest.raises(CheckpointError, match="says what the weights are"):
        find_weights(folder / "encoder.safetensors")


def test_folder__keeps_the_card_of_its_file(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "in", "resnet10")
    export(folder, "torchvision", tmp_path / "out/a.pth")
    export(folder, "torchvision", tmp_path / "out/a.pth")
    with pytest.raises(PipelineError, match="model card of a.pth"):
        export(folder, "torchvision", tmp_path / "out/b.pth")
    with pytest.raises(PipelineError, match="ends in .pth"):
        export(folder, "torchvision", tmp_path / "other/b.onnx")


def test_command__writes_below_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_encoder(tmp_path / "models/encoders/fold0", "resnet10")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "models/encoders/fold0", "--to", "torchvision"]) == 0
    assert "largest difference" in capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "exports/fold0-torchvision").iterdir())
    assert written == ["MODEL_CARD.json", "MODEL_CARD.md", "resnet10-encoder.pth"]
    assert main(["export", "models/encoders/fold7", "--to", "onnx"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_pictures__of_the_check_are_seeded_and_not_only_noise() -> None:
    images = sample_images(64, "uscl")
    assert torch.equal(images, sample_images(64, "uscl")) and images.shape == (8, 3, 64, 64)
    smooth = [float((image[:, 1:] - image[:, :-1]).abs().mean()) for image in images[:, 0]]
    assert max(smooth[4:]) < 0.7 * min(smooth[:4])
    assert cv2.countNonZero((images[5, 0].numpy() <= -1.99).astype(np.uint8)) > 64, "black outside of the fan"


@pytest.mark.parametrize("head", LEVEL_HEADS)
def test_heads_of_several_levels__go_to_onnx_only(tmp_path: Path, head: str) -> None:
    pytest.importorskip("onnxruntime")
    folder = make_classifier(tmp_path / "in", "resnet10", head)
    assert not about(find_weights(folder))["scorable"]
    with pytest.raises(CheckpointError, match="several levels of features.*--to onnx"):
        export(folder, "torchvision", tmp_path / "out/w.pth")
    out, _, text = exported(folder, "onnx", tmp_path / "out/w.onnx")
    images = sample_images(32, "imagenet", 1)
    assert np.abs(run_card(text, out.parent, images.numpy()) - wanted(folder, images)).max() < 1e-4
    with pytest.raises(CheckpointError, match="at 32 pixels only"):
        export(folder, "onnx", tmp_path / "out/w.onnx", image_size=64)
