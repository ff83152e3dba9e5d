"""Shared fixtures: where the real clips lie, when they are there; an empty MLflow store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_folder() -> Path | None:
    """The folder with golden arrays and real clips: SONOSCOPE_SHARED, or `shared` beside the project; None if absent."""
    folder = Path(os.environ.get("SONOSCOPE_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Skips, and says so, where the shared folder is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("needs the shared data folder; set SONOSCOPE_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables: creating them takes seconds, copying the file does not."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
