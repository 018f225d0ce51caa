"""Runs with Lightning's callbacks that average weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

import lightning_sentinel as ls
from tests.distributed import tasks

CALLBACKS: dict[str, Any] = {
    "mean": lambda: WeightAveraging(),
    "moving": lambda: EMAWeightAveraging(decay=0.7),
    "late": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
}


class Module(tasks.Classifier):
    """Decays by epoch, which the callback for late epochs asks for."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def train(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs one after the other; in a process of its own without the plugin.

    Args:
        runs: of each the name of its ``callback``, its ``mesh`` and ``epochs``, and of its checkpoints ``form``, ``source`` and
            ``target``.
    """
    alone, found = "WORLD_SIZE" not in os.environ, []
    for run in runs:
        stages, replicas = (1, 1) if alone else run["mesh"]
        strategy: Any = "auto"
        if not alone:
            strategy = ls.SentinelStrategy(
                stages, replicas, micro_batches=3, verification=None, state_dict_type=run["form"], timeout=tasks.PATIENCE
            )
        module, devices = Module(), stages * replicas
        options: dict[str, Any] = {"max_epochs": run["epochs"], "limit_train_batches": 4, "limit_val_batches": 2}
        trainer: L.Trainer = tasks.trainer(strategy, devices, -1, [CALLBACKS[run["callback"]]()], **options)
        data = tasks.loader(12 // replicas, replicas)
        trainer.fit(module, data, data, ckpt_path=run["source"])
        trainer.save_checkpoint(Path(run["target"]))
        found.append({"weights": tasks.local_weights(module), "loss": float(trainer.callback_metrics["val_loss"])})
    return found
