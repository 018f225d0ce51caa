"""Starts the ranks of a benchmark on this machine."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

__all__ = ["on_ranks"]


def on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> Any:
    """Call ``function(*arguments)`` on ``world_size`` ranks and return what rank zero returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.pt"
        mp.start_processes(_rank, (function, arguments, world_size, port, str(answer)), nprocs=world_size, start_method="spawn")
        return torch.load(answer, weights_only=True)


def _rank(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], world_size: int, port: int, answer: str) -> None:
    # Everything on one machine shares its cores evenly, so that ratios are those of the work and not of the scheduler.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    result = function(*arguments)
    if rank == 0:
        torch.save(result, answer)
