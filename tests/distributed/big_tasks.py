"""Modules that are larger than a stage, and what ranks do with them."""

from __future__ import annotations

import os
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_sentinel as ls
from tests.distributed.tasks import CLASSES, FEATURES, PATIENCE, loader, local_weights, trainer


class Noisy(nn.Module):
    """Drops by a function, which no list of modules shows, and scales by what Python and NumPy draw, as stochastic depth does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        share = random.random() + float(np.random.rand()) if self.training else 1.0
        return x + share * nn.functional.dropout(torch.tanh(self.linear(self.norm(x))), 0.3, self.training)


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
    module, virtual = Dropping(), engine == "virtual"
    # What a run draws follows from where torch's generator is when it starts, which building a module has moved.
    L.seed_everything(7, verbose=False)
    strategy = ls.SentinelStrategy(
        stages, replicas, micro_batches=12 // replicas, engine=engine, timeout=PATIENCE, **{"verification": None, **settings}
    )
    run = trainer(strategy, 1 if virtual else stages * replicas, 3)
    run.fit(module, loader(12) if virtual else loader(12 // replicas, replicas))
    assert not strategy.ledger.banned_at
    return local_weights(module)


def train_dropping_everywhere(meshes: list[tuple[int, int, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    return [train_dropping(stages, replicas, "process", settings) for stages, replicas, settings in meshes]


class Residual(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Words(nn.Module):
    """Embedding and positions, drawn until they lie within their bounds."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.register_buffer("positions", torch.randn(8, width) * 0.1)
        nn.init.trunc_normal_(self.words.weight, std=0.5, a=-0.6, b=0.6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.positions[: ids.shape[1]]


WORDS, WIDTH = 13, 12


class Tied(L.LightningModule):
    """A language model whose head is its embedding, built where it is told to; frozen in the middle."""

    def __init__(self, late: bool, frozen: str = "", optimizer: str = "adamw") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Sequential | None = None
        if not late:
            self.build()

    def configure_model(self) -> None:
        if self.net is None:
            self.build()

    def build(self) -> None:
        torch.manual_seed(21)
        head = nn.Linear(WIDTH, WORDS)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True), 1)
        block, middle = Residual(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.net = nn.Sequential(Words(WORDS, WIDTH), block, encoder, middle, nn.LayerNorm(WIDTH), head)
        head.weight = self.net[0].words.weight
        for place in self.hparams["frozen"]:
            self.net[int(place)].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        logits = self.net(ids[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(trained, lr=0.3, momentum=0.9)
        # The bias of attention's keys has a gradient of rounding errors, which Adam would blow up.
        return torch.optim.AdamW(trained, lr=1e-2, eps=1e-4)


class AtTheStart(L.Callback):
    """What a stage has before the first step."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = local_weights(pl_module)


def sentences(replicas: int) -> DataLoader[Any]:
    ids = torch.randint(0, WORDS, (48, 7), generator=torch.Generator().manual_seed(5))
    data, replica = TensorDataset(ids), int(os.environ.get("LOCAL_RANK", "0")) % replicas
    sampler = DistributedSampler(data, replicas, replica, shuffle=False)
    return DataLoader(data, batch_size=12 // replicas, sampler=sampler)


def train_tied(strategy: Any, devices: int, replicas: int, module: L.LightningModule, **options: Any) -> dict[str, Any]:
    start = AtTheStart()
    validated = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0}
    run = trainer(strategy, devices, 4, [start], gradient_clip_val=0.1, **validated, **options)
    run.fit(module, sentences(replicas), sentences(1))
    (loss,) = run.validate(module, sentences(1), verbose=False)
    return {"start": start.weights, "weights": local_weights(module), "loss": loss["val_loss"], "trainer": run}


def train_tied_everywhere(cases: list[tuple[int, int, dict[str, Any], dict[str, Any]]], directory: str) -> list[dict[str, Any]]:
    """Each mesh on its own ranks, one after the other; then a checkpoint, and half of the steps again from one."""
    found = []
    for number, (stages, replicas, settings, arguments) in enumerate(cases):
        strategy = ls.SentinelStrategy(stages, replicas, micro_batches=3, timeout=PATIENCE, **{"verification": None, **settings})
        answer = train_tied(strategy, stages * replicas, replicas, Tied(**arguments))
        path = f"{directory}/{number}.ckpt"
        answer.pop("trainer").save_checkpoint(path)
        again, strategy = Tied(**arguments), ls.SentinelStrategy(stages, replicas, micro_batches=3, verification=None)
        run = trainer(strategy, stages * replicas, 6)
        run.fit(again, sentences(replicas), ckpt_path=path)
        answer["resumed"] = local_weights(again)
        answer["left_out"] = strategy.worker in strategy.ledger.banned
        found.append(answer)
    return found
