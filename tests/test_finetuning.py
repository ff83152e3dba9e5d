"""Fine-tuning: what trains and what stays, honest selection, leaks refused, predictions as agreed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import CPU, ListTracker, make_config, make_store

from pipeline.data.frames import FrameCache, gather_videos
from pipeline.data.store import FrameStore
from pipeline.errors import ConfigError, PipelineError
from pipeline.models.backbones import build_backbone
from pipeline.models.classifier import Classifier
from pipeline.training.finetune import FinetuneData, Finetuning, Predictions, class_weights, subset_by_patient

PARTS = {"train": [0, 1, 2, 3], "validation": [4, 5], "test": [6, 7]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=8, frames=6)


def make_data(store: FrameStore, labels: list[int] | None = None, size: int = 40) -> FinetuneData:
    """Eight patients: four to train on, two to select with, two to test; both classes in each part."""
    frames = FrameCache(gather_videos([store]), size)
    by_patient = sorted(range(8), key=lambda v: frames.videos[v].row.patient)
    found = np.zeros(8, np.int64)
    for position, video in enumerate(by_patient):
        found[video] = position % 2 if labels is None else labels[position]
    parts = {part: sorted(by_patient[p] for p in positions) for part, positions in PARTS.items()}
    return FinetuneData(frames, found, [r.row.patient for r in frames.videos], ["a", "b"], **parts)


def make_network(
    trainable: str = "last_block", batchnorm: str = "frozen", seed: int = 0, head: str = "linear"
) -> Classifier:
    backbone, features = build_backbone("resnet10", seed)
    torch.manual_seed(seed)
    return Classifier(backbone, "resnet10", features, 2, head=head, trainable=trainable, batchnorm=batchnorm)


def make_finetuning(
    tmp_path: Path, data: FinetuneData, network: Classifier | None = None, seed: int = 0, **changes: Any
) -> Finetuning:
    settings = {
        "finetune__optimizer": {"name": "adam", "lr": 0.003},
        **{f"finetune__{k}": v for k, v in changes.items()},
    }
    params = make_config(tmp_path, **settings).finetune
    kind = {"trainable": params.trainable, "batchnorm": params.batchnorm}
    return Finetuning(network or make_network(**kind), data, params, seed=seed, size=32, device=CPU)


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["linear", "last_block", "all", "layer3.0"])
@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_training__what_is_frozen_stays_what_trains_moves(
    store: FrameStore, tmp_path: Path, trainable: str, batchnorm: str
) -> None:
    run = make_finetuning(
        tmp_path, make_data(store), trainable=trainable, batchnorm=batchnorm, selection="last", epochs=2
    )
    before = {k: v.clone() for k, v in run.network.state_dict().items()}
    run.train(ListTracker(), "test")
    prefix = {"linear": "nothing", "last_block": "layer4.0.", "all": "", "layer3.0": "layer3.0"}[trainable]
    moved = {k for k, v in run.network.state_dict().items() if not torch.equal(v, before[k])}
    for name, _ in run.network.named_parameters():
        inside = name.startswith("head.") or name.removeprefix("backbone.").startswith(prefix)
        assert (name in moved) == inside, name
    statistics = {k for k in moved if "running" in k}
    everything = {k for k in before if "running" in k}
    trained = {k for k in everything if k.removeprefix("backbone.").startswith(prefix)}
    assert statistics == (everything if batchnorm == "train" else trained)


def test_classifier__modes_of_batch_norm() -> None:
    for trainable, batchnorm, epoch, stem, last, head in [
        ("last_block", "frozen", 0, False, True, True),
        ("last_block", "train", 0, True, True, True),
        ("linear", "frozen", 5, False, False, True),
        ("all", "frozen", 0, True, True, True),
        ("all", "official_eval_after_first_epoch", 0, True, True, True),
        ("all", "official_eval_after_first_epoch", 1, False, False, False),
    ]:
        network = make_network(trainable, batchnorm, head="mlp")
        network.eval()
        network.training_mode(epoch)
        modes = (network.backbone.bn1.training, network.backbone.layer4[0].bn2.training, network.head.training)
        assert modes == (stem, last, head), (trainable, batchnorm, epoch)


def test_classifier__unknown_prefix_names_the_allowed() -> None:
    with pytest.raises(ConfigError) as refused:
        make_network("layer9")
    assert str(refused.value) == (
        "finetune.trainable: 'layer9' is no part of resnet10. Allowed: linear, last_block, all, lora, or the beginning of "
        "parameter names such as layer2.0, layer3.0, layer4.0. Did you mean 'layer4.0'?"
    )
    with pytest.raises(
        ConfigError, match=r"finetune\.head: unknown head 'linaer'\. Allowed: .*linear, mlp\. Did you mean 'linear'\?"
    ):
        make_network(head="linaer")


@pytest.mark.parametrize("trainable", ["linear", "last_block", "layer2.0", "layer3.0.conv2"])
def test_classifier__split_is_the_same_function(trainable: str) -> None:
    network = make_network(trainable)
    network.eval()
    frozen, live = network.split()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(live(frozen(images)), network(images))
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("trainable", ["linear", "last_block"])
def test_finetuning__cached_features_change_nothing(store: FrameStore, tmp_path: Path, trainable: str) -> None:
    """Frozen outputs computed once, or the whole network every time: the same losses and probabilities."""
    data = make_data(store)
    runs = []
    for cached in (3, 0):
        run = make_finetuning(tmp_path, data, trainable=trainable, cached_views=cached, epochs=3, selection="last")
        assert run.cached == bool(cached)
        run.train(ListTracker(), "test")
        runs.append(run)
    for one, other in zip(runs[0].rows, runs[1].rows, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    np.testing.assert_allclose(runs[0].predict("test").probabilities, runs[1].predict("test").probabilities, atol=1e-4)
    assert not make_finetuning(tmp_path, data, trainable="last_block", batchnorm="train").cached
    assert not make_finetuning(tmp_path, data, trainable="all").cached


def test_finetuning__an_uncached_epoch_is_never_held_whole(store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are rendered a batch at a time, and what a batch shows depends on the frames alone: 4 videos x 5 frames in sixes and a two."""
    run = make_finetuning(tmp_path, make_data(store), cached_views=0, frames_per_video=5, batch_size=6, epochs=1)
    counts, render_views = [], run._render_views
    monkeypatch.setattr(run, "_render_views", lambda items, epoch: counts.append(len(items)) or render_views(items, epoch))
    batches = list(run._training_batches(3))
    assert counts == [6, 6, 6, 2]
    items = run._training_frames(3)
    order = np.random.default_rng([0, 3]).permutation(20)
    assert torch.equal(torch.cat([images for images, *_ in batches]), torch.from_numpy(render_views(items, 3))[order])
    assert np.array_equal(np.concatenate([videos for _, videos, _ in batches]), np.array([video for video, _ in items])[order])
    assert [count for *_, count in batches] == [4] * 4


