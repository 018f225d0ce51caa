from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.audit import Drawn
from lightning_sentinel.verification.jury import Auditable, Case, Jury, Subject
from lightning_sentinel.verification.majority import weigh
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.wiring import Wiring

MATCHES, LIED, DISPUTED = Outcome.MATCHES, Outcome.LIED, Outcome.DISPUTED


# --- Who is asked


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    replicas=st.integers(1, 6),
    unheard=st.sets(st.builds(Worker, st.integers(0, 2), st.integers(0, 5))),
    number=st.integers(0, 5),
    place=st.tuples(*[st.integers(0, 50)] * 4),
)
def test_all_others_of_the_stage_that_have_a_word_are_asked(
    replicas: int, unheard: set[Worker], number: int, place: tuple[int, ...]
) -> None:
    mesh, audited = Mesh(3, replicas), Worker(1, number % replicas)
    found = Jury(mesh).others(audited, unheard, *place)
    assert len(found) == len(set(found))
    assert set(found) == {worker for worker in mesh.workers if worker.stage == 1} - {audited} - unheard
    # Who has no word changes nothing in the order of those that have one.
    everyone = Jury(mesh).others(audited, (), *place)
    assert found == [worker for worker in everyone if worker not in unheard]


def test_nobody_knows_beforehand_who_is_asked_first() -> None:
    jury, audited, draws = Jury(Mesh(2, 4)), Worker(0, 2), 1200
    places = list(itertools.product(range(draws // 12), range(2), range(3), range(2)))
    orders = Counter(tuple(worker.replica for worker in jury.others(audited, (), *place)) for place in places)
    assert set(orders) == set(itertools.permutations([0, 1, 3]))
    # Six standard deviations of a binomial count around the mean.
    mean = draws / 6
    assert all(abs(count - mean) < 6 * math.sqrt(mean * 5 / 6) for count in orders.values())


@pytest.mark.parametrize("changed", range(4))
def test_coin_boundary_lane_and_slot_each_change_who_is_asked(changed: int) -> None:
    firsts = []
    for value in range(64):
        place = [value if index == changed else 3 for index in range(4)]
        firsts.append(Jury(Mesh(2, 4)).others(Worker(0, 0), (), *place)[0].replica)
    assert set(firsts) == {1, 2, 3}


# --- What most say


@settings(derandomize=True, deadline=None, max_examples=300)
@given(replicas=st.integers(2, 9), seed=st.integers(0, 9999), unheard=st.integers(0, 4), data=st.data())
def test_while_most_are_honest_no_honest_worker_is_blamed_or_muted(
    replicas: int, seed: int, unheard: int, data: st.DataObject
) -> None:
    stage = [Worker(1, replica) for replica in range(replicas)]
    liars = set(Random(seed).sample(stage, (replicas - 1) // 2))
    audited = data.draw(st.sampled_from(stage))
    lied = audited in liars
    asked = [worker for worker in stage if worker != audited]
    # Whoever of them has no word: as many as may lose it, and not only those that should.
    heard = asked[: max(1, len(asked) - min(unheard, (replicas - 1) // 2))]
    words = [word for word in Outcome if word is not DISPUTED]
    truth = LIED if lied else MATCHES
    votes = {worker: data.draw(st.sampled_from(words)) if worker in liars else truth for worker in heard}
    judged = weigh(votes, replicas)
    assert lied or judged.outcome in (MATCHES, DISPUTED)
    if len(heard) == len(asked):
        assert not lied or judged.outcome == LIED
        assert lied or replicas == 2 or judged.outcome == MATCHES
        assert judged.outvoted <= liars


@pytest.mark.parametrize(
    ("live", "accusers", "defenders", "outcome"),
    [
        (2, 1, 0, DISPUTED),
        (3, 1, 1, MATCHES),
        (3, 2, 0, LIED),
        (4, 2, 1, DISPUTED),
        (4, 1, 2, MATCHES),
        (6, 2, 3, MATCHES),
        (6, 3, 2, DISPUTED),
        (6, 4, 1, LIED),
        # Some were not heard: who is left may all be liars.
        (5, 2, 0, DISPUTED),
        (6, 3, 0, LIED),
        (7, 3, 1, DISPUTED),
        (2, 0, 0, MATCHES),
    ],
)
def test_most_decide_and_the_sender_has_a_vote(live: int, accusers: int, defenders: int, outcome: Outcome) -> None:
    workers = [Worker(1, 1 + number) for number in range(accusers + defenders)]
    judged = weigh(dict.fromkeys(workers[:accusers], LIED) | dict.fromkeys(workers[accusers:], MATCHES), live)
    assert judged.outcome is outcome
    losers = {MATCHES: workers[:accusers], LIED: workers[accusers:], DISPUTED: []}
    assert judged.outvoted == set(losers[outcome])


def test_who_was_withheld_something_is_not_outvoted() -> None:
    others = [Worker(1, number) for number in range(1, 6)]
    votes = dict.fromkeys(others[:4], Outcome.GRADIENT_WITHHELD) | {others[4]: LIED}
    assert weigh(votes, 6) == (Outcome.GRADIENT_WITHHELD, frozenset())
    votes = dict.fromkeys(others[:1], Outcome.GRADIENT_WITHHELD) | dict.fromkeys(others[1:], LIED)
    assert weigh(votes, 6) == (LIED, frozenset())


@settings(derandomize=True, deadline=None, max_examples=100)
@given(replicas=st.integers(1, 9), seed=st.integers(0, 9999), muted=st.integers(0, 4), data=st.data())
def test_a_minority_of_another_stage_never_convicts_who_made_an_honest_note(
    replicas: int, seed: int, muted: int, data: st.DataObject
) -> None:
    stage = [Worker(2, replica) for replica in range(replicas)]
    liars = set(Random(seed).sample(stage, (replicas - 1) // 2))
    lied = data.draw(st.booleans())
    heard = stage[: max(1, replicas - min(muted, (replicas - 1) // 2))]
    truth = LIED if lied else MATCHES
    votes = {worker: data.draw(st.sampled_from([MATCHES, LIED])) if worker in liars else truth for worker in heard}
    judged = weigh(votes, replicas, stands=False)
    assert lied or judged.outcome in (MATCHES, DISPUTED)
    if len(heard) == replicas:
        assert judged.outcome == (truth if replicas > 2 or not lied else DISPUTED)
        assert judged.outvoted <= liars


# --- What is asked beside signals


def drawn_by(boundary: Boundary, lane: int, replicas: Sequence[int], what: str = "rows") -> Drawn:
    """What these replicas have drawn, in a mesh of four stages of five."""
    nothing = torch.zeros(5, 6, 5, 1, dtype=torch.bool)
    drawn = nothing.clone()
    drawn[list(replicas), Mesh(4, 5).boundaries.index(boundary), lane] = True
    return Drawn(nothing, drawn) if what == "rows" else Drawn(drawn, nothing)


def asked_about(signals: Tensor, drawn: Drawn, false: Mapping[Subject, int], liars: Collection[Worker] = (), coin: int = 7) -> Any:
    """What is found, and the questions by round, in a mesh of four stages of five where some subjects at stage 1 are false."""
    rounds: list[list[tuple[Case, Worker]]] = []

    def ask(asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        rounds.append(list(asked))
        return [Outcome((case.subject in false) ^ (juror in liars)) for case, juror in asked]

    wiring = Wiring.of(Mesh(4, 5), micro_batches=1)
    return Jury(Mesh(4, 5)).hear(Auditable(signals, drawn), wiring, (), (), coin, ask), rounds


HONEST_FIRST = 9
"""A coin by which an honest worker is asked first: an accomplice would confirm whatever it is asked about."""


def place_of(boundary: Boundary, lane: int) -> Tensor:
    signals = torch.zeros(6, 5, 1, dtype=torch.bool)
    signals[Mesh(4, 5).boundaries.index(boundary), lane] = True
    return signals


A, G = Direction.ACTIVATION, Direction.GRADIENT


@pytest.mark.parametrize(
    ("boundary", "maker"),
    [
        (Boundary(1, A), 0),
        (Boundary(2, A), 1),
        (Boundary(0, A), None),
        (Boundary(1, G), 3),
        (Boundary(0, G), 2),
        (Boundary(2, G), None),
    ],
)
def test_where_a_signal_is_audited_its_row_and_the_note_on_its_input_are(boundary: Boundary, maker: int | None) -> None:
    found, (first, second) = asked_about(place_of(boundary, 2), drawn_by(boundary, 2, ()), {})
    assert not found.reports and not second
    audited = {case.subject: case.audited for case, _ in first}
    expected = {Subject.SIGNAL: Worker(boundary.sender, 2), Subject.ROW: Worker(boundary.receiver, 2)}
    assert audited == expected | ({} if maker is None else {Subject.NOTE: Worker(maker, 2)})
    jurors = {case.subject: juror for case, juror in first}
    assert jurors[Subject.SIGNAL].stage == boundary.sender and jurors[Subject.ROW].stage == boundary.receiver
    assert jurors.get(Subject.NOTE, jurors[Subject.ROW]) == jurors[Subject.ROW], "who has the note for the row checks it"
    assert all(case.audited != juror for case, juror in first)


@pytest.mark.parametrize(("subject", "liars"), [(Subject.ROW, [Worker(2, 4)]), (Subject.NOTE, [Worker(2, 0), Worker(2, 4)])])
def test_all_of_the_receivers_stage_decide_on_a_row_and_on_a_note(subject: Subject, liars: list[Worker]) -> None:
    boundary, nothing = Boundary(1, A), drawn_by(Boundary(1, A), 2, ())
    found, (first, second) = asked_about(place_of(boundary, 2), nothing, {subject: 1}, liars, HONEST_FIRST)
    (decision,) = [one for one in found.reports if one.case.subject is subject]
    assert decision.judgement.outcome == LIED and decision.judgement.outvoted == set(liars)
    jurors = [juror for case, juror in (*first, *second) if case.subject is subject]
    # The receiver stands by its row; of a note of another stage it is a witness as good as any.
    others = {Worker(2, replica) for replica in range(5)} - ({Worker(2, 2)} if subject is Subject.ROW else set())
    assert set(jurors) == others and len(jurors) == len(others)
    honest, _ = asked_about(place_of(boundary, 2), nothing, {}, liars, HONEST_FIRST)
    assert all(one.judgement.outcome == MATCHES for one in honest.reports)


def test_of_a_row_that_was_drawn_the_row_and_the_note_are_audited_and_not_the_signal() -> None:
    nothing = torch.zeros(6, 5, 1, dtype=torch.bool)
    _, (first, _) = asked_about(nothing, drawn_by(Boundary(1, G), 3, [4]), {})
    assert [(case.subject, case.audited, juror) for case, juror in first] == [
        (Subject.ROW, Worker(1, 3), Worker(1, 4)),
        (Subject.NOTE, Worker(3, 3), Worker(1, 4)),
    ]


@pytest.mark.parametrize(("drawers", "asked"), [([4], 1), ([0, 3], 2), ([0, 1, 3, 4], 2)])
def test_of_those_that_drew_a_signal_as_many_recompute_it_as_can_be_malicious(drawers: list[int], asked: int) -> None:
    nothing, boundary = torch.zeros(6, 5, 1, dtype=torch.bool), Boundary(1, A)
    _, (first, second) = asked_about(nothing, drawn_by(boundary, 2, drawers, "signals"), {})
    assert {case.subject for case, _ in first} == {Subject.SIGNAL} and not second
    assert len(first) == asked and {juror.replica for _, juror in first} <= set(drawers)
    # A reason that all know has one more asked, whom an accomplice cannot keep away by drawing everything.
    known, _ = asked_about(place_of(boundary, 2), drawn_by(boundary, 2, drawers, "signals"), {})[1]
    jurors = [juror.replica for case, juror in known if case.subject is Subject.SIGNAL]
    assert jurors[0] == Jury(Mesh(4, 5)).others(Worker(1, 2), (), 7, 1, 2, 0)[0].replica
    assert set(jurors[1:]) <= set(drawers) and asked <= len(jurors) <= asked + 1


# --- A long run with lying auditors


class Stage:
    """One stage of six whose workers send honest signals or not, and say of others what they like."""

    def __init__(self, liars: set[int], words: str, lies: float = 0.0, replicas: int = 6, seed: int = 0) -> None:
        self.mesh, self.liars, self.words, self.lies = Mesh(2, replicas), liars, words, lies
        self.jury, self.ledger, self.random = Jury(self.mesh), Ledger(), Random(seed)

    def run(self, steps: int) -> Stage:
        for step in range(steps):
            self.lied = {replica for replica in self.liars if self.random.random() < self.lies}
            wiring = Wiring.of(self.mesh, self.ledger.banned, 1)
            signals = torch.tensor([[[live and self.random.random() < 0.2] for live in wiring.live], [[False]] * len(wiring.live)])
            self.calls = 0
            nothing = torch.zeros(len(wiring.live), *signals.shape, dtype=torch.bool)
            audited = Auditable(signals, Drawn(nothing, nothing))
            unheard = self.ledger.banned, self.ledger.muted
            found = self.jury.hear(audited, wiring, *unheard, step, self.ask, (Subject.SIGNAL,))
            assert self.calls == 2, "all ranks ask as often, whatever there is to ask"
            guilty = {wiring.worker(0, lane) for _, lane, _ in (found.outcome == LIED).nonzero().tolist()}
            self.ledger.record_audits(
                step, 0, Counter(guilty), Counter(), guilty, frozenset().union(*found.outvoted.values()), self.mesh
            )
        return self

    def ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        self.calls += 1
        assert all(case.boundary == Boundary(0, Direction.ACTIVATION) for case, _ in asked)
        return [self.word(case.audited.replica, juror.replica) for case, juror in asked]

    def word(self, audited: int, juror: int) -> Outcome:
        truth = LIED if audited in self.lied else MATCHES
        if juror not in self.liars:
            return truth
        if self.words == "accuse":
            return MATCHES if audited in self.liars else LIED
        return {"cover": MATCHES, "opposite": MATCHES if truth is LIED else LIED, "honest": truth}[self.words]


@pytest.mark.parametrize("words", ["accuse", "cover", "opposite", "honest"])
@pytest.mark.parametrize("lies", [0.0, 0.3])
@pytest.mark.parametrize(("replicas", "liars"), [(3, {1}), (4, {2}), (5, {0, 3}), (6, {1, 4}), (7, {1, 2, 5})])
def test_lying_auditors_never_have_an_honest_worker_banned(replicas: int, liars: set[int], words: str, lies: float) -> None:
    for seed in range(3):
        stage = Stage(liars, words, lies, replicas, seed).run(600)
        workers = {Worker(0, replica) for replica in liars}
        assert stage.ledger.banned <= workers and set(stage.ledger.muted) <= workers
        if lies:
            assert stage.ledger.banned == workers, "and they have nobody who lies spared"
        elif words in ("accuse", "opposite"):
            assert set(stage.ledger.muted) == workers
            # As long as five are left, the next one is banned for it.
            assert len(stage.ledger.banned) >= min(len(liars), max(0, replicas - 4))
            assert replicas >= 5 or not stage.ledger.banned
