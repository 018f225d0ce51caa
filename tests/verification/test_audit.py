from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.verification.audit import causal_order, draw_audits, relative_error, tolerance


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_each_signal_is_drawn_at_the_rate(rate: float) -> None:
    mesh, drawn = Mesh(4, 8), torch.zeros(6, 8, 4)
    steps = 400
    for step in range(steps):
        drawn += draw_audits(mesh, 4, rate, seed=1, step=step)
    deviation = math.sqrt(rate * (1 - rate) / steps)
    assert drawn.mean().item() / steps == pytest.approx(rate, abs=5 * deviation / math.sqrt(drawn.numel()))
    assert (drawn / steps - rate).abs().max() < 5 * deviation


def test_a_rate_of_one_draws_everything() -> None:
    assert all(draw_audits(Mesh(3, 4), 2, 1.0, seed=0, step=step).all() for step in range(50))


def test_audits_follow_the_seed_and_the_step_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = draw_audits(Mesh(3, 4), 8, 0.5, seed=5, step=7)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one, draw_audits(Mesh(3, 4), 8, 0.5, seed=5, step=7))
    for seed, step in ((5, 8), (6, 7)):
        assert not torch.equal(one, draw_audits(Mesh(3, 4), 8, 0.5, seed=seed, step=step))


@pytest.mark.parametrize("seed", [-1, 2**63 - 1])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert draw_audits(Mesh(3, 4), 2, 0.5, seed, step=10**9).shape == (4, 4, 2)


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
