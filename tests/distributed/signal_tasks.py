"""Runs that are sent signals in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor, nn

import lightning_sentinel as ls
from lightning_sentinel.pipeline.processes.wire import Wire
from lightning_sentinel.strategy import signals
from tests.distributed import tasks


class Signalled(nn.Module):
    """A layer that sends its process a signal when it is called for the nth time; ``calls`` says by rank when that is."""

    def __init__(self, number: signal.Signals, calls: dict[int, int]) -> None:
        super().__init__()
        self.number, self.calls, self.called = number, calls, 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        if self.called == self.calls.get(int(os.environ["LOCAL_RANK"])):
            os.kill(os.getpid(), self.number)
        return x.clone()


def classifier(number: signal.Signals, calls: dict[int, int]) -> tasks.Classifier:
    module = tasks.Classifier()
    # One in each stage.
    module.net.insert(1, Signalled(number, calls))
    module.net.insert(len(module.net) - 1, Signalled(number, calls))
    return module


def fit(module: tasks.Classifier, folder: str, ckpt_path: str | None = None, callbacks: Sequence[L.Callback] = ()) -> None:
    strategy = ls.SentinelStrategy(2, 2, micro_batches=2, verification=None, timeout=tasks.PATIENCE)
    options = {"default_root_dir": folder, "plugins": [SLURMEnvironment()], "enable_checkpointing": bool(callbacks)}
    tasks.trainer(strategy, 4, 8, callbacks, **options).fit(module, tasks.loader(4, 2), ckpt_path=ckpt_path)


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The collectives that signals have for themselves."""
    found, all_reduce = [], Wire.all_reduce

    def noted(*args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_code.co_filename == signals.__file__:
            found.append(args)
        return all_reduce(*args, **options)

    with patch.object(Wire, "all_reduce", noted):
        yield found


def requeued_and_ended(folder: str) -> dict[str, Any]:
    """SIGUSR1 reaches ranks in the middle of different steps; then a run that goes on from there; then SIGTERM reaches one rank."""
    rank = os.environ["LOCAL_RANK"]
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_JOB_ID": "17"}
    os.environ |= {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    unbroken = classifier(signal.SIGUSR1, {})
    fit(unbroken, folder)
    # By micro-batch: in the third step of all, but for a rank that gets it in the fourth.
    module = classifier(signal.SIGUSR1, {0: 5, 1: 6, 2: 7, 3: 5})
    with counted() as agreements:
        fit(module, folder)
    resumed = classifier(signal.SIGUSR1, {})
    fit(resumed, folder, ckpt_path="hpc")
    ended = ""
    saves = [OnExceptionCheckpoint(folder, "ended")]
    try:
        fit(classifier(signal.SIGTERM, {2: 5}), f"{folder}/elsewhere", callbacks=saves)
    except SystemExit as exception:
        ended = type(exception).__name__
    found = {"unbroken": unbroken, "signalled": module, "resumed": resumed}
    return {name: tasks.local_weights(one) for name, one in found.items()} | {
        "ended": ended,
        "agreements": len(agreements),
        "files": sorted(path.name for path in Path(folder).glob("*.ckpt")),
    }


class Saving(tasks.Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            self.trainer.save_checkpoint("here.ckpt")
        return loss


def saved_in_a_step() -> None:
    strategy = ls.SentinelStrategy(2, 1, micro_batches=2, verification=None, timeout=tasks.PATIENCE)
    tasks.trainer(strategy, 2, 4).fit(Saving(), tasks.loader(4))
