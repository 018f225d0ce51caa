from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import COLUMNS, Detection, SignalTable, StepVerdict, judge, judge_with_audits
from lightning_sentinel.verification.audit import causal_order
from lightning_sentinel.verification.drift import ALARM, ALARM_WITHOUT_AUDITS, DOUBT
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.wiring import Wiring
from tests.verification.tools import as_received, compared

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
        return self.with_peers(as_received, exclude=exclude, step=step)

    def with_peers(
        self, assess: Any = compared, *, exclude: bool = True, step: int = 7, drifting: Tensor | None = None
    ) -> StepVerdict:
        """By default as if all signals had been compared with those of the other replicas."""
        table = SignalTable(self.rows)
        heights = self.heights(ALARM_WITHOUT_AUDITS + 1, drifting)
        return judge(table, assess(table, self.live), heights, self.mesh, self.wiring, step, exclude)

    def audited(
        self, lies: Tensor, drawn: Tensor | None = None, drifting: Tensor | None = None
    ) -> tuple[StepVerdict, list[Tensor]]:
        """The verdict where an audit knows the lies ``(boundaries, lanes, micro_batches)``, and what it was asked in order."""
        table, asked = SignalTable(self.rows), [torch.zeros(0)] * len(self.rows)

        def audit(index: int, signals: Tensor) -> Tensor:
            assert asked[index].numel() == 0, "asked twice"
            asked[index] = signals.clone()
            return lies[index]  # also of signals that nobody asked about, which must not count

        drawn = torch.zeros_like(lies) if drawn is None else drawn
        heights = self.heights(ALARM + 1, drifting)
        return judge_with_audits(table, compared(table, self.live), heights, drawn, audit, self.mesh, self.wiring, 7), asked

    def heights(self, height: float, drifting: Tensor | None) -> Tensor:
        """Cumulative sums ``(boundaries, lanes)``: zero but for those that drift."""
        return torch.zeros(self.rows.shape[:2]) if drifting is None else height * drifting

    @property
    def wiring(self) -> Wiring:
        return Wiring(Wiring.fixed(self.mesh).serving, tuple(self.live.tolist()))


ALL = list(range(MICRO_BATCHES))


def dirty(verdict: StepVerdict) -> set[tuple[int, int, int]]:
    """``(stage, replica, micro_batch)`` of the gradients that do not count."""
    return {tuple(entry) for entry in (~verdict.clean).nonzero().tolist()}


# --- What is left out


def test_nothing_flagged_nothing_happens() -> None:
    verdict = Step().judge()
    assert verdict.detections == () and not verdict.flagged and not verdict.suspects
    assert not dirty(verdict) and verdict.honest.all() and not verdict.cleared.any() and not verdict.guilty and verdict.audits == 0
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


@st.composite
def steps(draw: st.DrawFn, fewest_stages: int = 1) -> Step:
    step = Step(draw(st.integers(fewest_stages, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)))
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


def first_of_each_micro_batch(out: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """What is blamed, and what lies behind it: followed along the way of each micro-batch by hand."""
    blamed, behind = np.zeros_like(out), np.zeros_like(out)
    path = [Boundary(i, A) for i in range(mesh.stages - 1)] + [Boundary(i, G) for i in reversed(range(mesh.stages - 1))]
    for lane, m in np.ndindex(out.shape[1:]):
        found = False
        for boundary in path:
            at = mesh.boundaries.index(boundary), lane, m
            behind[at], blamed[at] = found, out[at] and not found
            found = found or bool(out[at])
    return blamed, behind


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
    assert not verdict.cleared.any() and not verdict.guilty

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
    wiring = Wiring(serving, (True,) * 5)
    verdict = judge(table, compared(table, step.live), nobody, step.mesh, wiring, 7, True)
    assert verdict.suspects == set(verdict.flagged) == {Worker(1, 4)} == {d.worker for d in verdict.detections}


# --- Audits


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
    suspected[..., 0] = drifting
    wanted = valid & ((score > 1) | drawn | suspected)
    audited = torch.from_numpy(followed_by_hand(step, wanted, drawn | suspected, lies))
    lied, behind = first_of_each_micro_batch((audited & lies).numpy(), mesh)
    assert torch.equal(torch.stack(asked), audited)
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
    cleared = [[audited[i, lane].any() and not lied[i, lane].any() for lane in range(mesh.replicas)] for i in range(len(lies))]
    assert verdict.cleared.tolist() == cleared
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
    found = torch.stack(asked)
    assert found[0, 1, 2] and found[2, 1, 2] == asked_again and not found[4, 1, 2]
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
    # Boundary 1 drifts, of which its first micro-batch tells; micro-batch 3 is first odd there, and followed to boundary 2.
    assert [torch.stack(asked)[index, 1].tolist() for index in range(3)] == [
        [True, False, True, False],
        [True, False, False, True],
        [False, False, True, False],
    ]


def test_one_audit_tells_why_a_sender_drifts() -> None:
    drifting = torch.zeros(6, 3, dtype=torch.bool)
    drifting[1, 2] = True
    verdict, asked = Step().audited(torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool), drifting=drifting)
    assert verdict.audits == 1 and asked[1][2].tolist() == [True, False, False, False]
    assert torch.equal(verdict.cleared, drifting) and [d.confirmed for d in verdict.detections] == [False]


def test_a_banned_lane_is_not_audited() -> None:
    step, everything = Step().ban(1), torch.ones(6, 3, MICRO_BATCHES, dtype=torch.bool)
    verdict, asked = step.audited(everything, drawn=everything)
    assert not torch.stack(asked)[:, 1].any() and verdict.guilty == {Worker(0, 0), Worker(0, 2)}
    assert verdict.audits == 2 * MICRO_BATCHES


def test_a_mesh_of_one_stage_has_nothing_to_audit() -> None:
    verdict, _ = Step(stages=1).audited(torch.zeros(0, 3, MICRO_BATCHES, dtype=torch.bool))
    assert verdict.audits == 0 and verdict.clean.all()
