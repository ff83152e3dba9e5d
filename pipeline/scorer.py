"""The code of a logged MLflow model: pictures in, class probabilities or features out. MLflow keeps a copy beside the weights.

It stands alone: it imports nothing of this project, so that a logged model can be scored where only MLflow, torch and the
libraries of its requirements.txt are installed. `model.json` beside the weights says which network and which preprocessing.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

__all__ = ["Scorer", "build_network", "head_name", "prepare"]

BATCH = 32
PATH_COLUMNS = ("image", "path", "file", "filename", "bytes")
OPT_IN = "SONOSCOPE_SCORE_PATHS"
"""Environment variable; with `1`, text may be a path. A server must not open files, or say which exist, for whoever asks."""
MAX_BYTES, MAX_PIXELS, MAX_ASPECT = 64 * 2**20, 50_000_000, 50
"""Of one encoded picture; pixels as by default in extraction; longer side over shorter, as the short side is enlarged to working size."""


def _head(kind: str, features: int, classes: int) -> Any:
    """The classifier on top of the features, by the name of `model.json`."""
    from torch import nn

    if kind == "linear":
        return nn.Linear(features, classes)
    return nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, classes))


def build_network(about: dict[str, Any]) -> Any:
    """The library's own network for a `model.json`: its classifier is an identity, or the head of a classifier.

    `about["network"]` names the library and its model; ResNets are torchvision's, vision transformers timm's.
    """
    from torch import nn

    network, classes = about["network"], len(about["classes"])
    top: nn.Module = _head(about["head"], network["feature_dim"], classes) if classes else nn.Identity()
    if network["library"] == "timm":
        import timm

        size = {"img_size": network["image_size"], "patch_size": network["patch_size"]} if network["patch_size"] else {}
        trunk = timm.create_model(network["timm_name"], pretrained=False, num_classes=0, **size)
    else:
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        trunk = ResNet(Bottleneck if network["feature_dim"] == 2048 else BasicBlock, network["blocks"])
    setattr(trunk, head_name(about), top)
    return trunk


def head_name(about: dict[str, Any]) -> str:
    """What the library calls its classifier: `head` in timm's transformers, `fc` in residual networks."""
    return "head" if about["network"]["patch_size"] else "fc"


def _encoded(item: Any) -> bytes:
    """The bytes of an encoded picture from a `Path`, bytes, or text (base64, or by `OPT_IN` a path)."""
    if isinstance(item, str):
        if os.environ.get(OPT_IN) == "1" and len(item) < 1024 and os.path.isfile(item):
            item = Path(item)
        elif len(item) > MAX_BYTES * 4 // 3 + 4:
            raise ValueError(f"an image has more than {MAX_BYTES} bytes")
        else:
            try:
                return base64.b64decode(item, validate=True)
            except ValueError:
                raise ValueError(f"an image is not base64 text; a file is given as pathlib.Path, or as text where {OPT_IN}=1 is set") from None
    if isinstance(item, os.PathLike):
        if not os.path.isfile(item):
            raise ValueError("an image is a path that is no file")
        if os.path.getsize(item) <= MAX_BYTES:
            return Path(item).read_bytes()
    elif len(item) <= MAX_BYTES:
        return bytes(item)
    raise ValueError(f"an image has more than {MAX_BYTES} bytes")


