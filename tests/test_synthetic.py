"""The phantom data: reproducible, balanced, not readable from brightness, but learnable from its physics."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageSequence
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.data import synthetic
from pipeline.data.synthetic import CLASSES, PhantomClip, PhantomRow, draw_patients, write_phantoms
from pipeline.errors import DataError
from pipeline.parameters import PhantomParams

TINY = PhantomParams(patients=7, clips_per_patient=2, seconds=0.5, frames_per_second=8, size=48, seed=3)
MANY = PhantomParams(patients=36, clips_per_patient=2, seconds=1.0, frames_per_second=6, size=80)


def decode(path: Path) -> np.ndarray:
    """Gray frames of one file, uint8 [T, H, W]."""
    if path.suffix == ".gif":
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)])
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        found, frame = capture.read()
        if not found:
            break
        frames.append(frame[..., 0])
    capture.release()
    return np.stack(frames)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PhantomRow]]:
    folder = tmp_path_factory.mktemp("phantom")
    return folder, write_phantoms(folder, TINY)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Decoded clips, class and patient of each, for 36 patients."""
    folder = tmp_path_factory.mktemp("phantoms")
    rows = write_phantoms(folder, MANY)
    clips = [decode(folder / row.path) for row in rows]
    return clips, np.array([row.label for row in rows]), np.array([row.patient for row in rows])


def grouped_accuracy(model, features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> float:
    predicted = cross_val_predict(
        make_pipeline(StandardScaler(), model), features, labels, groups=patients, cv=GroupKFold(6)
    )
    return float((predicted == labels).mean())


def physics(clip: np.ndarray) -> np.ndarray:
    """Texture of the lung field: vertical against horizontal edges, share of variance of columns and of rows. [3]"""
    values = []
    for frame in clip[::2]:
        height, width = frame.shape
        field = frame[int(0.35 * height) : int(0.85 * height), int(0.25 * width) : int(0.75 * width)]
        field = cv2.resize(field.astype(np.float32), (48, 48), interpolation=cv2.INTER_AREA)
        field = cv2.GaussianBlur(field, (0, 0), 0.7)
        field -= cv2.GaussianBlur(field, (0, 0), 8)
        across, down = np.abs(field[:, 2:] - field[:, :-2]).mean(), np.abs(field[2:] - field[:-2]).mean()
        total = field.var() + 1e-3
        values.append([np.log(across / down), field.mean(0).var() / total, field.mean(1).var() / total])
    return np.mean(values, axis=0)


def test_write__table_matches_files(tiny: tuple[Path, list[PhantomRow]]) -> None:
    folder, rows = tiny
    with open(folder / "labels.csv", newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    assert list(table[0]) == ["path", "label", "patient", "probe"]
    assert [line["path"] for line in table] == [row.path for row in rows] == sorted(row.path for row in rows)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("clip_*")}
    assert on_disk == {row.path for row in rows} and len(rows) == 14
    assert not any(word in row.path for row in rows for word in (*CLASSES, "patient", "linear", "convex"))


def test_write__every_file_decodes_with_its_rate(tiny: tuple[Path, list[PhantomRow]]) -> None:
    folder, rows = tiny
    rates, suffixes, shapes = Counter(), Counter(), set()
    for row in rows:
        path = folder / row.path
        clip = decode(path)
        suffixes[path.suffix] += 1
        shapes.add(clip.shape[1:])
        assert clip.shape[0] in (4, 5) and clip.shape[1] == TINY.size
        if path.suffix != ".gif":
            rates[round(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS), 2)] += 1
    assert suffixes[".gif"] == 1 and suffixes[".avi"] >= 1 and suffixes[".mp4"] > 7
    assert set(rates) == {8.0, 10.0} and rates[8.0] > rates[10.0]
    assert len(shapes) > 1


def test_write__same_parameters_same_frames(tiny: tuple[Path, list[PhantomRow]], tmp_path: Path) -> None:
    folder, rows = tiny
    again = write_phantoms(tmp_path / "again", TINY)
    assert again == rows
    for row in rows:
        np.testing.assert_array_equal(decode(folder / row.path), decode(tmp_path / "again" / row.path))


def test_write__seed_changes_frames(tiny: tuple[Path, list[PhantomRow]]) -> None:
    label, look = draw_patients(TINY)[0]
    first, second = (PhantomClip(look, label, 48, 2, 8.0, [seed, 4, 0]).frame(0) for seed in (3, 4))
    assert np.abs(first.astype(int) - second).mean() > 5


