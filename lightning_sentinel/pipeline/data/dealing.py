"""Batches dealt to replicas and micro-batches: evenly by samples, or as the module's own ``split_batch`` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes, MicroBatches, evenly
from lightning_sentinel.pipeline.data.reading import Reading, Source, read
from lightning_sentinel.pipeline.messages.trees import leaves_of

__all__ = ["Deal", "Dealer", "Whole"]


@dataclass(frozen=True)
class Deal:
    """What an engine works on in a step.

    Args:
        sizes: what all ranks know.
        replicas: the micro-batches of each replica that this process loads the samples of: one, or on a virtual mesh all.
        samples: of all of these together.
        rows: which rows of the batch each micro-batch has.
        by_module: whether the module has dealt it, so that the first axis of a tensor need not be that of samples.
    """

    sizes: BatchSizes
    replicas: Sequence[MicroBatches]
    samples: int
    rows: Sequence[Sequence[Sequence[int]]] = ()
    by_module: bool = False


class Whole(Protocol):
    """A batch that is to be dealt."""

    @property
    def samples(self) -> int: ...

    def most(self, count: int) -> int:
        """Into how many of ``count`` micro-batches it can be dealt."""

    def dealt(self, count: int) -> MicroBatches:
        """Into so many micro-batches."""

    def dealt_to(self, replicas: int, count: int) -> Deal:
        """To the replicas of a virtual mesh."""


class Dealer:
    """Knows how batches of a module are dealt.

    Args:
        module: the user's. If it has a method ``split_batch(batch, count)``, that deals its batches, and ``count_samples(batch)``
            counts what is in them.

    Example:
        >>> import torch
        >>> dealt = Dealer(object()).whole((torch.arange(5), "name")).dealt(2)
        >>> dealt[1], dealt.sizes
        ((tensor([3, 4]), 'name'), (3, 2))
    """

    def __init__(self, module: object) -> None:
        self._split: Callable[[Any, int], Any] | None = getattr(module, "split_batch", None)
        self._count: Callable[[Any], int] | None = getattr(module, "count_samples", None)
        self._name = type(module).__name__

    @property
    def by_module(self) -> bool:
        """Whether the module deals its batches itself, so that nobody knows their sizes beforehand."""
        return self._split is not None

    def whole(self, batch: Any, source: Source | None = None) -> Whole:
        """A batch, ready to be dealt.

        Args:
            batch: what the loader gave.
            source: what is known of the loader.

        Raises:
            ConfigurationError: if it cannot be told how to deal it.
        """
        if self._split is None:
            return _Even(read(batch, source))
        if batch is None:
            return _Even(Reading(None, 0, None))
        return _ByModule(batch, self._split, self._count, self._name)

    def samples(self, batch: Any, source: Source | None = None) -> int:
        """How many samples a batch has."""
        return self.whole(batch, source).samples


@dataclass(frozen=True)
class _Even:
    """Dealt by samples, as evenly as possible."""

    reading: Reading

    @property
    def samples(self) -> int:
        return self.reading.samples

    def most(self, count: int) -> int:
        return min(count, self.samples) if self.samples else count

    def dealt(self, count: int) -> MicroBatches:
        if 0 < self.samples < count:
            raise ConfigurationError(
                f"A replica's batch of {self.samples} sample(s) cannot be dealt into micro_batches={count}. Use a larger"
                " batch_size, drop_last=True if only the last batch is short, or SentinelStrategy(micro_batches=...) of at most the"
                " batch size."
            )
        sizes = evenly(self.samples, count)
        return MicroBatches(_Parts(self.reading, sizes), sizes, self.reading.batch)

    def dealt_to(self, replicas: int, count: int) -> Deal:
        """Replica ``r`` gets the samples ``r``, ``r + replicas`` and so on, which is what ``DistributedSampler`` gives it. A batch
        that cannot be divided evenly is filled up from its beginning, as the sampler fills up a data set."""
        each = -(-self.samples // replicas)
        order = [row % max(1, self.samples) for row in range(each * replicas)]
        mine = [order[replica::replicas] for replica in range(replicas)]
        sizes = BatchSizes.of([each] * replicas, count)
        dealt = [_Even(self.reading.picked(rows)).dealt(sizes.micro_batches) for rows in mine]
        parts = evenly(each, sizes.micro_batches)
        return Deal(sizes, dealt, self.samples, [_split(rows, parts) for rows in mine])


@dataclass(frozen=True)
class _Parts(Sequence[Any]):
    """Micro-batches, cut when they are asked for: in the middle of a pipeline nobody asks."""

    reading: Reading
    sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        start = sum(self.sizes[:index])
        return self.reading.part(slice(start, start + self.sizes[index]))


def _split(rows: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [rows[end - size : end] for end, size in zip(ends, sizes)]


class _ByModule:
    """Dealt by the module."""

    def __init__(self, batch: Any, split: Callable[[Any, int], Any], count: Callable[[Any], int] | None, name: str) -> None:
        self._batch, self._split, self._count, self._name = batch, split, count, name
        self._latest: tuple[int, list[Any]] = (0, [])

    @property
    def samples(self) -> int:
        if self._count is not None:
            return self._counted(self._batch)
        return sum(self._sizes(self._pieces(max(1, self._latest[0]))))

    def most(self, count: int) -> int:
        return len(self._pieces(count))

    def dealt(self, count: int) -> MicroBatches:
        pieces = self._pieces(count)
        if len(pieces) != count:
            raise ConfigurationError(
                f"{self._name}.split_batch returned {len(pieces)} micro-batches where {count} were asked for. Return as many as"
                " are asked for, unless the batch has fewer samples."
            )
        return MicroBatches(pieces, self._sizes(pieces), self._batch)

    def dealt_to(self, replicas: int, count: int) -> Deal:
        """Micro-batch ``k`` of replica ``r`` is piece ``k * replicas + r`` of all; where there are fewer, again from the first."""
        pieces = self._pieces(replicas * count)
        each = -(-len(pieces) // replicas)
        sizes = self._sizes(pieces)
        rows = _split(range(sum(sizes)), sizes)
        mine = [[(number * replicas + replica) % len(pieces) for number in range(each)] for replica in range(replicas)]
        dealt = [MicroBatches([pieces[one] for one in order], [sizes[one] for one in order], self._batch) for order in mine]
        known = BatchSizes(each, tuple(sum(one.sizes) for one in dealt), tuple(one.sizes for one in dealt))
        return Deal(known, dealt, sum(sizes), [[rows[one] for one in order] for order in mine], by_module=True)

    def _pieces(self, count: int) -> list[Any]:
        if self._latest[0] != count:
            pieces = self._split(self._batch, count)
            if not isinstance(pieces, (list, tuple)) or not 0 < len(pieces) <= count:
                given = f"{len(pieces)} micro-batches" if isinstance(pieces, (list, tuple)) else type(pieces).__name__
                raise ConfigurationError(
                    f"{self._name}.split_batch(batch, {count}) returned {given}. Return a list of {count} micro-batches, or of"
                    " fewer if the batch has fewer samples."
                )
            self._latest = count, list(pieces)
        return self._latest[1]

    def _sizes(self, pieces: Sequence[Any]) -> tuple[int, ...]:
        """Samples of each piece; alike where that cannot be told."""
        if self._count is not None:
            return tuple(map(self._counted, pieces))
        return _told(self._batch, pieces) or (1,) * len(pieces)

    def _counted(self, batch: Any) -> int:
        assert self._count is not None
        samples = self._count(batch)
        if not isinstance(samples, int) or samples < 1:
            raise ConfigurationError(f"{self._name}.count_samples returned {samples!r}. Return how many samples there are.")
        return samples


def _told(batch: Any, pieces: Sequence[Any]) -> tuple[int, ...] | None:
    """Samples of each piece, by the only sizes that add up to those of the whole in all tensors that were cut."""
    wholes, parts = _shapes(batch), [_shapes(piece) for piece in pieces]
    if any(len(shapes) != len(wholes) for shapes in parts):
        return None
    possible: list[dict[tuple[int, ...], None]] = []
    for index, whole in enumerate(wholes):
        shapes = [part[index] for part in parts]
        if len(pieces) > 1 and all(shape == whole for shape in shapes):
            continue
        axes = range(len(whole)) if all(len(shape) == len(whole) for shape in shapes) else ()
        columns = [tuple(shape[axis] for shape in shapes) for axis in axes]
        possible.append({column: None for axis, column in zip(axes, columns) if sum(column) == whole[axis]})
    agreed = [sizes for sizes in possible[0] if all(sizes in others for others in possible)] if possible else []
    return agreed[0] if agreed and min(agreed[0]) > 0 else None


def _shapes(batch: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in leaves_of(batch) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim]
