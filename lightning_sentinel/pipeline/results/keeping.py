"""What a user's steps keep in a module: which of it has changed, how it travels, and what another rank may set.

A module keeps things in attributes and buffers of its own and of its parts. Two kinds of parts do not count: the layers of the
pipeline, which each stage has for itself, and torchmetrics, whose values are shared (``metrics``). Names are dotted, as in a
``state_dict``. *Data* are numbers, text, tensors and NumPy arrays, in lists, tuples, dicts, sets and deques.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, MetricTracker

from lightning_sentinel.errors import MalformedMessageError

__all__ = ["Change", "Holder", "NoData", "Picture", "changes", "decoded", "encoded", "kept_by", "picture", "put"]

_DEEPEST = 8
"""Collections inside collections that are looked into."""
_CHUNK = 2**20
"""Elements that a checksum looks at together."""
_OWN = frozenset(dir(L.LightningModule())) | {"_hparams", "_hparams_initial", "_hparams_name"}
"""What every module has: no steps of the user's keep anything there, and nobody may set it."""
_LIBRARIES = ("builtins", "collections", "torch", "lightning", "torchmetrics", "numpy", "lightning_sentinel")


class NoData(Exception):
    """A value holds something that is no data; the argument says what."""


class Holder(NamedTuple):
    """Where a module keeps something.

    Args:
        owner: the module, or a part of it.
        name: of the attribute or buffer there.
    """

    owner: nn.Module
    name: str

    @property
    def _place(self) -> dict[str, Any]:
        return self.owner._buffers if self.name in self.owner._buffers else vars(self.owner)

    @property
    def value(self) -> Any:
        """What is there now."""
        return self._place[self.name]

    def set(self, value: Any) -> None:
        """Put something else there."""
        self._place[self.name] = value


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


def kept_by(module: L.LightningModule, layers: Collection[str] = ()) -> dict[str, Holder]:
    """Everything that a module keeps, by its dotted name.

    Args:
        layers: names of the pipeline's layers, which are left out.

    Example:
        >>> module = L.LightningModule()
        >>> module.losses = []
        >>> module.register_buffer("count", torch.zeros(()))
        >>> list(kept_by(module))
        ['losses', 'count']
    """
    kinds = (Metric, MetricCollection, MetricTracker)
    apart = {*layers, *(name for name, part in module.named_modules() if isinstance(part, kinds))}
    found = {}
    for path, owner in module.named_modules():
        parts = path.split(".")
        if any(".".join(parts[:length]) in apart for length in range(1, len(parts) + 1)):
            continue
        names = [name for name in vars(owner) if name not in _OWN and not name.startswith("_sentinel")]
        for name in (*names, *owner._buffers):
            found[f"{path}.{name}" if path else name] = Holder(owner, name)
    return found


# ------------------------------------------------------------------------------------------------------------- what has changed


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
    entries = _entries(value) if depth < _DEEPEST else None
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
    entries = _entries(value) if before is not None and before.kind is type(value) and len(keys) < _DEEPEST else None
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


# --------------------------------------------------------------------------------------------------------------- how it travels


def encoded(value: Any, depth: int = 0) -> list[Any]:
    """A value as a parcel can hold it: of each part what it is, and what is in it.

    Raises:
        NoData: if it holds something else than data.

    Example:
        >>> decoded(encoded({"seen": {1}, "sizes": (2, 0.5)}))
        {'seen': {1}, 'sizes': (2, 0.5)}
    """
    if depth > _DEEPEST:
        raise NoData("collections that go too deep")
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise NoData(f"a tensor of layout {value.layout} on {value.device}")
        return ["tensor" if value.device.type == "cpu" else "device", value.detach()]
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            return ["array" if isinstance(value, np.ndarray) else "scalar", torch.from_numpy(np.array(value))]
        except TypeError:
            raise NoData(f"an array of {value.dtype}") from None
    if isinstance(value, dict):
        pairs = [[encoded(key, depth + 1), encoded(entry, depth + 1)] for key, entry in value.items()]
        return ["dict", pairs]
    for kind in (list, tuple, deque, set, frozenset):
        if isinstance(value, kind) and not hasattr(value, "_fields"):
            return [kind.__name__, [encoded(entry, depth + 1) for entry in value]]
    raise NoData(type(value).__name__)


