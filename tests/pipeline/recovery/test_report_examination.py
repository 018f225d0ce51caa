"""What an auditor finds of rows and notes: on one rank, with what it is handed and what the step's table says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.examination import Examined, Item, Need
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.report_examination import ReportExamination
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.trust.digests import Algorithm, digest_of_tensor
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Kind, Moment, SignalId, SignalStatement
from lightning_sentinel.verification import COLUMNS, Ledger, SignalTable
from lightning_sentinel.verification.jury import Case, Subject
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.verification.table import no_rows
from lightning_sentinel.wiring import MicroBatchId

MESH, A, G = Mesh(4, 3), *Direction
MAKER, SENDER, RECEIVER = Worker(0, 1), Worker(1, 1), Worker(2, 1)
BOUNDARY, BEFORE = Boundary(1, A), Boundary(0, A)
CASE = Case(BOUNDARY, 1, 0, MicroBatchId(1, 0), RECEIVER, Subject.ROW)
LIED = Outcome.LIED


class Audited:
    """A signal from stage 1 to 2, the one from stage 0 that it was computed from, and the note on that, as an auditor sees them.

    Args:
        row: takes the honest row, and returns what the receiver reports.
        note: takes the honest note, and returns what its maker sends.
        tainted: whether the sender says that it left the micro-batch out.
    """

    def __init__(self, row: Any = None, note: Any = None, tainted: bool = False) -> None:
        verification = Verification(seed=0, warmup_steps=4)
        guard = Guard(MESH, [BOUNDARY], Worker(2, 0), verification, Response(), Ledger(), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.received = torch.randn(2, 3, 8, generator=generator)
        self.sent = self.received.tanh() + 0.1 * torch.randn(2, 3, 8, generator=generator)
        honest = guard.project(BOUNDARY, self.received)
        assert honest is not None
        self.note = honest if note is None else note(honest)
        (measured,) = guard.verifiers[BOUNDARY].inspect(self.sent, torch.tensor([tainted]), self.note).rows
        rows = no_rows(len(MESH.boundaries), MESH.replicas, 1)
        rows[MESH.boundaries.index(BOUNDARY), 1, 0] = measured if row is None else row(measured.clone())
        self.commitments = StepCommitments()
        for kind, boundary, sender, tensor in (
            (Kind.SIGNAL, BEFORE, MAKER, self.received),
            (Kind.SIGNAL, BOUNDARY, SENDER, self.sent),
            (Kind.NOTE, BEFORE, MAKER, self.note.whole),
        ):
            place = SignalId(kind, boundary, 1, 0)
            digest = digest_of_tensor(tensor, Algorithm.SHA256)
            said = SignalStatement(Moment(bytes(16), 3, 1), sender, place, tainted and boundary == BOUNDARY, digest)
            self.commitments.sent[place] = Signed(said, bytes(64))
        self.cache = SignalCache()
        self.cache.begin(keeps=True)
        self.examination = ReportExamination(MESH, self.cache, guard, torch.device("cpu"))
        self.examination.table = SignalTable(rows)

    def examine(self, subject: Subject, **handed: Any) -> Examined:
        case = CASE if subject is Subject.ROW else CASE._replace(audited=MAKER, subject=subject)
        items = {Item.SIGNAL: self.sent if subject is Subject.ROW else self.received, Item.NOTE: list(self.note)}
        return self.examination.examine(case, items | {Item[name.upper()]: item for name, item in handed.items()}, self.commitments)

    def is_false(self, subject: Subject, **handed: Any) -> bool:
        found = self.examine(subject, **handed)
        if found.word is LIED:
            return True
        assert found.recomputed is not None
        error = found.compare(found.recomputed) if found.compare is not None else float(found.measured[0])  # type: ignore[index]
        return not error <= found.allowed


def bent(row: Tensor) -> Tensor:
    row[0] += 1.0
    return row


def hidden(row: Tensor) -> Tensor:
    row[COLUMNS.index("tainted")] = 1
    return row


def other_samples(note: Projection) -> Projection:
    return note._replace(values=note.values.roll(1, 0))


@pytest.mark.parametrize("tainted", [False, True])
def test_honest_rows_and_notes_are_true(tainted: bool) -> None:
    audited = Audited(tainted=tainted)
    assert not audited.is_false(Subject.ROW) and not audited.is_false(Subject.NOTE)


@pytest.mark.parametrize("row", [bent, hidden, lambda row: row * math.nan], ids=["bent", "hidden", "not finite"])
def test_a_receiver_that_reports_another_row_than_it_measured_has_lied(row: Any) -> None:
    audited = Audited(row=row)
    assert audited.is_false(Subject.ROW) and not audited.is_false(Subject.NOTE)


@pytest.mark.parametrize(
    "note",
    [other_samples, lambda note: note._replace(channels=16), lambda note: note._replace(values=note.values[:1])],
    ids=["other samples", "other channels", "fewer samples"],
)
def test_a_note_of_anything_else_than_its_signal_is_its_makers_lie(note: Any) -> None:
    if note is other_samples:
        audited = Audited(note=note)
        assert not audited.is_false(Subject.ROW), "who measured with it has not lied"
    else:
        audited = Audited()
        audited.note = note(audited.note)
        place = SignalId(Kind.NOTE, BEFORE, 1, 0)
        said = audited.commitments.sent[place].statement
        digest = digest_of_tensor(audited.note.whole, Algorithm.SHA256)
        audited.commitments.sent[place] = Signed(SignalStatement(said.moment, MAKER, place, False, digest), bytes(64))
    assert audited.is_false(Subject.NOTE)


HANDED = {
    "nothing": None,
    "another tensor": torch.zeros(2, 3, 8),
    "another note": [torch.zeros(2, 3, 8), 8],
    "a name": ["a", 8],
    "no count of channels": [torch.zeros(1), 8.0],
    "a number": 3,
}


@pytest.mark.parametrize("subject", [Subject.ROW, Subject.NOTE])
@pytest.mark.parametrize("name", ["signal", "note"])
@pytest.mark.parametrize("handed", HANDED.values(), ids=HANDED)
def test_who_hands_over_something_else_than_what_is_named_in_the_table_has_lied(subject: Subject, name: str, handed: Any) -> None:
    assert Audited().examine(subject, **{name: handed}).word is LIED


def test_whoever_is_audited_hands_over_what_its_report_follows_from() -> None:
    audited = Audited()
    plan = plan_step("training_step", MESH, BatchSizes(1, (2, 2, 2)), audited=True)
    cache, examination = audited.cache, audited.examination
    cache.keep_received(A, 0, audited.sent)
    cache.keep_note_received(A, 0, audited.note)
    assert examination.needs(CASE, plan) == [Need(Item.SIGNAL, RECEIVER), Need(Item.NOTE, RECEIVER)]
    assert torch.equal(examination.item(Item.SIGNAL, CASE), audited.sent)
    assert examination.item(Item.NOTE, CASE)[0] is audited.note.values
    note = CASE._replace(audited=MAKER, subject=Subject.NOTE)
    cache.keep_sent(A, 0, audited.received)
    cache.keep_note_sent(A, 0, audited.note)
    assert examination.needs(note, plan) == [Need(Item.SIGNAL, MAKER), Need(Item.NOTE, MAKER)]
    assert torch.equal(examination.item(Item.SIGNAL, note), audited.received)
    assert examination.item(Item.NOTE, note)[1] == 8
    first = Case(BEFORE, 1, 0, MicroBatchId(1, 0), SENDER, Subject.ROW)
    assert examination.needs(first, plan) == [Need(Item.SIGNAL, SENDER)], "the first stage receives nothing"


@pytest.mark.parametrize(
    ("boundary", "receiver", "tainted", "expected"),
    [(BOUNDARY, RECEIVER, {BOUNDARY}, True), (Boundary(1, G), SENDER, {BEFORE}, True), (Boundary(1, G), SENDER, {BOUNDARY}, False)],
)
def test_a_micro_batch_that_was_left_out_on_its_way_forward_stays_left_out(
    boundary: Boundary, receiver: Worker, tainted: set[Boundary], expected: bool
) -> None:
    examination, commitments = Audited().examination, StepCommitments()
    for one in (BEFORE, BOUNDARY, Boundary(1, G)):
        place = SignalId(Kind.SIGNAL, one, 1, 0)
        digest = digest_of_tensor(torch.ones(1), Algorithm.SHA256)
        said = SignalStatement(Moment(bytes(16), 3, 1), Worker(one.sender, 1), place, one in tainted, digest)
        commitments.sent[place] = Signed(said, bytes(64))
    case = Case(boundary, 1, 0, MicroBatchId(1, 0), receiver, Subject.ROW)
    assert examination._is_tainted(case, commitments) == expected
