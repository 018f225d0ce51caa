"""A rank may end or stop at any point of a step: the others end and name it, and what was saved is whole steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_sentinel as ls
from tests.distributed import tasks, world

PATIENCE = timedelta(seconds=6)
STEPS, STEP = 3, 1
"""Of the run, and in which it happens."""
LOST = 1

POINTS: dict[str, tuple[str, int, bool]] = {
    # What is called, for the how-manieth time in the step, and whether the rank ends after the call instead of before it.
    "before the first message": ("_run.engine._boundaries._inbox.activation", 1, False),
    "in the middle of the schedule": ("_run.engine._boundaries._transport.send", 2, False),
    "after the last message": ("_run.engine._boundaries._transport.finish_notes", 1, True),
    "before scores are exchanged": ("_run.engine._exchange.run", 1, False),
    "after scores were exchanged": ("_run.engine._exchange.run", 1, True),
    "before gradients are reduced": ("_run.engine.gradients.reduce", 1, False),
    "after gradients were reduced": ("_run.engine.gradients.reduce", 1, True),
    "after gradients were clipped": ("_run.engine.gradients.clip", 1, True),
    "after the optimizer's step": ("_run.engine.gradients.apply", 1, True),
    "while the checkpoint is collected": ("lightning_module_state_dict", 1, False),
}


class EndsAt(L.Callback):
    def __init__(self, point: str, how: signal.Signals) -> None:
        self.point, self.how = point, how

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEP and trainer.global_rank == LOST:
            path, count, afterwards = POINTS[self.point]
            *owners, name = path.split(".")
            owner: Any = trainer.strategy
            for each in owners:
                owner = getattr(owner, each)
            # Of the instance; a module's own __setattr__ has nothing to do with it.
            vars(owner)[name] = self.ending(getattr(owner, name), count, afterwards)

    def ending(self, call: Callable[..., Any], count: int, afterwards: bool) -> Callable[..., Any]:
        left = iter(range(count - 1))

        def instead(*args: Any, **kwargs: Any) -> Any:
            now = next(left, None) is None
            result = call(*args, **kwargs) if afterwards or not now else None
            if now:
                os.kill(os.getpid(), self.how)
            return result

        return instead


def fit(directory: Path, point: str | None, how: signal.Signals = signal.SIGKILL) -> None:
    strategy = ls.SentinelStrategy(stages=2, replicas=2, micro_batches=2, timeout=PATIENCE)
    every_step = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [every_step, *([EndsAt(point, how)] if point is not None else [])]
    options = {"enable_checkpointing": True, "gradient_clip_val": 0.5}
    tasks.trainer(strategy, 4, STEPS, callbacks, **options).fit(tasks.Classifier("adamw"), tasks.loader(4, 2))


def saved(directory: Path) -> dict[int, Any]:
    files = {int(path.stem.removeprefix("step=")): path for path in directory.glob("*.ckpt")}
    return {step: torch.load(path, weights_only=True) for step, path in sorted(files.items())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    directory = tmp_path_factory.mktemp("undisturbed")
    world.run(fit, 4, directory, None)
    return saved(directory)


def require_whole_steps(found: dict[int, Any], undisturbed: dict[int, Any]) -> None:
    for step, checkpoint in found.items():
        assert checkpoint["global_step"] == step
        torch.testing.assert_close(checkpoint["state_dict"], undisturbed[step]["state_dict"], atol=0, rtol=0)
        states, others = (one["optimizer_states"][0]["state"] for one in (checkpoint, undisturbed[step]))
        torch.testing.assert_close(states, others, atol=0, rtol=0)


CASES = [(point, signal.SIGKILL) for point in POINTS]
CASES += [(point, signal.SIGSTOP) for point in ("in the middle of the schedule", "after gradients were reduced")]


@pytest.mark.parametrize(("point", "how"), CASES, ids=[f"{how.name} {point}" for point, how in CASES])
def test_a_step_is_applied_by_all_or_lost(point: str, how: signal.Signals, tmp_path: Path, undisturbed: dict[int, Any]) -> None:
    results, failures = world.outcomes(fit, 4, tmp_path, point, how, timeout=40, answers=3)
    assert not results
    assert set(failures) == {0, 2, 3}
    for failure in failures.values():
        assert failure.kind == "WorkerLostError", failure.trace
        assert f"rank {LOST}, worker (stage 1, replica 1)" in failure.message, failure.message
    found = saved(tmp_path)
    assert set(found) == set(range(1, STEP + 1)), "the step in which it happened was not saved"
    require_whole_steps(found, undisturbed)