# --- weights, fractions, sampling -----------------------------------------------------------------------------------


def test_class_weights__balanced_over_videos() -> None:
    labels = np.array([0, 0, 0, 1])
    weights = class_weights(labels, 2, "balanced")
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 2.0]))
    assert float(weights[torch.from_numpy(labels)].mean()) == pytest.approx(1)
    assert class_weights(labels, 2, "none") is None
    assert torch.isfinite(class_weights(labels, 3, "balanced")).all()


def test_subset_by_patient__nested_whole_patients_every_class() -> None:
    groups = [f"P{v // 2}" for v in range(60)]
    labels = np.array([v // 2 % 3 for v in range(60)])
    videos = list(range(60))
    parts = [set(subset_by_patient(videos, labels, groups, f, seed=4)) for f in (0.01, 0.1, 0.3, 0.5, 0.9, 1.0)]
    for smaller, larger in zip(parts, parts[1:], strict=False):
        assert smaller <= larger
    assert [len(p) for p in parts] == [6, 6, 18, 30, 54, 60]
    for part in parts:
        assert {int(labels[v]) for v in part} == {0, 1, 2}
        assert all((v ^ 1) in part for v in part), "both videos of a patient, or none"
    assert parts[2] != set(subset_by_patient(videos, labels, groups, 0.3, seed=5))


def test_finetuning__seed_decides_frames_order_and_result(store: FrameStore, tmp_path: Path) -> None:
    data = make_data(store)

    def result(seed: int) -> np.ndarray:
        run = make_finetuning(tmp_path, data, make_network(seed=0), seed=seed, epochs=2, selection="last")
        run.train(ListTracker(), "test")
        return run.predict("test").probabilities

    assert np.array_equal(result(3), result(3))
    assert not np.array_equal(result(3), result(4))


def test_predictions__frames_of_a_video_are_averaged() -> None:
    found = Predictions([(3, 0), (1, 0), (3, 5)], np.array([[0.2, 0.8], [1, 0], [0.4, 0.6]], np.float32))
    videos, probabilities = found.by_video()
    assert videos.tolist() == [1, 3]
    np.testing.assert_allclose(probabilities, [[1, 0], [0.3, 0.7]], atol=1e-6)


# --- selection ------------------------------------------------------------------------------------------------------


def test_selection__best_epoch_of_the_inner_patients(store: FrameStore, tmp_path: Path) -> None:
    """Earliest best of validation; afterwards the network holds exactly that epoch's weights."""
    data = make_data(store)
    run = make_finetuning(
        tmp_path,
        data,
        epochs=5,
        selection_metric="loss",
        optimizer={"name": "adam", "lr": 0.05, "schedule": "constant"},
    )
    run.train(ListTracker(), "test")
    losses = [row["validation_loss"] for row in run.rows]
    assert run.selected_epoch == int(np.argmin(losses))
    assert run.judge(run.predict("validation"))["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert not any(key.startswith("test_") for key in run.rows[0]), "the test patients are not even looked at"


def test_selection__test_labels_play_no_part_unless_asked(store: FrameStore, tmp_path: Path) -> None:
    """With other labels on the test patients `inner` does the very same; `best_on_test` looks at them."""
    honest = [0, 1, 0, 1, 0, 1, 0, 1]
    swapped = [0, 1, 0, 1, 0, 1, 1, 0]
    found: dict[str, list] = {"inner": [], "best_on_test": []}
    for selection, seen in found.items():
        for labels in (honest, swapped):
            run = make_finetuning(
                tmp_path, make_data(store, labels), epochs=5, selection=selection, selection_metric="loss"
            )
            run.train(ListTracker(), "test")
            seen.append((run.selected_epoch, run.predict("test").probabilities.tobytes(), run.rows))
    assert found["inner"][0] == found["inner"][1]
    assert "test_loss" in found["best_on_test"][0][2][0]
    for _, _, rows in found["best_on_test"]:
        assert "test_loss" in rows[0]
    picked = [np.argmin([row["test_loss"] for row in rows]) for _, _, rows in found["best_on_test"]]
    assert [epoch for epoch, _, _ in found["best_on_test"]] == picked
    assert picked[0] != picked[1]


def test_training__learns_two_obvious_classes(store: FrameStore, tmp_path: Path) -> None:
    run = make_finetuning(tmp_path, make_data(store), epochs=12)
    tracker = ListTracker()
    run.train(tracker, "test")
    assert run.rows[-1]["train_loss"] < 0.5 * run.rows[0]["train_loss"]
    assert run.rows[-1]["train_accuracy"] > 0.9
    assert [step for step, _ in tracker.metrics] == list(range(12))


def test_training__last_single_sample_joins_its_neighbour(store: FrameStore, tmp_path: Path) -> None:
    """Four videos of two frames in batches of seven: the eighth sample alone would stop batch norm."""
    run = make_finetuning(tmp_path, make_data(store), epochs=1, batch_size=7, selection="last")
    run.train(ListTracker(), "test")
    assert np.isfinite(run.rows[0]["train_loss"])


def test_training__numbers_that_are_not_finite(store: FrameStore, tmp_path: Path) -> None:
    for selection in ("inner", "last"):
        run = make_finetuning(
            tmp_path, make_data(store), epochs=3, selection=selection, optimizer={"name": "sgd", "lr": 1e30}
        )
        with pytest.raises(
            PipelineError,
            match=r"^finetune: loss or predictions are not finite after epoch \d\. Lower finetune\.optimizer\.lr",
        ):
            run.train(ListTracker(), "test")
    healthy = make_finetuning(tmp_path, make_data(store))
    torch.nn.init.constant_(healthy.network.head.bias, float("nan"))
    with pytest.raises(PipelineError, match="check that the encoder's weights are finite"):
        healthy.predict("test")


def test_selection__published_gallbladder_rule(store: FrameStore, tmp_path: Path) -> None:
    data = replace(make_data(store, labels=[0, 1, 2, 0, 1, 2, 0, 2]), classes=["normal", "benign", "malignant"])
    backbone, features = build_backbone("resnet10")
    network = Classifier(backbone, "resnet10", features, 3, head="linear", trainable="last_block", batchnorm="frozen")
    run = make_finetuning(tmp_path, data, network, selection_metric="malignancy_harmonic_mean", epochs=3)
    run.train(ListTracker(), "")
    values = [row["validation_malignancy_harmonic_mean"] for row in run.rows]
    assert run.selected_epoch == int(np.argmax(values)) and all(0 <= value <= 1 for value in values)
