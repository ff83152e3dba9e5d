"""Metrics against scikit-learn, hand-worked cases and the published recipe's numbers; class-absent and tie rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference

from pipeline.errors import DataError
from pipeline.evaluation.metrics import (
    Scores,
    aggregate,
    auroc,
    average_precision,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    harmonic_mean,
    malignancy_metrics,
    reliability_curve,
    select_epoch,
)

CLASSES = ("a", "b", "c")


def random_scores(seed: int, count: int = 80) -> Scores:
    """Random predictions with many tied probabilities."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    raw = np.round(rng.dirichlet(np.ones(3), count) + 0.3 * np.eye(3)[labels], 1) + 0.01
    return Scores(labels, raw / raw.sum(1, keepdims=True), np.array([f"P{i % 9}" for i in range(count)]), CLASSES)


@pytest.mark.parametrize("seed", range(4))
def test_classification_metrics__agree_with_scikit_learn(seed: int) -> None:
    scores = random_scores(seed)
    labels, probabilities = scores.labels, scores.probabilities
    predicted = probabilities.argmax(1)
    ours = classification_metrics(scores)
    recall = reference.recall_score(labels, predicted, average=None)
    precision = reference.precision_score(labels, predicted, average=None)
    f1 = reference.f1_score(labels, predicted, average=None)
    for position, name in enumerate(CLASSES):
        own = ours["per_class"][name]
        assert own["recall"] == pytest.approx(recall[position])
        assert own["precision"] == pytest.approx(precision[position])
        assert own["f1"] == pytest.approx(f1[position])
        assert own["auroc"] == pytest.approx(reference.roc_auc_score(labels == position, probabilities[:, position]))
        expected = reference.average_precision_score(labels == position, probabilities[:, position])
        assert own["auprc"] == pytest.approx(expected)
        assert own["support"] == (labels == position).sum()
    assert ours["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert ours["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, predicted))
    assert ours["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert ours["macro_auroc"] == pytest.approx(reference.roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert ours["log_loss"] == pytest.approx(reference.log_loss(labels, probabilities))
    assert ours["brier"] == pytest.approx(((probabilities - np.eye(3)[labels]) ** 2).sum(1).mean())
    assert ours["confusion"] == reference.confusion_matrix(labels, predicted).tolist()
    assert (ours["n"], ours["patients"], ours["undefined"]) == (80, 9, {})


def test_classification_metrics__absent_classes_are_none_with_a_reason() -> None:
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    result = classification_metrics(Scores(np.array([0, 1, 1]), probabilities, np.array(["P", "P", "Q"]), CLASSES))
    assert result["per_class"]["c"] == {
        "recall": None,
        "precision": None,
        "f1": None,
        "auroc": None,
        "auprc": None,
        "support": 0,
    }
    assert result["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert result["macro_f1"] == pytest.approx(2 / 3)
    assert result["macro_auroc"] is None and "class c" in result["undefined"]["macro_auroc"]
    assert result["undefined"]["c.recall"] == "class c has no label"
    assert result["undefined"]["c.precision"] == "class c is never predicted"
    json.dumps(result, allow_nan=False)


def test_classification_metrics__one_class_only_and_class_never_predicted() -> None:
    probabilities = np.array([[0.6, 0.4], [0.4, 0.6]])
    result = classification_metrics(Scores(np.array([0, 0]), probabilities, np.array(["P", "Q"]), ("a", "b")))
    assert result["per_class"]["a"]["auroc"] is None and "all 2 units" in result["undefined"]["a.auroc"]
    # Predicted but without labels: it has a precision (0) and an F1 (0), and no share in the means.
    assert result["per_class"]["b"]["precision"] == 0 and result["per_class"]["b"]["f1"] == 0
    assert result["balanced_accuracy"] == 0.5


def test_classification_metrics__certain_and_wrong_stays_finite() -> None:
    scores = Scores(np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]]), np.array(["P", "Q"]), ("a", "b"))
    assert classification_metrics(scores)["log_loss"] == pytest.approx(-np.log(1e-7) / 2)


