from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Worker
from lightning_sentinel.verification import COLUMNS
from lightning_sentinel.verification.audit import causal_order
from lightning_sentinel.verification.outcomes import Outcome
from tests.verification.steps import ASKED, MICRO_BATCHES, A, G, Step, first_of_each_micro_batch, steps


@st.composite
def audited_steps(draw: st.DrawFn) -> tuple[Step, Tensor, Tensor, Tensor]:
    step = draw(steps(fewest_stages=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def some(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    shape = step.rows.shape[:3]
    return step, some(draw(st.sampled_from([0, 0.1, 0.5])), *shape), some(0.2, *shape), some(0.1, *shape[:2])


def followed_by_hand(step: Step, wanted: Tensor, anyway: Tensor, lies: Tensor) -> np.ndarray:
    """What is audited: each micro-batch on its way, up to the first lie, without flags that follow from one that was dropped."""
    score = step.rows[..., COLUMNS.index("score")]
    audited = np.zeros(wanted.shape, dtype=bool)
    for lane, m in np.ndindex(wanted.shape[1:]):
        oddity = 0.0
        for index in causal_order(step.mesh):
            at = index, lane, m
            if not wanted[at] or (not anyway[at] and score[at] <= 2 * oddity):
                continue
            audited[at] = True
            if lies[at]:
                break
            oddity = max(oddity, float(score[at]) if score[at] > 1 else 0.0)
    return audited


@settings(derandomize=True, deadline=None, max_examples=150)
@given(case=audited_steps())
def test_audits_find_liars_and_nobody_else(case: tuple[Step, Tensor, Tensor, Tensor]) -> None:
    step, lies, drawn, drifting = case
    mesh = step.mesh
    verdict, asked = step.audited(lies, drawn, drifting)
    tainted, worst, score = (step.rows[..., COLUMNS.index(n)] for n in ("tainted", "worst", "score"))
    valid = (tainted == 0) & step.live[:, None]
    suspected = torch.zeros_like(valid)
    suspected[..., ASKED] = drifting
    wanted = valid & ((score > 1) | drawn | suspected)
    audited = torch.from_numpy(followed_by_hand(step, wanted, drawn | suspected, lies))
    lied, behind = first_of_each_micro_batch((audited & lies).numpy(), mesh)
    # Asked at once, before anybody is known to have lied; what is behind a lie does not count.
    assert torch.equal(asked, torch.from_numpy(followed_by_hand(step, wanted, drawn | suspected, torch.zeros_like(lies))))
    assert not (audited & ~asked).any()
    assert verdict.audits == int(audited.sum())

    def workers(signals: np.ndarray) -> Counter[Worker]:
        return Counter(Worker(mesh.boundaries[index].sender, lane) for index, lane, _ in np.argwhere(signals).tolist())

    assert verdict.flagged == workers(lied) and verdict.guilty == set(workers(lied)) and not verdict.suspects
    dropped = (audited & ((score > 1) | suspected)).numpy() & ~lied
    listed = [(d.worker, d.direction, d.micro_batch, d.confirmed) for d in verdict.detections]
    assert listed == [
        (Worker(mesh.boundaries[index].sender, lane), mesh.boundaries[index].direction, m, bool(lied[index, lane, m]))
        for index, lane, m in np.argwhere(lied | dropped).tolist()
    ]
    assert all(d.audited for d in verdict.detections)
    honest = verdict.honest.numpy()
    np.testing.assert_array_equal(honest, valid.numpy() & ~lied & ~behind & (worst.numpy() >= 0))
    assert (honest | ~dropped | (worst.numpy() < 0)).all(), "what was exonerated is learned from"
    assert torch.equal(verdict.clean, step.live[None, :, None].expand_as(verdict.clean))


def test_an_unnoticed_lie_is_found_by_chance_alone() -> None:
    lies = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool)
    lies[1, 2, 3] = True
    assert not Step().audited(lies)[0].guilty
    verdict, _ = Step().audited(lies, drawn=lies)
    assert verdict.guilty == {Worker(1, 2)} and verdict.audits == 1
    (detection,) = verdict.detections
    assert detection.audited and detection.confirmed and detection.score < 1


@pytest.mark.parametrize(("score", "asked_again"), [(9.0, False), (18.0, False), (18.1, True)])
def test_odd_data_is_followed_once_unless_it_gets_much_odder(score: float, asked_again: bool) -> None:
    nobody = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool)
    step = Step().flag(0, A, 1, [2], score=9.0).flag(2, A, 1, [2], score=score).flag(1, G, 1, [2], score=2.0)
    verdict, asked = step.audited(nobody)
    assert asked[0, 1, 2] and asked[2, 1, 2] == asked_again and not asked[4, 1, 2]
    assert verdict.audits == 1 + asked_again == len(verdict.detections) and not verdict.guilty
    # What was not asked about is as honest as what it follows from.
    assert verdict.honest.all()


def test_what_is_behind_odd_data_is_audited_if_it_was_drawn_or_drifts_or_is_of_another_micro_batch() -> None:
    drawn, drifting = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    drawn[2, 1, 2], drifting[1, 1] = True, True
    step = Step().flag(0, A, 1, [0, 2], score=9.0)
    for index in (1, 2):
        step.flag(index, A, 1, [0, 2, 3], score=3.0)
    _, asked = step.audited(torch.zeros_like(drawn), drawn, drifting)
    # Boundary 1 drifts, of which its last micro-batch tells; that is first odd there, too, and followed to boundary 2.
    assert [asked[index, 1].tolist() for index in range(3)] == [
        [True, False, True, False],
        [False, False, False, True],
        [False, False, True, False],
    ]


def test_one_audit_tells_why_a_sender_drifts() -> None:
    drifting = torch.zeros(6, 3, dtype=torch.bool)
    drifting[1, 2] = True
    verdict, asked = Step().audited(torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool), drifting=drifting)
    assert verdict.audits == 1 and asked[1, 2].tolist() == [False, False, False, True]
    assert [d.confirmed for d in verdict.detections] == [False]


