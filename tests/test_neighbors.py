"""What the report says of features: neighbours, agreement with labels and patients, maps, refusals, the words."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_experiment import FakeExperiment
from PIL import Image
from training_kit import CPU, make_store

from pipeline.data.frames import FrameCache, gather_videos
from pipeline.errors import DataError, PipelineError
from pipeline.evaluation.evaluate import evaluate, headline_metrics
from pipeline.evaluation.feature_plots import draw_neighbors
from pipeline.evaluation.features import embed_frames, write_features
from pipeline.evaluation.neighbors import FoldFeatures, feature_numbers, nearest, read_features, two_dimensions, unit_rows
from pipeline.models.backbones import build_backbone


def run(fake: FakeExperiment, store=None) -> tuple[dict, str, Path]:
    output = fake.root / "reports/evaluate"
    metrics = evaluate(fake.config, fake.folders, fake.splits, store, output)
    return metrics, (output / "report.html").read_text(encoding="utf-8"), output


# nearest


@pytest.mark.parametrize("blocked", [False, True])
def test_nearest__is_brute_force_with_one_answer_a_video(blocked):
    rng = np.random.default_rng(0)
    queries, gallery = unit_rows(rng.normal(size=(300, 6))), unit_rows(rng.normal(size=(40, 6)))
    owner = rng.integers(0, 9, 40)
    allowed = rng.random((300, 40)) < 0.4 if blocked else None
    found, values = nearest(queries, gallery, owner, 4, allowed)
    for row in range(0, 300, 7):
        similarity = gallery @ queries[row]
        if allowed is not None:
            similarity = np.where(allowed[row], similarity, -np.inf)
        wanted: list[int] = []
        for place in np.argsort(-similarity):
            if np.isfinite(similarity[place]) and owner[place] not in owner[wanted]:
                wanted.append(place)
        got = [place for place in found[row] if place >= 0]
        assert got == wanted[:4]
        np.testing.assert_allclose(values[row][: len(got)], similarity[got], atol=1e-6)


def test_nearest__fewer_videos_than_asked_for():
    found, values = nearest(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), np.array([3, 3]), 3)
    assert found.tolist() == [[0, -1, -1], [1, -1, -1]]
    assert np.isinf(values[:, 1:]).all()


# numbers


def hand_made(fake: FakeExperiment, vector_of) -> list[FoldFeatures]:
    """One frame a video with the vector `vector_of(video)`."""
    folds = []
    for fold in fake.splits.folds:
        videos = sorted(fake.labels)
        vectors = unit_rows(np.array([vector_of(video) for video in videos]))
        count = np.arange(len(videos))
        folds.append(FoldFeatures(fold.fold, vectors, count, 0 * count, videos, np.isin(videos, fold.test)))
    return folds


def test_numbers__labels_alone(tmp_path):
    """Every class has one direction, leaned a little by video: all neighbours are right, patients are found by chance only."""
    fake = FakeExperiment(tmp_path)
    rng = np.random.default_rng(1)
    noise = {video: 0.01 * rng.normal(size=8) for video in fake.labels}
    numbers = feature_numbers(hand_made(fake, lambda v: np.eye(8)["ab".index(fake.labels[v])] + noise[v]), fake.splits, 5)
    assert numbers["precision"] == 1 and numbers["precision_chance"] == 0.5
    assert numbers["same_patient"] < 0.3 and numbers["same_patient_chance"] == pytest.approx(1 / 23)
    assert numbers["silhouette_label"] > 0.9 > 0.3 > numbers["silhouette_patient"]
    assert not numbers["patients_dominate"]


def test_numbers__patients_alone(tmp_path):
    """Every patient has a direction of its own: its other video is nearest, and other patients' labels are drawn blindly."""
    fake = FakeExperiment(tmp_path)
    rng = np.random.default_rng(2)
    own = {group: rng.normal(size=30) for group in sorted(set(fake.groups.values()))}
    numbers = feature_numbers(hand_made(fake, lambda v: own[fake.groups[v]] + 0.01 * rng.normal(size=30)), fake.splits, 3)
    assert numbers["same_patient"] == 1 and numbers["same_patient_videos"] == 24
    assert abs(numbers["precision"] - 0.5) < 0.3
    assert numbers["silhouette_patient"] > 0.9 > numbers["silhouette_label"]
    assert numbers["patients_dominate"]


