"""What the tests of the whole Trainer run, on a mesh and in one process alike."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_sentinel as ls
from tests.distributed.tasks import CLASSES, PATIENCE, Classifier, loader, tokens


def world_size() -> int:
    # Lightning takes the variable away when a run ends.
    distributed = torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else int(os.environ.get("WORLD_SIZE", "1"))


def strategy(stages: int, replicas: int, micro_batches: int = 2, **options: Any) -> Any:
    """The mesh on its ranks, and nothing special in one process."""
    if world_size() == 1:
        return "auto"
    options = {"verification": None, "timeout": PATIENCE} | options
    return ls.SentinelStrategy(stages, replicas, micro_batches=micro_batches, **options)


def trainer(where: Any, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(strategy=where, accelerator="cpu", devices=world_size(), **(defaults | options))


def metrics_of(run: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items()}


class Whole(Classifier):
    """Everything that a module usually does in its steps and hooks."""

    def __init__(self, plateau: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.plateau = plateau
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
        self.kept = torchmetrics.MeanMetric()
        self.losses: list[Tensor] = []
        self.seen: list[Any] = []

    def evaluated(self, batch: Any, stage: str) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = self(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.kept.update(loss, weight=len(labels))
        self.losses.append(loss)
        self.log(f"{stage}_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log(f"{stage}_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluated(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluated(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        inputs, labels = batch
        return {"logits": self(inputs), "labels": labels, "names": [f"sample {label}" for label in labels.tolist()]}

    def on_validation_epoch_end(self) -> None:
        self.log("val_kept", self.kept.compute())
        self.kept.reset()

    def configure_optimizers(self) -> Any:
        if not self.plateau:
            # Asks for the loaders before there is an engine, as every schedule over a whole run does.
            made = super().configure_optimizers()
            total = self.trainer.estimated_stepping_batches
            decay = torch.optim.lr_scheduler.LambdaLR(made["optimizer"], lambda step: 1 - step / (2 * total))
            return made | {"lr_scheduler": {"scheduler": decay, "interval": "step"}}
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def whole_fit(directory: str, batch_size: int) -> dict[str, Any]:
    """A run with all the usual callbacks, then its best checkpoint validated, tested and used."""
    replicas = 2 if world_size() > 1 else 1
    per_replica = batch_size // replicas
    where = strategy(2, replicas)
    callbacks = [
        ModelCheckpoint(Path(directory) / "best", "{epoch}-{step}", monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(Path(directory) / "steps", "{step}", every_n_train_steps=3, save_top_k=-1),
        EarlyStopping("val_loss", patience=2, min_delta=0.05),
        LearningRateMonitor("step"),
        TQDMProgressBar(),
    ]
    run = trainer(
        where,
        callbacks=callbacks,
        logger=CSVLogger(directory, name="", version="log"),
        enable_checkpointing=True,
        enable_progress_bar=True,
        num_sanity_val_steps=1,
        max_epochs=12,
        limit_train_batches=4,
        val_check_interval=0.5,
        limit_val_batches=3,
        log_every_n_steps=1,
        profiler="simple",
    )
    module = Whole(plateau=True)
    data = [loader(per_replica, replicas), loader(per_replica, replicas, samples=48)]
    run.fit(module, data[0], data[1])
    best, *_ = callbacks
    found: dict[str, Any] = {
        "fit": metrics_of(run),
        "epochs": run.current_epoch,
        "steps": run.global_step,
        "stopped": callbacks[2].stopped_epoch,
        "best": Path(best.best_model_path).name,
        "best score": float(best.best_model_score),
        "files": sorted(path.relative_to(directory).as_posix() for path in Path(directory).rglob("*.ckpt")),
        "profiled": "run_training_batch" in run.profiler.summary(),
    }
    for name in ("validate", "test"):
        found[name] = getattr(run, name)(module, data[1], ckpt_path="best", verbose=False)
    found["predicted"] = run.predict(module, data[1], ckpt_path="best")
    found["log"] = rows(Path(directory) / "log" / "metrics.csv")
    return found


class Counted(Dataset[Any]):
    """Says how often it was read, and adds what it draws at random, in whatever process it is read."""

    def __init__(self, samples: int, noise: float = 0.0) -> None:
        self.data, self.noise, self.reads = tokens(samples), noise, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        inputs, label = self.data[index]
        drawn = torch.rand(())
        return torch.cat([inputs, drawn.expand(1, inputs.shape[1]) * self.noise]), label


def train_of(loader: DataLoader[Any]) -> DataLoader[Any]:
    """In order on every mesh; Lightning's own sampler shuffles."""
    replicas = 2 if world_size() > 1 else 1
    replica = int(os.environ.get("LOCAL_RANK", "0")) % replicas
    sampler = torch.utils.data.DistributedSampler(loader.dataset, replicas, replica, shuffle=False)
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler)


