"""Runs with callbacks of Lightning that change what is trained, how fast, or for how long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, LearningRateFinder, Timer

import lightning_sentinel as ls
from tests.distributed import tasks


class Module(tasks.Classifier):
    lr = 0.2

    def __init__(self, leaves_out: int | None) -> None:
        super().__init__()
        self.leaves_out = leaves_out

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.leaves_out else None  # and what is left of the epoch


class Unfreezing(BaseFinetuning):
    """The first layer is trained from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


class Clock(Timer):
    """Runs out after three steps by the clock of rank zero, and never by those of others."""

    trainer: L.Trainer

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def time_elapsed(self, stage: Any = "train") -> float:
        return 10.0 if self.trainer.global_rank == 0 and self.trainer.global_step >= 3 else 0.0


CALLBACKS: dict[str, Any] = {
    "unfreezing": Unfreezing,
    "accumulation": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
    "finder": lambda: LearningRateFinder(num_training_steps=16, min_lr=0.01, max_lr=0.2, early_stop_threshold=None),
    "clock": lambda: Clock(duration={"seconds": 5}),
}


def train(names: list[str], directory: str) -> list[dict[str, Any]]:
    """A run with each callback and a checkpoint of it; in a process of its own without the plugin."""
    alone, found = "WORLD_SIZE" not in os.environ, []
    for name in names:
        strategy: Any = "auto" if alone else ls.SentinelStrategy(2, 2, micro_batches=3, verification=None, timeout=tasks.PATIENCE)
        module, replicas = Module(leaves_out=None if name == "finder" else 5), 1 if alone else 2
        run = tasks.trainer(strategy, 1 if alone else 4, -1, [CALLBACKS[name]()], max_epochs=2)
        run.fit(module, tasks.loader(12 // replicas, replicas))
        run.save_checkpoint(Path(directory) / f"{name}.ckpt")
        found.append({"weights": tasks.local_weights(module), "steps": run.global_step})
    return found
