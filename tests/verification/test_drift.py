from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.verification.drift import ALARM, ALARM_WITHOUT_AUDITS, Cusum


def own_lanes(boundaries: int, lanes: int) -> Tensor:
    return torch.arange(lanes).expand(boundaries, lanes)


def textbook(scores: np.ndarray, valid: np.ndarray, senders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Page's two sums of each sender and feature, in float64, one step after the other.

    Args:
        scores: ``(steps, boundaries, lanes, M, F)``.
        valid: ``(steps, boundaries, lanes, M)``.
        senders: ``(steps, boundaries, lanes)``, as many workers as lanes.
    """
    _, boundaries, lanes, _, features = scores.shape
    up, down = np.zeros((boundaries, lanes, features)), np.zeros((boundaries, lanes, features))
    for of_step, valid_of_step, senders_of_step in zip(scores, valid, senders):
        for b, worker, f in np.ndindex(up.shape):
            mine = senders_of_step[b] == worker
            chosen = of_step[b, mine, :, f][valid_of_step[b, mine]].clip(-2.5, 2.5)
            if len(chosen):
                z = chosen.sum() / math.sqrt(len(chosen))
                up[b, worker, f] = max(0.0, up[b, worker, f] + z - 0.75)
                down[b, worker, f] = max(0.0, down[b, worker, f] - z - 0.75)
    return up, down


@pytest.mark.parametrize("wired", ["own lanes", "shuffled", "two lanes at once"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (4, 8, 1, 2)], ids=str)
def test_the_textbook_agrees_whichever_lanes_workers_serve(shape: tuple[int, ...], wired: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0.5, 3.0, size=(60, *shape)).astype("float32")
    valid = rng.uniform(size=(60, *shape[:3])) < 0.7
    senders = np.broadcast_to(np.arange(shape[1]), (60, *shape[:2]))
    if wired == "shuffled":
        senders = rng.permuted(senders, axis=2)
    elif wired == "two lanes at once":
        senders = rng.integers(shape[1], size=senders.shape)
    cusum = Cusum(shape[0], shape[1], shape[3])
    for of_step, valid_of_step, of_lanes in zip(scores, valid, senders):
        cusum.add(torch.from_numpy(of_step), torch.from_numpy(valid_of_step), torch.from_numpy(of_lanes.copy()))
    up, down = textbook(scores.astype("float64"), valid, senders)
    np.testing.assert_allclose(cusum.sums.numpy(), np.stack((up, down)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(cusum.height.numpy(), np.maximum(up, down).max(axis=2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_scores_that_are_not_finite_stay_with_their_sender(value: float) -> None:
    cusum, scores = Cusum(1, 2, 1), torch.zeros(1, 2, 3, 1)
    scores[0, 0, 1] = value
    for _ in range(5):
        cusum.add(scores, torch.ones(1, 2, 3, dtype=torch.bool), own_lanes(1, 2))
    assert cusum.sums.isfinite().all() and cusum.height[0, 0] > 0 and cusum.height[0, 1] == 0


def test_who_could_not_be_verified_stays_where_it_was() -> None:
    cusum, everyone = Cusum(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.bool)
    for _ in range(3):
        cusum.add(torch.full((1, 2, 1, 1), 4.0), everyone, own_lanes(1, 2))
    cusum.add(torch.full((1, 2, 1, 1), math.nan), torch.tensor([[[True], [False]]]), own_lanes(1, 2))
    cusum.add(torch.zeros(1, 2, 1, 1), torch.tensor([[[True], [False]]]), own_lanes(1, 2))
    assert cusum.height.tolist() == [[3 * 1.75 + 1.75 - 0.75, 3 * 1.75]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("shift", "steps"), [(1.75, 10), (2.5, 6), (9.0, 6)])
def test_a_drift_raises_the_alarm_when_it_should(shift: float, steps: int, micro_batches: int, sign: int) -> None:
    cusum, everything = Cusum(1, 1, 2), torch.ones(1, 1, micro_batches, dtype=torch.bool)
    scores = torch.tensor([sign * shift, 0.0]).expand(1, 1, micro_batches, 2)
    grows = micro_batches**0.5 * min(shift, 2.5) - 0.75
    for step in range(steps + 1):
        assert (cusum.height > ALARM).item() == (step * grows > ALARM)
        cusum.add(scores, everything, own_lanes(1, 1))
    assert cusum.height > ALARM
    assert ALARM < ALARM_WITHOUT_AUDITS


def test_standard_normal_scores_raise_no_alarm() -> None:
    cusum, generator = Cusum(4, 8, 17), torch.Generator().manual_seed(0)
    highest = 0.0
    for _ in range(500):
        cusum.add(torch.randn(4, 8, 4, 17, generator=generator), torch.ones(4, 8, 4, dtype=torch.bool), own_lanes(4, 8))
        highest = max(highest, float(cusum.height.max()))
    assert highest < ALARM


def test_a_sender_can_be_forgotten_by_itself() -> None:
    cusum = Cusum(2, 3, 4)
    cusum.add(torch.full((2, 3, 1, 4), 3.0), torch.ones(2, 3, 1, dtype=torch.bool), own_lanes(2, 3))
    chosen = torch.tensor([[True, False, False], [False, True, False]])
    cusum.reset(chosen)
    assert torch.equal(cusum.height, torch.where(chosen, 0.0, 1.75))


def test_a_drift_that_ends_comes_down_again() -> None:
    cusum, one = Cusum(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    for _ in range(12):
        cusum.add(torch.full((1, 1, 1, 1), 2.5), one, own_lanes(1, 1))
    assert cusum.height > ALARM_WITHOUT_AUDITS
    for _ in range(28):
        cusum.add(torch.zeros(1, 1, 1, 1), one, own_lanes(1, 1))
    assert cusum.height == 0
