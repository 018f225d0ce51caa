"""What a run leaves behind: nothing that grows with the number of runs."""

from __future__ import annotations

import gc

import torch

import lightning_sentinel as ls
from tests.distributed import tasks, world


def rounds() -> tuple[list[int], list[int], list[int]]:
    """Engines, optimizers and hooks that there are after each of several runs, while the module lives on."""
    from lightning_sentinel.pipeline.engine import SentinelEngine

    module = tasks.Classifier("adamw")
    engines, optimizers, hooks = [], [], []
    for _ in range(2):
        strategy = ls.SentinelStrategy(1, 1, verification=None, timeout=tasks.PATIENCE)
        run = tasks.trainer(strategy, 1, 1, limit_val_batches=1)
        for method in (run.fit, run.validate):
            method(module, tasks.loader(16))
            gc.collect()
            alive = gc.get_objects()
            engines.append(sum(type(one) is SentinelEngine for one in alive))
            optimizers.append(sum(isinstance(one, torch.optim.Optimizer) for one in alive))
            parts = strategy._stage.model.pipeline.modules()  # type: ignore[union-attr]
            hooks.append(sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts))
            del alive
    return engines, optimizers, hooks


def test_no_engine_outlives_its_run() -> None:
    ((engines, optimizers, hooks),) = world.run(rounds, 1)
    assert engines == [0, 0, 0, 0]
    assert hooks == [0, 0, 0, 0]
    # That of the last Trainer, which the module knows, in Lightning's wrapper: a checkpoint that is saved after the run needs it.
    assert optimizers == [2, 2, 2, 2]
