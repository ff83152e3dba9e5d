"""Cloning a public data set at a pinned revision: only its folders, resumable, nothing of it executed.

Only data whose owners publish them for everybody come this way, and only after the user has accepted their terms.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from pipeline.data.recipes.lung import (
    UPSTREAM_FOLDERS,
    UPSTREAM_REVISION,
    UPSTREAM_TABLE,
    UPSTREAM_URL,
)
from pipeline.errors import DataError

__all__ = ["fetch_pocus"]

# A repository from outside: no hooks, no links, no line-end changes, no large-file filters, no helper that asks for a password.
_CAREFUL = (
    "core.hooksPath=/dev/null", "core.symlinks=false", "core.autocrlf=false", "core.fsmonitor=false", "protocol.ext.allow=never",
    "filter.lfs.smudge=", "filter.lfs.process=", "filter.lfs.required=false", "http.lowSpeedLimit=1000", "http.lowSpeedTime=60",
    "advice.detachedHead=false", "gc.auto=0",
)


def _git(folder: Path, *words: str) -> str:
    """Run git in `folder` and return what it prints; DataError with its last words if it fails."""
    command = ["git", *(word for setting in _CAREFUL for word in ("-c", setting)), *words]
    unwanted = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted} | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        last = said[-1] if said else "no message"
        raise DataError(f"{folder}: git {words[0]} failed: {last}. What has arrived is kept: run the same command again.")
    return done.stdout


def fetch_pocus(
    target: Path, *, url: str = UPSTREAM_URL, revision: str = UPSTREAM_REVISION, tell: Callable[[str], None] = print
) -> Path:
    """Clone the data folders of the POCUS repository into `target`, or finish a clone that was broken off.

    Folder by folder, so that a run that ends early keeps the finished ones; files that were changed since are named, not replaced.

    Args:
        target: an empty or new folder, or one that an earlier call began.
        url: of the repository. revision: 40 hex digits. tell: receives one line a step.

    Returns:
        `target`.

    Raises:
        DataError: git is missing, the folder holds something else, the revision does not arrive, or files differ from it.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise DataError(f"--revision: got '{revision[:60]}'; a commit is 40 hex digits")
    if shutil.which("git") is None:
        raise DataError("git: not found. Install it (Debian, Ubuntu: apt install git; macOS: xcode-select --install)")
    target = Path(target)
    _begin(target, url)
    have = _git(target, "rev-parse", "--verify", "--quiet", "HEAD").strip() if _has_head(target) else ""
    if have != revision:
        tell(f"revision {revision[:12]} of {url}")
        _git(target, "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", revision)
        _git(target, "sparse-checkout", "set", "--no-cone", f"/{UPSTREAM_TABLE}", "/LICENSE")
        _git(target, "checkout", "--quiet", "--detach", revision)
    for folder in UPSTREAM_FOLDERS:
        tell(folder)
        _git(target, "sparse-checkout", "add", f"/{folder}/")
    if _git(target, "rev-parse", "HEAD").strip() != revision:
        raise DataError(f"{target}: is not at revision {revision}; remove the folder and fetch it again")
    changed = _git(target, "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed[:5])
        raise DataError(f"{target}: {len(changed)} files differ from the revision: {names}. 'git -C {target} checkout -- .' brings them back.")
    return target


def _has_head(target: Path) -> bool:
    """Whether a checkout was finished before."""
    try:
        _git(target, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except DataError:
        return False
    return True


def _begin(target: Path, url: str) -> None:
    """Make `target` a partial clone of `url` without files yet, unless it is one; a call that was cut short anywhere is finished."""
    try:
        if not (target / ".git").is_dir() and target.exists() and any(target.iterdir()):
            raise DataError(f"{target}: is not empty and no clone; choose another folder")
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror})") from None
    # Repeating this changes nothing, and a kill within it leaves a folder that git takes for no repository.
    _git(target, "init", "--quiet")
    known = _git(target, "config", "--default", "", "--get", "remote.origin.url").strip()
    if known not in ("", url):
        raise DataError(f"{target}: is a clone of {known}, not of {url}; choose another folder")
    # The clone is partial: missing files are asked for when their folder is checked out.
    settings = {"url": url, "fetch": "+refs/heads/*:refs/remotes/origin/*", "promisor": "true", "partialclonefilter": "blob:none"}
    for key, value in settings.items():
        if _git(target, "config", "--default", "", "--get", f"remote.origin.{key}").strip() != value:
            _git(target, "config", f"remote.origin.{key}", value)
