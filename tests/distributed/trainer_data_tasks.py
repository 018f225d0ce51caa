"""What the tests of who reads which data run, on a mesh and in one process alike."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_sentinel as ls
from tests.distributed.tasks import PATIENCE, tokens
from tests.distributed.trainer_tasks import Counted, Whole, metrics_of, strategy, train_of, trainer, world_size


class Spy(L.Callback):
    """What hooks are given."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []
        self.outputs: dict[str, list[Any]] = {"train": [], "validation": []}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.shapes.append([tuple(leaf.shape) for leaf in batch])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs["train"].append(outputs)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.outputs["validation"].append((dataloader_idx, outputs))


class Extra(Whole):
    """Returns more than the loss, and keeps what went into the loss on either end."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits.detach(), "labels": batch[1], "mean": float(loss), "note": "text"}


def read_by_the_ends(micro_batches: int) -> dict[str, Any]:
    """A mesh with a middle: who reads, what hooks see, and several loaders with a short last batch."""
    where = strategy(3, 2, micro_batches)
    replicas = 2 if world_size() > 1 else 1
    spy, module, data = Spy(), Extra(), [Counted(20), Counted(12), Counted(18)]
    run = trainer(where, max_epochs=2, callbacks=[spy], num_sanity_val_steps=1)
    # Of 10 samples the last batch has 2, which is less than there are micro-batches.
    train, *validation = (DataLoader(one, batch_size=8 // replicas, shuffle=False) for one in data)
    run.fit(module, train_of(train), validation)
    found = {
        "reads": [one.reads for one in data],
        "metrics": metrics_of(run),
        "shapes": spy.shapes,
        "outputs": spy.outputs,
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
    }
    found["test"] = run.test(module, validation, verbose=False)
    return found


class Uneven(IterableDataset[Any]):
    """Batches of its own length, of sequences of their own length; a replica has some more than the other."""

    def __init__(self, batches: list[int], lengths: bool = True) -> None:
        self.batches, self.lengths = batches, lengths
        self.replicas = 2 if world_size() > 1 else 1
        self.replica = int(os.environ.get("LOCAL_RANK", "0")) % self.replicas

    def __iter__(self) -> Iterator[Any]:
        inputs, labels = tokens(64).tensors
        start = 0
        for number, size in enumerate(self.batches):
            length = 2 + number % 4 if self.lengths else 6
            if number % self.replicas == self.replica:
                yield inputs[start : start + size, :length], labels[start : start + size]
            start += size


def uneven_replicas(verified: bool) -> dict[str, Any]:
    """Iterable data sets of which the replicas get different numbers of batches, of different sizes."""
    chosen = {"verification": ls.Verification(warmup_steps=100)} if verified else {}
    where = strategy(3, 2, 3, **chosen)
    module, spy = Extra(), Spy()
    run = trainer(where, max_epochs=2, callbacks=[spy], limit_val_batches=5 if world_size() > 1 else None)
    train = DataLoader(Uneven([4, 4, 4, 4, 4]), batch_size=None)
    validation = DataLoader(Uneven([4, 4, 2, 4, 1]), batch_size=None)
    run.fit(module, train, validation)
    return {
        "steps": run.global_step,
        "metrics": metrics_of(run),
        "shapes": spy.shapes,
        "validated": len(spy.outputs["validation"]),
        "test": run.test(module, validation, verbose=False),
        "predicted": run.predict(module, validation),
        "by module": given_to_hooks(),
    }


class DealsItself(Extra):
    """Keeps what its hooks of a validation are given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def split_batch(self, batch: Any, count: int) -> list[Any]:
        return list(zip(*(leaf.tensor_split(min(count, len(leaf))) for leaf in batch)))

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.given.append([tuple(leaf.shape) for leaf in batch])

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.given.append([tuple(leaf.shape) for leaf in batch])


def given_to_hooks() -> dict[str, Any]:
    """What hooks of a replica are given that has no batch left, of a module that deals its batches itself."""
    module, run = DealsItself(), trainer(strategy(3, 2, 3), max_epochs=1)
    validation = DataLoader(Uneven([4, 4, 2], lengths=False), batch_size=None)
    found = run.validate(module, validation, verbose=False)
    return {"given": module.given, "metrics": found[0]}


class Augmented(Whole):
    """The loss is how far the batch of the last stage is from what went into the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 12), nn.Identity(), nn.Identity(), nn.Linear(12, 12))
        for index in (0, 3):
            nn.init.eye_(self.net[index].weight)
            nn.init.zeros_(self.net[index].bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[0]).abs().mean()
        self.log("difference", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("drawn", batch[0][:, -1, 0].mean(), on_step=False, on_epoch=True)
        return loss * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def augmented(workers: int, seeded: bool) -> dict[str, float]:
    """Random augmentation, in this process or in those of the loader."""
    # Ranks of tests are daemons, which may have no processes of their own: so that nothing is left of a test that hangs.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if seeded:
        L.seed_everything(5, workers=True, verbose=False)
    run = trainer(strategy(2, 2), max_epochs=1)
    data = DataLoader(Counted(24, noise=1.0), batch_size=4, num_workers=workers, shuffle=True)
    run.fit(Augmented(), data)
    return metrics_of(run)


class OfItsRank(IterableDataset[Any]):
    """What no data set should do: the batch depends on the rank."""

    def __init__(self) -> None:
        self.samples = 4 - int(os.environ.get("LOCAL_RANK", "0"))

    def __iter__(self) -> Iterator[Any]:
        inputs, labels = tokens(8).tensors
        yield inputs[: self.samples], labels[: self.samples]


def ends_that_differ() -> None:
    trainer(strategy(2, 1), max_epochs=1).fit(Whole(), DataLoader(OfItsRank(), batch_size=None))


def nan(signal: Tensor, context: ls.AttackContext) -> Tensor:
    return torch.full_like(signal, torch.nan)


def short_batches(engine: str, audit_rate: float | None) -> dict[str, Any]:
    """Steps of different numbers of micro-batches, of which a liar takes part in some: on the virtual mesh after a warm-up, and
    between processes at once, with what is no number."""
    virtual, replicas = engine == "virtual", 1 if engine == "virtual" else 2
    where = ls.SentinelStrategy(
        3,
        2,
        3,
        verification=ls.Verification(warmup_steps=12, false_positive_rate=0.04),
        response=ls.Response(audit_rate=audit_rate, ban_after=3),
        engine=engine,  # type: ignore[arg-type]
        timeout=PATIENCE,
    )
    module, attack = Extra(), {"name": "scale", "factor": 30.0} if virtual else nan
    start, epochs = (16, 8) if virtual else (1, 3)
    injector = ls.AttackInjector(attack, workers=[ls.Worker(0, 1)], direction="activation", start_step=start)
    run = trainer(where, max_epochs=epochs, callbacks=[injector])
    # Ten samples a replica: batches of four, four and two.
    train, validation, predicted = (
        DataLoader(Counted(samples), batch_size=size // replicas) for samples, size in ((20, 8), (9, 4), (5, 4))
    )
    run.fit(module, train_of(train), validation)
    found = run.predict(module, predicted)
    return {"banned": sorted(where.ledger.banned), "metrics": metrics_of(run), "labels": [p["labels"].tolist() for p in found]}
