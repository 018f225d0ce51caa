from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import COLUMNS, Detection, SignalTable, StepVerdict, judge
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.verifier import MAX_SCORE

MICRO_BATCHES = 4
A, G = Direction.ACTIVATION, Direction.GRADIENT


class Step:
    """A table written by hand: every signal honest, but those that are set."""

    def __init__(self, stages: int = 4, replicas: int = 3, micro_batches: int = MICRO_BATCHES, score: float = 0.4) -> None:
        self.mesh = Mesh(stages, replicas)
        self.rows = torch.zeros(len(self.mesh.boundaries), replicas, micro_batches, len(COLUMNS))
        self._column("score").fill_(score)
        self._column("positions").fill_(6)
        self.live = torch.ones(replicas, dtype=torch.bool)

    def _column(self, name: str) -> Tensor:
        return self.rows[..., COLUMNS.index(name)]

    def _at(self, index: int, direction: Direction) -> int:
        return self.mesh.boundaries.index(Boundary(index, direction))

    def flag(
        self, index: int, direction: Direction, replica: int, micro_batches: list[int], score: float = 50.0, worst: int = 1
    ) -> Step:
        for micro_batch in micro_batches:
            at = self._at(index, direction), replica, micro_batch
            for name, value in (("score", score), ("worst", worst), ("flagged", 1)):
                self._column(name)[at] = value
        return self

    def flag_non_finite(self, index: int, direction: Direction, replica: int, micro_batches: list[int]) -> Step:
        return self.flag(index, direction, replica, micro_batches, score=MAX_SCORE, worst=-1)

    def taint(self, index: int, direction: Direction, replica: int, micro_batches: list[int], score: float = 30.0) -> Step:
        for micro_batch in micro_batches:
            at = self._at(index, direction), replica, micro_batch
            for name, value in (("score", score), ("flagged", 0), ("tainted", 1)):
                self._column(name)[at] = value
        return self

    def ban(self, replica: int) -> Step:
        """Leave a pipeline out: all its signals are tainted from the start."""
        self.live[replica] = False
        for boundary in self.mesh.boundaries:
            self.taint(boundary.index, boundary.direction, replica, list(range(self.rows.shape[2])))
        return self

    def judge(self, *, exclude: bool = True, step: int = 7) -> StepVerdict:
        return judge(SignalTable(self.rows), self.mesh, self.live, step, exclude)


ALL = list(range(MICRO_BATCHES))


def dirty(verdict: StepVerdict) -> set[tuple[int, int, int]]:
    """``(stage, replica, micro_batch)`` of the gradients that do not count."""
    return {tuple(entry) for entry in (~verdict.clean).nonzero().tolist()}


# --- What is left out


def test_nothing_flagged_nothing_happens() -> None:
    verdict = Step().judge()
    assert verdict.detections == () and not verdict.flagged and not verdict.suspects
    assert not dirty(verdict) and verdict.honest.all() and not verdict.cleared.any()
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
    assert verdict.cleared[1].all()
    assert not verdict.clean.any()


# --- Who is blamed


