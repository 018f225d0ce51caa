"""What a process of a large model needs at most, against what its own stage weighs.

A process first trains a model of hardly any size, so that imports, the process group and DeepSpeed are there; what it holds then is
not counted. The model that is measured is built in ``configure_model``: each process gets the layers of its stage.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_sentinel.benchmarks.processes import on_ranks
from lightning_sentinel.benchmarks.random_bytes import QUIET, loss_of_bytes, random_bytes, random_bytes_layers
from lightning_sentinel.config import DEFAULT_AUDIT_RATE, Response, Verification
from lightning_sentinel.pipeline.stages.skeleton import ForeignLayer
from lightning_sentinel.strategy import SentinelStrategy

__all__ = ["LargeModel", "largest_sum_of_tensors", "memory"]

_ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LargeModel:
    """A Llama on random bytes, trained by AdamW in float32.

    Args:
        stages: pipeline stages.
        replicas: pipelines.
        width: width of the model.
        depth: blocks, of all stages together.
        sequence_length: tokens of a sample.
        micro_batches: micro-batches of one sample each, of a step and replica.
        steps: number of training steps.
        verification: ``"off"``, by ``"flags"`` alone, or with ``"audits"``, for which workers keep a step's signals.
    """

    stages: int = 4
    replicas: int = 1
    width: int = 1024
    depth: int = 32
    sequence_length: int = 8
    micro_batches: int = 4
    steps: int = 3
    verification: Literal["off", "flags", "audits"] = "off"

    def strategy(self) -> SentinelStrategy:
        verification = None if self.verification == "off" else Verification()
        response = Response(audit_rate=DEFAULT_AUDIT_RATE if self.verification == "audits" else None)
        return SentinelStrategy(self.stages, self.replicas, self.micro_batches, verification, response)


def memory(model: LargeModel = LargeModel(), output: Path | None = None) -> None:
    """Train a model that no process builds as a whole, and compare what each of them needed at most with its stage.

    A stage's share is its parameters, gradients and optimizer state. The whole is that of all stages. Of each process are given the
    largest sum of tensors that it held at a time, and the largest part of the machine's memory that it had (resident set size); and
    the latter of a process in which torch alone trains the stage's layers.

    How much of what is freed stays with a process is up to the allocator: compare ``MALLOC_MMAP_THRESHOLD_=1000000`` in the
    environment with its absence.

    Args:
        model: what is trained.
        output: a file for the results, as JSON.
    """
    world = model.stages * model.replicas
    settings = asdict(model)
    ranks: list[dict[str, Any]] = on_ranks(_peak, world, settings)
    with _giving_back():
        held: list[dict[str, Any]] = on_ranks(largest_sum_of_tensors, world, settings)
    alone: list[int] = on_ranks(_alone, world, settings, [rank["layers"] for rank in ranks])
    ranks = [rank | {"tensors": sums["tensors"], "alone": peak} for rank, sums, peak in zip(ranks, held, alone)]
    whole = sum(rank["share"] for rank in ranks) / model.replicas
    setting = f"{_ALLOCATOR}={os.environ[_ALLOCATOR]}" if _ALLOCATOR in os.environ else "the allocator's defaults"
    table = Table(title=f"width {model.width}, {model.depth} blocks, {model.stages} stages x {model.replicas} replicas, {setting}")
    for heading in ("rank", "share (MB)", "whole / share", "tensors / share", "peak (MB)", "peak / share", "torch alone / share"):
        table.add_column(heading, justify="right")
    for number, rank in enumerate(ranks):
        ratios = [rank[key] / rank["share"] for key in ("tensors", "peak", "alone")]
        sizes = f"{rank['share'] / 1e6:.0f}", f"{whole / rank['share']:.2f}", f"{rank['peak'] / 1e6:.0f}"
        table.add_row(str(number), *sizes[:2], f"{ratios[0]:.3f}", sizes[2], *(f"{ratio:.3f}" for ratio in ratios[1:]))
    Console().print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"model": asdict(model), "allocator": setting, "ranks": ranks}, indent=2))


class _Llama(L.LightningModule):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.depth = depth
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(*random_bytes_layers(self.width, self.depth))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.net is not None
        return loss_of_bytes(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class _Stage(L.Callback):
    """The numbers of the stage's layers, and the bytes of its parameters, gradients and optimizer state."""

    share = 0
    layers: tuple[int, ...] = ()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, _Llama) and pl_module.net is not None
        weights = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values() if isinstance(value, Tensor)]
        self.share = sum(tensor.nbytes for tensor in [*weights, *weights, *states])
        self.layers = tuple(number for number, layer in enumerate(pl_module.net) if not isinstance(layer, ForeignLayer))


