"""The errors a user can meet, one class per kind of mistake.

Every message names the key or file, what was found, what is allowed, and what to do. Anything that is not a
`PipelineError` is a bug of Sonoscope and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unicodedata import category

LONGEST_LINE = 1500
"""Characters of one line of a message; file names and lists of names have room in it."""


def some(names: Iterable[Any], limit: int = 4) -> str:
    """`a, b, c, d and 4 more`: a list in a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def plain(text: str) -> str:
    """`text` with control characters escaped: messages quote names and cells of foreign files, which must not steer the terminal."""
    return "".join(letter if category(letter) not in ("Cc", "Cf") or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in text)


def loud(text: str) -> str:
    """A warning set apart by empty lines: for what spoils hours of work, or every number, unless it is mended first."""
    return f"\nWARNING: {plain(text)}\n"


class PipelineError(Exception):
    """Base of all errors that a user can mend. `stages/*` print it without a traceback and exit with 2."""

    def __str__(self) -> str:
        lines = plain(super().__str__()).split("\n")
        return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..." for line in lines)


class ConfigError(PipelineError):
    """params.yaml (or a `-S` override) holds something that is not allowed; all problems are listed at once."""


class DataError(PipelineError):
    """A video, image, label table or frame store cannot be used."""


class LeakageError(PipelineError):
    """Patients of an evaluation fold were seen in training, or a given split puts one patient on two sides."""


class CheckpointError(PipelineError):
    """A checkpoint or encoder file is foreign, incomplete, or does not fit the network that was asked for."""


class TrackingError(PipelineError):
    """The MLflow store cannot be reached by a command whose only purpose is to reach it (`sonoscope sync`)."""


class StoppedError(PipelineError):
    """A scheduler or the user asked the run to stop; its state is saved and the same command continues it."""
