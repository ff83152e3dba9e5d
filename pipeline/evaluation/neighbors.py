"""What features say without a classifier: nearest videos, agreement of labels and patients, a map of two dimensions.

Works on arrays; reads the features.npz that a fine-tuned item carries. No torch: the evaluate stage draws from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from pipeline.data.splits import Fold, Splits
from pipeline.errors import DataError

__all__ = ["FoldFeatures", "feature_numbers", "nearest", "read_features", "two_dimensions", "unit_rows"]

ARRAYS = ("vectors", "videos", "owner", "frame")
CHUNK = 256
"""Queries compared at once: bounds the table of similarities to 256 x gallery."""
PATIENT_RULES = 0.3
"""Chance-corrected same-patient rate from which a map is worth a warning, if labels agree less."""


@dataclass(frozen=True)
class FoldFeatures:
    """Frames of the labelled videos of one fold under its encoder, before fine-tuning."""

    fold: int
    vectors: np.ndarray
    """float32 [N, F], rows of length 1."""
    owner: np.ndarray
    """int [N]: place of the row's video in `videos`."""
    frame: np.ndarray
    """int [N]: frame number in the store."""
    videos: list[str]
    is_test: np.ndarray
    """bool [videos]: test videos of the fold, which the encoder has not seen with scope `fold`."""

    def by_video(self) -> np.ndarray:
        """Mean of each video's rows, again of length 1: float32 [videos, F]."""
        sums = np.zeros((len(self.videos), self.vectors.shape[1]), np.float32)
        np.add.at(sums, self.owner, self.vectors)
        return unit_rows(sums)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32 [N, F]; rows of zeros stay."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def read_features(path: Path, fold: Fold, splits: Splits) -> FoldFeatures | None:
    """Read features.npz of one fine-tuned item; None when it has none.

    Raises:
        DataError: not such a file, or its videos are not the labelled videos of this fold.
    """
    label = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            vectors, videos, owner, frame = (archive[name] for name in ARRAYS)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{label}: not a readable table of features ({type(error).__name__}). Run finetune again.") from None
    names = [str(name) for name in videos]
    rows = len(vectors)
    fits = vectors.ndim == 2 and owner.shape == frame.shape == (rows,) and set(owner.tolist()) == set(range(len(names)))
    if not fits or not np.isfinite(vectors).all():
        raise DataError(f"{label}: arrays do not fit one another, or hold numbers that are not finite. Run finetune again.")
    if sorted(names) != sorted({*fold.test, *fold.train}) or not set(names) <= set(splits.labels):
        raise DataError(f"{label}: holds other videos than fold {fold.fold} of data/splits.json. Run finetune again.")
    tested = set(fold.test)
    return FoldFeatures(fold.fold, unit_rows(vectors), owner, frame, names, np.array([name in tested for name in names]))


