"""Evidence of bans on a virtual mesh: signed when somebody is banned, with what its workers would have signed all along.

Keys are drawn from the secret seed, so that a run that is repeated leaves the same files. Whoever knows the seed can sign for all
workers: a simulation proves nothing to others, and shows what a file of a real mesh says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_sentinel.errors import MissingExtraError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import SignedRow
from lightning_sentinel.pipeline.recovery.evidence import Heard, first_that_holds, of_audits, of_flags, reasons_of
from lightning_sentinel.pipeline.recovery.flag_records import FencesOfStep, FlagRecords, Noted
from lightning_sentinel.pipeline.recovery.votes import Vote, says, says_of_weights, sketch_bytes, testimony
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.pipeline.virtual_audits import Recomputed, VirtualAudits
from lightning_sentinel.pipeline.virtual_boundaries import VirtualStep
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Digest, digest_of
from lightning_sentinel.trust.encoding import encode
from lightning_sentinel.trust.evidence import Reason, Recomputation, Testimony
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import RUN_BYTES, Kind, Moment, RowStatement, SignalId, SignalStatement
from lightning_sentinel.verification import Ledger, SignalTable
from lightning_sentinel.verification.jury import Case, ContributionCase, Subject
from lightning_sentinel.verification.majority import live_workers

__all__ = ["VirtualEvidence"]

Answers = Sequence[tuple[Worker, Recomputed]]


class VirtualEvidence:
    """Shows why simulated workers are banned.

    Args:
        mesh: all workers.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._flags = FlagRecords(mesh)

    def of_audits(self, ruling: Ruling, audits: VirtualAudits, running: VirtualStep, seed: int) -> Ruling:
        """The ruling on a step with audits, with what shows why it bans workers.

        Args:
            ruling: on the step.
            audits: of the step.
            running: the step.
            seed: of the keys.
        """
        if not ruling.banned:
            return ruling
        signing = _Signing(self._mesh, seed, ruling)
        heard = signing.heard(audits, running)
        return ruling._replace(evidence=of_audits(reasons_of(ruling), ruling.plan.number, heard, signing.credentials))

    def of_contradictions(self, ruling: Ruling) -> Ruling:
        """The ruling on a step in which workers contradict each other, with a record of each ban: no rows are kept that show it."""
        reason, step = Reason.CONTRADICTED_OTHERS, ruling.plan.number
        return ruling._replace(evidence={worker: first_that_holds((), worker, reason, step) for worker in ruling.banned})

    def of_flags(self, table: SignalTable, ruling: Ruling, ledger: Ledger, fences: FencesOfStep, seed: int) -> Ruling:
        """The ruling on a step that was judged by flags, with what shows why it bans workers.

        Args:
            seed: of the keys.

        The other arguments are those of :meth:`FlagRecords.add`.
        """
        records = self._flags.add(table, ruling, ledger, fences, {})
        if not records:
            return ruling
        signing = _Signing(self._mesh, seed, ruling)
        shown = {
            worker: of_flags(worker, record, [signing.noted(one) for one in steps], signing.credentials)
            for worker, (record, steps) in records.items()
        }
        return ruling._replace(evidence=shown)