class Epochs(Whole):
    """Works on a whole epoch in lists and sums of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.counts: dict[str, float] = {}
        self.total = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.outputs.append(loss * len(batch[1]))
        self.counts["train"] = self.counts.get("train", 0) + len(batch[1])
        return loss

    def on_train_epoch_end(self) -> None:
        mean = torch.stack(self.outputs).sum() / self.counts["train"]
        self.log("train_mean", mean, sync_dist=True)
        self.outputs.clear()
        self.counts.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.hits.append(self(batch[0]).argmax(-1) == batch[1])
        self.total += len(batch[1])

    def on_validation_epoch_end(self) -> None:
        accuracy = torch.cat(self.hits).float().sum() / self.total
        self.log("val_accuracy", accuracy, sync_dist=True)
        self.hits.clear()
        self.total = 0.0


class Writer(L.pytorch.callbacks.BasePredictionWriter):
    def __init__(self, interval: Any) -> None:
        super().__init__(interval)
        self.batches: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        self.batches.append((prediction, list(batch_indices)))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = (list(predictions), [list(one) for one in batch_indices])


class Shown(L.pytorch.callbacks.ModelSummary):
    """What is printed, where it is."""

    tables: list[tuple[int, list[str]]] = []

    @staticmethod
    def summarize(
        summary_data: Any, total_parameters: int, trainable_parameters: int, model_size: float, *others: Any, **options: Any
    ) -> None:
        Shown.tables.append((total_parameters, dict(summary_data)["Params"]))


def groups() -> int:
    return len(torch.distributed.distributed_c10d._world.pg_map) if torch.distributed.is_initialized() else 0


def in_turn() -> dict[str, Any]:
    """Several runs of one module, one after the other, with predictions between them."""
    replicas = 2 if world_size() > 1 else 1
    module, writer, found = Epochs(), Writer("batch_and_epoch"), {}
    Shown.tables.clear()
    run = trainer(strategy(3, 2), max_epochs=1, callbacks=[writer, Shown(max_depth=2)], enable_model_summary=True)
    data = Counted(22)
    batches = DataLoader(data, batch_size=6 // replicas, shuffle=False)
    found["before"] = run.validate(module, batches, verbose=False)
    found["counts"] = []
    for _ in range(2):
        run = trainer(strategy(3, 2), max_epochs=1, callbacks=[writer, Shown(max_depth=2)], enable_model_summary=True)
        run.fit(module, train_of(batches), train_of(batches))
        found["counts"].append(groups())
    found["metrics"], found["summaries"] = metrics_of(run), list(Shown.tables)
    writer.batches.clear()
    found["predicted"] = run.predict(module, [batches, DataLoader(Counted(5), batch_size=2 // replicas)])
    found["written"] = writer.batches, writer.epoch
    found["nothing"] = run.predict(module, batches, return_predictions=run.global_rank == 1)
    found["reads"] = data.reads
    found["groups"] = groups()
    return found


def options() -> dict[str, Any]:
    """Settings of the Trainer that change which batches are run."""
    replicas, found = 2 if world_size() > 1 else 1, {}
    cases: dict[str, dict[str, Any]] = {
        "fast_dev_run": {"fast_dev_run": 2},
        "overfit_batches": {"overfit_batches": 2, "max_epochs": 2},
        "fractions": {"limit_train_batches": 0.5, "limit_val_batches": 0.25, "val_check_interval": 0.5, "max_epochs": 1},
        "max_steps": {"max_steps": 3, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2},
        "no time": {"max_time": {"seconds": 0}, "max_epochs": 5},
        "accumulated": {"accumulate_grad_batches": 3, "max_epochs": 1, "limit_train_batches": 7},
        "reloaded": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
        "rich": {"enable_progress_bar": True, "callbacks": [RichProgressBar()], "max_epochs": 1, "limit_train_batches": 2},
    }
    for name, case in cases.items():
        module, data = Whole(optimizer="sgd"), Data(12 // replicas)
        run = trainer(strategy(2, 2), **case)
        run.fit(module, datamodule=data)
        weights = {key: value.clone() for key, value in module.state_dict().items() if key.startswith("net")}
        found[name] = {"metrics": metrics_of(run), "weights": weights, "steps": run.global_step, "asked": sorted(data.asked)}
    return found


class Data(L.LightningDataModule):
    """In order on every mesh."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.asked = batch_size, set[str]()

    def prepare_data(self) -> None:
        self.asked.add("prepare_data")

    def setup(self, stage: str) -> None:
        self.asked.add(f"setup({stage})")

    def train_dataloader(self) -> DataLoader[Any]:
        return train_of(DataLoader(tokens(), batch_size=self.batch_size))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tokens(48), batch_size=self.batch_size)


def modules_of_others(name: str, micro_batches: int) -> dict[str, Any]:
    """A module that knows nothing of pipelines, on two stages; in one process with a step for every micro-batch."""
    from tests.distributed import demo_models

    generator = torch.Generator().manual_seed(9)
    alone, chosen = world_size() == 1, {}
    if name in ("Images", "Compiled"):
        chosen = {"sequential": "network"}
        data: Dataset[Any] = torch.utils.data.TensorDataset(
            torch.randn(16, 3, 6, 6, generator=generator), torch.randint(4, (16,), generator=generator)
        )
    elif name == "Translator":
        words = torch.randint(40, (16, 6), generator=generator)
        data = torch.utils.data.TensorDataset(words[:, :-1], words[:, 1:])
    else:
        data = torch.utils.data.TensorDataset(torch.randn(16, 32, generator=generator))
    module = getattr(demo_models, name)()
    run = trainer(
        strategy(2, 1, micro_batches, **chosen),
        max_epochs=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=micro_batches if alone else 1,
        limit_val_batches=2,
    )
    batches = DataLoader(data, batch_size=8 // (micro_batches if alone else 1), collate_fn=_first if name == "Boring" else None)
    run.fit(module, batches, None if name == "Translator" else DataLoader(data, batch_size=8, collate_fn=batches.collate_fn))
    return {"metrics": metrics_of(run), "weights": {key: value.clone() for key, value in module.state_dict().items()}}


def _first(samples: list[Any]) -> Tensor:
    return torch.stack([sample[0] for sample in samples])
