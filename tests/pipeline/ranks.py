"""A wire between threads of this process, one a rank."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_sentinel.pipeline.processes.wire import Wire, Work, install

T = TypeVar("T")

_PATIENCE = 30.0
"""Seconds after which ranks that wait for each other in a circle are told so."""


class Silent(Wire):
    """Sends nothing, to nobody: a test overrides what it needs."""

    def __init__(self, ranks: Sequence[int] = (0,), timeout: timedelta = timedelta(seconds=_PATIENCE)) -> None:
        super().__init__(ranks, timeout)

    @property
    def rank(self) -> int:
        return 0

    def _send(self, tensor: Tensor, rank: int) -> None: ...

    def _send_later(self, tensor: Tensor, rank: int, tag: int) -> Work:
        return _Done()

    def _receive(self, tensor: Tensor, rank: int, tag: int) -> None: ...

    def _broadcast(self, tensor: Tensor, source: int) -> Work:
        return _Done()

    def _all_gather(self, everyone: list[Tensor], tensor: Tensor) -> None: ...

    def _all_reduce(self, tensor: Tensor, largest: bool) -> None: ...

    def _barrier(self) -> None: ...

    def _among(self, ranks: tuple[int, ...], timeout: timedelta) -> Wire:
        return Silent(ranks, timeout)

    def _close(self) -> None: ...


class _Done:
    def wait(self) -> None:
        """It is there already."""


class Ranks(Silent):
    """Who sends waits until it was received, so that ranks that do not agree on an order get stuck here as between processes."""

    def __init__(self, size: int) -> None:
        super().__init__(range(size))
        self.sent: list[tuple[int, int]] = []
        """Sender and receiver of each tensor."""
        self.collectives: Counter[str] = Counter()
        """How often each was called by rank zero."""
        self.says: dict[int, Callable[[Tensor], Tensor]] = {}
        """What a rank puts into the next gathers instead of what it should."""
        self._here = threading.local()
        pairs = [(a, b) for a in range(size) for b in range(size)]
        self._letters: dict[tuple[int, int], queue.Queue[Tensor | None]] = {pair: queue.Queue() for pair in pairs}
        self._receipts: dict[tuple[int, int], queue.Queue[Tensor | None]] = {pair: queue.Queue() for pair in pairs}

    @property
    def rank(self) -> int:
        return self._here.rank

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What ``work`` returns on each rank; the error of the first that failed."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self._here.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                for other in range(self.size):
                    self._letters[rank, other].put(None)
                    self._receipts[other, rank].put(None)

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert all(q.empty() for q in self._letters.values()), "something was sent that nobody received"
        return results

    def _send(self, tensor: Tensor, rank: int) -> None:
        self.sent.append((self.rank, rank))
        self._post(tensor, rank)
        self._take(self._receipts[self.rank, rank], f"rank {self.rank} sends to {rank}")

    def _send_later(self, tensor: Tensor, rank: int, tag: int) -> Work:
        self._post(tensor, rank)
        return _Done()

    def _receive(self, tensor: Tensor, rank: int, tag: int) -> None:
        self._get(tensor, rank)
        self._receipts[rank, self.rank].put(tensor)

    def _broadcast(self, tensor: Tensor, source: int) -> Work:
        return self.broadcast_among(self.ranks, tensor, source)

    def broadcast_among(self, members: Sequence[int], tensor: Tensor, source: int) -> Work:
        self._count("broadcast")
        assert self.rank in members and source in members
        if self.rank == source:
            for rank in members:
                if rank != source:
                    self._post(tensor, rank)
        else:
            self._get(tensor, source)
        return _Done()

    def _all_gather(self, everyone: list[Tensor], tensor: Tensor) -> None:
        self._count("all_gather")
        tensor = self.says.get(self.rank, lambda said: said)(tensor)
        for rank in range(self.size):
            self._post(tensor, rank)
        for rank, place in enumerate(everyone):
            self._get(place, rank)

    def _all_reduce(self, tensor: Tensor, largest: bool) -> None:
        everyone = [torch.empty_like(tensor) for _ in self.ranks]
        self._all_gather(everyone, tensor)
        found = torch.stack(everyone)
        tensor.copy_(found.amax(dim=0) if largest else found.sum(dim=0))

    def _barrier(self) -> None:
        self._all_reduce(torch.zeros(1), False)

    def _among(self, ranks: tuple[int, ...], timeout: timedelta) -> Wire:
        return _Some(self, ranks, timeout)

    def _count(self, what: str) -> None:
        self.collectives[what] += self.rank == 0

    def _post(self, tensor: Tensor, rank: int) -> None:
        assert tensor.is_contiguous()
        self._letters[self.rank, rank].put(tensor.detach().clone())

    def _get(self, tensor: Tensor, rank: int) -> None:
        letter = self._take(self._letters[rank, self.rank], f"rank {self.rank} waits for {rank}")
        assert (letter.shape, letter.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(letter)

    @staticmethod
    def _take(letters: queue.Queue[Tensor | None], what: str) -> Tensor:
        try:
            letter = letters.get(timeout=_PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"{what}, and so it would for ever") from None
        if letter is None:
            raise ConnectionError(f"{what}, which has failed")
        return letter


class _Some(Silent):
    """Some of the ranks, which broadcast among themselves."""

    def __init__(self, world: Ranks, ranks: tuple[int, ...], timeout: timedelta) -> None:
        super().__init__(ranks, timeout)
        self._of = world

    @property
    def rank(self) -> int:
        return self._of.rank

    def _broadcast(self, tensor: Tensor, source: int) -> Work:
        return self._of.broadcast_among(self.ranks, tensor, source)


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """The wire inside is between the threads of :meth:`Ranks.run`."""
    with installed(Ranks(size)) as world:
        yield world


W = TypeVar("W", bound=Wire)


@contextmanager
def installed(wire: W) -> Iterator[W]:
    """A wire in the place of that of all ranks."""
    before = install(wire)
    try:
        yield wire
    finally:
        install(before)


def same_tree(one: Any, other: Any) -> bool:
    """Whether two nested collections are of the same kinds and hold the same values, NaN included."""
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.allclose(one, other, 0, 0, equal_nan=True)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_tree(a, b) for a, b in zip(one, other))
    return one == other or (one != one and other != other)
