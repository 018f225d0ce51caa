"""Splits batches over replicas and micro-batches: evenly by samples, or with the module's own ``split_batch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.emptying import is_empty
from lightning_sentinel.pipeline.data.even import Even, SplitBatch, Whole, split
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes, MicroBatches
from lightning_sentinel.pipeline.data.reading import Source, read
from lightning_sentinel.pipeline.data.several import Several, belongs
from lightning_sentinel.pipeline.messages.containers import leaves_of

__all__ = ["BatchSplitter", "SplitBatch", "Whole"]


class BatchSplitter:
    """Splits the batches of a module.

    Args:
        module: the user's. Its methods ``split_batch(batch, count)`` and ``count_samples(batch)``, if it has them, split its
            batches and count their samples.

    Example:
        >>> import torch
        >>> dealt = BatchSplitter(object()).whole((torch.arange(5), "name")).dealt(2)
        >>> dealt[1], dealt.sizes
        ((tensor([3, 4]), 'name'), (3, 2))
    """

    def __init__(self, module: object) -> None:
        self._split: Callable[[Any, int], Any] | None = getattr(module, "split_batch", None)
        self._count: Callable[[Any], int] | None = getattr(module, "count_samples", None)
        self._name = type(module).__name__

    @property
    def by_module(self) -> bool:
        """Whether the module splits its batches itself, so that the sizes of micro-batches are not known beforehand."""
        return self._split is not None

    def whole(self, batch: Any, source: Source | None = None) -> Whole:
        """Prepare a batch for splitting.

        Args:
            batch: from the loader.
            source: what is known of the loader.

        Raises:
            ConfigurationError: if the batch does not tell how to split it.
        """
        if self._split is None:
            return _by_samples(batch, source)
        if batch is None or is_empty(batch):
            return Even.nothing(batch)
        return _ByModule(batch, self._split, self._count, self._name)

    def dealt_to(self, batch: Any, source: Source | None, replicas: int, count: int) -> SplitBatch:
        """Split a whole mesh's batch over its replicas."""
        return self.whole(batch, source).dealt_to(replicas, count)

    def undealt(self, batch: Any, source: Source | None, replicas: int, count: int) -> SplitBatch:
        """Leave a batch whole, because one step gets all of it. So a batch that cannot be split is allowed.

        Args:
            batch: from the loader.
            source: what is known of the loader.
            replicas: number of replicas of the mesh.
            count: number of micro-batches to split each replica's batch into, where that is possible.
        """
        try:
            return self.dealt_to(batch, source, replicas, count)
        except ConfigurationError:
            samples = next((shape[0] for shape in _shapes(batch) if shape[0]), 1)
        parts = MicroBatches([batch], (samples,), batch)
        return SplitBatch(BatchSizes.of([samples] * replicas, 1), [parts] * replicas, samples, [[range(samples)]] * replicas)

    def samples(self, batch: Any, source: Source | None = None) -> int:
        """Number of samples in a batch."""
        return self.whole(batch, source).samples


def _by_samples(batch: Any, source: Source | None) -> Whole:
    if source is None or source.parts is None or not belongs(batch, source.parts):
        return Even(read(batch, source))
    return Several.of(batch, source.parts, _by_samples)


class _ByModule:
    """A batch that the module splits."""

    def __init__(self, batch: Any, split: Callable[[Any, int], Any], count: Callable[[Any], int] | None, name: str) -> None:
        self._batch = batch
        self._split = split
        self._count = count
        self._name = name
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

    def dealt_to(self, replicas: int, count: int) -> SplitBatch:
        """Micro-batch ``k`` of replica ``r`` is piece ``k * replicas + r``; if there are fewer pieces, start over at the first."""
        pieces = self._pieces(replicas * count)
        each = -(-len(pieces) // replicas)
        sizes = self._sizes(pieces)
        rows = split(range(sum(sizes)), sizes)
        mine = [[(number * replicas + replica) % len(pieces) for number in range(each)] for replica in range(replicas)]
        dealt = [MicroBatches([pieces[one] for one in order], [sizes[one] for one in order], self._batch) for order in mine]
        known = BatchSizes(each, tuple(sum(one.sizes) for one in dealt), tuple(one.sizes for one in dealt))
        return SplitBatch(known, dealt, sum(sizes), [[rows[one] for one in order] for order in mine], by_module=True)

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
        """Number of samples in each piece; 1 for each if the sizes cannot be inferred."""
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
    """Infer each piece's number of samples: the sizes that add up to the whole's along some axis of every tensor that was cut."""
    wholes = _shapes(batch)
    parts = [_shapes(piece) for piece in pieces]
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
