"""Which of the things that steps keep have changed."""

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
"""Elements that a checksum looks at together."""
_LIBRARIES = ("builtins", "collections", "torch", "lightning", "torchmetrics", "numpy", "lightning_sentinel")


class Change(NamedTuple):
    """Something that is not what it was.

    Args:
        name: of what the module keeps.
        keys: where in it: of dicts, and indices of lists; none for the whole.
        value: that is there now.
    """

    name: str
    keys: tuple[Any, ...]
    value: Any

    def overlaps(self, name: str, keys: tuple[Any, ...]) -> bool:
        """Whether one of two places is in the other."""
        shorter = min(len(keys), len(self.keys))
        return self.name == name and self.keys[:shorter] == keys[:shorter]


class _It:
    """Is equal to the same thing only, whatever the thing itself thinks of others."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _It) and other._thing is self._thing

    __hash__ = None  # type: ignore[assignment]


class Picture(NamedTuple):
    """What something looked like.

    Args:
        kind: its type.
        facts: what tells it from another of its type.
        parts: pictures of what can change in it without being exchanged, by key.
    """

    kind: type
    facts: Any
    parts: Mapping[Any, Picture]


def picture(value: Any, depth: int = 0) -> Picture:
    """Take note of a value. Tensors and arrays are remembered by a checksum, so that nothing is held in memory."""
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
    """The smallest parts of a value that are not what they were.

    Args:
        name: of what the module keeps.
        before: what it looked like; ``None`` if it was not there.
        value: that is there now.

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
    # What a tuple holds cannot be exchanged by itself.
    yield from found if isinstance(value, (dict, list)) or not found else [whole]


def _entries(value: Any) -> dict[Any, Any] | None:
    """What a collection holds, by key; ``None`` of anything else."""
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, (list, tuple, deque)) else None


def _is_fixed(value: Any) -> bool:
    """Whether it cannot change without being exchanged."""
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
    """Of the bytes: their sum, and one that depends on their order. ``None`` of a tensor without any of its own."""
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
    """Of an object of the user's own: numbers and sizes, which tell that a step has changed it."""
    if type(thing).__module__.partition(".")[0] in _LIBRARIES or isinstance(thing, nn.Module) or callable(thing):
        return None
    facts = getattr(thing, "__dict__", {})
    return tuple((name, value if _is_fixed(value) else _size(value)) for name, value in facts.items())


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict, set, deque)) else -1
