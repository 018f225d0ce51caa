from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.verification import COLUMNS, StepVerdict
from tests.verification.steps import ALL, MICRO_BATCHES, A, G, Step, first_of_each_micro_batch, steps
from tests.verification.tools import as_received, compared

# --- What is cleared


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_a_change_of_the_training_clears_everybody(replicas: int) -> None:
    step, rng = Step(replicas=replicas), np.random.default_rng(0)
    for replica in range(replicas):
        for m in ALL:
            step.flag(1, G, replica, [m], score=rng.uniform(3.0, 4.0))
    verdict = step.judge()
    assert verdict.detections == () and not verdict.flagged and not verdict.suspects
    assert verdict.honest.all()


def test_a_change_of_the_training_does_not_hide_who_is_further_out() -> None:
    step = Step(replicas=5)
    for replica in range(5):
        step.flag(0, A, replica, ALL, score=3.0)
    verdict = step.flag(0, A, 4, ALL, score=6.1).judge()
    assert verdict.suspects == {Worker(0, 4)} and verdict.flagged == Counter({Worker(0, 4): MICRO_BATCHES})
    assert verdict.honest[0, :4].all() and not verdict.honest[:, 4].any()


def test_one_boundary_says_nothing_about_another() -> None:
    step = Step()
    for replica in range(3):
        step.flag(0, A, replica, ALL, score=5.0)
    verdict = step.flag(1, A, 0, ALL, score=5.0).flag(0, G, 1, ALL, score=5.0).judge()
    assert verdict.suspects == {Worker(1, 0), Worker(1, 1)}
    assert verdict.honest[0].all() and not verdict.honest[1, 0].any() and not verdict.honest[3, 1].any()


@pytest.mark.parametrize("replicas", [3, 4, 7])
def test_an_honest_false_positive_does_not_clear_an_attacker(replicas: int) -> None:
    verdict = Step(replicas=replicas).flag(1, A, 0, ALL, score=9.0).flag(1, A, 1, [2], score=6.0).judge()
    assert Counter({Worker(1, 0): MICRO_BATCHES, Worker(1, 1): 1}) == verdict.flagged
    assert verdict.suspects == {Worker(1, 0)}
    assert not verdict.honest[1, 0].any() and not verdict.honest[1, 1, 2]


@pytest.mark.parametrize("attackers", [1, 2])
def test_a_minority_of_attackers_does_not_clear_itself(attackers: int) -> None:
    step = Step(replicas=5)
    for replica in range(attackers):
        step.flag(0, A, replica, ALL, score=50.0)
    assert step.judge().suspects == {Worker(0, replica) for replica in range(attackers)}


@pytest.mark.parametrize(("score", "cleared"), [(1.01, True), (1.4, True), (1.6, False), (50.0, False)])
@pytest.mark.parametrize("banned", [False, True])
def test_one_live_pipeline_is_cleared_just_outside_its_fences_only(banned: bool, score: float, cleared: bool) -> None:
    step = Step(replicas=3).ban(0).ban(2) if banned else Step(replicas=1)
    replica = 1 if banned else 0
    verdict = step.flag(1, A, replica, ALL, score=score).judge()
    assert verdict.honest[1, replica].all() == cleared and verdict.honest[1, replica].any() == cleared
    assert verdict.suspects == (set() if cleared else {Worker(1, replica)})


def test_one_pipeline_is_not_cleared_by_its_own_median() -> None:
    verdict = Step(replicas=1).flag(0, G, 0, ALL, score=50.0).judge()
    assert not verdict.honest[3].any() and verdict.suspects == {Worker(1, 0)}


@pytest.mark.parametrize("direction", Direction)
def test_a_sender_whose_peers_are_all_tainted_has_nobody_to_be_compared_with(direction: Direction) -> None:
    # One malicious worker in each of three stages, each in another pipeline: a minority everywhere. The third one's peers are
    # tainted by the first two, and it must not be the median itself.
    step = Step(stages=4, replicas=3).taint(1, direction, 0, ALL).taint(1, direction, 1, ALL)
    verdict = step.flag(1, direction, 2, ALL, score=50.0).judge()
    assert verdict.suspects == {Worker(Boundary(1, direction).sender, 2)}
    assert not verdict.honest[step._at(1, direction), 2].any()


def test_two_pipelines() -> None:
    both = Step(replicas=2).flag(1, A, 0, ALL, score=4.0).flag(1, A, 1, ALL, score=3.0).judge()
    assert both.honest.all() and not both.flagged
    # As many attacking as honest signals: the lower of the two middle ones is honest, were it a false positive.
    one = Step(replicas=2).flag(1, A, 0, ALL, score=4.0).flag(1, A, 1, [0], score=1.2).judge()
    assert one.suspects == {Worker(1, 0)}


def test_banned_senders_and_tainted_signals_do_not_move_the_median() -> None:
    step = Step(replicas=5).ban(0).taint(1, A, 1, ALL[1:], score=80.0).taint(1, A, 2, ALL, score=80.0)
    verdict = step.flag(1, A, 3, ALL, score=50.0).judge()
    assert verdict.suspects == {Worker(1, 3)}


def test_a_sender_that_is_verified_more_often_does_not_outvote_the_others() -> None:
    step = Step().taint(1, A, 0, ALL[1:]).taint(1, A, 1, ALL[1:])
    verdict = step.flag(1, A, 2, ALL, score=50.0).judge()
    assert verdict.suspects == {Worker(1, 2)}