def nearest(
    queries: np.ndarray, gallery: np.ndarray, owner: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of a gallery for each query, from k different owners.

    Neighbouring frames of one video are nearly equal: without the rule all k answers would be the same video.

    Args:
        queries: float32 [Q, F], gallery: float32 [N, F]; rows of length 1, so that the product is the cosine.
        owner: int [N], video of each gallery row. allowed: bool [Q, N], False for rows a query may not find.

    Returns:
        Rows int [Q, k] and similarities float32 [Q, k], best first; -1 and -inf where fewer than k owners are allowed.
    """
    order = np.argsort(owner, kind="stable")
    names, starts = np.unique(owner[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    found, values = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, np.float32)
    take = min(k, len(names))
    for first in range(0, len(queries), CHUNK):
        part = slice(first, first + CHUNK)
        similarity = queries[part] @ gallery[order].T
        if allowed is not None:
            similarity[~allowed[part][:, order]] = -np.inf
        best = np.maximum.reduceat(similarity, starts, axis=1)
        top = np.argsort(-best, axis=1, kind="stable")[:, :take]
        for row, owners in enumerate(top):
            for place, one in enumerate(owners):
                value = best[row, one]
                if np.isfinite(value):
                    inside = similarity[row, starts[one] : ends[one]].argmax()
                    found[first + row, place] = order[starts[one] + inside]
                    values[first + row, place] = value
    return found, values


def feature_numbers(
    folds: Sequence[FoldFeatures], splits: Splits, k: int, whole: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """How features agree with labels and with patients, over the test videos of all folds.

    `precision`: share of the k nearest training videos (always of other patients) of a test frame that have its label,
    mean over the class's frames, then over classes; `precision_chance`: the same for neighbours drawn blindly.
    `same_patient`: share of test videos, among those whose patient has further videos, whose nearest video of the whole
    fold is of the same patient; `same_patient_chance`: for a blind draw. `silhouette_*`: mean silhouette (cosine) of the
    test videos grouped by label, and by patient. None where the data cannot define a number.

    `whole` names the recording of videos that are stretches of one. Stretches of one recording look alike whoever is shown,
    so for `same_patient` they are no neighbours of each other, and `silhouette_patient` is of the recordings' means.
    """
    counts: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in splits.classes}
    patient: list[tuple[float, float]] = []
    shapes: dict[str, list[float]] = {"label": [], "patient": []}
    for one in folds:
        labels = np.array([splits.labels[video] for video in one.videos])
        groups = np.array([splits.groups[video] for video in one.videos])
        recordings = np.array([(whole or {}).get(video, video) for video in one.videos])
        for name, hits, chance in _label_hits(one, labels, k):
            counts[name] = [a + b for a, b in zip(counts[name], (hits, chance, 1.0), strict=True)]
        vectors = one.by_video()
        patient += _patient_hits(vectors, groups, recordings, one.is_test)
        shapes["label"] += _silhouette(vectors[one.is_test], labels[one.is_test], repeated=False)
        _, first, place = np.unique(recordings[one.is_test], return_index=True, return_inverse=True)
        means = np.zeros((len(first), vectors.shape[1]), np.float32)
        np.add.at(means, place, vectors[one.is_test])
        shapes["patient"] += _silhouette(unit_rows(means), groups[one.is_test][first], repeated=True)
    per_class = {
        name: {
            "precision": hits / frames if frames else None, "precision_chance": chance / frames if frames else None,
            "frames": int(frames),
        }
        for name, (hits, chance, frames) in counts.items()
    }
    mean = {key: _mean([values[key] for values in per_class.values()]) for key in ("precision", "precision_chance")}
    same, blind = (_mean([pair[place] for pair in patient]) for place in (0, 1))
    numbers = {
        "neighbors": k, **mean, "per_class": per_class, "same_patient": same, "same_patient_chance": blind,
        "same_patient_videos": len(patient), **{f"silhouette_{kind}": _mean(found) for kind, found in shapes.items()},
    }
    return numbers | {"patients_dominate": _patients_dominate(numbers)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _label_hits(one: FoldFeatures, labels: np.ndarray, k: int) -> list[tuple[str, float, float]]:
    """(label, share of the nearest training videos with it, its share in training) of every test frame."""
    asked = one.is_test[one.owner]
    rows = np.flatnonzero(~asked)
    found, _ = nearest(one.vectors[asked], one.vectors[rows], one.owner[rows], k)
    truth, training = labels[one.owner[asked]], labels[~one.is_test]
    result = []
    for label, places in zip(truth, found, strict=True):
        seen = labels[one.owner[rows[places[places >= 0]]]]
        result.append((str(label), float((seen == label).mean()), float((training == label).mean())))
    return result


def _patient_hits(vectors: np.ndarray, groups: np.ndarray, recordings: np.ndarray, is_test: np.ndarray) -> list[tuple[float, float]]:
    """(1 where the nearest video of another recording is of the same patient, chance of that) of test videos that have such a video."""
    similarity = vectors @ vectors.T
    result = []
    for row in np.flatnonzero(is_test):
        other = recordings != recordings[row]
        same = int((groups[other] == groups[row]).sum())
        if same:
            found = np.where(other, similarity[row], -np.inf).argmax()
            result.append((float(groups[found] == groups[row]), same / int(other.sum())))
    return result


def _silhouette(vectors: np.ndarray, names: np.ndarray, repeated: bool) -> list[float]:
    """One value, or none where it is undefined; `repeated` leaves out groups of one video, which count as 0 by rule."""
    if repeated:
        kinds, counts = np.unique(names, return_counts=True)
        keep = np.isin(names, kinds[counts > 1])
        vectors, names = vectors[keep], names[keep]
    if not 2 <= len(np.unique(names)) < len(names):
        return []
    return [float(silhouette_score(vectors, names, metric="cosine"))]


def _patients_dominate(numbers: Mapping[str, Any]) -> bool:
    """Whether identity is recognised more than diagnosis: both rates as the way from chance (0) to always (1)."""
    rates = [(numbers[name], numbers[f"{name}_chance"]) for name in ("same_patient", "precision")]
    if any(value is None or chance is None for value, chance in rates):
        return False
    patient, label = ((value - chance) / max(1 - chance, 1e-9) for value, chance in rates)
    return patient >= PATIENT_RULES and patient > label


def two_dimensions(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows [N, F] on a plane, float32 [N, 2]: PCA, then t-SNE (van der Maaten and Hinton, JMLR 2008) from ten rows on.

    t-SNE keeps who is near whom; distances between far groups and the sizes of groups mean nothing.
    """
    spread = float(vectors.std(axis=0).max()) if len(vectors) else 0.0
    if len(vectors) < 3 or spread < 1e-9:
        return np.zeros((len(vectors), 2), np.float32)
    components = min(30, len(vectors) - 1, vectors.shape[1])
    reduced = PCA(components, svd_solver="full").fit_transform(vectors.astype(np.float64))
    if len(vectors) < 10 or components < 2:
        plane = np.zeros((len(vectors), 2), np.float32)
        plane[:, : min(2, components)] = reduced[:, :2]
        return plane
    start = reduced[:, :2] / max(reduced[:, 0].std(), 1e-12) * 1e-4
    perplexity = min(20.0, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init=start.astype(np.float32), random_state=seed).fit_transform(reduced.astype(np.float32))
