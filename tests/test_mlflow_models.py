"""Logged models score pictures in a process without this project, exactly as the network here does; each is logged once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from training_kit import make_project, run_stage
from weights_kit import GROUPS, PREPROCESSING, make_classifier, make_encoder

from pipeline.config import Config
from pipeline.data.store import FrameStore
from pipeline.data.transforms import evaluation_view, normalize, render, resize_frame
from pipeline.errors import TrackingError
from pipeline.export.facts import about, find_weights
from pipeline.export.formats import load_network
from pipeline.tracking import open_tracker, sync
from pipeline.tracking_model import local_folder, requirements

torch.set_num_threads(1)


def config(**tracking: Any) -> Config:
    return Config.model_validate({"methods": {"ucl": {}}, "tracking": {"flush_seconds": 0.05, **tracking}})


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder that is the current directory, with an empty store."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def log(folder: Path, name: str, **tracking: Any) -> str:
    """Log a folder of weights in a run of its own; returns the run's id."""
    weights = find_weights(folder)
    with open_tracker(config(**tracking), "finetune", name) as tracker:
        tracker.log_model(weights.path, about(weights), name)
        tracker.flush()
        return tracker.run_id


def client(root: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def models(root: Path) -> list[Any]:
    return list(client(root).search_logged_models([client(root).get_experiment_by_name("sonoscope").experiment_id]))


def frames(count: int = 5, colour: bool = True) -> list[np.ndarray]:
    """uint8 pictures of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [(120, 90), (64, 64), (40, 70), (33, 200), (150, 151)][:count]
    small = [rng.integers(0, 256, (h // 4, w // 4, 3)[: 3 if colour else 2], np.uint8) for h, w in sizes]
    return [cv2.resize(picture, size[::-1], interpolation=cv2.INTER_CUBIC) for picture, size in zip(small, sizes, strict=True)]


def as_in_the_pipeline(pictures: list[np.ndarray], folder: Path, *, grey: bool = True) -> np.ndarray:
    """Extraction's grey and short side (without JPEG), the evaluation's central view at working size 40, and our own network."""
    images = np.empty((len(pictures), 32, 32), np.uint8) if grey else np.empty((len(pictures), 32, 32, 3), np.uint8)
    for picture, out in zip(pictures, images, strict=True):
        frame = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) if grey and picture.ndim == 3 else picture
        if min(frame.shape[:2]) > 96:
            scale = 96 / min(frame.shape[:2])
            frame = cv2.resize(frame, (round(frame.shape[1] * scale), round(frame.shape[0] * scale)), interpolation=cv2.INTER_AREA)
        frame = resize_frame(frame, 40)
        render(frame, evaluation_view(frame.shape[:2], 40), 32, out)
    with torch.no_grad():
        found = load_network(find_weights(folder))(normalize(torch.from_numpy(images)))
    return (found.softmax(1) if find_weights(folder).kind == "classifier" else found).numpy()


SCORE = """
import base64, json, sys
from pathlib import Path
import mlflow, numpy as np, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
given = Path("given")
files = sorted(given.glob("*.png"))
data = [path.read_bytes() for path in files]
array = np.load(given / "array.npy")
inputs = {
    "array": array, "fractions": array.astype(np.float32) / 255, "integers": array.astype(np.int64), "paths": files, "bytes": data,
    "text": [base64.b64encode(one).decode() for one in data],
    "table": pd.DataFrame({"id": range(len(files)), "image": files}), "table of bytes": pd.DataFrame({"image": data}),
    "example": model.input_example, "none": array[:0],
}
results = {name: model.predict(value) for name, value in inputs.items()}
columns = {name: list(getattr(value, "columns", [])) for name, value in results.items()}
np.savez("result.npz", **{name: np.asarray(value) for name, value in results.items()})
print(json.dumps({"columns": columns, "ours": sorted(name for name in sys.modules if name.split(".")[0] == "pipeline")}))
"""


def score(root: Path, uri: str, array: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Score every accepted form of input in a process that cannot import this project."""
    folder = root / "elsewhere"
    (folder / "given").mkdir(parents=True)
    np.save(folder / "given/array.npy", array)
    for number, picture in enumerate(frames()):
        cv2.imwrite(str(folder / f"given/{number}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DVC_ROOT")}
    words = [sys.executable, "-c", SCORE, f"sqlite:///{root / 'mlflow.db'}", uri]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(folder / "result.npz"))


