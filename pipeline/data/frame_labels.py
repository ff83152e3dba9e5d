"""Labels of single frames (surgical phases): the annotation file of a video, and the video cut where its label changes.

Each stretch of one label becomes a video of its own in the frame store, with the whole video as its patient. So splits,
label fractions and leak checks treat whole videos, while training and evaluation see the label of every frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from pipeline.data.manifest import VideoRow, pseudonym
from pipeline.data.store import write_video
from pipeline.data.thinning import source_frames
from pipeline.errors import DataError
from pipeline.files import atomic_write, copy_into, hash_bytes
from pipeline.parameters import DataParams, ExtractParams

__all__ = ["FrameLabels", "cut_videos", "label_file", "read_frame_labels"]

_CELLS = re.compile(r"[\t,;]")


@dataclass(frozen=True)
class FrameLabels:
    """Annotated frame numbers, int64 [n] ascending from 0, and the label of each."""

    frames: np.ndarray
    names: tuple[str, ...]

    def at(self, frames: Sequence[int]) -> list[str]:
        """Label of each frame: that of the last annotated frame before or at it; empty outside the annotated range.

        Behind the last row a label holds for one more spacing of the rows, so that a file with a row a second covers it.
        """
        wanted = np.asarray(frames, np.int64)
        spacing = int(np.median(np.diff(self.frames))) if len(self.frames) > 1 else 1
        places = np.searchsorted(self.frames, wanted, side="right") - 1
        inside = (places >= 0) & (wanted < self.frames[-1] + spacing)
        return [self.names[place] if good else "" for place, good in zip(places, inside, strict=True)]


def read_frame_labels(path: Path, shown: str = "") -> FrameLabels:
    """Read `frame<TAB>label` rows (or with commas or semicolons), with or without a header line.

    Windows line ends, a byte-order mark, empty last lines and a missing final newline make no difference.

    Args:
        shown: name of the file for messages; its own name if empty.

    Raises:
        DataError: naming file and line: not UTF-8, not two cells, no frame number, numbers that do not rise, no label.
    """
    shown = shown or path.name
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{shown}: cannot be read as UTF-8 text. Save it as UTF-8, one row `frame<TAB>label` a frame.") from None
    frames: list[int] = []
    names: list[str] = []
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in _CELLS.split(line)]
        if not any(cells) or (number == 1 and not cells[0].isdecimal()):
            continue
        if len(cells) != 2 or not all(cells) or not re.fullmatch(r"\d{1,12}", cells[0], re.ASCII):
            raise DataError(f"{shown}, line {number}: found '{line[:60]}'; expected a frame number and a label, as in `25<TAB>Preparation`")
        if frames and int(cells[0]) <= frames[-1]:
            raise DataError(f"{shown}, line {number}: frame {cells[0]} follows frame {frames[-1]}; frame numbers must rise")
        frames.append(int(cells[0]))
        names.append(cells[1])
    if not frames:
        raise DataError(f"{shown}: holds no row `frame<TAB>label`")
    return FrameLabels(np.array(frames, np.int64), tuple(names))


def label_file(pattern: str, media: str) -> str:
    """The annotation of a medium by `data.frame_labels`: `{stem}` is its file or folder name without extension."""
    return pattern.replace("{stem}", PurePosixPath(media).stem)


def cut_videos(
    rows: list[VideoRow], data: DataParams, extract: ExtractParams, scratch: Path
) -> tuple[list[VideoRow], list[str]]:
    """Replace every video that has an annotation file by its stretches, written into `scratch`.

    Args:
        rows: of the main source; their tars lie in `scratch`.

    Returns:
        New rows, and notes on videos without an annotation.

    Raises:
        DataError: no video has an annotation file, one leads out of the folder, or one is wrong (all are listed).
    """
    root, result, without, problems = Path(data.source), [], 0, []
    for row in rows:
        name = label_file(data.frame_labels, row.path)
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"data.frame_labels: {data.frame_labels!r} leads out of the folder {root}; give a path inside it")
        if row.kind == "image" or not path.is_file():
            without += 1
            result.append(replace(row, label=""))
            continue
        try:
            labels = read_frame_labels(path, name)
        except DataError as error:
            problems.append(str(error))
            continue
        numbers = source_frames(row.frames_decoded, row.fps, extract)
        names = labels.at([number * data.frame_label_stride for number in numbers])
        result += _stretches(row, names, data.pseudonym_key, scratch)
    if problems:
        raise DataError("\n  ".join([f"data.frame_labels: {len(problems)} annotation files cannot be used", *problems[:20]]))
    if without == len(rows):
        example = label_file(data.frame_labels, rows[0].path) if rows else data.frame_labels
        raise DataError(
            f"data.frame_labels: no video has an annotation file; for {rows[0].path if rows else 'a video'} it would be {root / example}"
        )
    return result, [f"{without} of {len(rows)} files have no annotation of frames and serve pretraining only"] * bool(without)


def _stretches(row: VideoRow, names: list[str], key: str, scratch: Path) -> list[VideoRow]:
    """Rows of the stretches of one video; their tars are written unless an earlier run did so from the same tar of the video."""
    edges = [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1]), len(names)]
    index = np.load(scratch / f"{row.video}.idx.npy", allow_pickle=False)
    # Another decision about the mask, or another rate, gives other frames: the video's tar is then a new one.
    source = scratch / f"{row.video}.tar"
    origin = f"{source.stat().st_size} bytes, written {source.stat().st_mtime_ns}".encode()
    patient = row.patient or pseudonym(PurePosixPath(row.path).stem, key)
    unlabelled = names.count("")
    notes = [row.warnings] * bool(row.warnings) + [f"{unlabelled} frames lie outside the annotation"] * bool(unlabelled)
    rows = []
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        content = hash_bytes(row.sha256, str(first), str(end))
        video = content[:16]
        tar, record = scratch / f"{video}.tar", scratch / f"{video}.origin"
        if not tar.is_file() or not record.is_file() or record.read_bytes() != origin:
            with open(source, "rb") as whole:
                write_video(scratch, video, (_read(whole, int(offset), int(length)) for offset, length in index[first:end]))
            atomic_write(record, origin)
        mask = scratch / f"{row.video}.mask.png"
        if mask.is_file():
            copy_into(mask, scratch / f"{video}.mask.png")
        rows.append(replace(
            row, video=video, sha256=content, path=f"{row.path}#{first:06d}-{end - 1:06d}", patient=patient, label=names[first],
            kind="stretch", frames=end - first, frames_decoded=end - first, frames_claimed=None, bytes=tar.stat().st_size,
            warnings="; ".join(notes),
        ))
    return rows


def _read(handle: BinaryIO, offset: int, length: int) -> bytes:
    handle.seek(offset)
    return handle.read(length)