def _decode(item: Any) -> np.ndarray:
    """One picture as RGB uint8 from a path, encoded bytes, or base64 text (what a scoring server receives)."""
    import cv2
    from PIL import Image

    data = _encoded(item)
    unreadable = "an image cannot be decoded; wanted is JPEG, PNG or another format that OpenCV and Pillow read"
    try:
        # The header only: a few bytes can stand for gigabytes of pixels.
        width, height = Image.open(io.BytesIO(data)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(unreadable) from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image has {width} x {height} pixels; allowed are {MAX_PIXELS} in all")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(unreadable)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _shrink(picture: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """Resize to (width, height): area averaging when shrinking, linear when enlarging."""
    import cv2

    height, width = picture.shape[:2]
    if target == (width, height):
        return picture
    smaller = target[0] < width or target[1] < height
    return cv2.resize(picture, target, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def prepare(picture: np.ndarray, rules: dict[str, Any]) -> np.ndarray:
    """One picture as the network was trained to see it. uint8 [H, W] or [H, W, 3] (RGB) -> float32 [3, size, size].

    Grey first where the training frames were grey, then down to the stored short side, then to the working size, of which the
    central square is brought to the image size, then (x / 255 - mean) / std.
    """
    import cv2

    if max(picture.shape[:2]) > MAX_ASPECT * min(picture.shape[:2]):
        raise ValueError(f"an image has {picture.shape[1]} x {picture.shape[0]} pixels; one side may be {MAX_ASPECT} times the other at most")
    if rules["color"] == "gray" and picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    size, working, stored = rules["size"], rules["working_size"], rules["stored_short_side"]
    height, width = picture.shape[:2]
    if stored and stored < min(height, width):
        scale = stored / min(height, width)
        picture = _shrink(picture, (max(1, round(width * scale)), max(1, round(height * scale))))
        height, width = picture.shape[:2]
    scale = working / min(height, width)
    sides = (working, working) if rules["resize"] == "square" else (round(width * scale), round(height * scale))
    picture = _shrink(picture, (max(working, sides[0]), max(working, sides[1])))
    height, width = picture.shape[:2]
    top, left = (height - working) // 2, (width - working) // 2
    picture = picture[top : top + working, left : left + working]
    if working != size:
        picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)
    channels = np.repeat(picture[None], 3, 0) if picture.ndim == 2 else picture.transpose(2, 0, 1)
    mean, std = (np.array(rules[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return ((channels.astype(np.float32) / np.float32(255) - mean) / std).astype(np.float32)


def _as_uint8(images: np.ndarray) -> np.ndarray:
    """Whole numbers of 0 to 255, or fractions of 0 to 1, as uint8. The type decides which, never the values of a batch."""
    if images.dtype == np.uint8:
        return images
    whole = np.issubdtype(images.dtype, np.integer)
    values = images.astype(np.float32)
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > (255 if whole else 1):
        raise ValueError("images of whole numbers must hold 0 to 255, images of floating-point numbers fractions of 0 to 1")
    return np.rint(values * (1 if whole else 255)).astype(np.uint8)


def _checked(images: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W] or [N, H, W, 1 or 3] as uint8 [N, H, W] or [N, H, W, 3]; another shape is an error."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)) or 0 in images.shape[1:]:
        raise ValueError(
            f"images must be [N, H, W], [N, H, W, 3] or one [H, W, 3], a list of such pictures, paths, or bytes; got shape {images.shape}"
        )
    return _as_uint8(images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images)


def _pictures(given: Any) -> Iterable[np.ndarray]:
    """Every accepted form of input as single uint8 pictures: array [N, H, W(, 3)] or [H, W, 3], list, table with a column `image`."""
    if isinstance(given, dict):
        given = next(iter(given.values()))
    if hasattr(given, "columns"):
        named = [column for column in PATH_COLUMNS if column in given.columns]
        if not named and len(given.columns) != 1:
            raise ValueError(f"the table needs a column 'image' with paths or encoded bytes; it has {list(given.columns)}")
        given = given[named[0] if named else given.columns[0]].tolist()
    encoded = str | bytes | bytearray | memoryview | os.PathLike
    if isinstance(given, encoded):
        given = [given]
    if not isinstance(given, np.ndarray):
        if all(isinstance(item, encoded) for item in given):
            return (_decode(item) for item in given)
        # Arrays in a list are pictures; numbers in nested lists, as JSON gives them, are one array unless the pictures differ in size.
        if any(isinstance(item, np.ndarray) for item in given) or len({np.shape(item) for item in given}) > 1:
            return (picture for item in given for picture in _checked(np.asarray(item)[None]))
    images = np.asarray(given)
    if images.ndim == 3 and images.shape[-1] in (1, 3):
        images = images[None]
    elif images.ndim == 3 and len(images) == 3:
        raise ValueError(f"got shape {images.shape}: for one RGB picture give [H, W, 3], for three grey pictures [3, H, W, 1] or a list")
    return _checked(images)


class Scorer(PythonModel):
    """Classifier: a table of class probabilities, one row an image. Encoder: float32 array [N, F] of features."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read `model.json` and the weights; no pickle is involved."""
        from safetensors.torch import load_file

        self.about = json.loads(Path(context.artifacts["about"]).read_text(encoding="utf-8"))
        self.network = build_network(self.about)
        weights = load_file(context.artifacts["weights"])
        if self.about["classes"]:
            names = {"backbone.": "", "head.": f"{head_name(self.about)}."}
            weights = {names[name.split(".")[0] + "."] + name.split(".", 1)[1]: value for name, value in weights.items()}
        self.network.load_state_dict(weights)
        self.network.eval()

    # MLflow checks inputs against annotations it has a schema for; it has none for an array, so tables and lists pass as well.
    def predict(self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        """See the class; `model_input`: pictures, uint8 or fractions of 0 to 1, [N, H, W], [N, H, W, 3] or one [H, W, 3] (RGB); or a list or table of
        `Path`s, encoded bytes or base64 text."""
        import pandas as pd
        import torch

        rows: list[np.ndarray] = []
        batch: list[np.ndarray] = []

        def flush(pending: Sequence[np.ndarray]) -> None:
            with torch.no_grad():
                found = self.network(torch.from_numpy(np.stack(pending)))
                rows.append((found.softmax(1) if self.about["classes"] else found).numpy())

        for picture in _pictures(model_input):
            batch.append(prepare(picture, self.about["preprocessing"]))
            if len(batch) == BATCH:
                flush(batch)
                batch = []
        if batch:
            flush(batch)
        width = len(self.about["classes"]) or self.about["network"]["feature_dim"]
        result = np.concatenate(rows) if rows else np.empty((0, width), np.float32)
        return pd.DataFrame(result, columns=self.about["classes"]) if self.about["classes"] else result


set_model(Scorer())
