"""A replica's batch, dealt into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_sentinel.pipeline.messages.containers import leaves_of

__all__ = ["BatchSizes", "MicroBatches", "evenly"]


class BatchSizes(NamedTuple):
    """How many samples there are in a step: the same on all ranks, which decide by it what they do next.

    Args:
        micro_batches: into how many each replica's batch is dealt.
        samples: of each replica's batch; 0 for a replica that has none left while others have.
        dealt: samples of each replica's micro-batches, where the module deals its batches itself; else as equal as possible.
    """

    micro_batches: int
    samples: tuple[int, ...]
    dealt: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, samples: Sequence[int], at_most: int) -> BatchSizes:
        """As many micro-batches as asked for, or as the shortest batch has samples.

        Example:
            >>> BatchSizes.of([6, 3, 0], at_most=4).micro_batches
            3
        """
        return cls(min(at_most, *(number for number in samples if number), at_most), tuple(samples))

    def work(self, replica: int, micro_batch: int) -> tuple[int, float]:
        """Samples of a micro-batch, and its share of the replica's batch."""
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
        parts: one behind the other; they are made when they are asked for.
        sizes: samples of each.
        batch: that they are of.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int], batch: Any) -> None:
        self._parts = parts
        self._batch = batch
        self.sizes = tuple(sizes)

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of the batch that each micro-batch has; a mean over samples is their mean with these weights."""
        return tuple(size / max(1, sum(self.sizes)) for size in self.sizes)

    @property
    def bytes(self) -> int:
        """Of all tensors and arrays of the batch."""
        leaves = [leaf for leaf in leaves_of(self._batch) if isinstance(leaf, (Tensor, np.ndarray))]
        return sum(leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else leaf.nbytes for leaf in leaves)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Any:
        return self._parts[index]
