"""`sonoscope embed`: feature vectors of the frames, videos and patients of any media, from an encoder of this project.

Media go through the readers of the extract stage and the views that the encoder's card names, so that a vector here is
the vector the pipeline would compute. The result is a folder of plain tables (CSV) and arrays (NPY).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd
from pydantic import ValidationError
from tqdm import tqdm

from pipeline.config import Config, load_config
from pipeline.data.extract import extract_media
from pipeline.data.frames import FrameCache, VideoRef, gather_videos
from pipeline.data.labels import Label, LabelledMedia, read_labelled_media
from pipeline.data.manifest import Manifest
from pipeline.data.sniffing import sniff
from pipeline.data.store import FrameStore, write_video
from pipeline.data.video import Media
from pipeline.errors import CheckpointError, DataError
from pipeline.files import csv_text, read_json, write_json
from pipeline.parameters import ExtractParams
from pipeline.registry import did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["SCHEMA", "Encoder", "embed", "open_encoder"]

SCHEMA = 1
THUMB, THUMB_QUALITY = 128, 85
"""Pixels of a thumbnail's short side, and its JPEG quality: about 3 kB a frame."""
SUMMARY = "embedding.json"
LEVELS = ("frames", "videos", "patients")


@dataclass(frozen=True)
class Encoder:
    """An exported encoder and how it wants its pictures."""

    folder: Path
    card: dict[str, Any]
    extract: ExtractParams
    """What frames were made like; the pixels of another setting would be other pictures."""
    working: int
    """Short side, in pixels, at which frames are held before the central square is shrunk to `size`."""
    resize: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Side of the network's images in pixels."""
        return self.card["image_size"]


