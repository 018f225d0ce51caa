"""How long it takes until processes train, against what importing the libraries alone takes them.

The variants take turns on the same machine: processes that import torch, Lightning and DeepSpeed and end, and as many that go on to
the first training batch of a pipeline. The difference is what the strategy adds: its own imports, the rendezvous, the pipeline.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time

import lightning as L
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

__all__ = ["startup"]

_IMPORTS = "import torch, lightning, deepspeed"
_TRAINS = "from lightning_sentinel.benchmarks.startup import first_batch; first_batch({stages})"
_TIMEOUT = 300.0
"""Seconds; ten times what it takes two cores."""


def startup(stages: int = 2, replicas: int = 2, rounds: int = 5) -> None:
    """Time the start of a run up to its first training batch.

    Args:
        stages: number of stages.
        replicas: number of replicas; one process for each stage and replica.
        rounds: turns of each variant.
    """
    processes = stages * replicas
    times = {"imports alone": list[float](), "up to the first batch": list[float]()}
    codes = dict(zip(times, (_IMPORTS, _TRAINS.format(stages=stages))))
    for number in range(rounds):
        for name in list(codes) if number % 2 else reversed(list(codes)):
            times[name].append(_seconds(codes[name], processes))
    before, after = times.values()
    table = Table(title=f"{processes} processes on {os.cpu_count()} cores")
    for heading in ("", "seconds", "added"):
        table.add_column(heading, justify="right" if heading else "left")
    added = statistics.median(mine - theirs for mine, theirs in zip(after, before))
    for name, seconds in times.items():
        table.add_row(name, f"{statistics.median(seconds):.1f}", f"{added:.1f}" if seconds is after else "")
    Console().print(table)


def first_batch(stages: int) -> None:
    """Train a tiny model for one batch, as one of the processes of the environment."""
    from lightning_sentinel.benchmarks.random_bytes import QUIET, RandomBytesLlama, random_bytes
    from lightning_sentinel.strategy import SentinelStrategy

    world_size = int(os.environ["WORLD_SIZE"])
    # Verified, as users have it.
    strategy = SentinelStrategy(stages=stages)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=world_size, max_steps=1, **QUIET)
    trainer.fit(RandomBytesLlama(32, stages), DataLoader(random_bytes(64, 16), batch_size=16))


def _seconds(code: str, processes: int) -> float:
    """From the start of all processes to the end of the last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "DS_ACCELERATOR": "cpu"}
    environment |= {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    try:
        codes = [process.wait(timeout=_TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise RuntimeError(f"Of the processes that run {code!r} some ended with {codes}. Run it by hand to see why.")
    return time.perf_counter() - start
