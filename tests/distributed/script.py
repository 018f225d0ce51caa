"""A training script as a user writes it, for Lightning's own launcher, torchrun and SLURM."""

from __future__ import annotations

import os
import sys

import lightning as L
from torch.utils.data import DataLoader

import lightning_sentinel  # noqa: F401 - registers the strategies
from tests.distributed.tasks import Classifier, tokens

if __name__ == "__main__":
    L.seed_everything(1)
    logger = L.pytorch.loggers.CSVLogger(sys.argv[1], version=0)
    trainer = L.Trainer(
        strategy="sentinel",
        accelerator="cpu",
        devices=int(os.environ["DEVICES"]),
        num_nodes=int(os.environ.get("NODES", "1")),
        max_epochs=1,
        limit_train_batches=4,
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    loader = DataLoader(tokens(), batch_size=6, shuffle=True)
    trainer.fit(Classifier("adamw"), loader, DataLoader(tokens(24), batch_size=6))
