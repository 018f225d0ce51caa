from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import Received
from lightning_sentinel.pipeline.recovery.evidence import Heard, of_audits
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.recovery.votes import VOTE_BYTES
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.evidence import Reason
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Kind, SignalId
from lightning_sentinel.trust.verify_evidence import verify_evidence
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.wiring import Wiring
from tests.pipeline.recovery.toys import (
    CHANNELS,
    LIED,
    MATCHES,
    RUN,
    SAMPLES,
    A,
    G,
    Place,
    Recompute,
    Toy,
    credentials,
    expected,
)

# --- What is kept


def test_there_is_room_for_the_largest_signal_so_far_in_a_step_without_any() -> None:
    cache = SignalCache()
    assert cache.largest == 0
    cache.begin(keeps=True)
    cache.keep_received(A, 0, torch.ones(5))
    cache.keep_sent(A, 0, torch.ones(3, dtype=torch.float64))
    cache.keep_sent(G, 1, torch.ones(2))
    assert cache.largest == 24
    cache.clear()
    assert (cache.sent, cache.received, cache.largest) == ({}, {}, 24)
    cache.keep_sent(A, 0, torch.ones(2))
    assert cache.largest == 24
    cache.keep_sent(A, 1, torch.ones(9))
    assert cache.largest == 36


def test_nothing_is_kept_of_a_step_that_nobody_audits() -> None:
    cache = SignalCache()
    cache.begin(keeps=False)
    cache.keep_sent(A, 0, torch.ones(2))
    cache.keep_received(G, 0, torch.ones(2))
    assert (cache.sent, cache.received, cache.largest) == ({}, {}, 0)


# --- Whole audits


@st.composite
def toys(draw: st.DrawFn) -> tuple[Toy, set[Place]]:
    mesh = Mesh(draw(st.integers(2, 4)), draw(st.integers(2, 4)))
    banned = draw(st.sets(st.sampled_from(mesh.workers), max_size=mesh.replicas - 1))
    wiring = Wiring.of(mesh, banned, 2)
    places = [
        (boundary, lane, slot) for boundary in mesh.boundaries for lane in wiring.lanes for slot in range(len(wiring.work[lane]))
    ]
    lies = draw(st.sets(st.sampled_from(places), max_size=4))
    return Toy(mesh, lies, banned, turn=draw(st.integers(0, 3))), lies


@settings(derandomize=True, deadline=None, max_examples=25)
@given(case=toys())
def test_lies_are_found_where_they_were_told_and_nowhere_else(case: tuple[Toy, set[Place]]) -> None:
    toy, lies = case
    everything = toy.audit(None)
    for index, boundary in enumerate(toy.mesh.boundaries):
        told = [(lane, slot) for where, lane, slot in lies if where == boundary]
        # Who has no peer left cannot be audited.
        asked = {place: toy.asked(boundary, *place) for place in told}
        # With one there nobody can tell who lies.
        found = {place: LIED if len(others) > 1 else Outcome.DISPUTED for place, others in asked.items() if others}
        assert torch.equal(everything[index], expected(toy, found))


def test_only_what_is_asked_for_is_audited() -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 3), {(boundary, lane, slot) for lane in range(3) for slot in range(2)})
    signals = torch.tensor([[True, False], [False, False], [False, True]])
    assert torch.equal(toy.audit(boundary, signals), signals.long())


@pytest.mark.parametrize("direction", [A, G])
def test_what_has_another_shape_than_it_should_is_a_lie(direction: Direction) -> None:
    toy, boundary = Toy(Mesh(3, 3)), Boundary(1 if direction is A else 0, direction)
    for stage, kept in ((boundary.sender, "sent"), (boundary.receiver, "received")):
        getattr(toy.of(stage, 1), kept)[direction, 0] = torch.ones(CHANNELS, SAMPLES)
    toy.commit(boundary, 1, 0, torch.ones(CHANNELS, SAMPLES))
    assert torch.equal(toy.audit(boundary), expected(toy, {(1, 0): LIED}))


