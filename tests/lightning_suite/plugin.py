"""A pytest plugin under which a ``Trainer`` that names no strategy uses ours: to run Lightning's own tests with it.

``run.py`` uses it. What a test does is written to the file that ``LIGHTNING_SUITE_RESULTS`` names, a line of JSON a test.
``LIGHTNING_SUITE_STRATEGY=auto`` leaves the strategy alone.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

import lightning_sentinel as ls

_ALONE = (None, "auto", 1, "1", -1)
_ran = False


def _layers(module: L.LightningModule) -> list[nn.Module]:
    """Tests' modules do not say what their layers are: the layer that ``BoringModel`` calls, or the only child with parameters.

    Of others nothing is said, and they are run whole.
    """
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if type(module).forward is BoringModel.forward and isinstance(getattr(module, "layer", None), nn.Module):
        children = [module.layer]
    return children if len(children) == 1 else []


class _Strategy(ls.SentinelStrategy):
    def _make_engine(self, *arguments: Any) -> Any:
        global _ran
        _ran = True
        return super()._make_engine(*arguments)

    def _cut(self) -> Any:
        layers = _layers(self.lightning_module)
        with ExitStack() as stack:
            if layers:
                # Of the instance, and no longer than it is asked for, because tests compile modules, and look at what they have.
                vars(self.lightning_module)["configure_pipeline"] = lambda: layers
                stack.callback(vars(self.lightning_module).pop, "configure_pipeline")
            return super()._cut()


def pytest_configure(config: pytest.Config) -> None:
    # Which a run sets, and Lightning's tests watch for variables that are left behind.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("LIGHTNING_SUITE_STRATEGY") == "auto":
        return
    make = L.Trainer.__init__

    @functools.wraps(make)
    def with_strategy(self: L.Trainer, *arguments: Any, **options: Any) -> None:
        devices = os.environ.get("PL_TRAINER_DEVICES", options.get("devices", "auto"))
        alone = options.get("strategy", "auto") == "auto" and devices in _ALONE
        if alone and options.get("accelerator", "auto") in ("auto", "cpu") and options.get("num_nodes", 1) == 1:
            options["strategy"] = _Strategy(stages=1, replicas=1, micro_batches=1, engine="virtual", verification=None)
            options["accelerator"] = "cpu"
            options["devices"] = 1
        make(self, *arguments, **options)

    L.Trainer.__init__ = with_strategy  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    global _ran
    report = yield
    if call.when == "setup":
        _ran = False
    if call.when == "call" or report.outcome != "passed":
        error = call.excinfo
        row = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "ran": _ran,
            "kind": None if error is None else error.type.__name__,
            "refused": error is not None and issubclass(error.type, ls.SentinelError),
            "says": "" if error is None else str(error.value)[:400],
        }
        with open(os.environ["LIGHTNING_SUITE_RESULTS"], "a") as file:
            file.write(json.dumps(row) + "\n")
    return report
