from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.verification import Ledger
from lightning_sentinel.wiring import Wiring
from tests.pipeline.pipelines import (
    CHANNELS,
    MESH,
    MICRO_BATCHES,
    POSITIONS,
    REPLICAS,
    SAMPLES,
    WARMUP,
    A,
    G,
    Pipelines,
    broken,
    same,
)

# --- Audits


def audited(rate: float = 1e-9, **options: Any) -> Response:
    return Response(**{"audit_rate": rate, **options})


def test_with_audits_signals_go_on_as_they_are_until_the_step_is_settled() -> None:
    pipelines = Pipelines(audited(on_flag="log", ban_after=None)).run(2)
    guard = pipelines.guard
    assert guard.audits and not guard.excludes
    pipelines.draw()
    pipelines.attempt(broken({Worker(0, 1)}, A))
    assert all(went_on is given for given, went_on in pipelines.received)
    assert not pipelines.table.tainted.any()


@pytest.mark.parametrize("steps_before", [0, 1, WARMUP + 3])
def test_one_lie_has_the_step_done_again_without_the_liar_and_a_second_one_bans(steps_before: int) -> None:
    pipelines, culprit = Pipelines(audited()).run(steps_before), Worker(1, 2)
    tamper = broken({culprit}, A)
    before = {name: value.clone() for name, value in pipelines.guard.state_dict().items()}
    for banned in ([], [culprit]):
        learned = pipelines.guard.calibration.steps
        pipelines.asked.clear()
        pipelines.draw()
        ruling = pipelines.attempt(tamper)
        assert (ruling.redo, ruling.excluded, ruling.banned, ruling.verdict.guilty) == (True, [culprit], banned, {culprit})
        # Replica 2 of stage 1 is the first on the way, so that nothing behind it was audited; and all others of its stage said so.
        asked = [(MESH.boundaries[index], juror) for index, case, juror in pipelines.asked if case.lane == 2]
        assert asked.count((Boundary(1, A), Worker(1, 0))) == asked.count((Boundary(1, A), Worker(1, 1))) == MICRO_BATCHES
        assert {boundary for boundary, _ in asked} <= {Boundary(0, A), Boundary(1, A)}
        if not banned:
            assert same(before, pipelines.guard.state_dict()), "nothing is learned of a step that is done again"
        wiring = pipelines.planned().wiring
        assert wiring == Wiring.of(MESH, {culprit}, MICRO_BATCHES, turn=pipelines.step_number // 16) and wiring.live == (
            True,
            True,
            False,
        )
        assert pipelines.planned(pipelines.step_number + 1).wiring.live == ((True, True, False) if banned else (True, True, True))
        pipelines.draw()
        again = pipelines.attempt(tamper)
        assert not again.excluded and again.banned == [] and again.verdict.clean[:, wiring.lanes].all()
        assert pipelines.guard.calibration.steps == learned + 1
        pipelines.step_number += 1
    assert all(verifier.references.updates == steps_before + 2 for verifier in pipelines.guard.verifiers.values())
    assert pipelines.guard.ledger.banned_at == {culprit: steps_before + 1}


def test_a_liar_strikes_once_a_step_however_much_of_it_is_found() -> None:
    pipelines, culprits = Pipelines(audited()), [Worker(0, 1), Worker(1, 2)]
    found = []
    for _ in range(2):
        pipelines.draw()
        found.append(pipelines.attempt(broken(culprits)).excluded)
    assert found == [culprits, []]
    assert pipelines.guard.ledger.strikes == dict.fromkeys(culprits, 1) and not pipelines.guard.ledger.banned


def test_jurors_that_say_the_opposite_are_outvoted_and_asked_no_more() -> None:
    pipelines, liar = Pipelines(audited(1.0)), Worker(1, 2)
    pipelines.false_jurors = {liar}
    for _ in range(4):
        pipelines.draw()
        ruling = pipelines.attempt()
        assert not ruling.excluded and not ruling.banned and not ruling.verdict.detections
        pipelines.asked.clear()
    pipelines.draw()
    pipelines.attempt()
    assert pipelines.guard.ledger.muted == {liar: 0} and all(juror != liar for _, _, juror in pipelines.asked)


def test_two_workers_of_whom_each_says_that_the_other_lies_cost_the_batch_and_nobody_is_banned() -> None:
    pipelines, pair = Pipelines(audited(1.0)), [Worker(1, 0), Worker(1, 1)]
    pipelines.guard.ledger.ban(0, [Worker(1, 2)])
    pipelines.false_jurors = {pair[0], pair[1]}
    pipelines.draw()
    ruling = pipelines.attempt()
    assert (ruling.excluded, ruling.redo, ruling.banned) == (pair, False, [])
    assert ruling.verdict.disputed == set(pair) and not ruling.verdict.guilty and not pipelines.guard.ledger.muted
    # The next step is everybody's again.
    pipelines.step_number += 1
    pipelines.false_jurors = set()
    assert pipelines.step()[1] == []


