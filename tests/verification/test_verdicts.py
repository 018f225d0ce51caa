from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import Detection, SignalTable, StepVerdict, judge
from lightning_sentinel.verification.audit import causal_order
from lightning_sentinel.verification.drift import DOUBT
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.wiring import Wiring
from tests.verification.steps import ALL, MICRO_BATCHES, A, G, Step, dirty
from tests.verification.tools import compared

# --- What is left out


def test_nothing_flagged_nothing_happens() -> None:
    verdict = Step().judge()
    assert verdict.detections == () and not verdict.flagged and not verdict.suspects
    assert not dirty(verdict) and verdict.honest.all() and not verdict.guilty and verdict.audits == 0
    assert verdict.verified == frozenset(Mesh(4, 3).workers)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flagged_activation_leaves_its_micro_batch_out_of_every_stage(index: int) -> None:
    assert dirty(Step().flag(index, A, 1, [2]).judge()) == {(stage, 1, 2) for stage in range(4)}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flagged_gradient_leaves_its_micro_batch_out_of_the_stages_that_it_reaches(index: int) -> None:
    # Boundary b lies between the stages b and b + 1; the gradient goes on from stage b to stage 0.
    assert dirty(Step().flag(index, G, 2, [0, 3]).judge()) == {(stage, 2, m) for stage in range(index + 1) for m in (0, 3)}


def test_flags_add_up() -> None:
    verdict = Step().flag(0, G, 0, [1]).flag(2, G, 0, [0]).flag(1, A, 2, [3]).judge()
    gradients = {(0, 0, 1)} | {(stage, 0, 0) for stage in range(3)}
    assert dirty(verdict) == gradients | {(stage, 2, 3) for stage in range(4)}


@pytest.mark.parametrize("direction", Direction)
def test_a_run_that_only_reports_leaves_nothing_out(direction: Direction) -> None:
    verdict = Step().flag(1, direction, 0, ALL).ban(2).judge(exclude=False)
    assert verdict.clean.all() and verdict.clean.shape == (4, 3, MICRO_BATCHES)
    assert len(verdict.detections) == MICRO_BATCHES


def test_banned_pipelines_count_nowhere_and_prove_nothing() -> None:
    verdict = Step().ban(1).judge()
    assert dirty(verdict) == {(stage, 1, m) for stage in range(4) for m in ALL}
    assert verdict.verified == {worker for worker in Mesh(4, 3).workers if worker.replica != 1}
    assert not verdict.honest[:, 1].any() and verdict.honest[:, [0, 2]].all()


def test_a_cleared_flag_stays_out_of_the_weights() -> None:
    # It had been replaced at receipt, before anybody could know.
    step = Step()
    for replica in range(3):
        step.flag(1, A, replica, ALL, score=3.0)
    verdict = step.judge()
    assert not verdict.detections and verdict.honest.all()
    assert not verdict.clean.any()


# --- Who is blamed


def test_what_a_detection_says() -> None:
    verdict = Step().flag(1, A, 2, [3], score=12.5, worst=2).flag(0, G, 1, [0], score=9.0, worst=3).judge(step=41)
    assert verdict.detections == (
        Detection(41, 3, Worker(1, 2), A, 12.5, "sign_flip_ratio", audited=False, confirmed=None),
        Detection(41, 0, Worker(1, 1), G, 9.0, "sliced_wasserstein", audited=False, confirmed=None),
    )
    assert verdict.flagged == Counter({Worker(1, 2): 1, Worker(1, 1): 1})


@pytest.mark.parametrize("worst", range(len(FEATURES)))
def test_a_detection_names_the_feature(worst: int) -> None:
    assert Step().flag(0, A, 0, [0], worst=worst).judge().detections[0].feature == FEATURES[worst]


def test_a_detection_of_what_is_not_finite() -> None:
    (detection,) = Step().flag_non_finite(2, G, 0, [1]).judge().detections
    assert (detection.feature, detection.score, detection.worker) == ("non_finite", MAX_SCORE, Worker(3, 0))


def test_the_fields_of_a_detection_are_plain_values() -> None:
    (detection,) = Step().flag(0, A, 0, [0]).judge().detections
    types = {name: type(value) for name, value in dataclasses.asdict(detection).items() if name != "worker"}
    assert types == {
        "step": int,
        "micro_batch": int,
        "direction": Direction,
        "score": float,
        "feature": str,
        "audited": bool,
        "confirmed": type(None),
    }


