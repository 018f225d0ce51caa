from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.recovery.reference_updates import ReferenceUpdates
from lightning_sentinel.verification.references import Contribution, References

POSITIONS, CHANNELS, SIZES = 6, 16, {"log_spread": 16, "gram": 9}
STATISTICS = sum(SIZES.values())


class Stage:
    """Replicas of a stage that each say something of honest signals; the same lessons on all ranks, so that one will do."""

    def __init__(self, workers: int = 5) -> None:
        self.lessons, self.references = ReferenceUpdates(), References(beta=0.9)
        self.workers = [Worker(1, replica) for replica in range(workers)]
        self.generator = torch.Generator().manual_seed(0)
        self.mean = 3 * torch.randn(POSITIONS, CHANNELS, generator=torch.Generator().manual_seed(1))
        self.asked = 0
        self.rows = torch.empty(0)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def step(self, spoil: Callable[[Tensor], Tensor] = lambda row: row) -> Tensor:
        """One step in which the first worker spoils what it adds; returns the mean of what honest ones say."""
        said = []
        for _ in self.workers:
            one = Contribution.like(torch.zeros(POSITIONS, CHANNELS), torch.zeros(STATISTICS))
            for _ in range(2):
                means = self.mean + 0.3 * self.noise(POSITIONS, CHANNELS)
                one.add(means, 1 + 0.1 * self.noise(STATISTICS), torch.tensor(1.0))
            said.append(one)
        rows = torch.stack([one.flat() for one in said])
        others = said[1:] or said
        honest = torch.stack([one.positions.total for one in others]).sum(dim=0) / (2 * len(others))
        rows[0] = spoil(rows[0])

        # Who is asked says once more what it added in the step before.
        before, self.rows = self.rows, rows

        def apart(vector: Tensor) -> tuple[Tensor, list[Worker]]:
            self.asked += 1
            torch.testing.assert_close(vector, before[-1], rtol=0, atol=0)
            return before, self.workers

        (learned,) = self.lessons.of_step([said[-1]], [self.references], [SIZES], lambda _: rows.sum(dim=0), apart)
        self.references.update(learned, SIZES)
        return honest

    def run(self, steps: int, spoil: Callable[[Tensor], Tensor] = lambda row: row) -> Stage:
        for _ in range(steps):
            self.step(spoil)
        return self

    @property
    def off(self) -> float:
        return float((self.references.momentum.value - self.mean).abs().max())


def one_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda row: torch.cat((torch.tensor([value]), row[1:]))


@pytest.mark.parametrize("before", [0, 20])
@pytest.mark.parametrize("place", [0, POSITIONS * CHANNELS, -1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_is_its_workers_and_nothing_is_learned_from_it(before: int, place: int, value: float) -> None:
    stage = Stage().run(before)

    def spoil(row: Tensor) -> Tensor:
        row = row.clone()
        row[place] = value
        return row

    first, known = stage.step(spoil), stage.references.momentum.value
    assert known is None or known.isfinite().all()
    with pytest.warns(UserWarning, match=r"stage 1, replica 0.* added values that are not finite"):
        stage.step(spoil)
    if not before:
        # Nothing was learned at once, and it is learned with the next step.
        torch.testing.assert_close(stage.references.momentum.value, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # It is said once.
        stage.run(30, spoil)
    assert stage.off < 0.5 and stage.lessons.refused == {Worker(1, 0): 31}
    assert all(value.isfinite().all() for value in stage.references.state_dict().values())


@pytest.mark.parametrize("factor", [-1e30, -100.0, 50.0, 1e30])
@pytest.mark.parametrize("steps", [1, 30])
def test_one_worker_cannot_move_what_is_learned_without_bound(factor: float, steps: int) -> None:
    stage = Stage().run(20)
    stage.run(steps, lambda row: factor * row)
    assert stage.off < 1.0 and not stage.lessons.refused
    for name, reference in (("log_spread", 1.0), ("gram", 1.0)):
        assert (stage.references.statistics[name] - reference).abs().max() < 0.3


def test_honest_replicas_are_not_asked_twice_and_learn_their_mean() -> None:
    stage, plain = Stage().run(1), 0
    asked = stage.asked
    for _ in range(100):
        before = stage.references.momentum.value
        honest = stage.step()
        plain += (stage.references.momentum.value - (0.9 * before + 0.1 * honest)).abs().max() < 0.1
    assert stage.asked == asked and plain == 100


def test_a_training_that_jumps_is_followed() -> None:
    stage = Stage().run(20)
    stage.mean = -4 * stage.mean
    stage.run(60)
    assert stage.off < 0.5 and not stage.lessons.refused


def test_where_all_are_in_one_process_a_sum_that_is_not_finite_is_not_learned() -> None:
    stage = Stage(1).run(3)
    one = Contribution.like(torch.zeros(POSITIONS, CHANNELS), torch.zeros(STATISTICS))
    one.add(torch.full((POSITIONS, CHANNELS), 3e38), torch.ones(STATISTICS), torch.tensor(1.0))
    one.positions.total *= 2
    (learned,) = stage.lessons.of_step([one], [stage.references], [SIZES], lambda vector: vector, None)
    assert not learned.flat().any()
