from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification.consistency import Pair, consistency_features, consistency_statistics, paired, ridge_weights
from lightning_sentinel.verification.projection import SecretDirections

SAMPLES, POSITIONS, CHANNELS = 6, 10, 24
COSINE, GAIN, CHANGE, RESIDUAL = range(4)


class Stage:
    """A residual stage that is linear in a token, and a little noise."""

    def __init__(self, seed: int = 0, sent_channels: int = CHANNELS, noise: float = 0.002) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.own = 0.2 * self.draw(CHANNELS, sent_channels) / CHANNELS**0.5
        self.skip = torch.eye(CHANNELS) if sent_channels == CHANNELS else torch.zeros(CHANNELS, sent_channels)
        self.noise = noise
        self.secret = SecretDirections(Boundary(1, Direction.ACTIVATION), Verification())

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def received(self, senders: int = 1) -> Tensor:
        return self.draw(senders, SAMPLES, POSITIONS, CHANNELS)

    def sent(self, received: Tensor) -> Tensor:
        linear = received @ self.own
        return received @ self.skip + linear + self.noise * self.draw(*linear.shape)

    def pair(self, sent: Tensor, received: Tensor) -> Pair:
        projected = (self.secret.project(one.flatten(0, 1)).values.unflatten(0, (len(sent), -1)) for one in (sent, received))
        return paired(*projected, same_channels=sent.shape[-1] == received.shape[-1])

    def weights(self, steps: int = 30) -> Tensor:
        received = self.received(steps)
        return ridge_weights(
            {name: part.mean(dim=0) for name, part in consistency_statistics(self.pair(self.sent(received), received)).items()}
        )

    def features(self, sent: Tensor, received: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return consistency_features(self.pair(sent, received), weights)


def test_pairs_are_tokens_in_units_of_what_was_received() -> None:
    generator = torch.Generator().manual_seed(0)
    sent, received = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))
    pair = paired(sent, received, same_channels=True)
    outputs, inputs = pair.sent, pair.received
    assert (outputs.shape, inputs.shape) == ((2, 15, 4), (2, 15, 4))
    assert torch.equal(pair.targets, outputs - inputs)
    assert torch.equal(pair.predictors[..., :4], inputs) and (pair.predictors[..., 4] == 1).all()
    apart = paired(sent, received, same_channels=False)
    assert apart.change is None and torch.equal(apart.targets, outputs)
    for sender in range(2):
        scale = np.sqrt(np.square(received[sender].numpy()).mean())
        for token, (sample, position) in enumerate(np.ndindex(3, 5)):
            expected = received[sender, sample, position].numpy() / scale
            np.testing.assert_allclose(inputs[sender, token].numpy(), expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(outputs[sender, token].numpy(), sent[sender, sample, position].numpy() / scale, rtol=1e-5)


@pytest.mark.parametrize(("mine", "its"), [(1, 5), (5, 1), (4, 6)])
def test_where_the_number_of_positions_changes_the_means_of_samples_are_paired(mine: int, its: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sent, received = torch.randn(2, 3, mine, 4, generator=generator), torch.randn(2, 3, its, 7, generator=generator)
    outputs, inputs, _, _ = paired(sent, received, same_channels=False)
    assert (outputs.shape, inputs.shape) == ((2, 3, 4), (2, 3, 7))
    means = received.double().numpy().mean(axis=2)
    scale = np.sqrt(np.square(means).mean(axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(outputs.numpy(), sent.double().numpy().mean(axis=2) / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(inputs.numpy(), means / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sent_channels", [CHANNELS, 12])
def test_weights_are_those_of_numpys_least_squares_with_the_same_ridge(sent_channels: int) -> None:
    stage = Stage(sent_channels=sent_channels)
    received = stage.received(senders=4)
    pair = stage.pair(stage.sent(received), received)
    outputs, inputs = pair.sent, pair.received
    weights = ridge_weights({name: part.mean(dim=0) for name, part in consistency_statistics(pair).items()})
    x = np.concatenate((inputs.flatten(0, 1).double().numpy(), np.ones((inputs[..., 0].numel(), 1))), axis=1)
    y = outputs.flatten(0, 1).double().numpy()
    y = (y - x[:, :CHANNELS] if sent_channels == CHANNELS else y)[:, :16]
    # A ridge is least squares with a row more for each weight, which asks for it to be zero.
    ridge = np.sqrt(1e-3 * np.square(x).sum() / x.shape[1])
    augmented = np.concatenate((x, ridge * np.eye(x.shape[1])))
    expected = np.linalg.lstsq(augmented, np.concatenate((y, np.zeros((x.shape[1], y.shape[1])))), rcond=None)[0]
    assert weights.shape == expected.shape == (CHANNELS + 1, min(16, sent_channels))
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-2, atol=1e-4)


def test_features_are_their_formulas() -> None:
    stage = Stage()
    weights, received = stage.weights(), stage.received(senders=2)
    sent = stage.sent(received)
    (outputs, inputs, _, _), (features, worst) = stage.pair(sent, received), stage.features(sent, received, weights)
    for sender in range(2):
        p, q = outputs[sender].double().numpy(), inputs[sender].double().numpy()
        own = q[:, :CHANNELS]
        cosines = (p * own).sum(axis=1) / np.linalg.norm(p, axis=1) / np.linalg.norm(own, axis=1)
        targets = (p - own)[:, :16]
        errors = np.linalg.norm(targets - np.concatenate((q, np.ones((len(q), 1))), axis=1) @ weights.double().numpy(), axis=1)
        error = np.sqrt(np.square(errors).mean())
        expected = [
            math.log(1 - cosines.mean() + 1e-6),
            math.log(np.linalg.norm(p) / np.linalg.norm(own)),
            math.log(np.linalg.norm(p - own) / np.linalg.norm(own)),
            math.log(error / np.sqrt(np.square(targets).sum(axis=1).mean())),
        ]
        np.testing.assert_allclose(features[sender].numpy(), expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            worst[sender].numpy(), [math.log(1 - cosines.min() + 1e-6), math.log(errors.max() / error)], rtol=1e-3, atol=1e-3
        )


ATTACKS: dict[str, tuple[Callable[[Tensor, Stage], Tensor], tuple[int, ...]]] = {
    "permuted tokens": (lambda sent, stage: sent.flip(2), (COSINE, CHANGE, RESIDUAL)),
    "swapped samples": (lambda sent, stage: sent.roll(1, dims=1), (COSINE, CHANGE, RESIDUAL)),
    "flipped sign": (lambda sent, stage: -sent, (COSINE, CHANGE, RESIDUAL)),
    "replayed": (lambda sent, stage: stage.sent(stage.received()), (COSINE, CHANGE, RESIDUAL)),
    "zeros": (lambda sent, stage: torch.zeros_like(sent), (COSINE, CHANGE)),
    "scaled": (lambda sent, stage: 1.5 * sent, (CHANGE,)),
    "noise": (lambda sent, stage: sent + 0.3 * stage.draw(*sent.shape), (COSINE, CHANGE, RESIDUAL)),
    "shrunk": (lambda sent, stage: 0.1 * sent, (CHANGE,)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_does_not_follow_from_its_input_moves_the_features_it_should(name: str) -> None:
    stage = Stage()
    weights, received = stage.weights(), stage.received(senders=40)
    honest = torch.cat(stage.features(stage.sent(received), received, weights), dim=1)
    spread = honest.std(dim=0)
    tamper, moved = ATTACKS[name]
    for _ in range(5):
        received = stage.received()
        features = torch.cat(stage.features(tamper(stage.sent(received), stage), received, weights), dim=1)
        scores = ((features - honest.mean(dim=0)) / spread)[0]
        assert (scores[list(moved)] > 10).all(), scores


def test_identity_has_no_change_and_an_opposite_residual() -> None:
    stage = Stage()
    weights, received = stage.weights(), stage.received(senders=20)
    honest, _ = stage.features(stage.sent(received), received, weights)
    identity, _ = stage.features(received, received, weights)
    assert (identity[:, CHANGE] < honest[:, CHANGE].min() - 1).all() and (identity[:, COSINE] < honest[:, COSINE].min() - 1).all()
    flipped, _ = stage.features(2 * received - stage.sent(received), received, weights)
    assert (flipped[:, RESIDUAL] > honest[:, RESIDUAL].max() + 1).all()


def test_fresh_honest_signals_have_the_features_of_earlier_ones() -> None:
    stage = Stage()
    weights = stage.weights()
    one, other = (torch.cat(stage.features(stage.sent(r), r, weights), dim=1) for r in (stage.received(40), stage.received(40)))
    assert ((one.mean(dim=0) - other.mean(dim=0)).abs() < one.std(dim=0)).all()


def test_one_wrong_token_shows_among_the_worst() -> None:
    stage = Stage()
    weights, received = stage.weights(), stage.received(senders=30)
    sent = stage.sent(received)
    _, honest = stage.features(sent, received, weights)
    wrong = sent.clone()
    wrong[:, 2, 3] = wrong[:, 4, 5]
    _, worst = stage.features(wrong, received, weights)
    assert (worst.amin(dim=0) > honest.amax(dim=0)).all()


def test_with_other_channels_the_output_itself_is_predicted() -> None:
    stage = Stage(sent_channels=12, noise=0.01)
    weights, received = stage.weights(), stage.received(senders=30)
    sent = stage.sent(received)
    honest, worst = stage.features(sent, received, weights)
    assert not honest[:, [COSINE, CHANGE]].any() and not worst[:, 0].any()
    rms = [signal.double().square().mean(dim=(1, 2, 3)).sqrt().numpy() for signal in (sent, received)]
    np.testing.assert_allclose(honest[:, GAIN].numpy(), np.log(rms[0] / rms[1]), rtol=1e-4, atol=1e-4)
    for tampered in (sent.flip(2), sent.roll(1, dims=1), -sent, sent.roll(1, dims=0)):
        assert (stage.features(tampered, received, weights)[0][:, RESIDUAL] > honest[:, RESIDUAL].max() + 1).all()


def test_signals_of_more_than_32_channels_are_not_compared_with_those_of_another_number() -> None:
    # Directions of 64 and of 128 channels have nothing to do with each other, and so neither has the cosine along them.
    secret, generator = SecretDirections(Boundary(1, Direction.ACTIVATION), Verification()), torch.Generator().manual_seed(0)
    received = torch.randn(SAMPLES, POSITIONS, 64, generator=generator)
    sent = secret.project(torch.cat((received, received), dim=2))
    its = secret.project(received)
    assert sent.values.shape == its.values.shape
    pair = paired(sent.values[None], its.values[None], sent.channels == its.channels)
    weights = ridge_weights({name: part[0] for name, part in consistency_statistics(pair).items()})
    assert not consistency_features(pair, weights)[0][:, [COSINE, CHANGE]].any()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-18, 1e10])
def test_features_are_finite_for_any_size_of_signal(size: float) -> None:
    stage = Stage()
    weights, received = stage.weights(), size * stage.received(senders=2)
    for sent in (received, -3 * received, torch.zeros_like(received)):
        assert all(part.isfinite().all() for part in stage.features(sent, received, weights))
    statistics = consistency_statistics(stage.pair(received, received))
    assert ridge_weights({name: part[0] for name, part in statistics.items()}).isfinite().all()


def test_the_size_of_everything_does_not_matter() -> None:
    stage = Stage()
    weights, received = stage.weights(), stage.received(senders=2)
    sent = stage.sent(received)
    for one, other in zip(stage.features(sent, received, weights), stage.features(1e-4 * sent, 1e-4 * received, weights)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_a_stage_makes_of_zeros_has_finite_features() -> None:
    # A gradient that was flagged is replaced by zeros, and a stage with a bias answers zeros with something.
    stage = Stage()
    weights, received = stage.weights(), torch.zeros(1, SAMPLES, POSITIONS, CHANNELS)
    assert all(part.isfinite().all() for part in stage.features(stage.draw(*received.shape), received, weights))


def test_tokens_without_a_gradient_are_not_the_worst_ones() -> None:
    """Padding, and the last token of a language model: zeros come in and zeros go out."""
    stage = Stage()
    weights, received = stage.weights(), stage.received()
    sent = stage.sent(received)
    whole, worst_of_whole = stage.features(sent[:, :, :-1], received[:, :, :-1], weights)
    received[:, :, -1] = sent[:, :, -1] = 0
    features, worst = stage.features(sent, received, weights)
    torch.testing.assert_close(worst[:, 0], worst_of_whole[:, 0], rtol=1e-3, atol=1e-3)
    # Their share of the mean is that of tokens that follow.
    torch.testing.assert_close(features[:, COSINE].exp(), 0.9 * whole[:, COSINE].exp(), rtol=1e-2, atol=1e-5)
    sent[:, :, -1] = 1.0
    assert stage.features(sent, received, weights)[1][0, 0] > -0.01
