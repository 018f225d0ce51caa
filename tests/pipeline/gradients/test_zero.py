"""Who keeps which parameter's optimizer state."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sentinel.pipeline.gradients.zero import OptimizerShards, owners


@given(st.lists(st.integers(0, 100), max_size=30), st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True))
def test_nobody_keeps_more_than_one_parameter_too_many(sizes: list[int], ranks: list[int]) -> None:
    kept = owners(sizes, ranks)
    assert len(kept) == len(sizes) and set(kept) <= set(ranks)
    loads = [sum(size for size, owner in zip(sizes, kept) if owner == rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_the_optimizer_keeps_nothing_of_others() -> None:
    """On which all of it rests: torch's optimizers pass over a parameter without a gradient."""
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam):
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
        optimizer = kind(parameters, lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        before = set(optimizer.state)  # Adagrad makes its state at once
        shards = OptimizerShards(parameters, ranks=[2, 5], rank=5)
        assert len(shards.others) == 1
        for parameter in parameters:
            parameter.grad = None if id(parameter) in shards.others else torch.ones(3)
        optimizer.step()
        (own,) = (parameter for parameter in parameters if id(parameter) not in shards.others)
        assert set(optimizer.state) - before <= {own} and own in optimizer.state
        assert all((parameter == 1).all() for parameter in parameters if parameter is not own)
