"""`sonoscope similar`: the nearest neighbours of a video or frame in a folder that `sonoscope embed` wrote, with a picture."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from pipeline.data.video import Media, content_hash
from pipeline.embed import SCHEMA, embed, open_encoder
from pipeline.errors import DataError
from pipeline.evaluation.feature_plots import draw_neighbors
from pipeline.evaluation.neighbors import nearest, unit_rows
from pipeline.files import read_json, unshield
from pipeline.registry import did_you_mean

__all__ = ["Embedding", "similar"]

ENCODERS = Path("models/encoders")
_FRAME = re.compile(r"(?P<name>.+):(?P<frame>\d+)")
_ID = re.compile(r"[0-9a-f]{4,16}")
COLUMNS = {"frames": ("video", "frame", "patient", "label"), "videos": ("video", "patient", "label"), "files": ("video", "path")}


@dataclass(frozen=True)
class Embedding:
    """What `pipeline.embed.embed` wrote: tables as text, arrays by level, and the folder of the pictures."""

    folder: Path
    info: dict[str, Any]
    frames: pd.DataFrame
    videos: pd.DataFrame
    files: pd.DataFrame
    frame_vectors: np.ndarray
    """float32 [frames, F], mapped from disk."""
    video_vectors: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Embedding:
        """Read and check a folder. DataError when it is none, or its tables and arrays do not fit one another."""
        folder = Path(folder)
        try:
            info = read_json(folder / "embedding.json")
        except (OSError, ValueError):
            raise DataError(f"--in: {folder} is no folder of embeddings. `sonoscope embed VIDEOS --encoder ...` writes one.") from None
        if not isinstance(info, dict) or info.get("schema") != SCHEMA:
            raise DataError(f"--in: {folder / 'embedding.json'}: not schema {SCHEMA}. Run embed again.")
        try:
            tables = {
                name: pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)[list(columns)].map(unshield)
                for name, columns in COLUMNS.items()
            }
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("frames", "videos")}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"--in: {folder} is damaged ({type(error).__name__}: {error}). Run embed again.") from None
        if any(array.ndim != 2 or len(array) != len(tables[name]) for name, array in arrays.items()):
            raise DataError(f"--in: {folder}: tables and arrays differ in their number of rows. Run embed again.")
        return cls(folder, info, tables["frames"], tables["videos"], tables["files"], arrays["frames"], arrays["videos"])

    def picture(self, row: int) -> np.ndarray | None:
        """Thumbnail of a row of the frames: uint8 [H, W] or [H, W, 3]; None where the file is gone or damaged."""
        try:
            offset, length = np.load(self.folder / "pictures.idx.npy", allow_pickle=False)[row].tolist()
            with open(self.folder / "pictures.tar", "rb") as archive:
                archive.seek(offset)
                picture = cv2.imdecode(np.frombuffer(archive.read(length), np.uint8), cv2.IMREAD_UNCHANGED)
        except (OSError, ValueError, IndexError, EOFError, cv2.error):
            return None
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) if picture is not None and picture.ndim == 3 else picture

    def path_of(self, video: str) -> str:
        """The file behind a video id, relative to the folder that was embedded."""
        return str(self.files.loc[self.files["video"] == video, "path"].iloc[0])


@dataclass(frozen=True)
class _Query:
    """What is looked for: a vector, and whose it is."""

    vector: np.ndarray
    video: str
    patient: str
    label: str
    frame: int | None
    picture: np.ndarray | None


def similar(
    query: str, folder: Path, *, top: int = 5, other_patients: bool = False, picture: Path | None = None, encoder: Path | None = None
) -> str:
    """Find the nearest neighbours of a query, draw them, and return a table to print.

    Videos are compared by the mean of their frames, frames by themselves and at most one a video; always by cosine. The
    query's own video is never an answer.

    Args:
        query: a video id of videos.csv (or its first four digits or more), a path of files.csv, or any media file, which is
            embedded now unless its content is known; `:FRAME` behind it asks for one frame (of those that were embedded, the nearest in time).
        other_patients: leave out videos of the query's patient and those whose patient is unknown.
        picture: where the PNG goes; by default into `folder`, named after the query.
        encoder: for a file that was not embedded; default is the folder of the name in embedding.json below models/encoders.

    Raises:
        DataError: no such video, or nothing left to compare with.
    """
    known = Embedding.read(folder)
    asked = _resolve(query, known, encoder)
    table = known.videos if asked.frame is None else known.frames
    vectors = known.video_vectors if asked.frame is None else known.frame_vectors
    allowed = _allowed(table, asked, other_patients)
    owner = pd.factorize(table["video"])[0]
    rows, values = nearest(unit_rows(asked.vector[None]), unit_rows(vectors), owner, top, allowed[None])
    found = [_neighbor(known, table, int(row), float(value), asked) for row, value in zip(rows[0], values[0], strict=True) if row >= 0]
    if not found:
        raise DataError(f"{query}: no video is left to compare with{' of another known patient' if other_patients else ''}.")
    where = picture or known.folder / f"similar-{asked.video}{'' if asked.frame is None else f'-{asked.frame}'}.png"
    about = {"image": asked.picture, "label": asked.label, "name": _name(asked.video, asked.frame)}
    draw_neighbors(where, [{"query": about, "neighbors": found}], "Nearest " + ("videos" if asked.frame is None else "frames, one a video"))
    return _text(asked, found, where)


def _allowed(table: pd.DataFrame, asked: _Query, other_patients: bool) -> np.ndarray:
    allowed = (table["video"] != asked.video).to_numpy()
    if other_patients:
        if not asked.patient:
            raise DataError(f"--other-patients: the patient of {asked.video} is not known, so other patients cannot be told. Leave it out.")
        allowed = allowed & ((table["patient"] != asked.patient) & (table["patient"] != "")).to_numpy()
    return allowed


def _resolve(query: str, known: Embedding, encoder: Path | None) -> _Query:
    """A video or frame of the embedding, or a file that is embedded now."""
    parts = _FRAME.fullmatch(query)
    whole = Path(query).exists() or not parts
    name, frame = (query, None) if whole or not parts else (parts["name"], int(parts["frame"]))
    video = _known_video(name, known)
    if video is not None:
        return _pick(known, video, frame)
    if not Path(name).is_file():
        near = did_you_mean(name, [*known.files["path"], *known.videos["video"]])
        raise DataError(
            f"{name}: neither a video of {known.folder} nor a file.{near} Use a video id or a path of {known.folder / 'files.csv'}, or a "
            f"video file; :FRAME behind it asks for one frame."
        )
    same = _known_video(content_hash(Media(name, "video", Path(name)))[:16], known)
    if same is not None:
        return _pick(known, same, frame)
    wanted = known.info["encoder"].get("fingerprint")
    opened = open_encoder(encoder or ENCODERS / Path(known.info["encoder_folder"]).name)
    if opened.card.get("fingerprint") != wanted:
        raise DataError(
            f"--encoder: {opened.folder} is not the encoder of {known.folder} (fingerprint {opened.card.get('fingerprint')}, there {wanted}). "
            f"Vectors of different encoders cannot be compared; name the right one or run embed again."
        )
    frames = known.info["frames_per_video"]
    with tempfile.TemporaryDirectory() as made:
        embed(Path(name), opened, Path(made) / "query", labels="none", frames_per_video=None if frames == "all" else frames)
        new = Embedding.read(Path(made) / "query")
        return _pick(new, str(new.videos["video"].iloc[0]), frame)


def _known_video(name: str, known: Embedding) -> str | None:
    """The id of a video of the embedding by id, beginning of an id, or path; None if there is none."""
    by_path = known.files.loc[known.files["path"] == name, "video"]
    if len(by_path):
        return str(by_path.iloc[0])
    if not _ID.fullmatch(name):
        return None
    found = [video for video in known.videos["video"] if video.startswith(name)]
    if len(found) > 1:
        raise DataError(f"{name}: fits {len(found)} videos, for example {', '.join(found[:3])}. Write more digits.")
    return found[0] if found else None


def _pick(known: Embedding, video: str, frame: int | None) -> _Query:
    own = np.flatnonzero((known.frames["video"] == video).to_numpy())
    place = int(np.flatnonzero((known.videos["video"] == video).to_numpy())[0])
    row = known.videos.iloc[place]
    numbers = known.frames["frame"].iloc[own].astype(int).to_numpy()
    if frame is None:
        return _Query(np.asarray(known.video_vectors[place]), video, row["patient"], row["label"], None, known.picture(own[len(own) // 2]))
    chosen = int(np.abs(numbers - frame).argmin())
    return _Query(
        np.asarray(known.frame_vectors[own[chosen]]), video, row["patient"], row["label"], int(numbers[chosen]), known.picture(own[chosen])
    )


def _neighbor(known: Embedding, table: pd.DataFrame, row: int, similarity: float, asked: _Query) -> dict[str, Any]:
    cells = table.iloc[row]
    frame = None if asked.frame is None else int(cells["frame"])
    own = np.flatnonzero((known.frames["video"] == cells["video"]).to_numpy())
    shown = int(own[len(own) // 2]) if frame is None else row
    return {
        "video": cells["video"], "frame": frame, "label": cells["label"], "patient": cells["patient"], "similarity": similarity,
        "same_label": cells["label"] == asked.label if cells["label"] and asked.label else None,
        "same_patient": cells["patient"] == asked.patient if cells["patient"] and asked.patient else None,
        "image": known.picture(shown), "name": _name(cells["video"], frame), "path": known.path_of(cells["video"]),
    }


def _name(video: str, frame: int | None) -> str:
    return video[:8] + ("" if frame is None else f" · frame {frame}")


def _text(asked: _Query, found: Sequence[dict[str, Any]], where: Path) -> str:
    """A table for the terminal: rank, similarity, label, patient, video and file."""
    lines = [f"query {_name(asked.video, asked.frame)}  label {asked.label or 'unknown'}  patient {asked.patient or 'unknown'}"]
    patient = {True: "same patient", False: "other patient", None: "patient unknown"}
    cells = [
        [str(rank), f"{one['similarity']:.3f}", one["label"] or "unlabelled", patient[one["same_patient"]], one["patient"],
         one["video"] + ("" if one["frame"] is None else f":{one['frame']}"), one["path"]]
        for rank, one in enumerate(found, 1)
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    judged = [one["same_label"] for one in found if one["same_label"] is not None]
    if judged:
        lines.append(f"{sum(judged)} of {len(judged)} labelled neighbours have the query's label")
    return "\n".join([*lines, f"picture: {where}"])
