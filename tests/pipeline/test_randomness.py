from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightning_sentinel.pipeline.randomness import Draws, SeparateRandomness, base_seed
from lightning_sentinel.wiring import Part

Numbers = tuple[float, float, float]


@pytest.fixture(autouse=True)
def _global_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draw_data(count: int) -> list[Numbers]:
    return [(random.random(), float(np.random.rand()), float(torch.rand(()))) for _ in range(count)]


def test_computation_leaves_the_data_alone() -> None:
    SeparateRandomness(seed=5, rank=2, replica=0)
    undisturbed = draw_data(6)
    randomness = SeparateRandomness(seed=5, rank=2, replica=0)
    disturbed = []
    for index in range(6):
        with randomness.of_computation():
            torch.rand(index * 3 + 1)
            torch.nn.functional.dropout(torch.ones(100))
        disturbed += draw_data(1)
    assert disturbed == undisturbed


def test_data_leaves_computation_alone() -> None:
    randomness = SeparateRandomness(seed=5, rank=2, replica=0)
    with randomness.of_computation():
        undisturbed = torch.rand(10)
    randomness = SeparateRandomness(seed=5, rank=2, replica=0)
    parts = []
    for count in (3, 0, 6, 1):
        draw_data(count)
        with randomness.of_computation():
            parts.append(torch.rand(count))
    assert torch.equal(torch.cat(parts), undisturbed)


def test_data_by_replica_computation_by_rank() -> None:
    data: dict[int, list[Numbers]] = {}
    computation = []
    for rank in range(6):
        randomness = SeparateRandomness(seed=5, rank=rank, replica=rank % 2)
        with randomness.of_computation():
            computation.append(tuple(torch.rand(4).tolist()))
        drawn = draw_data(3)
        assert data.setdefault(rank % 2, drawn) == drawn
    assert data[0] != data[1]
    assert len(set(computation)) == 6
    assert data[0][0][2] not in {draws[0] for draws in computation}


def test_the_seed_decides() -> None:
    def both(seed: int) -> tuple[list[Numbers], list[float]]:
        randomness = SeparateRandomness(seed, rank=1, replica=1)
        with randomness.of_computation():
            computation = torch.rand(2).tolist()
        return draw_data(2), computation

    first, again, other = both(7), both(7), both(8)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**32 - 1])
def test_any_seed_of_seed_everything(seed: int) -> None:
    SeparateRandomness(seed, rank=1000, replica=999)


def test_an_error_gives_the_data_its_generator_back() -> None:
    randomness = SeparateRandomness(seed=5, rank=0, replica=0)
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), randomness.of_computation():
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


def test_base_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert base_seed() is None
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    assert base_seed() == 42


CPU = torch.device("cpu")
PLACES = list(itertools.product((0, 9), (0, 1, 11), (0, 1, 2, 3), (0, 1, 11)))
"""Seed, step, micro-batch, layer."""


def draws_at(seed: int, step: int, micro_batch: int, layer: int) -> tuple[float, ...]:
    Draws(seed, step, micro_batch).seed_layer(layer, CPU)
    mask = torch.nn.functional.dropout(torch.ones(20))
    return (*torch.rand(3).tolist(), *torch.randn(2).tolist(), *mask.tolist())


def test_whoever_computes_in_the_same_place_draws_the_same() -> None:
    first = {place: draws_at(*place) for place in PLACES}
    SeparateRandomness(seed=5, rank=2, replica=0)
    assert {place: draws_at(*place) for place in reversed(PLACES)} == first


def test_forward_passes_in_different_places_draw_differently() -> None:
    assert len({draws_at(*place)[0] for place in PLACES}) == len(PLACES)


def test_the_users_step_draws_like_no_layer() -> None:
    layers = {draws_at(*place)[0] for place in PLACES}
    for seed, step, micro_batch, _ in PLACES:
        Draws(seed, step, micro_batch).seed_step(CPU)
        assert float(torch.rand(())) not in layers


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6, 12])
def test_samples_of_any_mesh_have_the_same_numbers(replicas: int) -> None:
    """A sampler deals twelve samples in turn; in micro-batches of one sample each keeps its number."""
    for replica in range(replicas):
        for micro_batch, sample in enumerate(range(12)[replica::replicas]):
            assert Draws.of(0, 0, Part(replica, micro_batch), replicas).micro_batch == sample


def test_forward_passes_leave_the_datas_generators_alone() -> None:
    randomness = SeparateRandomness(seed=5, rank=2, replica=0)
    undisturbed = draw_data(4)
    randomness = SeparateRandomness(seed=5, rank=2, replica=0)
    disturbed = []
    for step in range(4):
        with randomness.of_computation():
            draws_at(5, step, 0, 0)
        disturbed += draw_data(1)
    assert disturbed == undisturbed
