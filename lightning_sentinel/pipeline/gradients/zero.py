"""Stage 1 of ZeRO: each worker of a pipeline stage keeps the optimizer state of some of the stage's parameters.

After the reduction all workers of a stage have the same gradients. Each steps with those of its own parameters, and broadcasts the
new values to the others (Rajbhandari et al., 2020, section 5). As in torch's ``ZeroRedundancyOptimizer`` parameters are not
divided, so the user's optimizer works unchanged: it skips a parameter without a gradient, and keeps no state for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lightning_sentinel.pipeline.processes.wire import Wire

__all__ = ["OptimizerShards", "owners"]


def owners(sizes: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """The rank that keeps each parameter's optimizer state. Larger parameters go first, each to the rank with the least so far.

    Args:
        sizes: elements of each parameter.
        ranks: the ranks to choose from.

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
    """The parameters of a stage for which this rank keeps the optimizer state and steps.

    Args:
        parameters: the stage's parameters, in the same order on all of its ranks.
        ranks: the ranks of the workers that step. The optimizer state of any other rank is lost.
        rank: this rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Sequence[int], rank: int) -> None:
        self._owners = list(zip(parameters, owners([parameter.numel() for parameter in parameters], ranks)))
        self._rank = rank
        self.others = frozenset(id(parameter) for parameter, owner in self._owners if owner != rank)
        """Parameters, by ``id``, whose optimizer state other ranks keep."""

    @contextmanager
    def stepping(self, wire: Wire) -> Iterator[None]:
        """A context around the optimizer's step; to be entered by all ranks of ``wire``.

        On entry, gradients of other ranks' parameters are discarded. On exit, each rank broadcasts its parameters' new values.
        """
        for parameter, owner in self._owners:
            if owner != self._rank:
                parameter.grad = None
        yield
        with torch.no_grad():
            wire.broadcast_each(((parameter.data, owner) for parameter, owner in self._owners if parameter.requires_grad))
