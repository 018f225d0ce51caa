from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.verification.peers import FEWEST_PEERS, comparable, median_vote, of_workers

repeatable = settings(derandomize=True, deadline=None, max_examples=150)


@repeatable
@given(workers=st.integers(1, 12), share=st.floats(0, 1), lost=st.floats(0, 0.6), seed=st.integers(0, 99))
def test_workers_are_compared_where_those_that_may_lie_are_a_minority_of_the_votes(
    workers: int, share: float, lost: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    voting, banned = rng.uniform(size=(3, workers)) < share, rng.uniform(size=(3, workers)) < lost
    found = comparable(torch.from_numpy(voting), torch.from_numpy(banned))
    for boundary, is_comparable in enumerate(found.tolist()):
        votes = sum(vote and not out for vote, out in zip(voting[boundary], banned[boundary]))
        at_large = max(0, max(m for m in range(workers) if 2 * m < workers) - banned[boundary].sum())
        known = votes + banned[boundary].sum()
        assert is_comparable == (known >= FEWEST_PEERS and votes >= 3 and votes - at_large > at_large)


@pytest.mark.parametrize("wired", ["own lanes", "shuffled"])
@pytest.mark.parametrize("shape", [(1, 5, 1, 2), (3, 4, 3, 6), (2, 7, 2, 1)], ids=str)
def test_a_worker_has_one_vote_however_many_of_its_signals_count(shape: tuple[int, ...], wired: str) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=shape).astype("float32")
    features[rng.uniform(size=shape) < 0.1] = np.nan
    features[rng.uniform(size=shape) < 0.05] = np.inf
    valid = rng.uniform(size=shape[:3]) < 0.8
    senders = np.tile(np.arange(shape[1]), (shape[0], 1))
    if wired == "shuffled":
        senders = rng.permuted(senders, axis=1)
    votes = of_workers(torch.from_numpy(features), torch.from_numpy(valid), torch.from_numpy(senders))
    medians = median_vote(votes)
    for boundary, feature in np.ndindex(shape[0], shape[3]):
        values = features[boundary, ..., feature]
        usable = [lane[use] for lane, use in zip(values, valid[boundary] & np.isfinite(values))]
        expected = np.full(shape[1], np.nan)
        for worker in range(shape[1]):
            mine = usable[int(np.flatnonzero(senders[boundary] == worker)[0])]
            expected[worker] = np.median(mine) if len(mine) else np.nan
        np.testing.assert_allclose(votes[boundary, :, feature].numpy(), expected, rtol=1e-6)
        given_votes = expected[~np.isnan(expected)]
        median = np.median(given_votes) if len(given_votes) else np.nan
        np.testing.assert_allclose(medians[boundary, feature].item(), median, rtol=1e-6)


def test_a_sender_that_is_verified_more_often_does_not_outvote_the_others() -> None:
    # Three of eight lie in all of their four micro-batches; of three honest ones all but one had been tainted before.
    features, valid = torch.zeros(1, 8, 4, 1), torch.ones(1, 8, 4, dtype=torch.bool)
    features[0, :3] = 9.0
    valid[0, 3:6, 1:] = False
    assert not median_vote(of_workers(features, valid, torch.arange(8)[None])).any()
