"""What the tests of the whole Trainer run, on a mesh and in one process alike."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
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
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_sentinel as ls
from tests.distributed.tasks import CLASSES, PATIENCE, Classifier, loader, tokens


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


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
            return super().configure_optimizers()
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
