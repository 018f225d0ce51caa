from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sentinel.attacks import FlipResidual, Identity, ReceivedNoise
from tests.attacks.tools import SHAPES, by_channel, context, signal_of


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identity_sends_what_was_received(shape):
    received = signal_of(shape, seed=1)
    assert torch.equal(Identity()(signal_of(shape), context(received=received)), received)
    half = Identity()(signal_of(shape, torch.bfloat16), context(received=received))
    assert torch.equal(half, received.bfloat16())


@pytest.mark.parametrize("attack", [Identity(), ReceivedNoise(), FlipResidual()], ids=repr)
@pytest.mark.parametrize(
    "received",
    [None, torch.ones(2, 5, 8), torch.ones(2, 4, 6), torch.ones(2, 5, 6, dtype=torch.long)],
    ids=["nothing", "channels", "positions", "integers"],
)
def test_honest_where_nothing_fits(attack, received):
    signal = signal_of((2, 5, 6))
    assert torch.equal(attack(signal, context(received=received)), signal)


@pytest.mark.parametrize("shape", [(8000, 6), (80, 100, 6), (20, 6, 20, 20)], ids=str)
def test_received_noise_changes_by_the_right_amount(shape):
    received = signal_of(shape, seed=1)
    scale = torch.arange(1.0, 7.0)
    change = (torch.randn(shape).movedim(1 if len(shape) == 4 else -1, -1) * scale).movedim(-1, 1 if len(shape) == 4 else -1)
    sent = ReceivedNoise()(received + change + 2, context(received=received))
    noise = by_channel(sent) - by_channel(received)
    np.testing.assert_allclose(noise.std(0), scale, rtol=0.05)
    # The size of the change is imitated, its mean is not.
    assert (np.abs(noise.mean(0)) < 0.06 * scale.numpy()).all()
    correlation = [np.corrcoef(noise[:, channel], by_channel(change)[:, channel])[0, 1] for channel in range(6)]
    assert max(map(abs, correlation)) < 0.06


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0, -0.25, 2])
def test_flip_residual(strength):
    received, signal = signal_of((2, 5, 6), torch.float64, seed=1), signal_of((2, 5, 6), torch.float64)
    sent = FlipResidual(strength)(signal, context(received=received)).numpy()
    x, h = received.numpy(), signal.numpy()
    np.testing.assert_allclose(sent, x + (1 - 2 * strength) * (h - x), rtol=1e-12, atol=1e-12)
    if strength == 1:
        np.testing.assert_allclose(sent - x, -(h - x), rtol=1e-12, atol=1e-12)
