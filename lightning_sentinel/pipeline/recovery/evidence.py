"""Evidence of bans: what was said in a run that shows why a worker was banned, the same on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import SignedRow, Transcript
from lightning_sentinel.pipeline.recovery.flag_records import FencesOfStep, FlagRecords, Noted
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.evidence import Evidence, Reason, Testimony
from lightning_sentinel.trust.identity import SIGNATURE_BYTES, PublicKey
from lightning_sentinel.trust.records import FlagRecord
from lightning_sentinel.trust.signing import S, Signed
from lightning_sentinel.trust.statements import ContributionVote, Kind, RowStatement, SignalId, SignalStatement, VoteStatement
from lightning_sentinel.trust.verify_evidence import verify_evidence
from lightning_sentinel.verification import Ledger, SignalTable
from lightning_sentinel.verification.contributions import WEIGHT_GRADIENT
from lightning_sentinel.verification.reports import NOTE, ROW
from lightning_sentinel.verification.verdicts import Detection

__all__ = ["BanEvidence", "Heard", "first_that_holds", "of_audits", "of_contradictions", "of_flags", "of_forgery", "reasons_of"]

_NO_SIGNATURE = bytes(SIGNATURE_BYTES)
_MOST_PAIRS = 256
"""Of workers that contradict each other, of which rows are kept."""
_REASONS = {ROW: Reason.ROW, NOTE: Reason.NOTE, WEIGHT_GRADIENT: Reason.CONTRIBUTION}


class Heard(NamedTuple):
    """What was said in the audits of a step.

    Args:
        commitments: what workers say about the signals that they sent.
        messages: the votes on signals and notes.
        in_rows: the votes on what stands in a worker's row: contributions to weight gradients, and what it reports of signals.
        rows: the rows of the step.
    """

    commitments: StepCommitments
    messages: Mapping[SignalId, Sequence[Testimony]]
    in_rows: Mapping[Worker, Sequence[Testimony]]
    rows: Mapping[Worker, SignedRow]


class BanEvidence:
    """Collects what shows why workers are banned, over the steps of a run.

    Args:
        mesh: all workers.
        transcript: has the signed rows of each step.
    """

    def __init__(self, mesh: Mesh, transcript: Transcript) -> None:
        self._mesh = mesh
        self._transcript = transcript
        self._pairs: dict[tuple[Worker, Worker], tuple[SignedRow, SignedRow]] = {}
        """The rows of workers that contradict each other, of the first step in which they did."""
        self._flags = FlagRecords(mesh)

    def of_contradictions(self, ruling: Ruling) -> Ruling:
        """The ruling on a step in which workers contradict each other, or in whose table rows are forged, with its evidence."""
        rows = self._transcript.rows()
        for pair in ruling.contradictions:
            self._pairs.setdefault(pair, (rows[pair[0]], rows[pair[1]]))
        while len(self._pairs) > _MOST_PAIRS:
            del self._pairs[next(iter(self._pairs))]
        credentials = self._transcript.credentials
        step = ruling.plan.number
        found = {}
        for worker in ruling.banned:
            if worker in ruling.forgers:
                now = (one.signed for one in rows.values())
                candidates = [of_forgery(worker, self._transcript.rows_before().values(), now, credentials)]
                otherwise = Reason.FORGED
            else:
                candidates = [of_contradictions(worker, self._pairs, self._mesh, ruling.plan.banned, credentials)]
                otherwise = Reason.CONTRADICTED_OTHERS
            found[worker] = first_that_holds(candidates, worker, otherwise, step)
        return ruling._replace(evidence=found)

    def of_seals(self, ruling: Ruling) -> Ruling:
        """The ruling on a step in which workers do not open their seals, with a record of each ban."""
        step = ruling.plan.number
        return ruling._replace(evidence={worker: first_that_holds((), worker, Reason.SEAL, step) for worker in ruling.banned})

    def of_audits(
        self,
        ruling: Ruling,
        commitments: StepCommitments,
        messages: Mapping[SignalId, Sequence[Testimony]],
        in_rows: Mapping[Worker, Sequence[Testimony]],
    ) -> Ruling:
        """The ruling on a step with audits, with its evidence; the other arguments are those of :class:`Heard`."""
        if not ruling.banned:
            return ruling
        heard = Heard(commitments, messages, in_rows, self._transcript.rows())
        return ruling._replace(evidence=of_audits(reasons_of(ruling), ruling.plan.number, heard, self._transcript.credentials))

    def of_flags(self, table: SignalTable, ruling: Ruling, ledger: Ledger, fences: FencesOfStep) -> Ruling:
        """The ruling on a step that was judged by flags, with its evidence; the arguments are those of :meth:`FlagRecords.add`."""
        credentials = self._transcript.credentials
        rows = self._transcript.rows() if credentials.keys and ruling.verdict.suspects else {}
        records = self._flags.add(table, ruling, ledger, fences, rows)
        return ruling._replace(evidence={worker: of_flags(worker, *record, credentials) for worker, record in records.items()})


def reasons_of(ruling: Ruling) -> dict[Worker, Reason]:
    """Why a step bans workers by audits, as its detections say."""
    return {worker: _reason(worker, ruling.verdict.detections) for worker in ruling.banned}


def of_audits(banned: Mapping[Worker, Reason], step: int, heard: Heard, credentials: Credentials) -> dict[Worker, Evidence]:
    """The evidence of a step's bans by audits, the same on all ranks.

    Args:
        banned: workers, and what is said of each if nothing that was signed shows why.
        step: number of the training batch.
        heard: what was said in it.
        credentials: with the keys of all workers.
    """
    return {
        worker: first_that_holds(_candidates(worker, heard, credentials), worker, reason, step) for worker, reason in banned.items()
    }


def first_that_holds(candidates: Iterable[Evidence], worker: Worker, reason: Reason, step: int) -> Evidence:
    """The first evidence that holds; else a bare record of the ban, which says that it shows nothing."""
    bare = Evidence(worker, reason, step, {}, (), ())
    return next((one for one in candidates if verify_evidence(one).holds), bare)


def of_forgery(
    worker: Worker, before: Iterable[Signed[RowStatement]], now: Iterable[Signed[RowStatement]], credentials: Credentials
) -> Evidence:
    """What shows that a row bore no valid signature: all rows of its step, and those of the next, which say that all saw these.

    Args:
        worker: whose row it is.
        before: all rows of the step before.
        now: those of this step.
        credentials: with the keys of all workers.
    """
    messages = (*before, *(one for one in now if credentials.hold(one)))
    latest = max((one.statement.moment.step for one in messages), default=0)
    return Evidence(worker, Reason.FORGED, latest, dict(sorted(credentials.keys.items())), messages, ())


def of_contradictions(
    worker: Worker,
    pairs: Mapping[tuple[Worker, Worker], tuple[SignedRow, SignedRow]],
    mesh: Mesh,
    banned: Collection[Worker],
    credentials: Credentials,
) -> Evidence:
    """What shows that a worker contradicts others: of each of them the row that says something else than its own.

    Args:
        worker: that is banned.
        pairs: the rows of workers that contradict each other.
        mesh: all workers.
        banned: before this step.
        credentials: with the keys of all workers.
    """
    of_worker = {pair: rows for pair, rows in pairs.items() if worker in pair}
    others = {other for pair in of_worker for other in pair if other != worker}
    stages = {other.stage for other in others}
    live = {one for one in mesh.workers if one.stage in stages and one not in banned}
    own = {one for one in mesh.workers if one.stage == worker.stage}
    rows = dict.fromkeys(row for both in of_worker.values() for row in both)
    return _of_rows(worker, Reason.CONTRADICTED_OTHERS, tuple(rows), live | own | others, credentials)


def of_flags(worker: Worker, record: FlagRecord, noted: Sequence[Noted], credentials: Credentials) -> Evidence:
    """The record of a ban by flags, with the signed rows of those that reported them.

    Args:
        worker: that is banned.
        record: of its streak.
        noted: its steps, with the rows of the receivers.
        credentials: with the keys of all workers.
    """
    rows = tuple(dict.fromkeys(row for one in noted for row in one.rows))
    step = record.steps[-1].step if record.steps else 0
    bare = Evidence(worker, Reason.FLAGGED, step, {}, (), (), record=record)
    if not rows:
        return bare
    signers = {row.signed.statement.sender for row in rows}
    signed = replace(_of_rows(worker, Reason.FLAGGED, rows, signers | {worker}, credentials), record=record)
    return signed if verify_evidence(signed).holds else bare


def _of_rows(
    worker: Worker, reason: Reason, rows: Sequence[SignedRow], named: Collection[Worker], credentials: Credentials
) -> Evidence:
    step = max((row.signed.statement.moment.step for row in rows), default=0)
    messages = tuple(row.signed for row in rows)
    return Evidence(worker, reason, step, _keys(named, credentials), messages, (), tuple(row.contents for row in rows))


def _reason(worker: Worker, detections: Sequence[Detection]) -> Reason:
    """Why audits ban a worker, as its detections say."""
    features = [one.feature for one in detections if one.worker == worker and one.confirmed]
    if not features:
        # Nothing that it sent or said of signals is false: it was banned for its votes.
        return Reason.FALSE_WORD
    return next((_REASONS[feature] for feature in features if feature in _REASONS), Reason.LIED)


def _candidates(worker: Worker, heard: Heard, credentials: Credentials) -> Iterator[Evidence]:
    """What each vote of a step may show against a worker."""
    for signal, votes in heard.messages.items():
        evidence = _of_message(worker, signal, votes, heard.commitments, credentials)
        yield evidence
        if any(one.vote.statement.sender == worker for one in votes):
            yield replace(evidence, reason=Reason.FALSE_WORD, messages=evidence.messages[:1])
    for audited, votes in heard.in_rows.items():
        of_weights = [one for one in votes if isinstance(one.vote.statement, ContributionVote)]
        yield _in_row(worker, audited, of_weights, Reason.CONTRIBUTION, heard, credentials)
        of_reports = [one for one in votes if isinstance(one.vote.statement, VoteStatement)]
        yield _in_row(worker, audited, of_reports, Reason.ROW, heard, credentials)
    if worker in heard.rows and credentials.keys:
        stage = {other for other in credentials.keys if other.stage == worker.stage}
        yield _of_rows(worker, Reason.FORGED, (heard.rows[worker],), stage, credentials)


def _of_message(
    worker: Worker, signal: SignalId, votes: Sequence[Testimony], commitments: StepCommitments, credentials: Credentials
) -> Evidence:
    about = commitments.sent[signal]
    messages = [about]
    reason = Reason.NOTE if signal.kind is Kind.NOTE else Reason.LIED
    if about.statement.sender != worker:
        # What it sent of the same micro-batch shows that it was its part to hand over what was asked for.
        lane = [one for key, one in commitments.sent.items() if (key.lane, key.slot) == (signal.lane, signal.slot)]
        messages += [one for one in lane if one.statement.sender == worker][:1]
        reason = Reason.WITHHELD
    stages = {about.statement.sender.stage, *(one.vote.statement.sender.stage for one in votes)}
    named = {other for other in credentials.keys if other.stage in stages} | {worker}
    shown = tuple(_as_signed(one, credentials) for one in messages)
    return Evidence(worker, reason, about.statement.moment.step, _keys(named, credentials), shown, tuple(votes))


def _in_row(
    worker: Worker, audited: Worker, votes: Sequence[Testimony], reason: Reason, heard: Heard, credentials: Credentials
) -> Evidence:
    row = heard.rows[audited]
    row = row._replace(signed=_as_signed(row.signed, credentials))
    signals: list[Signed[SignalStatement]] = []
    if worker != audited:
        # What both sent shows that they served the same lane, so that it was its part to hand over what was asked for.
        reason = Reason.WITHHELD
        for one in (audited, worker):
            signals += [sent for sent in heard.commitments.sent.values() if sent.statement.sender == one][:1]
    named = {other for other in credentials.keys if other.stage == audited.stage} | {worker}
    evidence = _of_rows(worker, reason, (row,), named, credentials)
    shown = tuple(_as_signed(one, credentials) for one in signals)
    return replace(evidence, messages=(*evidence.messages, *shown), testimonies=tuple(votes))


def _keys(workers: Collection[Worker], credentials: Credentials) -> dict[Worker, PublicKey]:
    return {worker: credentials.keys[worker] for worker in sorted(workers) if worker in credentials.keys}


def _as_signed(one: Signed[S], credentials: Credentials) -> Signed[S]:
    """The statement as evidence has it: with no signature at all where nobody signs, whatever came in its place."""
    return one if credentials.keys else Signed(one.statement, _NO_SIGNATURE)