@pytest.mark.parametrize(
    ("backbone", "head", "name"), [("resnet10", "linear", "classifier"), ("vit_tiny", "mlp", "classifier"), ("resnet10", "", "encoder")]
)
def test_score__every_form_of_input_gives_what_the_network_gives(root: Path, backbone: str, head: str, name: str) -> None:
    folder = make_classifier(root / "in", backbone, head) if head else make_encoder(root / "in", backbone)
    run = log(folder, name)
    grey = np.stack([cv2.resize(picture, (50, 40)) for picture in frames(colour=False)])
    facts, results = score(root, f"runs:/{run}/{name}", grey)
    assert facts["ours"] == [], "a logged model stands alone"
    wanted = {"pictures": as_in_the_pipeline(frames(), folder), "array": as_in_the_pipeline(list(grey), folder)}
    for form in ("array", "fractions", "integers"):
        assert np.abs(results[form] - wanted["array"]).max() < 1e-5, form
    for form in ("paths", "bytes", "text", "table", "table of bytes"):
        assert np.abs(results[form] - wanted["pictures"]).max() < 1e-5, form
    width = wanted["array"].shape[1]
    assert results["none"].shape == (0, width) and results["example"].shape == (1, width)
    if head:
        assert facts["columns"]["paths"] == facts["columns"]["none"] == ["a", "b"]
        assert np.allclose(results["paths"].sum(1), 1, atol=1e-5)


def test_colour__rgb_corpora_are_not_turned_grey(root: Path) -> None:
    folder = make_encoder(root / "in", "resnet10", preprocessing=PREPROCESSING | {"color": "rgb"})
    _, results = score(root, f"runs:/{log(folder, 'encoder')}/encoder", np.zeros((1, 32, 32, 3), np.uint8))
    assert np.abs(results["paths"] - as_in_the_pipeline(frames(), folder, grey=False)).max() < 1e-5


def test_store__a_model_of_the_run_that_can_be_registered_and_names_nobody(root: Path) -> None:
    import mlflow

    folder = make_classifier(root / "in", "resnet10", "linear")
    run = log(folder, "classifier")
    (model,) = models(root)
    assert (model.name, model.model_type, str(model.status), model.source_run_id) == ("classifier", "classifier", "READY", run)
    assert model.params["backbone"] == "resnet10" and model.tags["fingerprint"] == "fedcba9876543210"
    assert [output.model_id for output in client(root).get_run(run).outputs.model_outputs] == [model.model_id]
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    version = mlflow.register_model(f"runs:/{run}/classifier", "lung", await_registration_for=0)
    assert (version.name, str(version.version)) == ("lung", "1")
    place = root / "mlartifacts/models" / model.model_id / "artifacts"
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"MLmodel", "scorer.py", "artifacts/model.json", "artifacts/weights.safetensors", "requirements.txt", "input_example.json"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".part", ".pyc"))]
    text = b"".join((place / name).read_bytes() for name in files if not name.endswith(".safetensors"))
    assert str(root).encode() not in text and str(Path(__file__).parents[1]).encode() not in text
    assert not [group for group in GROUPS if group.encode() in text]


def test_disk__weights_are_a_link_that_outlives_its_source(root: Path) -> None:
    folder = make_encoder(root / "in", "resnet10")
    log(folder, "encoder")
    (logged,) = root.glob("mlartifacts/models/*/artifacts/artifacts/weights.safetensors")
    assert logged.stat().st_ino == (folder / "encoder.safetensors").stat().st_ino
    content = logged.read_bytes()
    make_encoder(folder, "resnet10", seed=1)  # replaced, not written into
    (folder / "encoder.safetensors").unlink()
    assert logged.read_bytes() == content and not list((root / ".tracking/files").glob("*"))


