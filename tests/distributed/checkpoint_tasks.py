"""Runs that are saved, stopped, and resumed elsewhere."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_sentinel as ls
from lightning_sentinel.pipeline.checkpoints import full as stage_files
from tests.distributed import tasks

SAMPLES = 48
"""Of which there are four batches in an epoch."""


class Augmented(Dataset[Any]):
    """Draws from every generator for every sample."""

    def __init__(self) -> None:
        self.samples = tasks.tokens()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.samples[index]
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return inputs + 0.1 * noise, label


class Noisy(tasks.Classifier):
    """Dropout, and a scheduler that follows a metric."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.net.insert(3, nn.Dropout(0.2))
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].clone())

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()["optimizer"]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=1, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "interval": "step", "monitor": "train_accuracy"}}


class SavesAt(L.Callback):
    """Saves before a batch, when all schedulers have followed the one before."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch
        self.received: set[str] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            receive = stage_files.receive_tree

            def counted(*arguments: Any) -> Any:
                packed = receive(*arguments)
                self.received |= {name for name in packed[1] if name.startswith("net.")}
                return packed

            stage_files.receive_tree = counted
            trainer.save_checkpoint(self.path)
            stage_files.receive_tree = receive


def not_a_number(signal: Tensor, context: ls.AttackContext) -> Tensor:
    return torch.full_like(signal, float("nan"))


def stopped_and_resumed(directory: str, state_dict_type: Any, attacked: bool) -> dict[str, Any]:
    """Eleven batches in one go, and the last six of them from a checkpoint in the middle of the first epoch."""
    path, found = Path(directory) / "at.ckpt", {}
    for name, source in (("unbroken", None), ("resumed", path)):
        strategy = ls.SentinelStrategy(
            2,
            2,
            micro_batches=2,
            timeout=tasks.PATIENCE,
            # Fences fitted to so few values flag something, which must be the same flags in both runs.
            verification=ls.Verification(warmup_steps=100 if attacked else 2, seed=0),
            response=ls.Response(audit_rate=None) if attacked else ls.Response(on_flag="log", ban_after=None),
            state_dict_type=state_dict_type,
        )
        attack = ls.AttackInjector(not_a_number, workers=[ls.Worker(1, 1)], start_step=1)
        saves = SavesAt(path, 7)
        module, read = Noisy(), []
        run = tasks.trainer(strategy, 4, 11, [*([attack] if attacked else []), *([] if source else [saves])])
        load = torch.load
        torch.load = lambda file, *args, load=load, read=read, **how: (read.append(str(file)), load(file, *args, **how))[1]
        run.fit(module, DataLoader(Augmented(), batch_size=6, shuffle=True), ckpt_path=source)
        torch.load = load
        found[name] = {
            "weights": tasks.local_weights(module),
            "seen": module.seen,
            "rates": [group["lr"] for group in run.optimizers[0].param_groups],
            "verifiers": strategy._run.guard.state_dict(),  # type: ignore[union-attr]
            "ledger": strategy.ledger.state_dict(),
            "banned": strategy.ledger.banned,
            "step": strategy.step,
            "received": saves.received,
            "read": [Path(file).name for file in read if str(path) in file],
        }
    return found


def go_on(legs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs one after the other, each on a mesh of its own.

    Args:
        legs: of each run its ``mesh``, ``optimizer``, last ``step``, stage of ``zero``, and what to load ``source`` and save
            ``target`` as ``form``.
    """
    found = []
    for leg in legs:
        stages, replicas = leg["mesh"]
        strategy = ls.SentinelStrategy(
            stages,
            replicas,
            micro_batches=3,
            timeout=tasks.PATIENCE,
            verification=None,
            state_dict_type=leg["form"],
            zero_stage=leg["zero"],
        )
        module = tasks.Classifier(leg["optimizer"])
        run = tasks.trainer(strategy, stages * replicas, leg["step"])
        run.fit(module, tasks.loader(12 // replicas, replicas, SAMPLES), ckpt_path=leg["source"])
        if leg["target"]:
            run.save_checkpoint(leg["target"])
        sizes = [p.numel() for p in module.parameters()]
        kept = [parameter.numel() for parameter in run.optimizers[0].state]
        found.append({"mesh": leg["mesh"], "zero": leg["zero"], "parameters": sizes, "kept": kept})
    return found


def go_on_alone(optimizer: str, step: int, source: str | Path | None = None, target: str | Path | None = None) -> dict[str, Any]:
    """The same in this process, without the plugin."""
    assert "WORLD_SIZE" not in os.environ
    module = tasks.Classifier(optimizer)
    run = tasks.trainer("auto", 1, step)
    run.fit(module, tasks.loader(12, samples=SAMPLES), ckpt_path=source)
    if target:
        run.save_checkpoint(target)
    return {"weights": tasks.local_weights(module)}


def evaluated(path: str) -> dict[str, float]:
    """A checkpoint for ``validate``, ``test`` and ``predict``."""

    class Evaluating(tasks.Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    alone = "WORLD_SIZE" not in os.environ
    found: dict[str, Any] = {}
    module = Evaluating()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    strategy: Any = "auto" if alone else ls.SentinelStrategy(2, 1, micro_batches=2, verification=None, timeout=tasks.PATIENCE)
    run = tasks.trainer(strategy, 1 if alone else 2, 1, limit_val_batches=1.0)
    found |= run.validate(module, tasks.loader(12), ckpt_path=path, verbose=False)[0]
    found |= run.test(module, tasks.loader(12), ckpt_path=path, verbose=False)[0]
    predictions = run.predict(module, tasks.loader(12), ckpt_path=path)
    assert predictions is not None
    return {**found, "predictions": float(torch.cat(predictions).double().pow(2).sum())}