def decoded(node: Any, device: torch.device | None = None, depth: int = 0) -> Any:
    """The inverse of :func:`encoded`.

    Args:
        device: for tensors that were not in the host's memory.

    Raises:
        MalformedMessageError: if it is not what that makes.
    """
    try:
        kind, held = node
        if kind == "plain" and (held is None or type(held) in (bool, int, float, str)):
            return held
        if kind in ("tensor", "device") and isinstance(held, Tensor):
            return held if kind == "tensor" else held.to(device)
        if kind in ("array", "scalar") and isinstance(held, Tensor):
            return held.numpy() if kind == "array" else held.numpy()[()]
        if kind == "dict" and depth <= _DEEPEST:
            return {decoded(key, device, depth + 1): decoded(entry, device, depth + 1) for key, entry in held}
        collections: dict[str, Any] = {"list": list, "tuple": tuple, "deque": deque, "set": set, "frozenset": frozenset}
        if depth <= _DEEPEST:
            return collections[kind](decoded(entry, device, depth + 1) for entry in held)
    except (TypeError, ValueError, KeyError) as error:
        raise MalformedMessageError(f"What should be kept by steps is no data ({error}).") from error
    raise MalformedMessageError("What should be kept by steps goes too deep.")


# -------------------------------------------------------------------------------------------------------- what others may set


def put(holder: Holder, keys: tuple[Any, ...], value: Any) -> bool:
    """Set what another rank has, where this rank keeps something of that kind.

    Args:
        holder: where this rank keeps it.
        keys: of the part; none for the whole.
        value: data.

    Returns:
        whether it could be: a number can take the place of a number, a list that of a list, and anything that of ``None``.
    """
    if not keys:
        there = holder.value
        if not _fits(there, value):
            return False
        if not _exchanged(there, value):
            holder.set(_owned(value))
        return True
    place = holder.value
    for key in keys[:-1]:
        try:
            place = place[key]
        except (KeyError, IndexError, TypeError):
            return False
    key = keys[-1]
    if not isinstance(place, dict) and not (isinstance(place, list) and type(key) is int and 0 <= key < len(place)):
        return False
    there = place[key] if isinstance(place, list) or key in place else None
    if not _fits(there, value):
        return False
    if there is None or not _exchanged(there, value):
        place[key] = _owned(value)
    return True


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (Number, np.generic, Tensor)):
        # A sum that begins as 0.0 becomes a tensor with its first addition.
        return "number"
    kinds: dict[Any, str] = {(str, bytes): "text", np.ndarray: "array", dict: "dict", list: "list", tuple: "tuple"}
    kinds |= {deque: "deque", (set, frozenset): "set"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), "no data")


def _fits(there: Any, value: Any) -> bool:
    kinds = {_kind(there), _kind(value)} - {"nothing"}
    return "no data" not in kinds and len(kinds) <= 1


def _exchanged(there: Any, value: Any) -> bool:
    """Whether the new content is in the old collection, tensor or array, which others may hold too."""
    if isinstance(there, list) and isinstance(value, list):
        there[:] = value
    elif (isinstance(there, dict) and isinstance(value, dict)) or (isinstance(there, set) and isinstance(value, set)):
        there.clear()
        there.update(value)
    elif isinstance(there, deque) and isinstance(value, deque):
        there.clear()
        there.extend(value)
    elif isinstance(there, Tensor) and isinstance(value, Tensor):
        alike = there.shape == value.shape and there.dtype == value.dtype and not there.requires_grad
        if not alike or (there.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        there.copy_(value)
    elif isinstance(there, np.ndarray) and isinstance(value, np.ndarray):
        if there.shape != value.shape or there.dtype != value.dtype or not there.flags.writeable:
            return False
        there[...] = value
    else:
        return False
    return True


def _owned(value: Any) -> Any:
    """A tensor that can be worked on in place wherever it is used; one that was made in evaluation cannot be in training."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):
        return value.clone()
