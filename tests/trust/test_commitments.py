from __future__ import annotations

import dataclasses
import hashlib

import pytest

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.trust.commitments import (
    Causes,
    Claim,
    Copy,
    causes_of_difference,
    mismatches,
    settle_by_showing,
    table_digest,
)
from lightning_sentinel.trust.digests import Algorithm
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.signing import Signed, sign
from lightning_sentinel.trust.statements import Moment, RowStatement, SignalStatement, Transfer
from tests.trust.statements import NOW, PLACE, RUN, SIGNAL, digest, identity

MESH = Mesh(stages=2, replicas=3)
KEYS = {worker: identity(worker).public for worker in MESH}
ALICE, BOB, EVE = Worker(0, 0), Worker(1, 2), Worker(1, 1)
SHA = Algorithm.SHA256
BEFORE = table_digest([], SHA)


def row(worker: Worker, contents: str = "row", moment: Moment = NOW) -> Signed[RowStatement]:
    return sign(identity(worker), RowStatement(moment, worker, digest(f"{contents} of {worker}"), BEFORE))


def copy(holder: Worker, *changed: Signed[RowStatement], without: frozenset[Worker] = frozenset()) -> Copy:
    """What an honest holder says and shows that was sent these rows."""
    rows = {worker: row(worker) for worker in MESH if worker not in without}
    rows |= {one.statement.sender: one for one in changed}
    return Copy(holder, table_digest(rows.values(), SHA), rows)


def causes(first: Copy, second: Copy) -> Causes:
    found = causes_of_difference(first, second, KEYS, NOW)
    assert found == causes_of_difference(second, first, KEYS, NOW)
    return found


class TestTables:
    def test_are_of_all_that_was_signed(self) -> None:
        rows = [row(worker) for worker in MESH]
        in_order = sorted(rows, key=lambda one: (one.statement.sender.stage, one.statement.sender.replica))
        encoded = b"".join(encode(one.statement) + one.signature for one in in_order)
        assert table_digest(rows, SHA).value == hashlib.sha256(encoded).digest()

    def test_every_field_of_every_row_counts(self) -> None:
        rows = [row(worker) for worker in MESH]
        *others, last = rows
        changes = [{"row": digest("x")}, {"table_before": digest("x")}, {"moment": Moment(RUN, 12, 1)}, {"sender": Worker(7, 7)}]
        tables = [[*others, Signed(dataclasses.replace(last.statement, **change), last.signature)] for change in changes]  # type: ignore[arg-type]
        tables.append([*others, Signed(last.statement, bytes(64))])
        assert len({table_digest(table, SHA) for table in [rows, others, [], *tables]}) == 8