def test_server__receives_the_files_by_upload(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a folder of this machine: everything goes through the client, weights included."""
    monkeypatch.setattr("pipeline.tracking_model.local_folder", lambda uri: None)
    folder = make_encoder(root / "in", "resnet10")
    log(folder, "encoder")
    (logged,) = root.glob("mlartifacts/models/*/artifacts/artifacts/weights.safetensors")
    assert logged.read_bytes() == (folder / "encoder.safetensors").read_bytes() and str(models(root)[0].status) == "READY"


def test_delivery__away_and_repeated_makes_one_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_encoder(root / "in", "resnet10")
    monkeypatch.setattr("pipeline.tracking_store.put_files", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    log(folder, "encoder", uri="file:///nowhere")
    shutil.rmtree(folder)
    with pytest.raises(TrackingError, match="1 journal"):
        sync(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    assert [str(model.status) for model in models(root)] == ["PENDING"]
    monkeypatch.undo()
    monkeypatch.chdir(root)
    journals = {path: path.read_bytes() for path in (root / ".tracking").glob("*.jsonl")}
    kept = shutil.copytree(root / ".tracking/files", root / "kept")
    assert sync(root, uri=f"sqlite:///{root / 'mlflow.db'}")["refused"] == 0
    for path, content in journals.items():
        path.write_bytes(content)
    shutil.copytree(kept, root / ".tracking/files", dirs_exist_ok=True)
    sync(root, uri=f"sqlite:///{root / 'mlflow.db'}")
    (model,) = models(root)
    assert str(model.status) == "READY" and len(client(root).get_run(model.source_run_id).outputs.model_outputs) == 1


def test_switch__no_models_when_told(root: Path) -> None:
    log(make_encoder(root / "in", "resnet10"), "encoder", models=False)
    assert models(root) == [] and not (root / "mlartifacts/models").exists()


def test_courier__imports_no_torch(root: Path) -> None:
    make_encoder(root / "in", "resnet10")
    script = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "from pipeline.config import Config\nfrom pipeline.export.facts import about, find_weights\n"
        "from pipeline.tracking import open_tracker\nweights = find_weights(Path('in'))\n"
        "with open_tracker(Config.model_validate({'methods': {'ucl': {}}}), 'pretrain', 'fold 0') as tracker:\n"
        "    tracker.log_model(weights.path, about(weights), 'encoder')\n    assert tracker.flush()\n"
        "print([name for name in ('torch', 'torchvision', 'timm') if name in sys.modules])\n"
    )
    words = [sys.executable, "-c", script, str(Path(__file__).parents[1])]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    assert len(models(root)) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((3, 4, 5, 2), np.uint8), "got shape"), (np.full((1, 40, 40), 300.0), "0 to 255"), (np.full((1, 40, 40), np.nan), "0 to 255"),
        (["absent file.png"], "not base64 text"), ([b"no picture"], "cannot be decoded"), (np.zeros((2, 0, 4)), "got shape"),
        ([Path("absent.png")], "no file"), (np.zeros((3, 40, 50), np.uint8), r"one RGB picture give \[H, W, 3\]"),
        (np.full((1, 40, 40), 1.5), "fractions of 0 to 1"), (np.full((1, 40, 40), 256), "0 to 255"),
    ],
)  # fmt: skip
def test_scorer__says_what_it_cannot_read(given: Any, words: str) -> None:
    from pipeline.scorer import _pictures

    with pytest.raises(ValueError, match=words):
        list(_pictures(given))


@pytest.mark.parametrize("count", [1, 3])
def test_scorer__one_colour_picture_is_one_and_three_grey_ones_are_three(count: int) -> None:
    from pipeline.scorer import _pictures

    rng = np.random.default_rng(0)
    colour, grey = rng.integers(0, 256, (40, 50, 3), np.uint8), rng.integers(0, 256, (count, 40, 50), np.uint8)
    for given in (colour, colour[None], [colour], colour.tolist(), [colour.astype(np.float64) / 255]):
        (found,) = _pictures(given)
        assert np.array_equal(found, colour)
    for given in (grey[..., None], list(grey)):
        assert np.array_equal(np.stack(list(_pictures(given))), grey)
    (one,) = _pictures(grey[0][..., None])
    assert np.array_equal(one, grey[0])


def test_scorer__a_dark_batch_is_scaled_like_any_other() -> None:
    """Fractions are told by their type: a brighter neighbour in the batch does not make 0.5 black or mid grey."""
    from pipeline.scorer import _pictures

    dark = np.full((40, 40), 0.5, np.float32)
    assert {int(picture.max()) for picture in _pictures([dark, np.ones_like(dark)])} == {128, 255}
    assert int(next(iter(_pictures(np.ones((1, 40, 40), np.int64)))).max()) == 1


def test_scorer__text_from_outside_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.scorer import OPT_IN, _pictures

    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 40), 7, np.uint8))
    monkeypatch.delenv(OPT_IN, raising=False)
    words = set()
    for name in ("a.png", "absent.png"):
        with pytest.raises(ValueError, match="not base64 text") as refused:
            list(_pictures([str(tmp_path / name)]))
        words.add(str(refused.value))
    assert len(words) == 1, "the answer does not tell which files exist"
    assert next(iter(_pictures([tmp_path / "a.png"]))).max() == 7
    monkeypatch.setenv(OPT_IN, "1")
    assert next(iter(_pictures([str(tmp_path / "a.png")]))).max() == 7


def test_scorer__sizes_are_limited_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import scorer

    data = cv2.imencode(".png", np.zeros((40, 4000), np.uint8))[1].tobytes()
    rules = PREPROCESSING | {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match="50 times the other"):
        scorer.prepare(next(iter(scorer._pictures([data]))), rules)
    monkeypatch.setattr(scorer, "MAX_PIXELS", 100_000)
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="4000 x 40 pixels; allowed are 100000"):
        list(scorer._pictures([data]))
    monkeypatch.setattr(scorer, "MAX_BYTES", 8)
    (tmp_path / "a.png").write_bytes(data)
    for given in (data, "QUJD" * 9, tmp_path / "a.png"):
        with pytest.raises(ValueError, match="more than 8 bytes"):
            list(scorer._pictures([given]))


def test_requirements__few_and_pinned() -> None:
    for library in ("torchvision", "timm"):
        lines = requirements(library)
        assert len(lines) <= 9 and all("==" in line and "+" not in line for line in lines)
        assert any(line.startswith("timm==") for line in lines) == (library == "timm")


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("file:///a/b%20c", Path("/a/b c")), ("/a/b", Path("/a/b")), ("s3://bucket/a", None), ("mlflow-artifacts:/1/m", None),
        ("file://host/a", None), ("https://host/a", None),
    ],
)  # fmt: skip
def test_address__is_a_folder_here_or_not(uri: str, folder: Path | None) -> None:
    assert local_folder(uri) == folder


def test_stages__log_models_that_repeat_the_predictions(tmp_path: Path) -> None:
    """pretrain and finetune of one fold; the logged classifier gives the stored frames the probabilities of predictions.csv."""
    make_project(tmp_path, finetune__initialisations=["pretrained"], finetune__epochs=1, pretrain__epochs=1, tracking__enabled=True)
    for words in (("pretrain", "--fold", "0"), ("finetune", "--init", "pretrained", "--fold", "0")):
        done = run_stage(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    with open(tmp_path / "models/finetuned/pretrained-seed0-fold0/predictions.csv", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["part"] == "test"]
    store = FrameStore(tmp_path / "data/frames/main")
    pictures = np.stack([store.frame(row["video"], int(row["frame"])) for row in rows])
    found = {model.name: model for model in models(tmp_path)}
    assert set(found) == {"encoder", "classifier"}
    facts, results = score(tmp_path, found["classifier"].model_uri, pictures)
    wanted = np.array([[float(row["p_a"]), float(row["p_b"])] for row in rows])
    assert np.abs(results["array"] - wanted).max() < 1e-5 and facts["columns"]["array"] == ["a", "b"]