def test_a_banned_lane_is_not_audited() -> None:
    step, everything = Step().ban(1), torch.ones(6, 3, MICRO_BATCHES, dtype=torch.bool)
    verdict, asked = step.audited(everything, drawn=everything)
    assert not asked[:, 1].any() and verdict.guilty == {Worker(0, 0), Worker(0, 2)}
    assert verdict.audits == 2 * MICRO_BATCHES


def test_a_mesh_of_one_stage_has_nothing_to_audit() -> None:
    verdict, _ = Step(stages=1).audited(torch.zeros(0, 3, MICRO_BATCHES, dtype=torch.bool))
    assert verdict.audits == 0 and verdict.clean.all()


def test_what_nobody_can_tell_is_nobodys_guilt_and_nothing_to_learn_from() -> None:
    outcomes = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.long)
    outcomes[1, 2, 3] = Outcome.DISPUTED
    places = {(1, 2, 3): frozenset({Worker(1, 0)}), (3, 2, 3): frozenset({Worker(1, 1)})}
    verdict, _ = Step().audited(outcomes, drawn=torch.ones_like(outcomes, dtype=torch.bool), outvoted=places)
    assert (verdict.guilty, verdict.disputed, verdict.flagged) == (frozenset(), {Worker(1, 2)}, {Worker(1, 2): 1})
    assert [(d.worker, d.audited, d.confirmed) for d in verdict.detections] == [(Worker(1, 2), True, None)]
    assert not verdict.honest[1, 2, 3]
    # What anybody says of signals behind it does not count.
    assert verdict.outvoted == {Worker(1, 0)} and verdict.audits == outcomes.numel() - len(causal_order(Step().mesh)[2:])


