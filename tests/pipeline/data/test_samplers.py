from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.feeding import refuse_other_replicas

DATA = TensorDataset(torch.arange(12))


def loaders(replicas: int, rank: int) -> list[DataLoader[Any]]:
    def sampler() -> DistributedSampler[Any]:
        return DistributedSampler(DATA, replicas, rank)

    return [DataLoader(DATA, sampler=sampler()), DataLoader(DATA, batch_sampler=BatchSampler(sampler(), 2, False))]


@pytest.mark.parametrize(("replicas", "rank"), [(4, 1), (2, 0), (3, 1), (1, 0)])
def test_a_sampler_for_other_replicas_is_refused(replicas: int, rank: int) -> None:
    for loader in loaders(replicas, rank):
        # Who is the only one, of one, reads all samples: both ends of every pipeline do.
        if (replicas, rank) == (1, 0):
            refuse_other_replicas(loader, 2, 1, gathers=False)
            continue
        with pytest.raises(ConfigurationError, match=f"num_replicas={replicas}, rank={rank} .* num_replicas=2, rank=1"):
            refuse_other_replicas(loader, 2, 1, gathers=False)


def test_the_right_one_and_none_are_not() -> None:
    for loader in (*loaders(2, 1), DataLoader(DATA), DataLoader(DATA, shuffle=True), [1, 2]):
        refuse_other_replicas(loader, 2, 1, gathers=False)
