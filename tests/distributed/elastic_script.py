"""A training script for ``torchrun`` with restarts: goes on from the last checkpoint on whatever machines are left."""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from lightning_sentinel.pipeline.messages.headers import MessageId, encode
from tests.distributed.tasks import Classifier, tokens

FAULT_STEP = 6
"""In the second epoch of two replicas."""


def host() -> str | None:
    return os.environ.get("LIGHTNING_SENTINEL_HOST")


class Fails(L.Callback):
    """Once in the test something happens on a machine: to the last of its processes."""

    def __init__(self, fault: str, where: str, step: int, mark: Path) -> None:
        self.fault, self.where, self.step, self.mark = fault, where, step, mark

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (
            trainer.local_rank == trainer.num_devices - 1
            and host() == self.where
            and trainer.global_step == self.step
            and not self.mark.exists()
        ):
            self.mark.touch()
            getattr(self, self.fault)(trainer)

    @staticmethod
    def machine(trainer: L.Trainer) -> None:
        """The agent is killed, and the process with it, as when the power goes."""
        os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
        Fails.process(trainer)  # in a session of its own

    @staticmethod
    def process(trainer: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def message(trainer: L.Trainer) -> None:
        """Its next message is a header that announces more than fits anywhere, with nothing behind it."""

        def send(signal: Tensor, tainted: Tensor, rank: int, place: MessageId, *_: Any) -> None:
            dist.send(encode(place, (2**31, 2**31), signal.dtype), rank)

        trainer.strategy._run.engine._boundaries._transport.send = send


class Lies(L.Callback):
    """The last process of a machine sends what is no number, wherever it sits in the mesh."""

    def __init__(self, where: str) -> None:
        self.where = where

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        ours: Any = trainer.strategy
        theirs = [worker for worker in ours.mesh.workers if ours.ledger.hosts.get(worker) == self.where]
        if theirs:
            ls.AttackInjector(nan, workers=theirs[-1:], start_step=2).setup(trainer, pl_module, stage)


def nan(signal: Tensor, context: Any) -> Tensor:
    return torch.full_like(signal, torch.nan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("fault", choices=["machine", "process", "message"])
    parser.add_argument("where")
    parser.add_argument("--liar")
    parser.add_argument("--ledger", type=Path)
    given = parser.parse_args()
    last = given.directory / "last.ckpt"
    callbacks: list[L.Callback] = [
        ModelCheckpoint(given.directory, filename="last", save_top_k=-1, enable_version_counter=False),
        Fails(given.fault, given.where, FAULT_STEP, given.directory / "failed"),
    ]
    if given.liar is not None:
        callbacks.append(Lies(given.liar))
    response = ls.Response(ban_after=1, audit_rate=None, ledger=given.ledger)
    L.seed_everything(1)
    trainer = L.Trainer(
        strategy=ls.SentinelStrategy(stages=2, micro_batches=2, response=response, timeout=timedelta(seconds=15)),
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    module = Classifier("adamw")
    print(f"begins with {trainer.world_size} processes from {'the last checkpoint' if last.exists() else 'nothing'}", flush=True)
    trainer.fit(module, DataLoader(tokens(48), batch_size=6, shuffle=True), ckpt_path=last if last.exists() else None)
    print(f"ends at epoch {trainer.current_epoch} on {trainer.strategy.mesh}", flush=True)
