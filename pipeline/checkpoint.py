"""Resumable checkpoints (atomic, checked, never unpickled) and exported encoders with plain torchvision names."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from pipeline.errors import CheckpointError
from pipeline.files import atomic_write, write_json

__all__ = [
    "export_encoder", "latest_checkpoint", "load_checkpoint", "missing_weights", "read_state_dict", "save_checkpoint", "save_tensors",
]

FORMAT = 1


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state-<step>.pt` atomically and delete all but the `keep` newest. Tensors, numbers, strings, lists, dicts only.

    Two are kept so that a disk that fills up while the newest is written costs one interval, not the run.
    """
    path = folder / f"state-{step:010d}.pt"
    part = path.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as handle:
            torch.save({"format": FORMAT, **state}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / 2**30
        raise CheckpointError(
            f"{path.name}: could not be written ({error.strerror or error}; {free:.1f} GiB free in the scratch folder). "
            f"Free some space and start the same command again: it continues from the last checkpoint."
        ) from None
    # A later step than this one is a file that could not be read when the run continued: were it counted among the
    # newest, it would push out the good ones.
    others = sorted(folder.glob("state-*.pt"))
    before, after = [p for p in others if p.name < path.name], [p for p in others if p.name > path.name]
    for old in [*before[: max(0, len(before) - keep + 1)], *after, *folder.glob("state-*.part")]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path, fingerprint: str) -> dict[str, Any]:
    """Read a checkpoint written by `save_checkpoint`.

    Raises:
        CheckpointError: damaged, of another format, or of another run (its fingerprint differs).
    """
    try:
        # torch reads tensors without comparing their check sums: a flipped bit would become a slightly wrong result.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in a dozen ways inside zip and pickle readers
        raise CheckpointError(f"{path.name}: not a readable checkpoint ({type(error).__name__}). Delete it to start over.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path.name}: not a Sonoscope checkpoint of format {FORMAT}. Delete it to start over.")
    if state.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path.name}: belongs to another run (fingerprint {state.get('fingerprint')}, this run has {fingerprint}). "
            f"Checkpoints are kept in a folder per fingerprint and should not be moved; delete it to start over."
        )
    return state


def latest_checkpoint(folder: Path, fingerprint: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest readable checkpoint of this run, or None; and a line for each file that could not be used."""
    skipped = []
    for path in sorted(folder.glob("state-*.pt"), reverse=True):
        try:
            return load_checkpoint(path, fingerprint), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def save_tensors(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors as one safetensors file, atomically; `about` goes into its metadata as JSON under `sonoscope`.

    Equal tensors give equal bytes. The library alone does not do that: it writes the metadata in random order, and everything
    that knows files by their hash (DVC, fingerprints) would take a repeated result for a new one.
    """
    metadata = {"format": "pt", "sonoscope": json.dumps(dict(about))}
    raw = save({name: value.detach().cpu().contiguous() for name, value in state.items()}, metadata)
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start]) | {"__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # the format wants the numbers behind it aligned
    atomic_write(path, len(text).to_bytes(8, "little") + text + raw[start:])


def export_encoder(folder: Path, state: Mapping[str, torch.Tensor], card: Mapping[str, Any]) -> None:
    """Write `encoder.safetensors` (float32, torchvision names) and `card.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "encoder.safetensors", state, {"schema": 1, "backbone": card.get("backbone", "")})
    write_json(folder / "card.json", card)


def _named_tensors(raw: Mapping[Any, Any], outer: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dictionaries, the names of all levels joined with dots."""
    for name, value in raw.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            yield outer + name, value
        elif isinstance(name, str) and isinstance(value, Mapping) and outer.count(".") < 2:
            yield from _named_tensors(value, f"{outer}{name}.")


def _demand_stored(path: Path, key: str) -> None:
    """Refuse a torch file that would grow in memory: torch stores its entries as they are; a small file may inflate to any size."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{key}: {path.name} is refused: its entries are compressed or overlap, which torch.save never does, and could fill all "
            f"memory. Save it again with torch.save, or as a safetensors file."
        )


def missing_weights(path: Path, key: str) -> str:
    """The line that says that no weights file is at `path`."""
    what = "is a folder; name the weights file in it" if path.is_dir() else "does not exist"
    return f"{key}: {path} {what}. Allowed: random, imagenet, or a weights file (.safetensors, .pth, .pt)."


def read_state_dict(path: Path, key: str = "pretrain.init") -> dict[str, torch.Tensor]:
    """Tensors of a weights file: safetensors, or a torch file read with weights-only loading.

    Names of nested dictionaries are joined: `state_dict.conv1.weight`, `teacher.backbone.cls_token`.

    Raises:
        CheckpointError: missing, not a weights file, or a pickle that wants to run code (refused).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(missing_weights(path, key))
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        _demand_stored(path, key)
        # Files of DINO hold the program's options: an object with nothing but values, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Of a pickle that is refused in the next line anyway.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{key}: {path.name} is refused: it holds Python objects that would run code when loaded, or is not a torch file. "
            f"Only plain tensors are read; ask its author for a state dict or a safetensors file."
        ) from None
    except Exception as error:  # damaged bytes fail in a dozen ways inside zip, pickle and safetensors readers
        raise CheckpointError(f"{key}: {path.name} is not a readable weights file ({type(error).__name__}).") from None
    tensors = dict(_named_tensors(raw)) if isinstance(raw, dict) else {}
    if not tensors:
        raise CheckpointError(f"{key}: {path.name} holds no named tensors. Allowed: a state dict (plain, or under 'state_dict').")
    return tensors
