"""Infers which parts of a batch are per sample, from the batch alone.

A batch is a tree of what torch's collate functions make: mappings, lists, tuples, named tuples, dataclasses, objects with a ``to``
method, and in them tensors, NumPy arrays, text and numbers. All parts have to agree on the number of samples: tensors and arrays by
their first axis, lists or tuples of text and numbers by their length. A list or tuple of anything else is a structure if its
entries agree on the number, and otherwise has one entry per sample. If both are possible, we raise an error rather than guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.messages.containers import entries_of, has_attributes, is_sequence, leaves_of, rebuilt

__all__ = ["Reading", "Source", "goes_by_rows", "read"]

Rows = slice | list[int]

_ROOT = "batch"
_MOST_NAMED = 12
_FEWEST_TO_SUM_UP = 4
_REMEDY = (
    "Give every tensor, array and list of the batch one entry a sample (what belongs to no sample can be a buffer of the module),"
    " or let the module say it: split_batch(self, batch, count) returns a list of `count` micro-batches."
)


@dataclass
class Source:
    """What is known of a loader, as far as it helps to read its batches.

    Args:
        batch_size: of all batches but the last; ``None`` if unknown.
        by_torch: whether torch's default collate function makes the batches; then a list that holds tensors is a structure.
    """

    batch_size: int | None = None
    by_torch: bool = False
    entries: dict[str, bool] = field(default_factory=dict)
    """By path of an unambiguous sequence, whether it had one entry per sample: later batches are read in the same way."""
    was_full: bool = False
    """Whether a batch of ``batch_size`` samples has been read."""
    parts: Mapping[Any, Source] | list[Source] | None = None
    """The source of each of several combined loaders, in the structure of their combined batch."""


@dataclass(frozen=True)
class Reading:
    """A batch, and the knowledge which of its parts are per sample.

    Args:
        batch: from the loader.
        samples: number of samples; 1 if nothing in the batch tells it.

    Example:
        >>> import torch
        >>> reading = read({"x": torch.arange(4), "names": ["a", "b", "c", "d"], "note": "text"})
        >>> reading.samples, reading.part(slice(1, 3))
        (4, {'x': tensor([1, 2]), 'names': ['b', 'c'], 'note': 'text'})
    """

    batch: Any
    samples: int
    _plan: Any

    @property
    def goes_by_samples(self) -> bool:
        """Whether anything in the batch is per sample."""
        return self._plan is not _WHOLE

    def part(self, rows: Rows) -> Any:
        """The batch with these rows only; a slice of a tensor is a view."""
        return _cut(self.batch, self._plan, rows)

    def picked(self, rows: list[int]) -> Reading:
        """The reading of the batch with these rows only."""
        return Reading(self.part(rows), len(rows), self._plan)


def read(batch: Any, source: Source | None = None) -> Reading:
    """Infer which parts of a batch are per sample.

    Args:
        batch: from the loader.
        source: what is known of the loader.

    Raises:
        ConfigurationError: if the parts do not agree on a number of samples, or if the batch can be read in several ways.
    """
    source = Source() if source is None else source
    # First as earlier batches of this loader were read: a short batch may be ambiguous because its sizes happen to be equal.
    node = _look(batch, _ROOT, source)
    samples = _samples(node, source) if node.sizes is None or len(node.sizes) == 1 else None
    if samples is None:
        node = _look(batch, _ROOT, Source(source.batch_size))
        samples = _samples(node, source)
    _refuse_time_first(node, samples, source)
    source.was_full |= samples == source.batch_size
    return Reading(batch, samples, _planned(node, samples, source, root=True))


@dataclass
class _Node:
    """A node of the batch's tree.

    Args:
        path: of the node, for messages.
        value: the node's part of the batch.
        sizes: possible numbers of samples; ``None`` if nothing in the node is per sample.
        inner: for a list or tuple, the numbers of samples that its entries agree on.
        children: nodes of the entries; empty if they need not be looked at.
    """

    path: str
    value: Any
    sizes: frozenset[int] | None = None
    inner: frozenset[int] | None = None
    children: list[_Node] = field(default_factory=list)


def _look(value: Any, path: str, source: Source) -> _Node:
    size = _rows_of(value, path)
    if size is not None:
        return _Node(path, value, frozenset((size,)))
    if is_sequence(value):
        return _look_at_sequence(value, path, source)
    node = _Node(path, value, children=[_look(entry, place, source) for place, entry in entries_of(value, path)])
    node.sizes = _agreed(node.children)
    return node


def _look_at_sequence(value: Sequence[Any], path: str, source: Source) -> _Node:
    if not value:
        return _Node(path, value)
    length = frozenset((len(value),))
    by_entries = source.entries.get(path)
    if by_entries or all(map(_is_atom, value)):
        return _Node(path, value, length)
    children = [_look(entry, f"{path}[{index}]", source) for index, entry in enumerate(value)]
    inner = _agreed(children)
    if by_entries is False or not _may_be_samples(value, path, source):
        return _Node(path, value, inner, inner, children)
    return _Node(path, value, length if inner is None else inner | length, inner, children)


def _may_be_samples(entries: Sequence[Any], path: str, source: Source) -> bool:
    """Whether a list may have one entry per sample: its entries have one type, dtype and rank, as inputs and labels seldom have.

    The batch itself is a structure, such as a pair, unless its length is the loader's batch size.
    """
    kinds = {(type(one), getattr(one, "dtype", None), getattr(one, "ndim", None)) for one in entries if one is not None}
    return len(kinds) <= 1 and (path != _ROOT or len(entries) == source.batch_size)


def _agreed(nodes: Sequence[_Node]) -> frozenset[int] | None:
    """Numbers of samples that are possible for all of these nodes."""
    sizes = [node.sizes for node in nodes if node.sizes is not None]
    return frozenset.intersection(*sizes) if sizes else None


def _samples(root: _Node, source: Source) -> int:
    """Number of samples in a batch.

    Raises:
        ConfigurationError: if the parts disagree, or several numbers are possible.
    """
    sizes = root.sizes
    if sizes is None:
        return 0 if is_sequence(root.value) and not root.value else 1
    if not sizes:
        raise ConfigurationError(f"What is in a batch does not agree on a number of samples: {_named(root)}. {_REMEDY}")
    if len(sizes) > 1 and source.batch_size is not None and source.batch_size in sizes:
        return source.batch_size
    if len(sizes) > 1 and root.inner:
        # The batch itself is read as a structure, such as a pair of inputs and labels, rather than as a list of samples.
        sizes = root.inner
    if len(sizes) > 1:
        raise ConfigurationError(
            f"A batch can be read as one of {' or '.join(map(str, sorted(sizes)))} samples: {_named(root)}. {_REMEDY}"
        )
    return next(iter(sizes))


def _refuse_time_first(root: _Node, samples: int, source: Source) -> None:
    """Raise if the second axis of all tensors has the length of the loader's batch size, and the first has not."""
    expected = source.batch_size
    if expected is None or samples == expected or source.was_full:
        return
    tensors = [value for value in leaves_of(root.value) if isinstance(value, (Tensor, np.ndarray)) and value.ndim]
    if tensors and all(value.ndim > 1 and value.shape[1] == expected for value in tensors):
        raise ConfigurationError(
            f"The loader's batch_size is {expected}, but the first axis of what it gives is not that of samples: {_named(root)}."
            f" {_REMEDY}"
        )


