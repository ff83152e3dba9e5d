"""Packaging: locks, Makefile, container, licence and citation agree with one another and name no package index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements-headless.lock")
PYTHONS = ("3.10.0", "3.11.0", "3.12.0", "3.13.0")


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make in `folder`, untouched by a make that runs these tests."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _copied(folder: Path) -> Path:
    """`folder` with what `make install` depends on."""
    folder.mkdir(exist_ok=True)
    for name in ("Makefile", *LOCKS, "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def _entries(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each pinned package of a lock with its hashes."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield Requirement(line.split(" --hash")[0].strip()), re.findall(r"--hash=(\S+)", line)


def _project_requirements() -> list[Requirement]:
    """The ranges of pyproject.toml, all optional ones included."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [text for texts in project["optional-dependencies"].values() for text in texts]
    found = [Requirement(text) for text in [*project["dependencies"], *optional]]
    return [requirement for requirement in found if requirement.name != project["name"]]


@pytest.mark.parametrize("name", LOCKS)
def test_lock__every_package_is_exact_and_hashed(name: str) -> None:
    entries = list(_entries(name))
    assert entries
    for requirement, hashes in entries:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None, requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_lock__satisfies_the_ranges_on_every_python(python: str) -> None:
    environment = {**default_environment(), "python_full_version": python, "python_version": python.rsplit(".", 1)[0]}
    pinned: dict[str, str] = {}
    for requirement, _ in _entries("requirements.lock"):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{name} twice on Python {python}"
            pinned[name] = next(iter(requirement.specifier)).version
    for requirement in _project_requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version, prereleases=True), (requirement, version)
    # `pip install --no-build-isolation -e .` builds with the locked setuptools.
    assert int(pinned["setuptools"].split(".")[0]) >= 77


def test_lock__headless_is_the_same_version() -> None:
    ((headless, _),) = _entries("requirements-headless.lock")
    versions = [
        requirement.specifier for requirement, _ in _entries("requirements.lock") if requirement.name == "opencv-python"
    ]
    assert headless.name == "opencv-python-headless" and versions == [headless.specifier]


@pytest.mark.parametrize("name", [*LOCKS, "pyproject.toml", "Makefile", "Dockerfile", ".ci/run", ".dvc/config"])
def test_lock_and_build_files__name_no_index(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(
        r"https?://(?!127\.0\.0\.1)|--(extra-)?index-url[ =]|--find-links|--trusted-host|\bsudo\b", text
    )


@pytest.mark.parametrize("target", ["help", "install", "demo", "test", "lock", "check-lock", "clean"])
def test_makefile__target_exists(target: str) -> None:
    done = _make(ROOT, "--dry-run", "--always-make", target)
    assert done.returncode == 0, done.stderr


def test_makefile__second_install_does_nothing(tmp_path: Path) -> None:
    folder = _copied(tmp_path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (folder / ".venv" / ".installed").touch()
    assert _make(folder, "--question", "install").returncode == 0
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(folder / name, (4e9, 4e9))
        assert _make(folder, "--question", "install").returncode == 1
        os.utime(folder / name, (1e9, 1e9))


def test_makefile__no_suitable_python_is_explained(tmp_path: Path) -> None:
    folder = _copied(tmp_path / "path with blanks")
    done = _make(folder, "install", "PYTHON=no-such-python")
    assert done.returncode != 0 and "No Python 3.10 to 3.13" in done.stderr and "PYTHON=" in done.stderr
    assert not (folder / ".venv").exists()


def test_ci__is_executable_and_runs_the_tests() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK) and "make test" in path.read_text(encoding="utf-8")


def test_citation__names_the_four_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    papers = {entry["identifiers"][0]["value"] for entry in citation["references"]}
    assert papers == {f"arXiv:{number}" for number in ("2207.13148", "2011.13066", "2210.04477", "2308.12394")}


def test_gitignore__leaves_dvc_lock_alone() -> None:
    """DVC refuses to work when dvc.lock is ignored, and overlooks `.dvc` files under a pattern such as `data/*`."""
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    assert not {"dvc.lock", "*.lock", "data/*", "/data/*", "data/", "/data/"} & set(lines)