@pytest.mark.parametrize("banned", [False, True])
def test_attackers_that_are_a_minority_of_their_stage_do_not_clear_each_other(banned: bool) -> None:
    # Three of eight at stage 0 and three others of eight at stage 1. At the second boundary only five can be verified, or are
    # live, and three of them tamper: the median of what is left is not honest.
    step = Step(replicas=8)
    for replica in (0, 1, 2):
        if banned:
            step.ban(replica)
        else:
            step.flag(0, A, replica, ALL).taint(1, A, replica, ALL)
    for replica in (3, 4, 5):
        step.flag(1, A, replica, ALL, score=50.0)
    verdict = step.judge()
    assert {Worker(1, replica) for replica in (3, 4, 5)} <= verdict.suspects
    assert not verdict.honest[1, 3:6].any()


@pytest.mark.parametrize("exclude", [True, False])
def test_a_step_without_a_live_pipeline_has_a_verdict(exclude: bool) -> None:
    verdict = Step().ban(0).ban(1).ban(2).judge(exclude=exclude)
    assert not verdict.detections and not verdict.verified and not verdict.honest.any()
    assert verdict.clean.any() != exclude


def test_a_minority_that_is_not_finite_is_not_cleared() -> None:
    verdict = Step().flag_non_finite(1, A, 2, ALL).judge()
    assert not verdict.honest[1, 2].any()
    assert verdict.suspects == {Worker(1, 2)}
    assert {detection.feature for detection in verdict.detections} == {"non_finite"}


def test_a_training_that_overflows_everywhere_is_nobodys_fault_and_teaches_nothing() -> None:
    step = Step()
    for replica in range(3):
        step.flag_non_finite(1, A, replica, ALL)
    verdict = step.judge()
    assert not verdict.suspects and not verdict.detections
    assert not verdict.honest[1].any() and not verdict.clean.any()


# --- Any table


def clean_by_hand(step: Step) -> np.ndarray:
    flagged = step.rows[..., COLUMNS.index("flagged")].numpy() > 0
    clean = np.empty((step.mesh.stages, *flagged.shape[1:]), dtype=bool)
    for stage, replica, m in np.ndindex(clean.shape):
        clean[stage, replica, m] = step.live[replica].item()
        for index, boundary in enumerate(step.mesh.boundaries):
            if flagged[index, replica, m] and (boundary.direction is A or boundary.index >= stage):
                clean[stage, replica, m] = False
    return clean


def cleared_by_hand(step: Step) -> np.ndarray:
    """Twice the score that an honest sender reaches even if as many as half of the stage lie: sort those that were verified, and
    leave out half of *all* replicas from the top, but for the lowest. 1.5 where there is nobody else."""
    score, flagged, tainted = (step.rows[..., COLUMNS.index(name)].numpy() for name in ("score", "flagged", "tainted"))
    cleared = np.zeros(score.shape, dtype=bool)
    for index in range(len(score)):
        medians = []
        for replica in step.live.nonzero().flatten().tolist():
            verified = score[index, replica][tainted[index, replica] == 0]
            if len(verified):
                medians.append(sorted(verified)[(len(verified) - 1) // 2])
        replicas = len(step.live)
        trusted = sorted(medians)[: max(1, len(medians) - replicas // 2)]
        limit = 2 * trusted[-1] if len(medians) > 1 else 1.5
        cleared[index] = (flagged[index] > 0) & (score[index] <= limit)
    return cleared


@settings(derandomize=True, deadline=None, max_examples=150)
@given(step=steps(), exclude=st.booleans(), peers=st.booleans(), drifts=st.booleans())
def test_any_table_has_a_verdict(step: Step, exclude: bool, peers: bool, drifts: bool) -> None:
    mesh, before = step.mesh, step.rows.clone()
    drifting = torch.rand(step.rows.shape[:2], generator=torch.Generator().manual_seed(0)) < (0.2 if drifts else 0)
    verdict, again = (step.with_peers(compared if peers else as_received, exclude=exclude, drifting=drifting) for _ in range(2))
    for field in dataclasses.fields(StepVerdict):
        one, other = getattr(verdict, field.name), getattr(again, field.name)
        if field.name != "table":
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name
    assert torch.equal(before.nan_to_num(), step.rows.nan_to_num())

    flagged, tainted, worst, score = (step.rows[..., COLUMNS.index(n)].numpy() for n in ("flagged", "tainted", "worst", "score"))
    valid = (tainted == 0) & step.live.numpy()[:, None]
    out = valid & (score > 1) if peers else (flagged > 0) & ~cleared_by_hand(step)
    drifts_now = drifting.numpy()[..., None] & valid
    _, doubted = first_of_each_micro_batch(drifts_now, mesh)
    slightly = drifts_now & ~(valid & (score > 1)) | out & (score <= 2)
    blamed, behind = first_of_each_micro_batch(out & (score > 2) | slightly & ~doubted, mesh)
    behind = (behind | doubted) & ~blamed
    np.testing.assert_array_equal(verdict.explained.numpy(), behind)
    np.testing.assert_array_equal(verdict.honest.numpy(), valid & ~blamed & ~behind & ~drifts_now & (worst >= 0))
    assert not verdict.guilty

    expected = clean_by_hand(step) if exclude else np.ones((mesh.stages, *flagged.shape[1:]), dtype=bool)
    np.testing.assert_array_equal(verdict.clean.numpy(), expected)
    assert not exclude or not verdict.clean[:, ~step.live].any()

    standing = [(mesh.boundaries[index], lane, m) for index, lane, m in np.argwhere(blamed).tolist()]
    assert [(d.worker, d.direction, d.micro_batch) for d in verdict.detections] == [
        (Worker(boundary.sender, lane), boundary.direction, m) for boundary, lane, m in standing
    ]
    assert verdict.flagged == Counter(Worker(boundary.sender, lane) for boundary, lane, _ in standing)
    assert verdict.suspects <= set(verdict.flagged) <= verdict.verified <= set(mesh.workers)
    assert not any(d.audited for d in verdict.detections)
