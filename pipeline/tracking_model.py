"""A folder of weights as an MLflow model: `scorer.py`, a small description, the weights, all without a pickle.

Built when it is delivered. The weights are linked, not copied, where MLflow's artifacts lie on the same disk: a ResNet-50 costs
no second hundred megabytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

__all__ = ["build_model", "local_folder", "put_files", "requirements"]

SCORER = Path(__file__).with_name("scorer.py")
PACKAGES = {"torchvision": ("torch", "torchvision"), "timm": ("torch", "torchvision", "timm")}
OPENCV = ("opencv-python-headless", "opencv-python")


def requirements(library: str) -> list[str]:
    """What `scorer.py` imports, at the versions of this environment."""
    names = ["mlflow", *PACKAGES[library], "safetensors", "numpy", "pandas", "pillow"]
    found = {}
    for name in (*names, *OPENCV):
        try:
            # A local tag such as +cpu names an index, not a version that others can install.
            found[name] = f"{name}=={importlib.metadata.version(name).split('+')[0]}"
        except importlib.metadata.PackageNotFoundError:
            continue
    opencv = next((found[name] for name in OPENCV if name in found), OPENCV[0])
    return [*(found.get(name, name) for name in names), opencv]


def build_model(folder: Path, about: Mapping[str, Any], *, name: str, run_id: str, model_id: str) -> None:
    """Write MLmodel, code, description, requirements and an input example into `folder`; the weights are added by `put_files`.

    There is no input schema, on purpose: one schema cannot allow arrays and tables, and MLflow would refuse the other.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema, TensorSpec

    description = folder.with_name("model.json")
    description.write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")
    classes = about["classes"]
    outputs = [ColSpec("float", one) for one in classes] or [TensorSpec(np.dtype("float32"), (-1, about["network"]["feature_dim"]))]
    model = Model(artifact_path=name, run_id=run_id, model_id=model_id, model_uuid=model_id)
    save_model(
        folder, python_model=str(SCORER), artifacts={"about": str(description)}, mlflow_model=model,
        signature=ModelSignature(outputs=Schema(outputs)), pip_requirements=requirements(about["network"]["library"]),
        input_example=np.tile(np.arange(0, 256, 8, dtype=np.uint8), (1, 32, 1)),
        metadata={"kind": about["kind"], "fingerprint": about["fingerprint"], "transductive": about["transductive"]},
    )
    # MLflow notes where code and artifacts came from: paths of this machine, of no use to anyone.
    flavor = model.flavors["python_function"]
    flavor["model_code_path"] = SCORER.name
    flavor["artifacts"] = {
        "about": {"path": "artifacts/model.json", "uri": "model.json"},
        "weights": {"path": "artifacts/weights.safetensors", "uri": about["weights"]["file"]},
    }
    model.model_size_bytes = about["weights"]["bytes"]
    model.save(str(folder / "MLmodel"))
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def local_folder(uri: str) -> Path | None:
    """The folder of an artifact address on this machine; None for a server or object store."""
    parsed = urlparse(uri)
    if parsed.scheme == "file" and parsed.netloc in ("", "localhost"):
        return Path(url2pathname(parsed.path))
    return Path(uri) if not parsed.scheme and uri.startswith("/") else None


def put_files(folder: Path, weights: Path, client: Any, model: Any) -> None:
    """Bring a built folder and the weights to where MLflow keeps the artifacts of `model` (a LoggedModel)."""
    target = local_folder(model.artifact_location)
    place = (target or folder) / "artifacts/weights.safetensors"
    if target is None:
        _link(weights, place)
        client.log_model_artifacts(model.model_id, str(folder))
    else:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        _link(weights, place)


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system allows, else a copy. Weights files are replaced, never written into."""
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)
    # Renaming one link of a file over another does nothing, and leaves both.
    part.unlink(missing_ok=True)
