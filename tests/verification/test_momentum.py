from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.verification.momentum import Momentum, PositionSums

CHANNELS = 3


def sums_of(means: list[Tensor], weights: list[float] | None = None) -> PositionSums:
    step = PositionSums.like(torch.empty(0, CHANNELS))
    for mean, weight in zip(means, weights or [1.0] * len(means)):
        step.add(mean, torch.tensor(weight))
    return step


def means_of(lengths: list[int], seed: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(1.0, 2.0, size=(length, CHANNELS)).astype("float32")) for length in lengths]


class PlainEMA:
    """Position by position in numpy float64: a position starts at its first mean, and rests while nobody sends it."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.rows: dict[int, np.ndarray] = {}

    def update(self, means: list[Tensor]) -> None:
        for t in range(max(map(len, means), default=0)):
            mean = np.mean([mean[t].double().numpy() for mean in means if len(mean) > t], axis=0)
            self.rows[t] = self.beta * self.rows[t] + (1 - self.beta) * mean if t in self.rows else mean

    @property
    def value(self) -> np.ndarray:
        return np.stack([self.rows[t] for t in sorted(self.rows)])


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8, 0.9, 0.99])
def test_an_exponential_moving_average(beta: float) -> None:
    momentum, plain = Momentum(beta), PlainEMA(beta)
    for step in range(60):
        means = means_of([4, 4, 4], seed=step)
        momentum.update(sums_of(means))
        plain.update(means)
    np.testing.assert_allclose(momentum.value.numpy(), plain.value, rtol=1e-4, atol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=4), min_size=1, max_size=12).filter(lambda all_: any(all_)),
    beta=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_every_position_has_a_history_of_its_own(lengths: list[list[int]], beta: float) -> None:
    momentum, plain = Momentum(beta), PlainEMA(beta)
    for step, of_step in enumerate(lengths):
        means = means_of(of_step, seed=step)
        momentum.update(sums_of(means))
        plain.update(means)
    assert momentum.value is not None
    np.testing.assert_allclose(momentum.value.numpy(), plain.value, rtol=1e-4, atol=1e-5)


def test_a_position_that_nobody_sent_keeps_its_value() -> None:
    momentum = Momentum(beta=0.5)
    momentum.update(sums_of([torch.full((3, CHANNELS), 8.0)]))
    for _ in range(3):
        momentum.update(sums_of([torch.zeros(1, CHANNELS)]))
    assert momentum.value[:, 0].tolist() == [1.0, 8.0, 8.0]


def test_a_step_without_honest_signals_changes_nothing() -> None:
    momentum = Momentum(beta=0.5)
    momentum.update(sums_of(means_of([3], seed=0)))
    before = momentum.value.clone()
    momentum.update(sums_of(means_of([3, 3], seed=1), weights=[0.0, 0.0]))
    assert torch.equal(momentum.value, before)


def test_the_first_honest_mean_is_the_start_even_if_earlier_steps_had_none() -> None:
    momentum = Momentum(beta=0.9)
    mean = means_of([3], seed=2)[0]
    momentum.update(sums_of([mean], weights=[0.0]))
    momentum.update(sums_of([mean]))
    assert torch.equal(momentum.value, mean)


@pytest.mark.parametrize("positions", [1, 4, 7])
def test_resizing_drops_positions_or_adds_some_of_no_weight(positions: int) -> None:
    step = sums_of(means_of([4], seed=5))
    resized, kept = step.resized(positions), min(4, positions)
    assert len(resized.total) == len(resized.count) == positions
    assert torch.equal(resized.total[:kept], step.total[:kept]) and torch.equal(resized.count[:kept], step.count[:kept])
    assert not resized.total[4:].any() and not resized.count[4:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_weight_does_not_poison(value: float) -> None:
    honest = means_of([4], seed=6)[0]
    bad = honest.clone()
    bad[1, 2] = value
    step = sums_of([bad, honest, bad], weights=[0.0, 1.0, 0.0])
    assert torch.equal(step.total, honest)
    assert step.count.tolist() == [1] * 4
    momentum = Momentum(beta=0.9)
    momentum.update(sums_of([bad], weights=[0.0]))
    momentum.update(step)
    assert torch.equal(momentum.value, honest)


def test_boolean_weights_count_like_numbers() -> None:
    step, mean = PositionSums.like(torch.empty(2, CHANNELS)), torch.ones(2, CHANNELS)
    for weight in (True, False, True):
        step.add(mean, torch.tensor(weight))
    assert step.count.tolist() == [2, 2] and step.total.unique().tolist() == [2]


def senders_of(rounds: list[tuple[int, list[float]]], seed: int) -> tuple[PositionSums, list[PositionSums]]:
    """Several senders' contributions, as one with a leading axis and one by one; a round is a length and the senders' weights."""
    rng = np.random.default_rng(seed)
    senders = len(rounds[0][1])
    together = PositionSums.like(torch.empty(senders, rounds[0][0], CHANNELS))
    apart = [PositionSums.like(torch.empty(rounds[0][0], CHANNELS)) for _ in range(senders)]
    for length, weights in rounds:
        means = torch.from_numpy(rng.normal(size=(senders, length, CHANNELS)).astype("float32"))
        together.add(means, torch.tensor(weights))
        for one, mean, weight in zip(apart, means, weights):
            one.add(mean, torch.tensor(weight))
    return together, apart


ROUNDS = [(3, [1.0, 0.0, 1.0, 0.0]), (5, [1.0, 1.0, 0.0, 0.0]), (2, [0.0, 1.0, 1.0, 0.0])]


@pytest.mark.parametrize("positions", [None, 1, 5, 8])
def test_a_leading_axis_tells_senders_apart(positions: int | None) -> None:
    together, apart = senders_of(ROUNDS, seed=8)
    if positions is not None:
        together, apart = together.resized(positions), [one.resized(positions) for one in apart]
    assert (together.total.shape, together.count.shape) == ((4, positions or 5, CHANNELS), (4, positions or 5))
    for sender, one in enumerate(apart):
        length = len(one.count)
        assert torch.equal(together.total[sender, :length], one.total) and torch.equal(together.count[sender, :length], one.count)
        assert not together.total[sender, length:].any() and not together.count[sender, length:].any()


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=4)), ids=str)
def test_the_sum_over_senders_is_a_loop_over_them(chosen: tuple[bool, ...]) -> None:
    together, apart = senders_of(ROUNDS, seed=11)
    total, count = np.zeros((5, CHANNELS)), np.zeros(5)
    for sender, is_chosen in enumerate(chosen):
        if is_chosen:
            total += apart[sender].resized(5).total.double().numpy()
            count += apart[sender].resized(5).count.double().numpy()
    sum_ = together.of(torch.tensor(chosen))
    assert (sum_.total.dtype, sum_.count.dtype) == (torch.float32, torch.float32)
    np.testing.assert_allclose(sum_.total.numpy(), total, rtol=1e-6, atol=1e-6)
    assert sum_.count.tolist() == count.tolist()


def test_the_sum_over_senders_ignores_an_overflow_of_those_left_out() -> None:
    # Every mean is finite, but the sum of two is not: what is left out must not matter, whatever it holds.
    step = PositionSums.like(torch.empty(2, 1, CHANNELS))
    for _ in range(2):
        step.add(torch.tensor([1.0, 3e38])[:, None, None].expand(2, 1, CHANNELS), torch.tensor([True, True]))
    assert step.of(torch.tensor([True, False])).total.tolist() == [[2.0] * CHANNELS]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rounds=st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=4, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_means_are_added_where_they_belong(rounds: list[tuple[int, list[tuple[int, bool]]]]) -> None:
    # Two leading axes, as with signals that were flagged and those that were not; lengths vary.
    step, longest = PositionSums.like(torch.empty(2, 4, 1, CHANNELS)), max(1, *(length for length, _ in rounds))
    total, count = np.zeros((2, 4, longest, CHANNELS)), np.zeros((2, 4, longest))
    for seed, (length, signals) in enumerate(rounds):
        means = torch.stack(means_of([length] * 4, seed))
        means[0, 0, 0] = math.nan
        weights, places = torch.zeros(2, 4), torch.tensor([place for place, _ in signals])
        for index, (place, flagged) in enumerate(signals):
            # What is not finite has no weight.
            if index > 0:
                weights[int(flagged), index] = 1.0
                total[int(flagged), place, :length] += means[index].double().numpy()
                count[int(flagged), place, :length] += 1
        step.add(means, weights, places)
    np.testing.assert_allclose(step.resized(longest).total.numpy(), total, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(step.resized(longest).count.numpy(), count)


def test_places_in_order_are_the_same_as_none() -> None:
    means, weights = torch.stack(means_of([3] * 4, seed=5)), torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    plain, placed = (PositionSums.like(torch.empty(2, 4, 3, CHANNELS)) for _ in range(2))
    plain.add(means, weights)
    placed.add(means, weights, torch.arange(4))
    assert torch.equal(plain.total, placed.total) and torch.equal(plain.count, placed.count)


def test_updating_keeps_the_callers_tensors() -> None:
    mean = means_of([3], seed=7)[0]
    untouched = mean.clone()
    momentum = Momentum(beta=0.5)
    for _ in range(3):
        momentum.update(sums_of([mean, mean]))
    assert torch.equal(mean, untouched)


def test_state_goes_on_where_it_was_left() -> None:
    momentum, restored = Momentum(beta=0.9), Momentum(beta=0.9)
    assert momentum.state_dict() == {}
    restored.load_state_dict({})
    assert restored.value is None
    for step in range(3):
        momentum.update(sums_of(means_of([4, 2], seed=step)))
    restored.load_state_dict(momentum.state_dict())
    for step in range(3, 6):
        for one in (momentum, restored):
            one.update(sums_of(means_of([5], seed=step)))
    assert torch.equal(momentum.value, restored.value) and torch.equal(momentum.seen, restored.seen)


def test_memory_does_not_grow_with_steps() -> None:
    momentum = Momentum(beta=0.9)
    for step in range(300):
        momentum.update(sums_of(means_of([1 + step % 5], seed=step)))
    held = [value for value in vars(momentum).values() if isinstance(value, Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 5 * CHANNELS * 4 + 5
