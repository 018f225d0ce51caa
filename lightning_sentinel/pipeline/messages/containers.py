"""Walks and rebuilds the containers that batches and results are made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["entries_of", "has_attributes", "is_sequence", "leaves_of", "rebuilt"]


def is_sequence(value: Any) -> bool:
    """Whether a value is a list, a tuple or the like. Named tuples count as structures; shapes and text count as single values."""
    if isinstance(value, (str, bytes, bytearray, memoryview, torch.Size)) or hasattr(value, "_fields"):
        return False
    return isinstance(value, Sequence)


def entries_of(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield ``(path, entry)`` for each entry of a mapping, named tuple or object with attributes; nothing for other values."""
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f"{path}.{name}", entry) for name, entry in zip(value._fields, value))
    elif has_attributes(value):
        yield from ((f"{path}.{name}", entry) for name, entry in vars(value).items())


def has_attributes(value: Any) -> bool:
    """Whether a value is a dataclass or has a ``to`` method, which Lightning requires of custom batch classes."""
    if isinstance(value, (Tensor, type, torch.nn.Module)) or not hasattr(value, "__dict__"):
        return False
    return dataclasses.is_dataclass(value) or callable(getattr(value, "to", None))


def rebuilt(value: Any, entries: Sequence[Any]) -> Any:
    """Return the same structure with other entries.

    Example:
        >>> rebuilt({"a": 1, "b": 2}, [3, 4])
        {'a': 3, 'b': 4}
    """
    if isinstance(value, Mapping):
        changed = dict(zip(value, entries))
        try:
            clone = copy.copy(value)
            for key, entry in changed.items():
                clone[key] = entry  # type: ignore[index]
            return clone
        except TypeError:
            return changed
    if hasattr(value, "_fields"):
        return type(value)(*entries)
    if is_sequence(value):
        return tuple(entries) if type(value) is tuple else _like(value, list(entries))
    clone = copy.copy(value)
    for name, entry in zip(vars(value), entries):
        # Works on frozen dataclasses too.
        object.__setattr__(clone, name, entry)
    return clone


def _like(value: Sequence[Any], entries: list[Any]) -> Any:
    if type(value) is list:
        return entries
    try:
        return type(value)(entries)  # type: ignore[call-arg]
    except TypeError:
        return entries


def leaves_of(value: Any) -> Iterator[Any]:
    """Yield the leaves of a batch: the values that hold no others.

    Example:
        >>> list(leaves_of({"a": [1, 2], "b": "text"}))
        [1, 2, 'text']
    """
    held = list(value) if is_sequence(value) else [entry for _, entry in entries_of(value, "")]
    if held:
        for entry in held:
            yield from leaves_of(entry)
    elif not is_sequence(value) and not isinstance(value, Mapping):
        yield value
