"""What the strategy, its verification, audits and bans cost, against DeepSpeed's bare pipeline in the same run.

The variants take turns, in another order each round, so that a machine that gets slower gets slower for all of them. A turn gives
the mean time of its steps; ratios are taken within a round, and their medians over rounds are reported.

Beside the time on the clock stands the CPU time of all ranks together. It has no waiting in it and nothing that others do on the
same machine, so that it shows a difference of two per cent where the clock is too noisy for one.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_sentinel.benchmarks.processes import on_ranks
from lightning_sentinel.benchmarks.random_bytes import (
    QUIET,
    RandomBytesLlama,
    loss_of_bytes,
    random_bytes,
    random_bytes_layers,
)
from lightning_sentinel.benchmarks.trust_cost import EXAMPLES, StepTraffic, table_of_traffic
from lightning_sentinel.config import DEFAULT_AUDIT_RATE, Response, Verification
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.strategy import SentinelStrategy
from lightning_sentinel.strategy.settings import UNSIGNED

__all__ = ["Workload", "throughput"]

_BARE = "bare DeepSpeed"
_AUDITS = DEFAULT_AUDIT_RATE


class Variant(NamedTuple):
    """What the strategy is run with.

    Args:
        verification: how signals are verified.
        response: what follows from a flag.
        identity: whether workers sign what they say: ``None``, or ``"unsigned"``.
    """

    verification: Verification | None
    response: Response
    identity: str | None = None


@dataclass(frozen=True)
class Workload:
    """The training that is timed: a small Llama on random bytes.

    Args:
        stages: pipeline stages.
        replicas: pipelines.
        width: width of the model.
        depth: blocks.
        sequence_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        micro_batches: micro-batches of a step and replica.
        steps: timed steps of a turn; three more are thrown away before them.
        rounds: turns of each variant.
    """

    stages: int = 2
    replicas: int = 1
    width: int = 256
    depth: int = 4
    sequence_length: int = 64
    micro_batch_size: int = 8
    micro_batches: int = 4
    steps: int = 12
    rounds: int = 9

    @property
    def tokens(self) -> int:
        """Of a step of the whole mesh."""
        return self.sequence_length * self.micro_batch_size * self.micro_batches * self.replicas

    def variants(self, trust: bool) -> dict[str, Variant]:
        """What the strategy is run with; audits and bans need a second replica.

        Args:
            trust: whether to time what it costs that workers sign what they say.
        """
        # A short warm-up, so that fences are fitted and applied in the timed steps. Fences fitted to so few steps flag much; what
        # follows from a flag is part of what is timed, but nobody may be banned.
        verification = Verification(warmup_steps=2)
        flagging = Response(ban_after=None, audit_rate=None)
        # A long warm-up: of audits those that are drawn are to be timed, not those of bad fences.
        audited = Variant(Verification(warmup_steps=1000), Response(on_flag="log", ban_after=None, audit_rate=_AUDITS))
        found = {"unverified": Variant(None, Response(ban_after=None))}
        if trust:
            found["verified"] = Variant(verification, flagging, UNSIGNED)
            found["verified, signed"] = Variant(verification, flagging)
            found[f"{_AUDITS:.0%} audited, not signed"] = audited._replace(identity=UNSIGNED)
            found[f"{_AUDITS:.0%} audited, signed"] = audited
            return found
        found["verified"] = Variant(verification, flagging)
        if self.replicas > 1:
            found[f"{_AUDITS:.0%} audited"] = audited
            banned = [Worker(self.stages - 1, self.replicas - 1)]
            found["one banned"] = Variant(verification, replace(flagging, banned=banned))
        return found


def throughput(workload: Workload = Workload(), trust: bool = False, output: Path | None = None) -> None:
    """Time a step of bare DeepSpeed, of the strategy, and of the strategy with verification, audits, and a banned worker.

    Args:
        workload: what is trained.
        trust: time instead what it costs that workers sign what they say, and show how many bytes they send for it. Takes two
            replicas, because it is audits that need it.
        output: a file for the results, as JSON.

    Raises:
        ConfigurationError: if ``trust`` is asked of one replica.
    """
    if trust and workload.replicas < 2:
        raise ConfigurationError(
            f"With {workload.replicas} replica nobody can audit, so nothing is signed. Add --workload.replicas 2."
        )
    turns: dict[str, list[list[float]]] = on_ranks(_measure, workload.stages * workload.replicas, asdict(workload), trust)
    seconds = {name: [turn.seconds for turn in map(_Time._make, found)] for name, found in turns.items()}
    cpu_seconds = {name: [turn.cpu_seconds for turn in map(_Time._make, found)] for name, found in turns.items()}
    title = f"width {workload.width}, {workload.stages} stages x {workload.replicas} replicas"
    Console().print(_table(f"{title}: time on the clock", seconds, workload.tokens))
    Console().print(_table(f"{title}: CPU time of all ranks", cpu_seconds, workload.tokens))
    if trust:
        mesh = Mesh(workload.stages, workload.replicas)
        tokens = workload.sequence_length * workload.micro_batch_size
        here = StepTraffic("this one, in bfloat16", mesh, workload.micro_batches, tokens, workload.width)
        Console().print(table_of_traffic((here, *EXAMPLES)))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        results = {"workload": asdict(workload), "seconds": seconds, "cpu_seconds": cpu_seconds}
        output.write_text(json.dumps(results, indent=2))


def _table(title: str, times: dict[str, list[float]], tokens: int) -> Table:
    """Medians over the turns of each variant, and its ratios to others.

    Args:
        title: title of the table.
        times: seconds of a step, by variant, of each round.
        tokens: number of tokens in a step.
    """
    table = Table(title=title)
    for heading in ("", "step (ms)", "tokens/s", "against bare", "against unverified", "against verified"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, turns in times.items():
        median = statistics.median(turns)
        against = [f"{_ratio(turns, times[other]):.3f}" for other in (_BARE, "unverified", "verified")]
        table.add_row(name, f"{1e3 * median:.1f}", f"{tokens / median:,.0f}", *against)
    return table


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(times, others))


class _Time(NamedTuple):
    """On the clock, and of the CPU in this process."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> _Time:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def of_a_step(self, stop: _Time, steps: int) -> _Time:
        """Mean of the steps from here to ``stop``, on this rank's clock and of all ranks' CPU time; a collective."""
        cpu_seconds = torch.tensor([stop.cpu_seconds - self.cpu_seconds], dtype=torch.float64)
        cpu_seconds = cpu_seconds.to("cuda") if dist.get_backend() == "nccl" else cpu_seconds
        dist.all_reduce(cpu_seconds)
        return _Time((stop.seconds - self.seconds) / steps, float(cpu_seconds) / steps)


