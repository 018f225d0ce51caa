from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sentinel.attacks import AddNoise, Adversary, Bias, Drift, Frame, Local
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh
from tests.attacks.tools import SHAPES, WORKER, by_channel, context, signal_of


@pytest.mark.parametrize("strength", [0.03, 0.3, 3])
def test_add_noise_is_of_the_size_asked_for_and_incoherent(strength):
    signal = signal_of((200, 20, 6))
    noise = (AddNoise(strength)(signal, context()) - signal).double().numpy()
    assert noise.std() == pytest.approx(strength * signal.double().numpy().std(), rel=0.02)
    assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)
    assert abs(np.corrcoef(noise.ravel(), signal.numpy().ravel())[0, 1]) < 0.04


class TestDrift:
    def test_is_a_bias_that_grows_to_its_limit(self):
        signal = signal_of((4, 6))
        for age, strength in [(0, 0.2), (1, 0.4), (2, 0.5), (90, 0.5)]:
            sent = Drift(rate=0.2, limit=0.5, seed=3)(signal, context(step=10 + age, start_step=10))
            torch.testing.assert_close(sent, Bias(strength, seed=3)(signal, context()))

    def test_counts_from_the_adversary_s_first_step(self):
        adversary = Adversary({"name": "drift", "rate": 0.5, "limit": 1.0}, Mesh(3, 4), workers=[WORKER], start_step=4)
        signal = signal_of((4, 6), torch.float64)
        shifts = [adversary.tamper(signal, WORKER, Direction.GRADIENT, step, 0) - signal for step in range(3, 8)]
        sizes = [float(shift.abs().mean() / signal.std(correction=0)) for shift in shifts]
        assert sizes == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])

    def test_does_nothing_before(self):
        signal = signal_of((4, 6))
        assert torch.equal(Drift()(signal, context(step=2, start_step=10)), signal)


class TestLocal:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("share", [1e-9, 0.25, 0.5, 1.0])
    def test_replaces_that_many_whole_positions(self, shape, share):
        signal = signal_of(shape)
        changed = by_channel(Local(share)(signal, context())) != by_channel(signal)
        assert (changed.all(1) == changed.any(1)).all()
        assert changed.all(1).sum() == max(1, round(share * len(changed)))

    def test_positions_are_drawn_anew(self):
        signal = signal_of((1, 64, 6))
        places = {int((Local(1e-9)(signal, context(step=step)) != signal).any(-1).flatten().nonzero()) for step in range(30)}
        assert len(places) > 10

    @pytest.mark.parametrize("shape", [(6000, 6), (20, 6, 20, 20)], ids=str)
    def test_the_noise_is_like_the_signal(self, shape):
        channels = (torch.arange(1.0, 7.0)).reshape([-1 if index == 1 else 1 for index in range(len(shape))])
        signal = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * channels + 10 * channels
        sent = by_channel(Local(1.0)(signal, context()))
        np.testing.assert_allclose(sent.mean(0), by_channel(signal).mean(0), rtol=0.02)
        np.testing.assert_allclose(sent.std(0), by_channel(signal).std(0), rtol=0.06)


@pytest.mark.parametrize("strength", [0.1, -0.2])
def test_frame_moves_the_median(strength):
    signals = [signal_of((4, 6), seed=seed).abs() + 20 for seed in range(5)]
    sent = [Frame(strength)(signal, context()) for signal in signals[:3]]
    for signal, tampered in zip(signals, sent):
        torch.testing.assert_close(tampered, (1 + strength) * signal)
    median = torch.stack([*sent, *signals[3:]]).mean((1, 2)).median()
    assert (median / signals[4].mean() - 1).item() == pytest.approx(strength, abs=0.07)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddNoise("x"), r"AddNoise\(strength='x'\) \(str\) cannot work: strength must be a number"),
        (lambda: AddNoise(float("nan")), r"AddNoise\(strength=nan\) cannot work"),
        (lambda: Drift(rate=0), r"Drift\(rate=0\) cannot work: rate must be a number above 0"),
        (lambda: Drift(limit=-1), r"Drift\(limit=-1\)"),
        (lambda: Drift(seed=0.5), r"Drift\(seed=0.5\) cannot work: seed must be an integer"),
        (lambda: Local(share=0), r"Local\(share=0\) cannot work: share must be a number above 0 and at most 1"),
        (lambda: Local(share=2), r"Local\(share=2\)"),
        (lambda: Frame(strength=None), r"Frame\(strength=None\)"),
    ],
)
def test_strengths_that_cannot_work(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