@pytest.mark.parametrize(
    "handed",
    [
        lambda sent: sent + 1,
        lambda sent: sent.t().reshape(sent.shape),
        lambda sent: sent.view(-1),
        lambda sent: [sent],
        lambda _: None,
    ],
    ids=["other values", "another order", "another shape", "a list", "nothing"],
)
@pytest.mark.parametrize(
    ("boundary", "giver", "outcome"),
    [
        (Boundary(1, A), 0, Outcome.ACTIVATION_WITHHELD),
        (Boundary(0, G), 0, Outcome.ACTIVATION_WITHHELD),
        (Boundary(0, G), 2, Outcome.GRADIENT_WITHHELD),
        (Boundary(1, G), 1, Outcome.ACTIVATION_WITHHELD),
    ],
    ids=str,
)
@pytest.mark.parametrize("replicas", [3, 4])
def test_a_neighbour_that_hands_over_something_else_than_it_sent_is_named(
    boundary: Boundary, giver: int, outcome: Outcome, handed: Callable[[Tensor], Any], replicas: int
) -> None:
    toy = Toy(Mesh(3, replicas))
    direction = G if outcome is Outcome.GRADIENT_WITHHELD else A
    kept = toy.of(giver, 1).sent
    kept[direction, 0] = handed(kept[direction, 0])
    assert torch.equal(toy.audit(boundary), expected(toy, {(1, 0): outcome}))


@pytest.mark.parametrize("handed", [torch.zeros(SAMPLES, CHANNELS), None, [1]], ids=str)
@pytest.mark.parametrize("boundary", [Boundary(1, A), Boundary(0, G)], ids=str)
def test_a_receiver_that_hands_over_something_else_than_was_sent_is_named(boundary: Boundary, handed: Any) -> None:
    """Or it could hide a lie of its friend."""
    toy = Toy(Mesh(3, 3), {(boundary, 1, 0)})
    toy.of(boundary.receiver, 1).received[boundary.direction, 0] = handed
    assert torch.equal(toy.audit(boundary), expected(toy, {(1, 0): Outcome.SIGNAL_WITHHELD}))


@pytest.mark.parametrize("handed", [None, 3, [1, 2], [None, 4, 0.5], [[torch.ones(2, 9)], 4, 0.5]], ids=str)
def test_samples_that_nobody_can_work_on_are_told_and_blame_nobody(handed: Any) -> None:
    toy = Toy(Mesh(2, 2))
    toy.handed = handed
    with pytest.warns(UserWarning, match="could not be audited with what others gave for it"):
        assert not toy.audit(Boundary(0, A)).any()


def test_a_lie_that_was_sent_on_honestly_is_no_lie_of_the_next() -> None:
    mesh = Mesh(4, 3)
    toy = Toy(mesh, {(Boundary(0, A), 1, 0)})
    found = {boundary: toy.audit(boundary) for boundary in mesh.boundaries}
    assert [boundary for boundary, outcome in found.items() if outcome.any()] == [Boundary(0, A)]


# --- Auditors that are wrong


def wrong(honest: Recompute) -> Recompute:
    return lambda direction, part, evidence: honest(direction, part, evidence) + 1.0


@pytest.mark.parametrize(("replicas", "outcome"), [(2, Outcome.DISPUTED), (3, MATCHES), (4, MATCHES), (5, MATCHES)])
def test_a_wrong_auditor_is_outvoted_and_of_two_nobody_can_tell(replicas: int, outcome: Outcome) -> None:
    toy, boundary = Toy(Mesh(3, replicas)), Boundary(1, A)
    first = toy.asked(boundary, 0, 1)[0]
    toy.recompute[first] = wrong(toy.honest(1))
    signals = torch.zeros(replicas, 2, dtype=torch.bool)
    signals[0, 1] = True
    assert torch.equal(toy.audit(boundary, signals), expected(toy, {(0, 1): outcome}))
    assert toy.outvoted == ({toy.mesh.worker(first)} if replicas > 2 else set())


@pytest.mark.parametrize("number", [1, 2])
def test_a_witness_that_covers_up_for_a_liar_is_outvoted(number: int) -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 5), {(boundary, 2, 0)})
    # The lie is the honest signal plus one, which is what this witness says that it computed.
    toy.recompute[toy.asked(boundary, 2, 0)[number]] = wrong(toy.honest(0))
    found = expected(toy, {(2, 0): LIED})
    assert torch.equal(toy.audit(boundary, found.bool()), found)


@pytest.mark.parametrize("value", [0, 1, 3, 4, 6, 255])
def test_a_vote_that_is_none_blames_nobody(value: int) -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 2), {(boundary, 0, 0)})
    disputed = expected(toy, {(0, 0): Outcome.DISPUTED})
    says = {toy.asked(boundary, 0, 0)[0]: lambda said: torch.full_like(said, value)}
    assert torch.equal(toy.audit(boundary, disputed.bool(), says=says), expected(toy, {}))
    assert torch.equal(toy.audit(boundary, disputed.bool()), disputed)


