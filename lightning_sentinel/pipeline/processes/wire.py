"""The wire between ranks: everything that one rank sends to another goes through the wire of all ranks, :func:`world`.

:class:`Wire` is the interface, with what is the same for all transports: bounds on sizes, and errors that name the peer. Another
transport implements its abstract methods, all of them at the end of the class, in a file of its own, as
:mod:`~lightning_sentinel.pipeline.processes.torch_wire` does for ``torch.distributed``. A test installs a faulty or hostile one.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Protocol

from lightning_sentinel.errors import MalformedMessageError, WorkerLostError
from lightning_sentinel.pipeline.processes.lost_connections import sounds_lost

__all__ = ["Sending", "Wire", "install", "is_connected", "world"]

_HOST = torch.device("cpu")
_MOST_OF_AN_OBJECT = 2**40


class Work(Protocol):
    """An operation of a transport that is under way."""

    def wait(self) -> Any: ...


class Sending:
    """A tensor on its way to a rank.

    Args:
        wire: that sends it.
        work: the transport's operation.
        tensor: that must not be written to before it has arrived.
        rank: of the receiver.
    """

    def __init__(self, wire: Wire, work: Work, tensor: Tensor, rank: int) -> None:
        self._wire = wire
        self._work = work
        self._tensor = tensor
        self._rank = rank

    def wait(self) -> None:
        """Wait until the receiver has it.

        Raises:
            WorkerLostError: if the receiver does not answer.
        """
        with self._wire.waiting_for(self._rank):
            self._work.wait()


class Wire(ABC):
    """Connects this rank with some or all of the others.

    Each operation raises :class:`~lightning_sentinel.errors.WorkerLostError` if a peer is gone, or does not answer within
    ``timeout``. The error names the peer, or for a collective the ranks that were waited for.

    Ranks are global ones, also in a wire of some ranks.

    Args:
        ranks: that it connects, in the order of gathered tensors.
        timeout: how long each operation waits.
    """

    def __init__(self, ranks: Sequence[int], timeout: timedelta) -> None:
        self.ranks = tuple(ranks)
        self.timeout = timeout
        self._parts: dict[tuple[tuple[int, ...], timedelta], Wire] = {}

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank."""

    group: Any = None
    """These ranks as a group of ``torch.distributed``, for code that takes one, such as torchmetrics'; ``None`` is all ranks."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return False

    def device_for(self, device: torch.device) -> torch.device:
        """The device from which a device's tensors are sent: that device, or the host."""
        return _HOST

    # ------------------------------------------------------------------------------------------------------ from rank to rank

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a tensor that is where :meth:`device_for` says, and wait until ``rank`` receives it."""
        with self.waiting_for(rank):
            self._send(tensor, rank)

    def send_later(self, tensor: Tensor, rank: int, tag: int = 0) -> Sending:
        """Send a tensor without waiting for its receiver.

        Args:
            tensor: where :meth:`device_for` says.
            rank: of the receiver.
            tag: keeps messages of one kind from being taken for those of another.
        """
        with self.waiting_for(rank):
            return Sending(self, self._send_later(tensor, rank, tag), tensor, rank)

    def receive(self, tensor: Tensor, rank: int, tag: int = 0) -> None:
        """Receive into a tensor what ``rank`` sends with the same tag."""
        with self.waiting_for(rank):
            self._receive(tensor, rank, tag)

    def send_bytes(self, data: bytes, rank: int) -> None:
        """Send bytes, at least one, to a rank that calls :meth:`receive_bytes`."""
        for piece in _pieces(data):
            self.send(piece, rank)

    def send_bytes_later(self, data: bytes, rank: int, tag: int = 0) -> list[Sending]:
        """Like :meth:`send_bytes`, without waiting for the receiver."""
        return [self.send_later(piece, rank, tag) for piece in _pieces(data)]

    def receive_bytes(self, rank: int, most: int, what: str, tag: int = 0) -> bytes:
        """Receive bytes.

        Args:
            rank: of the sender.
            most: limit on their number, checked before memory for them is allocated.
            what: they are, for the error message.
            tag: with which they are sent.

        Raises:
            MalformedMessageError: if the sender announces more bytes, or none.
        """
        length = torch.full((1,), -1)
        self.receive(length, rank, tag)
        data = _room_for(int(length), most, rank, what)
        self.receive(data, rank, tag)
        return data.numpy().tobytes()

    # ------------------------------------------------------------------------------------------------------------ collectives

    def all_gather(self, tensor: Tensor) -> Tensor:
        """All-gather a tensor of the same shape on all ranks: ``(ranks, ...)``, on its device. An empty one is not sent."""
        message = tensor.to(self.device_for(tensor.device))
        everyone = message.new_empty(self.size, *message.shape)
        if message.numel():
            with self.waiting_for_all("all-gather"):
                self._all_gather(list(everyone.unbind()), message)
        return everyone.to(tensor.device)

    def all_reduce(self, tensor: Tensor, largest: bool = False) -> None:
        """All-reduce a tensor over the ranks, in place: the sum, or the largest of each value."""
        message = tensor.to(self.device_for(tensor.device))
        with self.waiting_for_all("all-reduce"):
            self._all_reduce(message, largest)
        if message is not tensor:
            tensor.copy_(message)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Broadcast a tensor from the rank ``source``, in place."""
        self.broadcast_each([(tensor, source)])

    def broadcast_each(self, sources: Iterable[tuple[Tensor, int]]) -> None:
        """Run several broadcasts concurrently: of each tensor, from the rank that is given with it, in place."""
        with self.waiting_for_all("broadcast"):
            under_way = []
            for tensor, source in sources:
                message = self._to_broadcast(tensor, source)
                under_way.append((tensor, message, self._broadcast(message, source)))
            for tensor, message, work in under_way:
                work.wait()
                if message is not tensor:
                    tensor.copy_(message)

    def broadcast_bytes(self, data: bytes, source: int, most: int, what: str) -> bytes:
        """Broadcast bytes.

        Args:
            data: at least one byte; read on the source only.
            source: the rank that has them.
            most: limit on their number.
            what: they are, for the error message.

        Raises:
            MalformedMessageError: if the source announces more bytes, or none.
        """
        mine = self.rank == source
        length = torch.tensor([len(data) if mine else -1])
        self.broadcast(length, source)
        # The source refuses as well, so that no rank goes on alone.
        room = _room_for(int(length), most, source, what)
        message = _pieces(data)[1] if mine else room
        self.broadcast(message, source)
        return data if mine else message.numpy().tobytes()

    def broadcast_object(self, value: Any, source: int) -> Any:
        """Pickled, as Lightning does it at its start-up. What workers tell each other in a run is never pickled."""
        data = pickle.dumps(value) if self.rank == source else b""
        said = self.broadcast_bytes(data, source, _MOST_OF_AN_OBJECT, "an object")
        return value if self.rank == source else pickle.loads(said)

    def barrier(self) -> None:
        """Wait for all ranks."""
        with self.waiting_for_all("barrier"):
            self._barrier()

    def _to_broadcast(self, tensor: Tensor, source: int) -> Tensor:
        place = self.device_for(tensor.device)
        if place == tensor.device:
            return tensor
        return tensor.to(place) if source == self.rank else torch.empty_like(tensor, device=place)

    # ------------------------------------------------------------------------------------------------------- some of the ranks

    def among(self, ranks: Sequence[int], timeout: timedelta) -> Wire:
        """The wire of some of the ranks, kept for later calls, because each has its own connections.

        For all ranks to call, with the same arguments, in the same order of calls.
        """
        key = tuple(ranks), timeout
        if key not in self._parts:
            self._parts[key] = self._among(*key)
        return self._parts[key]

    def drop(self, part: Wire) -> None:
        """Close a wire of some of the ranks; for all ranks to call, once none of them is in an operation of this wire."""
        self._parts.pop((part.ranks, part.timeout), None)
        if self.rank in part.ranks:
            part._close()

    # ------------------------------------------------------------------------------------------------------------------ errors

    @staticmethod
    def waiting_for(rank: int) -> AbstractContextManager[None]:
        """A context that turns a lost connection into a ``WorkerLostError`` that names the peer."""
        return _naming(f"Rank {rank} does not answer", rank)

    def waiting_for_all(self, what: str) -> AbstractContextManager[None]:
        """A context that turns a connection that is lost in a collective into a ``WorkerLostError`` that names the other ranks."""
        others = [rank for rank in self.ranks if rank != self.rank]
        only = others[0] if len(others) == 1 else None
        who = f"Rank {only}" if only is not None else f"One of the ranks {', '.join(map(str, others))}"
        return _naming(f"{who} does not answer in an operation of all ({what})", only)

    # -------------------------------------------------------------------------------------------- what a transport implements

    @abstractmethod
    def _among(self, ranks: tuple[int, ...], timeout: timedelta) -> Wire: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _send(self, tensor: Tensor, rank: int) -> None: ...

    @abstractmethod
    def _send_later(self, tensor: Tensor, rank: int, tag: int) -> Work: ...

    @abstractmethod
    def _receive(self, tensor: Tensor, rank: int, tag: int) -> None: ...

    @abstractmethod
    def _all_gather(self, everyone: list[Tensor], tensor: Tensor) -> None: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor, largest: bool) -> None: ...

    @abstractmethod
    def _broadcast(self, tensor: Tensor, source: int) -> Work: ...

    @abstractmethod
    def _barrier(self) -> None: ...


@contextmanager
def _naming(who: str, rank: int | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not sounds_lost(error):
            raise
        raise WorkerLostError(f"{who}: {error}", rank=rank) from error


def _pieces(data: bytes) -> tuple[Tensor, Tensor]:
    """The length of some bytes, and the bytes, as they are sent."""
    return torch.tensor([len(data)]), torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _room_for(length: int, most: int, rank: int, what: str) -> Tensor:
    if not 0 < length <= most:
        raise MalformedMessageError(f"Rank {rank} announces {what} of {length} bytes, which there cannot be.", rank=rank)
    return torch.empty(length, dtype=torch.uint8)


_world: Wire | None = None


def install(wire: Wire | None) -> Wire | None:
    """Make a wire that of all ranks. Returns the one before it."""
    global _world
    before = _world
    _world = wire
    return before


def is_connected() -> bool:
    """Whether this process is connected with others, or could be: a process that is alone may have a wire too."""
    return _world is not None and not _world.is_closed


def world() -> Wire:
    """The wire of all ranks."""
    assert _world is not None, "processes are connected before they send anything"
    return _world
