"""What a step returned for the parts of a batch, as one result for the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

__all__ = ["join", "plain", "reorder"]


def join(parts: Sequence[Any], sizes: Sequence[int], average: bool = False) -> Any:
    """Join results along the samples.

    Tensors are concatenated along their first axis, mappings and tuples entry by entry. A list with one entry for each sample is
    continued, any other is joined entry by entry.

    Args:
        parts: of the same structure.
        sizes: samples of each; -1 if nobody knows.
        average: the mean over samples takes the place of numbers and of tensors without axes, such as a loss; else those tensors
            are stacked, and numbers are listed.

    Example:
        >>> join([{"names": ["a", "b"], "loss": 1.0}, {"names": ["c"], "loss": 4.0}], sizes=[2, 1], average=True)
        {'names': ['a', 'b', 'c'], 'loss': 2.0}
    """
    if not parts:
        return None
    first = parts[0]
    if all(isinstance(part, Mapping) and part.keys() == first.keys() for part in parts):
        return {key: join([part[key] for part in parts], sizes, average) for key in first}
    if all(isinstance(part, list) and _by_samples(part, size) for part, size in zip(parts, sizes)):
        return [entry for part in parts for entry in part]
    if isinstance(first, (list, tuple)) and all(type(part) is type(first) and len(part) == len(first) for part in parts):
        entries = [join(list(column), sizes, average) for column in zip(*parts)]
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    if all(isinstance(part, Tensor) and part.ndim == first.ndim for part in parts):
        if first.ndim:
            return torch.cat(list(parts))
        return _mean(torch.stack(list(parts)), sizes) if average else torch.stack(list(parts))
    if average and all(isinstance(part, Number) and not isinstance(part, bool) for part in parts):
        return sum(part * size for part, size in zip(parts, sizes)) / sum(sizes)
    if any(isinstance(part, Tensor) for part in parts):
        return list(parts)
    return first if all(part == first for part in parts) else list(parts)


def _by_samples(entries: list[Any], samples: int) -> bool:
    """Whether a list has an entry for each sample; of an unknown number of samples, if it holds numbers or text."""
    return len(entries) == samples if samples >= 0 else not any(isinstance(one, (Tensor, Mapping, list, tuple)) for one in entries)


def _mean(values: Tensor, sizes: Sequence[int]) -> Tensor:
    if not values.is_floating_point():
        values = values.float()
    weights = torch.tensor(sizes, dtype=values.dtype, device=values.device)
    return (values * weights).sum() / weights.sum()


def reorder(joined: Any, indices: Tensor) -> Any:
    """Whatever goes by samples, in the order of the samples' indices; of a sample that is there twice the first.

    Args:
        joined: of :func:`join`.
        indices: ``(samples,)``, of each row.

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
    if isinstance(joined, list) and len(joined) == rows and not any(isinstance(entry, Tensor) for entry in joined):
        return [joined[index] for index in order.tolist()]
    if isinstance(joined, (list, tuple)):
        entries = [_reordered(value, order, rows) for value in joined]
        return type(joined)(*entries) if hasattr(joined, "_fields") else type(joined)(entries)
    return joined[order.to(joined.device)] if isinstance(joined, Tensor) and joined.ndim and len(joined) == rows else joined


def plain(tree: Any) -> Any:
    """The same in dicts, lists and tuples, tensors detached, and ``None`` for what is neither a tensor, a number nor text.

    Example:
        >>> plain({"loss": 1.0, "labels": (range(3), "a")})
        {'loss': 1.0, 'labels': (None, 'a')}
    """
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items() if isinstance(key, (str, int))}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    if isinstance(tree, tuple):
        return tuple(plain(value) for value in tree)
    return tree if isinstance(tree, (bool, int, float, str)) else None