def test_argmax__tie_goes_to_the_first_class() -> None:
    scores = Scores(np.array([1]), np.array([[0.4, 0.4, 0.2]]), np.array(["P"]), CLASSES)
    assert classification_metrics(scores)["confusion"][1] == [1, 0, 0]


def test_auroc__ties_and_hand_worked_values() -> None:
    assert auroc(np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.4, 0.1])) == pytest.approx(3.5 / 4)
    assert auroc(np.array([1, 0, 0]), np.zeros(3)) == 0.5
    assert auroc(np.ones(3), np.arange(3)) is None
    assert average_precision(np.zeros(3), np.arange(3)) is None
    assert average_precision(np.array([1, 0, 0, 0]), np.ones(4)) == pytest.approx(0.25)


def test_calibration__perfect_overconfident_and_independent_of_order() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    right = rng.random(20_000) < confidence
    probabilities = np.c_[confidence, 1 - confidence]
    labels = np.where(right, 0, 1)
    assert expected_calibration_error(labels, probabilities) < 0.02
    certain = np.tile([1.0, 0.0], (20_000, 1))
    assert expected_calibration_error(labels, certain) == pytest.approx(1 - right.mean())
    curve = reliability_curve(labels, probabilities)
    assert len(curve["count"]) == 10 and sum(curve["count"]) == 20_000 and max(curve["count"]) < 2_100
    order = rng.permutation(20_000)
    assert reliability_curve(labels[order], probabilities[order])["count"] == curve["count"]


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [[0.5, 0.5]], "do not belong together"),
        ([0], [[0.9, 0.9]], "not a probability distribution"),
        ([0], [[np.nan, 1.0]], "not a probability distribution"),
        ([0], [[-0.5, 1.5]], "not a probability distribution"),
        ([2], [[0.5, 0.5]], "outside the 2 classes"),
    ],
)
def test_scores__bad_input_is_named(labels: list[int], probabilities: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Scores(np.array(labels), np.array(probabilities), np.array(["P"] * len(labels)), ("a", "b"))


def test_scores__no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        classification_metrics(Scores(np.zeros(0, int), np.zeros((0, 2)), np.zeros(0, str), ("a", "b")))


def frames() -> pd.DataFrame:
    """Patient P has two healthy videos (3 and 1 frames) and an ill one, patient Q one ill video."""
    rows = [
        ("v1", "P", "healthy", 0.9),
        ("v1", "P", "healthy", 0.8),
        ("v1", "P", "healthy", 0.1),
        ("v2", "P", "healthy", 0.4),
        ("v3", "P", "ill", 0.2),
        ("v4", "Q", "ill", 0.5),
        ("v4", "Q", "ill", 0.3),
    ]
    table = pd.DataFrame(rows, columns=["video", "patient", "label", "p_healthy"])
    return table.assign(p_ill=1 - table["p_healthy"])


@pytest.mark.parametrize(
    ("how", "videos", "patients"),
    [
        ("mean", [0.6, 0.4, 0.2, 0.4], [0.5, 0.2, 0.4]),
        # v1: healthy at most 0.9, ill at most 0.9; v4: 0.5 against 0.7.
        ("max", [0.5, 0.4, 0.2, 5 / 12], [0.5 / 1.1, 0.2, 5 / 12]),
        # v4 frame 1 is a tie, which goes to the class listed first.
        ("vote", [2 / 3, 0.0, 0.0, 0.5], [0.5, 0.0, 1.0]),
    ],
)
def test_aggregate__rules(how: str, videos: list[float], patients: list[float]) -> None:
    by_video = aggregate(frames(), ["healthy", "ill"], "video", how)
    assert by_video["video"].tolist() == ["v1", "v2", "v3", "v4"]
    assert by_video["members"].tolist() == [3, 1, 1, 2]
    assert by_video["p_healthy"].tolist() == pytest.approx(videos)
    assert (by_video["p_healthy"] + by_video["p_ill"]).tolist() == pytest.approx([1] * 4)
    by_patient = aggregate(frames(), ["healthy", "ill"], "patient", how)
    # One row for each label a patient carries, and long videos do not outvote short ones.
    assert list(zip(by_patient["patient"], by_patient["label"], strict=True)) == [
        ("P", "healthy"),
        ("P", "ill"),
        ("Q", "ill"),
    ]
    assert by_patient["p_healthy"].tolist() == pytest.approx(patients)


@pytest.mark.parametrize(
    ("top_k", "videos", "patients"),
    [
        # v1 (0.9, 0.8, 0.1 healthy): the two largest of healthy mean 0.85, of ill (0.9, 0.2) 0.55; v4 (0.5, 0.3): 0.4 and 0.6 (all).
        (2, [0.85 / 1.4, 0.4, 0.2, 0.4], [(0.85 / 1.4 + 0.4) / 2, 0.2, 0.4]),
        # Half of three frames is two, of two one: v4 has 0.5 and 0.7 at most; half of P's two healthy videos is one.
        (0.5, [0.85 / 1.4, 0.4, 0.2, 5 / 12], [(0.85 / 1.4) / (0.85 / 1.4 + 0.6), 0.2, 5 / 12]),
        # One frame of each class is `max`; so is a share that rounds up to one.
        (1, [0.5, 0.4, 0.2, 5 / 12], [0.5 / 1.1, 0.2, 5 / 12]),
        (0.01, [0.5, 0.4, 0.2, 5 / 12], [0.5 / 1.1, 0.2, 5 / 12]),
        # More than there are: the mean.
        (50, [0.6, 0.4, 0.2, 0.4], [0.5, 0.2, 0.4]),
    ],
)  # fmt: skip
def test_aggregate__top_k_hand_worked(top_k: float, videos: list[float], patients: list[float]) -> None:
    order = frames().sample(frac=1, random_state=3)
    found = aggregate(order, ["healthy", "ill"], "video", "top_k", top_k)
    assert found["p_healthy"].tolist() == pytest.approx(videos)
    assert found["members"].tolist() == [3, 1, 1, 2] and (found["p_healthy"] + found["p_ill"]).tolist() == pytest.approx([1] * 4)
    assert aggregate(order, ["healthy", "ill"], "patient", "top_k", top_k)["p_healthy"].tolist() == pytest.approx(patients)


def test_aggregate__top_k_ties_and_rounding() -> None:
    """Equal values at the cut: which of them is taken changes nothing. 0.2 of 5, 10 and 15 frames is 1, 2 and 3, not one more."""
    for count, kept in ((5, 1), (10, 2), (15, 3), (6, 2)):
        healthy = np.linspace(0.1, 0.9, count)
        table = pd.DataFrame({"video": "v", "patient": "P", "label": "ill", "p_healthy": healthy, "p_ill": 1 - healthy})
        found = aggregate(table, ["healthy", "ill"], "video", "top_k", 0.2)["p_healthy"][0]
        high, low = healthy[-kept:].mean(), (1 - healthy[:kept]).mean()
        assert found == pytest.approx(high / (high + low))
    tied = pd.DataFrame({"video": "v", "patient": "P", "label": "ill", "p_healthy": [0.7, 0.7, 0.7, 0.2]}).assign(p_ill=[0.3, 0.3, 0.3, 0.8])
    both = [aggregate(tied.iloc[order], ["healthy", "ill"], "video", "top_k", 2)["p_healthy"][0] for order in ([0, 1, 2, 3], [3, 2, 0, 1])]
    assert both == pytest.approx([0.7 / (0.7 + 0.55)] * 2)


def test_aggregate__attention_weighs_frames_and_averages_videos() -> None:
    weights = [0.2, 0.8, 0.0, 1.0, 1.0, 0.5, 0.5]
    table = frames().assign(weight=weights).sample(frac=1, random_state=1)
    videos = aggregate(table, ["healthy", "ill"], "video", "attention")["p_healthy"].tolist()
    healthy, ill = 0.9**0.2 * 0.8**0.8, 0.1**0.2 * 0.2**0.8
    assert videos == pytest.approx([healthy / (healthy + ill), 0.4, 0.2, np.sqrt(0.15) / (np.sqrt(0.15) + np.sqrt(0.35))])
    patients = aggregate(table, ["healthy", "ill"], "patient", "attention")["p_healthy"].tolist()
    assert patients == pytest.approx([(videos[0] + videos[1]) / 2, videos[2], videos[3]])
    with pytest.raises(DataError, match="attention needs the weights of frames .* finetune.pooling: attention"):
        aggregate(frames(), ["healthy", "ill"], "video", "attention")


def test_aggregate__models_stay_apart_and_order_does_not_matter() -> None:
    both = pd.concat(
        [frames().assign(init="pretrained", seed=0), frames().assign(init="random", seed=1, p_healthy=0.5, p_ill=0.5)]
    )
    result = aggregate(both.sample(frac=1, random_state=0), ["healthy", "ill"], "video")
    assert len(result) == 8
    assert result.loc[result["init"] == "random", "p_ill"].tolist() == [0.5] * 4
    assert result.loc[result["init"] == "pretrained", "p_healthy"].tolist() == pytest.approx([0.6, 0.4, 0.2, 0.4])
    scores = Scores.from_table(result, ["healthy", "ill"])
    assert scores.labels.tolist() == [0, 0, 1, 1] * 2 and scores.classes == ("healthy", "ill")


def test_aggregate__bad_tables_are_named() -> None:
    with pytest.raises(DataError, match="'p_other' is missing"):
        aggregate(frames(), ["healthy", "other"], "video")
    with pytest.raises(DataError, match="allowed: video, patient"):
        aggregate(frames(), ["healthy", "ill"], "video", "median")
    two = frames()
    two.loc[0, "label"] = "ill"
    with pytest.raises(DataError, match="video v1 occurs with two labels"):
        aggregate(two, ["healthy", "ill"], "video")
    with pytest.raises(DataError, match="label 'ill' is not one of"):
        Scores.from_table(frames().assign(p_x=0.0), ["healthy", "x"])


def test_malignancy_metrics__hand_worked_and_undefined() -> None:
    result = malignancy_metrics(np.array([[8, 2, 0], [1, 5, 4], [0, 1, 9]]))
    assert result == pytest.approx(
        {"specificity": 16 / 20, "sensitivity": 0.9, "accuracy_2class": 25 / 30, "accuracy_3class": 22 / 30}
    )
    empty = malignancy_metrics(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert empty["sensitivity"] is None and empty["specificity"] == 1.0
    with pytest.raises(DataError, match="3x3"):
        malignancy_metrics(np.eye(2))


def test_select_epoch__rules() -> None:
    assert select_epoch([0.2, 0.7, 0.7, 0.1]) == 1
    assert select_epoch([0.9, 0.4, 0.4], "lowest") == 1
    assert select_epoch([None, float("nan"), 0.0]) == 2
    assert select_epoch([(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 0.5)], "harmonic_mean") == 2
    assert select_epoch([(0.0, 0.0), (None, 1.0)], "harmonic_mean") == 0
    assert harmonic_mean(0.0, 0.0) == 0.0
    with pytest.raises(DataError, match="none of 2 epochs"):
        select_epoch([None, None])
    with pytest.raises(DataError, match="unknown rule 'best'"):
        select_epoch([0.1], "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_malignancy_metrics__reproduce_the_published_recipe(shared: Path, fold: int) -> None:
    with np.load(shared / "golden" / "ucl" / "finetune_gb.npz", allow_pickle=False) as golden:
        truth, predicted = golden[f"f{fold}.y_true"], golden[f"f{fold}.y_pred"]
        epochs = [malignancy_metrics(confusion_matrix(truth, row, 3)) for row in predicted]
        for ours, theirs in (("accuracy_3class", "acc3"), ("specificity", "spec"), ("sensitivity", "sens")):
            np.testing.assert_allclose(
                [epoch[ours] for epoch in epochs], golden[f"f{fold}.{theirs}"], rtol=0, atol=1e-9
            )
        chosen = select_epoch([(epoch["specificity"], epoch["sensitivity"]) for epoch in epochs], "harmonic_mean")
        assert chosen == int(golden[f"f{fold}.best_epoch"])
        printed = [
            epochs[chosen][name] for name in ("accuracy_2class", "specificity", "sensitivity", "accuracy_3class")
        ]
        np.testing.assert_allclose(np.round(printed, 4), golden[f"f{fold}.best_printed_acc2_spec_sens_acc3"], atol=1e-9)
