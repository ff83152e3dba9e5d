"""Presets: named sets of parameters, each a file `pipeline/presets/<name>.yaml` (`description:`, then nested keys).

A preset becomes `-S key=value` words for `dvc exp run`, or an edit of params.yaml that keeps its comments. It holds
only what it changes, and never a path of somebody's machine. `overridden` reads such words as `dvc exp run` does.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import ConfigError
from pipeline.files import atomic_write
from pipeline.registry import did_you_mean

if TYPE_CHECKING:
    from pipeline.config import Config

__all__ = ["Preset", "as_overrides", "as_word", "flatten", "load_preset", "overridden", "preset_names", "write_preset"]

FOLDER = Path(__file__).with_name("presets")
# Text that needs no quotes in the grammar of `dvc exp run -S`; anything else is put between single quotes.
_PLAIN = re.compile(r"[A-Za-z_./-][A-Za-z0-9_./-]*")
_RESERVED = {"true", "false", "null", "nan", "inf"}


@dataclass(frozen=True)
class Preset:
    """One preset file."""

    name: str
    description: str
    values: dict[str, Any]
    """Parameters by dotted key, e.g. `split.folds`."""


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_preset(name: str) -> Preset:
    """Read one preset.

    Raises:
        ConfigError: the name is unknown (the known ones are listed), or the file does not begin with a description.
    """
    known = preset_names()
    if name not in known:
        raise ConfigError(f"preset: unknown preset '{name}'. Allowed: {', '.join(known)}.{did_you_mean(name, known)}")
    path = FOLDER / f"{name}.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or next(iter(tree), None) != "description":
        raise ConfigError(f"pipeline/presets/{name}.yaml: the first key must be 'description', then nested parameters")
    description = str(tree.pop("description"))
    return Preset(name, " ".join(description.split()), flatten(tree))


def as_word(value: Any) -> str:
    """One value in the grammar of `dvc exp run -S` (Hydra's), without white space outside quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(as_word(item) for item in value) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def as_overrides(preset: Preset) -> list[str]:
    """The words `-S key=value ...` for `dvc exp run $(sonoscope preset NAME)`.

    The `++` adds a key that params.yaml does not name and overrides one that it does.

    Raises:
        ConfigError: a value holds white space, at which the shell would divide `$(...)`; `--write` has no such limit.
    """
    words: list[str] = []
    for key, value in preset.values.items():
        word = f"++{key}={as_word(value)}"
        if any(character.isspace() for character in word):
            raise ConfigError(
                f"preset {preset.name}: {key} holds white space ({value!r}), which the shell would divide. "
                f"Use 'sonoscope preset {preset.name} --write', then 'dvc exp run'."
            )
        words += ["-S", word]
    return words


def overridden(overrides: Sequence[str], path: Path = Path("params.yaml")) -> Iterator[Config]:
    """The checked configurations that `dvc exp run -S ...` would make: one, or each of a grid (`key=a,b`). The file stays as it is.

    Args:
        overrides: `key=value` in the grammar of DVC (Hydra's), `+key` for a key that the file does not name. [] for the file as it is.

    Raises:
        ConfigError: words that DVC does not take, an unknown key (with the nearest one), or values that are not allowed.
    """
    from pipeline.config import load_config

    config = load_config(path)
    if not overrides:
        yield config
        return
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
    from hydra.errors import HydraException

    said = " ".join(f"-S {word}" for word in overrides)
    try:
        grid = [point["-S"] for point in get_hydra_sweeps({"-S": list(overrides)})]
    except (DvcException, HydraException) as error:
        raise ConfigError(f"{said}: {str(error).splitlines()[0].rstrip('.')}. Write KEY=VALUE, as for 'dvc exp run -S'") from None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "params.yaml"

        def load(words: Sequence[str]) -> Config:
            copy.write_bytes(path.read_bytes())
            apply_overrides(copy, list(words))
            try:
                return load_config(copy)
            except ConfigError as error:
                raise ConfigError(str(error).replace(str(copy), f"{path} with {said}", 1)) from None

        for words in grid:
            try:
                yield load(words)
            except DvcException as error:
                # Where a key is misspelt DVC advises to add it; added, our own check names the nearest one.
                with suppress(DvcException):
                    load([word if word.startswith(("+", "~")) else f"++{word}" for word in words])
                raise ConfigError(f"{said}: {' '.join(str(error.__cause__ or error).split())}") from None


def write_preset(preset: Preset, path: Path = Path("params.yaml")) -> list[str]:
    """Set the preset's parameters in `path`, keeping its comments, order and every other value.

    The new text is checked before it replaces the old one.

    Returns:
        One line `key: old -> new` for each parameter that changed.

    Raises:
        ConfigError: `path` is absent or is not valid, before or after the change; it is then left as it was.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    from pipeline.config import load_config

    load_config(path)
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 120
    editor.representer.add_representer(
        type(None), lambda representer, value: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    document = editor.load(path.read_text(encoding="utf-8"))
    changes: list[str] = []
    for key, value in preset.values.items():
        *parents, last = key.split(".")
        node = document
        for parent in parents:
            if not isinstance(node.get(parent), Mapping):
                node[parent] = CommentedMap()
            elif not node[parent] and isinstance(node[parent], CommentedMap):
                # An empty `{}` is written in flow style; a mapping that gains keys reads better as a block.
                node[parent].fa.set_block_style()
            node = node[parent]
        old = node.get(last, "(default)")
        if old == value:
            continue
        if isinstance(value, list):
            sequence = CommentedSeq(value)
            sequence.fa.set_flow_style()
            value = sequence
        changes.append(f"{key}: {_show(old)} -> {_show(value)}")
        node[last] = value
    buffer = io.StringIO()
    editor.dump(document, buffer)
    # Where a long flow mapping is wrapped, the editor leaves a blank at the end of the line.
    text = re.sub(r" +$", "", buffer.getvalue(), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / "params.yaml"
        candidate.write_text(text, encoding="utf-8")
        load_config(candidate)
    atomic_write(path, text)
    return changes


def _show(value: Any) -> str:
    """A value as it would stand in params.yaml, on one line."""
    return value if value == "(default)" else as_word(value)