def test_a_worker_answers_for_both_its_directions() -> None:
    verdict = Step().flag(1, A, 0, [0, 1]).flag(0, G, 0, [2]).judge()
    assert verdict.flagged == Counter({Worker(1, 0): 3})


@pytest.mark.parametrize("flags", range(1, 5))
@pytest.mark.parametrize("tainted", range(4))
@pytest.mark.parametrize("direction", Direction)
def test_suspects_are_out_of_line_in_half_of_a_directions_verified_signals(direction: Direction, tainted: int, flags: int) -> None:
    verified = MICRO_BATCHES - tainted
    flags = min(flags, verified)
    step = Step().taint(1, direction, 0, ALL[:tainted]).flag(1, direction, 0, ALL[tainted : tainted + flags])
    sender = Boundary(1, direction).sender
    assert step.judge().suspects == ({Worker(sender, 0)} if flags >= verified / 2 else set())


def test_flags_of_two_directions_do_not_add_up_to_a_suspect() -> None:
    assert not Step().flag(1, A, 0, [0]).flag(0, G, 0, [1]).judge().suspects


def test_a_worker_of_which_nothing_could_be_verified_is_neither_suspect_nor_verified() -> None:
    verdict = Step().taint(1, A, 0, ALL).taint(0, G, 0, ALL).judge()
    assert Worker(1, 0) not in verdict.suspects | verdict.verified
    assert not verdict.flagged
    one_direction = Step().taint(1, A, 0, ALL).judge()
    assert Worker(1, 0) in one_direction.verified


# --- What is learned from


def test_honest_is_what_is_neither_tainted_nor_flagged() -> None:
    verdict = Step().flag(1, A, 0, [2]).taint(2, A, 0, [2]).taint(1, G, 0, [2]).judge()
    # The other gradients were not tainted here, but come behind what was flagged.
    expected = np.ones((6, 3, MICRO_BATCHES), dtype=bool)
    expected[1:, 0, 2] = False
    np.testing.assert_array_equal(verdict.honest.numpy(), expected)


# --- The cascade


@pytest.mark.parametrize("first", range(6))
def test_only_the_first_on_the_way_is_blamed(first: int) -> None:
    # In a run that only reports nothing is tainted, and what one worker sends spoils all that comes behind it.
    step = Step(replicas=5)
    order = causal_order(step.mesh)
    for index in order[first:]:
        boundary = step.mesh.boundaries[index]
        step.flag(boundary.index, boundary.direction, 2, ALL)
    for verdict in (step.judge(exclude=False), step.with_peers(exclude=False)):
        culprit = Worker(step.mesh.boundaries[order[first]].sender, 2)
        assert set(verdict.flagged) == verdict.suspects == {culprit}
        assert not verdict.honest[order[first:], 2].any() and verdict.honest[order[:first], 2].all()
        assert verdict.honest[:, [0, 1, 3, 4]].all()


def test_what_is_out_among_peers_need_not_have_been_flagged_and_the_other_way_round() -> None:
    step = Step(replicas=5).flag(0, A, 1, ALL)
    step._column("score")[0, 1] = 0.5  # Compared with others it is in line.
    step._column("score")[1, 2] = 3.0  # Compared with others it is not.
    verdict = step.with_peers()
    assert verdict.suspects == {Worker(1, 2)} and verdict.honest[0, 1].all() and not verdict.honest[1, 2].any()
    assert dirty(verdict) == {(stage, 1, m) for stage in range(4) for m in ALL}


def test_who_drifts_is_a_suspect_and_explains_what_is_behind() -> None:
    step = Step(replicas=5).flag(2, A, 3, ALL)
    drifting = torch.zeros(6, 5, dtype=torch.bool)
    drifting[1, 3] = True
    verdict = step.with_peers(drifting=drifting)
    assert verdict.suspects == {Worker(1, 3)} and verdict.flagged == Counter({Worker(1, 3): MICRO_BATCHES})


