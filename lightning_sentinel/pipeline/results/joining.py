"""Joins what a step returned for each micro-batch into one result for the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sentinel.pipeline.data.reading import goes_by_rows
from lightning_sentinel.pipeline.messages.containers import entries_of, is_sequence, rebuilt

__all__ = ["join", "plain", "reorder"]


def join(parts: Sequence[Any], sizes: Sequence[int], average: bool = False) -> Any:
    """Join results along the samples.

    Tensors and arrays are concatenated along their first axis. Lists or tuples with one entry per sample are concatenated; other
    structures are joined entry by entry. Tensors whose other axes differ, such as sequences of different lengths, become a list
    with one entry per sample.

    Args:
        parts: results of the same structure.
        sizes: number of samples of each; -1 if unknown.
        average: whether to average numbers and tensors without axes, such as a loss, over samples; if not, these tensors are
            stacked, and numbers are listed.

    Example:
        >>> join([{"names": ["a", "b"], "loss": 1.0}, {"names": ["c"], "loss": 4.0}], sizes=[2, 1], average=True)
        {'names': ['a', 'b', 'c'], 'loss': 2.0}
    """
    if not parts:
        return None
    first = parts[0]
    if all(isinstance(part, Mapping) and part.keys() == first.keys() for part in parts):
        return {key: join([part[key] for part in parts], sizes, average) for key in first}
    if all(is_sequence(part) for part in parts) and _by_samples(parts, sizes):
        return type(first)(entry for part in parts for entry in part)
    if _alike(parts):
        columns = zip(*(_entries(part) for part in parts))
        return rebuilt(first, [join(list(column), sizes, average) for column in columns])
    if any(map(_has_rows, parts)) and not _fit(parts):
        one_each = all(_has_rows(part) or is_sequence(part) for part in parts) and list(map(len, parts)) == list(sizes)
        return [row for part in parts for row in part] if one_each else list(parts)
    if all(isinstance(part, np.ndarray) and part.ndim == first.ndim for part in parts):
        return np.concatenate(parts) if first.ndim else np.stack(parts)
    if all(isinstance(part, Tensor) and part.ndim == first.ndim for part in parts):
        if first.ndim:
            return torch.cat(list(parts))
        return _mean(torch.stack(list(parts)), sizes) if average else torch.stack(list(parts))
    if average and all(isinstance(part, Number) and not isinstance(part, bool) for part in parts):
        return sum(part * size for part, size in zip(parts, sizes)) / sum(sizes)
    if any(isinstance(part, (Tensor, np.ndarray)) for part in parts):
        return list(parts)
    return first if all(part == first for part in parts) else list(parts)


def _has_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _fit(parts: Sequence[Any]) -> bool:
    """Whether tensors or arrays can be concatenated along the first axis."""
    return all(_has_rows(part) and part.shape[1:] == parts[0].shape[1:] for part in parts)


def _entries(value: Any) -> list[Any]:
    return list(value) if is_sequence(value) else [entry for _, entry in entries_of(value, "")]


def _alike(parts: Sequence[Any]) -> bool:
    """Whether all parts are structures of one type and length."""
    held = [_entries(part) for part in parts]
    return bool(held[0]) and all(type(part) is type(parts[0]) for part in parts) and len(set(map(len, held))) == 1


def _by_samples(parts: Sequence[Sequence[Any]], sizes: Sequence[int]) -> bool:
    """Whether lists have one entry per sample; if the number of samples is unknown, whether they hold only numbers or text."""
    if min(sizes) < 0:
        return not any(isinstance(one, (Tensor, Mapping)) or is_sequence(one) for part in parts for one in part)
    if any(len(part) != size for part, size in zip(parts, sizes)):
        return False
    return not all(goes_by_rows(part, size) for part, size in zip(parts, sizes) if size)


def _mean(values: Tensor, sizes: Sequence[int]) -> Tensor:
    if not values.is_floating_point():
        values = values.float()
    weights = torch.tensor(sizes, dtype=values.dtype, device=values.device)
    return (values * weights).sum() / weights.sum()


def reorder(joined: Any, indices: Tensor) -> Any:
    """Sort everything that is per sample by the samples' indices; of a duplicate sample keep the first row.

    Args:
        joined: result of :func:`join`.
        indices: ``(samples,)``, the sample index of each row.

    Example:
        >>> reorder({"names": ["c", "a", "a"], "note": "text"}, torch.tensor([2, 0, 0]))
        {'names': ['a', 'c'], 'note': 'text'}
    """
    order = torch.argsort(indices, stable=True)
    new = torch.ones(len(order), dtype=torch.bool)
    new[1:] = indices[order].diff() != 0
    return _reordered(joined, order[new], len(indices))


def _reordered(joined: Any, order: Tensor, rows: int) -> Any:
    if isinstance(joined, Mapping):
        return {key: _reordered(value, order, rows) for key, value in joined.items()}
    if is_sequence(joined) and len(joined) == rows and not goes_by_rows(joined, rows):
        return type(joined)(joined[index] for index in order.tolist())
    if isinstance(joined, (Tensor, np.ndarray)):
        if not joined.ndim or len(joined) != rows:
            return joined
        return joined[order.to(joined.device)] if isinstance(joined, Tensor) else joined[order.numpy()]
    held = _entries(joined)
    return rebuilt(joined, [_reordered(value, order, rows) for value in held]) if held else joined


def plain(tree: Any) -> Any:
    """Copy a result into plain dicts, lists and tuples, with tensors detached; values that are no data become ``None``.

    Example:
        >>> plain({"loss": 1.0, "labels": (range(3), "a")})
        {'loss': 1.0, 'labels': (None, 'a')}
    """
    if isinstance(tree, np.ndarray):
        return tree
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items() if isinstance(key, (str, int))}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    if isinstance(tree, tuple):
        return tuple(plain(value) for value in tree)
    return tree if isinstance(tree, (bool, int, float, str)) else None
