"""A replica's micro-batches, and the sizes of all replicas' batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_sentinel.pipeline.messages.containers import leaves_of

__all__ = ["BatchSizes", "MicroBatches", "evenly"]


class BatchSizes(NamedTuple):
    """The sizes of a step's batches: the same on all ranks, which plan the step by them.

    Args:
        micro_batches: number of micro-batches of each replica.
        samples: number of samples in each replica's batch; 0 for a replica that has no batch left while others have.
        dealt: of each replica, the samples in each micro-batch, if the module splits its batches itself; ``None`` splits evenly.
    """

    micro_batches: int
    samples: tuple[int, ...]
    dealt: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, samples: Sequence[int], at_most: int) -> BatchSizes:
        """``at_most`` micro-batches, or as many as the shortest batch has samples.

        Example:
            >>> BatchSizes.of([6, 3, 0], at_most=4).micro_batches
            3
        """
        return cls(min(at_most, *(number for number in samples if number), at_most), tuple(samples))

    def work(self, replica: int, micro_batch: int) -> tuple[int, float]:
        """A micro-batch's number of samples, and its share of the replica's batch."""
        sizes = self.dealt[replica] if self.dealt else evenly(self.samples[replica], self.micro_batches)
        return sizes[micro_batch], sizes[micro_batch] / max(1, sum(sizes))


def evenly(samples: int, count: int) -> tuple[int, ...]:
    """Sizes of parts that are as equal as possible.

    Example:
        >>> evenly(7, 3)
        (3, 2, 2)
    """
    base, longer = divmod(samples, count)
    return tuple(base + (index < longer) for index in range(count))


class MicroBatches:
    """A replica's micro-batches.

    Args:
        parts: the micro-batches in order; they may be cut on access.
        sizes: number of samples in each.
        batch: the whole batch.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int], batch: Any) -> None:
        self._parts = parts
        self._batch = batch
        self.sizes = tuple(sizes)

    @property
    def weights(self) -> tuple[float, ...]:
        """Each micro-batch's share of the batch. The mean over all samples is the mean of micro-batches with these weights."""
        return tuple(size / max(1, sum(self.sizes)) for size in self.sizes)

    @property
    def bytes(self) -> int:
        """Size of all tensors and arrays of the batch."""
        leaves = [leaf for leaf in leaves_of(self._batch) if isinstance(leaf, (Tensor, np.ndarray))]
        return sum(leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else leaf.nbytes for leaf in leaves)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Any:
        return self._parts[index]
