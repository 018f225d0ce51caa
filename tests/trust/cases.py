"""Evidence for tests: a stage of five, of which workers 0 and 1 are malicious."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.commitments import table_digest
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Reason, Recomputation, Testimony, finding_of
from lightning_sentinel.trust.parts import Received, decode_part, encode_part, part_length
from lightning_sentinel.trust.records import FlaggedSignal, FlaggedStep, FlagRecord
from lightning_sentinel.trust.signing import Signed, sign
from lightning_sentinel.trust.statements import (
    ContributionVote,
    Kind,
    Moment,
    RowStatement,
    SignalId,
    SignalStatement,
    VoteStatement,
)
from lightning_sentinel.verification.streaks import Sighting, Streak
from lightning_sentinel.verification.table import COLUMNS
from tests.trust.statements import NOW, PLACE, RUN, SIGNAL, digest, identity

SHA = Algorithm.SHA256
STAGE = [Worker(1, replica) for replica in range(5)]
KEYS = {worker: identity(worker).public for worker in STAGE}
TOLERANCE = 1e-3


def signal(sender: Worker = STAGE[0], **change: Any) -> Signed[SignalStatement]:
    place = dataclasses.replace(PLACE, lane=sender.replica)
    return sign(identity(sender), dataclasses.replace(SIGNAL, sender=sender, **{"signal": place, **change}))


def testimony(about: Signed[SignalStatement], juror: Worker, outcome: int, live: int = 5, error: float | None = None) -> Testimony:
    said = about.statement
    found = Recomputation(digest(f"what {juror} recomputed"), error or {MATCHES: 1e-6, LIED: 0.8}[outcome], TOLERANCE)
    named = digest_of(encode(said), SHA)
    vote = VoteStatement(said.moment, juror, said.signal, named, outcome, live, finding_of(found, SHA))
    return Testimony(sign(identity(juror), vote), found)


testimony.__test__ = False  # type: ignore[attr-defined]


def votes(about: Signed[SignalStatement], outcomes: Mapping[int, int], live: int = 5) -> tuple[Testimony, ...]:
    return tuple(testimony(about, STAGE[replica], outcome, live) for replica, outcome in outcomes.items())


def of_a_lie(outcomes: Mapping[int, int] | None = None, live: int = 5) -> Evidence:
    """Its accomplice says that all is well, and three honest workers do not."""
    sent = signal()
    said = {1: MATCHES, 2: LIED, 3: LIED, 4: LIED} if outcomes is None else outcomes
    return Evidence(STAGE[0], Reason.LIED, 12, KEYS, (sent,), votes(sent, said, live))


def of_a_contradiction() -> Evidence:
    messages = (signal(), signal(digest=digest("another signal")))
    return Evidence(STAGE[0], Reason.CONTRADICTED_ITSELF, 12, {STAGE[0]: KEYS[STAGE[0]]}, messages, ())


def of_a_false_word() -> Evidence:
    """Worker 1 says that the signals of honest worker 2 are false, and of liar 0 that they are true."""
    honest, lie = signal(STAGE[2]), signal(STAGE[0])
    said = votes(honest, {0: LIED, 1: LIED, 3: MATCHES, 4: MATCHES}) + votes(lie, {1: MATCHES, 2: LIED, 3: LIED, 4: LIED})
    return Evidence(STAGE[1], Reason.FALSE_WORD, 12, KEYS, (honest, lie), said)


SKETCH = bytes(range(256)) * 2 + bytes(64)
"""As long as a sketch is; of what, does not matter."""


def row(worker: Worker, contents: bytes, moment: Moment = NOW, before: str = "a table") -> Signed[RowStatement]:
    return sign(identity(worker), RowStatement(moment, worker, digest_of(contents, SHA), digest(before)))


def vote_on_weights(juror: Worker, outcome: int, about: bytes = SKETCH, audited: Worker = STAGE[0], live: int = 5) -> Testimony:
    found = Recomputation(digest(f"what {juror} recomputed"), {MATCHES: 1e-6, LIED: 0.8}[outcome], TOLERANCE)
    vote = ContributionVote(NOW, juror, audited, digest_of(about, SHA), outcome, live, finding_of(found, SHA))
    return Testimony(sign(identity(juror), vote), found)


vote_on_weights.__test__ = False  # type: ignore[attr-defined]


def of_a_contribution(outcomes: Mapping[int, int] | None = None) -> Evidence:
    contents = b"its scores.." + SKETCH + b"what it sent"
    said = {1: MATCHES, 2: LIED, 3: LIED, 4: LIED} if outcomes is None else outcomes
    votes = tuple(vote_on_weights(STAGE[replica], outcome) for replica, outcome in said.items())
    return Evidence(STAGE[0], Reason.CONTRIBUTION, 12, KEYS, (row(STAGE[0], contents),), votes, (contents,))


NEXT_STAGE = [Worker(2, replica) for replica in range(5)]
TWO_STAGES = KEYS | {worker: identity(worker).public for worker in NEXT_STAGE}
SLOTS = 2
REPORTED = struct.pack(f"{len(COLUMNS)}f", *range(len(COLUMNS)))


def vote_of(juror: Worker, place: SignalId, about: Digest, outcome: int, live: int = 5) -> Testimony:
    found = Recomputation(digest(f"what {juror} recomputed"), {MATCHES: 1e-6, LIED: 0.8}[outcome], TOLERANCE)
    vote = VoteStatement(NOW, juror, place, about, outcome, live, finding_of(found, SHA))
    return Testimony(sign(identity(juror), vote), found)


def of_a_false_row(outcomes: Mapping[int, int] | None = None) -> Evidence:
    """Worker 0 of the next stage reports something else of the signal than most others of that stage measure."""
    contents = b"others, " + REPORTED + b"and more"
    said = {1: MATCHES, 2: LIED, 3: LIED, 4: LIED} if outcomes is None else outcomes
    named = digest_of(REPORTED, SHA)
    votes = tuple(vote_of(NEXT_STAGE[replica], PLACE, named, outcome) for replica, outcome in said.items())
    keys = {worker: TWO_STAGES[worker] for worker in NEXT_STAGE}
    return Evidence(NEXT_STAGE[0], Reason.ROW, 12, keys, (row(NEXT_STAGE[0], contents),), votes, (contents,))


def of_a_false_note(outcomes: Mapping[int, int] | None = None, live: int = 5) -> Evidence:
    """Worker 0 sends another note than those of the stage behind the next one make of its signal."""
    place = SignalId(Kind.NOTE, Boundary(1, Direction.ACTIVATION), lane=0, slot=3)
    note = signal(STAGE[0], signal=place)
    readers = [Worker(3, replica) for replica in range(5)]
    said = dict.fromkeys(range(2, 5), LIED) if outcomes is None else outcomes
    named = digest_of(encode(note.statement), SHA)
    votes = tuple(vote_of(readers[replica], place, named, outcome, live) for replica, outcome in said.items())
    keys = {STAGE[0]: KEYS[STAGE[0]]} | {worker: identity(worker).public for worker in readers}
    return Evidence(STAGE[0], Reason.NOTE, 12, keys, (note,), votes)


def part_of(worker: Worker, moment: Moment, lane: int, received: str = "", sent: str = "what it sent") -> bytes:
    """The row of a worker that sent something of each micro-batch, and received what its neighbour sent, or what is given."""
    boundaries = {1: Boundary(1, Direction.ACTIVATION), 2: Boundary(1, Direction.GRADIENT)}
    out, back = (boundaries[stage] for stage in (worker.stage, 3 - worker.stage))
    messages, digests = {}, {}
    for slot in range(SLOTS):
        place = SignalId(Kind.SIGNAL, out, lane, slot)
        messages[place] = sign(identity(worker), SignalStatement(moment, worker, place, False, digest(f"{sent} {out} {slot}")))
        digests[SignalId(Kind.SIGNAL, back, lane, slot)] = Received(False, digest(f"{received or 'what it sent'} {back} {slot}"))
    return b"its scores and more" + encode_part(messages, digests, digest("seal"), worker, lane, SLOTS) + digest("votes").encode()


def of_contradictions(others: int = 3, lies: str = "something else") -> Evidence:
    """In each step beside another worker of the next stage, which received something else than worker 0 says that it sent."""
    messages, contents = [], []
    for number, other in enumerate(NEXT_STAGE[:others]):
        moment = Moment(RUN, 10 + number, number)
        lane = (3 + number) % 5
        pair = {STAGE[0]: part_of(STAGE[0], moment, lane, sent=lies), other: part_of(other, moment, lane)}
        messages += [row(worker, said, moment) for worker, said in pair.items()]
        contents += pair.values()
    return Evidence(STAGE[0], Reason.CONTRADICTED_OTHERS, 9 + others, TWO_STAGES, tuple(messages), (), tuple(contents))


def of_a_forged_row(witnesses: int = 3, forgers: Sequence[int] = (0,)) -> Evidence:
    """Some workers have signed their rows with another key; all say in the next step which table they saw."""
    before = [row(worker, f"row of {worker}".encode()) for worker in STAGE]
    for forger in forgers:
        before[forger] = sign(identity(Worker(9, 9)), before[forger].statement)
    later = Moment(RUN, 13, 1)
    seen = table_digest(before, SHA)
    after = [RowStatement(later, worker, digest("a row"), seen) for worker in STAGE[:witnesses]]
    messages = (*before, *(sign(identity(one.sender), one) for one in after))
    return Evidence(STAGE[0], Reason.FORGED, 13, KEYS, messages, ())


def of_unsigned_messages(unsigned: int = 1) -> Evidence:
    """Worker 0 has signed its row, and in it of its two messages so many with another key."""
    whole = part_of(STAGE[0], NOW, lane=2)
    places = [SignalId(Kind.SIGNAL, Boundary(1, Direction.ACTIVATION), 2, slot) for slot in range(SLOTS)]
    found = decode_part(whole[19 : 19 + part_length(SLOTS)], STAGE[0], 2, SLOTS, NOW)
    messages = {place: Signed(found.sent[place].statement, found.sent[place].signature) for place in places}
    for place in places[:unsigned]:
        messages[place] = Signed(messages[place].statement, bytes(63) + b"\x01")
    said = (
        b"its scores and more"
        + encode_part(messages, found.received, digest("seal"), STAGE[0], 2, SLOTS)
        + digest("votes").encode()
    )
    return Evidence(STAGE[0], Reason.FORGED, 12, KEYS, (row(STAGE[0], said),), (), (said,))


def flagged_step(step: int, flags: str = "xxo", score: float = 3.0) -> FlaggedStep:
    """A step in which the signals with an x are flagged."""
    signals = tuple(
        FlaggedSignal(
            Boundary(1, Direction.ACTIVATION),
            lane=0,
            slot=slot,
            receiver=NEXT_STAGE[0],
            row=struct.pack(f"{len(COLUMNS)}f", *[step + 0.5 * slot] * len(COLUMNS)),
            score=score if flag == "x" else 0.5,
            feature="norm",
            fences=(-1.0, 1.0, -math.inf, 2.5),
            flagged=flag == "x",
        )
        for slot, flag in enumerate(flags)
    )
    return FlaggedStep(step, signals, Sighting((), tuple(STAGE[1:]), False))


def of_flags(numbers: Sequence[int] = (3, 4, 5, 7, 9), signed: bool = False, **change: Any) -> Evidence:
    record = FlagRecord(5, 0.0, Streak().state(), tuple(flagged_step(step) for step in numbers))
    evidence = Evidence(STAGE[0], Reason.FLAGGED, numbers[-1], {}, (), (), record=dataclasses.replace(record, **change))
    if not signed:
        return evidence
    contents = [b"and more" + b"".join(signal.row for signal in one.signals) for one in record.steps]
    rows = tuple(row(NEXT_STAGE[0], said, Moment(RUN, one.step, one.step)) for said, one in zip(contents, record.steps))
    keys = {worker: TWO_STAGES[worker] for worker in (STAGE[0], NEXT_STAGE[0])}
    return dataclasses.replace(evidence, keys=keys, messages=rows, contents=tuple(contents))


def unsigned(evidence: Evidence) -> Evidence:
    """The same where nobody signs."""
    messages = tuple(Signed(one.statement, bytes(64)) for one in evidence.messages)
    said = tuple(Testimony(Signed(one.vote.statement, bytes(64)), one.recomputation) for one in evidence.testimonies)
    return dataclasses.replace(evidence, keys={}, messages=messages, testimonies=said)


EVERY_REASON = {
    "lie": of_a_lie,
    "two words": of_a_contradiction,
    "false word": of_a_false_word,
    "weights": of_a_contribution,
    "row": of_a_false_row,
    "note": of_a_false_note,
    "contradictions": of_contradictions,
    "forged row": of_a_forged_row,
    "unsigned message": of_unsigned_messages,
    "flags": of_flags,
    "flags, signed": lambda: of_flags(signed=True),
    "a lie, unsigned": lambda: unsigned(of_a_lie()),
    "nothing": lambda: Evidence(STAGE[0], Reason.NOTE, 12, {}, (), ()),
}
"""Evidence that holds, by what it is of."""
