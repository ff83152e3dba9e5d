"""Fine-tuning and out-of-fold prediction for one initialisation, seed and outer fold.

Inner validation patients select the epoch; the outer test patients are only predicted. While layers are frozen, their
outputs are computed once for a few augmented views of every training frame, which makes an epoch cost little more than
the trained layers. `selection.py` trains many such networks and chooses among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from pipeline.data.frames import FrameCache
from pipeline.data.loader import sample_generator
from pipeline.data.transforms import frame_view, normalize, render
from pipeline.errors import PipelineError
from pipeline.evaluation.features import evenly_spaced, render_centre
from pipeline.evaluation.metrics import Scores, attention_mean, classification_metrics, harmonic_mean, malignancy_metrics, select_epoch
from pipeline.models.classifier import Classifier, attend
from pipeline.parameters import FinetuneParams
from pipeline.training.optim import apply_schedule, build_optimizer, clip_gradients

__all__ = ["Diverged", "FinetuneData", "Finetuning", "Predictions", "Prepared", "class_weights", "subset_by_patient"]

_HELD_BYTES = 2**30
"""Inputs of one part that are kept between epochs; every frame of forty operations would take many times that."""


class Diverged(PipelineError):
    """Loss or predictions are not finite."""


@dataclass(frozen=True)
class FinetuneData:
    """Labelled videos of one fold, as indices into `frames`."""

    frames: FrameCache
    labels: np.ndarray
    """int64 [videos], class numbers."""
    groups: list[str]
    classes: list[str]
    train: list[int]
    validation: list[int]
    test: list[int]
    allowed: Callable[[str, int], Sequence[int]] | None = None
    """(part, video index) -> frame numbers that part may use, for a split by frame; None: all frames of its videos."""

    def frames_of(self, part: str, video: int) -> Sequence[int]:
        """Frame numbers of a video that `train`, `validation` or `test` may use."""
        return range(self.frames.num_frames(video)) if self.allowed is None else self.allowed(part, video)


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of frames: `items` are (video index, frame number) pairs, `probabilities` float32 [N, C]."""

    items: list[tuple[int, int]]
    probabilities: np.ndarray
    weights: np.ndarray | None = None
    """float32 [N], attention within the video (sum 1); None where frames are averaged."""

    def by_video(self) -> tuple[np.ndarray, np.ndarray]:
        """(video indices [V] ascending, probabilities [V, C]): the mean of the frames, or what attention makes of them."""
        videos = np.array([v for v, _ in self.items])
        distinct = np.unique(videos)
        if self.weights is None:
            return distinct, np.stack([self.probabilities[videos == v].mean(0) for v in distinct])
        parts = [videos == v for v in distinct]
        return distinct, np.stack([attention_mean(self.probabilities[part], self.weights[part]) for part in parts])


@dataclass
class Prepared:
    """What networks with the same frozen layers have in common, computed once: the outputs of those layers, or rendered images.

    Networks that want something else begin anew, so that one kind at a time lies in memory.
    """

    videos: list[int]
    """The training videos of all these networks."""
    kind: Any = None
    views: dict[int, tuple[list[tuple[int, int]], torch.Tensor]] = field(default_factory=dict)
    """By round: the training frames of `videos`, and one row for each."""
    centres: dict[tuple[Any, ...], list[torch.Tensor]] = field(default_factory=dict)
    """By part and judged videos: rows of their evenly spaced frames, 64 at a time."""

    def want(self, kind: Any) -> None:
        """Keep what is held for the same kind; else begin with new dictionaries, for networks before may still read the old."""
        if kind != self.kind:
            self.kind, self.views, self.centres = kind, {}, {}


def class_weights(labels: np.ndarray, classes: int, kind: str) -> torch.Tensor | None:
    """Weights of the cross-entropy: inverse class frequency over videos with mean 1 over samples, or None."""
    if kind == "none":
        return None
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    return torch.tensor(len(labels) / (classes * np.maximum(counts, 1)), dtype=torch.float32)


