"""Groups replicas whose signals have the same shapes, to run a stage on their concatenated batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["alike", "of_replicas", "side_by_side", "together"]


def alike(inputs: Sequence[Any]) -> list[list[int]]:
    """Group replicas, by number, whose inputs have equal types, shapes and dtypes. An input without a shape is a group alone."""
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(inputs):
        values = one if isinstance(one, tuple) else (one,)
        shapes = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else (number,) for value in values)
        groups.setdefault((type(one), shapes), []).append(number)
    return list(groups.values())


def side_by_side(inputs: Sequence[Any]) -> Any:
    """Concatenate the pipeline inputs of a group of replicas along the batch axis."""
    if len(inputs) == 1:
        return inputs[0]
    return tuple(map(torch.cat, zip(*inputs))) if isinstance(inputs[0], tuple) else torch.cat(list(inputs))


def together(of_each: Sequence[Any], group: Sequence[int]) -> Any:
    """Concatenate the signals of a group of replicas; a single one, or one that is no tensor, is returned as it is."""
    some = [of_each[replica] for replica in group]
    return torch.cat(some) if len(some) > 1 and isinstance(some[0], Tensor) else some[0]


def of_replicas(of_groups: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[Any]:
    """Split each group's signal into those of its replicas, in the order of replicas."""
    found: dict[int, Any] = {}
    for one, group in zip(of_groups, groups):
        found.update(zip(group, one.chunk(len(group)) if len(group) > 1 else [one]))
    return [found[replica] for replica in sorted(found)]
