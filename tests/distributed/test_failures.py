"""A rank that fails, dies or hangs ends the run on all ranks within the timeout, and they say which it was."""

from __future__ import annotations

import os
import re
import signal
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
from torch import Tensor, nn

import lightning_sentinel as ls
from tests.distributed import tasks, world

PATIENCE = timedelta(seconds=6)


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


class Listing(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class Narrow(nn.Module):
    """Its output is too narrow for the layer behind it, in another process."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :5]


class Ends(L.Callback):
    """Kills or stops one rank in the middle of the run."""

    def __init__(self, how: signal.Signals) -> None:
        self.how = how

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == 3:
            os.kill(os.getpid(), self.how)


def strategy(**options: Any) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(stages=2, replicas=2, micro_batches=2, timeout=PATIENCE, **options)


def fit_returning(layer: type[nn.Module]) -> None:
    module = tasks.Classifier()
    module.net = nn.Sequential(nn.Linear(tasks.FEATURES, 8), layer(), nn.Linear(8, tasks.CLASSES))
    # Two layers of eight and more parameters each side of the cut: the odd one ends the first stage.
    tasks.trainer(strategy(partition="uniform"), 4, 2).fit(module, tasks.loader(4, 2))


def fit_and_lose(how: signal.Signals) -> None:
    tasks.trainer(strategy(), 4, 6, [Ends(how)]).fit(tasks.Classifier(), tasks.loader(4, 2))


def fit_two_optimizers() -> None:
    module = tasks.Classifier()
    two = [module.configure_optimizers()["optimizer"] for _ in range(2)]
    module.configure_optimizers = lambda: two  # type: ignore[method-assign]
    tasks.trainer(strategy(), 4, 2).fit(module, tasks.loader(4, 2))


@pytest.mark.parametrize(("layer", "what"), [(Dictionary, "dict"), (Listing, "list")])
def test_a_layer_that_returns_no_tensor_is_named_on_all_ranks(layer: type[nn.Module], what: str) -> None:
    results, failures = world.outcomes(fit_returning, 4, layer)
    assert not results
    assert len(failures) == 4
    for rank in (2, 3):
        assert failures[rank].kind == "PipelineModelError"
        assert f"Layer net.1, the last of stage 0, returned {what}" in failures[rank].message
    for rank in (0, 1):
        assert failures[rank].kind == "WorkerLostError"
        assert "rank 2, worker (stage 0, replica 0)" in failures[rank].message or "rank 3" in failures[rank].message


def test_a_layer_that_does_not_fit_is_the_last_that_everybody_says() -> None:
    results, failures = world.outcomes(fit_returning, 4, Narrow)
    assert not results
    assert len(failures) == 4
    where = r"in layer net\.2 \(Linear\) of stage 1, which was given torch\.float32 of shape \(2, 6, 5\)"
    for rank in (0, 1):
        assert failures[rank].kind == "RuntimeError"
        assert re.search(rf"mat1 and mat2 shapes cannot be multiplied.*\n{where}\n$", failures[rank].trace)
    for rank in (2, 3):
        said = failures[rank].message
        assert failures[rank].kind == "WorkerLostError"
        assert re.search(rf"rank [01], worker \(stage 1, replica [01]\), failed {where} with RuntimeError: mat1 and mat2", said)
        assert "Mend that first" in said and "last checkpoint" not in said
        # The cause comes last, and what the connection said of it does not come at all.
        assert re.search(rf"RuntimeError: mat1 and mat2 shapes cannot be multiplied.*\n{where}$", said)
        assert failures[rank].trace.rstrip().endswith(said)
        assert "Traceback" not in failures[rank].trace[10:]


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (fit_two_optimizers, "ConfigurationError", "more than one optimizer"),
    ],
)
def test_bad_input_is_said_on_every_rank(task: Any, kind: str, message: str) -> None:
    results, failures = world.outcomes(task, 4)
    assert not results
    assert {failure.kind for failure in failures.values()} == {kind}
    assert len(failures) == 4
    assert all(message in failure.message for failure in failures.values())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_by_the_others_within_the_timeout(how: signal.Signals) -> None:
    results, failures = world.outcomes(fit_and_lose, 4, how, timeout=40, answers=3)
    assert not results
    assert set(failures) == {0, 1, 2}, "rank 3 was lost"
    for failure in failures.values():
        assert failure.kind == "WorkerLostError"
        assert "rank 3, worker (stage 0, replica 1)" in failure.message, failure.message