def test_flags_that_an_audit_drops_are_counted_as_exonerated_and_learned_from() -> None:
    pipelines = Pipelines(audited()).run(WARMUP + 6)
    ledger, calibration = pipelines.guard.ledger, pipelines.guard.calibration
    exonerated, audits, flags = ledger.exonerated.total(), ledger.audits, ledger.total_flags
    pipelines.pattern = 3 * pipelines.pattern
    places = calibration.alone.places.clone()
    verdict, banned = pipelines.step()
    dropped = [detection for detection in verdict.detections if detection.confirmed is False]
    assert len(dropped) == len(verdict.detections) > REPLICAS and banned == [] and not ledger.banned
    assert ledger.exonerated.total() - exonerated == len(dropped) and ledger.total_flags == flags
    assert ledger.audits - audits == verdict.audits >= len(dropped)
    assert verdict.honest.all()
    size = calibration.alone.values.shape[1]
    assert ((calibration.alone.places - places) % size == REPLICAS * MICRO_BATCHES).all()


def test_a_rate_of_one_finds_what_no_feature_shows() -> None:
    culprit = Worker(1, 0)

    def slightly(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        return 1.01 * signal if worker == culprit else signal

    pipelines = Pipelines(audited(1.0))
    pipelines.draw()
    ruling = pipelines.attempt(slightly)
    assert ruling.excluded == [culprit] and ruling.redo
    assert ruling.verdict.audits < len(MESH.boundaries) * REPLICAS * MICRO_BATCHES


def test_a_run_that_bans_nobody_reports_what_audits_find_and_is_not_done_again() -> None:
    pipelines = Pipelines(audited(on_flag="log", ban_after=None)).run(2)
    verdict, banned = pipelines.step(broken({Worker(1, 1)}, A))
    assert verdict.guilty == {Worker(1, 1)} and banned == [] and not pipelines.guard.ledger.banned
    assert not verdict.honest[1:, 1].any()


def test_a_stage_that_all_lies_costs_the_batch_and_not_the_run() -> None:
    pipelines = Pipelines(audited())
    everyone = {Worker(1, replica) for replica in range(REPLICAS)}
    for _ in range(3):
        everyone -= pipelines.guard.ledger.banned
        pipelines.draw()
        ruling = pipelines.attempt(broken(everyone, A))
        assert ruling.excluded == sorted(everyone) and not ruling.redo
        pipelines.step_number += 1
    assert len(pipelines.guard.ledger.banned) == 1


@pytest.mark.parametrize("response", [Response(audit_rate=None), audited()], ids=["flags", "audits"])
def test_the_wiring_follows_from_the_bans(response: Response) -> None:
    pipelines = Pipelines(response)
    for banned in (set(), {Worker(1, 0)}, {Worker(1, 0), Worker(2, 1)}):
        pipelines.guard.ledger.banned_at = dict.fromkeys(banned, 0)
        assert pipelines.planned(5).wiring == Wiring.of(MESH, banned, MICRO_BATCHES)
        assert pipelines.planned(20).wiring == Wiring.of(MESH, banned, MICRO_BATCHES, turn=1)


def test_a_step_of_which_every_sender_is_mixed_leaves_the_momentum_where_it_was() -> None:
    pipelines = mixed_step()[0]
    assert all(verifier.references.momentum.value.isfinite().all() for verifier in pipelines.guard.verifiers.values())


def mixed_step() -> tuple[Pipelines, dict[str, Tensor]]:
    """A step in which each sender lies in one of its two micro-batches: of no sender is all of it honest."""
    pipelines = Pipelines(audited(1.0, on_flag="log", ban_after=None)).run(3)
    before = {name: value.clone() for name, value in pipelines.guard.verifiers[Boundary(0, A)].state_dict().items()}
    sent = dict.fromkeys(MESH.workers, 0)

    def half(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        if worker.stage == 0 and direction is A:
            sent[worker] += 1
            return signal + 1.0 if sent[worker] == 1 else signal
        return signal

    verdict, _ = pipelines.step(half)
    assert verdict.honest[0, :, 1].all() and not verdict.honest[0, :, 0].any()
    return pipelines, before


def test_a_step_of_which_every_sender_is_mixed_teaches_nothing() -> None:
    pipelines, before = mixed_step()
    assert same(before, pipelines.guard.verifiers[Boundary(0, A)].state_dict())


def test_a_worker_that_takes_over_a_lane_does_not_take_over_its_drift() -> None:
    pipelines = Pipelines(Response(audit_rate=None)).run(WARMUP + 1)
    guard = pipelines.guard
    guard.ledger.ban(0, [Worker(0, 0), Worker(1, 1)])
    guard.ledger.shuffled_at = None
    wiring = pipelines.planned().wiring
    assert wiring.serving[1] == (1, 0, 2) and wiring.live == (False, True, True)
    # The sum that had Worker(1, 1) banned; Worker(1, 0) serves its lane now.
    guard.calibration.drift.sums[0, MESH.boundaries.index(Boundary(1, A)), 1, 0] = 20.0
    verdict, banned = pipelines.step()
    assert Worker(1, 0) not in verdict.suspects and banned == []


@pytest.mark.parametrize("response", [Response(ban_after=1, audit_rate=None), audited()], ids=["flags", "audits"])
def test_what_is_found_clears_those_behind_the_liar_of_their_sums(response: Response) -> None:
    pipelines = Pipelines(response).run(WARMUP)
    drift, at = pipelines.guard.calibration.drift, {b: i for i, b in enumerate(MESH.boundaries)}
    drift.sums[0, :, :, 3] = 7.0
    pipelines.draw()
    ruling = pipelines.attempt(broken({Worker(1, 2)}, A))
    assert Worker(1, 2) in (*ruling.banned, *ruling.excluded)
    for boundary in MESH.boundaries:
        behind = boundary.direction is G or boundary.index > 1
        assert (drift.height[at[boundary], 2] < 5) == behind
        assert (drift.height[at[boundary], [0, 1]] > 5).all()


# --- What is drawn


def test_what_is_drawn_follows_from_the_secret_and_the_step_whatever_was_before() -> None:
    original, loaded = Pipelines(audited(0.07)).run(9), Pipelines(audited(0.07))
    loaded.guard.load_state_dict(original.guard.state_dict())
    drawn = []
    for pipelines in (original, loaded):
        pipelines.step_number = 9
        pipelines.asked.clear()
        pipelines.generator.manual_seed(5)
        pipelines.run(20)
        drawn.append(pipelines.asked)
    assert drawn[0] == drawn[1] and len(drawn[0]) > 5


def test_where_a_lie_was_found_more_is_drawn_when_the_step_is_done_again() -> None:
    pipelines, drawn = Pipelines(audited(0.2)), []
    for _ in range(2):
        pipelines.asked.clear()
        pipelines.draw()
        pipelines.attempt(broken({Worker(1, 1)}))
        drawn.append(pipelines.audited())
    first, again = drawn
    assert again.sum() > first.sum()


def test_what_the_senders_had_received_is_projected_by_the_method_that_uses_it() -> None:
    signal = torch.ones(SAMPLES, POSITIONS, CHANNELS)
    for method in ("sentinel", "paper"):
        config = Verification(method=method)
        guard = Guard(MESH, MESH.boundaries, None, config, Response(), Ledger(), torch.device("cpu"))
        projected = [guard.project(boundary, signal) for boundary in MESH.boundaries]
        assert guard.compares_inputs == (method == "sentinel")
        if method == "paper":
            assert projected == [None] * len(MESH.boundaries)
            continue
        assert {p.values.shape for p in projected} == {(SAMPLES, POSITIONS, CHANNELS)}
        assert {p.channels for p in projected} == {CHANNELS}
        # Along the directions of the verifier itself, which differ from boundary to boundary.
        for boundary, found in zip(MESH.boundaries, projected):
            assert torch.equal(found.values, guard.verifiers[boundary]._secret.project(signal).values)
        assert len({float(p.values[0, 0, 0]) for p in projected}) == len(MESH.boundaries)


def test_idle_workers_take_turns_of_sixteen_steps() -> None:
    pipelines = Pipelines(Response(ban_after=1, audit_rate=None))
    pipelines.guard.ledger.ban(0, [Worker(0, 0)])
    wirings = [pipelines.planned(step).wiring for step in range(3 * 16 + 1)]
    assert wirings == [Wiring.of(MESH, {Worker(0, 0)}, MICRO_BATCHES, turn=step // 16) for step in range(3 * 16 + 1)]
    assert len(set(wirings)) == 3 and wirings[0] == wirings[-1]


def test_a_ruling_says_who_served() -> None:
    pipelines, culprit = Pipelines(Response(ban_after=1, audit_rate=None)), Worker(1, 2)
    pipelines.draw()
    ruling = pipelines.attempt(broken({culprit}))
    # The worker that the step bans still served in it.
    assert ruling.banned == [culprit] and ruling.plan.wiring == Wiring.of(MESH, (), MICRO_BATCHES)
    pipelines.step_number += 1
    pipelines.draw()
    assert pipelines.attempt().plan.wiring == Wiring.of(MESH, {culprit}, MICRO_BATCHES)


def test_who_drifts_is_asked_about_one_signal_a_step_and_stays_suspected_although_it_matches() -> None:
    mesh_index = MESH.boundaries.index(Boundary(1, A))
    pipelines = Pipelines(audited()).run(WARMUP + 1)
    sums, slots = pipelines.guard.calibration.drift.sums, set()
    for _ in range(12):
        sums[0, mesh_index, 2, 3] = 17.0
        pipelines.asked.clear()
        _, banned = pipelines.step()
        (slot,) = {case.slot for index, case, _ in pipelines.asked if index == mesh_index and case.audited == Worker(1, 2)}
        slots.add(slot)
        assert banned == [] and pipelines.guard.calibration.drift.height[mesh_index, 2] > 10
    assert slots == set(range(MICRO_BATCHES)), "and nobody knows beforehand about which"
