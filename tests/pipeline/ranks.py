"""``torch.distributed`` between threads of this process, one a rank."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")

_PATIENCE = 30.0
"""Seconds after which ranks that wait for each other in a circle are told so."""


class Ranks:
    """Who sends waits until it was received, so that ranks that do not agree on an order get stuck here as between processes."""

    def __init__(self, size: int) -> None:
        self.size = size
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

    def send(self, tensor: Tensor, rank: int) -> None:
        self.sent.append((self.rank, rank))
        self._post(tensor, rank)
        self._take(self._receipts[self.rank, rank], f"rank {self.rank} sends to {rank}")

    def recv(self, tensor: Tensor, rank: int) -> None:
        self._get(tensor, rank)
        self._receipts[rank, self.rank].put(tensor)

    def broadcast(self, tensor: Tensor, source: int, group: Collection[int] | None = None) -> None:
        self._count("broadcast")
        members = range(self.size) if group is None else group
        assert self.rank in members and source in members
        if self.rank == source:
            for rank in members:
                if rank != source:
                    self._post(tensor, rank)
        else:
            self._get(tensor, source)

    def all_gather(self, gathered: Sequence[Tensor], tensor: Tensor) -> None:
        self._count("all_gather")
        tensor = self.says.get(self.rank, lambda said: said)(tensor)
        for rank in range(self.size):
            self._post(tensor, rank)
        for rank, place in enumerate(gathered):
            self._get(place, rank)

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


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """``torch.distributed`` inside is between the threads of :meth:`Ranks.run`."""
    world = Ranks(size)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("send", "recv", "broadcast", "all_gather"):
            patch.setattr(f"torch.distributed.{name}", getattr(world, name))
        patch.setattr("torch.distributed.get_rank", lambda: world.rank)
        patch.setattr("torch.distributed.is_initialized", lambda: True)
        yield world


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