def _measure(settings: dict[str, Any], trust: bool) -> dict[str, list[list[float]]]:
    """On every rank: let the variants take turns."""
    workload = Workload(**settings)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # The first turn of the strategy starts the process group that the bare pipeline needs as well.
    variants = workload.variants(trust)
    _lightning(workload, variants["unverified"])
    names = (_BARE, *variants)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(workload.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(list(_bare(workload) if name == _BARE else _lightning(workload, variants[name])))
    return times


class _Clock(L.Callback):
    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.start = self.stop = _Time.now()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.start = _Time.now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.last:
            self.stop = _Time.now()


_THROWN_AWAY = 3


def _data(workload: Workload) -> TensorDataset:
    samples = workload.micro_batch_size * workload.micro_batches * workload.replicas
    return random_bytes(samples * (workload.steps + _THROWN_AWAY), workload.sequence_length)


def _lightning(workload: Workload, variant: Variant) -> _Time:
    verification, response, identity = variant
    size = workload.stages, workload.replicas, workload.micro_batches
    strategy = SentinelStrategy(*size, verification, response, identity=identity)
    clock = _Clock(_THROWN_AWAY, workload.steps + _THROWN_AWAY - 1)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = L.Trainer(
            strategy=strategy,
            accelerator="auto",
            devices=workload.stages * workload.replicas,
            callbacks=[clock],
            **QUIET,
        )
        batch_size = workload.micro_batch_size * workload.micro_batches
        trainer.fit(RandomBytesLlama(workload.width, workload.depth), DataLoader(_data(workload), batch_size=batch_size))
    return clock.start.of_a_step(clock.stop, workload.steps)


def _bare(workload: Workload) -> _Time:
    """The same training by ``deepspeed.initialize`` and ``train_batch``, as DeepSpeed's own users write it."""
    import deepspeed
    from deepspeed.runtime.pipe import PipelineModule

    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = PipelineModule(
            layers=list(random_bytes_layers(workload.width, workload.depth)),
            num_stages=workload.stages,
            loss_fn=loss_of_bytes,
            partition_method="parameters",
        )
        config = {
            "train_micro_batch_size_per_gpu": workload.micro_batch_size,
            "gradient_accumulation_steps": workload.micro_batches,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
        }
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-4)
        engine, *_ = deepspeed.initialize(model=pipeline, optimizer=optimizer, config=config)
    data = _data(workload)
    replica = engine.grid.get_data_parallel_id()
    sampler: DistributedSampler[Any] = DistributedSampler(data, workload.replicas, replica, shuffle=True)
    batches = iter(DataLoader(data, batch_size=workload.micro_batch_size, sampler=sampler))
    for _ in range(_THROWN_AWAY):
        engine.train_batch(batches)
    start = _Time.now()
    for _ in range(workload.steps):
        engine.train_batch(batches)
    return start.of_a_step(_Time.now(), workload.steps)
