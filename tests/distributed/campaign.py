"""One honest warm-up, then a run for each attack that goes on from it: how the detection tests and their clean run are made."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_sentinel as ls
from lightning_sentinel.models import llama
from tests.distributed.tasks import PATIENCE, trainer

STAGES, REPLICAS, MICRO_BATCHES, WARMUP = 3, 3, 4, 60
GUILTY = ls.Worker(1, 2)
LENGTH = 32


def windows(start: int, stop: int) -> TensorDataset:
    """Byte windows of a text that every machine has."""
    data = torch.tensor(list(inspect.getsource(argparse).encode()[:64_000]))
    pieces = data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))][start:stop]
    return TensorDataset(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())


class Text(L.LightningDataModule):
    def __init__(self, replica: int, seed: int = 0, batch_size: int = 16) -> None:
        super().__init__()
        self.replica, self.seed, self.batch_size = replica, seed, batch_size

    def _loader(self, data: TensorDataset, shuffle: bool, batch_size: int) -> DataLoader[Any]:
        sampler = DistributedSampler(data, REPLICAS, self.replica, shuffle=shuffle, seed=self.seed)
        return DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(windows(0, 1700), True, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(windows(1700, 1892), False, 64)


class Model(L.LightningModule):
    def __init__(self, seed: int, total: int) -> None:
        super().__init__()
        self.total = total
        torch.manual_seed(seed)
        self.net = llama(vocab_size=128, width=32, depth=4, heads=4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / self.total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def strategy(method: str) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(
        stages=STAGES,
        replicas=REPLICAS,
        micro_batches=MICRO_BATCHES,
        timeout=PATIENCE,
        verification=ls.Verification(method=method, warmup_steps=WARMUP),  # type: ignore[arg-type]
    )


def run(directory: str, attacks: dict[str, tuple[str, Any]], method: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """Warm up, then attack.

    Args:
        directory: shared by all ranks, for the checkpoint after the warm-up.
        attacks: name to (direction, attack); the clean run is added as ``"clean"``.
        steps: after the warm-up.
    """
    import os

    replica = int(os.environ["LOCAL_RANK"]) % REPLICAS
    warm = Path(directory) / "warm.ckpt"
    first = trainer(strategy(method), STAGES * REPLICAS, WARMUP)
    first.fit(Model(seed, WARMUP + steps), Text(replica, seed))
    first.save_checkpoint(warm)
    results = {}
    for name, (direction, attack) in {"clean": ("both", None), **attacks}.items():
        injector = [] if attack is None else [ls.AttackInjector(attack, workers=[GUILTY], direction=direction, start_step=WARMUP)]  # type: ignore[arg-type]
        ours, module = strategy(method), Model(seed, WARMUP + steps)
        second = trainer(ours, STAGES * REPLICAS, WARMUP + steps, injector)
        second.fit(module, Text(replica, seed), ckpt_path=warm)
        # By a strategy that has banned nobody, so that all runs are judged on the same samples.
        judge = trainer(strategy(method), STAGES * REPLICAS, 1, limit_val_batches=1.0)
        loss = judge.validate(module, Text(replica, seed), verbose=False)[0]["val_loss"]
        results[name] = {
            "banned": sorted(ours.ledger.banned_at.items()),
            "flags": dict(ours.ledger.flags),
            "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
            "loss": loss,
        }
    return results
