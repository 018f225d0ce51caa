"""Libraries that are not the ones that the package is made for."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lightning_sentinel as ls
from lightning_sentinel import compat
from lightning_sentinel.compat import LEAST_VERSIONS, register_refusals, require_versions
from lightning_sentinel.errors import ConfigurationError, UnsupportedVersionError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", LEAST_VERSIONS)
def test_an_older_library_is_named_with_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    least = LEAST_VERSIONS[package]
    monkeypatch.setattr(compat, "version", lambda name: "0.0.9" if name == package else importlib.metadata.version(name))
    says = rf"needs {package} {least} or later, and {package} 0\.0\.9 is installed.*pip install -U '{package}>={least}'"
    with pytest.raises(UnsupportedVersionError, match=says):
        require_versions()


@pytest.mark.parametrize("installed", ["99.1", "99.0.0rc1+cu130"])
def test_a_later_one_or_one_of_ones_own_is_tried(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: installed)
    require_versions()

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", unknown)
    require_versions()


def test_versions_are_those_of_the_requirements() -> None:
    requirements = (ROOT / "pyproject.toml").read_text()
    for package, least in LEAST_VERSIONS.items():
        assert re.search(rf'"{package}>={re.escape(least)}[",]', requirements), package


def test_they_are_looked_at_before_a_name_can_be_missing() -> None:
    """The cause is said, and not `cannot import name`."""
    script = """
import importlib.metadata as metadata, sys
real = metadata.version
metadata.version = lambda name: "2.4.0" if name == "lightning" else real(name)
sys.modules["lightning.pytorch.strategies"] = None
import lightning_sentinel
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].endswith("pip install -U 'lightning>=2.6'")


class TestTheOtherPackage:
    @pytest.fixture
    def other(self) -> Iterator[ModuleType]:
        package = importlib.import_module("pytorch_lightning")
        registry = importlib.import_module("pytorch_lightning.strategies").StrategyRegistry
        before = dict(registry)
        yield package
        registry.clear()
        registry.update(before)

    @pytest.mark.parametrize("name", ["sentinel", "sentinel_monitor", "sentinel_virtual"])
    def test_refused_in_words_when_it_is_imported_first(self, other: ModuleType, name: str) -> None:
        register_refusals([name])
        register_refusals([name])
        with pytest.raises(ConfigurationError) as raised:
            other.Trainer(strategy=name, accelerator="cpu", devices=2)
        message = str(raised.value)
        assert "plugin of the package `lightning`" in message
        assert "comes from `pytorch_lightning`" in message
        assert "import lightning as L" in message

    def test_a_strategy_of_ours_says_whose_it_is(self, other: ModuleType) -> None:
        with pytest.raises(ValueError, match="for the package `lightning` and not for `pytorch_lightning`"):
            other.Trainer(strategy=ls.SentinelStrategy(), accelerator="cpu", devices=2)

    def test_refused_in_words_when_it_is_imported_later(self) -> None:
        script = """
import sys
import lightning_sentinel
assert "pytorch_lightning" not in sys.modules
import pytorch_lightning, inspect
assert "LightningModule" in inspect.getsource(pytorch_lightning)
pytorch_lightning.Trainer(strategy="sentinel", accelerator="cpu", devices=2)
"""
        ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert "comes from `pytorch_lightning`" in ended.stderr.splitlines()[-1]
