from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.verification.audit import AuditSchedule, causal_order, relative_error, tolerance

MESH = Mesh(3, 4)


def draws(schedule: AuditSchedule, steps: int, start: int = 0, last_ban: int | None = None, micro_batches: int = 2) -> Tensor:
    """``(steps, boundaries, lanes, micro_batches)`` bool."""
    return torch.stack([schedule.draw(start + step, micro_batches, last_ban) for step in range(steps)])


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (0.5, 2), (0.2, 5), (0.1, 10), (0.01, 100)])
def test_every_place_is_audited_once_in_so_many_steps(rate: float, steps: int) -> None:
    schedule = AuditSchedule(MESH, rate, seed=1)
    for _ in range(4):
        assert (draws(schedule, steps).sum(dim=0) == 1).all()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(rate=st.floats(0.02, 1.0), seed=st.integers(0, 1000))
def test_nobody_waits_longer_than_two_rounds(rate: float, seed: int) -> None:
    longest = math.ceil(2 / rate)
    drawn = draws(AuditSchedule(MESH, rate, seed), 4 * longest)
    for start in range(3 * longest):
        assert drawn[start : start + longest].any(dim=0).all()


def test_when_it_is_somebodys_turn_changes_from_round_to_round() -> None:
    drawn = draws(AuditSchedule(Mesh(4, 8), 0.1, seed=1), 400, micro_batches=4).view(40, 10, -1).long()
    turns = drawn.argmax(dim=1).double()
    # Uniform over the steps of a round, whatever the place and whatever its turn before.
    assert (drawn.sum(dim=(0, 2)) / drawn.sum() - 0.1).abs().max() < 0.01
    assert abs(turns.mean().item() - 4.5) < 0.1
    assert abs(torch.corrcoef(torch.stack((turns[1:].flatten(), turns[:-1].flatten())))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack((turns[:, 1:].flatten(), turns[:, :-1].flatten())))[0, 1]) < 0.05


def test_a_rate_of_one_draws_everything() -> None:
    assert draws(AuditSchedule(MESH, 1.0, seed=0), 50).all()
    assert draws(AuditSchedule(MESH, 1.0, seed=0), 50, last_ban=10).all()


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_after_a_ban_the_rate_is_three_times_as_high_for_thirty_steps(rate: float) -> None:
    schedule, ban = AuditSchedule(MESH, rate, seed=3), 7
    schedule.draw(ban, 2, last_ban=None)
    assert schedule.rounds == pytest.approx(rate)
    drawn = draws(schedule, 30, start=ban + 1, last_ban=ban)
    assert schedule.rounds == pytest.approx(rate * (1 + 3 * 30))
    assert drawn.float().mean().item() == pytest.approx(3 * rate, rel=0.1)
    schedule.draw(ban + 31, 2, last_ban=ban)
    assert schedule.rounds == pytest.approx(rate * (2 + 3 * 30))


def test_the_raised_rate_is_at_most_everything() -> None:
    schedule = AuditSchedule(MESH, 0.5, seed=3)
    assert draws(schedule, 20, last_ban=0).all() and schedule.rounds == 20


def test_a_schedule_goes_on_from_its_rounds() -> None:
    whole, second = AuditSchedule(MESH, 0.13, seed=5), AuditSchedule(MESH, 0.13, seed=5)
    draws(whole, 17)
    second.rounds = whole.rounds
    assert torch.equal(draws(whole, 40, start=17), draws(second, 40, start=17))


def test_audits_follow_the_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, again, other = (draws(AuditSchedule(MESH, 0.5, seed), 10) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("seed", [-1, 2**63 - 1])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert AuditSchedule(MESH, 0.5, seed).draw(10**9, 2, None).shape == (4, 4, 2)


def test_a_mesh_of_one_stage_has_nothing_to_draw() -> None:
    assert AuditSchedule(Mesh(1, 4), 0.5, seed=0).draw(0, 2, None).shape == (0, 4, 2)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(stages=st.integers(1, 9))
def test_a_micro_batch_goes_forward_and_then_back(stages: int) -> None:
    mesh = Mesh(stages, 2)
    order = [mesh.boundaries[index] for index in causal_order(mesh)]
    assert sorted(order) == sorted(mesh.boundaries)
    path = [boundary.sender for boundary in order]
    assert path == [*range(stages - 1), *range(stages - 1, 0, -1)]
    assert [boundary.direction for boundary in order] == [Direction.ACTIVATION] * (stages - 1) + [Direction.GRADIENT] * (stages - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_stays_within_the_tolerance_and_tampering_does_not(dtype: torch.dtype) -> None:
    signal = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    claimed = signal.to(dtype)
    rounded = (claimed.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
    assert relative_error(claimed, rounded) <= tolerance(dtype)
    for tampered in (-claimed, 0 * claimed, claimed.roll(1, 0), 1.1 * claimed):
        assert relative_error(tampered, claimed) > tolerance(dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_matches_only_itself(value: float) -> None:
    honest = torch.ones(4)
    broken = honest.clone()
    broken[1] = value
    assert relative_error(broken, broken.clone()) == 0
    assert relative_error(broken, honest).isinf() and relative_error(honest, broken) > 1e-3


def test_the_error_is_relative_to_what_was_recomputed() -> None:
    claimed, recomputed = torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0])
    assert relative_error(claimed, recomputed).item() == pytest.approx(4 / 5)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) > 1e6
