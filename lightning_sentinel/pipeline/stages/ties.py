"""Finds parameters that layers of several stages share, such as the embedding and the head of a language model."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

__all__ = ["Tie", "find_ties"]


class Tie(NamedTuple):
    """A parameter that several stages share.

    Args:
        name: its first name in the unsplit module.
        names: all its names.
        stages: the stages that have it, in order.
    """

    name: str
    names: frozenset[str]
    stages: tuple[int, ...]


def find_ties(module: nn.Module, layers: Sequence[nn.Module], parts: Sequence[int]) -> tuple[Tie, ...]:
    """Find the parameters that more than one stage has.

    Args:
        module: the unsplit module.
        layers: all of the module's layers.
        parts: stage ``s`` has the layers ``parts[s]`` to ``parts[s + 1] - 1``.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5, bias=False))
        >>> net[2].weight = net[0].weight
        >>> [(tie.name, tie.stages) for tie in find_ties(net, list(net), (0, 1, 3))]
        [('0.weight', (0, 1))]
    """
    stages: defaultdict[int, set[int]] = defaultdict(set)
    for stage, (start, stop) in enumerate(itertools.pairwise(parts)):
        for layer in layers[start:stop]:
            for parameter in layer.parameters():
                stages[id(parameter)].add(stage)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(Tie(names[key][0], frozenset(names[key]), tuple(sorted(where))) for key, where in stages.items() if len(where) > 1)