def test_a_vote_that_its_auditor_has_not_signed_blames_nobody() -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 2), {(boundary, 0, 0)})
    signals = expected(toy, {(0, 0): LIED}).bool()

    def forged(said: Tensor) -> Tensor:
        said = said.clone()
        said[VOTE_BYTES - 1] ^= 1
        return said

    assert torch.equal(toy.audit(boundary, signals, says={toy.asked(boundary, 0, 0)[0]: forged}), expected(toy, {}))
    assert not toy.testimonies


def test_of_a_signal_about_which_its_sender_is_silent_nobody_says_anything() -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 3), {(boundary, 1, 0), (boundary, 2, 1)})
    del toy.commitments.sent[SignalId(Kind.SIGNAL, boundary, 1, 0)]
    assert torch.equal(toy.audit(boundary), expected(toy, {(2, 1): LIED}))


def test_a_signal_that_its_sender_has_not_signed_is_a_lie() -> None:
    boundary, toy = Boundary(0, A), Toy(Mesh(2, 3))
    place = SignalId(Kind.SIGNAL, boundary, 1, 0)
    toy.commitments.sent[place] = Signed(toy.commitments.sent[place].statement, bytes(64))
    assert torch.equal(toy.audit(boundary), expected(toy, {(1, 0): LIED}))


def test_of_a_lie_there_are_the_signed_words_of_all_others() -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 5), {(boundary, 2, 0)})
    liar, signals = Worker(0, 2), expected(toy, {(2, 0): LIED}).bool()
    toy.audit(boundary, signals)
    held = credentials(toy.mesh, Worker(1, 0))
    heard = Heard(toy.commitments, toy.testimonies, {}, {})
    evidence, of_nothing = of_audits(dict.fromkeys([liar, Worker(0, 1)], Reason.LIED), 3, heard, held).values()
    assert (evidence.banned, evidence.reason, len(evidence.testimonies)) == (liar, Reason.LIED, 4)
    assert verify_evidence(evidence, known=set(held.keys.values())).proves
    findings = verify_evidence(of_nothing)
    assert findings.holds and not findings.proves
    assert findings.verdict.endswith(
        "it says that worker (stage 0, replica 1) sent a signal that most workers of its stage found"
        " to be false, and nothing in it shows that."
    )


def test_where_nobody_signs_the_votes_are_a_record_and_no_proof() -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(2, 5), {(boundary, 2, 0)}, signs=False)
    liar = Worker(0, 2)
    toy.audit(boundary, expected(toy, {(2, 0): LIED}).bool())
    (evidence,) = of_audits({liar: Reason.LIED}, 3, Heard(toy.commitments, toy.testimonies, {}, {}), Credentials(RUN)).values()
    findings = verify_evidence(evidence)
    assert (len(evidence.testimonies), evidence.keys, findings.holds, findings.proves) == (4, {}, True, False)
    assert findings.verdict.startswith(
        "This is a record and no proof: nobody signed it. By what it says worker (stage 0, replica 2)"
    )
    assert "4 of 5 live workers of its stage found it to be false" in findings.verdict


@pytest.mark.parametrize("outcome", [Outcome.ACTIVATION_WITHHELD, Outcome.GRADIENT_WITHHELD, Outcome.SIGNAL_WITHHELD])
def test_of_what_was_withheld_there_are_the_words_of_those_that_did_not_get_it(outcome: Outcome) -> None:
    boundary, stage = Boundary(0, G), {Outcome.GRADIENT_WITHHELD: 2}.get(outcome, 0)
    toy = Toy(Mesh(3, 3))
    kept = toy.of(stage, 1)
    (kept.received if outcome is Outcome.SIGNAL_WITHHELD else kept.sent)[A if outcome is Outcome.ACTIVATION_WITHHELD else G, 0] = (
        None
    )
    assert torch.equal(toy.audit(boundary), expected(toy, {(1, 0): outcome}))
    guilty = toy.wiring.worker(stage, 1)
    held = credentials(toy.mesh, Worker(1, 0))
    (evidence,) = of_audits({guilty: Reason.LIED}, 3, Heard(toy.commitments, toy.testimonies, {}, {}), held).values()
    assert evidence.reason is Reason.WITHHELD
    findings = verify_evidence(evidence)
    assert findings.holds and f"it was for {guilty} to give it to them" in findings.verdict
    innocent = toy.wiring.worker(stage, 0)
    framed = replace(evidence, banned=innocent, keys={**evidence.keys, innocent: held.keys[innocent]})
    assert not verify_evidence(framed).holds


