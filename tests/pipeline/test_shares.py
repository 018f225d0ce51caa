from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sentinel.pipeline.shares import CleanShares
from lightning_sentinel.pipeline.steps import MicroBatches


def uneven_weights(replicas: int, micro_batches: int, seed: int = 0) -> Tensor:
    sizes = torch.randint(micro_batches, 40, (replicas,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([MicroBatches(torch.zeros(size), micro_batches).weights for size in sizes])


def formula(clean: Tensor, weights: Tensor) -> list[float]:
    """Share of a stage, by a loop: the mean over replicas of the weights that count."""
    stages, replicas, micro_batches = clean.shape
    return [
        sum(float(weights[r, m]) for r in range(replicas) for m in range(micro_batches) if clean[s, r, m]) / replicas
        for s in range(stages)
    ]


@pytest.mark.parametrize(("stages", "replicas", "micro_batches"), [(2, 2, 1), (3, 1, 4), (4, 5, 3)])
def test_against_the_formula(stages: int, replicas: int, micro_batches: int) -> None:
    generator = torch.Generator().manual_seed(stages)
    shares = CleanShares(stages)
    for seed in range(20):
        clean = torch.rand(stages, replicas, micro_batches, generator=generator) > 0.3
        weights = uneven_weights(replicas, micro_batches, seed)
        shares.add(clean, weights)
        expected, taken = formula(clean, weights), shares.take()
        if min(expected) < 1e-6:
            assert taken is None
        else:
            assert taken == pytest.approx(expected, abs=1e-6)


def test_accumulated_batches_count_alike() -> None:
    shares, parts = CleanShares(3), []
    generator = torch.Generator().manual_seed(1)
    for seed in range(4):
        clean = torch.rand(3, 2, 5, generator=generator) > 0.5
        weights = uneven_weights(2, 5, seed)
        shares.add(clean, weights)
        parts.append(formula(clean, weights))
    shares.add(None, uneven_weights(2, 5))
    parts.append([1.0] * 3)
    assert shares.take() == pytest.approx([sum(column) / 5 for column in zip(*parts)], abs=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 3, 7, 10])
def test_exactly_one_where_nothing_is_excluded(micro_batches: int) -> None:
    shares = CleanShares(3)
    for replicas in (3, 6):
        weights = uneven_weights(replicas, micro_batches, replicas)
        shares.add(torch.ones(3, replicas, micro_batches, dtype=torch.bool), weights)
        shares.add(None, weights)
    assert shares.take() == [1.0, 1.0, 1.0]


def test_exactly_one_at_the_stages_that_excluded_nothing() -> None:
    shares = CleanShares(3)
    clean = torch.ones(3, 3, 7, dtype=torch.bool)
    clean[1, 0, 2] = False
    shares.add(clean, uneven_weights(3, 7))
    taken = shares.take()
    assert taken is not None
    assert (taken[0], taken[2]) == (1.0, 1.0)
    assert taken[1] < 1.0


@pytest.mark.parametrize(("replicas", "micro_batches"), [(1, 1), (1, 3), (3, 7), (7, 6)])
def test_a_stage_with_nothing_stops_all(replicas: int, micro_batches: int) -> None:
    shares = CleanShares(2)
    clean = torch.ones(2, replicas, micro_batches, dtype=torch.bool)
    clean[1] = False
    for seed in range(3):
        shares.add(clean, uneven_weights(replicas, micro_batches, seed))
    assert shares.take() is None
    shares.add(None, uneven_weights(replicas, micro_batches))
    assert shares.take() == [1.0, 1.0]


def test_one_clean_batch_is_enough() -> None:
    shares, weights = CleanShares(2), uneven_weights(2, 3)
    shares.add(torch.zeros(2, 2, 3, dtype=torch.bool), weights)
    shares.add(None, weights)
    assert shares.take() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_taking_starts_afresh() -> None:
    shares, weights = CleanShares(1), uneven_weights(2, 2)
    shares.add(torch.tensor([[[True, False], [True, True]]]), weights)
    first = shares.take()
    shares.add(None, weights)
    assert first != [1.0]
    assert shares.take() == [1.0]