def test_write__replaces_earlier_phantoms_and_spares_other_files(tmp_path: Path) -> None:
    small = TINY.model_copy(update={"patients": 6, "clips_per_patient": 1})
    write_phantoms(tmp_path, small.model_copy(update={"clips_per_patient": 3}))
    rows = write_phantoms(tmp_path, small)
    assert len(list(tmp_path.rglob("clip_*"))) == len(rows) == 6
    (tmp_path / "recording.mp4").write_bytes(b"somebody's data")
    with pytest.raises(DataError, match=r"recording\.mp4"):
        write_phantoms(tmp_path, small)
    assert len(list(tmp_path.rglob("*.mp4"))) >= 2 and (tmp_path / "labels.csv").is_file()


@pytest.mark.parametrize("patients", [6, 7, 8, 24])
def test_draw__balanced_classes_and_probes(patients: int) -> None:
    drawn = draw_patients(PhantomParams(patients=patients))
    classes = Counter(label for label, _ in drawn)
    linear = Counter(label for label, look in drawn if look.probe == "linear")
    assert set(classes) == set(CLASSES) and max(classes.values()) - min(classes.values()) <= 1
    assert set(linear) == set(CLASSES) and max(linear.values()) - min(linear.values()) <= 1


def test_encoder__missing_mp4_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic._ENCODERS, "mp4", "????")
    rows = write_phantoms(tmp_path, TINY.model_copy(update={"patients": 6, "clips_per_patient": 1}))
    assert {Path(row.path).suffix for row in rows} == {".avi", ".gif"}
    replaced = [row for row in rows if row.warning]
    assert replaced and all("MJPG" in row.warning and decode(tmp_path / row.path).size for row in replaced)


def test_encoder__none_at_all_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_write_container", lambda path, clip: False)
    with pytest.raises(DataError, match="neither mp4v nor MJPG"):
        write_phantoms(tmp_path, TINY)
    assert not (tmp_path / "labels.csv").exists()


@pytest.mark.parametrize("label", CLASSES)
def test_clip__brightness_and_contrast_are_the_patients_own(label: str) -> None:
    for index, (_, look) in enumerate(draw_patients(MANY)[:6]):
        clip = PhantomClip(look, label, 96, 20, 10.0, [index])
        values = np.stack(list(clip))[:, clip._sector > 0] / 255
        assert values.mean() == pytest.approx(look.mean, abs=0.02)
        assert values.std() == pytest.approx(look.std, rel=0.12)


def test_clip__neighbours_are_alike_and_distant_frames_differ() -> None:
    near, far = [], []
    for index, (label, look) in enumerate(draw_patients(MANY)[:12]):
        clip = PhantomClip(look, label, 96, 36, 12.0, [index])
        # The chest wall is alike all along the body; what changes is the lung, the lower two thirds.
        pictures = [cv2.GaussianBlur(clip.frame(k).astype(np.float32), (0, 0), 2)[32:] for k in (0, 1, 35)]
        near.append(np.abs(pictures[0] - pictures[1]).mean())
        far.append(np.abs(pictures[0] - pictures[2]).mean())
    ratio = np.array(far) / np.array(near)
    assert ratio.min() > 1.3 and np.median(ratio) > 2


def test_task__not_readable_from_brightness_or_contrast(many) -> None:
    clips, labels, patients = many
    statistics = np.array([[clip.mean(), clip.std()] for clip in clips])
    # 36 independent patients: the standard error of chance is sqrt(1/3 * 2/3 / 36) = 0.079; two of them allowed.
    limit = 1 / 3 + 2 * np.sqrt(2 / 9 / MANY.patients)
    for columns in ([0], [1], [0, 1]):
        for model in (LogisticRegression(), KNeighborsClassifier(7)):
            accuracy = grouped_accuracy(model, statistics[:, columns], labels, patients)
            assert accuracy < limit, (columns, type(model).__name__, accuracy)


def test_task__readable_from_physics(many) -> None:
    clips, labels, patients = many
    features = np.array([physics(clip) for clip in clips])
    assert grouped_accuracy(LinearDiscriminantAnalysis(), features, labels, patients) > 0.75
    direction = {name: features[labels == name].mean(0) for name in CLASSES}
    assert direction["b_lines"][0] > direction["consolidation"][0] > direction["healthy"][0]
    assert direction["healthy"][2] > 2 * direction["b_lines"][2]