@pytest.mark.parametrize(("score", "blamed"), [(1.5, False), (3.0, True)])
def test_a_sender_in_doubt_explains_what_is_slightly_odd_behind_it(score: float, blamed: bool) -> None:
    step, doubt = Step(replicas=5).flag(2, A, 3, ALL, score=score), torch.zeros(6, 5)
    doubt[0, 3] = DOUBT + 0.1
    verdict = judge(SignalTable(step.rows), compared(SignalTable(step.rows), step.live), doubt, step.mesh, step.wiring, 7, True)
    assert verdict.suspects == ({Worker(2, 3)} if blamed else frozenset())
    # Neither who is in doubt nor who is behind it teaches anything, and the latter has proven nothing.
    assert not verdict.honest[:, 3].any() and verdict.honest[:, :3].all()
    assert (Worker(2, 3) in verdict.verified) == blamed and Worker(0, 3) in verdict.verified


@pytest.mark.parametrize(("score", "blamed"), [(1.9, False), (2.1, True)])
def test_nobody_is_blamed_for_what_honest_workers_do_every_now_and_then(score: float, blamed: bool) -> None:
    step = Step(replicas=5).flag(1, A, 3, ALL, score=score)
    verdict = step.with_peers(lambda table, live: compared(table, live)._replace(typical=torch.full((len(step.rows),), 2.0)))
    assert verdict.suspects == ({Worker(1, 3)} if blamed else frozenset())
    # And it is learned from, so that fences widen where they are too narrow.
    assert bool(verdict.honest.all()) == (not blamed)


def with_doubtful_peers(step: Step, *, quorum: bool) -> StepVerdict:
    """Compared with others of which some are remembered: fewer than half if there is a ``quorum``."""
    boundaries = len(step.rows)
    changes = {"quorum": torch.full((boundaries,), quorum), "certain": torch.zeros(boundaries, dtype=torch.bool)}
    return step.with_peers(lambda table, live: compared(table, live)._replace(**changes))


@pytest.mark.parametrize(("score", "quorum", "blamed"), [(1.5, False, False), (3.0, False, True), (1.5, True, True)])
def test_among_a_few_only_what_is_far_out_is_blamed(score: float, quorum: bool, blamed: bool) -> None:
    verdict = with_doubtful_peers(Step(replicas=5).flag(1, A, 3, ALL, score=score), quorum=quorum)
    assert verdict.suspects == ({Worker(1, 3)} if blamed else frozenset())
    # What is left open says nothing of its sender, and nothing is learned from it or from what is behind it.
    assert (Worker(1, 3) in verdict.verified) == blamed
    assert not verdict.honest[[1, 2, 3, 4, 5], 3].any() and verdict.honest[0].all()
    # But it is the word of its sender, which others are compared with; what is behind it is nobody's.
    assert bool(verdict.heard[1, 3].all()) == bool(verdict.heard[1, 3].any()) == (not blamed)
    assert not verdict.heard[[2, 3, 4, 5], 3].any() and verdict.heard[:, :3].all()


@pytest.mark.parametrize("quorum", [True, False])
def test_what_a_few_have_in_common_is_nobodys_fault_and_teaches_nothing(quorum: bool) -> None:
    step = Step(replicas=5, score=2.5).flag(1, A, 3, ALL, score=30.0)
    verdict = with_doubtful_peers(step, quorum=quorum)
    assert verdict.suspects == {Worker(1, 3)} and not verdict.honest.any()


@pytest.mark.parametrize(("score", "teaches"), [(0.5, True), (0.9, False)])
def test_who_nearly_is_out_among_a_few_teaches_nothing(score: float, teaches: bool) -> None:
    verdict = with_doubtful_peers(Step(replicas=5, score=score), quorum=True)
    assert not verdict.flagged and bool(verdict.honest[0].all()) == bool(verdict.honest[0].any()) == teaches


def test_blame_follows_the_wiring() -> None:
    step = Step(replicas=5).flag(1, A, 0, ALL)
    serving = ((0, 1, 2, 3, 4), (4, 1, 2, 3, 0), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4))
    table = SignalTable(step.rows)
    nobody = torch.zeros(6, 5)
    wiring = dataclasses.replace(Wiring.of(step.mesh), serving=serving)
    verdict = judge(table, compared(table, step.live), nobody, step.mesh, wiring, 7, True)
    assert verdict.suspects == set(verdict.flagged) == {Worker(1, 4)} == {d.worker for d in verdict.detections}
