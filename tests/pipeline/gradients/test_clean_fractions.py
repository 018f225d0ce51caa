from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractionTally
from lightning_sentinel.pipeline.step_plan import StepPlan, plan_step
from lightning_sentinel.wiring import Wiring


def weighing(mesh: Mesh, weights: Tensor, wiring: Wiring) -> StepPlan:
    """A plan in which micro-batches have these weights, whatever their sizes are."""
    plan = replace(plan_step("training_step", mesh, BatchSizes(1, (1,) * mesh.replicas)), wiring=wiring)
    vars(plan)["weights"] = weights
    return plan


class Counting:
    """Shares of a mesh in which every worker serves its own lane."""

    def __init__(self, stages: int, replicas: int) -> None:
        self.mesh = Mesh(stages, replicas)
        self.shares = CleanFractionTally(self.mesh)

    def add(self, clean: Tensor | None, weights: Tensor) -> None:
        self.shares.add(clean, weighing(self.mesh, weights, Wiring.of(self.mesh, micro_batches=weights.shape[1])))

    def take(self, *left_out: Worker) -> list[float] | None:
        taken = self.shares.take(left_out)
        return None if taken is None else taken.stages


def uneven_weights(replicas: int, micro_batches: int, seed: int = 0) -> Tensor:
    sizes = torch.randint(micro_batches, 40, (replicas,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([BatchSplitter(None).whole(torch.zeros(size)).dealt(micro_batches).weights for size in sizes])


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
    shares = Counting(stages, replicas)
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
    shares, parts = Counting(3, 2), []
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
    for replicas in (3, 6):
        shares = Counting(3, replicas)
        weights = uneven_weights(replicas, micro_batches, replicas)
        shares.add(torch.ones(3, replicas, micro_batches, dtype=torch.bool), weights)
        shares.add(None, weights)
        assert shares.take() == [1.0, 1.0, 1.0]


def test_exactly_one_at_the_stages_that_excluded_nothing() -> None:
    shares = Counting(3, 3)
    clean = torch.ones(3, 3, 7, dtype=torch.bool)
    clean[1, 0, 2] = False
    shares.add(clean, uneven_weights(3, 7))
    taken = shares.take()
    assert taken is not None
    assert (taken[0], taken[2]) == (1.0, 1.0)
    assert taken[1] < 1.0


@pytest.mark.parametrize(("replicas", "micro_batches"), [(1, 1), (1, 3), (3, 7), (7, 6)])
def test_a_stage_with_nothing_stops_all(replicas: int, micro_batches: int) -> None:
    shares = Counting(2, replicas)
    clean = torch.ones(2, replicas, micro_batches, dtype=torch.bool)
    clean[1] = False
    for seed in range(3):
        shares.add(clean, uneven_weights(replicas, micro_batches, seed))
    assert shares.take() is None
    shares.add(None, uneven_weights(replicas, micro_batches))
    assert shares.take() == [1.0, 1.0]


def test_one_clean_batch_is_enough() -> None:
    shares, weights = Counting(2, 2), uneven_weights(2, 3)
    shares.add(torch.zeros(2, 2, 3, dtype=torch.bool), weights)
    shares.add(None, weights)
    assert shares.take() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_taking_starts_afresh() -> None:
    shares, weights = Counting(1, 2), uneven_weights(2, 2)
    shares.add(torch.tensor([[[True, False], [True, True]]]), weights)
    first = shares.take()
    shares.add(None, weights)
    assert first != [1.0]
    assert shares.take() == [1.0]


def test_workers_have_what_their_lanes_were_given_and_who_is_left_out_is_missing() -> None:
    mesh, liar = Mesh(2, 3), Worker(1, 2)
    shares, weights = CleanFractionTally(mesh), torch.full((3, 2), 0.5)
    shares.add(torch.ones(2, 3, 2, dtype=torch.bool), weighing(mesh, weights, Wiring.of(mesh, micro_batches=2)))
    wiring = Wiring.of(mesh, {liar}, micro_batches=2)
    clean = torch.ones(2, 3, 3, dtype=torch.bool)
    clean[0, 0, 1] = False
    shares.add(clean, weighing(mesh, wiring.arrange(weights), wiring))
    taken = shares.take({liar})
    assert taken is not None
    # Of six halves a stage and batch: stage 0 lacks one of the second batch, stage 1 what the liar did in the first.
    assert taken.stages == pytest.approx([1 - 0.5 / 3 / 2, 1 - 1 / 3 / 2])
    assert [taken.of_worker(Worker(1, replica)) for replica in range(3)] == [2.5, 2.5, 0.0]
    assert [taken.of_worker(Worker(0, replica)) for replica in range(3)] == [2.0, 2.5, 1.0]
    assert taken.of_stage(0) == taken.stages[0]
