from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.verification.fences import Fences, fit_fences

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, count: rng.normal(-3.0, 2.0, size=(count, 4)),
    "lognormal": lambda rng, count: rng.lognormal(size=(count, 4)),
    "uniform": lambda rng, count: rng.uniform(size=(count, 4)),
}


def draw(name: str, rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(DISTRIBUTIONS[name](rng, count).astype("float32"))


def by_hand(values: np.ndarray, rate: float, two_sided: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tukey's fences feature by feature, with k as documented."""
    features = values.shape[1]
    lower, centre, upper = np.full(features, -np.inf), np.empty(features), np.empty(features)
    for f in range(features):
        x = values[:, f].astype("float64")
        q1, centre[f], q3 = np.percentile(x, [25, 50, 75])
        share = 1 - rate / features / (2 if two_sided else 1)
        k_above = max(1.1 * np.quantile((x - q3) / (q3 - q1), share), 1.5)
        upper[f] = q3 + k_above * (q3 - q1)
        if two_sided:
            k_below = max(1.1 * np.quantile((q1 - x) / (q3 - q1), share), 1.5)
            lower[f] = q1 - k_below * (q3 - q1)
    return lower, centre, upper


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.2])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_k_is_the_documented_quantile(name: str, rate: float, two_sided: bool) -> None:
    values = draw(name, np.random.default_rng(0), 512)
    fences = fit_fences(values, rate, two_sided)
    for bound, expected in zip((fences.lower, fences.centre, fences.upper), by_hand(values.numpy(), rate, two_sided)):
        np.testing.assert_allclose(bound.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_few_fresh_honest_values_are_outside(name: str, two_sided: bool) -> None:
    # Fences of 512 values know the 0.1 % tails only roughly: the rate holds on average, single windows vary.
    rng, rates = np.random.default_rng(1), []
    for _ in range(25):
        fences = fit_fences(draw(name, rng, 512), 0.01, two_sided)
        rates.append((fences.scores(draw(name, rng, 4000)) > 1).any(dim=1).float().mean().item())
    assert np.mean(rates) <= 0.015
    assert max(rates) <= 0.03


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_at_most_the_asked_share_of_the_windows_own_values_is_outside(name: str) -> None:
    values = draw(name, np.random.default_rng(2), 512)
    for rate in (0.01, 0.1):
        outside = (fit_fences(values, rate, two_sided=True).scores(values) > 1).any(dim=1).float().mean()
        assert outside <= rate


def test_two_sides_see_what_is_too_close_and_one_side_does_not() -> None:
    values = draw("normal", np.random.default_rng(3), 512)
    centre, spread = values.median(dim=0).values, values.std(dim=0)
    near, far = centre - 20 * spread, centre + 20 * spread
    both, upper = (fit_fences(values, 0.01, two_sided) for two_sided in (True, False))
    assert (both.scores(near) > 1).all() and (both.scores(far) > 1).all()
    assert (upper.scores(near) <= 1).all() and (upper.scores(far) > 1).all()
    assert (upper.lower == -torch.inf).all()


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_score_is_one_at_the_fence(two_sided: bool) -> None:
    fences = fit_fences(draw("lognormal", np.random.default_rng(4), 512), 0.01, two_sided)

    def scores_at(share: float, bound: Tensor) -> np.ndarray:
        return fences.scores(fences.centre + share * (bound - fences.centre)).numpy()

    for bound in (fences.lower, fences.upper) if two_sided else (fences.upper,):
        for share in (0.25, 1.0, 1.01, 7.0):
            np.testing.assert_allclose(scores_at(share, bound), share, rtol=1e-4)
    np.testing.assert_array_equal(fences.scores(fences.centre).numpy(), 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("opened", [True, False])
def test_what_is_not_finite_scores_infinity(value: float, opened: bool) -> None:
    fences = Fences.open(4) if opened else fit_fences(draw("normal", np.random.default_rng(5), 64), 0.01, True)
    features = torch.tensor([0.0, value, 0.0, value])
    assert fences.scores(features).isinf().tolist() == [False, True, False, True]


def test_nothing_exceeds_open_fences() -> None:
    features = torch.tensor([[1e30, -1e30, 0.0, 5.0], [0.0, 1.0, 2.0, 3.0]])
    scores = Fences.open(4).scores(features)
    assert scores.shape == (2, 4)
    assert not scores.any()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    columns=st.lists(st.lists(st.sampled_from([-3.0, 0.0, 0.0, 1e-8, 0.5, 1e6]), min_size=9, max_size=9), min_size=1, max_size=4),
    two_sided=st.booleans(),
)
def test_ties_and_constants_give_numbers(columns: list[list[float]], two_sided: bool) -> None:
    values = torch.tensor(columns).T
    fences = fit_fences(values, 0.01, two_sided)
    assert not torch.cat((fences.lower, fences.centre, fences.upper)).isnan().any()
    assert (fences.lower <= fences.centre).all() and (fences.centre <= fences.upper).all()
    scores = fences.scores(torch.cat((values, values + 1, values - 1)))
    assert scores.isfinite().all()
    assert (scores >= 0).all()


def test_a_constant_feature_admits_its_value_and_nothing_else() -> None:
    fences = fit_fences(torch.full((32, 1), 0.5), 0.01, two_sided=True)
    scores = fences.scores(torch.tensor([[0.5], [0.6], [0.4]])).flatten()
    assert scores[0] == 0
    assert (scores[1:] > 1).all()


def test_scores_broadcast_over_any_leading_axes() -> None:
    values = draw("normal", np.random.default_rng(6), 64)
    fences = fit_fences(values, 0.01, two_sided=True)
    table = values[:24].view(2, 3, 4, 4)
    assert torch.equal(fences.scores(table).view(24, 4), torch.stack([fences.scores(row) for row in values[:24]]))


def test_moving_fences_keeps_them() -> None:
    fences = fit_fences(draw("normal", np.random.default_rng(7), 64), 0.01, two_sided=False)
    moved = fences.to("cpu")
    for name in ("lower", "centre", "upper"):
        assert torch.equal(getattr(moved, name), getattr(fences, name))
