"""Which part of a step is verification, on one core, and how that grows.

A virtual mesh does the work of all its workers in this process. What it spends inside its guard is timed within the same steps that
it is compared with, so that a machine that is busy with other things is as slow for both. With one replica every call sees one
signal, as in a process of the real mesh.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_sentinel.benchmarks.random_bytes import QUIET, RandomBytesLlama, random_bytes
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.strategy import SentinelStrategy

__all__ = ["Load", "overhead"]

_THROWN_AWAY = 4
_TIMED = ("project", "receive", "take_rows", "settle")
"""What a guard is asked to do in a step."""


@dataclass(frozen=True)
class Load:
    """What is trained: a small Llama on random bytes.

    Args:
        width: channels C.
        sequence_length: positions T of a sample.
        micro_batch_size: samples of a micro-batch.
        micro_batches: number of micro-batches of a replica in a step.
        stages: pipeline stages.
        blocks: decoder blocks of a stage.
        replicas: pipelines.
    """

    width: int = 256
    sequence_length: int = 64
    micro_batch_size: int = 8
    micro_batches: int = 2
    stages: int = 4
    blocks: int = 2
    replicas: int = 1

    @property
    def signal(self) -> int:
        """Floats of one micro-batch's signal."""
        return self.micro_batch_size * self.sequence_length * self.width


def overhead(
    load: Load = Load(),
    widths: list[int] = [128, 256, 512],  # noqa: B006 - jsonargparse shows it
    sequence_lengths: list[int] = [32, 64, 128],  # noqa: B006
    replicas: list[int] = [1, 4, 8],  # noqa: B006
    stages: list[int] = [4, 8],  # noqa: B006
    blocks: list[int] = [1, 2, 4],  # noqa: B006
    steps: int = 8,
    output: Path | None = None,
) -> None:
    """Time verification inside training steps, on one core, and vary one size at a time.

    Args:
        load: the workload, unless another one is given.
        widths: channels to try.
        sequence_lengths: positions to try.
        replicas: numbers of pipelines to try.
        stages: numbers of stages to try.
        blocks: numbers of blocks of a stage to try.
        steps: timed steps of each; four more are thrown away before them.
        output: a file for the results, as JSON.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table = Table(title="verification on one core: all features, both directions")
    for heading in ("C", "T", "stages", "blocks", "replicas", "step ms", "verification ms", "share", "state / signal"):
        table.add_column(heading, justify="right")
    results = []
    varied = {"width": widths, "sequence_length": sequence_lengths, "replicas": replicas, "stages": stages, "blocks": blocks}
    loads = dict.fromkeys([load, *(replace(load, **{name: value}) for name, values in varied.items() for value in values)])
    for one in loads:
        result = _measure(one, steps)
        results.append({"load": asdict(one), **result})
        table.add_row(
            *map(str, (one.width, one.sequence_length, one.stages, one.blocks, one.replicas)),
            f"{1e3 * result['step']:.0f}",
            f"{1e3 * result['verification']:.1f}",
            f"{100 * result['verification'] / result['step']:.1f} %",
            f"{result['state']:.2f}",
        )
    torch.set_num_threads(threads)
    Console().print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2))


def _measure(load: Load, steps: int) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    verification = Verification(warmup_steps=_THROWN_AWAY - 1)
    strategy = SentinelStrategy(
        load.stages,
        load.replicas,
        load.micro_batches,
        verification=verification,
        response=Response(on_flag="log", ban_after=None),
        engine="virtual",
    )
    clock = _Clock()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            callbacks=[clock],
            **QUIET,
        )
        batch_size = load.micro_batch_size * load.micro_batches * load.replicas
        data = random_bytes(batch_size * (steps + _THROWN_AWAY), load.sequence_length)
        trainer.fit(RandomBytesLlama(load.width, load.stages * load.blocks), DataLoader(data, batch_size=batch_size))
    timed = clock.seconds[_THROWN_AWAY:]
    # The largest of the boundaries: those in the middle also know what their senders had received.
    guard = strategy._run.guard
    assert guard is not None
    state = max(
        sum(value.numel() for value in (verifier.state_dict() | guard.calibration.state_of(index)).values())
        for index, verifier in enumerate(guard.verifiers.values())
    )
    return {
        "step": statistics.median(whole for whole, _ in timed),
        # Of a step's share, so that one slow step does not stand against another's median.
        "verification": statistics.median(part / whole for whole, part in timed) * statistics.median(whole for whole, _ in timed),
        "state": state / load.signal,
    }


class _Clock(L.Callback):
    """Seconds of each step, and of them those inside the guard."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._inside = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        guard = trainer.strategy._run.guard  # type: ignore[attr-defined]
        for name in _TIMED:
            setattr(guard, name, self._timed(getattr(guard, name)))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._inside = 0.0
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append((time.perf_counter() - self._start, self._inside))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self._inside += time.perf_counter() - start
            return result

        return timed
