from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.verification.peers import FEWEST_PEERS, comparable, less_median

repeatable = settings(derandomize=True, deadline=None, max_examples=150)


@repeatable
@given(
    replicas=st.integers(1, 12),
    micro_batches=st.integers(1, 3),
    share=st.floats(0, 1),
    banned=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_lanes_are_compared_where_those_that_may_lie_are_a_minority_of_them(
    replicas: int, micro_batches: int, share: float, banned: int, seed: int
) -> None:
    valid = np.random.default_rng(seed).uniform(size=(3, replicas, micro_batches)) < share
    lost = [min(banned, replicas), 0, min(1, replicas)]
    found = comparable(torch.from_numpy(valid), replicas, torch.tensor(lost))
    for boundary, is_comparable in enumerate(found.tolist()):
        lanes = sum(any(lane) for lane in valid[boundary])
        at_large = max(0, max(m for m in range(replicas) if 2 * m < replicas) - lost[boundary])
        assert is_comparable == (lanes >= FEWEST_PEERS and lanes - at_large > at_large)


def lower_median(values: np.ndarray) -> float:
    """Of an even number the lower of the two in the middle: a value that somebody sent."""
    median = np.quantile(values, 0.5, method="lower")
    assert len(values) % 2 == 0 or median == np.median(values)
    return median


@pytest.mark.parametrize("shape", [(1, 5, 1, 2), (3, 4, 3, 6), (2, 7, 2, 1)], ids=str)
def test_the_median_is_numpys_over_the_medians_of_lanes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=shape).astype("float32")
    features[rng.uniform(size=shape) < 0.1] = np.nan
    features[rng.uniform(size=shape) < 0.05] = np.inf
    valid = rng.uniform(size=shape[:3]) < 0.8
    found = less_median(torch.from_numpy(features), torch.from_numpy(valid)).numpy()
    for boundary in range(shape[0]):
        for feature in range(shape[3]):
            values = features[boundary, ..., feature]
            usable = [lane[use] for lane, use in zip(values, valid[boundary] & np.isfinite(values))]
            lanes = [lower_median(lane) for lane in usable if len(lane)]
            median = lower_median(np.array(lanes)) if lanes else 0.0
            np.testing.assert_allclose(found[boundary, ..., feature], values - median, rtol=1e-6)


def test_without_a_valid_signal_features_stay_as_they_are() -> None:
    features = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(less_median(features, torch.zeros(2, 4, 2, dtype=torch.bool)), features)


def test_what_is_not_finite_does_not_reach_the_others() -> None:
    features = torch.zeros(1, 5, 1, 2)
    features[0, 0] = torch.tensor([torch.nan, torch.inf])
    centred = less_median(features, torch.ones(1, 5, 1, dtype=torch.bool))
    assert not centred[0, 1:].any() and not centred[0, 0].isfinite().any()


def test_a_shift_of_everybody_vanishes() -> None:
    features = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 5, 3, dtype=torch.bool)
    shifted = features + torch.tensor([3.0, -7.0])[:, None, None, None]
    torch.testing.assert_close(less_median(features, valid), less_median(shifted, valid), rtol=1e-5, atol=1e-5)


def test_a_sender_that_is_verified_more_often_does_not_outvote_the_others() -> None:
    # Three of eight lie in all of their four micro-batches; of three honest ones all but one had been tainted before.
    features, valid = torch.zeros(1, 8, 4, 1), torch.ones(1, 8, 4, dtype=torch.bool)
    features[0, :3] = 9.0
    valid[0, 3:6, 1:] = False
    assert comparable(valid, 8, torch.tensor([0])).all()
    assert not less_median(features, valid)[0, 3:].any()
