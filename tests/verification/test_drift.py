from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Response
from lightning_sentinel.verification.drift import ALARM, ALARM_WITHOUT_AUDITS, DOUBT, Cusum


def own_lanes(boundaries: int, lanes: int) -> Tensor:
    return torch.arange(lanes).expand(boundaries, lanes)


def textbook(scores: np.ndarray, valid: np.ndarray, senders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Page's two sums of each sender and feature, in float64, one step after the other: away from the median, and from where it is.

    Args:
        scores: ``(steps, boundaries, lanes, M, F)``.
        valid: ``(steps, boundaries, lanes, M)``.
        senders: ``(steps, boundaries, lanes)``, as many workers as lanes.
    """
    _, boundaries, lanes, _, features = scores.shape
    sums, outside = (np.zeros((2, boundaries, lanes, features)) for _ in range(2))
    lowest = -(-(lanes - max(f for f in range(lanes) if 2 * f < lanes)) // 2)
    for of_step, valid_of_step, senders_of_step in zip(scores, valid, senders):
        for b, f in np.ndindex(boundaries, features):
            chosen = [of_step[b, own, :, f][valid_of_step[b, own]] for own in (senders_of_step[b] == w for w in range(lanes))]
            z = np.array([x.clip(-2.5, 2.5).sum() / math.sqrt(len(x)) if len(x) else 0.0 for x in chosen])
            z -= np.median(z)
            z /= max(1.0, np.median(np.abs(z)) / 0.6745)
            near = z.clip(np.sort(z)[lowest - 1], np.sort(z)[lanes - lowest])
            for worker in (w for w in range(lanes) if len(chosen[w])):
                for side, sign in enumerate((1, -1)):
                    for kept, away, slack in ((sums, z, 0.75), (outside, z - near, 0.6)):
                        place = side, b, worker, f
                        kept[place] = min(18.0, max(0.0, kept[place] + sign * away[worker] - slack))
    return sums, outside


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
    sums, outside = textbook(scores.astype("float64"), valid, senders)
    np.testing.assert_allclose(cusum.sums.numpy(), sums, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(cusum.outside.numpy(), outside, rtol=1e-4, atol=1e-3)
    height = np.maximum(sums.clip(max=16.0), outside).max(axis=(0, 3))
    np.testing.assert_allclose(cusum.height.numpy(), height, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_scores_that_are_not_finite_stay_with_their_sender(value: float) -> None:
    cusum, scores = Cusum(1, 3, 1), torch.zeros(1, 3, 3, 1)
    scores[0, 0, 1] = value
    for _ in range(5):
        cusum.add(scores, torch.ones(1, 3, 3, dtype=torch.bool), own_lanes(1, 3))
    assert cusum.sums.isfinite().all() and cusum.height[0, 0] > 0 and not cusum.height[0, 1:].any()


def one_of_three(shift: float, micro_batches: int = 1) -> Tensor:
    """Standard scores ``(1, 3, M, 1)``: the first of three workers is off."""
    return torch.tensor([shift, 0.0, 0.0])[None, :, None, None].expand(1, 3, micro_batches, 1)


def test_who_could_not_be_verified_stays_where_it_was() -> None:
    cusum, valid = Cusum(1, 3, 1), torch.ones(1, 3, 1, dtype=torch.bool)
    for _ in range(3):
        cusum.add(one_of_three(4.0), valid, own_lanes(1, 3))
    valid[0, 0] = False
    cusum.add(one_of_three(math.nan), valid, own_lanes(1, 3))
    assert cusum.height.tolist() == [[3 * 1.75, 0, 0]]
    cusum.add(one_of_three(0.0), ~valid, own_lanes(1, 3))
    assert cusum.height.tolist() == [[3 * 1.75 - 0.75, 0, 0]]


def test_who_was_not_verified_is_expected_in_the_middle() -> None:
    # One of five is seen: that it is where it should not be is its own doing, not that of all who were seen.
    cusum, valid = Cusum(1, 5, 1), torch.zeros(1, 5, 1, dtype=torch.bool)
    valid[0, 2] = True
    cusum.add(torch.full((1, 5, 1, 1), 2.5), valid, own_lanes(1, 5))
    assert cusum.sums.amax(dim=(0, 3)).tolist() == [[0, 0, 1.75, 0, 0]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("shift", "steps"), [(1.75, 10), (2.5, 6), (9.0, 6)])
def test_a_drift_raises_the_alarm_when_it_should(shift: float, steps: int, micro_batches: int, sign: int) -> None:
    cusum, everything = Cusum(1, 3, 1), torch.ones(1, 3, micro_batches, dtype=torch.bool)
    grows = micro_batches**0.5 * min(shift, 2.5) - 0.75
    for step in range(steps + 1):
        assert (cusum.height > ALARM).tolist() == [[step * grows > ALARM, False, False]]
        cusum.add(one_of_three(sign * shift, micro_batches), everything, own_lanes(1, 3))
    assert cusum.height[0, 0] > ALARM
    assert DOUBT < ALARM < ALARM_WITHOUT_AUDITS


@pytest.mark.parametrize(("shift", "spread"), [(2.0, 0.5), (0.0, 1.5), (1.0, 1.5)])
def test_a_distribution_that_moves_or_widens_everywhere_raises_no_alarm(shift: float, spread: float) -> None:
    cusum, generator = Cusum(4, 8, 17), torch.Generator().manual_seed(0)
    highest = 0.0
    for _ in range(120):
        scores = shift + spread * torch.randn(4, 8, 2, 17, generator=generator)
        cusum.add(scores, torch.ones(4, 8, 2, dtype=torch.bool), own_lanes(4, 8))
        highest = max(highest, float(cusum.height.max()))
    assert highest < ALARM_WITHOUT_AUDITS


def test_standard_normal_scores_raise_no_alarm() -> None:
    cusum, generator = Cusum(4, 8, 17), torch.Generator().manual_seed(0)
    highest = 0.0
    for _ in range(500):
        cusum.add(torch.randn(4, 8, 4, 17, generator=generator), torch.ones(4, 8, 4, dtype=torch.bool), own_lanes(4, 8))
        highest = max(highest, float(cusum.height.max()))
    assert highest < ALARM


def test_a_sender_can_be_forgotten_by_itself() -> None:
    cusum = Cusum(2, 3, 4)
    cusum.sums.fill_(1.75)
    chosen = torch.tensor([[True, False, False], [False, True, False]])
    cusum.reset(chosen)
    assert torch.equal(cusum.height, torch.where(chosen, 0.0, 1.75))


def test_who_is_in_line_again_is_no_suspect_for_long_enough_to_be_banned() -> None:
    cusum, everything = Cusum(1, 4, 1), torch.ones(1, 4, 1, dtype=torch.bool)
    shifted = torch.zeros(1, 4, 1, 1)
    shifted[0, 0] = 2.5
    for _ in range(100):
        cusum.add(shifted, everything, own_lanes(1, 4))
    assert cusum.height[0, 0] > ALARM_WITHOUT_AUDITS
    for _ in range(Response().ban_after - 1):
        cusum.add(0 * shifted, everything, own_lanes(1, 4))
    assert cusum.height[0, 0] <= ALARM_WITHOUT_AUDITS
    for _ in range(30):
        cusum.add(0 * shifted, everything, own_lanes(1, 4))
    assert not cusum.height.any()


def just_below(z: Tensor, liars: int) -> Tensor:
    """The first workers stay together, a little lower than the lowest of the others."""
    z = z.clone()
    z[:, :liars] = z[:, liars:].amin(dim=1, keepdim=True) - 0.1
    return z


@pytest.mark.parametrize(("workers", "liars"), [(4, 1), (5, 2), (6, 2), (7, 3), (8, 3), (16, 7)])
def test_a_minority_just_below_the_others_does_not_make_them_drift(workers: int, liars: int) -> None:
    cusum, generator, highest = Cusum(4, workers, 17), torch.Generator().manual_seed(0), 0.0
    everything = torch.ones(4, workers, 1, dtype=torch.bool)
    for _ in range(300):
        scores = just_below(torch.randn(4, workers, 1, 17, generator=generator), liars)
        cusum.add(scores, everything, own_lanes(4, workers))
        highest = max(highest, float(cusum.height[:, liars:].max()))
    assert highest <= ALARM_WITHOUT_AUDITS


@pytest.mark.parametrize(("workers", "liars"), [(4, 1), (6, 1), (6, 2), (8, 3)])
def test_who_drifts_is_audited_whatever_its_like_do_and_alone_needs_no_audit(workers: int, liars: int) -> None:
    cusum, generator = Cusum(1, workers, 17), torch.Generator().manual_seed(0)
    for _ in range(40):
        scores = torch.randn(1, workers, 4, 17, generator=generator)
        scores[:, :liars, :, 3] += 1.5
        cusum.add(scores, torch.ones(1, workers, 4, dtype=torch.bool), own_lanes(1, workers))
    assert (cusum.height[0] > ALARM).tolist() == [True] * liars + [False] * (workers - liars)
    # As many as could be malicious could also be honest, with as many of the others lying: without audits nobody can tell.
    assert (cusum.height[0] > ALARM_WITHOUT_AUDITS).tolist() == [liars == 1] + [False] * (workers - 1)
