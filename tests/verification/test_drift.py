from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_sentinel.verification.drift import ALARM, ALARM_WITHOUT_AUDITS, Cusum


def textbook(scores: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Page's two sums of each sender and feature, in float64, one step after the other; ``(steps, boundaries, lanes, M, F)``."""
    _, boundaries, lanes, _, features = scores.shape
    up, down = np.zeros((boundaries, lanes, features)), np.zeros((boundaries, lanes, features))
    for of_step, valid_of_step in zip(scores, valid):
        for b, lane, f in np.ndindex(up.shape):
            chosen = [min(4.0, max(-4.0, z)) for z, is_valid in zip(of_step[b, lane, :, f], valid_of_step[b, lane]) if is_valid]
            if chosen:
                z = min(4.0, max(-4.0, sum(chosen) / math.sqrt(len(chosen))))
                up[b, lane, f] = max(0.0, up[b, lane, f] + z - 1)
                down[b, lane, f] = max(0.0, down[b, lane, f] - z - 1)
    return up, down


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (4, 8, 1, 2)], ids=str)
def test_the_textbook_agrees(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0.5, 3.0, size=(60, *shape)).astype("float32")
    valid = rng.uniform(size=(60, *shape[:3])) < 0.7
    cusum = Cusum(shape[0], shape[1], shape[3])
    for of_step, valid_of_step in zip(scores, valid):
        cusum.add(torch.from_numpy(of_step), torch.from_numpy(valid_of_step))
    up, down = textbook(scores.astype("float64"), valid)
    np.testing.assert_allclose(cusum.sums.numpy(), np.stack((up, down)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(cusum.height.numpy(), np.maximum(up, down).max(axis=2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_scores_that_are_not_finite_stay_with_their_sender(value: float) -> None:
    cusum, scores = Cusum(1, 2, 1), torch.zeros(1, 2, 3, 1)
    scores[0, 0, 1] = value
    for _ in range(5):
        cusum.add(scores, torch.ones(1, 2, 3, dtype=torch.bool))
    assert cusum.sums.isfinite().all() and cusum.height[0, 0] > 0 and cusum.height[0, 1] == 0


def test_who_could_not_be_verified_stays_where_it_was() -> None:
    cusum, everyone = Cusum(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.bool)
    for _ in range(3):
        cusum.add(torch.full((1, 2, 1, 1), 4.0), everyone)
    cusum.add(torch.full((1, 2, 1, 1), math.nan), torch.tensor([[[True], [False]]]))
    cusum.add(torch.zeros(1, 2, 1, 1), torch.tensor([[[True], [False]]]))
    assert cusum.height.tolist() == [[9 + 3 - 1, 9]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("shift", "steps"), [(2.0, 10), (4.0, 4), (9.0, 4)])
def test_a_drift_raises_the_alarm_when_it_should(shift: float, steps: int, sign: int) -> None:
    cusum = Cusum(1, 1, 2)
    for step in range(steps + 1):
        assert (cusum.height > ALARM).item() == (step * min(shift - 1, 3) > ALARM)
        cusum.add(torch.tensor([sign * shift, 0.0]).view(1, 1, 1, 2), torch.ones(1, 1, 1, dtype=torch.bool))
    assert cusum.height > ALARM or (shift - 1) * (steps + 1) <= ALARM
    assert ALARM < ALARM_WITHOUT_AUDITS


def test_standard_normal_scores_raise_no_alarm() -> None:
    cusum, generator = Cusum(4, 8, 17), torch.Generator().manual_seed(0)
    highest = 0.0
    for _ in range(500):
        cusum.add(torch.randn(4, 8, 4, 17, generator=generator), torch.ones(4, 8, 4, dtype=torch.bool))
        highest = max(highest, float(cusum.height.max()))
    assert highest < ALARM


def test_a_sender_can_be_forgotten_by_itself() -> None:
    cusum = Cusum(2, 3, 4)
    cusum.add(torch.full((2, 3, 1, 4), 3.0), torch.ones(2, 3, 1, dtype=torch.bool))
    chosen = torch.tensor([[True, False, False], [False, True, False]])
    cusum.reset(chosen)
    assert torch.equal(cusum.height, torch.where(chosen, 0.0, 2.0))
