"""What a step may do besides returning a loss; in one process, or where steps run on one stage of several."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torchmetrics
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from tests.distributed.tasks import CLASSES, PATIENCE, Classifier, loader, local_weights, tokens, trainer

STAGES, REPLICAS, MICRO_BATCHES = 2, 2, 2
BATCH = 12


class Meter:
    """No data, and no module."""

    def __init__(self) -> None:
        self.total = 0.0


class Keeping(Classifier):
    """Keeps things in every way in which steps keep things, and looks at them at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.lists: list[list[Tensor]] = [[], []]
        self.by_name: dict[str, list[Any]] = {"a": []}
        self._private: defaultdict[str, list[int]] = defaultdict(list)
        self.total = torch.zeros(())
        self.array = np.zeros(CLASSES)
        self.meter, self.count = Meter(), 0.0
        self.register_buffer("confusion", torch.zeros(CLASSES, CLASSES))
        self.auroc, self.by_hand = torchmetrics.classification.BinaryAUROC(), torchmetrics.CatMetric()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")
        self.seen: dict[str, Any] = {}
        self.gathered: list[tuple[int, ...]] = []
        self.midway: list[tuple[float, list[str]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.logger.log_metrics({"direct": float(batch_idx)}, step=batch_idx)
        print(f"step {batch_idx}")
        if batch_idx == 3 and getattr(self.trainer.strategy, "worker", None) in (None, ls.Worker(STAGES - 1, 1)):
            self.trainer.should_stop = True
        return nn.functional.cross_entropy(logits, batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = float(self.accuracy.compute())
        self.midway.append((value, [str(one.message) for one in caught if "in the middle of an epoch" in str(one.message)]))

    def on_validation_epoch_start(self) -> None:
        self.fresh: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits, labels = self(batch[0]), batch[1]
        self.lists[dataloader_idx].append(logits)
        self.by_name["a"].append(labels)
        self._private[str(dataloader_idx)].append(len(labels))
        self.fresh.append(len(labels))
        self.total += logits.sum()
        self.count += len(labels)
        self.meter.total += 1
        for label, guess in zip(labels.tolist(), logits.argmax(-1).tolist()):
            self.confusion[label, guess] += 1
            self.array[label] += 1
        self.auroc.update(logits[:, 0], (labels == 0).long())
        self.log("auroc", self.auroc)
        self.by_hand.update(logits[:, 1])
        self.log("mean", labels.float().mean(), batch_size=BATCH)
        self.gathered.append(tuple(self.all_gather(logits.mean()).shape))

    def on_validation_epoch_end(self) -> None:
        self.seen = {
            "lists": [torch.cat(one) for one in self.lists],
            "by_name": torch.cat(self.by_name["a"]),
            "private": {name: sum(sizes) for name, sizes in self._private.items()},
            "fresh": sum(self.fresh),
            "total": self.total.clone(),
            "count": self.count,
            "array": torch.from_numpy(self.array.copy()),
            "confusion": self.confusion.clone(),
            "by_hand": self.by_hand.compute().sort().values,
            "gathered": set(self.gathered),
        }

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.auroc.update(self(batch[0])[:, 0], (batch[1] == 0).long())
        self.log("test_auroc", self.auroc)


def world() -> int:
    # Lightning forgets the variable after a run.
    initialized = torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else int(os.environ.get("WORLD_SIZE", "1"))


def replica() -> int:
    return int(os.environ.get("LOCAL_RANK", "0")) % REPLICAS


def strategy(**options: Any) -> Any:
    if world() == 1:
        return "auto"
    # An auditor runs a step once more, and what is printed cannot be taken back.
    response = ls.Response(audit_rate=None)
    return ls.SentinelStrategy(STAGES, REPLICAS, MICRO_BATCHES, response=response, timeout=PATIENCE, **options)


def keeping(directory: str) -> dict[str, Any]:
    """A fit that a step ends, with a validation of two loaders; then a test in which one replica has no data at all."""
    module, replicas = Keeping(), REPLICAS if world() > 1 else 1
    logger = CSVLogger(directory, name="", version="")
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 1.0}
    monitor = ThroughputMonitor(lambda batch: len(batch[1]))
    run = trainer(strategy(), world(), 20, [monitor], **options)
    # The last batch of either is short.
    validation = [loader(BATCH // replicas, replicas, samples=22), loader(BATCH // replicas, replicas, samples=14)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run.fit(module, loader(BATCH // replicas, replicas), validation)
    found: dict[str, Any] = {"steps": run.global_step, "seen": module.seen, "meter": module.meter.total, "midway": module.midway}
    found["printed"] = said.getvalue().count("step 1\n")
    found["copies"] = {name: one.world_size for name, one in monitor._throughputs.items()}
    try:
        found["called"] = tuple(module(tokens(2)[:][0]).shape)
    except ls.SentinelError as error:
        found["called"] = str(error)
    state = module.state_dict() if world() == 1 else run.strategy.whole_state_dict()
    found["whole"] = {name: value.clone() for name, value in state.items() if name.startswith("net.")}
    found["metrics"] = {n: float(v) for n, v in run.callback_metrics.items() if not n.startswith("sentinel/")}
    samples = tokens(16) if replica() == 0 or world() == 1 else torch.utils.data.Subset(tokens(16), [])
    run = trainer(strategy(), world(), 1, use_distributed_sampler=False)
    found["test"] = run.test(module, DataLoader(samples, 8), verbose=False)
    return found


class Contrasting(Classifier):
    """The loss is of all replicas' samples together."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.all_gather(self(batch[0]), sync_grads=True)
        return (logits.mean() - 1) ** 2 + logits.flatten(end_dim=-2).var(dim=0).mean()


def contrasting(audit_rate: float | None = None) -> dict[str, Tensor]:
    module, replicas = Contrasting(), REPLICAS if world() > 1 else 1
    ours: Any = "auto"
    if world() > 1:
        ours = ls.SentinelStrategy(STAGES, REPLICAS, 1, response=ls.Response(audit_rate=audit_rate), timeout=PATIENCE)
    trainer(ours, world(), 5).fit(module, loader(BATCH // replicas, replicas))
    return local_weights(module)


def everything(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {"keeping": keeping(directory), "contrasting": contrasting()}
    if world() > 1:
        try:
            contrasting(audit_rate=0.1)
        except Exception as error:
            found["audited"] = str(error)
    return found
