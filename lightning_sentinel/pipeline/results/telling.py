"""Encodes values that steps keep, as tagged lists, so that a receiver can decode nothing but data from them."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.step_attributes import DEEPEST

__all__ = ["NoData", "decoded", "encoded"]


class NoData(Exception):
    """Raised if a value holds something that is no data; the argument says what."""


def encoded(value: Any, depth: int = 0) -> list[Any]:
    """Encode a value for a tensor tree: each part as a list of its kind and its content.

    Raises:
        NoData: if the value holds anything but data.

    Example:
        >>> decoded(encoded({"seen": {1}, "sizes": (2, 0.5)}))
        {'seen': {1}, 'sizes': (2, 0.5)}
    """
    if depth > DEEPEST:
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
        device: for tensors that were not in the sender's host memory.

    Raises:
        MalformedMessageError: if the node is not a result of :func:`encoded`.
    """
    try:
        kind, held = node
        if kind == "plain" and (held is None or type(held) in (bool, int, float, str)):
            return held
        if kind in ("tensor", "device") and isinstance(held, Tensor):
            return held if kind == "tensor" else held.to(device)
        if kind in ("array", "scalar") and isinstance(held, Tensor):
            return held.numpy() if kind == "array" else held.numpy()[()]
        if kind == "dict" and depth <= DEEPEST:
            return {decoded(key, device, depth + 1): decoded(entry, device, depth + 1) for key, entry in held}
        collections: dict[str, Any] = {"list": list, "tuple": tuple, "deque": deque, "set": set, "frozenset": frozenset}
        if depth <= DEEPEST:
            return collections[kind](decoded(entry, device, depth + 1) for entry in held)
    except (TypeError, ValueError, KeyError) as error:
        raise MalformedMessageError(f"What should be kept by steps is no data ({error}).") from error
    raise MalformedMessageError("What should be kept by steps goes too deep.")
