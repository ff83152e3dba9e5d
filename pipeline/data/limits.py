"""What a process that reads foreign files may take: memory, and time without progress. The kernel ends it, whatever it hangs in.

On systems without these limits (Windows; memory on macOS) nothing is limited.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MEMORY", "STALL_SECONDS", "limit_process", "tick", "watched"]

MEMORY = 3 << 30
"""Bytes of address space a worker may add to what its imports take. A decoder that wants more is told that there is none."""
STALL_SECONDS = 120
"""A file that gives no new frame for so long ends its worker; the pool then knows which file it was."""

_state = {"watching": False, "ticks": 0}


def tick() -> None:
    """There is progress: the readers call this once a frame."""
    _state["ticks"] += 1


def limit_process(memory: int = MEMORY, stall_seconds: int = STALL_SECONDS) -> None:
    """Limit this process from now on: address space, time without progress (see `watched`), and no core dump of a patient's data."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + memory
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
    except (OSError, ValueError):
        pass  # no such limit here
    threading.Thread(target=_keep_alive, args=(stall_seconds,), daemon=True).start()


def _keep_alive(stall_seconds: int) -> None:
    """Put off the alarm while there is progress. A decoder that holds the interpreter stops this thread too, and the alarm comes."""
    before = None
    while True:
        now = _state["ticks"] if _state["watching"] else None
        if now is None or now != before:
            signal.alarm(stall_seconds)
        before = now
        time.sleep(min(1.0, stall_seconds / 4))


@contextmanager
def watched() -> Iterator[None]:
    """While inside, the process lives only as long as there is progress; without `limit_process` nothing happens."""
    tick()
    _state["watching"] = True
    try:
        yield
    finally:
        _state["watching"] = False
