from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification.audit import AuditSchedule, causal_order, made_of_data, one_each, relative_error, tolerance
from lightning_sentinel.verification.draws import Draws
from lightning_sentinel.wiring import Wiring

MESH = Mesh(3, 4)


def draws(
    mesh: Mesh, rate: float, steps: int, found: dict[int, int] | None = None, micro_batches: int = 2, seed: int = 0, every: int = 1
) -> Tensor:
    """Signals that any worker draws, ``(steps, boundaries, lanes, micro_batches)`` bool."""
    schedule, wiring = AuditSchedule(mesh, rate), Wiring.of(mesh, micro_batches=micro_batches)
    drawn = [schedule.draw(Draws.seeded(mesh, seed, step), step, found or {}, wiring) for step in range(0, steps, every)]
    return torch.stack([one.signals.any(dim=0) for one in drawn])


def test_a_rate_of_one_draws_everything() -> None:
    assert draws(MESH, 1.0, 50).all()
    assert draws(MESH, 1.0, 50, found={1: 10}).all()


@pytest.mark.parametrize("seldom", [1, 7])
def test_a_liar_is_met_after_so_many_lies_however_seldom_it_lies(seldom: int) -> None:
    rate, lies = 0.1, 600
    drawn = draws(Mesh(6, 4), rate, lies * seldom, micro_batches=1, seed=2, every=seldom)[:, ~made_of_data(Mesh(6, 4))]
    drawn = drawn.flatten(1)
    waits = drawn.float().argmax(dim=0).double()[drawn.any(dim=0)]
    # 32 places: the mean of as many geometric waits, within four of its deviations.
    assert abs(waits.mean().item() + 1 - 1 / rate) < 4 / rate / len(waits) ** 0.5


def test_what_was_audited_says_nothing_of_what_will_be() -> None:
    mesh = Mesh(6, 4)
    drawn = draws(mesh, 0.1, 400, micro_batches=4, seed=1)[:, ~made_of_data(mesh)].flatten(1)
    assert abs(drawn.float().mean().item() - 0.1) < 0.003
    # As often right after an audit of the same place, and in each number of steps after it, as at any time.
    for later in range(1, 20):
        again = (drawn[:-later] & drawn[later:]).sum() / drawn[:-later].sum()
        assert abs(again.item() - 0.1) < 0.02
    # And in one place of a step as in another.
    assert (drawn.float().mean(dim=0) - 0.1).abs().max() < 0.08


@pytest.mark.parametrize(("stages", "factor"), [(2, 2.0), (3, 3.0), (4, 4.0), (8, 4.0)])
def test_what_can_be_compared_with_nothing_is_audited_more_often_at_no_more_than_twice_the_cost(stages: int, factor: float) -> None:
    mesh = Mesh(stages, 4)
    rates = AuditSchedule(mesh, 0.01).rates(7, {})
    ends = [
        mesh.boundaries.index(Boundary(0, Direction.ACTIVATION)),
        mesh.boundaries.index(Boundary(stages - 2, Direction.GRADIENT)),
    ]
    assert rates[ends].tolist() == pytest.approx([0.01 * factor] * 2)
    assert rates.mean() <= 0.02 + 1e-9 and (rates.sort().values[:-2] == rates.min()).all()
    drawn = draws(mesh, 0.02, 500).float().mean(dim=(0, 2, 3))
    assert drawn.tolist() == pytest.approx((2 * rates).tolist(), rel=0.35)


@pytest.mark.parametrize("rate", [0.02, 0.05])
@pytest.mark.parametrize("stage", [0, 2])
def test_after_a_worker_was_found_out_the_rate_is_higher_for_thirty_steps_and_most_in_its_stage(rate: float, stage: int) -> None:
    mesh, ban = Mesh(5, 4), 7
    usual, after = draws(mesh, rate, 200, seed=3), draws(mesh, rate, 200, {stage: ban}, seed=3)
    assert torch.equal(usual[ban + 31 :], after[ban + 31 :])
    alert, ends = after[ban : ban + 31], made_of_data(mesh)
    of_stage = torch.tensor([boundary.sender == stage for boundary in mesh.boundaries])
    assert alert[:, ~ends].float().mean().item() == pytest.approx(3 * rate, rel=0.15)
    assert alert[4:, ends & ~of_stage].float().mean().item() == pytest.approx(4 * rate, rel=0.25)
    if stage == 0:
        assert alert[:4, ends].all(), "where nothing can be compared all of it, at both ends"
        assert alert[4:, ends & of_stage].float().mean().item() == pytest.approx(12 * rate, rel=0.15)
    assert (alert | ~usual[ban : ban + 31]).all(), "what was drawn before the ban is drawn when the step is done again"


def test_one_signal_of_each_sender_is_any_of_them_that_says_something() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for step in range(200):
        valid = torch.rand(4, 4, 5, generator=generator) < 0.6
        chosen = one_each(Draws.seeded(MESH, 3, step), valid)
        assert torch.equal(chosen.sum(dim=2) == 1, valid.any(dim=2)) and not (chosen & ~valid).any()
        counts += chosen.sum(dim=(0, 1))
    assert (counts / counts.sum() - 0.2).abs().max() < 0.03


def test_a_mesh_of_one_stage_has_nothing_to_draw() -> None:
    mesh = Mesh(1, 4)
    assert draws(mesh, 0.5, 1).shape == (1, 0, 4, 2)
    assert one_each(Draws.seeded(mesh, 0, 0), torch.zeros(0, 4, 2, dtype=torch.bool)).shape == (0, 4, 2)


@pytest.mark.parametrize("what", ["signals", "rows"])
def test_workers_draw_what_others_of_their_stage_send_and_report_where_there_is_work(what: str) -> None:
    mesh, banned, muted = Mesh(3, 5), {Worker(1, 0)}, {Worker(1, 3)}
    wiring = Wiring.of(mesh, banned, 2, shuffled=5)
    drawn = getattr(AuditSchedule(mesh, 1.0).draw(Draws.seeded(mesh, 0, 7), 7, {}, wiring, banned, muted), what)
    for index, boundary in enumerate(mesh.boundaries):
        stage = boundary.sender if what == "signals" else boundary.receiver
        for lane in range(mesh.replicas):
            for slot in range(wiring.slots):
                is_work = wiring.live[lane] and slot < len(wiring.work[lane])
                others = set(mesh.of_stage(stage)) - banned - muted - {wiring.worker(stage, lane)}
                expected = {worker.replica for worker in others} if is_work else set()
                assert set(drawn[:, index, lane, slot].nonzero().flatten().tolist()) == expected


def test_who_has_said_nothing_draws_nothing_and_changes_what_nobody_else_draws() -> None:
    mesh, wiring, schedule = Mesh(2, 5), Wiring.of(Mesh(2, 5), micro_batches=8), AuditSchedule(Mesh(2, 5), 0.5)
    everyone = Draws.seeded(mesh, 0, 7)
    silent = Draws({worker: number for worker, number in everyone.numbers.items() if worker != Worker(0, 2)})
    before, after = schedule.draw(everyone, 7, {}, wiring).signals, schedule.draw(silent, 7, {}, wiring).signals
    of_stage = torch.tensor([boundary.sender == 0 for boundary in mesh.boundaries])
    assert before[2][of_stage].any() and not after[2][of_stage].any()
    before[2][of_stage.nonzero()] = False
    assert torch.equal(before, after)


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
