"""What the tests of batches run, on a mesh of processes, on a virtual one and in one process alike."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, random_split

import lightning_sentinel as ls
from tests.distributed.trainer_tasks import strategy, train_of, trainer, world_size

SAMPLES, FEATURES = 16, 4
Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass
class Batch:
    """One entry a sample, in everything that a loader may give."""

    pair: Pair
    names: list[str]
    images: list[Tensor]
    numbers: np.ndarray[Any, Any]
    note: str


def numbers(samples: int) -> Tensor:
    return torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(3))


class Rows(torch.utils.data.Dataset[int]):
    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        return index


def collate(rows: list[int]) -> Batch:
    inputs = numbers(SAMPLES)[rows]
    images = [torch.full((3, 1 + row % 3), row / SAMPLES) for row in rows]
    return Batch(Pair(inputs, inputs.sum(1)), [f"n{row}" for row in rows], images, np.array(rows) / SAMPLES, "text")


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = (FEATURES, 6, 6, 6, 1)
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4

    def loss(self, batch: Batch) -> Tensor:
        # Every list is as long as the tensors, or this fails.
        sizes = torch.stack([image.mean() for image in batch.images])
        weights = 1 + sizes + torch.as_tensor(batch.numbers) + torch.tensor([float(name[1:]) for name in batch.names]) / SAMPLES
        return (weights.float() * (self.net(batch.pair.inputs)[:, 0] - batch.pair.labels) ** 2).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"names": batch.names, "tuple": tuple(batch.names), "numbers": batch.numbers, "out": self.net(batch.pair.inputs)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(), batch_size=batch_size, collate_fn=collate, **options)


def trained(where: Any, replicas: int, **options: Any) -> dict[str, Any]:
    """Weights and predictions of a run on batches of every kind."""
    module, size = Net(), 8 // (replicas if world_size() > 1 else 1)
    run = trainer(where, max_epochs=2, **options)
    run.fit(module, loader(size, sampler=train_of(loader(size)).sampler))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    return {"weights": weights, "loss": float(run.callback_metrics["train_loss"]), "predicted": run.predict(module, loader(size))}


class OverTime(nn.Module):
    """Mixes what is along the first axis."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.cumsum(dim=0))


class Timely(L.LightningModule):
    """Time first, ``(T, B, F)``, which nobody but the module knows how to deal."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), OverTime(), nn.Linear(6, 1), nn.Identity())
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        assert inputs.shape[1] == len(labels)
        return ((self.net(inputs)[-1, :, 0] - labels) ** 2).mean()

    def split_batch(self, batch: Any, count: int) -> list[Any]:
        inputs, labels = batch
        return list(zip(inputs.tensor_split(count, dim=1), labels.tensor_split(count)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def collate_timely(rows: list[int]) -> Any:
    inputs = numbers(SAMPLES)[rows]
    return torch.stack([inputs * (time + 1) / 5 for time in range(5)]), inputs.sum(1)


def timely(where: Any, replicas: int) -> dict[str, Tensor]:
    module, data = Timely(), DataLoader(Rows(), batch_size=8 // replicas, collate_fn=collate_timely)
    sampler = train_of(data).sampler
    data = DataLoader(Rows(), batch_size=8 // replicas, collate_fn=collate_timely, sampler=sampler)
    trainer(where, max_epochs=2).fit(module, data)
    return {name: value.clone() for name, value in module.state_dict().items()}


class Twofold(Net):
    """Trained on batches of two loaders, which differ in size."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.both("train_loss", **batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.both("val_loss", **batch)

    def both(self, name: str, one: Batch, two: Batch) -> Tensor:
        out = self.net(torch.cat((one.pair.inputs, two.pair.inputs)))[:, 0]
        first, second = out.split((len(one.names), len(two.names)))
        loss = (first - one.pair.labels).square().mean() + 0.5 * (second + two.pair.labels).square().mean()
        self.log(name, loss, on_step=False, on_epoch=True)
        return loss


