from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from lightning_sentinel.verification import distances
from lightning_sentinel.verification.distances import euclidean_size, mean_absolute_difference, ordered_along, signs
from lightning_sentinel.verification.projection import unit_directions


def normalised_euclidean(mean: Tensor, momentum: Tensor) -> Tensor:
    return distances.normalised_euclidean(mean, momentum, euclidean_size(momentum))


def sign_flip_ratio(mean: Tensor, momentum: Tensor) -> Tensor:
    return distances.sign_flip_ratio(mean, signs(momentum))


def sliced_wasserstein(mean: Tensor, momentum: Tensor, directions: Tensor) -> Tensor:
    return distances.sliced_wasserstein(mean, directions, ordered_along(momentum, directions))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": mean_absolute_difference,
    "l2": normalised_euclidean,
    "sfr": sign_flip_ratio,
    "sw": lambda mean, momentum: sliced_wasserstein(mean, momentum, unit_directions(mean.shape[-1], 5, seed=3)),
}

repeatable = settings(derandomize=True, deadline=None, max_examples=40)


def cloud(seed: int, positions: int = 7, channels: int = 5, *, offset: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(offset, 2.0, size=(positions, channels)).astype("float32"))


clouds = st.builds(
    lambda seed, positions, channels: (cloud(seed, positions, channels), cloud(seed + 1, positions, channels, offset=0.5)),
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 6),
)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 5), (33, 16)], ids=str)
def test_numpy_agrees(shape: tuple[int, int]) -> None:
    mean, momentum = cloud(0, *shape), cloud(1, *shape)
    a, b = mean.double().numpy(), momentum.double().numpy()
    assert mean_absolute_difference(mean, momentum).item() == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    assert normalised_euclidean(mean, momentum).item() == pytest.approx(
        np.sqrt(np.square(a - b).sum()) / np.sqrt(np.square(b).sum()), rel=1e-5
    )
    assert sign_flip_ratio(mean, momentum).item() == pytest.approx((np.sign(a) != np.sign(b)).mean(), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (7, 5), (33, 16)], ids=str)
def test_scipy_agrees_on_every_direction(shape: tuple[int, int]) -> None:
    mean, momentum = cloud(2, *shape), cloud(3, *shape, offset=1.0)
    directions = unit_directions(shape[1], 6, seed=7)
    a, b = (x.double().numpy() @ directions.double().numpy() for x in (mean, momentum))
    expected = [wasserstein_distance(a[:, k], b[:, k]) for k in range(6)]
    for k, distance in enumerate(expected):
        assert sliced_wasserstein(mean, momentum, directions[:, k : k + 1]).item() == pytest.approx(distance, rel=1e-4)
    assert sliced_wasserstein(mean, momentum, directions).item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_a_scalar_of_its_device(name: str) -> None:
    distance = DISTANCES[name](cloud(0), cloud(1))
    assert (distance.shape, distance.dtype) == ((), torch.float32)