class _Signing:
    """Signs for all workers of the mesh.

    Args:
        mesh: all workers.
        seed: of the keys.
        ruling: on the step in which somebody is banned.
    """

    def __init__(self, mesh: Mesh, seed: int, ruling: Ruling) -> None:
        self._mesh = mesh
        self._seed = derive_seed(seed, "identities")
        self._plan = ruling.plan
        self._guilty = frozenset(ruling.banned)

    @cached_property
    def _identities(self) -> dict[Worker, Identity]:
        try:
            return {worker: Identity.seeded(self._seed, str(worker)) for worker in self._mesh.workers}
        except MissingExtraError:
            # Then nobody signs, and evidence is a record.
            return {}

    @cached_property
    def credentials(self) -> Credentials:
        """The keys of all workers."""
        run = hashlib.sha256(f"lightning-sentinel run/{self._seed}".encode()).digest()[:RUN_BYTES]
        return Credentials(run, keys={worker: identity.public for worker, identity in self._identities.items()})

    def of(self, worker: Worker) -> Credentials:
        """What a worker signs with."""
        return replace(self.credentials, identity=self._identities.get(worker))

    def heard(self, audits: VirtualAudits, running: VirtualStep) -> Heard:
        """What workers would have said of that for which somebody is banned."""
        messages: dict[SignalId, list[Testimony]] = {}
        in_rows: dict[Worker, list[Testimony]] = {}
        rows: dict[Worker, SignedRow] = {}
        commitments = StepCommitments()
        for case, answers in audits.answers.items():
            worker = case.audited
            if worker not in self._guilty:
                continue
            if isinstance(case, ContributionCase) or case.subject is Subject.ROW:
                rows[worker] = self._row_of(worker, _contents(worker, running, audits.table), self._now)
                in_rows.setdefault(worker, []).extend(self._on_row(case, answers, running, audits.table))
                continue
            place = self._mesh.boundaries.index(case.boundary), case.lane, case.slot
            # Of what is as it should be nobody has kept the elements.
            kept = (running.kept if case.subject is Subject.SIGNAL else running.false_notes).get(place)
            if kept is not None:
                about = self._signed(case, kept[0])
                commitments.sent[about.statement.signal] = about
                messages[about.statement.signal] = self._on_message(about.statement, answers, kept[1], case.stage)
        return Heard(commitments, messages, in_rows, rows)

    def _signed(self, case: Case, sent: Tensor) -> Signed[SignalStatement]:
        """What the sender of a signal or a note signs."""
        boundary, kind = case.boundary, Kind.SIGNAL
        if case.subject is Subject.NOTE:
            before = self._mesh.before(boundary)
            assert before is not None, "without a signal before there is no note"
            boundary, kind = before, Kind.NOTE
        own = self.of(case.audited)
        signal = SignalId(kind, boundary, case.lane, case.slot)
        return own.sign(SignalStatement(self._now, case.audited, signal, False, own.digest(sent)))

    def _on_message(self, about: SignalStatement, answers: Answers, honest: Tensor, stage: int) -> list[Testimony]:
        live, algorithm = self._live(stage), self.credentials.algorithm
        named = digest_of(encode(about), algorithm)
        return self._votes(
            answers,
            self.credentials.digest(honest),
            lambda vote, juror: says(vote, juror, about.moment, about.signal, named, live, algorithm),
        )

    def _on_row(self, case: Case | ContributionCase, answers: Answers, running: VirtualStep, table: SignalTable) -> list[Testimony]:
        """The votes on a row, or on a contribution; one that is not looked at is honest."""
        audited, live, now, credentials = case.audited, self._live(case.stage), self._now, self.credentials
        algorithm = credentials.algorithm
        if isinstance(case, ContributionCase):
            known = running.contributed.get(audited)
            if known is None:
                return []
            sketch = known.added.cpu()
            recomputed = digest_of(sketch_bytes(known.honest.cpu()), algorithm)
            return self._votes(
                answers, recomputed, lambda vote, juror: says_of_weights(vote, juror, audited, sketch, now, live, credentials)
            )
        signal = SignalId(Kind.SIGNAL, case.boundary, case.lane, case.slot)
        reported = table.rows[self._mesh.boundaries.index(case.boundary), case.lane, case.slot]
        named = digest_of(reported.numpy().tobytes(), algorithm)
        # Nobody keeps the row that is measured again.
        recomputed = digest_of(b"", algorithm)
        return self._votes(
            answers,
            recomputed,
            lambda vote, juror: says(vote, juror, now, signal, named, live, algorithm),
        )

    def _votes(self, answers: Answers, recomputed: Digest, says_so: Callable[[Vote, Worker], Any]) -> list[Testimony]:
        """The signed votes of those that answered.

        Args:
            answers: of each juror.
            recomputed: digest of what they recomputed.
            says_so: returns the statement that a juror signs.
        """
        votes = []
        for juror, found in answers:
            vote = Vote(found.outcome, recomputation=Recomputation(recomputed, found.error, found.allowed))
            statement = says_so(vote, juror)
            vote = replace(vote, signature=self.of(juror).sign(statement).signature)
            words = testimony(vote, statement, self.credentials)
            assert words is not None, "signed with the juror's own key"
            votes.append(words)
        return votes

    def noted(self, one: Noted) -> Noted:
        """A step of a suspect, with the rows of those that received its signals."""
        receivers = sorted({signal.receiver for signal in one.step.signals}) if self.credentials.keys else []
        rows = []
        for receiver in receivers:
            contents = b"".join(signal.row for signal in one.step.signals if signal.receiver == receiver)
            rows.append(self._row_of(receiver, contents, Moment(self.credentials.run, one.step.step, one.attempt)))
        return one._replace(rows=tuple(rows))

    @property
    def _now(self) -> Moment:
        return self._plan.moment(self.credentials.run)

    def _live(self, stage: int) -> int:
        return live_workers(stage, self._plan.banned, self._mesh)

    def _row_of(self, worker: Worker, contents: bytes, moment: Moment) -> SignedRow:
        """A row with what matters of it. Tables of a virtual mesh are not chained: no relay could alter one."""
        algorithm = self.credentials.algorithm
        statement = RowStatement(moment, worker, digest_of(contents, algorithm), digest_of(b"", algorithm))
        return SignedRow(self.of(worker).sign(statement), contents)


def _contents(worker: Worker, running: VirtualStep, table: SignalTable) -> bytes:
    """Of a worker's row: what it reports of signals that it received, and the sketch of its weight gradients."""
    lane = running.plan.wiring.lane(worker)
    received = [index for index, boundary in enumerate(running.plan.mesh.boundaries) if boundary.receiver == worker.stage]
    reported = b"" if lane is None else table.rows[received, lane].numpy().tobytes()
    known = running.contributed.get(worker)
    return reported + (b"" if known is None else sketch_bytes(known.added.cpu()))