def open_encoder(folder: Path) -> Encoder:
    """Read the card of an encoder folder; the weights are read when they are needed.

    Raises:
        CheckpointError: no encoder there, or a card that lacks what is needed.
    """
    folder = Path(folder)
    missing = [name for name in ("encoder.safetensors", "card.json") if not (folder / name).is_file()]
    if missing:
        inside = sorted(path.parent.name for path in folder.glob("*/encoder.safetensors"))
        hint = f" It holds {', '.join(inside)}: choose one of them." if inside else " `dvc repro pretrain` makes models/encoders/fold0."
        raise CheckpointError(f"--encoder: {folder} has no {' and no '.join(missing)}.{hint}")
    try:
        card = read_json(folder / "card.json")
        size, aside = card["image_size"], card["parameters"].get("augmentation", {})
        facts = card.get("extract")
        extract = ExtractParams(**facts) if facts else ExtractParams(short_side=max(16, size))
        lacks = [name for name in ("backbone", "normalization") if name not in card]
        if lacks or not isinstance(size, int):
            raise KeyError(*lacks or ["image_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "extract: not parameters that this version knows" if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"--encoder: {folder / 'card.json'} cannot be used ({what}). Run the pretrain stage again.") from None
    note = "the encoder's card does not say how its frames were extracted: grey frames at the network's image size are assumed"
    return Encoder(folder, card, extract, card.get("working_size", size), aside.get("resize", "short_side"), () if facts else (note,))


def embed(
    source: Path, encoder: Encoder, output: Path, *, labels: str = "auto", frames_per_video: int | None = 16, batch: int = 64,
    params: Path = Path("params.yaml"),
) -> dict[str, Any]:
    """Embed a media file, a folder of media or a frame store, and write the tables and arrays to `output`.

    `output` appears complete or not at all; an earlier result of this function there is replaced. Per level (frames,
    videos as means of their frames, patients as means of their videos): `<level>.csv`, and `<level>.npy` float32 [N, F]
    with the same rows; patients only where some are known. Beside them `files.csv` (which file is behind a video id:
    keep it private), `quarantine.csv` where a file could not be read, `pictures.tar` (a thumbnail of every row of
    frames.csv, with its index), and `embedding.json`, which says what all this was made from.

    Args:
        labels: as `data.labels`: auto, none, or a table in the folder; a frame store has its own.
        frames_per_video: evenly spaced frames of each video, as the pipeline predicts; None takes all.
        batch: images a forward pass.
        params: its `data` section gives column names and the key of the pseudonyms; defaults when the file is absent.

    Returns:
        The content of embedding.json.

    Raises:
        DataError: nothing to read, labels that disagree with the files, an `output` that is something else.
        CheckpointError: weights that do not fit, or give numbers that are not finite.
    """
    source, output = Path(source), Path(output)
    _check_output(output)
    config = load_config(params) if params.is_file() else Config()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as made:
        part = Path(made) / "result"
        part.mkdir()
        with _opened(source, encoder, config, labels, Path(made)) as (store, bad, notes):
            info = _fill(part, store, encoder, config, frames_per_video, batch)
        if bad:
            (part / "quarantine.csv").write_text(csv_text(["path", "reason"], bad), encoding="utf-8")
        info |= {"unreadable": len(bad)}
        write_json(part / SUMMARY, info)
        if output.exists():
            output.rename(Path(made) / "before")
        part.rename(output)
    for line in [*encoder.notes, *notes]:
        print(f"note: {line}", file=sys.stderr)
    for path, reason in bad:
        print(f"unreadable: {path}: {reason}", file=sys.stderr)
    return info


def _check_output(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()) and not (output / SUMMARY).is_file():
        raise DataError(f"--out: {output} holds other files. Name a new folder, or one that an earlier embed has written.")
    if output.exists() and not output.is_dir():
        raise DataError(f"--out: {output} is a file. Name a folder.")


# --- frames ----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(
    source: Path, encoder: Encoder, config: Config, labels: str, scratch: Path
) -> Iterator[tuple[FrameStore, list[tuple[str, str]], list[str]]]:
    """The source as a frame store (its own, or extracted into `scratch` for the while), unreadable files, and notes."""
    if (source / "manifest.csv").is_file() and any(source.glob("*.idx.npy")):
        store = FrameStore(source)
        if not store.manifest.rows:
            raise DataError(f"{source}: the frame store is empty.")
        yield store, [], []
        store.close()
        return
    found = _found(source, config, labels)
    folder = scratch / "frames"
    folder.mkdir()
    rows, results = extract_media(
        found, encoder.extract.model_copy(update={"workers": config.extract.workers}), folder, source="main", key=config.data.pseudonym_key
    )
    bad = [(result.path, result.reason) for result in results if result.reason]
    if not rows:
        listed = "".join(f"\n  {line}" for line in [*(f"{path}: {reason}" for path, reason in bad[:20]), *found.notes])
        raise DataError(f"{source}: none of {len(bad)} files can be read.{listed}")
    Manifest(rows).write(folder / "manifest.csv")
    store = FrameStore(folder)
    yield store, bad, found.notes
    store.close()
    shutil.rmtree(folder)


def _found(source: Path, config: Config, labels: str) -> LabelledMedia:
    """The media of a folder with its labels, or one file."""
    if source.is_file():
        return LabelledMedia([Media(source.name, sniff(source), source)], {source.name: Label()})
    if not source.is_dir():
        near = did_you_mean(source.name, [path.name for path in source.parent.iterdir()]) if source.parent.is_dir() else ""
        raise DataError(f"{source}: does not exist.{near} Name a video, a folder of media, or a frame store such as data/frames/main.")
    data = config.data.model_copy(update={"source": str(source), "labels": labels, "include": {}, "media": "all"})
    return read_labelled_media("main", data)


def _chosen(refs: list[VideoRef], frames_per_video: int | None) -> list[tuple[int, int]]:
    """(video, frame) pairs in the order of the tables."""
    from pipeline.evaluation.features import evenly_spaced

    wanted = [ref.row.frames if frames_per_video is None else frames_per_video for ref in refs]
    return [(video, frame) for video, ref in enumerate(refs) for frame in evenly_spaced(ref.row.frames, wanted[video])]


# --- vectors ---------------------------------------------------------------------------------------------------------


def _network(encoder: Encoder, device: torch.device) -> torch.nn.Module:
    from pipeline.checkpoint import read_state_dict
    from pipeline.models.backbones import build_backbone
    from pipeline.models.published import load_trunk

    network, _ = build_backbone(encoder.card["backbone"], image_size=encoder.size)
    weights = encoder.folder / "encoder.safetensors"
    load_trunk(network, read_state_dict(weights, "--encoder"), str(weights), "--encoder")
    return network.to(device)


def _vectors(cache: FrameCache, items: list[tuple[int, int]], encoder: Encoder, config: Config, batch: int) -> np.ndarray:
    """float32 [N, F] of the central views of `items`, with a progress bar."""
    from pipeline.distributed import pick_device
    from pipeline.evaluation.features import embed_frames
    from pipeline.launch import threads_per_process
    from pipeline.reproducibility import configure_torch

    configure_torch(threads_per_process(config.launch))
    device = pick_device(config.launch.device)
    network, parts = _network(encoder, device), []
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(items), unit="frame", desc="embed", mininterval=30.0 if quiet else 0.2) as bar:
        for start in range(0, len(items), batch):
            chunk = items[start : start + batch]
            found = embed_frames(
                network, cache, chunk, size=encoder.size, device=device, normalization=encoder.card["normalization"], batch=batch
            )
            parts.append(found.numpy())
            bar.update(len(chunk))
    vectors = np.concatenate(parts)
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"--encoder: {encoder.folder} gives numbers that are not finite; its weights are damaged or diverged.")
    return vectors


