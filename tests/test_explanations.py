"""Where the networks looked: maps against their definitions, the measures on hand-made heat, what is said where nothing can be shown."""

from __future__ import annotations

import html
import re
import types

import numpy as np
import pytest
import torch
from fake_experiment import FakeExperiment
from safetensors.torch import save_file

from pipeline.data.transforms import normalize
from pipeline.errors import CheckpointError
from pipeline.evaluation import explanations
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.saliency import load_network, random_network

CARD = {"backbone": "resnet10", "image_size": 64, "head": "linear", "classes": ["a", "b"]}
NOISE = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)


def test_gradient_map__last_stage_is_grad_cam():
    """Selvaraju et al., eq. 1 and 2: channels weighed by their mean gradient."""
    network = random_network({**CARD, "image_size": 224}, 1)
    images = np.random.default_rng(1).integers(0, 256, (2, 224, 224), np.uint8)
    got = network.maps(images, [0, 1])
    kept = []
    hook = network.backbone.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output.requires_grad_()))
    x = network.backbone(normalize(torch.from_numpy(images)))
    hook.remove()
    (gradient,) = torch.autograd.grad(network.head(x).gather(1, torch.tensor([[0], [1]])).sum(), kept)
    wanted = torch.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1))
    assert network.stage == 4 and got.shape == (2, 7, 7)
    assert got == pytest.approx(wanted.detach().numpy(), abs=1e-6) and got.max() > 0


@pytest.mark.parametrize(("size", "stage", "cells"), [(32, 1, 8), (64, 2, 8), (128, 3, 8), (193, 4, 7)])
def test_gradient_map__reads_the_last_stage_with_enough_cells(size, stage, cells):
    network = random_network({**CARD, "image_size": size}, 0)
    assert network.stage == stage and network.maps(np.zeros((1, size, size), np.uint8), [0]).shape == (1, cells, cells)


def test_gradient_map__cells_add_up_to_what_the_stage_contributes():
    """HiResCAM's property where everything behind the stage is linear: the signed map's sum is the score less the bias."""
    network = random_network({**CARD, "image_size": 224}, 2)
    image = np.full((1, 224, 224), 90, np.uint8)
    with torch.no_grad():
        network.head.weight.copy_(network.head.weight.abs())  # nothing speaks against the class, so nothing is left out
        logit = float(network.head(network.backbone(normalize(torch.from_numpy(image))))[0, 1] - network.head.bias[1])
    assert network.maps(image, [1]).sum() == pytest.approx(logit, rel=1e-4)


def test_rollout__is_the_product_of_the_layers_attention():
    network = random_network({**CARD, "backbone": "vit_tiny"}, 0)
    seen = []
    for block in network.backbone.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].mean(1)))
    got = network.maps(NOISE, [0, 1, 0])
    total = torch.eye(17)
    for one in seen:
        total = (one + torch.eye(17)) / 2 @ total
    assert len(seen) == 12 and got.shape == (3, 4, 4)
    assert got.reshape(3, 16) == pytest.approx(total[:, 0, 1:].numpy(), abs=1e-6)
    assert not any(block.attn.qkv._forward_hooks for block in network.backbone.blocks)


