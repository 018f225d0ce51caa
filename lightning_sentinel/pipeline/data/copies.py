"""Copies batches, so that a step may modify its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_sentinel.pipeline.messages.containers import entries_of, is_sequence, rebuilt

__all__ = ["copied"]


def copied(batch: Any) -> Any:
    """Copy a batch's containers, tensors and arrays; objects of other classes are shared with the original.

    Example:
        >>> import torch
        >>> batch = {"x": torch.ones(2)}
        >>> copied(batch).pop("x").mul_(3)
        tensor([3., 3.])
        >>> batch
        {'x': tensor([1., 1.])}
    """
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if is_sequence(batch):
        return rebuilt(batch, [copied(entry) for entry in batch])
    described = dataclasses.is_dataclass(batch) and not isinstance(batch, type)
    if described or isinstance(batch, Mapping) or (isinstance(batch, tuple) and hasattr(batch, "_fields")):
        return rebuilt(batch, [copied(entry) for _, entry in entries_of(batch, "")])
    return batch
