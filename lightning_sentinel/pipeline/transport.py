"""Point-to-point messages between neighbouring stages.

A signal travels as one message: its elements, then one more that carries the taint flag, so that the flag costs no message of its
own. Where the receiver cannot know the shape, a header of integers goes ahead, on the host, so that no device is waited for.

Besides, a worker sends small notes past its neighbour to the stage behind it: what the neighbour was sent, along secret directions.
Nobody waits for a note to arrive before going on, because its receiver asks for it only when the neighbour's own signal is there.

``device`` sends tensors from where they are. ``host`` copies them through host memory: between sites, and where the backend cannot
send from the device (several ranks on one GPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError, WorkerLostError
from lightning_sentinel.pipeline.liveness import is_lost_connection

__all__ = ["Transport"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_AXES = 8


class Transport:
    """Sends signals to, and receives them from, other ranks.

    Args:
        device: where signals live.
        mode: ``"device"``, ``"host"``, or ``"auto"``, which sends from the device where the backend can.
    """

    def __init__(self, device: torch.device, mode: Literal["auto", "device", "host"] = "auto") -> None:
        self._device = device
        if mode == "auto":
            mode = "host" if device.type != "cpu" and not _sends_from(device) else "device"
        self._wire = torch.device("cpu") if mode == "host" else device
        self._under_way: list[tuple[int, dist.Work, Tensor]] = []

    def send(self, signal: Tensor, tainted: Tensor, rank: int, *, header: bool) -> None:
        """Send a signal and its taint (0-dim bool); with a header if the receiver does not know the shape.

        Raises:
            PipelineModelError: if the signal is no tensor that can cross a boundary.
        """
        message = torch.cat((signal.detach().reshape(-1), tainted.to(signal.dtype).reshape(1))).to(self._wire)
        head = self._header(signal) if header else None
        with _naming(rank):
            if head is not None:
                dist.send(head, rank)
            dist.send(message, rank)

    def receive(self, rank: int, *, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Receive a signal and its taint from ``rank``.

        Args:
            like: a tensor of the signal's shape and dtype; without one a header is expected.

        Returns:
            the signal, in memory of its own, and the 0-dim bool taint.
        """
        if like is None:
            shape, dtype, _ = self._read_header(rank)
        else:
            shape, dtype = tuple(like.shape), like.dtype
        message = torch.empty(math.prod(shape) + 1, dtype=dtype, device=self._wire)
        with _naming(rank):
            dist.recv(message, rank)
        message = message.to(self._device)
        return message[:-1].view(shape), message[-1].bool()

    def send_note(self, note: Tensor, number: int, rank: int) -> None:
        """Send a tensor, and a number with its header, without waiting; :meth:`finish_notes` does."""
        for message in (self._header(note, number), note.contiguous().to(self._wire)):
            with _naming(rank):
                work = dist.isend(message, rank)
            assert work is not None, "the default group has all ranks"
            self._under_way.append((rank, work, message))

    def receive_note(self, rank: int) -> tuple[Tensor, int]:
        """Receive what :meth:`send_note` sent: the tensor and the number."""
        shape, dtype, number = self._read_header(rank)
        note = torch.empty(shape, dtype=dtype, device=self._wire)
        with _naming(rank):
            dist.recv(note, rank)
        return note.to(self._device), number

    def finish_notes(self) -> None:
        """Wait until all notes were taken; at the end of a schedule, when their receivers have asked for them."""
        for rank, work, _ in self._under_way:
            with _naming(rank):
                work.wait()
        self._under_way.clear()

    @staticmethod
    def _header(signal: Tensor, number: int = 0) -> Tensor:
        if signal.dtype not in _DTYPES or signal.ndim > _MOST_AXES:
            raise PipelineModelError(
                f"A stage returned a tensor of shape {tuple(signal.shape)} and dtype {signal.dtype}. Between stages travels one"
                f" floating-point tensor with at most {_MOST_AXES} axes: end the stage at a layer that returns one."
            )
        sizes = list(signal.shape) + [0] * (_MOST_AXES - signal.ndim)
        return torch.tensor([_DTYPES.index(signal.dtype), number, signal.ndim, *sizes])

    @staticmethod
    def _read_header(rank: int) -> tuple[tuple[int, ...], torch.dtype, int]:
        header = torch.empty(3 + _MOST_AXES, dtype=torch.int64)
        with _naming(rank):
            dist.recv(header, rank)
        dtype, number, axes, *sizes = header.tolist()
        return tuple(sizes[:axes]), _DTYPES[dtype], number


@contextmanager
def _naming(rank: int) -> Iterator[None]:
    """Say which peer it was when a connection is lost."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise WorkerLostError(f"Rank {rank} does not answer: {error}", rank=rank) from error


def _sends_from(device: torch.device) -> bool:
    """Whether the default process group can send tensors of this device; gloo sends from the host only."""
    return dist.get_backend_config().find(f"{device.type}:nccl") >= 0 or dist.get_backend() in ("nccl", "xccl", "hccl")