@pytest.mark.parametrize("leading", [(1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (7, 5), (33, 16)], ids=str)
@pytest.mark.parametrize("name", DISTANCES)
def test_leading_axes_are_a_loop_over_them(name: str, shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    means, momentum = torch.empty(*leading, *shape), cloud(1, *shape, offset=0.5)
    for seed, index in enumerate(np.ndindex(leading)):
        means[index] = cloud(10 + seed, *shape)
    together = DISTANCES[name](means, momentum)
    assert (together.shape, together.dtype) == (leading, torch.float32)
    for index in np.ndindex(leading):
        expected = DISTANCES[name](means[index], momentum)
        assert expected.shape == ()
        torch.testing.assert_close(together[index], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["l1", "l2", "sw"])
def test_nan_stays_with_its_signal(name: str) -> None:
    means = torch.stack([cloud(seed) for seed in range(3)])
    means[1, 2, 3] = torch.nan
    assert DISTANCES[name](means, cloud(9)).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", DISTANCES)
@repeatable
@given(pair=clouds)
def test_a_signal_has_no_distance_to_itself_and_none_is_negative(name: str, pair: tuple[Tensor, Tensor]) -> None:
    distance = DISTANCES[name]
    assert distance(pair[0], pair[0]).item() == 0
    assert distance(*pair).item() >= 0


@pytest.mark.parametrize("name", ["l1", "sfr", "sw"])
@repeatable
@given(pair=clouds)
def test_symmetric(name: str, pair: tuple[Tensor, Tensor]) -> None:
    distance = DISTANCES[name]
    assert distance(*pair).item() == pytest.approx(distance(*reversed(pair)).item(), rel=1e-5)


@repeatable
@given(pair=clouds)
def test_l2_is_relative_to_the_momentum(pair: tuple[Tensor, Tensor]) -> None:
    mean, momentum = pair
    ratio = (momentum.norm() / mean.norm()).item()
    there, back = normalised_euclidean(mean, momentum).item(), normalised_euclidean(momentum, mean).item()
    assert back == pytest.approx(there * ratio, rel=1e-4)


@pytest.mark.parametrize(("name", "degree"), [("l1", 1), ("l2", 0), ("sfr", 0), ("sw", 1)])
@repeatable
@given(pair=clouds, factor=st.sampled_from([0.01, 0.5, 3.0, 1000.0]))
def test_scaling_both(name: str, degree: int, pair: tuple[Tensor, Tensor], factor: float) -> None:
    distance = DISTANCES[name]
    scaled = distance(pair[0] * factor, pair[1] * factor).item()
    assert scaled == pytest.approx(distance(*pair).item() * factor**degree, rel=1e-3, abs=1e-6)


@repeatable
@given(pair=clouds, factor=st.floats(-5, 5).filter(lambda f: abs(f) > 0.01))
def test_a_scaled_momentum_lies_a_known_distance_away(pair: tuple[Tensor, Tensor], factor: float) -> None:
    _, momentum = pair
    away = abs(factor - 1)
    assert normalised_euclidean(momentum * factor, momentum).item() == pytest.approx(away, rel=1e-3, abs=1e-5)
    size = np.abs(momentum.numpy()).mean()
    assert mean_absolute_difference(momentum * factor, momentum).item() == pytest.approx(away * size, rel=1e-3, abs=1e-5)
    assert sign_flip_ratio(momentum * factor, momentum).item() == float(factor < 0)


@repeatable
@given(pair=clouds)
def test_the_opposite_flips_every_sign(pair: tuple[Tensor, Tensor]) -> None:
    assert (pair[0] != 0).all()
    assert sign_flip_ratio(-pair[0], pair[0]).item() == 1


@repeatable
@given(pair=clouds, shift=st.floats(-10, 10))
def test_a_shift_moves_the_cloud_by_its_own_length(pair: tuple[Tensor, Tensor], shift: float) -> None:
    cloud_, axis = pair[0], torch.eye(pair[0].shape[1])[:, :1]
    moved = cloud_ + shift * axis.T
    assert sliced_wasserstein(moved, cloud_, axis).item() == pytest.approx(abs(shift), rel=1e-4, abs=1e-5)


@repeatable
@given(pair=clouds, seed=st.integers(0, 100))
def test_only_sliced_wasserstein_ignores_the_order_of_positions(pair: tuple[Tensor, Tensor], seed: int) -> None:
    mean, momentum = pair
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(mean)))
    assert DISTANCES["sw"](mean[order], momentum).item() == pytest.approx(DISTANCES["sw"](mean, momentum).item(), rel=1e-4)


def test_a_momentum_of_zero_gives_a_large_finite_distance() -> None:
    distance = normalised_euclidean(torch.ones(2, 2), torch.zeros(2, 2)).item()
    assert np.isfinite(distance) and distance > 1e6


@pytest.mark.parametrize("name", ["l1", "l2", "sw"])
def test_nan_is_not_hidden(name: str) -> None:
    mean = cloud(0)
    mean[1, 1] = torch.nan
    assert DISTANCES[name](mean, cloud(1)).isnan()


def test_zeros_have_signs_too() -> None:
    momentum = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert sign_flip_ratio(torch.tensor([[-0.0, -0.0, -0.0, 0.0]]), momentum).item() == 0.75