class TestCauses:
    def test_none(self) -> None:
        assert causes(copy(ALICE), copy(BOB)) == Causes(frozenset(), {}, frozenset())

    def test_a_worker_that_signed_two_rows(self) -> None:
        found = causes(copy(ALICE), copy(BOB, row(EVE, "another row")))
        assert found == Causes(frozenset({EVE}), {}, frozenset())
        assert found.liars == {EVE}

    def test_a_worker_that_told_two_stories_about_the_table_before(self) -> None:
        told = sign(identity(EVE), dataclasses.replace(row(EVE).statement, table_before=digest("another table")))
        assert causes(copy(ALICE), copy(BOB, told)).equivocated == {EVE}

    @pytest.mark.parametrize(
        "altered",
        [
            Signed(row(ALICE, "another row").statement, row(ALICE).signature),
            sign(identity(EVE), row(ALICE, "another row").statement),
            row(ALICE, moment=Moment(RUN, 11, 0)),
            row(ALICE, moment=Moment(bytes(16), 12, 0)),
        ],
        ids=["contents", "signer", "step", "run"],
    )
    def test_a_row_that_was_altered_on_its_way(self, altered: Signed[RowStatement]) -> None:
        """Alice's row came to Bob without her signature, or it is an old one: she has not said two things now."""
        found = causes(copy(EVE), copy(BOB, altered))
        assert found == Causes(frozenset(), {BOB: frozenset({ALICE})}, frozenset())
        assert not found.liars

    def test_a_row_that_is_another_workers(self) -> None:
        held = copy(BOB)
        swapped = dataclasses.replace(held, rows={**held.rows, ALICE: row(EVE)})
        assert causes(copy(ALICE), swapped).altered == {BOB: {ALICE}}

    def test_a_row_that_was_left_out(self) -> None:
        found = causes(copy(EVE), copy(BOB, without=frozenset({ALICE})))
        assert found == Causes(frozenset(), {BOB: frozenset({ALICE})}, frozenset())

    def test_a_holder_that_shows_another_table_than_it_said(self) -> None:
        lying = dataclasses.replace(copy(BOB), said=digest("a table"))
        assert causes(copy(ALICE), lying) == Causes(frozenset(), {}, frozenset({BOB}))

    def test_several_at_once(self) -> None:
        forged = Signed(row(ALICE, "another row").statement, bytes(64))
        found = causes(copy(ALICE, row(EVE, "another row")), copy(BOB, forged))
        assert found == Causes(frozenset({EVE}), {BOB: frozenset({ALICE})}, frozenset())

    def test_strangers_do_not_count(self) -> None:
        """A row of a worker that takes no part in the step changes the table, and nothing else."""
        found = causes(copy(ALICE), copy(BOB, row(Worker(9, 9))))
        assert found == Causes(frozenset(), {}, frozenset())


SENT = Transfer(Worker(1, 0), Worker(2, 0), PLACE)
SENDER, RECEIVER = SENT.sender, SENT.receiver
TRUE, FALSE = digest("a signal"), digest("another signal")


def said(contents: str, moment: Moment = NOW, signer: Worker = SENDER) -> Signed[SignalStatement]:
    return sign(identity(signer), dataclasses.replace(SIGNAL, digest=digest(contents), moment=moment))


SHOWS_TRUE, SHOWS_FALSE = Claim(TRUE, said("a signal")), Claim(FALSE, said("another signal"))
NOTHING = Claim(None, None)


class TestMismatches:
    def test_are_in_order(self) -> None:
        transfers = [SENT._replace(signal=dataclasses.replace(PLACE, slot=slot)) for slot in range(5)]
        sent = dict.fromkeys(transfers[:4], TRUE)
        received = {transfers[4]: TRUE, transfers[3]: FALSE, transfers[2]: TRUE, transfers[0]: TRUE}
        assert mismatches(sent, received) == [transfers[1], transfers[3], transfers[4]]
        assert mismatches(sent, sent) == []

    @pytest.mark.parametrize(
        ("sent", "received", "liars"),
        [
            # The receiver holds a message that the sender signed, and does not own.
            (SHOWS_TRUE, SHOWS_FALSE, {SENDER}),
            (NOTHING, SHOWS_FALSE, {SENDER}),
            (Claim(TRUE, None), SHOWS_FALSE, {SENDER}),
            # The receiver has invented one, or shows one of other contents, of another step, or of another signer.
            (SHOWS_TRUE, Claim(FALSE, None), {RECEIVER}),
            (SHOWS_TRUE, Claim(FALSE, said("a signal")), {RECEIVER}),
            (SHOWS_TRUE, Claim(FALSE, said("another signal", Moment(RUN, 11, 0))), {RECEIVER}),
            (SHOWS_TRUE, Claim(FALSE, said("another signal", signer=RECEIVER)), {RECEIVER}),
            (NOTHING, Claim(FALSE, None), {RECEIVER}),
            # Both have nothing to show for what they say.
            (Claim(TRUE, None), Claim(FALSE, None), {SENDER, RECEIVER}),
            (Claim(TRUE, None), NOTHING, {SENDER}),
            # Nobody can tell whether it was sent.
            (SHOWS_TRUE, NOTHING, set()),
        ],
    )
    def test_are_settled_by_what_is_shown(self, sent: Claim, received: Claim, liars: set[Worker]) -> None:
        assert settle_by_showing(SENT, sent, received, identity(SENDER).public, NOW) == liars
