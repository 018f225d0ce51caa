from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification.draws import NUMBER_BYTES, Draws, chance_of_each, own_number, surely_honest
from lightning_sentinel.verification.majority import most_liars

MESH = Mesh(2, 3)
ONE, OTHER = Worker(0, 1), Worker(1, 2)


def test_what_a_worker_draws_follows_from_its_own_number_alone() -> None:
    draws = Draws.seeded(MESH, 0, 7)
    changed = Draws({**draws.numbers, OTHER: 5})
    assert torch.equal(draws.uniform([ONE], "signals", 9), changed.uniform([ONE], "signals", 9))
    assert not torch.equal(draws.uniform([OTHER], "signals", 9), changed.uniform([OTHER], "signals", 9))
    assert not torch.equal(draws.uniform([ONE], "signals", 9), draws.uniform([ONE], "rows", 9))


def test_who_has_said_nothing_draws_nothing() -> None:
    draws = Draws({ONE: 5})
    assert draws.uniform([ONE, OTHER], "signals", 3)[1].tolist() == [1.0] * 3
    assert torch.equal(draws.uniform([ONE, OTHER], "signals", 3)[0], draws.uniform([ONE], "signals", 3)[0])


def test_the_coin_follows_from_the_numbers_of_all() -> None:
    draws = Draws.seeded(MESH, 0, 7)
    coins = {Draws({**draws.numbers, worker: 5}).coin for worker in MESH.workers}
    assert len({draws.coin, *coins}) == 1 + MESH.size
    swapped = {**draws.numbers, ONE: draws.numbers[OTHER], OTHER: draws.numbers[ONE]}
    assert Draws(swapped).coin != draws.coin


def test_seeded_numbers_are_those_of_seed_worker_and_step() -> None:
    places = itertools.product((0, 1), MESH.workers, (3, 4))
    numbers = [own_number(seed, worker, step) for seed, worker, step in places]
    assert len(set(numbers)) == len(numbers) and all(0 <= number < 2 ** (8 * NUMBER_BYTES) for number in numbers)
    assert numbers[0] == own_number(0, MESH.workers[0], 3)


def test_draws_are_uniform_and_those_of_two_workers_and_two_steps_independent() -> None:
    drawn = torch.stack([Draws.seeded(MESH, 0, step).uniform([ONE, Worker(0, 2)], "signals", 2) for step in range(3000)])
    columns = drawn.flatten(1).numpy()
    assert stats.kstest(columns.ravel(), "uniform").pvalue > 0.001
    for one, other in itertools.combinations(range(4), 2):
        assert stats.pearsonr(columns[:, one], columns[:, other]).pvalue > 0.001
    assert stats.pearsonr(columns[1:, 0], columns[:-1, 0]).pvalue > 0.001


@pytest.mark.parametrize("live", range(2, 12))
@pytest.mark.parametrize("muted", range(3))
def test_so_many_of_those_that_can_recompute_a_lie_are_honest_whoever_is_malicious(live: int, muted: int) -> None:
    """The liar is one of the malicious ones, of which some have lost their word already."""
    liars = most_liars(live)
    assert 2 * liars < live <= 2 * liars + 2
    least = min(live - 1 - muted - (malicious - 1 - min(muted, malicious - 1)) for malicious in range(1, max(1, liars) + 1))
    assert surely_honest(live, muted) == max(1, least)


@pytest.mark.parametrize(("rate", "honest"), [(0.01, 4), (0.3, 1), (1.0, 3), (0.5, 9)])
def test_so_many_honest_workers_draw_a_signal_at_the_rate(rate: float, honest: int) -> None:
    assert 1 - (1 - chance_of_each(rate, honest)) ** honest == pytest.approx(rate)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ConfigurationError, match=f"An audit rate of {rate} is no share of signals"):
        chance_of_each(rate, 5)
