"""A training script for ``torchrun`` with restarts: goes on from the last checkpoint on whatever machines are left."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from tests.distributed.tasks import Classifier, tokens


class Dies(L.Callback):
    """Once in the test: the agent of this rank is killed, and the rank with it, like a machine that loses its power."""

    def __init__(self, rank: int, step: int, mark: Path) -> None:
        self.rank, self.step, self.mark = rank, step, mark

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)  # in a session of its own


if __name__ == "__main__":
    directory, dying = Path(sys.argv[1]), int(sys.argv[2])
    last = directory / "last.ckpt"
    L.seed_everything(1)
    trainer = L.Trainer(
        strategy=ls.SentinelStrategy(stages=2, micro_batches=2, timeout=timedelta(seconds=15)),
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        callbacks=[
            ModelCheckpoint(directory, filename="last", save_top_k=-1, enable_version_counter=False),
            Dies(dying, 13, directory / "died"),
        ],
    )
    module = Classifier("adamw")
    print(f"begins with {trainer.world_size} processes from {'the last checkpoint' if last.exists() else 'nothing'}", flush=True)
    trainer.fit(module, DataLoader(tokens(), batch_size=6, shuffle=True), ckpt_path=last if last.exists() else None)
    print(f"ends at epoch {trainer.current_epoch} on {trainer.strategy.mesh}", flush=True)