def test_numbers__one_video_a_patient_leaves_patients_undefined(tmp_path):
    fake = FakeExperiment(tmp_path, clips=1)
    numbers = feature_numbers(hand_made(fake, lambda v: [int(v[:8], 16) + 1, 1.0]), fake.splits, 50)
    assert numbers["same_patient"] is None and numbers["silhouette_patient"] is None and not numbers["patients_dominate"]
    assert numbers["precision"] == pytest.approx(0.5), "all training videos are neighbours"


def test_numbers__stretches_of_one_recording_say_nothing_of_patients(tmp_path):
    """Every recording has a direction of its own. Cut into two stretches each, it is no sign that patients are recognised."""
    fake = FakeExperiment(tmp_path, clips=4)
    rng = np.random.default_rng(2)
    recording = {video: f"{group}/{int(video[8:]) // 2}" for video, group in fake.groups.items()}
    own = {name: rng.normal(size=30) for name in sorted(set(recording.values()))}
    folds = hand_made(fake, lambda v: own[recording[v]] + 0.01 * rng.normal(size=30))
    blind, honest = feature_numbers(folds, fake.splits, 3), feature_numbers(folds, fake.splits, 3, recording)
    assert blind["same_patient"] == 1 and blind["patients_dominate"]
    assert honest["same_patient"] < 0.3 and honest["same_patient_chance"] == pytest.approx(2 / 46) and not honest["patients_dominate"]
    assert honest["silhouette_patient"] < 0.1 < blind["silhouette_patient"]
    alone = feature_numbers(folds, fake.splits, 3, fake.groups)
    assert alone["same_patient"] is None and alone["silhouette_patient"] is None and not alone["patients_dominate"]


def test_map__equal_input_gives_equal_places_and_odd_input_none_that_are_not_finite():
    rng = np.random.default_rng(0)
    vectors = unit_rows(np.concatenate([rng.normal(c, 0.1, size=(15, 6)) for c in (-1, 1)]))
    places = two_dimensions(vectors)
    np.testing.assert_array_equal(places, two_dimensions(vectors))
    centres = places[:15].mean(0), places[15:].mean(0)
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * max(np.linalg.norm(places[:15] - centres[0], axis=1).mean(), 1e-6)
    for odd in (np.zeros((0, 4)), np.ones((1, 4)), np.ones((20, 4)), rng.normal(size=(5, 4)), rng.normal(size=(12, 1))):
        found = two_dimensions(odd.astype(np.float32))
        assert found.shape == (len(odd), 2) and np.isfinite(found).all()


# features.npz


def test_write_features__is_read_back_with_equal_bytes(tmp_path):
    store = make_store(tmp_path / "store", patients=4, frames=6)
    cache = FrameCache(gather_videos([store]), 40)
    network, _ = build_backbone("resnet10", 0, 32)
    network.train()
    kinds = {"size": 32, "device": CPU, "normalization": "imagenet"}
    for name in ("one.npz", "two.npz"):
        write_features(tmp_path / name, network, cache, [2, 0], **kinds)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes() and network.training
    with np.load(tmp_path / "one.npz", allow_pickle=False) as found:
        assert found["videos"].tolist() == [cache.videos[2].video, cache.videos[0].video]
        assert found["frame"].tolist() == [0, 2, 3, 5] * 2 and found["owner"].tolist() == [0] * 4 + [1] * 4
        wanted = embed_frames(network, cache, [(2, 3)], **kinds)[0].numpy()
        np.testing.assert_allclose(found["vectors"][2], unit_rows(wanted[None])[0], atol=1e-3)
    with torch.no_grad():
        network.conv1.weight.fill_(float("nan"))
    with pytest.raises(PipelineError, match="not finite"):
        write_features(tmp_path / "three.npz", network, cache, [0], **kinds)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: {k: v for k, v in found.items() if k != "owner"}, "not a readable table"),
        (lambda found: {**found, "vectors": found["vectors"][:-1]}, "do not fit"),
        (lambda found: {**found, "vectors": found["vectors"] * np.float16("nan")}, "not finite"),
        (lambda found: {**found, "owner": found["owner"] * 0}, "do not fit"),
        (lambda found: {**found, "videos": np.array(["f" * 16, *found["videos"][1:]])}, "other videos than fold 0"),
        (lambda found: {**found, "vectors": np.array([{}], object)}, "not a readable table"),
    ],
)
def test_read_features__refuses_what_does_not_fit(tmp_path, change, words):
    fake = FakeExperiment(tmp_path)
    fake.write_features()
    path = fake.folders[0] / "features.npz"
    assert read_features(path, fake.splits.folds[0], fake.splits) is not None
    with np.load(path) as found:
        np.savez(path, **change(dict(found)))
    with pytest.raises(DataError, match=words) as refused:
        run(fake)
    assert refused.value.args[0].startswith("pretrained-seed0-fold0/features.npz: ")