def test_who_was_not_asked_has_no_vote() -> None:
    boundary = Boundary(0, A)
    toy = Toy(Mesh(3, 2), {(boundary, 0, 0)})
    signals = torch.tensor([[True, True], [False, False]])
    asked = {toy.asked(boundary, 0, slot)[0] for slot in range(2)}
    says = {rank: (lambda said: torch.full_like(said, 3)) for rank in range(toy.mesh.size) if rank not in asked}
    assert torch.equal(toy.audit(boundary, signals, says=says), expected(toy, {(0, 0): Outcome.DISPUTED}))


def test_what_a_simulated_attacker_says_is_what_its_rank_says() -> None:
    """The votes of the adversary, in the process engine."""
    mesh, boundary = Mesh(2, 3), Boundary(0, A)
    toy, liar = Toy(mesh), Worker(0, 0)
    toy.adversary = Adversary("false_votes", mesh, workers=[liar])
    signals = expected(toy, {(2, 0): LIED, (2, 1): LIED}).bool()
    slots = [slot for slot in range(2) if toy.asked(boundary, 2, slot)[0] == mesh.rank(liar)]
    assert slots, "it is asked first of one of them at least"
    assert not toy.audit(boundary, signals).any() and toy.outvoted == {liar}


# --- After bans


def test_samples_that_only_the_audited_worker_has_come_from_itself() -> None:
    mesh, banned = Mesh(2, 3), {Worker(0, 1)}
    seen = []
    for turn in range(4):
        wiring = Wiring.of(mesh, banned, 2, turn)
        alone = [
            part
            for lane in wiring.lanes
            if wiring.worker(1, lane) == Worker(1, 1)
            for part in wiring.work[lane]
            if part.replica == 1
        ]
        seen += alone
        toy = Toy(mesh, (), banned, turn=turn)
        assert not toy.audit(Boundary(0, G)).any()
    assert seen, "in some turn the worker works on samples of its own"


def test_who_has_nothing_to_do_in_a_step_recomputes_for_others() -> None:
    mesh, banned = Mesh(2, 3), {Worker(0, 0)}
    toy = Toy(mesh, (), banned)
    idle = [rank for rank, worker in enumerate(mesh.workers) if worker not in banned and toy.wiring.lane(worker) is None]
    assert [mesh.worker(rank).stage for rank in idle] == [1]
    boundary = Boundary(0, G)
    places = [(lane, slot) for lane in toy.wiring.lanes for slot in range(len(toy.wiring.work[lane]))]
    assert any(toy.asked(boundary, *place)[0] in idle for place in places)
    assert not toy.audit(boundary).any()


# --- What is said to be left out


def tainted(toy: Toy, *boundaries: Boundary) -> None:
    """Senders of lane 1 say that they left micro-batch 0 out."""
    for boundary in boundaries:
        place = SignalId(Kind.SIGNAL, boundary, 1, 0)
        said = replace(toy.commitments.sent[place].statement, tainted=True)
        toy.commitments.sent[place] = credentials(toy.mesh, said.sender).sign(said)
        toy.commitments.received[place] = Received(True, said.digest)


@pytest.mark.parametrize("boundary", [Boundary(0, A), Boundary(1, A), Boundary(0, G), Boundary(1, G)], ids=str)
def test_who_says_without_a_reason_that_a_micro_batch_is_left_out_has_lied(boundary: Boundary) -> None:
    """Or it could send anything, because nobody judges such a signal by its score."""
    toy = Toy(Mesh(3, 3))
    tainted(toy, boundary)
    assert torch.equal(toy.audit(boundary), expected(toy, {(1, 0): LIED}))


def test_who_was_told_so_by_the_stage_before_has_not() -> None:
    toy = Toy(Mesh(3, 3))
    tainted(toy, Boundary(0, A), Boundary(1, A), Boundary(0, G), Boundary(1, G))
    assert not toy.audit(Boundary(1, A)).any() and not toy.audit(Boundary(0, G)).any()
