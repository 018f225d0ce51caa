from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from lightning_sentinel.verification.features import FAMILIES
from lightning_sentinel.verification.projection import unit_directions
from lightning_sentinel.verification.temporal import Anchor, published_distances, temporal_features

CHANNELS = 6
NAMES = FAMILIES["temporal"]
DIRECTIONS = unit_directions(CHANNELS, 4, seed=2)


def cloud(seed: int, positions: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.3, 2.0, size=(positions, CHANNELS)).astype("float32"))


def by_hand(mean: Tensor, momentum: Tensor) -> dict[str, float]:
    """All of the family in float64 by scipy and numpy, the unbounded ones as logarithms."""
    a, b, u = mean.double().numpy(), momentum.double().numpy(), DIRECTIONS.double().numpy()
    channels, reference = a.mean(axis=0), b.mean(axis=0)
    return {
        "l1": np.log(np.abs(a - b).mean()),
        "l2": np.log(np.linalg.norm(a - b) / np.linalg.norm(b)),
        "sign_flip_ratio": (np.sign(a) != np.sign(b)).mean(),
        "sliced_wasserstein": np.log(np.mean([wasserstein_distance(a @ u[:, k], b @ u[:, k]) for k in range(u.shape[1])])),
        "channel_l2": np.log(np.linalg.norm(channels - reference) / np.linalg.norm(reference)),
        "channel_wasserstein": np.log(wasserstein_distance(channels, reference)),
    }


@pytest.mark.parametrize("senders", [1, 3])
@pytest.mark.parametrize(("mine", "known"), [(9, 9), (3, 9), (9, 3), (1, 1), (1, 9), (9, 1)])
def test_scipy_and_numpy_agree_on_the_shared_positions_of_every_sender(mine: int, known: int, senders: int) -> None:
    means, momentum = torch.stack([cloud(10 + sender, mine) for sender in range(senders)]), cloud(1, known)
    anchor = Anchor.of(momentum[:mine], DIRECTIONS)
    features, published = temporal_features(means, anchor), published_distances(means, anchor)
    assert (features.shape, features.dtype) == ((senders, len(NAMES)), torch.float32)
    shared = min(mine, known)
    for sender in range(senders):
        expected = by_hand(means[sender, :shared], momentum[:shared])
        np.testing.assert_allclose(features[sender].numpy(), [expected[name] for name in NAMES], rtol=1e-4, atol=1e-5)
        plain = [expected[name] if name == "sign_flip_ratio" else np.exp(expected[name]) for name in NAMES[:4]]
        np.testing.assert_allclose(published[sender].numpy(), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0.001, 0.1, 10.0, 1000.0])
def test_a_factor_of_the_deviation_is_an_addend_of_the_logarithms(factor: float) -> None:
    momentum, deviation = cloud(4, 5), cloud(5, 5)
    near, far = (temporal_features((momentum + f * deviation)[None], Anchor.of(momentum, DIRECTIONS))[0] for f in (1.0, factor))
    logs = [NAMES.index(name) for name in ("l1", "l2", "channel_l2")]
    np.testing.assert_allclose((far - near)[logs].numpy(), np.log(factor), rtol=2e-3)


def test_the_momentum_itself_has_finite_features() -> None:
    momentum = cloud(6, 5)
    features = temporal_features(momentum[None], Anchor.of(momentum, DIRECTIONS))[0]
    assert features.isfinite().all()
    assert features[NAMES.index("sign_flip_ratio")] == 0
    assert (features[[index for index, name in enumerate(NAMES) if name != "sign_flip_ratio"]] < np.log(1e-6)).all()


def test_channels_swapped_alike_at_all_positions_show_in_channel_l2_only_of_the_channel_features() -> None:
    momentum = cloud(7, 5)
    features = temporal_features(momentum.flip(1)[None], Anchor.of(momentum, DIRECTIONS))[0]
    assert features[NAMES.index("channel_l2")] > np.log(0.1)
    assert features[NAMES.index("channel_wasserstein")] < np.log(1e-5)