_WHOLE = None
_BY_ROWS = "rows"


def _planned(node: _Node, samples: int, source: Source, root: bool = False) -> Any:
    """How to cut a node: not at all, by its own rows, or with a plan for each entry."""
    if node.sizes is None:
        return _WHOLE if not (root and samples == 0) else _BY_ROWS
    if not node.children:
        return _BY_ROWS
    if is_sequence(node.value):
        holds = node.inner is not None and samples in node.inner
        by_length = len(node.value) == samples
        doubtful = holds and by_length and samples > 1 and _may_be_samples(node.value, node.path, source)
        if doubtful and not (root or source.by_torch or node.path in source.entries):
            raise ConfigurationError(
                f"{node.path} can be one entry for each of {samples} samples, or a structure of entries with as many rows each:"
                f" {_named(node)}. {_REMEDY}"
            )
        if holds != by_length:
            source.entries[node.path] = by_length
        if not holds:
            return _BY_ROWS
    return [_planned(child, samples, source) for child in node.children]


def goes_by_rows(entries: Sequence[Any], samples: int) -> bool:
    """Whether everything in a list has ``samples`` rows, which makes it a structure and not a list of samples.

    Example:
        >>> import torch
        >>> goes_by_rows([torch.zeros(2, 3), torch.zeros(2)], 2), goes_by_rows([torch.zeros(3), torch.zeros(4)], 2)
        (True, False)
    """
    inner = _look(entries, "result", Source()).inner
    return inner is not None and samples in inner


# ------------------------------------------------------------------------------------------------------------- the kinds of nodes


def _rows_of(value: Any, path: str) -> int | None:
    """Length of the first axis; ``None`` for values without axes."""
    if isinstance(value, PackedSequence) or (isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided)):
        kind = "PackedSequence" if isinstance(value, PackedSequence) else "nested or sparse tensor"
        raise ConfigurationError(f"{path} is a {kind}, of which nobody can take the rows of some samples. {_REMEDY}")
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return int(value.shape[0])
    return None


def _is_atom(value: Any) -> bool:
    """Whether a value has no size: text, numbers, tensors without axes, and objects of unknown classes."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return not (is_sequence(value) or isinstance(value, (Mapping, tuple)) or has_attributes(value))


def _cut(value: Any, plan: Any, rows: Rows) -> Any:
    if plan is _WHOLE:
        return value
    if plan == _BY_ROWS:
        if isinstance(value, Tensor) and not isinstance(rows, slice):
            return value[torch.tensor(rows, dtype=torch.long, device=value.device)]
        if isinstance(value, (Tensor, np.ndarray)):
            return value[rows]
        return rebuilt(value, list(value[rows]) if isinstance(rows, slice) else [value[row] for row in rows])
    held = value if is_sequence(value) else [entry for _, entry in entries_of(value, "")]
    return rebuilt(value, [_cut(entry, one, rows) for entry, one in zip(held, plan)])


def _named(root: _Node) -> str:
    """The parts of a batch that have a size, with their sizes, for messages."""
    lines = list(_sizes_named(root))
    more = f" and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
    return ", ".join(lines[:_MOST_NAMED]) + more


def _sizes_named(node: _Node) -> Iterator[str]:
    if node.sizes is None:
        return
    kind = type(node.value).__name__
    if not node.children:
        shape = tuple(node.value.shape) if isinstance(node.value, (Tensor, np.ndarray)) else f"{kind} of {len(node.value)}"
        yield f"{node.path}: {shape}"
    elif is_sequence(node.value) and len(node.value) >= _FEWEST_TO_SUM_UP:
        yield f"{node.path}: {kind} of {len(node.value)}, the first of which is " + "; ".join(_sizes_named(node.children[0]))
    else:
        for child in node.children:
            yield from _sizes_named(child)
