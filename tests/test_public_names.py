from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import lightning_sentinel as ls

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ls.__all__)
def test_exists_and_is_documented(name: str) -> None:
    found = getattr(ls, name)
    doc = vars(found).get("__doc__") or ""
    assert len(doc.strip()) > 20
    # What dataclass writes where nobody wrote anything.
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("package", [ls.attacks, ls.metrics], ids=lambda package: package.__name__)
def test_names_of_subpackages(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        found = getattr(package, name)
        assert inspect.getdoc(found) or not (inspect.isclass(found) or inspect.isfunction(found)), name


def test_all_is_sorted_and_complete() -> None:
    assert ls.__all__ == sorted(ls.__all__, key=lambda name: (name.islower(), name))
    public = {
        name
        for name, value in vars(ls).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("lightning_sentinel")
    }
    assert public <= set(ls.__all__)


class TestContract:
    """The names in the design that exist so far, used the way it writes them."""

    def test_names(self) -> None:
        names = (
            "SentinelStrategy Verification Response AttackInjector AttackContext Worker Direction Detection SentinelError attacks"
            " metrics"
        )
        assert set(names.split()) <= set(ls.__all__)

    def test_metrics(self) -> None:
        names = "AnomalyScore DetectionPrecision DetectionRecall DetectionF1 FalsePositiveRate DetectionDelay"
        assert set(names.split()) <= set(ls.metrics.__all__)

    def test_arguments_of_the_strategy(self) -> None:
        parameters = list(inspect.signature(ls.SentinelStrategy).parameters)
        names = "stages replicas micro_batches verification response partition activation_checkpointing transport timeout"
        assert set(names.split()) <= set(parameters)
        assert parameters[:6] == names.split()[:6]

    def test_arguments_of_the_injector(self) -> None:
        parameters = list(inspect.signature(ls.AttackInjector).parameters)
        assert parameters[:4] == ["attacks", "workers", "fraction", "start_step"]
        assert "seed" in parameters

    def test_settings(self) -> None:
        names = "method warmup_steps window false_positive_rate beta_activation beta_gradient projections seed"
        assert set(names.split()) <= {field.name for field in fields(ls.Verification)}
        assert {"on_flag", "ban_after"} <= {field.name for field in fields(ls.Response)}

    def test_detection(self) -> None:
        names = "step micro_batch worker direction score feature audited confirmed"
        assert [field.name for field in fields(ls.Detection)] == names.split()

    def test_attack_context(self) -> None:
        names = "step micro_batch worker direction received generator"
        assert set(names.split()) <= set(dir(ls.AttackContext)) | {field.name for field in fields(ls.AttackContext)}

    def test_small_ones(self) -> None:
        worker = ls.Worker(1, 0)
        assert (worker.stage, worker.replica) == (1, 0)
        assert {ls.Direction.ACTIVATION, ls.Direction.GRADIENT} == set(ls.Direction)
        assert isinstance(ls.Ledger(None).banned, frozenset)
        assert ls.Ledger(None).flags is not None

    def test_attacks_by_name(self) -> None:
        assert "scale" in ls.attacks.available()
        attack = ls.attacks.get("scale", factor=-1.0)
        context = ls.AttackContext.seeded(0, ls.Worker(1, 0), ls.Direction.GRADIENT, step=0, micro_batch=0)
        assert attack(torch.ones(2), context).tolist() == [-1.0, -1.0]

    def test_hook(self) -> None:
        assert callable(ls.SentinelMonitor.on_sentinel_detection)


def test_importing_it_is_light() -> None:
    """DeepSpeed must not be imported before its accelerator is known, nor anything that is optional."""
    heavy = ("deepspeed", "pytorch_lightning", "transformers", "jsonargparse")
    # Lightning's own dependency torchmetrics imports transformers wherever it is installed: what Lightning brings does not count.
    code = (
        "import sys, lightning; before = set(sys.modules); import lightning_sentinel, lightning_sentinel.models;"
        f" print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
