"""The journal: tracking events as JSON lines on the local disk, written before anything is sent anywhere.

One file a run, `.tracking/<run key>.jsonl`, locked while its process lives, so that no store and no network can hurt a
training run or lose what it logged. Also the file locks that keep processes apart.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: one process at a time is then the user's business.
    fcntl = None  # type: ignore[assignment]

__all__ = ["FOLDER", "Journal", "file_lock", "in_use", "stage_files"]

FOLDER = ".tracking"


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on `path`; TimeoutError after `seconds`. File systems without locks are let through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as handle:
        deadline = time.monotonic() + seconds
        while not _try_lock(handle.fileno()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {path.name} for {seconds:g} s")
            time.sleep(0.05)
        yield


def _try_lock(handle: int) -> bool:
    """True when the lock was taken or the file system knows no locks; False when another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def in_use(path: Path) -> bool:
    """Whether a living process writes this journal; the file stays as it is. False where the file system knows no locks."""
    with open(path, "rb") as handle:
        return not _try_lock(handle.fileno())


class Journal:
    """The writing side: one locked file a run; every line is flushed before `append` returns."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle = path, handle
        size = os.fstat(handle).st_size
        if size:
            with open(path, "rb") as reader:
                reader.seek(size - 1)
                # A process killed while it wrote leaves half a line; the next event must not be glued to it.
                if reader.read(1) != b"\n":
                    os.write(handle, b"\n")

    @classmethod
    def open(cls, root: Path, key: str) -> Journal:
        """The journal of `key`; a numbered one beside it while another living process holds the first."""
        folder = root / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, 100):
            path = folder / (f"{key}.jsonl" if number == 1 else f"{key}.{number}.jsonl")
            journal = cls.lock(path)
            if journal is not None:
                return journal
        raise TimeoutError(f"a hundred processes hold journals of {key}")

    @classmethod
    def lock(cls, path: Path) -> Journal | None:
        """Open one journal file; None when another process holds it."""
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if not _try_lock(handle):
                os.close(handle)
                return None
            # Between opening and locking, a finishing process may have removed the file: ours would be a ghost.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                return cls(path, handle)
            os.close(handle)

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event. Raises OSError when the disk refuses."""
        line = json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n"
        os.write(self._handle, line.encode("utf-8", "replace"))

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._handle)


def stage_files(source: Path, folder: Path) -> Path:
    """Put a file or folder beside the journal until it is delivered; returns its new place, named like the source.

    Hard links cost nothing and keep the logged content when the source is replaced or removed; where the file system
    has none, files are copied. Raises OSError.
    """
    target = folder / source.name
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    files = [(path, target / path.relative_to(source)) for path in sorted(source.rglob("*")) if path.is_file()]
    for path, copy in files if source.is_dir() else [(source, target)]:
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), copy)
        except OSError:
            shutil.copyfile(path, copy)
    return target
