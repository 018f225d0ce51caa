"""Splits the combined batch of several loaders, each loader's batch by its own number of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.even import Even, SplitBatch, Whole
from lightning_sentinel.pipeline.data.micro_batches import MicroBatches, evenly
from lightning_sentinel.pipeline.data.reading import Source
from lightning_sentinel.pipeline.messages.containers import rebuilt

__all__ = ["Several", "belongs"]

Parts = Mapping[Any, Source] | list[Source]


def belongs(batch: Any, parts: Parts) -> bool:
    """Whether a batch still has the structure of its loaders, which a hook may have changed.

    Example:
        >>> belongs({"a": 1, "b": 2}, {"b": Source(), "a": Source()}), belongs([1, 2, 3], [Source(), Source()])
        (True, False)
    """
    if isinstance(parts, Mapping):
        return isinstance(batch, Mapping) and batch.keys() == parts.keys()
    return isinstance(batch, (list, tuple)) and len(batch) == len(parts)


@dataclass(frozen=True)
class Several:
    """A combined batch of several loaders: every micro-batch has its share of each loader's batch.

    If the loaders' batches differ in size, the number of micro-batches divides all sizes: the mean over micro-batches is the mean
    over each loader's samples only if every micro-batch has the same share of all batches. The number of samples is that of the
    first loader that has any, as in Lightning.

    Args:
        batch: of all loaders.
        wholes: each loader's batch; ``None`` if nothing in it is per sample, as for a loader that has no batch left.
    """

    batch: Any
    wholes: Sequence[Whole | None]

    @classmethod
    def of(cls, batch: Any, parts: Parts, whole: Callable[[Any, Source], Whole]) -> Several:
        """Make one from a batch that :func:`belongs` to its loaders.

        Raises:
            ConfigurationError: if the batch of one loader cannot be read.
        """
        wholes: list[Whole | None] = []
        for key in batch if isinstance(parts, Mapping) else range(len(parts)):
            try:
                one = whole(batch[key], parts[key])
            except ConfigurationError as error:
                raise ConfigurationError(f"Of the loader {key!r}: {error}") from error
            wholes.append(None if isinstance(one, Even) and not one.reading.goes_by_samples else one)
        return cls(batch, wholes)

    @property
    def samples(self) -> int:
        return next((samples for samples in self._samples if samples), 0 if self._samples else 1)

    def most(self, count: int) -> int:
        return _most(self._samples, count)

    def dealt(self, count: int) -> MicroBatches:
        of_each = [None if one is None else one.dealt(count) for one in self.wholes]
        return MicroBatches(_SideBySide(self.batch, of_each), evenly(self.samples, count), self.batch)

    def dealt_to(self, replicas: int, count: int) -> SplitBatch:
        count = _most([-(-samples // replicas) for samples in self._samples], count)
        deals = [None if one is None else one.dealt_to(replicas, count) for one in self.wholes]
        first = next((deal for deal in deals if deal is not None and deal.samples), None)
        if first is None:
            return Even.nothing(self.batch, self.samples).dealt_to(replicas, 1)
        mine = []
        for replica, counted in enumerate(first.replicas):
            of_each = [None if deal is None else deal.replicas[replica] for deal in deals]
            mine.append(MicroBatches(_SideBySide(self.batch, of_each), counted.sizes, self.batch))
        return SplitBatch(first.sizes, mine, first.samples, first.rows)

    @property
    def _samples(self) -> list[int]:
        return [one.samples for one in self.wholes if one is not None]


def _most(samples: Sequence[int], count: int) -> int:
    """The number of micro-batches, at most ``count``, that batches of these numbers of samples can be split into.

    Example:
        >>> _most([8, 8], 3), _most([8, 12], 3), _most([8, 5], 4)
        (3, 2, 1)
    """
    different = {number for number in samples if number}
    if not samples or not different:
        return count if samples else 1
    if len(different) == 1:
        return min(count, *different)
    return next(number for number in range(count, 0, -1) if not any(size % number for size in different))


@dataclass(frozen=True)
class _SideBySide(Sequence[Any]):
    """Micro-batches of several loaders, combined on access."""

    batch: Any
    of_each: Sequence[MicroBatches | None]

    def __len__(self) -> int:
        return next(len(one) for one in self.of_each if one is not None)

    def __getitem__(self, index: Any) -> Any:
        held = list(self.batch.values()) if isinstance(self.batch, Mapping) else list(self.batch)
        return rebuilt(self.batch, [whole if one is None else one[index] for whole, one in zip(held, self.of_each)])
