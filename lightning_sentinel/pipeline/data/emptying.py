"""Makes batches without samples, for the hooks of a replica that has no batches left while others have."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

from lightning_sentinel.pipeline.messages.containers import entries_of, is_sequence, leaves_of, rebuilt

__all__ = ["emptied", "is_empty"]


def emptied(batch: Any) -> Any:
    """Empty a batch's tensors, arrays and lists, and keep its structure.

    For batches that only the module can split, where the axis of samples is unknown.

    Returns:
        ``None`` if the batch cannot be emptied.

    Example:
        >>> import torch
        >>> emptied({"frames": torch.zeros(5, 2, 3), "names": ["a", "b"], "lengths": (torch.tensor([5, 4]), 2)})
        {'frames': tensor([], size=(0, 2, 3)), 'names': [], 'lengths': (tensor([], dtype=torch.int64), 2)}
    """
    try:
        made = _emptied(batch)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        # The batch has a container whose constructor takes other arguments.
        return None
    return made if is_empty(made) else None


def is_empty(batch: Any) -> bool:
    """Whether a batch holds nothing that could be a sample.

    Example:
        >>> import torch
        >>> is_empty((torch.zeros(0, 3), 1)), is_empty((torch.zeros(2, 3), 1)), is_empty("text")
        (True, False, False)
    """
    leaves = list(leaves_of(batch))
    if not all(leaf is None or isinstance(leaf, (Tensor, np.ndarray, np.generic, str, bytes, Number)) for leaf in leaves):
        # Other leaves are opaque, and may hold samples.
        return False
    sizes = [leaf.numel() if isinstance(leaf, Tensor) else leaf.size for leaf in leaves if _has_rows(leaf)]
    return not any(sizes) if sizes else not leaves


def _emptied(value: Any) -> Any:
    if _has_rows(value):
        return value[:0]
    held = list(value) if is_sequence(value) else [entry for _, entry in entries_of(value, "")]
    if is_sequence(value) and not any(_holds(entry) for entry in held):
        return rebuilt(value, [])
    return rebuilt(value, [_emptied(entry) for entry in held]) if held else value


def _holds(value: Any) -> bool:
    """Whether a value can be emptied, or holds entries."""
    return _has_rows(value) or is_sequence(value) or any(True for _ in entries_of(value, ""))


def _has_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0
