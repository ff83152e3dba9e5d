"""A made-up experiment on disk: split, fine-tuning folders and, when wanted, a frame store of speckle; no training."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from pipeline.config import Config, load_config
from pipeline.data.manifest import Manifest, VideoRow
from pipeline.data.splits import Fold, InnerFold, Splits
from pipeline.data.store import FrameStore, write_video


@dataclass
class FakeExperiment:
    """Patients `P0`.. with `clips` videos each, dealt to folds in turn; every video of patient i has class i mod C.

    `skill` is the number added to the true class's logit by initialisation: 0 is guessing, 3 nearly perfect.
    """

    root: Path
    classes: list[str] = field(default_factory=lambda: ["a", "b"])
    patients: int = 12
    clips: int = 2
    folds: int = 3
    frames: int = 4
    seeds: list[int] = field(default_factory=lambda: [0])
    skill: dict[str, float] = field(default_factory=lambda: {"pretrained": 2.0, "random": 0.5})
    group: str = "patient"
    """`frame` deals the frames of every video; make them many enough for every fold."""
    repeats: int = 1
    params: dict[str, object] = field(default_factory=dict)
    given: Splits | None = None
    """A split made elsewhere, whose videos, patients, classes and folds are taken over."""

    def __post_init__(self) -> None:
        if self.given is not None:
            self.classes, self.folds, self.group = self.given.classes, self.given.folds_per_repeat, self.given.group
            self.groups, self.labels, self.splits = self.given.groups, self.given.labels, self.given
            self.folders, self.config = self._items(), self._config()
            return
        self.groups = {}
        self.labels = {}
        for patient in range(self.patients):
            for clip in range(self.clips):
                video = f"{patient:08x}{clip:08x}"
                self.groups[video] = f"P{patient:010x}"
                self.labels[video] = self.classes[patient % len(self.classes)]
        self.splits = self._splits()
        self.folders = self._items()
        self.config = self._config()

    def _fold_of(self, video: str, repeat: int = 0) -> int:
        # Patients of one class lie C apart; integer division deals each class evenly to the folds.
        place = int(video[:8], 16) // len(self.classes)
        if repeat:
            place = int(np.random.default_rng(repeat).permutation(-(-self.patients // len(self.classes)))[place])
        return place % self.folds

    def _splits(self) -> Splits:
        if self.group == "frame":
            every, inner = list(self.labels), [InnerFold(list(self.labels), list(self.labels))] * 2
            return self._described([Fold(n, every, every, inner, n // self.folds) for n in range(self.folds * self.repeats)])
        folds = []
        for number in range(self.folds * self.repeats):
            repeat, place = divmod(number, self.folds)
            home = {video: self._fold_of(video, repeat) for video in self.labels}
            test = [video for video in self.labels if home[video] == place]
            train = [video for video in self.labels if home[video] != place]
            inner_number = (place + 1) % self.folds
            validation = [video for video in train if home[video] == inner_number]
            rest = [video for video in train if video not in validation]
            folds.append(Fold(number, test, train, [InnerFold(rest, validation)] if rest else [], repeat))
        return self._described(folds)

    def _described(self, folds: list[Fold]) -> Splits:
        return Splits(
            seed=0,
            group=self.group,
            manifest_digest="0" * 64,
            classes=list(self.classes),
            excluded_classes={},
            warnings=[],
            groups=dict(self.groups),
            labels=dict(self.labels),
            folds=folds,
            unlabelled=[],
            unlabelled_blocked=[],
        )

    def _items(self) -> list[Path]:
        return [
            self._item(init, seed, fold) for init in self.skill for seed in self.seeds for fold in self.splits.folds
        ]

    def _item(self, init: str, seed: int, fold: Fold) -> Path:
        rng = np.random.default_rng([seed, fold.fold, len(init)])
        folder = self.root / "models/finetuned" / f"{init}-seed{seed}-fold{fold.fold}"
        folder.mkdir(parents=True)
        validation = fold.inner[0].validation if fold.inner else []
        rows = []
        for part, videos in (("test", fold.test), ("validation", validation)):
            for video in videos:
                truth = self.classes.index(self.labels[video])
                shift = rng.normal(0, 1, len(self.classes))
                shift[truth] += self.skill[init]
                for frame in self.splits.frames_of(fold, part, video, self.frames):
                    logits = shift + rng.normal(0, 0.4, len(self.classes))
                    values = np.exp(logits) / np.exp(logits).sum()
                    rows.append(
                        {
                            "init": init,
                            "seed": seed,
                            "fold": fold.fold,
                            "part": part,
                            "video": video,
                            "patient": self.groups[video],
                            "frame": frame,
                            "label": self.labels[video],
                            **{f"p_{name}": value for name, value in zip(self.classes, values, strict=True)},
                        }
                    )
        pd.DataFrame(rows).to_csv(folder / "predictions.csv", index=False)
        held = set(validation)
        train = self.splits.groups_of(video for video in fold.train if video not in held)
        card = {
            "schema": 1,
            "init": init,
            "seed": seed,
            "fold": fold.fold,
            "classes": self.classes,
            "train_groups": train,
            "validation_groups": self.splits.groups_of(validation),
            "test_groups": self.splits.groups_of(fold.test),
            "pretrain_groups": self.splits.groups_of(fold.train) if init == "pretrained" else [],
            "pretrain_scope": ("all" if self.group == "frame" else "fold") if init == "pretrained" else "none",
            "selection": "inner",
            "selected_epoch": 7,
            "stamp": None,
            "method": "ucl" if init == "pretrained" else None,
            "fingerprint": "f" * 16,
            "seconds": 12.5,
        }
        (folder / "card.json").write_text(json.dumps(card))
        return folder

    def _config(self) -> Config:
        text = {
            "finetune": {"initialisations": list(self.skill), "seeds": self.seeds},
            "evaluate": {"bootstrap": 200},
            "split": {"folds": list(range(self.folds * self.repeats)), "repeats": self.repeats},
        }
        for section, values in self.params.items():
            text.setdefault(section, {}).update(values)
        path = self.root / "params.yaml"
        path.write_text(json.dumps(text))  # JSON is YAML
        return load_config(path)

    def folder(self, name: str) -> Path:
        """The folder of one item."""
        return self.root / "models/finetuned" / name

    def edit_card(self, name: str, **changes: object) -> None:
        """Overwrite keys of one card."""
        path = self.folder(name) / "card.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def edit_table(self, name: str, change) -> None:
        """Pass one predictions.csv through `change(table) -> table`."""
        path = self.folder(name) / "predictions.csv"
        change(pd.read_csv(path, dtype={"video": str, "label": str}, keep_default_na=False)).to_csv(path, index=False)

    def write_features(self, by_label: float = 1.0, by_patient: float = 0.3, size: int = 24) -> None:
        """features.npz of every item: directions of the label and of the patient, mixed with a little noise per frame."""
        rng = np.random.default_rng(7)
        classes = dict(zip(self.classes, rng.normal(size=(len(self.classes), size)), strict=True))
        groups = {name: rng.normal(size=size) for name in sorted(set(self.groups.values()))}
        for folder in self.folders:
            videos = sorted(self.labels)
            rows = [
                by_label * classes[self.labels[v]] + by_patient * groups[self.groups[v]] + 0.05 * rng.normal(size=size)
                for v in videos for _ in range(self.frames)
            ]
            owner, frame = np.divmod(np.arange(len(rows)), self.frames)
            np.savez(folder / "features.npz", vectors=np.array(rows, np.float16), videos=np.array(videos), owner=owner, frame=frame)

    def store(self, side: int = 64) -> FrameStore:
        """A frame store with speckle for every video."""
        folder, rows = self.root / "data/frames/main", []
        for video, label in self.labels.items():
            rng = np.random.default_rng(int(video, 16) % 2**32)
            pictures = []
            for _ in range(self.frames):
                speckle = rng.rayleigh(40 + 25 * self.classes.index(label), (side, side)).clip(0, 255).astype(np.uint8)
                pictures.append(cv2.imencode(".jpg", cv2.GaussianBlur(speckle, (3, 3), 0))[1].tobytes())
            write_video(folder, video, pictures)
            rows.append(
                VideoRow(
                    video=video,
                    source="main",
                    path=f"{video}.mp4",
                    sha256=video * 4,
                    patient=self.groups[video],
                    label=label,
                    kind="video",
                    frames=self.frames,
                    frames_decoded=self.frames,
                    frames_claimed=self.frames,
                    fps=12.0,
                    fps_source="container",
                    width=side,
                    height=side,
                    stored_width=side,
                    stored_height=side,
                    channels=1,
                    bytes=(folder / f"{video}.tar").stat().st_size,
                )
            )
        Manifest(rows).write(folder / "manifest.csv")
        return FrameStore(folder)