def subset_by_patient(
    videos: list[int], labels: np.ndarray, groups: list[str], fraction: float, seed: int, *, joint: bool = False
) -> list[int]:
    """Videos of a share of the patients, at least one patient a class; nested: a larger fraction contains a smaller one.

    Args:
        joint: patients carry many classes each (stretches of a whole video): a share of all patients is taken, and more
            only until every class is there. Otherwise a share of the patients of each class.
    """
    if fraction >= 1 or not videos:
        return videos
    if joint:
        names = sorted({groups[v] for v in videos})
        order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        held = {name: {int(labels[v]) for v in videos if groups[v] == name} for name in names}
        every = set().union(*held.values())
        complete = next(n for n in range(1, len(order) + 1) if set().union(*(held[name] for name in order[:n])) == every)
        chosen = set(order[: max(complete, round(fraction * len(order)))])
        return [v for v in videos if groups[v] in chosen]
    keep: set[str] = set()
    for label in sorted({int(labels[v]) for v in videos}):
        patients = sorted({groups[v] for v in videos if labels[v] == label})
        order = np.random.default_rng([seed, label]).permutation(len(patients))
        keep |= {patients[i] for i in order[: max(1, round(fraction * len(patients)))]}
    return [v for v in videos if groups[v] in keep]


class Finetuning:
    """One classifier: train, select an epoch, predict.

    Args:
        network: classifier on the device. seed: of frames, views and order. size: image side in pixels. prepared: shared by
            networks on one trunk, seed and size, of which one after another is trained.
    """

    def __init__(
        self, network: Classifier, data: FinetuneData, params: FinetuneParams, *, seed: int, size: int, device: torch.device,
        prepared: Prepared | None = None,
    ) -> None:
        self.network, self.data, self.params, self.seed, self.size, self.device = network, data, params, seed, size, device
        self.statistics = params.augmentation.normalization
        self.cached = network.cacheable and params.cached_views > 0
        self.frozen, self.live = network.split() if self.cached else (torch.nn.Identity(), network)
        self.weights = class_weights(data.labels[data.train], len(data.classes), params.class_weights)
        self.weights = None if self.weights is None else self.weights.to(device)
        self.optimizer = build_optimizer(params.optimizer, network)
        self.rows: list[dict[str, Any]] = []
        self.selected_epoch = 0
        prepared = prepared or Prepared(data.train)
        cut = (params.trainable, params.frames_per_video) if self.cached else None
        prepared.want((cut, params.augmentation, params.eval_frames_per_video, seed, size))
        self._prepared, self._views, self._centres = prepared.videos, prepared.views, prepared.centres

    # --- inputs ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _constants(self, images: np.ndarray) -> torch.Tensor:
        """uint8 images -> what is kept of them: the frozen layers' outputs, or the images as they are (a twelfth of floats)."""
        if not self.cached:
            return torch.from_numpy(images)
        self.frozen.eval()
        chunks = torch.from_numpy(images).split(64)
        return torch.cat([self.frozen(normalize(chunk.to(self.device), self.statistics)) for chunk in chunks])

    def _outputs(self, kept: torch.Tensor) -> torch.Tensor:
        """Rows of `_constants` -> logits of frames, with attention one column more."""
        kept = kept.to(self.device)
        return self.live(kept if self.cached else normalize(kept, self.statistics))

    def _training_frames(self, epoch: int, videos: Sequence[int] | None = None) -> list[tuple[int, int]]:
        """`frames_per_video` random frames of each training video (or of `videos`), the same whatever else is drawn."""
        chosen = []
        for video in self.data.train if videos is None else videos:
            usable = self.data.frames_of("train", video)
            rng = np.random.default_rng([self.seed, epoch, self.data.frames.videos[video].number])
            take = min(self.params.frames_per_video, len(usable))
            chosen += [(video, int(usable[n])) for n in sorted(rng.choice(len(usable), take, replace=False))]
        return chosen

    def _render_views(self, items: Sequence[tuple[int, int]], epoch: int) -> np.ndarray:
        """One augmented view of each frame: uint8 [N, size, size(, 3)]."""
        frames = self.data.frames
        out = np.empty((len(items), self.size, self.size, *frames.frame_shape), np.uint8)
        for row, (video, number) in enumerate(items):
            rng = sample_generator(self.seed + 1, epoch, frames.videos[video].number, number)
            frame = frames.frame(video, number)
            render(frame, frame_view(self.params.augmentation, rng, frame, self.size), self.size, out[row])
        return out

    def _cached_inputs(self, turn: int) -> tuple[list[tuple[int, int]], torch.Tensor, np.ndarray]:
        """(frames, outputs of the frozen layers, row of each frame in them) of one of the `cached_views` rounds, computed once."""
        if turn not in self._views:
            items = self._training_frames(turn, self._prepared)
            chunks = [self._constants(self._render_views(items[first : first + 64], turn)) for first in range(0, len(items), 64)]
            self._views[turn] = items, torch.cat(chunks)
        items, outputs = self._views[turn]
        own = set(self.data.train)
        places = [place for place, (video, _) in enumerate(items) if video in own]
        return [items[place] for place in places], outputs, np.array(places)

    def _batches(self, videos: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Places in `videos` (one for each frame) in random order, `batch_size` a batch; with attention those of whole videos, as many
        as `batch_size` frames make."""
        if self.network.attention is None:
            units = rng.permutation(len(videos))[:, None]
            size = self.params.batch_size
        else:
            distinct = list(dict.fromkeys(videos.tolist()))
            units = [np.flatnonzero(videos == distinct[place]) for place in rng.permutation(len(distinct))]
            size = max(1, self.params.batch_size // self.params.frames_per_video)
        batches = [np.concatenate(units[first : first + size]) for first in range(0, len(units), size)]
        if len(batches) > 1 and len(batches[-1]) == 1:
            # Batch norm cannot normalise one sample; it joins the batch before it.
            batches[-2:] = [np.concatenate(batches[-2:])]
        return batches

    def _training_batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, np.ndarray, int]]:
        """(inputs of the trained part, video of each, number of batches) of every batch of an epoch, in random order.

        What is not cached is rendered a batch ahead of its use, on a thread: an epoch of images never lies in memory.
        """
        items, inputs, places = self._training_frames(epoch), None, None
        if self.cached:
            items, inputs, places = self._cached_inputs(epoch % self.params.cached_views)
        videos = np.array([video for video, _ in items])
        batches = self._batches(videos, np.random.default_rng([self.seed, epoch]))
        if inputs is not None and places is not None:
            for rows in batches:
                yield inputs[torch.from_numpy(places[rows]).to(inputs.device)], videos[rows], len(batches)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._render_views, [items[row] for row in batches[0]], epoch)
            for number, rows in enumerate(batches, start=1):
                images = self._constants(ahead.result())
                if number < len(batches):
                    ahead = pool.submit(self._render_views, [items[row] for row in batches[number]], epoch)
                yield images, videos[rows], len(batches)

    def _answers(self, outputs: torch.Tensor, videos: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of what the loss counts: frames, or with attention videos."""
        if self.network.attention is not None:
            starts = np.flatnonzero(np.diff(videos, prepend=-1))
            outputs, videos = attend(outputs, np.diff(starts, append=len(videos)).tolist())[0], videos[starts]
        return outputs, torch.from_numpy(self.data.labels[videos]).to(self.device)

    # --- training ----------------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        params = self.params
        total, right, seen, rate = 0.0, 0, 0, params.optimizer.lr
        for number, (inputs, videos, batches) in enumerate(self._training_batches(epoch)):
            if number == 0:
                # Behind the inputs, for which the frozen layers were in evaluation mode.
                self.network.training_mode(epoch)
            rate = apply_schedule(self.optimizer, params.optimizer, params.epochs, epoch + number / batches, batches)
            logits, labels = self._answers(self._outputs(inputs), videos)
            loss = F.cross_entropy(logits, labels, weight=self.weights)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients(self.optimizer, params.optimizer)
            self.optimizer.step()
            seen += len(labels)
            total += float(loss.detach()) * len(labels)
            right += int((logits.argmax(1) == labels).sum())
        return {"train_loss": total / seen, "train_accuracy": right / seen, "learning_rate": rate}

    def _judged(self, part: str, items: list[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """`_constants` of the central views of frames, 64 at a time; kept for the next epoch as long as they fit."""
        held = self._centres.setdefault((part, *getattr(self.data, part)), [])
        for number, start in enumerate(range(0, len(items), 64)):
            if number < len(held):
                yield held[number]
                continue
            rows = self._constants(render_centre(self.data.frames, items[start : start + 64], self.size))
            if number == len(held) and (number + 1) * rows.nbytes <= _HELD_BYTES:
                held.append(rows)
            yield rows

    @torch.no_grad()
    def predict(self, part: str) -> Predictions:
        """Probabilities of evenly spaced frames of `train`, `validation` or `test` videos, in evaluation mode."""
        usable = {v: self.data.frames_of(part, v) for v in getattr(self.data, part)}
        items = [(v, int(own[n])) for v, own in usable.items() for n in evenly_spaced(len(own), self.params.eval_frames_per_video)]
        self.network.eval()
        outputs = torch.cat([self._outputs(chunk) for chunk in self._judged(part, items)]).float().cpu()
        weights = None
        if self.network.attention is not None:
            frames = Counter(video for video, _ in items)
            weights, outputs = attend(outputs, list(frames.values()))[1].numpy(), outputs[:, :-1]
        probabilities = outputs.softmax(1).numpy()
        self._demand_finite(probabilities)
        return Predictions(items, probabilities, weights)

    def _demand_finite(self, numbers: np.ndarray) -> None:
        if not np.isfinite(numbers).all():
            raise Diverged(
                f"finetune: loss or predictions are not finite after epoch {len(self.rows) + 1}. Lower finetune.optimizer.lr (now "
                f"{self.params.optimizer.lr:g}), and check that the encoder's weights are finite."
            )

    def judge(self, predicted: Predictions) -> dict[str, float]:
        """Metrics per video."""
        videos, probabilities = predicted.by_video()
        patients = np.array([self.data.groups[v] for v in videos])
        probabilities = probabilities.astype(np.float64)
        scores = Scores(self.data.labels[videos], probabilities / probabilities.sum(1, keepdims=True), patients, tuple(self.data.classes))
        numbers = classification_metrics(scores)
        return {
            "accuracy": numbers["accuracy"], "balanced_accuracy": numbers["balanced_accuracy"], "macro_f1": numbers["macro_f1"],
            "loss": numbers["log_loss"],
        } | self._malignancy(np.array(numbers["confusion"]))

    def _malignancy(self, confusion: np.ndarray) -> dict[str, float]:
        """The published gallbladder rule (harmonic mean of specificity and sensitivity) where it is asked for."""
        if self.params.selection_metric != "malignancy_harmonic_mean":
            return {}
        numbers = malignancy_metrics(confusion)
        return {"malignancy_harmonic_mean": harmonic_mean(numbers["specificity"], numbers["sensitivity"])}

    def learn(self, epoch: int) -> dict[str, Any]:
        """One epoch of training; returns its row of the curves.

        Raises:
            PipelineError: the loss is not finite.
        """
        row: dict[str, Any] = {"epoch": epoch, **self._train_epoch(epoch)}
        self._demand_finite(np.array(row["train_loss"]))
        return row

    def train(self, tracker: Any, title: str, epochs: int | None = None) -> None:
        """All epochs; afterwards the network holds the weights of the selected one.

        Args:
            epochs: end after so many, with a learning rate that is laid out for all; None for all.

        Raises:
            PipelineError: the loss or a prediction is not finite.
        """
        params = self.params
        watched = {"inner": "validation", "best_on_test": "test"}.get(params.selection)
        name, rule = f"{watched}_{params.selection_metric}", "lowest" if params.selection_metric == "loss" else "highest"
        kept: dict[str, torch.Tensor] | None = None
        for epoch in tqdm(range(params.epochs if epochs is None else epochs), desc=title, unit="epoch", disable=None, mininterval=1.0):
            row = self.learn(epoch)
            for part in ["validation"] * bool(self.data.validation) + ["test"] * (watched == "test"):
                row |= {f"{part}_{key}": value for key, value in self.judge(self.predict(part)).items()}
            self.rows.append(row)
            tracker.log_metrics({key: value for key, value in row.items() if key != "epoch"}, step=epoch)
            self.selected_epoch = epoch if watched is None else select_epoch([r[name] for r in self.rows], rule)
            if self.selected_epoch == epoch:
                kept = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        if kept is not None:
            self.network.load_state_dict(kept)