# the report


def test_report__section_with_maps_neighbours_and_numbers(tmp_path):
    fake = FakeExperiment(tmp_path, classes=["healthy", "B & <lines>", "effusion"], patients=18)
    fake.write_features(by_label=2.0, by_patient=0.05)
    metrics, page, output = run(fake, fake.store())
    assert 'id="features"' in page and 'href="#features"' in page
    assert len(list((output / "pictures").glob("map_fold*.png"))) == 3
    with Image.open(output / "pictures/map_fold0.png") as picture:
        assert picture.width > picture.height
    assert page.count('class="near"') == 6, "two queries a class"
    section = page[page.index('<section id="features">') :]
    section = section[: section.index("</section>")]
    assert section.count('src="data:image/jpeg') == 6 * 6 and len(re.findall(r'alt="(?:Query|Neighbour \d): frame', section)) == 36
    assert "B &amp; &lt;lines&gt;" in section and "<lines>" not in section
    assert "100\u00a0% show its class (33.3\u00a0% by chance)" in section
    assert "For the untrained network it is" in section and "more surely than classes" not in section
    compact = json.loads((output / "metrics.json").read_text())["features"]["pretrained"]
    assert compact["precision"] == 1 and set(compact["class_precision"]) == set(fake.classes) and compact["neighbors"] == 5
    assert headline_metrics(metrics)["pretrained.features.precision"] == 1
    # Neighbours are training frames of other patients.
    for row in re.findall(r'<article class="near">(.*?)</article>', section, re.S):
        patients = re.findall(r"<span>(P\w+)</span>", row)
        assert patients[0] not in patients[1:]


def test_report__warns_when_patients_dominate(tmp_path):
    fake = FakeExperiment(tmp_path)
    fake.write_features(by_label=0.0, by_patient=2.0)
    metrics, page, _ = run(fake)
    assert metrics["features"]["pretrained"]["patients_dominate"]
    assert "recognises patients more surely than classes" in page
    assert 'class="near"' not in page, "no store, no frames"


def test_report__without_features_there_is_no_section(tmp_path):
    fake = FakeExperiment(tmp_path)
    metrics, page, _ = run(fake)
    assert metrics["features"] == {} and 'id="features"' not in page and 'href="#features"' not in page


def test_report__an_initialisation_that_lacks_a_fold_is_left_out(tmp_path):
    fake = FakeExperiment(tmp_path)
    fake.write_features()
    (fake.folder("random-seed0-fold1") / "features.npz").unlink()
    metrics, page, _ = run(fake)
    assert list(metrics["features"]) == ["pretrained"] and "For the untrained network" not in page


def test_report__groups_that_are_no_patients_are_not_called_so(tmp_path):
    fake = FakeExperiment(tmp_path, clips=1)
    fake.splits = replace(fake.splits, group="video")
    fake.write_features()
    _, page, _ = run(fake)
    assert "no group has two recordings" in page


def test_pictures__equal_rows_give_equal_bytes_and_odd_shapes_are_drawn(tmp_path):
    image = np.full((20, 60, 3), 90, np.uint8)
    found = {"label": "$x^2$ a very long name of a class", "similarity": 0.5, "same_label": None, "same_patient": True, "image": None}
    row = {"query": {"image": image, "label": "", "name": "q"}, "neighbors": [{**found, "name": "n"}]}
    for name in ("a.png", "b.png"):
        draw_neighbors(tmp_path / name, [row, {**row, "neighbors": []}], "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
