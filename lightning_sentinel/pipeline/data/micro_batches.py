"""A replica's batch, dealt into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_sentinel.errors import ConfigurationError

__all__ = ["BatchSizes", "MicroBatches"]


class BatchSizes(NamedTuple):
    """How many samples there are in a step: the same on all ranks, which decide by it what they do next.

    Args:
        micro_batches: into how many each replica's batch is dealt.
        samples: of each replica's batch; 0 for a replica that has none left while others have.
    """

    micro_batches: int
    samples: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[int], at_most: int) -> BatchSizes:
        """As many micro-batches as asked for, or as the shortest batch has samples.

        Example:
            >>> BatchSizes.of([6, 3, 0], at_most=4)
            BatchSizes(micro_batches=3, samples=(6, 3, 0))
        """
        return cls(min(at_most, *(number for number in samples if number), at_most), tuple(samples))

    def work(self, replica: int, micro_batch: int) -> tuple[int, float]:
        """Samples of a micro-batch, and its share of the replica's batch."""
        size = _sizes(self.samples[replica], self.micro_batches)[micro_batch]
        return size, size / max(1, self.samples[replica])


def _sizes(samples: int, count: int) -> tuple[int, ...]:
    base, longer = divmod(samples, count)
    return tuple(base + (index < longer) for index in range(count))


class MicroBatches:
    """A replica's batch, dealt into micro-batches along the first axis, as equal as possible.

    Args:
        batch: what the loader gave: tensors, or nested collections of them. Without samples all micro-batches are empty.
        count: how many micro-batches.

    Raises:
        ConfigurationError: if the batch has samples, but fewer than that.

    Example:
        >>> import torch
        >>> parts = MicroBatches((torch.arange(5), "name"), count=2)
        >>> parts[1], parts.sizes
        ((tensor([3, 4]), 'name'), (3, 2))
    """

    def __init__(self, batch: Any, count: int) -> None:
        samples = extract_batch_size(batch)
        if 0 < samples < count:
            raise ConfigurationError(
                f"A replica's batch of {samples} sample(s) cannot be dealt into micro_batches={count}. Use a larger batch_size,"
                " drop_last=True if only the last batch is short, or SentinelStrategy(micro_batches=...) of at most the batch size."
            )
        self._batch, self._samples, self._count = batch, samples, count
        self.sizes = _sizes(samples, count)

    @property
    def weights(self) -> tuple[float, ...]:
        """Share of the batch that each micro-batch has; a mean over samples is their mean with these weights."""
        return tuple(size / max(1, self._samples) for size in self.sizes)

    @property
    def bytes(self) -> int:
        """Of all tensors of the batch."""
        return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(self._batch) if isinstance(leaf, Tensor))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        start, size = sum(self.sizes[:index]), self.sizes[index]

        def part(leaf: Tensor) -> Tensor:
            return leaf[start : start + size] if leaf.ndim and leaf.shape[0] == self._samples else leaf

        return apply_to_collection(self._batch, Tensor, part)
