from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Worker

LIAR = Worker(1, 0)


@pytest.fixture
def module() -> L.LightningModule:
    return L.LightningModule()


def run(stages: int = 3, replicas: int = 4, **options: Any) -> Any:
    """A Trainer as far as the callback looks at it: a strategy whose mesh is known."""
    strategy = ls.SentinelStrategy(stages=stages, replicas=replicas, **options)
    strategy.cluster_environment = SimpleNamespace(world_size=lambda: stages * replicas, global_rank=lambda: 0)  # type: ignore[assignment]
    return SimpleNamespace(strategy=strategy)


def test_it_needs_a_pipeline(module: L.LightningModule) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ConfigurationError, match=r"the Trainer uses SingleDeviceStrategy\. Use Trainer\(strategy='sentinel'\)"):
        ls.AttackInjector("zeros", workers=[LIAR]).setup(trainer, module, "fit")


@pytest.mark.parametrize("workers", [[LIAR], [(1, 0)], ((1, 0),), [[1, 0]]], ids=["worker", "pair", "tuple", "list"])
def test_named_workers_are_known_before_the_run(workers: Any, module: L.LightningModule) -> None:
    injector = ls.AttackInjector("zeros", workers=workers)
    assert injector.workers == {LIAR}
    injector.setup(run(), module, "fit")
    assert injector.workers == {LIAR}


def test_drawn_workers_are_known_from_the_start_of_the_run(module: L.LightningModule) -> None:
    injectors = [ls.AttackInjector("zeros", fraction=0.5, seed=3) for _ in range(2)]
    for injector in injectors:
        assert injector.workers == frozenset()
        injector.setup(run(), module, "fit")
    assert {worker.stage for worker in injectors[0].workers} == {1}
    assert len(injectors[0].workers) == 2
    assert injectors[0].workers == injectors[1].workers


class TestStart:
    def test_after_the_warm_up(self, module: L.LightningModule) -> None:
        injector = ls.AttackInjector("zeros", workers=[LIAR])
        assert injector.start_step is None
        injector.setup(run(verification=ls.Verification(warmup_steps=17)), module, "fit")
        assert injector.start_step == 17

    def test_at_once_where_nothing_is_verified(self, module: L.LightningModule) -> None:
        injector = ls.AttackInjector("zeros", workers=[LIAR])
        injector.setup(run(verification=None), module, "fit")
        assert injector.start_step == 0

    @pytest.mark.parametrize("start", [0, 5])
    def test_when_told(self, start: int, module: L.LightningModule) -> None:
        injector = ls.AttackInjector("zeros", workers=[LIAR], start_step=start)
        assert injector.start_step == start
        injector.setup(run(), module, "fit")
        assert injector.start_step == start


def test_the_adversary_does_what_was_asked_for(module: L.LightningModule) -> None:
    trainer = run()
    injector = ls.AttackInjector({"name": "scale", "factor": -2.0}, workers=[LIAR], start_step=3, direction="gradient")
    injector.setup(trainer, module, "fit")
    adversary, signal = trainer.strategy.adversary, torch.ones(2)
    assert adversary.tamper(signal, LIAR, Direction.GRADIENT, 3, 0).tolist() == [-2.0, -2.0]
    for worker, direction, step in (
        (LIAR, Direction.GRADIENT, 2),
        (LIAR, Direction.ACTIVATION, 3),
        (Worker(1, 1), Direction.GRADIENT, 3),
    ):
        assert adversary.tamper(signal, worker, direction, step, 0) is signal


def test_it_stays_the_same_adversary_over_stages_of_a_run(module: L.LightningModule) -> None:
    trainer, injector = run(), ls.AttackInjector("delay", workers=[LIAR])
    injector.setup(trainer, module, "fit")
    first = trainer.strategy.adversary
    injector.setup(trainer, module, "validate")
    assert trainer.strategy.adversary is first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attacks": "zeroes", "workers": [LIAR]}, "zeroes"),
        ({"attacks": "zeros", "workers": [(3, 0)]}, r"worker \(stage 3, replica 0\) is not in the mesh"),
        ({"attacks": "zeros"}, "exactly one"),
        ({"attacks": "zeros", "workers": [LIAR], "fraction": 0.5}, "exactly one"),
    ],
    ids=["attack", "worker", "nobody", "both"],
)
def test_errors_at_the_start_of_the_run(arguments: dict[str, Any], says: str, module: L.LightningModule) -> None:
    with pytest.raises(ConfigurationError, match=says):
        ls.AttackInjector(**arguments).setup(run(), module, "fit")
