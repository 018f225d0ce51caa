"""Modules that are larger than a stage, and what ranks do with them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_sentinel as ls
from tests.distributed.tasks import CLASSES, FEATURES, PATIENCE, loader, local_weights, trainer

Mesh = tuple[int, int]


class Noisy(nn.Module):
    """Drops by a function, which no list of modules shows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(torch.tanh(self.linear(self.norm(x))), 0.3, self.training)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def layers(width: int = 16) -> list[nn.Module]:
    return [
        nn.Linear(FEATURES, width),
        nn.Dropout(0.2),
        *(Noisy(width) for _ in range(4)),
        Mean(),
        nn.Linear(width, CLASSES),
    ]


class Dropping(L.LightningModule):
    """Dropout in modules and in functions, and noise on the input, which is drawn at both ends of the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.net = nn.Sequential(*layers())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        noise = torch.rand(len(inputs), 1, 1)
        logits = self.net(inputs + noise)
        return nn.functional.cross_entropy(logits + noise[:, 0], labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def train_dropping(stages: int, replicas: int, engine: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Twelve micro-batches of one sample a step, whatever the mesh."""
    L.seed_everything(7, verbose=False)
    strategy = ls.SentinelStrategy(
        stages, replicas, micro_batches=12 // replicas, engine=engine, timeout=PATIENCE, **{"verification": None, **settings}
    )
    module, virtual = Dropping(), engine == "virtual"
    run = trainer(strategy, 1 if virtual else stages * replicas, 3)
    run.fit(module, loader(12) if virtual else loader(12 // replicas, replicas))
    assert not strategy.ledger.banned_at
    return local_weights(module)


def train_dropping_everywhere(meshes: list[tuple[int, int, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    return [train_dropping(stages, replicas, "process", settings) for stages, replicas, settings in meshes]
