"""Describes a batch without the values of its tensors, and makes placeholder batches for stages that do not read data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.pipeline.data.reading import read

__all__ = ["describe", "stand_in"]


def describe(batch: Any, samples: int) -> bytes:
    """A batch's structure, shapes, dtypes, numbers and text, in JSON.

    Example:
        >>> batch = stand_in(describe({"tokens": torch.ones(2, 3), "name": "cat"}, samples=2), torch.device("cpu"))
        >>> batch["tokens"].shape, float(batch["tokens"].sum()), batch["name"]
        (torch.Size([2, 3]), 0.0, 'cat')
    """
    return json.dumps({"samples": samples, "batch": _described(batch)}).encode()


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {"dict": [[key, _described(entry)] for key, entry in value.items() if isinstance(key, (str, int))]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "tuple": [_described(entry) for entry in value]}
    return {"value": value if isinstance(value, (bool, int, float, str)) else None}


def stand_in(description: bytes, device: torch.device) -> Any:
    """Make a placeholder batch of zeros from a description; each tensor takes the memory of one element.

    Raises:
        MalformedMessageError: if the description is invalid.
    """
    try:
        described = json.loads(description)
        batch = _built(described["batch"], device)
        samples = described["samples"]
        rows = torch.zeros((), device=device).expand(samples)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
        raise MalformedMessageError(f"What should describe a batch does not: {description[:80]!r} ({error}).") from error
    try:
        shows = read(batch).samples == samples
    except ConfigurationError:
        shows = False
    # Of a container that we cannot describe, only the number of samples is known.
    return batch if shows else rows


def _built(described: Any, device: torch.device) -> Any:
    if "shape" in described:
        dtype = getattr(torch, described["dtype"])
        return torch.zeros((), dtype=dtype, device=device).expand(described["shape"])
    if "dict" in described:
        return {key: _built(entry, device) for key, entry in described["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in described:
            return kind(_built(entry, device) for entry in described[kind.__name__])
    return described["value"]
