"""Real lung-ultrasound clips through the stages, with nothing but `data.source` changed: labels and patients are found."""

from __future__ import annotations

import csv
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scratch_project import ROOT, TINY, set_params

from pipeline.config import Config, load_config
from pipeline.data.extract import extract_source
from pipeline.data.manifest import Manifest
from pipeline.data.split_report import run_split
from pipeline.data.splits import Splits
from pipeline.files import read_json

CLASSES = ("covid", "pneumonia", "regular")
FOLD = 0


@dataclass
class Project:
    """A finished run of one fold, its corpus' table and the working folder."""

    folder: Path
    table: dict[str, dict[str, str]]
    config: Config
    metrics: dict[str, Any]


def _choose(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The smallest usable clips of four patients a class; one patient has clips of two classes, as in the whole corpus."""
    chosen = []
    for label in CLASSES:
        mine = [row for row in rows if row["label"] == label and row["probe"] == "convex" and 20 <= int(row["n_frames"]) <= 320]
        smallest: dict[str, dict[str, str]] = {}
        for row in sorted(mine, key=lambda row: int(row["bytes"])):
            smallest.setdefault(row["patient_id"], row)
        chosen += list(smallest.values())[:4]
    assert len({row["patient_id"] for row in chosen}) < len(chosen) == 12
    return chosen


@pytest.fixture(scope="module")
def project(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    source = shared / "data" / "pocus"
    if not (source / "videos.csv").is_file():
        pytest.skip("needs the real clips, data/pocus of the shared folder")
    with open(source / "videos.csv", encoding="utf-8", newline="") as handle:
        chosen = _choose(list(csv.DictReader(handle)))
    corpus, folder = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("project")
    for row in chosen:
        (corpus / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / row["path"], corpus / row["path"])
    with open(corpus / "videos.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, chosen[0])
        writer.writeheader()
        writer.writerows(chosen)
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    few = {"pretrain.epochs": 1, "pretrain.samples_per_video": 1, "tracking.enabled": False}
    set_params(folder, {**TINY, **few, "data.source": str(corpus)})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        return Project(folder, {row["path"]: row for row in chosen}, *_run(folder))


def _run(folder: Path) -> tuple[Config, dict[str, Any]]:
    """All stages up to one fine-tuned fold, in the current folder."""
    from pipeline.training.finetune_stage import run_finetune_stage
    from pipeline.training.pretrain_stage import run_pretrain_stage

    config = load_config()
    metrics = extract_source("main", config, Path("data/frames/main"), Path("reports/extract"))
    run_split(config, Path("data/frames"), Path("data/splits.json"), Path("reports/split"))
    run_pretrain_stage(config, FOLD, ROOT / "stages" / "pretrain.py")
    run_finetune_stage(config, "pretrained", 0, FOLD)
    return config, metrics


def test_real_clips__every_frame_label_and_patient_is_found(project: Project) -> None:
    rows = Manifest.read(project.folder / "data/frames/main/manifest.csv").rows
    assert len(rows) == len(project.table) == 12 and project.metrics["quarantined"] == 0
    patients = defaultdict(set)
    for row in rows:
        entry = project.table[row.path]
        assert (row.label, row.frames_decoded, row.sha256) == (entry["label"], int(entry["n_frames"]), entry["sha256"]), row.path
        assert (row.width, row.height) == (int(entry["width"]), int(entry["height"])), row.path
        patients[entry["patient_id"]].add(row.patient)
    assert all(len(names) == 1 for names in patients.values()) and len({min(names) for names in patients.values()}) == len(patients)
    assert not {*patients} & {row.patient for row in rows}, "the table's patient ids are replaced"
    assert Counter(row.label for row in rows) == dict.fromkeys(CLASSES, 4)


def test_real_clips__no_patient_is_on_two_sides(project: Project) -> None:
    splits = Splits.read(project.folder / "data/splits.json")
    splits.check()
    fold = splits.fold(FOLD)
    assert splits.classes == list(CLASSES) and {splits.labels[video] for video in fold.test} == set(CLASSES)
    test = set(splits.groups_of(fold.test))
    encoder = read_json(project.folder / f"models/encoders/fold{FOLD}/card.json")
    model = read_json(project.folder / f"models/finetuned/pretrained-seed0-fold{FOLD}/card.json")
    assert encoder["videos"] > 0 and not test & set(encoder["groups"])
    assert not test & {*model["train_groups"], *model["validation_groups"], *model["pretrain_groups"]}
    assert set(model["test_groups"]) == test


def test_real_clips__every_test_clip_is_predicted(project: Project) -> None:
    fold = Splits.read(project.folder / "data/splits.json").fold(FOLD)
    path = project.folder / f"models/finetuned/pretrained-seed0-fold{FOLD}/predictions.csv"
    with open(path, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["part"] == "test"]
    assert Counter(row["video"] for row in rows) == dict.fromkeys(fold.test, project.config.finetune.eval_frames_per_video)
    probabilities = np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows])
    assert np.allclose(probabilities.sum(1), 1, atol=1e-6) and (probabilities >= 0).all()


def test_real_clips__outputs_name_neither_patients_nor_files(project: Project) -> None:
    """Only the manifest and the extraction's own notes may name a source file; nothing behind them does."""
    secrets = {row["patient_id"] for row in project.table.values()} | {Path(name).stem for name in project.table}
    for path in [project.folder / "data/splits.json", *project.folder.glob("models/**/*.json"), *project.folder.glob("models/**/*.csv")]:
        text = path.read_text(encoding="utf-8")
        assert not [secret for secret in secrets if secret in text], path.name
