from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.verification import fences as module
from lightning_sentinel.verification.fences import Fences

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, count: rng.normal(-3.0, 2.0, size=(count, 4)),
    "lognormal": lambda rng, count: rng.lognormal(size=(count, 4)),
    "uniform": lambda rng, count: rng.uniform(size=(count, 4)),
}


def draw(name: str, rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(DISTRIBUTIONS[name](rng, count).astype("float32"))


ALL = torch.ones(4, dtype=torch.bool)


def fit_fences(values: Tensor, rate: float, two_sided: bool, watched: Tensor | None = None) -> Fences:
    return module.fit_fences(values, rate, two_sided, torch.ones(values.shape[-1]).bool() if watched is None else watched)


def by_hand(
    values: np.ndarray, rate: float, two_sided: bool, watched: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Feature by feature as far as an exponential tail is rarer than a tenth of the rate, then all of them by one factor."""
    x = values.astype("float64")
    low, q1, centre, q3, high = np.quantile(x, [0.1, 0.25, 0.5, 0.75, 0.9], axis=0)
    spread = np.maximum(q3 - q1, 1e-12) + 1e-4 * np.abs(centre)

    def tail(excess: np.ndarray) -> np.ndarray:
        # P(beyond the edge + t) = 0.1 exp(-t / mean), which is 0.1 rate at mean * log(1 / rate).
        mean = np.array([column[column > 0].mean() if (column > 0).any() else 0.0 for column in excess.T])
        return mean * np.log(1 / rate)

    up = np.maximum(high + tail(x - high) - q3, 1.5 * spread)
    down = np.maximum(q1 - low + tail(low - x), 1.5 * spread)
    out = np.maximum((x - q3) / up, (q1 - x) / down if two_sided else -np.inf)
    worst = out[:, slice(None) if watched is None else watched].max(axis=1)
    stretch = 1.25 * max(1.0, np.quantile(worst, 1 - rate))
    lower = q1 - stretch * down if two_sided else np.full(x.shape[1], -np.inf)
    sigma = np.maximum(x.std(axis=0), spread / 1.349)
    return lower, centre, q3 + stretch * up, x.mean(axis=0), sigma


NAMES = ("lower", "centre", "upper", "mean", "sigma")


def parts(fences: Fences) -> tuple[Tensor, ...]:
    named = tuple(getattr(fences, name) for name in NAMES)
    assert all(one is other for one, other in zip(named, fences.parts()))
    return named


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.2])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_fences_stand_where_numpys_quantiles_put_them(name: str, rate: float, two_sided: bool) -> None:
    values = draw(name, np.random.default_rng(0), 512)
    for bound, expected in zip(parts(fit_fences(values, rate, two_sided)), by_hand(values.numpy(), rate, two_sided)):
        np.testing.assert_allclose(bound.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("filled", [8, 9, 100, 511, 512])
def test_rows_of_nan_are_as_if_they_were_not_there(filled: int, two_sided: bool) -> None:
    rng = np.random.default_rng(8)
    values = draw("lognormal", rng, filled)
    padded = torch.full((512, 4), torch.nan)
    padded[torch.from_numpy(rng.permutation(512)[:filled])] = values
    for one, other in zip(parts(fit_fences(values, 0.01, two_sided)), parts(fit_fences(padded, 0.01, two_sided))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filled", [0, 1, 7])
def test_a_handful_of_values_makes_no_fence(filled: int) -> None:
    values = torch.full((64, 4), torch.nan)
    values[:filled] = draw("normal", np.random.default_rng(9), max(filled, 1))[:filled]
    for part, expected in zip(parts(fit_fences(values, 0.01, two_sided=True)), parts(Fences.open(4))):
        assert torch.equal(part, expected)


def test_boundaries_have_fences_of_their_own() -> None:
    rng = np.random.default_rng(10)
    values = torch.stack([draw(name, rng, 64) for name in DISTRIBUTIONS])
    values[1, 30:] = torch.nan
    values[2] = torch.nan
    together = fit_fences(values, 0.05, two_sided=True)
    for index in range(3):
        alone = fit_fences(values[index], 0.05, two_sided=True)
        for one, other, named in zip(parts(together), parts(alone), parts(together.of(index))):
            assert torch.equal(one[index], other) and torch.equal(named, other)


def test_features_that_nobody_watches_neither_have_fences_nor_move_those_of_others() -> None:
    values, watched = draw("normal", np.random.default_rng(11), 256), torch.tensor([True, False, True, False])
    wild = values.clone()
    wild[:, 1] *= torch.from_numpy(np.random.default_rng(12).standard_cauchy(256).astype("float32"))
    wild[::3, 3] = torch.inf
    fences = fit_fences(wild, 0.01, True, watched)
    expected = by_hand(values.numpy(), 0.01, True, watched.numpy())
    for found, wanted in zip(parts(fences), expected):
        np.testing.assert_allclose(found[watched].numpy(), wanted[watched.numpy()], rtol=1e-4, atol=1e-5)
    assert fences.lower[~watched].tolist() == [-torch.inf] * 2 and fences.upper[~watched].tolist() == [torch.inf] * 2
    scores = fences.scores(torch.tensor([0.0, 1e9, 0.0, torch.nan]))
    assert scores[1] == scores[3] == 0


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("features", [4, 17])
def test_the_asked_share_of_fresh_honest_signals_is_outside(features: int, name: str, two_sided: bool) -> None:
    # Jointly, over all features; fences of 512 values know the tails only roughly, so single windows vary.
    rng, rates = np.random.default_rng(1), []
    for _ in range(8):
        window, fresh = (draw(name, rng, count * 5).reshape(count, -1)[:, :features] for count in (512, 1500))
        rates.append((fit_fences(window, 0.01, two_sided).scores(fresh) > 1).any(dim=1).float().mean().item())
    # No k is below Tukey's 1.5, which no uniform value exceeds.
    # The rate is an upper limit, and the margin around it is wide: those that are out are few, but there are some.
    assert (0.0 if name == "uniform" else 0.0002) <= np.mean(rates) <= 0.01
    assert max(rates) <= 0.025


@pytest.mark.parametrize("two_sided", [True, False])
def test_correlated_features_are_not_fenced_more_widely_than_one(two_sided: bool) -> None:
    one = draw("normal", np.random.default_rng(13), 512)[:, :1]
    single, many = fit_fences(one, 0.01, two_sided), fit_fences(one.expand(-1, 17), 0.01, two_sided)
    torch.testing.assert_close(many.upper, single.upper.expand(17), rtol=1e-5, atol=1e-5)


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
    # Open fences have nothing to say of any value; what is not finite is found by its mean, whatever they are.
    assert fences.scores(features).isinf().tolist() == [False, not opened, False, not opened]


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
    for name in NAMES:
        assert torch.equal(getattr(moved, name), getattr(fences, name))


def test_fences_move_with_what_they_are_around() -> None:
    fences, centre = fit_fences(draw("normal", np.random.default_rng(16), 64), 0.01, True), torch.tensor([1.0, -2.0, 0.0, 5.0])
    moved = fences.around(centre)
    values = draw("normal", np.random.default_rng(17), 64)
    torch.testing.assert_close(moved.scores(values + centre), fences.scores(values), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.mean, fences.mean + centre)
    assert torch.equal(moved.sigma, fences.sigma)
    for part, expected in zip(parts(Fences.open(4).around(centre)), parts(Fences.open(4))):
        assert torch.equal(part, expected) or (not expected.any() and torch.equal(part, centre))


def test_widened_fences_score_as_much_lower() -> None:
    fences, factor = fit_fences(draw("lognormal", np.random.default_rng(18), 64), 0.01, True), torch.tensor([1.0, 2.0, 3.0, 10.0])
    values = draw("normal", np.random.default_rng(19), 64)
    torch.testing.assert_close(fences.widened(factor).scores(values) * factor, fences.scores(values))
    assert torch.equal(fences.widened(factor).centre, fences.centre)
    for part, expected in zip(parts(Fences.open(4).widened(factor)), parts(Fences.open(4))):
        assert torch.equal(part, expected)
