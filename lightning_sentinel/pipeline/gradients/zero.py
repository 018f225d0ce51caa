"""Stage 1 of ZeRO: each worker of a stage keeps the optimizer's state of some of its parameters.

After the reduction all workers of a stage have the same gradients. Each steps with those of its own parameters, and tells the
others the new values (Rajbhandari et al., 2020, section 5). As in torch's ``ZeroRedundancyOptimizer`` parameters are not divided,
so the optimizer that the user made steps as ever: it passes over a parameter without a gradient, and keeps nothing for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lightning_sentinel.pipeline.processes import wire

__all__ = ["OptimizerShards", "owners"]


def owners(sizes: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Who keeps the state of each parameter: the largest goes first, and to whom has least.

    Args:
        sizes: elements of each parameter.
        ranks: who is there.

    Example:
        >>> owners([10, 30, 15, 5], ranks=[4, 6])
        [6, 4, 6, 6]
    """
    loads = [(0, rank) for rank in ranks]
    kept = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, kept[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], kept[index]))
    return kept


class OptimizerShards:
    """Which parameters of a stage this rank steps with.

    Args:
        parameters: of the stage, in an order that is the same on all of its ranks.
        ranks: of the workers that step; all others' states are lost with them.
        rank: this one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Sequence[int], rank: int) -> None:
        self._owners = list(zip(parameters, owners([parameter.numel() for parameter in parameters], ranks)))
        self._rank = rank
        self.others = frozenset(id(parameter) for parameter, owner in self._owners if owner != rank)
        """Parameters, by ``id``, of which this rank keeps no state."""

    @contextmanager
    def stepping(self, group: dist.ProcessGroup) -> Iterator[None]:
        """Around the optimizer's step; to be entered by all ranks of ``group``.

        Gradients of others' parameters are taken away first, and new values arrive afterwards.
        """
        for parameter, owner in self._owners:
            if owner != self._rank:
                parameter.grad = None
        yield
        with torch.no_grad():
            wire.broadcast_each(((parameter.data, owner) for parameter, owner in self._owners if parameter.requires_grad), group)
