from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_sentinel.attacks import (
    Bias,
    Delay,
    InvisibleNoise,
    Ones,
    RandomSign,
    RandomValue,
    Scale,
    Zeros,
)
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Worker
from tests.attacks.tools import SHAPES, context, signal_of


def test_zeros_and_ones():
    signal = signal_of((2, 5))
    assert Zeros()(signal, context()).tolist() == [[0.0] * 5] * 2
    assert Ones()(signal, context()).tolist() == [[1.0] * 5] * 2


@pytest.mark.parametrize("factor", [-1.0, 0.1, 10, 0])
def test_scale(factor):
    signal = signal_of((2, 5))
    np.testing.assert_allclose(Scale(factor)(signal, context()).numpy(), factor * signal.numpy(), rtol=1e-6)


def test_random_value_ignores_the_signal():
    attack = RandomValue(std=4.0)
    sent = attack(torch.full((400, 100), 50.0), context()).numpy()
    assert abs(sent.mean()) < 5 * 4 / math.sqrt(sent.size)
    assert sent.std() == pytest.approx(4.0, rel=0.02)
    assert np.array_equal(sent, attack(torch.zeros(400, 100), context()).numpy())


@pytest.mark.parametrize("probability", [0.001, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_sign_flips_the_given_share(probability, dtype):
    signal = torch.full((1000, 100), 2.0, dtype=dtype)
    sent = RandomSign(probability)(signal, context())
    assert torch.equal(sent.abs(), signal)
    flipped = (sent < 0).float().mean().item()
    assert flipped == pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / signal.numel()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strength", [0.03, -2.0])
def test_bias_moves_every_element_by_the_same_share_of_the_spread(shape, strength):
    signal = signal_of(shape, torch.float64)
    shift = (Bias(strength)(signal, context()) - signal).numpy()
    np.testing.assert_allclose(np.abs(shift), abs(strength) * signal.numpy().std(), rtol=1e-9)
    per_channel = np.moveaxis(shift, 1 if len(shape) == 4 else -1, -1).reshape(-1, 6)
    np.testing.assert_allclose(per_channel, np.broadcast_to(per_channel[0], per_channel.shape), rtol=1e-9)


def test_bias_keeps_its_direction_over_steps_and_workers():
    def direction(seed, step, replica):
        signal = signal_of((4, 64), torch.float64, seed=step)
        shift = Bias(0.5, seed=seed)(signal, context(step=step, worker=Worker(1, replica))) - signal
        return shift[0].sign().tolist()

    assert direction(0, 0, 0) == direction(0, 5, 3)
    assert direction(0, 0, 0) != direction(1, 0, 0)
    assert set(direction(0, 0, 0)) == {-1.0, 1.0}


@pytest.mark.parametrize("shape", [(20_000, 3), (200, 100, 3), (20, 3, 40, 30)], ids=str)
def test_noise_has_the_statistics_of_each_channel(shape):
    axis = 1 if len(shape) == 4 else -1
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator).movedim(axis, -1)
    signal = (base * torch.tensor([0.5, 2.0, 8.0]) + torch.tensor([10.0, 0.0, -40.0])).movedim(-1, axis)
    sent = InvisibleNoise(fraction=1.0)(signal, context())

    honest = signal.movedim(axis, -1).reshape(-1, 3).double().numpy()
    noise = sent.movedim(axis, -1).reshape(-1, 3).double().numpy()
    np.testing.assert_allclose(noise.std(0), honest.std(0), rtol=0.05)
    np.testing.assert_array_less(np.abs(noise.mean(0) - honest.mean(0)), 0.05 * honest.std(0))
    correlation = [np.corrcoef(honest[:, channel], noise[:, channel])[0, 1] for channel in range(3)]
    assert max(map(abs, correlation)) < 0.05


def test_noise_mixes_by_its_fraction():
    signal = signal_of((64, 32), torch.float64)
    noise = InvisibleNoise(fraction=1.0)(signal, context())
    mixed = InvisibleNoise(fraction=0.9)(signal, context())
    np.testing.assert_allclose(mixed.numpy(), 0.1 * signal.numpy() + 0.9 * noise.numpy(), rtol=1e-9, atol=1e-12)


def test_noise_leaves_constant_channels():
    signal = signal_of((1, 6))
    torch.testing.assert_close(InvisibleNoise(0.5)(signal, context()), signal)


class TestDelay:
    def send(self, attack, step, shape=(2, 3), **where):
        return attack(torch.full(shape, float(step)), context(step=step, **where))[0, 0].item()

    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_sends_the_signal_of_that_many_steps_ago(self, steps):
        attack = Delay(steps)
        sent = [self.send(attack, step) for step in range(12)]
        assert sent == [float(step if step < steps else step - steps) for step in range(12)]

    def test_histories_are_apart(self):
        attack = Delay(1)
        places = [
            {},
            {"micro_batch": 1},
            {"worker": Worker(1, 1)},
            {"worker": Worker(2, 0)},
            {"direction": Direction.GRADIENT},
        ]
        for index, where in enumerate(places):
            attack(torch.full((1, 1), 100.0 + index), context(step=0, **where))
        for index, where in enumerate(places):
            assert self.send(attack, 1, shape=(1, 1), **where) == 100.0 + index

    @pytest.mark.parametrize("stride", [1, 3])
    def test_memory_is_bounded(self, stride):
        attack = Delay(4)
        for step in range(0, 60, stride):
            for micro_batch in range(2):
                self.send(attack, step, micro_batch=micro_batch)
                assert all(len(history) <= 5 for history in attack._histories.values())
        assert len(attack._histories) == 2

    def test_a_gap_is_filled_with_the_next_older_signal(self):
        attack = Delay(4)
        assert [self.send(attack, step) for step in (0, 3, 6, 9)] == [0.0, 3.0, 0.0, 3.0]

    def test_honest_where_the_shape_changed(self):
        attack = Delay(1)
        self.send(attack, 0, shape=(2, 3))
        assert self.send(attack, 1, shape=(4, 3)) == 1.0
        assert self.send(attack, 2, shape=(4, 3)) == 1.0

    def test_history_is_a_copy(self):
        attack, buffer = Delay(1), torch.zeros(2, 3)
        attack(buffer, context(step=0))
        buffer.fill_(7.0)
        sent = attack(buffer, context(step=1))
        assert sent.eq(0).all()

    def test_observed_signals_count(self):
        attack = Delay(2)
        for step in range(3):
            attack.observe(torch.full((2, 3), float(step)), context(step=step))
        assert self.send(attack, 3) == 1.0

    def test_forgets_what_a_restart_undid(self):
        attack = Delay(2)
        for step in range(6):
            self.send(attack, step)
        replayed = [attack(torch.full((1, 1), 100.0 + step), context(step=step)).item() for step in range(4)]
        assert replayed == [100.0, 101.0, 100.0, 101.0]

    @pytest.mark.parametrize("steps", [1, 3])
    def test_a_step_done_again_sends_the_same(self, steps):
        attack, twice = Delay(steps), Delay(steps)
        for step in range(8):
            expected = [self.send(attack, step, micro_batch=micro_batch) for micro_batch in range(2)]
            for _ in range(3):
                assert [self.send(twice, step, micro_batch=micro_batch) for micro_batch in range(2)] == expected

    def test_keeps_no_graph(self):
        attack = Delay(1)
        attack.observe(torch.ones(2, 3, requires_grad=True), context(step=0))
        assert not attack(torch.ones(2, 3), context(step=1)).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomValue(std=0), r"RandomValue\(std=0\) cannot work: std must be a number above 0"),
        (lambda: Scale(factor="1e1"), r"Scale\(factor='1e1'\) \(str\) cannot work: factor must be a number"),
        (lambda: RandomSign(probability=0), r"RandomSign\(probability=0\).*above 0 and at most 1"),
        (lambda: RandomSign(probability=1.5), r"RandomSign\(probability=1.5\)"),
        (lambda: Bias(strength=None), r"Bias\(strength=None\) cannot work: strength must be a number"),
        (lambda: Bias(seed=0.5), r"Bias\(seed=0.5\) cannot work: seed must be an integer"),
        (lambda: InvisibleNoise(fraction=99), r"InvisibleNoise\(fraction=99\).*above 0 and at most 1"),
        (lambda: Delay(steps=0), r"Delay\(steps=0\) cannot work: steps must be an integer of at least 1"),
        (lambda: Delay(steps=1.5), r"Delay\(steps=1.5\)"),
    ],
)
def test_strengths_that_cannot_work(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
