"""Who delivers a journal, and when: a background thread while the stage runs, `sonoscope sync` afterwards."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

from pipeline.errors import TrackingError
from pipeline.files import project_root
from pipeline.tracking_journal import FOLDER, Journal
from pipeline.tracking_store import Deliverer, resolve_uri

__all__ = ["Courier", "sync", "warn"]

FAILED_CLOSE_SECONDS = 4.0
LONGEST_PAUSE_SECONDS = 60.0


def warn(text: str) -> None:
    """Print one line of the tracking to stderr."""
    print(f"tracking: {text}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """Class and first line of an error of the store, without the password an address may hold. For the console only."""
    lines = str(error).splitlines()
    text = re.sub(r"//[^/@\s]*@", "//", lines[0] if lines else "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


class Courier(threading.Thread):
    """Delivers a journal in the background; a failure is reported once and the next try waits longer each time.

    The first round comes after `seconds`: MLflow's import then does not compete with the imports of the stage itself.
    """

    def __init__(self, deliverer: Deliverer, seconds: float) -> None:
        super().__init__(name="tracking", daemon=True)
        self.deliverer, self.seconds, self.failed = deliverer, seconds, False
        self._changed = threading.Condition()
        self._asked = self._served = 0
        self._stopping = self._over = False

    def run(self) -> None:
        """Deliver until stopped."""
        try:
            self._rounds()
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _rounds(self) -> None:
        pause = self.seconds
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._served or self._stopping, timeout=pause)
                if self._stopping:
                    return
                asked = self._asked
            try:
                self.deliverer.deliver()
                pause, self.failed = self.seconds, False
            except Exception as error:
                if not self.failed:
                    self._report(_reason(error))
                pause, self.failed = min(2 * pause, LONGEST_PAUSE_SECONDS), True
            with self._changed:
                self._served = max(self._served, asked)
                self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Deliver what is in the journal now; True when that was done within `seconds`."""
        with self._changed:
            self._asked += 1
            wanted = self._asked
            self._changed.notify_all()
            seconds = min(seconds, FAILED_CLOSE_SECONDS) if self.failed else seconds
            served = self._changed.wait_for(lambda: self._served >= wanted or self._over, timeout=seconds)
            served = served and not self._over
        if not served and not self.failed:
            self.failed = True
            self._report(f"no answer within {seconds:g} s")
        return served and not self.failed

    def _report(self, reason: str) -> None:
        warn(
            f"the MLflow store cannot be used now ({reason}); the run goes on and everything is kept in "
            f"{self.deliverer.journal}. If that file is still there later, deliver it with: sonoscope sync"
        )

    def stop(self) -> bool:
        """End the thread; False when it hangs in a call, so that the journal must be left to it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.join(0.2)
        return not self.is_alive()


def sync(root: Path | None = None, *, uri: str | None = None) -> dict[str, Any]:
    """Deliver every journal under `<root>/.tracking` that no living process writes, and remove what was delivered.

    Args:
        root: the project folder; None means `project_root()`.
        uri: the store; None means the one each journal was meant for.

    Returns:
        `{"runs": delivered journals, "events": delivered events, "in_use": journals of living processes,
        "refused": events the store will not take}`.

    Raises:
        TrackingError: when a store could not be reached; says how many journals are kept.
    """
    root = (root or project_root()).resolve()
    summary = {"runs": 0, "events": 0, "in_use": 0, "refused": 0}
    kept: list[str] = []
    for path in sorted((root / FOLDER).glob("*.jsonl"), key=lambda file: file.stat().st_mtime):
        journal = Journal.lock(path)
        if journal is None:
            summary["in_use"] += 1
            continue
        deliverer = Deliverer(path, root, live=False, uri=uri)
        try:
            summary["events"] += deliverer.deliver()
            deliverer.abandon(deliverer.state["t"])
            refused = deliverer.finish()
            summary["refused"] += refused
            summary["runs"] += not refused
        except Exception as error:
            place = resolve_uri(uri or deliverer.state["uri"], root)
            kept.append(f"{path.name}: {_reason(error)} at {place.rsplit('@', 1)[-1]}")
        finally:
            journal.close()
    if kept:
        raise TrackingError(
            f"{len(kept)} journal(s) under {root / FOLDER} could not be delivered and are kept; {summary['runs']} were "
            "delivered. Check that the store answers and repeat: sonoscope sync\n  " + "\n  ".join(kept)
        )
    return summary
