from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from lightning_sentinel.verification.distances import unit_directions
from lightning_sentinel.verification.features import FEATURES, temporal_features

CHANNELS = 6
DIRECTIONS = unit_directions(CHANNELS, 4, seed=2)


def cloud(seed: int, positions: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.3, 2.0, size=(positions, CHANNELS)).astype("float32"))


def by_hand(mean: Tensor, momentum: Tensor) -> np.ndarray:
    """L1, L2, SFR and SW in float64, the unbounded ones as logarithms."""
    a, b, u = mean.double().numpy(), momentum.double().numpy(), DIRECTIONS.double().numpy()
    sliced = np.mean([wasserstein_distance(a @ u[:, k], b @ u[:, k]) for k in range(u.shape[1])])
    return np.array(
        [
            np.log(np.abs(a - b).mean()),
            np.log(np.linalg.norm(a - b) / np.linalg.norm(b)),
            (np.sign(a) != np.sign(b)).mean(),
            np.log(sliced),
        ]
    )


def test_features_are_the_logarithms_of_the_distances() -> None:
    mean, momentum = cloud(0, 9), cloud(1, 9)
    features = temporal_features(mean, momentum, DIRECTIONS)
    assert (features.shape, features.dtype) == ((len(FEATURES),), torch.float32)
    np.testing.assert_allclose(features.numpy(), by_hand(mean, momentum), rtol=1e-4)


@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(("mine", "known"), [(9, 9), (3, 9), (9, 3), (1, 1)])
def test_leading_axes_are_a_loop_over_them(mine: int, known: int, leading: tuple[int, ...]) -> None:
    means, momentum, shared = torch.empty(*leading, mine, CHANNELS), cloud(1, known), min(mine, known)
    for seed, index in enumerate(np.ndindex(leading)):
        means[index] = cloud(10 + seed, mine)
    features = temporal_features(means, momentum, DIRECTIONS)
    assert (features.shape, features.dtype) == ((*leading, len(FEATURES)), torch.float32)
    for index in np.ndindex(leading):
        torch.testing.assert_close(features[index], temporal_features(means[index], momentum, DIRECTIONS), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(features[index].numpy(), by_hand(means[index][:shared], momentum[:shared]), rtol=1e-4, atol=1e-6)


def test_features_are_named_in_their_order() -> None:
    assert FEATURES == ("log_l1", "log_l2", "sign_flip_ratio", "log_sliced_wasserstein")


@pytest.mark.parametrize(("mine", "known"), [(3, 9), (9, 3), (1, 9), (9, 1)])
def test_of_different_lengths_the_shared_positions_count(mine: int, known: int) -> None:
    mean, momentum = cloud(2, mine), cloud(3, known)
    shared = min(mine, known)
    features = temporal_features(mean, momentum, DIRECTIONS)
    np.testing.assert_allclose(features.numpy(), by_hand(mean[:shared], momentum[:shared]), rtol=1e-4)


@pytest.mark.parametrize("factor", [0.001, 0.1, 10.0, 1000.0])
def test_a_factor_of_the_deviation_is_an_addend_of_the_logarithms(factor: float) -> None:
    momentum, deviation = cloud(4, 5), cloud(5, 5)
    near = temporal_features(momentum + deviation, momentum, DIRECTIONS).numpy()
    far = temporal_features(momentum + factor * deviation, momentum, DIRECTIONS).numpy()
    logs = [FEATURES.index(name) for name in ("log_l1", "log_l2")]
    np.testing.assert_allclose(far[logs] - near[logs], np.log(factor), rtol=1e-3)


def test_the_momentum_itself_has_finite_features() -> None:
    momentum = cloud(6, 5)
    features = temporal_features(momentum, momentum, DIRECTIONS)
    assert features.isfinite().all()
    assert features[FEATURES.index("sign_flip_ratio")] == 0
    assert (features[[0, 1, 3]] < np.log(1e-6)).all()