def _peak(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """On every rank: what its stage weighs, which layers it has, and the largest part of the machine's memory that it had."""
    model = _quietly(settings)
    stage, peak = _peak_of(lambda: _train(model), lambda: _train(_small(model)))
    return _of_all({"share": stage.share, "layers": stage.layers, "peak": peak})


def largest_sum_of_tensors(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """To be called on every rank: train, and watch what is allocated.

    Args:
        settings: the settings of a :class:`LargeModel`.

    Returns:
        of each rank what its stage weighs (``share``) and what tensors took at most at a time (``tensors``), in bytes.
    """
    model = _quietly(settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        stage = _train(model)
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        events.export_chrome_trace(str(trace))
        happened = json.loads(trace.read_text())["traceEvents"]
    now = largest = 0
    for event in sorted((event for event in happened if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += int(event["args"]["Bytes"])
        largest = max(largest, now)
    return _of_all({"share": stage.share, "tensors": largest})


def _quietly(settings: dict[str, Any]) -> LargeModel:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return LargeModel(**settings)


def _of_all(mine: _Result) -> list[_Result]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
    """Processes that start in here give back to the machine what they free. What tensors take is the same without."""
    given = os.environ.get(_ALLOCATOR)
    os.environ[_ALLOCATOR] = "1000000"
    try:
        yield
    finally:
        del os.environ[_ALLOCATOR]
        os.environ.update({} if given is None else {_ALLOCATOR: given})


def _train(model: LargeModel) -> _Stage:
    callback = _Stage()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = L.Trainer(
            strategy=model.strategy(),
            accelerator="cpu",
            devices=model.stages * model.replicas,
            callbacks=[callback],
            **QUIET,
        )
        data = random_bytes(model.micro_batches * model.replicas * model.steps, model.sequence_length)
        trainer.fit(_Llama(model.width, model.depth), DataLoader(data, batch_size=model.micro_batches))
    return callback


def _alone(settings: dict[str, Any], layers: list[tuple[int, ...]]) -> list[int]:
    """On every rank: the peak of torch alone, that trains the layers of the rank's stage without its neighbours."""
    model = LargeModel(**settings)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    mine = layers[dist.get_rank()]
    _, peak = _peak_of(lambda: _train_alone(model, mine), lambda: _train_alone(_small(model), (1,)))
    return _of_all(peak)


def _train_alone(model: LargeModel, layers: tuple[int, ...]) -> None:
    with torch.device("meta"):
        whole = random_bytes_layers(model.width, model.depth)
    net = nn.Sequential(*(whole[number] for number in layers)).to_empty(device="cpu")
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.normal_(std=0.02)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    tokens, _ = random_bytes(model.micro_batches * model.steps, model.sequence_length).tensors
    for step in tokens.split(model.micro_batches):
        optimizer.zero_grad()
        for sample in step.split(1):
            signal = sample if layers[0] == 0 else torch.randn(*sample.shape, model.width, requires_grad=True)
            net(signal).square().mean().backward()
        optimizer.step()


def _small(model: LargeModel) -> LargeModel:
    return replace(model, width=16, depth=model.stages)


def _peak_of(train: Callable[[], _Result], warm_up: Callable[[], Any]) -> tuple[_Result, int]:
    """What a training returned, and the bytes that the process had at most, above what a small one leaves behind."""
    warm_up()
    before = psutil.Process().memory_info().rss
    result = train()
    unit = 1 if sys.platform == "darwin" else 1024
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
