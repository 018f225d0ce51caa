"""Detects which values that steps keep in the module have changed, by snapshots of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sentinel.pipeline.step_attributes import DEEPEST

__all__ = ["Change", "Picture", "changes", "picture"]

_CHUNK = 2**20
"""Elements in each chunk of a checksum."""
_LIBRARIES = ("builtins", "collections", "torch", "lightning", "torchmetrics", "numpy", "lightning_sentinel")


class Change(NamedTuple):
    """A value that has changed.

    Args:
        name: of the attribute or buffer.
        keys: path to the changed value inside it, by dict keys and list indices; empty for the whole.
        value: the new value.
    """

    name: str
    keys: tuple[Any, ...]
    value: Any

    def overlaps(self, name: str, keys: tuple[Any, ...]) -> bool:
        """Whether this change's path contains the given path or is contained in it."""
        shorter = min(len(keys), len(self.keys))
        return self.name == name and self.keys[:shorter] == keys[:shorter]


class _It:
    """Wraps an object to compare it by identity, whatever its own ``__eq__``."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _It) and other._thing is self._thing

    __hash__ = None  # type: ignore[assignment]


class Picture(NamedTuple):
    """A snapshot of a value.

    Args:
        kind: the value's type.
        facts: what distinguishes it from other values of its type, such as a checksum.
        parts: snapshots of its mutable entries, by key.
    """

    kind: type
    facts: Any
    parts: Mapping[Any, Picture]


def picture(value: Any, depth: int = 0) -> Picture:
    """Take a snapshot of a value. Of tensors and arrays it has a checksum, so that it holds no copy in memory."""
    kind: type = type(value)
    if isinstance(value, Tensor):
        return Picture(kind, (value.shape, value.dtype, _checksum(value)), {})
    if isinstance(value, np.ndarray):
        return Picture(kind, (value.shape, value.dtype, _array_checksum(value)), {})
    entries = _entries(value) if depth < DEEPEST else None
    if entries is not None:
        parts = {key: picture(entry, depth + 1) for key, entry in entries.items() if not _is_fixed(entry)}
        return Picture(kind, {key: None if key in parts else entry for key, entry in entries.items()}, parts)
    if isinstance(value, (set, frozenset)):
        return Picture(kind, frozenset(value), {})
    if _is_fixed(value):
        return Picture(kind, value, {})
    return Picture(kind, (_It(value), _looks(value)), {})


def changes(name: str, before: Picture | None, value: Any, keys: tuple[Any, ...] = ()) -> Iterator[Change]:
    """Yield the smallest parts of a value that have changed.

    Args:
        name: of the attribute or buffer.
        before: its snapshot; ``None`` if it did not exist.
        value: the present value.
        keys: path to ``value`` inside the attribute or buffer.

    Example:
        >>> kept = {"a": [1], "b": [2]}
        >>> before = picture(kept)
        >>> kept["b"].append(3)
        >>> list(changes("kept", before, kept))
        [Change(name='kept', keys=('b',), value=[2, 3])]
    """
    whole = Change(name, keys, value)
    entries = _entries(value) if before is not None and before.kind is type(value) and len(keys) < DEEPEST else None
    if before is None or entries is None:
        if before is None or not _same_facts(before, picture(value, len(keys))):
            yield whole
        return
    if not (before.facts.keys() <= entries.keys() if isinstance(value, dict) else before.facts.keys() == entries.keys()):
        yield whole
        return
    found: list[Change] = []
    for key, entry in entries.items():
        if key in before.parts:
            found += changes(name, before.parts[key], entry, (*keys, key))
        elif key not in before.facts or not _same(before.facts[key], entry):
            found.append(Change(name, (*keys, key), entry))
    # An entry of a tuple cannot be replaced alone.
    yield from found if isinstance(value, (dict, list)) or not found else [whole]


def _entries(value: Any) -> dict[Any, Any] | None:
    """A collection's entries by key; ``None`` for other values."""
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, (list, tuple, deque)) else None


def _is_fixed(value: Any) -> bool:
    """Whether a value is immutable."""
    return value is None or isinstance(value, (Number, np.generic, str, bytes))


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and (one == other or (one != one and other != other)))


def _same_facts(before: Picture, now: Picture) -> bool:
    if before.kind is not now.kind:
        return False
    if isinstance(before.facts, tuple) and isinstance(now.facts, tuple):
        return len(before.facts) == len(now.facts) and all(map(_same, before.facts, now.facts))
    return _same(before.facts, now.facts)


def _checksum(tensor: Tensor) -> tuple[int, int] | None:
    """Two checksums of a tensor's bytes: the sum, and a sum that depends on their order. ``None`` for unsupported tensors."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    words = plain.contiguous().flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=words.device)
    for number, chunk in enumerate(words.split(_CHUNK)):
        wide = chunk.long()
        weights = torch.arange(1, 2 * len(chunk), 2, device=words.device)
        total += torch.stack((wide.sum(), (wide * weights).sum())) * (2 * number + 1)
    first, second = total.tolist()
    return first, second


def _array_checksum(array: np.ndarray[Any, Any]) -> Any:
    try:
        return _checksum(torch.from_numpy(np.ascontiguousarray(array)))
    except TypeError:  # of text, of objects
        return tuple(array.flatten().tolist())


def _looks(thing: Any) -> Any:
    """Numbers and sizes in the attributes of a user-defined object, by which a change of it is detected."""
    if type(thing).__module__.partition(".")[0] in _LIBRARIES or isinstance(thing, nn.Module) or callable(thing):
        return None
    facts = getattr(thing, "__dict__", {})
    return tuple((name, value if _is_fixed(value) else _size(value)) for name, value in facts.items())


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict, set, deque)) else -1
