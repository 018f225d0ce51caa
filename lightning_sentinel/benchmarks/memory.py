"""What a process of a large model needs at most, against what its own stage weighs.

A process first trains a model of hardly any size, so that imports, the process group and DeepSpeed are there; what it holds then is
not counted. The model that is measured is built in ``configure_model``: each process gets the layers of its stage.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import resource
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sentinel.benchmarks.processes import on_ranks
from lightning_sentinel.benchmarks.random_bytes import QUIET, loss_of_bytes, random_bytes, random_bytes_layers
from lightning_sentinel.strategy import SentinelStrategy

__all__ = ["LargeModel", "memory"]


@dataclass(frozen=True)
class LargeModel:
    """A Llama on random bytes, trained by AdamW in float32.

    Args:
        stages: pipeline stages.
        replicas: pipelines.
        width: of the model.
        depth: blocks, of all stages together.
        sequence_length: tokens of a sample.
        micro_batches: micro-batches of one sample each, of a step and replica.
        steps: of the training.
    """

    stages: int = 4
    replicas: int = 1
    width: int = 1024
    depth: int = 32
    sequence_length: int = 8
    micro_batches: int = 4
    steps: int = 2


def memory(model: LargeModel = LargeModel(), output: Path | None = None) -> None:
    """Train a model that no process builds as a whole, and compare what each of them needed at most with its stage.

    A stage's share is its parameters, gradients and optimizer state. The whole is that of all stages.

    Args:
        model: what is trained.
        output: a file for the results, as JSON.
    """
    ranks: list[dict[str, float]] = on_ranks(_measure, model.stages * model.replicas, asdict(model))
    whole = sum(rank["share"] for rank in ranks) / model.replicas
    table = Table(title=f"width {model.width}, {model.depth} blocks, {model.stages} stages x {model.replicas} replicas")
    for heading in ("rank", "stage's share (MB)", "peak (MB)", "peak / share", "peak / whole"):
        table.add_column(heading, justify="right")
    for number, rank in enumerate(ranks):
        share, peak = rank["share"], rank["peak"]
        table.add_row(str(number), f"{share / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{peak / share:.3f}", f"{peak / whole:.3f}")
    Console().print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"model": asdict(model), "ranks": ranks}, indent=2))


class _Llama(L.LightningModule):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(*random_bytes_layers(self.width, self.depth))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.net is not None
        return loss_of_bytes(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class _Share(L.Callback):
    """Bytes of the stage's parameters, gradients and optimizer state."""

    share = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values() if isinstance(value, Tensor)]
        self.share = sum(tensor.nbytes for tensor in [*weights, *weights, *states])


def _measure(settings: dict[str, Any]) -> list[dict[str, float]]:
    """On every rank; rank zero answers for all."""
    model = LargeModel(**settings)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    _train(replace(model, width=16, depth=model.stages))
    before = psutil.Process().memory_info().rss
    share = _train(model)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    everyone: list[Any] = [None] * (model.stages * model.replicas)
    dist.all_gather_object(everyone, {"share": float(share), "peak": float(peak), "before": float(before)})
    return everyone


def _train(model: LargeModel) -> int:
    callback = _Share()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = L.Trainer(
            strategy=SentinelStrategy(model.stages, model.replicas, model.micro_batches, verification=None),
            accelerator="cpu",
            devices=model.stages * model.replicas,
            callbacks=[callback],
            **QUIET,
        )
        data = random_bytes(model.micro_batches * model.replicas * model.steps, model.sequence_length)
        trainer.fit(_Llama(model.width, model.depth), DataLoader(data, batch_size=model.micro_batches))
    return callback.share