def test_what_a_detection_says() -> None:
    verdict = Step().flag(1, A, 2, [3], score=12.5, worst=2).flag(0, G, 1, [0], score=9.0, worst=3).judge(step=41)
    assert verdict.detections == (
        Detection(41, 3, Worker(1, 2), A, 12.5, "sign_flip_ratio", audited=False, confirmed=None),
        Detection(41, 0, Worker(1, 1), G, 9.0, "log_sliced_wasserstein", audited=False, confirmed=None),
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
    expected = np.ones((6, 3, MICRO_BATCHES), dtype=bool)
    expected[1, 0, 2] = expected[2, 0, 2] = expected[4, 0, 2] = False
    np.testing.assert_array_equal(verdict.honest.numpy(), expected)


# --- What is cleared


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_a_change_of_the_training_clears_everybody(replicas: int) -> None:
    step, rng = Step(replicas=replicas), np.random.default_rng(0)
    for replica in range(replicas):
        for m in ALL:
            step.flag(1, G, replica, [m], score=rng.uniform(3.0, 4.0))
    verdict = step.judge()
    assert verdict.cleared[4].all() and verdict.cleared.sum() == replicas * MICRO_BATCHES
    assert verdict.detections == () and not verdict.flagged and not verdict.suspects
    assert verdict.honest.all()


def test_a_change_of_the_training_does_not_hide_who_is_further_out() -> None:
    step = Step(replicas=5)
    for replica in range(5):
        step.flag(0, A, replica, ALL, score=3.0)
    verdict = step.flag(0, A, 4, ALL, score=6.1).judge()
    assert verdict.suspects == {Worker(0, 4)} and verdict.flagged == Counter({Worker(0, 4): MICRO_BATCHES})
    assert verdict.cleared[0, :4].all() and not verdict.cleared[0, 4].any()


def test_one_boundary_says_nothing_about_another() -> None:
    step = Step()
    for replica in range(3):
        step.flag(0, A, replica, ALL, score=5.0)
    verdict = step.flag(1, A, 0, ALL, score=5.0).flag(0, G, 1, ALL, score=5.0).judge()
    assert verdict.suspects == {Worker(1, 0), Worker(1, 1)}
    assert verdict.cleared[0].all() and not verdict.cleared[1:].any()


@pytest.mark.parametrize("replicas", [3, 4, 7])
def test_an_honest_false_positive_does_not_clear_an_attacker(replicas: int) -> None:
    verdict = Step(replicas=replicas).flag(1, A, 0, ALL, score=9.0).flag(1, A, 1, [2], score=6.0).judge()
    assert Counter({Worker(1, 0): MICRO_BATCHES, Worker(1, 1): 1}) == verdict.flagged
    assert verdict.suspects == {Worker(1, 0)}
    assert not verdict.cleared.any()


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
    assert verdict.cleared[1, replica].all() == cleared and verdict.cleared.any() == cleared
    assert verdict.suspects == (set() if cleared else {Worker(1, replica)})


def test_one_pipeline_is_not_cleared_by_its_own_median() -> None:
    verdict = Step(replicas=1).flag(0, G, 0, ALL, score=50.0).judge()
    assert not verdict.cleared.any() and verdict.suspects == {Worker(1, 0)}


@pytest.mark.parametrize("direction", Direction)
def test_a_sender_whose_peers_are_all_tainted_has_nobody_to_be_compared_with(direction: Direction) -> None:
    # One malicious worker in each of three stages, each in another pipeline: a minority everywhere. The third one's peers are
    # tainted by the first two, and it must not be the median itself.
    step = Step(stages=4, replicas=3).taint(1, direction, 0, ALL).taint(1, direction, 1, ALL)
    verdict = step.flag(1, direction, 2, ALL, score=50.0).judge()
    assert not verdict.cleared.any()
    assert verdict.suspects == {Worker(Boundary(1, direction).sender, 2)}
    assert not verdict.honest[step._at(1, direction), 2].any()


def test_two_pipelines() -> None:
    both = Step(replicas=2).flag(1, A, 0, ALL, score=4.0).flag(1, A, 1, ALL, score=3.0).judge()
    assert both.cleared[1].all() and not both.flagged
    # As many attacking as honest signals: the lower of the two middle ones is honest, were it a false positive.
    one = Step(replicas=2).flag(1, A, 0, ALL, score=4.0).flag(1, A, 1, [0], score=1.2).judge()
    assert not one.cleared[1, 0].any() and one.suspects == {Worker(1, 0)}


def test_banned_senders_and_tainted_signals_do_not_move_the_median() -> None:
    step = Step(replicas=5).ban(0).taint(1, A, 1, ALL[1:], score=80.0).taint(1, A, 2, ALL, score=80.0)
    verdict = step.flag(1, A, 3, ALL, score=50.0).judge()
    assert verdict.suspects == {Worker(1, 3)} and not verdict.cleared.any()


def test_a_sender_that_is_verified_more_often_does_not_outvote_the_others() -> None:
    step = Step().taint(1, A, 0, ALL[1:]).taint(1, A, 1, ALL[1:])
    verdict = step.flag(1, A, 2, ALL, score=50.0).judge()
    assert verdict.suspects == {Worker(1, 2)} and not verdict.cleared.any()


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
    assert not verdict.cleared.any() and not verdict.honest[1, 2].any()
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


@st.composite
def steps(draw: st.DrawFn) -> Step:
    step = Step(draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    for boundary in step.mesh.boundaries:
        for replica in range(step.mesh.replicas):
            for m in range(step.rows.shape[2]):
                where = boundary.index, boundary.direction, replica, [m]
                kind = rng.choice(["honest", "flag", "broken", "taint"], p=[1 - share, share / 2, share / 4, share / 4])
                if kind == "flag":
                    step.flag(*where, score=float(rng.lognormal(1.0, 1.0) + 1.01), worst=int(rng.integers(len(FEATURES))))
                elif kind == "broken":
                    step.flag_non_finite(*where)
                    step.rows[step._at(*where[:2]), replica, m, : len(FEATURES)] = torch.nan
                elif kind == "taint":
                    step.taint(*where, score=float(rng.choice([0.1, 5.0, MAX_SCORE])))
    for replica in draw(st.sets(st.integers(0, step.mesh.replicas - 1), max_size=step.mesh.replicas - 1)):
        step.ban(replica)
    return step


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
    leave out half of *all* replicas from the top. 1.5 where nobody is left, or there is nobody else."""
    score, flagged, tainted = (step.rows[..., COLUMNS.index(name)].numpy() for name in ("score", "flagged", "tainted"))
    cleared = np.zeros(score.shape, dtype=bool)
    for index in range(len(score)):
        medians = []
        for replica in step.live.nonzero().flatten().tolist():
            verified = score[index, replica][tainted[index, replica] == 0]
            if len(verified):
                medians.append(sorted(verified)[(len(verified) - 1) // 2])
        replicas = len(step.live)
        trusted = sorted(medians)[: len(medians) - replicas // 2] if len(medians) > replicas // 2 else []
        limit = 2 * trusted[-1] if trusted and replicas > 1 else 1.5
        cleared[index] = (flagged[index] > 0) & (score[index] <= limit)
    return cleared


@settings(derandomize=True, deadline=None, max_examples=150)
@given(step=steps(), exclude=st.booleans())
def test_any_table_has_a_verdict(step: Step, exclude: bool) -> None:
    mesh, before = step.mesh, step.rows.clone()
    verdict, again = step.judge(exclude=exclude), step.judge(exclude=exclude)
    for field in dataclasses.fields(StepVerdict):
        one, other = getattr(verdict, field.name), getattr(again, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, field.name
    assert torch.equal(before.nan_to_num(), step.rows.nan_to_num())

    flagged, tainted, worst = (step.rows[..., COLUMNS.index(name)].numpy() for name in ("flagged", "tainted", "worst"))
    for tensor in (verdict.cleared, verdict.honest):
        assert (tensor.shape, tensor.dtype) == (flagged.shape, torch.bool)
    cleared, honest = verdict.cleared.numpy(), verdict.honest.numpy()
    assert not (cleared & (flagged == 0)).any()
    np.testing.assert_array_equal(cleared, cleared_by_hand(step))
    np.testing.assert_array_equal(honest, (tainted == 0) & ((flagged == 0) | cleared) & (worst >= 0))

    expected = clean_by_hand(step) if exclude else np.ones((mesh.stages, *flagged.shape[1:]), dtype=bool)
    np.testing.assert_array_equal(verdict.clean.numpy(), expected)
    assert not exclude or not verdict.clean[:, ~step.live].any()

    standing = [
        (boundary, replica, m)
        for index, boundary in enumerate(mesh.boundaries)
        for replica, m in np.ndindex(flagged.shape[1:])
        if flagged[index, replica, m] and not cleared[index, replica, m]
    ]
    assert [(d.worker, d.direction, d.micro_batch) for d in verdict.detections] == [
        (Worker(boundary.sender, replica), boundary.direction, m) for boundary, replica, m in standing
    ]
    assert verdict.flagged == Counter(Worker(boundary.sender, replica) for boundary, replica, _ in standing)
    assert verdict.suspects <= set(verdict.flagged) <= verdict.verified <= set(mesh.workers)