def test_who_says_that_a_signal_was_tainted_is_looked_at_where_it_was_drawn() -> None:
    everything = torch.ones(6, 3, MICRO_BATCHES, dtype=torch.bool)
    step = Step().taint(1, A, 1, [2]).ban(2)
    _, asked = step.audited(torch.zeros_like(everything), drawn=everything)
    at = step.mesh.boundaries.index(Boundary(1, A)), 1, 2
    assert not asked[at] and step.only_rows[at] and step.only_rows.sum() == 1
    step.audited(torch.zeros_like(everything))
    assert not step.only_rows.any()


# --- Neighbours that hand over something else than they sent


def giver_of(boundary: Boundary, outcome: Outcome) -> Boundary:
    """Across which the sender of ``boundary`` was sent what an auditor was not given: found by who sends what to its stage."""
    direction = A if outcome is Outcome.ACTIVATION_WITHHELD else G
    (giver,) = [one for one in Step().mesh.boundaries if (one.receiver, one.direction) == (boundary.sender, direction)]
    return giver


WITHHELD = [
    *[(Boundary(index, A), Outcome.ACTIVATION_WITHHELD) for index in (1, 2)],
    *[(Boundary(index, G), Outcome.ACTIVATION_WITHHELD) for index in (0, 1, 2)],
    *[(Boundary(index, G), Outcome.GRADIENT_WITHHELD) for index in (0, 1)],
]


@pytest.mark.parametrize("odd", [False, True], ids=["drawn", "flagged"])
@pytest.mark.parametrize(("boundary", "outcome"), WITHHELD, ids=str)
def test_who_withholds_is_blamed_and_nothing_is_said_of_the_signal_that_was_not_audited_or_behind_it(
    boundary: Boundary, outcome: Outcome, odd: bool
) -> None:
    step, lane, slot = Step(), 1, 2
    if odd:
        step.flag(boundary.index, boundary.direction, lane, [slot])
    mesh, everything = step.mesh, torch.ones(6, 3, MICRO_BATCHES, dtype=torch.bool)
    outcomes = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.long)
    at, giver = mesh.boundaries.index(boundary), giver_of(boundary, outcome)
    outcomes[at, lane, slot] = outcome
    verdict, asked = step.audited(outcomes, drawn=everything)
    assert verdict.guilty == {Worker(giver.sender, lane)} and verdict.flagged == Counter({Worker(giver.sender, lane): 1})
    (detection,) = verdict.detections
    assert (detection.worker, detection.direction, detection.micro_batch) == (Worker(giver.sender, lane), giver.direction, slot)
    assert detection.audited and detection.confirmed, "and the sender of what could not be audited is not exonerated"
    order = causal_order(mesh)
    behind = order[order.index(at) + 1 :]
    assert torch.equal(asked, everything) and verdict.audits == everything.sum() - len(behind)
    for index in range(6):
        signals = torch.zeros(3, MICRO_BATCHES, dtype=torch.bool)
        signals[lane, slot] = True
        assert torch.equal(verdict.explained[index], signals if index in (at, *behind) else ~everything[index])
        blamed = mesh.boundaries[index] == giver
        assert torch.equal(verdict.honest[index], ~signals if blamed or index in (at, *behind) else everything[index])


@pytest.mark.parametrize(("boundary", "outcome"), WITHHELD, ids=str)
def test_where_the_only_audit_of_a_sender_was_thwarted_who_thwarted_it_is_blamed(boundary: Boundary, outcome: Outcome) -> None:
    step, drifting = Step(), torch.zeros(6, 3, dtype=torch.bool)
    at = step.mesh.boundaries.index(boundary)
    drifting[at, 2] = True
    outcomes = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.long)
    outcomes[at, 2, ASKED] = outcome
    verdict, _ = step.audited(outcomes, drifting=drifting)
    assert verdict.audits == 1
    assert verdict.guilty == {Worker(giver_of(boundary, outcome).sender, 2)}
    assert [one.confirmed for one in verdict.detections] == [True]
