"""Names to implementations: methods, backbones, heads. A look-up of an unknown name lists the known ones.

`LazyModule` lets a method file be read (for its parameters) without importing torch, so that `extract`, `split` and every
parameter check start in a fraction of a second.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.errors import ConfigError

__all__ = ["BACKBONES", "HEADS", "METHODS", "LazyModule", "Registry", "did_you_mean"]

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name, or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


class LazyModule:
    """Stands for a module and imports it at the first attribute access.

    Used as `torch = LazyModule("torch")` in method files, whose `Params` must be readable without torch.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


class Registry(Generic[T]):
    """A table filled by decorators in the implementing files; the files of `package` are imported at the first look-up."""

    def __init__(self, kind: str, key: str, package: str) -> None:
        self.kind, self.key, self.package = kind, key, package
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the decorated object under `name`. A name can be taken once."""

        def enter(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._items[name] = item
            return item

        return enter

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        if hasattr(package, "__path__"):
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._items)

    def declared(self) -> list[str]:
        """Names that the sources register, read as text: for checks that must not import torch."""
        spec = importlib.util.find_spec(self.package)
        text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        return sorted(re.findall(r"\.register\(\"([^\"]+)\"\)", text))

    def get(self, name: str) -> T:
        """The object registered under `name`; `ConfigError` with the known names otherwise."""
        self._load()
        if name not in self._items:
            known = self.names()
            raise ConfigError(
                f"{self.key}: unknown {self.kind} '{name}'. Allowed: {', '.join(known)}.{did_you_mean(name, known)}"
            )
        return self._items[name]


METHODS: Registry[Any] = Registry("method", "pretrain.method", "pipeline.methods")
BACKBONES: Registry[Any] = Registry("backbone", "pretrain.backbone", "pipeline.models.catalog")
HEADS: Registry[Any] = Registry("head", "finetune.head", "pipeline.models.heads")
