"""Splits a batch evenly by samples, and defines the interface of every batch that can be split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes, MicroBatches, evenly
from lightning_sentinel.pipeline.data.reading import Reading

__all__ = ["Even", "SplitBatch", "Whole", "split"]


@dataclass(frozen=True)
class SplitBatch:
    """The micro-batches that an engine works on in a step.

    Args:
        sizes: of every replica's batch, the same on all ranks.
        replicas: the micro-batches of each replica whose samples this process loads: one replica, or on a virtual mesh all.
        samples: number of samples of all these replicas.
        rows: of each replica and micro-batch, its rows of the batch.
        by_module: whether the module has split the batch, so that the first axis of a tensor need not be that of samples.
    """

    sizes: BatchSizes
    replicas: Sequence[MicroBatches]
    samples: int
    rows: Sequence[Sequence[Sequence[int]]] = ()
    by_module: bool = False


class Whole(Protocol):
    """A batch that can be split."""

    @property
    def samples(self) -> int: ...

    def most(self, count: int) -> int:
        """The number of micro-batches, at most ``count``, that it can be split into."""

    def dealt(self, count: int) -> MicroBatches:
        """Split it into ``count`` micro-batches."""

    def dealt_to(self, replicas: int, count: int) -> SplitBatch:
        """Split it over the replicas of a virtual mesh, and each share into ``count`` micro-batches."""


@dataclass(frozen=True)
class Even:
    """A batch that is split by samples, as evenly as possible."""

    reading: Reading

    @classmethod
    def nothing(cls, batch: Any, samples: int = 0) -> Even:
        """A batch in which nothing is per sample."""
        return cls(Reading(batch, samples, None))

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

    def dealt_to(self, replicas: int, count: int) -> SplitBatch:
        """Give replica ``r`` the samples ``r``, ``r + replicas`` and so on, as ``DistributedSampler`` does. A batch that cannot be
        divided evenly is padded from its beginning, as the sampler pads a data set."""
        each = -(-self.samples // replicas)
        order = [row % max(1, self.samples) for row in range(each * replicas)]
        mine = [order[replica::replicas] for replica in range(replicas)]
        sizes = BatchSizes.of([each] * replicas, count)
        dealt = [Even(self.reading.picked(rows)).dealt(sizes.micro_batches) for rows in mine]
        parts = evenly(each, sizes.micro_batches)
        return SplitBatch(sizes, dealt, self.samples, [split(rows, parts) for rows in mine])


@dataclass(frozen=True)
class _Parts(Sequence[Any]):
    """Micro-batches that are cut on access: middle stages of a pipeline never access them."""

    reading: Reading
    sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        start = sum(self.sizes[:index])
        return self.reading.part(slice(start, start + self.sizes[index]))


def split(rows: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [rows[end - size : end] for end, size in zip(ends, sizes)]
