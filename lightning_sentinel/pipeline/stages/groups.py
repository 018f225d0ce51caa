"""Replicas in groups that go through a stage side by side, along the batch axis: those whose signals have the same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["alike", "of_replicas", "side_by_side", "together"]


def alike(inputs: Sequence[Any]) -> list[list[int]]:
    """Who of those whose inputs these are can go side by side: of equal shapes. What has no shape goes by itself."""
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(inputs):
        values = one if isinstance(one, tuple) else (one,)
        shapes = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else (number,) for value in values)
        groups.setdefault((type(one), shapes), []).append(number)
    return list(groups.values())


def side_by_side(inputs: Sequence[Any]) -> Any:
    """What steps put into the pipeline, of all replicas that go through it together."""
    if len(inputs) == 1:
        return inputs[0]
    return tuple(map(torch.cat, zip(*inputs))) if isinstance(inputs[0], tuple) else torch.cat(list(inputs))


def together(of_each: Sequence[Any], group: Sequence[int]) -> Any:
    """Signals of some replicas, one behind the other; as they are of one, and where there are none."""
    some = [of_each[replica] for replica in group]
    return torch.cat(some) if len(some) > 1 and isinstance(some[0], Tensor) else some[0]


def of_replicas(of_groups: Sequence[Any], groups: Sequence[Sequence[int]]) -> list[Any]:
    """The same of each replica."""
    found: dict[int, Any] = {}
    for one, group in zip(of_groups, groups):
        found.update(zip(group, one.chunk(len(group)) if len(group) > 1 else [one]))
    return [found[replica] for replica in sorted(found)]
