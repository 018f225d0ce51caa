"""Modules and runs that the distributed tests share; a rank imports them from here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_sentinel as ls

SAMPLES, FEATURES, CLASSES = 96, 12, 4


def tokens(samples: int = SAMPLES, seed: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, FEATURES, generator=generator)
    labels = (inputs.sum(dim=(1, 2)) * 0.7).long().clamp(-1, 2) + 1
    return TensorDataset(inputs, labels)


def loader(batch_size: int, replicas: int = 1, samples: int = SAMPLES) -> DataLoader[Any]:
    """In order, so that step ``k`` sees the same samples whatever the number of replicas; Lightning's own sampler shuffles."""
    data, replica = tokens(samples), int(os.environ.get("LOCAL_RANK", "0")) % replicas
    return DataLoader(data, batch_size=batch_size, sampler=DistributedSampler(data, replicas, replica, shuffle=False))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Classifier(L.LightningModule):
    """An ordinary module: knows nothing of pipelines."""

    def __init__(self, optimizer: str = "sgd", width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(11)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), *(Block(width) for _ in range(depth)), Mean(), nn.Linear(width, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self(inputs * 1.0)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", (logits.argmax(-1) == labels).float().mean())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(inputs), labels))

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        else:
            decayed = [p for p in self.parameters() if p.ndim > 1]
            others = [p for p in self.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(strategy: Any, devices: int, steps: int, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "limit_val_batches": 0,
    }
    return L.Trainer(
        strategy=strategy, accelerator="cpu", devices=devices, max_steps=steps, callbacks=list(callbacks), **(defaults | options)
    )


def local_weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fit(
    optimizer: str, stages: int, replicas: int, steps: int, batch_size: int, mode: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Train on this rank and return what it knows."""
    settings: dict[str, Any] = {
        "plain": {"verification": None},
        "excluding": {"verification": ls.Verification(warmup_steps=100)},
        # Fences fitted to so few values flag something, which a run that only reports must survive bit for bit.
        "reporting": {"verification": ls.Verification(warmup_steps=2), "response": ls.Response(on_flag="log", ban_after=None)},
    }[mode]
    strategy = ls.SentinelStrategy(stages=stages, replicas=replicas, micro_batches=3, **settings)
    module = Classifier(optimizer)
    run = trainer(strategy, stages * replicas, steps, **options)
    run.fit(module, loader(batch_size, replicas), loader(batch_size, replicas))
    return {
        "weights": local_weights(module),
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "flags": strategy.ledger.total_flags,
    }


def fit_alone(optimizer: str, steps: int, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same training in one process, without the plugin."""
    module = Classifier(optimizer)
    run = trainer("auto", 1, steps, **options)
    run.fit(module, loader(batch_size), loader(batch_size))
    return {"weights": local_weights(module), "metrics": {n: float(v) for n, v in run.callback_metrics.items()}}
