"""Where things live and how they are written: the project root, atomic writes, CSV tables, content hashes.

Not for formats: the frame store, manifests and checkpoints each have their own module.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "alone_in", "atomic_write", "copy_into", "csv_text", "hash_bytes", "hash_file", "is_full", "is_odd", "leads_out", "project_root", "read_json",
    "scratch_folder", "shield", "unshield", "write_curves", "write_json",
]

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_SHIELDED = re.compile(r"'+[=+\-@\t\r]")


def project_root() -> Path:
    """The real project folder, also inside a queued DVC experiment.

    A queued or temporary experiment runs in a throw-away copy under `.dvc/tmp/exps`, where DVC sets `DVC_ROOT` to the
    project itself. Scratch checkpoints and the MLflow store hang on this folder so that they outlive the copy.
    """
    root = os.environ.get("DVC_ROOT")
    return Path(root) if root else Path.cwd()


def scratch_folder(kind: str, fingerprint: str) -> Path:
    """`<root>/.scratch/<kind>/<fingerprint>`: resumable state outside DVC's outputs, one folder per fingerprint.

    DVC deletes an output before it runs a stage, and `persist: true` was measured to leak one sweep point's checkpoint
    into the next; a folder named by everything that determines the result does neither.
    """
    folder = project_root() / ".scratch" / kind / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold `folder` against other processes of this machine; wait, and say so, while another one computes there.

    Two sweep points may need the same encoder at the same time: the second waits and then finds it finished. The lock ends
    with its process, however that ends. Without POSIX locks (Windows) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process computes the same result ({folder.name}); waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never half of it.

    The temporary file lies in the same folder: `os.replace` across file systems is not atomic.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        # mkstemp gives 0600; outputs are shared files and follow the user's umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def copy_into(source: Path, target: Path) -> None:
    """Copy a file over `target` by replacing it, never by writing into it.

    After a checkout an output is a hard link into DVC's cache: writing into it would change the cached object as well.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline, atomically. NaN is refused: it is not JSON."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse one UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def leads_out(path: Path, home: Path) -> bool:
    """Whether a link leads out of the folder `home`. One that leads in a circle does not; opening it says so."""
    return os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(home)


def is_odd(path: Path) -> bool:
    """Whether this is a pipe, device or socket, on which a reader would wait for ever. What cannot be told is not odd."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def hash_bytes(*parts: bytes | str) -> str:
    """SHA-256 over the parts, each preceded by its length so that ("ab", "c") and ("a", "bc") differ. 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks of 1 MiB. 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shield(text: str) -> str:
    """Text that no spreadsheet takes for a formula: `'` before one of = + - @, tab or CR. `unshield` gives the text back, whatever it was."""
    return f"'{text}" if _FORMULA.match(text) else text


def unshield(text: str) -> str:
    """The text that `shield` was given; text that needs no shield and has none stays as it is."""
    return text[1:] if _SHIELDED.match(text) else text


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV with a header, every text shielded."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([shield(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return out.getvalue()


def write_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Training curves as CSV: one row an epoch, columns in order of first appearance, empty where not measured."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        return "" if value is None else (f"{value:.7g}" if isinstance(value, float) else str(value))

    lines = [",".join(columns), *(",".join(cell(row.get(name)) for name in columns) for row in rows)]
    atomic_write(path, "\n".join(lines) + "\n")