def _means(vectors: np.ndarray, keys: pd.Series) -> tuple[list[str], np.ndarray]:
    """(distinct keys in order of appearance, mean of their rows float32 [K, F])."""
    codes, names = pd.factorize(keys)
    sums = np.zeros((len(names), vectors.shape[1]), np.float64)
    np.add.at(sums, codes, vectors)
    return list(names), (sums / np.bincount(codes)[:, None]).astype(np.float32)


def _thumbnails(refs: list[VideoRef], items: list[tuple[int, int]]) -> Iterator[bytes]:
    """JPEG of every frame as it is stored, at most `THUMB` pixels at its short side."""
    for video, frame in items:
        picture = refs[video].store.frame(refs[video].video, frame)
        scale = min(1.0, THUMB / min(picture.shape[:2]))
        if scale < 1:
            size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        picture = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        yield cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, THUMB_QUALITY])[1].tobytes()


def _write_table(path: Path, table: pd.DataFrame) -> None:
    path.write_text(csv_text(list(table.columns), table.itertuples(index=False)), encoding="utf-8", newline="")


def _fill(part: Path, store: FrameStore, encoder: Encoder, config: Config, frames_per_video: int | None, batch: int) -> dict[str, Any]:
    """Write everything but embedding.json into `part`, and return what that will say."""
    refs = gather_videos([store])
    # Nothing is held in memory: every frame is asked for once.
    cache = FrameCache(refs, encoder.working, mode=encoder.resize, budget_mb=0)
    items = _chosen(refs, frames_per_video)
    vectors = {"frames": _vectors(cache, items, encoder, config, batch)}
    known, groups = bool(encoder.card.get("groups")), set(encoder.card.get("groups", ()))

    def about(ref: VideoRef) -> dict[str, Any]:
        row = ref.row
        seen = "" if not (known and row.patient) else "yes" if row.patient in groups else "no"
        return {"patient": row.patient, "label": row.label, "seen": seen}

    tables = {
        "frames": pd.DataFrame([{"video": refs[v].video, "frame": frame, **about(refs[v])} for v, frame in items]),
        "videos": pd.DataFrame([{"video": ref.video, "kind": ref.row.kind, "stored_frames": ref.row.frames, **about(ref)} for ref in refs]),
    }
    names, vectors["videos"] = _means(vectors["frames"], tables["frames"]["video"])
    tables["videos"] = tables["videos"].set_index("video").loc[names].reset_index()
    with_patient = (tables["videos"]["patient"] != "").to_numpy()
    if with_patient.any():
        of = tables["videos"][with_patient]
        people, vectors["patients"] = _means(vectors["videos"][with_patient], of["patient"])
        joined = {name: group for name, group in of.groupby("patient")}
        tables["patients"] = pd.DataFrame([
            {"patient": name, "videos": len(joined[name]), "label": "; ".join(sorted(set(joined[name]["label"]) - {""})),
             "seen": joined[name]["seen"].iloc[0]}
            for name in people
        ])
    for level, table in tables.items():
        _write_table(part / f"{level}.csv", table)
        np.save(part / f"{level}.npy", vectors[level], allow_pickle=False)
    files = pd.DataFrame([{"video": ref.video, "path": ref.row.path} for ref in refs])
    _write_table(part / "files.csv", files)
    write_video(part, "pictures", _thumbnails(refs, items))
    facts = ("method", "backbone", "image_size", "normalization", "fingerprint", "scope", "fold")
    return {
        "schema": SCHEMA, "features": int(vectors["frames"].shape[1]),
        **{level: len(tables[level]) if level in tables else 0 for level in LEVELS},
        "frames_per_video": frames_per_video or "all", "encoder_folder": encoder.folder.resolve().name,
        "encoder": {name: encoder.card.get(name) for name in facts},
    }
