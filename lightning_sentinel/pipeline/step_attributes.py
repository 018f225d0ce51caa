"""Finds, saves, restores and sets the values that a user's steps keep in a module.

A module keeps values in attributes and buffers of itself and its submodules. Two kinds of submodules do not count: the layers of
the pipeline, which each stage has for itself, and torchmetrics, whose values are shared (``results.metrics``). Names are dotted, as
in a ``state_dict``. *Data* are numbers, text, tensors and NumPy arrays, in lists, tuples, dicts, sets and deques.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from numbers import Number
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, MetricTracker

__all__ = ["DEEPEST", "Holder", "keepers", "kept_by", "put", "remembered"]

_ENTRY = 64
"""Number of tensor elements that are copied in the time of one entry of a collection."""
DEEPEST = 8
"""Maximal nesting depth of collections."""
_OWN = frozenset(dir(L.LightningModule())) | {"_hparams", "_hparams_initial", "_hparams_name"}
"""Attributes of every LightningModule: the user's steps keep nothing there, and other ranks must not set them."""


class Holder(NamedTuple):
    """An attribute or buffer in which a module keeps a value.

    Args:
        owner: the module, or a submodule of it.
        name: of the attribute or buffer in ``owner``.
    """

    owner: nn.Module
    name: str

    @property
    def _place(self) -> dict[str, Any]:
        return self.owner._buffers if self.name in self.owner._buffers else vars(self.owner)

    @property
    def value(self) -> Any:
        """The present value."""
        return self._place[self.name]

    def set(self, value: Any) -> None:
        """Replace the value."""
        self._place[self.name] = value

    def remove(self) -> None:
        """Delete the attribute or buffer."""
        del self._place[self.name]


def keepers(module: L.LightningModule, layers: Collection[str] = ()) -> dict[str, nn.Module]:
    """The module and its submodules, by dotted name, except layers of the pipeline and torchmetrics."""
    kinds = (Metric, MetricCollection, MetricTracker)
    apart = {*layers, *(name for name, part in module.named_modules() if isinstance(part, kinds))}
    found = {}
    for path, owner in module.named_modules():
        parts = path.split(".")
        if not any(".".join(parts[:length]) in apart for length in range(1, len(parts) + 1)):
            found[path] = owner
    return found


def kept_by(
    module: L.LightningModule, layers: Collection[str] = (), keeping: Mapping[str, nn.Module] | None = None
) -> dict[str, Holder]:
    """The attributes and buffers in which a module keeps values, by dotted name.

    Args:
        module: the user's module.
        layers: names of the pipeline's layers, which are left out.
        keeping: the result of :func:`keepers`, if it is known.

    Example:
        >>> module = L.LightningModule()
        >>> module.losses = []
        >>> module.register_buffer("count", torch.zeros(()))
        >>> list(kept_by(module))
        ['losses', 'count']
    """
    found = {}
    for path, owner in (keepers(module, layers) if keeping is None else keeping).items():
        names = [name for name in vars(owner) if name not in _OWN and not name.startswith("_sentinel")]
        for name in (*names, *owner._buffers):
            found[f"{path}.{name}" if path else name] = Holder(owner, name)
    return found


def remembered(
    module: L.LightningModule,
    layers: Collection[str] = (),
    keeping: Mapping[str, nn.Module] | None = None,
    most: int | None = None,
) -> Callable[[], None]:
    """Save the values that a module keeps. Returns a function that restores them, except in-place changes of tensors in a list.

    Args:
        module: the user's module.
        layers: names of the pipeline's layers, which are left out.
        keeping: the result of :func:`keepers`, if it is known.
        most: largest tensor to copy, in elements; collections are limited to a 64th as many entries. Larger values are not
            restored, except that entries appended to a list are removed. ``None``: no limit.

    Example:
        >>> module = L.LightningModule()
        >>> module.losses = [1.0]
        >>> restore = remembered(module)
        >>> module.losses.append(2.0)
        >>> restore()
        >>> module.losses
        [1.0]
    """
    before = {name: (holder.value, _restoring(holder.value, most)) for name, holder in kept_by(module, layers, keeping).items()}

    def restore() -> None:
        for name, holder in kept_by(module, layers, keeping).items():
            if name not in before:
                holder.remove()
                continue
            value, content = before[name]
            holder.set(value)
            content()

    return restore


def _restoring(value: Any, most: int | None, depth: int = 0) -> Callable[[], object]:
    """Save the content of a value, and return a function that restores it."""
    if isinstance(value, (Tensor, np.ndarray)):
        if most is not None and (value.numel() if isinstance(value, Tensor) else value.size) > most:
            return _nothing
        saved = value.detach().clone() if isinstance(value, Tensor) else value.copy()
        return partial(_exchanged, value, saved)
    if not isinstance(value, (list, dict, set, deque)) or depth > DEEPEST:
        return _nothing
    if most is not None and len(value) > most // _ENTRY:
        return partial(_cut, value, len(value)) if isinstance(value, list) else _nothing
    inside = value.values() if isinstance(value, dict) else () if isinstance(value, set) else value
    looks_into = (list, dict, set, deque, *((Tensor, np.ndarray) if isinstance(value, dict) else ()))
    parts = [_restoring(entry, most, depth + 1) for entry in inside if isinstance(entry, looks_into)]
    saved = value.copy()

    def restore() -> None:
        _exchanged(value, saved)
        for part in parts:
            part()

    return restore


def _cut(value: list[Any], length: int) -> None:
    del value[length:]


def _nothing() -> None:
    """Restores nothing."""


def put(holder: Holder, keys: tuple[Any, ...], value: Any) -> bool:
    """Set a value that another rank sent, if this rank keeps a value of the same kind there.

    Args:
        holder: where this rank keeps the value.
        keys: path to the part to set; empty for the whole.
        value: data.

    Returns:
        whether the value was set: a number can replace a number, a list a list, and anything can replace ``None``.
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
        # A running sum that starts as 0.0 becomes a tensor with its first addition.
        return "number"
    kinds: dict[Any, str] = {(str, bytes): "text", np.ndarray: "array", dict: "dict", list: "list", tuple: "tuple"}
    kinds |= {deque: "deque", (set, frozenset): "set"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), "no data")


def _fits(there: Any, value: Any) -> bool:
    kinds = {_kind(there), _kind(value)} - {"nothing"}
    return "no data" not in kinds and len(kinds) <= 1


def _exchanged(there: Any, value: Any) -> bool:
    """Copy new content into the old collection, tensor or array, which other code may refer to. Returns whether it was possible."""
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
    """Clone a tensor outside of inference mode: an inference tensor could not be modified in place during training."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):
        return value.clone()
