"""How one topic of an evaluation (calibration, sub-groups, ...) joins it: numbers for the files, a section for the report.

A topic is a module with a function `part(context) -> Part | None`, listed in `pipeline.evaluation.evaluate.PARTS`. None
means that the topic does not apply to these data; what applies but cannot be computed is a Part that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.config import Config
from pipeline.data.splits import Splits
from pipeline.data.store import FrameStore
from pipeline.evaluation.predictions import Item
from pipeline.evaluation.report import Section

__all__ = ["Context", "Part"]


@dataclass(frozen=True)
class Context:
    """What a part may use. Nothing in it may be changed."""

    config: Config
    splits: Splits
    items: Sequence[Item]
    """The fine-tuned models; `item.table` holds the rows of part `test` and of part `validation` (inner validation patients)."""
    tables: Mapping[str, pd.DataFrame]
    """Out-of-fold test predictions by level: frame, video, patient."""
    metrics: Mapping[str, Any]
    """The numbers of details.json so far."""
    store: FrameStore | None
    """Frames and manifest; None when only predictions are there."""
    output: Path
    """Folder of the results; pictures go to `output / "pictures"`."""
    inits: Sequence[str]
    """The initialisations that were judged, the headline first."""
    recordings: Mapping[str, str]
    """Stretch (video id) to the path of the whole video it was cut from; empty unless frames have labels of their own."""

    @property
    def unit(self) -> str:
        """What independent units are called: patient or group."""
        return self.splits.unit


@dataclass(frozen=True)
class Part:
    """What a part adds. Numbers are valid JSON: None where undefined, with a reason in words beside it, never NaN."""

    key: str
    numbers: Mapping[str, Any]
    """For details.json, under `key`."""
    section: Section | None = None
    compact: Mapping[str, Any] = field(default_factory=dict)
    """The few numbers worth a column in `dvc exp show`; metrics.json, under `key`."""
    headline: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the stage's and the parent's MLflow run, with their full names."""
    warnings: Sequence[str] = ()
    """Lines for the report's list of warnings."""
    cautions: Sequence[str] = ()
    """Sentences for what the numbers may not be used for, at the head of the report and in the model card."""