def test_load__weights_of_another_network_are_refused(tmp_path):
    network = random_network(CARD, 3)
    state = {f"{part}.{name}": value for part in ("backbone", "head") for name, value in getattr(network, part).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert (load_network(tmp_path, CARD).maps(NOISE, [0, 1, 0]) == network.maps(NOISE, [0, 1, 0])).all()
    with pytest.raises(CheckpointError, match="does not fit the head"):
        load_network(tmp_path, {**CARD, "classes": ["a", "b", "c"]})


def test_outside__share_of_heat_where_nothing_is():
    area = np.zeros((64, 64), bool)
    area[:, 16:48] = True
    flat, inside = np.ones((8, 8)), np.zeros((8, 8))
    inside[4, 4] = 1

    def outside(heat, area=area):
        return explanations._Case({}, 0, NOISE[0], area, heat).outside

    assert outside(flat) == pytest.approx(0.5) and outside(inside) == 0
    assert outside(np.zeros((8, 8))) is None and outside(flat, np.ones((64, 64), bool)) is None


def test_scan_area__dark_vessels_are_inside():
    picture = np.zeros((64, 64), np.uint8)
    picture[8:56, 16:48] = 120
    picture[24:32, 24:32] = 0
    store = types.SimpleNamespace(mask=lambda video: None, frames=lambda video, frames: [picture, picture // 2])
    area = explanations.scan_area(store, "video", [0, 1])
    assert area[8:56, 16:48].all() and area.sum() == 48 * 32
    known = np.eye(64, dtype=bool)
    assert explanations.scan_area(types.SimpleNamespace(mask=lambda video: known), "video", [0]) is known


def with_weights(fake: FakeExperiment, **changes) -> None:
    for folder in fake.folders:
        card = {**CARD, "classes": fake.classes, **changes}
        fake.edit_card(folder.name, **card)
        network = random_network({**card, "head": "linear"}, len(folder.name))
        state = {f"{part}.{name}": value for part in ("backbone", "head") for name, value in getattr(network, part).state_dict().items()}
        save_file(state, folder / "model.safetensors")


def run(fake: FakeExperiment, store=None) -> tuple[dict, str]:
    metrics = evaluate(fake.config, fake.folders, fake.splits, store, fake.root / "out")
    page = html.unescape((fake.root / "out/report.html").read_text(encoding="utf-8"))
    found = re.search(r'<section id="look">(.*?)</section>', page, re.DOTALL)
    return metrics, found.group(1) if found else ""


def test_part__pictures_and_numbers(tmp_path):
    fake = FakeExperiment(tmp_path, params={"evaluate": {"bootstrap": 100, "explanations": 6}})
    with_weights(fake)
    metrics, section = run(fake, fake.store())
    found = metrics["explanations"]
    # Speckle fills the frames, so there is no outside; other random weights share no map.
    assert (found["videos"], found["patients"], found["outside_heat"], found["cells"]) == (24, 12, None, 8)
    assert abs(found["random_correlation"]) < 0.8
    assert len(list((tmp_path / "out/pictures").glob("look_*.png"))) == 6 == section.count("<img")
    wrong = min(3, sum(sum(row) for row in metrics["pretrained"]["video"]["confusion"]) - sum(
        metrics["pretrained"]["video"]["confusion"][place][place] for place in range(2)))
    assert section.count("Wrong: predicted") == wrong and section.count("Right: predicted") == 6 - wrong
    assert "Such maps prove little" in section and "no frame has black surroundings" in section
    first = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out/pictures").glob("look_*"))]
    again, _ = run(fake, fake.store())
    assert again["explanations"] == found
    assert [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out/pictures").glob("look_*"))] == first


def test_part__a_map_stands_beside_the_answer_of_its_own_network(tmp_path):
    """The first of two networks is wrong about every video, the other one is surer of the truth."""
    fake = FakeExperiment(tmp_path, seeds=[0, 1], params={"evaluate": {"bootstrap": 100, "explanations": 4}})
    with_weights(fake)
    for folder in fake.folders:
        def change(table):
            chance = np.where(table["seed"] == 0, 0.4, 0.99)
            table["p_a"] = np.where(table["label"] == "a", chance, 1 - chance)
            table["p_b"] = 1 - table["p_a"]
            return table

        fake.edit_table(folder.name, change)
    _, section = run(fake, fake.store())
    assert section.count("Wrong: predicted") == 2 and "Right: predicted" not in section and "(0.60)" in section
    assert "explained by the pretrained network (of 2 seeds the first) of its own fold" in section


def test_part__heat_on_black_borders_is_a_warning():
    numbers = {"outside_heat": 0.5, "outside_area": 0.3}
    assert "may be reading the border" in explanations._warning(numbers)
    assert explanations._warning({**numbers, "outside_heat": 0.1}) == explanations._warning({**numbers, "outside_heat": None}) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "the weights of 3 models are not there"),
        ({"head": "hico_pyramid"}, "the head hico_pyramid reads four levels"),
    ],
)
def test_part__what_cannot_be_shown_is_said(tmp_path, change, words):
    fake = FakeExperiment(tmp_path)
    if change:
        with_weights(fake, **change)
    metrics, section = run(fake, fake.store())
    assert words in section and words in metrics["explanations"]["reason"]
    assert "only predictions" in run(fake)[1]


def test_part__can_be_switched_off(tmp_path):
    fake = FakeExperiment(tmp_path, params={"evaluate": {"bootstrap": 100, "explanations": 0}})
    metrics, section = run(fake)
    assert "explanations" not in metrics and section == ""
