"""Audits on a virtual mesh, where a peer's recomputation is simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lightning_sentinel.mesh import Direction, Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.virtual_boundaries import VirtualStep
from lightning_sentinel.pipeline.virtual_workers import VirtualWorkers
from lightning_sentinel.trust.statements import Kind, SignalId
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import tolerance
from lightning_sentinel.verification.jury import Case, ContributionCase, Subject
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.reports import ROW_TOLERANCE, row_error
from lightning_sentinel.verification.sketches import sketch_error
from lightning_sentinel.verification.tolerance import MEASURED

__all__ = ["Recomputed", "VirtualAudits"]


class Recomputed(NamedTuple):
    """A worker's answer in an audit.

    Args:
        outcome: its vote.
        error: of what was audited, as the worker says.
        allowed: up to which error it matches.
    """

    outcome: Outcome
    error: float
    allowed: float

    def said(self, outcome: Outcome) -> Recomputed:
        """The answer of a worker that says something else than it found, with what that would follow from."""
        return (
            self if outcome == self.outcome else Recomputed(outcome, 0.0 if outcome == Outcome.MATCHES else math.inf, self.allowed)
        )


class VirtualAudits:
    """The votes of auditors on the signals, rows and notes of one step.

    This process computed each worker's honest signal and note before an adversary replaced them, so an audit looks up the measured
    error. A row that may be false is measured again, from what its receiver was sent. The adversary may replace the votes of
    workers that it controls.

    Args:
        workers: the workers of the mesh.
        running: the step.
        table: the rows of the step, as receivers reported them.
        computed_in: the dtype in which the device multiplies float32.
    """

    def __init__(
        self, workers: VirtualWorkers, running: VirtualStep, table: SignalTable, computed_in: Callable[[], torch.dtype]
    ) -> None:
        self._workers = workers
        self._running = running
        self.table = table
        self._computed_in = computed_in
        self._errors: dict[int, dict[tuple[int, int], list[float]]] | None = None
        """Measured errors of the step's signals, by boundary and place; ``None`` before the step's first audit."""
        self._false: dict[tuple[Subject, int, int, int], bool] = {}
        """Whether rows and notes are false, as far as they were asked about."""
        self.answers: dict[Case | ContributionCase, list[tuple[Worker, Recomputed]]] = {}
        """What workers answered, by case."""

    def ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        """The votes of workers on cases."""
        guard = self._workers.guard
        assert guard is not None, "it is what asks"
        adversary = self._workers.adversary
        votes = []
        for case, juror in asked:
            if case.subject is Subject.SIGNAL and self._is_contradicted(case):
                votes.append(Outcome.MATCHES)
                continue
            index = self._workers.mesh.boundaries.index(case.boundary)
            found = self._error(index, case) if case.subject is Subject.SIGNAL else None
            answer = self._of_report(guard, index, case) if found is None else self._of_signal(guard, index, case, found)
            if adversary is not None:
                step = self._running.plan.number
                said = adversary.vote(answer.outcome, juror, case.audited, case.boundary.direction, step)
                answer = answer.said(Outcome(said))
            self.answers.setdefault(case, []).append((juror, answer))
            votes.append(answer.outcome)
            if found is not None and answer.outcome == Outcome.MATCHES:
                guard.tolerances.heard(index, case.audited, found)
        return votes

    def ask_of_contributions(self, asked: Sequence[tuple[ContributionCase, Worker]]) -> list[Outcome]:
        """The votes of workers on contributions to weight gradients; a contribution that is not looked at is honest."""
        adversary = self._workers.adversary
        votes = []
        for case, juror in asked:
            known = self._running.contributed.get(case.audited)
            answer = Recomputed(Outcome.MATCHES, 0.0, 0.0)
            if known is not None:
                answer = _answer(float(sketch_error(known.added, known.honest)), tolerance(known.dtype, self._computed_in()))
            if adversary is not None:
                step = self._running.plan.number
                answer = answer.said(Outcome(adversary.vote(answer.outcome, juror, case.audited, Direction.GRADIENT, step)))
            self.answers.setdefault(case, []).append((juror, answer))
            votes.append(answer.outcome)
        return votes

    def _is_contradicted(self, case: Case) -> bool:
        """Whether nobody can judge a signal, because sender and receiver say different things about it and the run only reports."""
        return SignalId(Kind.SIGNAL, case.boundary, case.lane, case.slot) in self._running.contradictions

    def _of_signal(self, guard: Guard, index: int, case: Case, found: Sequence[float]) -> Recomputed:
        """What an honest worker says of a signal with these errors."""
        measured = self._running.measured.get(index, {}).get((case.lane, case.slot))
        dtype = torch.float32 if measured is None else measured[0]
        return _answer(found[0], guard.tolerances.allowed(index, case.audited, dtype, self._computed_in()))

    def _of_report(self, guard: Guard, index: int, case: Case) -> Recomputed:
        """What an honest worker says of a row or a note."""
        return _answer(math.inf if self._is_false(guard, index, case) else 0.0, 0.0)

    def _error(self, index: int, case: Case) -> list[float]:
        """The errors of a signal. The host waits for the device only at a step's first audit."""
        if self._errors is None:
            measured = [found for places in self._running.measured.values() for _, found in places.values()]
            values = iter(torch.stack(measured).tolist() if measured else ())
            self._errors = {
                boundary: {place: next(values) for place in places} for boundary, places in self._running.measured.items()
            }
        return self._errors.get(index, {}).get((case.lane, case.slot), [0.0] * MEASURED)

    def _is_false(self, guard: Guard, index: int, case: Case) -> bool:
        """Whether a row or a note is false."""
        place = index, case.lane, case.slot
        key = case.subject, *place
        if key not in self._false:
            if case.subject is Subject.NOTE:
                false = bool(self._running.notes.get(place, False))
            elif (receipt := self._running.receipts.get(place)) is None:
                false = False
            else:
                again = guard.verifiers[case.boundary].measure_again(*receipt)[0].cpu()
                calibration = guard.calibration
                fences = calibration.fences_at_receipt(index), calibration.among_peers.fences.of(index)
                false = row_error(self.table.rows[place], again, *fences) > ROW_TOLERANCE
            self._false[key] = false
        return self._false[key]


def _answer(error: float, allowed: float) -> Recomputed:
    return Recomputed(Outcome.LIED if error > allowed else Outcome.MATCHES, error, allowed)
