from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sentinel.pipeline.randomness import (
    HostProbe,
    MicroBatchSeeds,
    SeparateRandomness,
    may_draw_on_host,
    seed_data,
    seed_host,
    seed_of_state,
)
from lightning_sentinel.wiring import MicroBatchId

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


def draw_anything(count: int) -> None:
    torch.rand(count * 3 + 1)
    torch.nn.functional.dropout(torch.ones(100))
    np.random.randn(count + 1)
    random.gauss(0, 1)
    np.random.seed(count)
    random.seed(count)


@pytest.mark.parametrize("pairs", [False, True], ids=["", "with half a pair of normal numbers left"])
def test_computation_leaves_the_data_alone(pairs: bool) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)

    def draw() -> list[Numbers]:
        return [*draw_data(1), (random.gauss(0, 1), float(np.random.randn()), 0.0)] if pairs else draw_data(1)

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    undisturbed = [draw() for _ in range(6)]
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    randomness = SeparateRandomness(seed=5, rank=2)
    disturbed = []
    for index in range(6):
        with randomness.of_computation():
            draw_anything(index)
        disturbed.append(draw())
    assert disturbed == undisturbed


def test_data_leaves_computation_alone() -> None:
    randomness = SeparateRandomness(seed=5, rank=2)
    with randomness.of_computation():
        undisturbed = draw_data(10)
    randomness = SeparateRandomness(seed=5, rank=2)
    parts = []
    for count in (3, 0, 6, 1):
        draw_data(count)
        with randomness.of_computation():
            parts += draw_data(count)
    assert parts == undisturbed


def test_data_by_replica_computation_by_rank() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    users = draw_data(3)
    data: dict[int, list[Numbers]] = {}
    computation = []
    for rank in range(6):
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        seed_data(5, replica=rank % 2)
        with SeparateRandomness(seed=5, rank=rank).of_computation():
            computation.append(draw_data(1)[0])
        drawn = draw_data(3)
        assert data.setdefault(rank % 2, drawn) == drawn
    assert data[0] == users, "the first replica goes on with what the user has seeded"
    assert not set(data[0]) & set(data[1])
    assert len(set(computation)) == 6


def test_the_seed_decides() -> None:
    def both(seed: int) -> tuple[list[Numbers], list[Numbers]]:
        with SeparateRandomness(seed, rank=1).of_computation():
            computation = draw_data(2)
        seed_data(seed, replica=1)
        return draw_data(2), computation

    first, again, other = both(7), both(7), both(8)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**32 - 1])
def test_any_seed(seed: int) -> None:
    SeparateRandomness(seed, rank=1000)
    seed_data(seed, 999)


def test_an_error_gives_the_data_its_generator_back() -> None:
    randomness = SeparateRandomness(seed=5, rank=0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(ZeroDivisionError), randomness.of_computation():
        draw_anything(3)
        raise ZeroDivisionError
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_the_seed_of_a_run_follows_from_what_was_drawn_before() -> None:
    torch.manual_seed(3)
    first = seed_of_state()
    assert first == seed_of_state() and 0 <= first < 2**31
    torch.rand(1)
    assert seed_of_state() != first
    torch.manual_seed(3)
    assert seed_of_state() == first


CPU = torch.device("cpu")
PLACES = list(itertools.product((0, 9), (0, 1, 11), (0, 1, 2, 3), (0, 1, 11)))
"""Seed, step, micro-batch, layer."""


def draws_at(seed: int, step: int, micro_batch: int, layer: int) -> tuple[float, ...]:
    MicroBatchSeeds(seed, step, micro_batch).seed_layer(layer, CPU)
    mask = torch.nn.functional.dropout(torch.ones(20))
    return (*torch.rand(3).tolist(), *torch.randn(2).tolist(), *mask.tolist())


def test_whoever_computes_in_the_same_place_draws_the_same() -> None:
    first = {place: draws_at(*place) for place in PLACES}
    SeparateRandomness(seed=5, rank=2)
    assert {place: draws_at(*place) for place in reversed(PLACES)} == first


def test_forward_passes_in_different_places_draw_differently() -> None:
    assert len({draws_at(*place)[0] for place in PLACES}) == len(PLACES)


def test_the_users_step_draws_like_no_layer() -> None:
    layers = {draws_at(*place)[0] for place in PLACES}
    for seed, step, micro_batch, _ in PLACES:
        MicroBatchSeeds(seed, step, micro_batch).seed_step(CPU)
        assert float(torch.rand(())) not in layers


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6, 12])
def test_samples_of_any_mesh_have_the_same_numbers(replicas: int) -> None:
    """A sampler deals twelve samples in turn; in micro-batches of one sample each keeps its number."""
    for replica in range(replicas):
        for micro_batch, sample in enumerate(range(12)[replica::replicas]):
            assert MicroBatchSeeds.of(0, 0, MicroBatchId(replica, micro_batch), replicas).micro_batch == sample


def test_a_step_draws_the_same_at_both_ends_with_any_generator() -> None:
    draws = MicroBatchSeeds(1, 2, 3)
    draws.seed_step(CPU)
    first = draw_data(2)
    draw_data(5)
    draws.seed_step(CPU)
    assert draw_data(2) == first
    seed_host(draws.seed_layer(0, CPU))
    assert draw_data(1)[0][:2] != first[0][:2]


class Moves(torch.nn.Module):
    def __init__(self, how: Callable[[], Any]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.how()
        return x


@pytest.mark.parametrize(
    "how",
    [random.random, lambda: random.gauss(0, 1), lambda: random.seed(3), np.random.rand, np.random.randn, lambda: np.random.seed(3)],
)
def test_a_probe_sees_whatever_moves_a_generator_of_the_host(how: Callable[[], Any]) -> None:
    probe = HostProbe()
    for moves in (True, False, True):
        probe.set()
        if moves:
            how()
        assert probe.moved() == moves


def test_which_layers_may_draw_on_the_host() -> None:
    hooked, replaced = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda *_: None)
    replaced.forward = lambda x: x
    torch_only = torch.nn.TransformerEncoderLayer(4, 2)
    layers = [torch_only, hooked, replaced, Moves(random.random), torch.nn.Sequential(torch.nn.ReLU(), Moves(random.random))]
    assert [may_draw_on_host(layer) for layer in layers] == [False, True, True, True, True]
