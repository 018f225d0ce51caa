"""Refuses libraries that this package is not made for, with a plain explanation instead of an odd failure.

This module imports no library that may lack a name, because it has to explain that failure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from packaging.version import Version

from lightning_sentinel.errors import ConfigurationError, UnsupportedVersionError

__all__ = ["LEAST_VERSIONS", "register_refusals", "require_versions"]

LEAST_VERSIONS = {"lightning": "2.6", "torch": "2.4", "torchmetrics": "1.6", "deepspeed": "0.19"}
"""The least versions of the libraries that this package builds on, as in its requirements."""

_OTHER = "pytorch_lightning"
"""Another package than ``lightning``, with classes of its own."""


def require_versions() -> None:
    """Raise ``UnsupportedVersionError`` if a library is older than this package needs."""
    for package, least in LEAST_VERSIONS.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue  # the user's own build, or not installed, which its import reports
        if Version(installed).release < Version(least).release:
            raise UnsupportedVersionError(
                f"lightning_sentinel needs {package} {least} or later, and {package} {installed} is installed. Install a later one:"
                f" pip install -U '{package}>={least}'"
            )


def register_refusals(names: Iterable[str]) -> None:
    """Let ``pytorch_lightning.Trainer(strategy=name)`` explain why it cannot work, whenever that package is imported."""
    if _OTHER in sys.modules:
        _register(names)
    else:
        sys.meta_path.insert(0, _Awaiting(tuple(names)))


def _register(names: Iterable[str]) -> None:
    from pytorch_lightning.strategies import StrategyRegistry

    for name in names:
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _refuse, description="for the package lightning only")


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ConfigurationError(
        "lightning_sentinel is a plugin of the package `lightning`, but this Trainer comes from `pytorch_lightning`, whose classes"
        " are different ones. Replace `import pytorch_lightning as pl` by `import lightning as L`, for the Trainer and for every"
        " module."
    )


class _Awaiting(MetaPathFinder):
    """Finds the other package by the usual finders, once, and registers the refusals when it has been imported."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _OTHER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self._names)
        return spec


class _Telling(Loader):
    def __init__(self, loader: Loader, names: tuple[str, ...]) -> None:
        self._loader = loader
        self._names = names

    def __getattr__(self, name: str) -> Any:
        # For callers that ask the module's loader for its source or its data.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(self._names)
