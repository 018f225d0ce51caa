"""A batch dealt evenly by samples; and what is asked of every batch that is to be dealt."""

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

    def dealt_to(self, replicas: int, count: int) -> SplitBatch:
        """To the replicas of a virtual mesh."""


@dataclass(frozen=True)
class Even:
    """Dealt by samples, as evenly as possible."""

    reading: Reading

    @classmethod
    def nothing(cls, batch: Any, samples: int = 0) -> Even:
        """A batch in which nothing goes by samples."""
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
        """Replica ``r`` gets the samples ``r``, ``r + replicas`` and so on, which is what ``DistributedSampler`` gives it. A batch
        that cannot be divided evenly is filled up from its beginning, as the sampler fills up a data set."""
        each = -(-self.samples // replicas)
        order = [row % max(1, self.samples) for row in range(each * replicas)]
        mine = [order[replica::replicas] for replica in range(replicas)]
        sizes = BatchSizes.of([each] * replicas, count)
        dealt = [Even(self.reading.picked(rows)).dealt(sizes.micro_batches) for rows in mine]
        parts = evenly(each, sizes.micro_batches)
        return SplitBatch(sizes, dealt, self.samples, [split(rows, parts) for rows in mine])


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


def split(rows: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [rows[end - size : end] for end, size in zip(ends, sizes)]