def twofold(where: Any, replicas: int) -> dict[str, Any]:
    """Weights and logs; the second loader is gone through twice while the first is once."""
    sizes = {name: size // (replicas if world_size() > 1 else 1) for name, size in (("one", 4), ("two", 8))}
    module, run = Twofold(), trainer(where, max_epochs=2)
    run.fit(module, {name: loader(size, sampler=train_of(loader(size)).sampler) for name, size in sizes.items()})
    weights, logged = (
        {name: value.clone() for name, value in module.state_dict().items()},
        float(run.callback_metrics["train_loss"]),
    )
    side_by_side = CombinedLoader({name: loader(size) for name, size in sizes.items()}, "min_size")
    (validated,) = run.validate(module, side_by_side, verbose=False)
    return {"weights": weights, "losses": [logged, validated["val_loss"]]}


class Mixed(Net):
    """Draws in its step with three generators; the loss is how far apart both ends are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Identity() for _ in range(3)), nn.Linear(FEATURES, FEATURES))
        nn.init.eye_(self.net[3].weight)
        nn.init.zeros_(self.net[3].bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mixed = batch[0] * np.random.beta(0.4, 0.4) + batch[0].flip(0) * random.random() + torch.rand(1)
        loss = (self.net(mixed) - mixed).abs().mean()
        self.log("difference", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        return loss * 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        mixed = batch[0] * np.random.rand() + random.random() + torch.rand(1)
        self.log("validated", (self.net(mixed) - mixed).abs().mean(), reduce_fx="max")


class Noisy(torch.utils.data.Dataset[Any]):
    """Augmented with NumPy and Python, in this process."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        value = torch.full((FEATURES,), np.random.rand() + random.random()) + torch.rand(1)
        return value, value


class Split(L.LightningDataModule):
    """Split without a seed, as in many tutorials."""

    def setup(self, stage: str) -> None:
        self.train, self.validation = random_split(Noisy(), [12, 4])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=3)

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, batch_size=2)


def refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except ls.SentinelError as error:
        return str(error)
    return "not refused"


def first_weights(where: Callable[[], Any]) -> list[Tensor]:
    """Of four models of a class that are trained one after the other."""
    L.seed_everything(123, verbose=False)
    found = []
    for _ in range(4):
        module = Fresh()
        found.append(module.net[0].weight.detach().clone())
        trainer(where(), max_epochs=1, limit_train_batches=1).fit(module, DataLoader(Noisy(), batch_size=4, shuffle=True))
    return found


class Fresh(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def everything() -> dict[str, Any]:
    """On 2 x 2 processes, one after the other."""
    found: dict[str, Any] = {}
    banned = ls.Response(banned=[ls.Worker(0, 1)])
    for name, options in {"all": {}, "banned": {"response": banned}, "audited": {"response": ls.Response(audit_rate=1.0)}}.items():
        where = strategy(2, 2, 2, verification=ls.Verification(warmup_steps=100), **options)
        found[name] = trained(where, 2)
    found["timely"] = timely(strategy(2, 2), 2)
    found["twofold"] = twofold(strategy(2, 2), 2)
    run = trainer(strategy(2, 2), max_epochs=2)
    run.fit(Mixed(), Split())
    found["differences"] = {name: float(value) for name, value in run.callback_metrics.items()}
    found["first weights"] = first_weights(lambda: strategy(2, 2))

    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    mine, _ = random_split(Rows(), [12, 4])
    own = DataLoader(mine, batch_size=2, collate_fn=collate)
    found["split before"] = refused(lambda: trainer(strategy(2, 2), max_epochs=1).fit(Net(), own))
    own = DataLoader(Rows(), batch_size=2, collate_fn=collate, sampler=DistributedSampler(Rows(), 4, 0))
    found["sampler"] = refused(lambda: trainer(strategy(2, 2), max_epochs=1).fit(Net(), own))
    return found
