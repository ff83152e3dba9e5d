"""Attention pooling: weights, gradients, batches of whole videos, what it learns that a mean cannot, and where it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from test_finetuning import make_data
from training_kit import CPU, ListTracker, make_config, make_project, make_store

from pipeline.config import Config
from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.manifest import Manifest
from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore, write_video
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.metrics import aggregate, attention_mean
from pipeline.evaluation.predictions import read_items
from pipeline.export.facts import about, find_weights
from pipeline.export.formats import export, load_network
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier, GatedAttention, attend
from pipeline.preflight import check_named_files
from pipeline.training.finetune import Finetuning, Predictions
from pipeline.training.finetune_stage import run_finetune_stage


def make_network(pooling: str = "attention", trainable: str = "linear", seed: int = 0, head: str = "linear") -> Classifier:
    backbone, features = build_backbone("resnet10", seed)
    torch.manual_seed(seed)
    return Classifier(backbone, "resnet10", features, 2, head=head, trainable=trainable, batchnorm="frozen", image_size=32, pooling=pooling)


def make_training(folder: Path, data: Any, network: Classifier, seed: int = 0, **changes: Any) -> Finetuning:
    settings = {"optimizer": {"name": "adam", "lr": 0.003}, "trainable": "linear", "selection": "last", **changes}
    params = make_config(folder, **{f"finetune__{key}": value for key, value in settings.items()}).finetune
    return Finetuning(network, data, params, seed=seed, size=32, device=CPU)


# --- the function ---------------------------------------------------------------------------------------------------


def test_attend__hand_worked_and_apart_by_video() -> None:
    scores = torch.tensor([1.0, 3.0, 9.0]).log()
    outputs = torch.cat([torch.tensor([[4.0, 0.0], [0.0, 4.0], [1.0, 2.0]]), scores[:, None]], dim=1)
    logits, weights = attend(outputs, [2, 1])
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75, 1.0]))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 3.0], [1.0, 2.0]]))
    shifted = outputs + torch.tensor([0.0, 0.0, 1000.0])
    torch.testing.assert_close(attend(shifted, [2, 1])[0], logits, rtol=0, atol=1e-3), "only differences of scores count, however large"


def test_attend__gradients_reach_every_weight_and_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    attention, head = GatedAttention(6).double(), torch.nn.Linear(6, 3).double()
    torch.nn.init.normal_(attention.score.weight)
    features = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def loss(features: torch.Tensor) -> torch.Tensor:
        logits, _ = attend(torch.cat([head(features), attention(features)], 1), [3, 4])
        return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))

    assert torch.autograd.gradcheck(loss, features)
    loss(features).backward()
    for name, weight in [*attention.named_parameters(), *head.named_parameters()]:
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_gated_attention__is_the_published_formula_and_starts_as_the_mean() -> None:
    attention = GatedAttention(5)
    features = torch.randn(4, 5)
    torch.testing.assert_close(attend(torch.cat([features[:, :2], attention(features)], 1), [4])[1], torch.full((4,), 0.25))
    torch.nn.init.normal_(attention.score.weight)
    v, u, w = attention.signal, attention.gate, attention.score.weight[0]
    for row, score in zip(features, attention(features)[:, 0], strict=True):
        torch.testing.assert_close(score, w @ (torch.tanh(v.weight @ row + v.bias) * torch.sigmoid(u.weight @ row + u.bias)))


def test_attention_mean__softmax_of_the_weighted_logits_from_probabilities_alone() -> None:
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(0, 3, (6, 4)), rng.dirichlet(np.ones(6))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = np.exp(weights @ logits) / np.exp(weights @ logits).sum()
    np.testing.assert_allclose(attention_mean(probabilities, weights), wanted)
    assert np.isfinite(attention_mean(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.5, 0.5]))).all()
    found = Predictions([(3, 0), (3, 1), (1, 0)], np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]), np.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(found.by_video()[1], [[0.2, 0.8], [0.9, 0.1]])


# --- training -------------------------------------------------------------------------------------------------------


def test_training__batches_are_whole_videos_and_cached_features_change_nothing(tmp_path: Path) -> None:
    data = make_data(make_store(tmp_path / "s", patients=8, frames=6))
    runs = []
    for cached in (3, 0):
        run = make_training(tmp_path, data, make_network(), cached_views=cached, frames_per_video=3, batch_size=7, epochs=3)
        for _, videos, count in run._training_batches(0):
            assert count == 2 and len(videos) == 6 and [len(set(videos[:3])), len(set(videos[3:]))] == [1, 1] and videos[0] != videos[3]
        run.train(ListTracker(), "")
        runs.append(run)
    for one, other in zip(runs[0].rows, runs[1].rows, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    found = [run.predict("test") for run in runs]
    np.testing.assert_allclose(found[0].probabilities, found[1].probabilities, atol=1e-4)
    np.testing.assert_allclose(found[0].weights, found[1].weights, atol=1e-4)
    videos = np.array([video for video, _ in found[0].items])
    assert [found[0].weights[videos == video].sum() for video in data.test] == pytest.approx([1, 1], abs=1e-6)
    again = make_training(tmp_path, data, make_network(), cached_views=3, frames_per_video=3, batch_size=7, epochs=3)
    again.train(ListTracker(), "")
    assert np.array_equal(again.predict("test").weights, found[0].weights), "equal seeds, equal numbers"


def one_frame_of_ten(folder: Path, patients: int = 32, frames: int = 10) -> FrameStore:
    """Videos of speckle; in class b one frame of ten, at a random place, has a bright disc."""
    store = make_store(folder, patients=patients, frames=frames)
    rows = []
    for row in store.manifest.rows:
        rng = np.random.default_rng(int(row.video, 16) % 2**32)
        pictures = [rng.integers(40, 160, (40, 40)).astype(np.uint8) for _ in range(frames)]
        if row.label == "b":
            cv2.circle(pictures[rng.integers(frames)], (20, 20), 11, 255, -1)
        write_video(folder, row.video, (cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures))
        rows.append(replace(row, bytes=(folder / f"{row.video}.tar").stat().st_size))
    Manifest(rows).write(folder / "manifest.csv")
    return FrameStore(folder)


def test_training__attention_finds_the_one_frame_that_carries_the_sign_and_the_mean_does_worse(tmp_path: Path) -> None:
    frames = FrameCache(gather_videos([one_frame_of_ten(tmp_path / "s")]), 40)
    labels = np.array(["ab".index(ref.row.label) for ref in frames.videos], np.int64)
    order = sorted(range(len(frames)), key=lambda v: frames.videos[v].row.patient)
    data = replace(
        make_data(make_store(tmp_path / "other", patients=8, frames=2)), frames=frames, labels=labels,
        groups=[ref.row.patient for ref in frames.videos], train=order[:20], validation=[], test=order[20:],
    )
    losses, shares = {}, []
    for pooling in ("mean", "attention"):
        run = make_training(
            tmp_path, data, make_network(pooling), epochs=40, frames_per_video=10, eval_frames_per_video=10, batch_size=40,
            pooling=pooling, optimizer={"name": "adam", "lr": 0.01}, augmentation={"crop": "center", "jitter": 0, "horizontal_flip": 0},
        )
        run.train(ListTracker(), "")
        found = run.predict("test")
        losses[pooling] = run.judge(found)["loss"]
        if pooling == "attention":
            assert run.judge(found)["balanced_accuracy"] == 1.0
            brightest = {v: max(range(10), key=lambda n, v=v: frames.frame(v, n).mean()) for v in data.test}
            shares = [w for (v, n), w in zip(found.items, found.weights, strict=True) if labels[v] == 1 and n == brightest[v]]
    assert losses["attention"] < 0.5 * losses["mean"], losses
    assert np.mean(shares) > 0.5, "most of the weight lies on that frame"


# --- files, evaluation, export ----------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Config, Splits]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    config, splits = make_project(tmp_path, pretrain__method="random", finetune__pooling="attention", finetune__trainable="linear")
    run_finetune_stage(config, "random", 0, 0)
    return tmp_path / "models/finetuned/random-seed0-fold0", config, splits


def test_stage__weights_in_the_predictions_and_their_aggregation_is_what_chose_the_epoch(project: tuple[Path, Config, Splits]) -> None:
    folder, _, splits = project
    (item,) = read_items([folder])
    assert item.table.groupby(["part", "video"])["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    card = json.loads((folder / "card.json").read_text())
    assert card["pooling"] == "attention"
    videos = aggregate(item.table, splits.classes, "video", "attention")
    truth = [splits.classes.index(label) for label in videos["label"]]
    held = (videos["part"] == "validation").to_numpy()
    right = videos[["p_a", "p_b"]].to_numpy().argmax(1) == truth
    curves = pd.read_csv(folder / "curves.csv")
    assert right[held].mean() == pytest.approx(curves["validation_accuracy"][card["selected_epoch"]], abs=1e-6)
    reported = curves["validation_loss"][card["selected_epoch"]]
    loss = -np.log(videos[["p_a", "p_b"]].to_numpy()[np.arange(len(videos)), truth])[held].mean()
    assert loss == pytest.approx(reported, rel=1e-4)


def test_export__attention_is_refused_and_no_model_is_logged(project: tuple[Path, Config, Splits]) -> None:
    folder, *_ = project
    table = about(find_weights(folder))
    assert not table["scorable"] and "judges the frames of a video together" in table["why_not"]
    for form in ("onnx", "torchvision"):
        with pytest.raises(CheckpointError, match="Fine-tune with pooling: mean, or export the encoder alone"):
            export(folder, form)
    assert load_network(find_weights(folder))(torch.zeros(2, 3, 32, 32)).shape == (2, 3), "two classes and a score"


def test_config__attention_needs_weights_and_pooled_features(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate.aggregation: attention weighs frames .* but finetune.pooling is mean"):
        make_config(tmp_path, evaluate__aggregation="attention")
    make_config(tmp_path, evaluate__aggregation="attention", finetune__pooling="attention")
    sections = {"finetune": {"pooling": "attention", "head": "hico_pyramid"}, "pretrain": {"method": "hico"}}
    with pytest.raises(ConfigError, match=r"finetune\.pooling: attention weighs frames by their pooled features; head hico_pyramid takes several"):
        check_named_files(Config.model_validate(sections))
    with pytest.raises(ConfigError, match="head hico_pyramid takes others"):
        make_network(head="hico_pyramid")
