"""Audits between processes: workers hand an auditor what it needs, it examines the case, and all hear its vote.

All ranks go through the same list in the same order, so that no two ranks wait for each other. Whoever hands over a signal or a
note has said what its digest is, in the collective of the step, before anybody knew what would be audited. So the auditor knows
whether it is given what was sent. Which workers are asked, and whose vote counts, the jury decides
(:mod:`lightning_sentinel.verification.jury`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.messages.tensor_trees import Packed, pack_all, receive_tree, send_packed
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.recovery.examination import Examination, Examined, Item, Need, SignalExamination, signal_of
from lightning_sentinel.pipeline.recovery.report_examination import ReportExamination, note_of
from lightning_sentinel.pipeline.recovery.votes import Vote, encode, lie_of, of_auditor, says, testimony
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.waiting import on_host
from lightning_sentinel.trust.digests import digest_of
from lightning_sentinel.trust.encoding import encode as encode_statement
from lightning_sentinel.trust.evidence import Recomputation, Testimony
from lightning_sentinel.trust.statements import SignalId, VoteStatement
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.jury import Case, Subject
from lightning_sentinel.verification.majority import live_workers
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.tolerance import MEASURED, Tolerances

__all__ = ["Audits"]


class Audits:
    """The audits that this rank takes part in.

    Args:
        mesh: all workers.
        worker: the worker that this rank is.
        signals: how signals are examined.
        reports: how rows and notes are; ``None`` if nothing is verified.
        tolerances: the errors up to which signals match.
        room: bytes that an item may take at most.
        transcript: with which this rank signs its votes, and binds itself to those that it heard.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        signals: SignalExamination,
        reports: ReportExamination | None,
        tolerances: Tolerances,
        room: Callable[[], int],
        transcript: Transcript,
    ) -> None:
        self._mesh = mesh
        self._worker = worker
        self.signals = signals
        self._reports = reports
        self._tolerances = tolerances
        self._room = room
        self._transcript = transcript
        self._adversary: Adversary | None = None
        self.testimonies: dict[SignalId, list[Testimony]] = {}
        """The votes on signals and notes of the step under way, as far as they are signed where votes have to be."""
        self.on_rows: dict[Worker, list[Testimony]] = {}
        """Those on what workers report in their rows."""

    def begin(self, table: SignalTable, adversary: Adversary | None = None) -> None:
        """Begin to settle a step.

        Args:
            table: the step's rows.
            adversary: a simulated attacker, which may also lie in its votes.
        """
        self._adversary = adversary
        self.testimonies = {}
        self.on_rows = {}
        if self._reports is not None:
            self._reports.table = table

    def ask(self, asked: Sequence[tuple[Case, Worker]], plan: StepPlan, commitments: StepCommitments) -> list[Outcome]:
        """Have workers recompute signals, rows and notes; to be called by all ranks.

        The host waits for the device twice: for all items that this rank hands over, and for the errors of all that it recomputes.

        Args:
            asked: the cases, those of a boundary in succession, and the worker that recomputes each.
            plan: the step's plan.
            commitments: what workers said about the messages that they sent, before it was known which are audited.

        Returns:
            the vote of each of these workers.
        """
        # Nobody can judge a message of which nobody knows what was sent: this run only reports, or the step would be done again.
        known = [one for one in asked if self._is_known(one[0], commitments)]
        words = iter(self._ask(known, plan, commitments) if known else ())
        return [next(words) if self._is_known(case, commitments) else Outcome.MATCHES for case, _ in asked]

    def _is_known(self, case: Case, commitments: StepCommitments) -> bool:
        """Whether sender and receiver agree on the messages that a case is about."""
        names = [signal_of(case)]
        note = note_of(case, self._mesh)
        if note is not None and case.subject is not Subject.SIGNAL and self._reports is not None and self._reports.has_notes:
            names.append(note)
        return all(commitments.agrees(name) for name in names)

    def _examination(self, case: Case) -> Examination:
        if case.subject is Subject.SIGNAL:
            return self.signals
        assert self._reports is not None, "rows and notes are audited where signals are verified"
        return self._reports

    def _ask(self, asked: Sequence[tuple[Case, Worker]], plan: StepPlan, commitments: StepCommitments) -> list[Outcome]:
        needed = [self._examination(case).needs(case, plan) for case, _ in asked]
        handed = self._handed(asked, needed)
        found: list[Examined | None] = []
        # One boundary at a time: no auditor holds more than what it needs for one boundary.
        for _, some in groupby(range(len(asked)), key=lambda number: asked[number][0].boundary):
            given = [(*asked[number], self._hand_over(*asked[number], needed[number], handed[number])) for number in some]
            found += [
                self._examination(case).examine(case, items, commitments) if auditor == self._worker else None
                for case, auditor, items in given
            ]
        mine = self._decided(found, asked, plan.number)
        empty = encode(Vote(Outcome.MATCHES))
        said = b"".join(
            encode(self._signed(mine[number], *asked[number], plan, commitments)) if number in mine else empty
            for number in range(len(asked))
        )
        everyone = world().all_gather(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        self._transcript.hear(everyone)
        return [self._heard(everyone, number, *asked[number], plan, commitments) for number in range(len(asked))]

    def _signed(self, vote: Vote, case: Case, auditor: Worker, plan: StepPlan, commitments: StepCommitments) -> Vote:
        statement = self._statement(vote, case, auditor, plan, commitments)
        return replace(vote, signature=self._transcript.credentials.sign(statement).signature)

    def _statement(self, vote: Vote, case: Case, auditor: Worker, plan: StepPlan, commitments: StepCommitments) -> VoteStatement:
        """What an auditor signs: which message its vote is about, or which row, and what it found."""
        credentials = self._transcript.credentials
        live = live_workers(case.stage, plan.banned, self._mesh)
        if case.subject is Subject.ROW:
            assert self._reports is not None and self._reports.table is not None, "there is a table where a row is audited"
            row = self._reports.table.rows[self._mesh.boundaries.index(case.boundary), case.lane, case.slot]
            named = digest_of(row.numpy().tobytes(), credentials.algorithm)
            return says(vote, auditor, plan.moment(credentials.run), signal_of(case), named, live, credentials.algorithm)
        about = commitments.sent[self._name(case)].statement
        named = digest_of(encode_statement(about), credentials.algorithm)
        return says(vote, auditor, about.moment, about.signal, named, live, credentials.algorithm)

    def _name(self, case: Case) -> SignalId:
        """The message that a case is about."""
        note = note_of(case, self._mesh)
        return note if case.subject is Subject.NOTE and note is not None else signal_of(case)

    def _heard(
        self, everyone: Tensor, number: int, case: Case, auditor: Worker, plan: StepPlan, commitments: StepCommitments
    ) -> Outcome:
        """The vote of an auditor, the same on all ranks. Only its own entry counts, and only if it is signed."""
        vote = of_auditor(everyone, self._mesh.rank(auditor), number)
        credentials = self._transcript.credentials
        name = self._name(case)
        if case.subject is not Subject.ROW and not credentials.hold(commitments.sent[name]):
            # The sender has signed a row in which it does not sign its message.
            return Outcome.LIED
        words = testimony(vote, self._statement(vote, case, auditor, plan, commitments), credentials)
        if words is None:
            return Outcome.MATCHES
        if case.subject is Subject.ROW:
            self.on_rows.setdefault(case.audited, []).append(words)
        else:
            self.testimonies.setdefault(name, []).append(words)
        if vote.word == Outcome.MATCHES and case.subject is Subject.SIGNAL:
            self._tolerances.heard(self._mesh.boundaries.index(case.boundary), case.audited, vote.measured)
        return vote.word

    def _handed(self, asked: Sequence[tuple[Case, Worker]], needed: Sequence[Sequence[Need]]) -> list[dict[Item, Packed]]:
        """The items that this rank sends to the auditor of each case, packed for sending."""
        wanted = [
            (number, item, self._examination(asked[number][0]).item(item, asked[number][0]))
            for number, needs in enumerate(needed)
            for item, giver in needs
            if giver == self._worker != asked[number][1]
        ]
        handed: list[dict[Item, Packed]] = [{} for _ in asked]
        for (number, item, _), packed in zip(wanted, pack_all(held for *_, held in wanted)):
            handed[number][item] = packed
        return handed

    def _hand_over(self, case: Case, auditor: Worker, needs: Sequence[Need], handed: dict[Item, Packed]) -> dict[Item, Any]:
        """Send or receive the items that an auditor needs. Returns them on the auditor's rank."""
        items: dict[Item, Any] = {}
        for item, giver in needs:
            if item in handed:
                send_packed(handed[item], self._mesh.rank(auditor))
            elif giver == auditor == self._worker:
                items[item] = self._examination(case).item(item, case)
            elif auditor == self._worker:
                items[item] = receive_tree(self._mesh.rank(giver), self._room())
        return items

    def _decided(self, found: Sequence[Examined | None], asked: Sequence[tuple[Case, Worker]], step: int) -> dict[int, Vote]:
        """Maps the number of each case that this rank audits to its vote, not signed yet."""
        mine = {number: one for number, one in enumerate(found) if one is not None}
        recomputed = {number: one.recomputed for number, one in mine.items() if one.recomputed is not None}
        measured = {number: one.measured for number, one in mine.items() if one.measured is not None}
        on_the_host = on_host([*measured.values(), *recomputed.values()])
        numbers = {number: one.tolist() for number, one in zip(measured, on_the_host)}
        again = dict(zip(recomputed, on_the_host[len(measured) :]))
        return {
            number: self._vote(one, again.get(number), numbers.get(number), *asked[number], step) for number, one in mine.items()
        }

    def _vote(
        self, found: Examined, again: Tensor | None, measured: list[float] | None, case: Case, auditor: Worker, step: int
    ) -> Vote:
        """The vote that follows from what was found, with what was recomputed and measured on the host."""
        credentials = self._transcript.credentials
        word = found.word
        error = math.inf if measured is None else measured[0]
        if found.compare is not None and again is not None:
            error = found.compare(again)
        if measured is not None or found.compare is not None:
            word = Outcome.LIED if error > found.allowed else Outcome.MATCHES
        several = case.subject is Subject.SIGNAL and measured is not None
        numbers = measured if several and measured is not None else [math.nan] * MEASURED
        recomputed = None if again is None else credentials.digest(again)
        if recomputed is None and word == Outcome.LIED:
            recomputed = digest_of(b"", credentials.algorithm)
        vote = Vote(word, numbers, None if recomputed is None else Recomputation(recomputed, error, found.allowed))
        if self._adversary is None:
            return vote
        said = Outcome(self._adversary.vote(word, auditor, case.audited, case.boundary.direction, step))
        return lie_of(vote, said, credentials.algorithm)
