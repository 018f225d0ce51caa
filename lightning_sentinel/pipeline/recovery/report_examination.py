"""How an auditor examines what workers report beside signals: the row of a receiver, and the note of a sender.

Both follow from signals that are named in the step's table. Whoever is audited hands over what its report follows from, and is a
liar if that is not what is named there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.recovery.examination import Examined, Item, Need, signal_of
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.trust.statements import Kind, SignalId
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import relative_error
from lightning_sentinel.verification.jury import Case, Subject
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.verification.reports import NOTE_TOLERANCE, ROW_TOLERANCE, row_error

__all__ = ["ReportExamination", "note_of"]

_LIED = Examined(Outcome.LIED)


def note_of(case: Case, mesh: Mesh) -> SignalId | None:
    """The note on what the sender of a signal received; ``None`` where it received nothing."""
    before = mesh.before(case.boundary)
    return None if before is None else SignalId(Kind.NOTE, before, case.lane, case.slot)


class ReportExamination:
    """Measures again what a receiver reported, and projects again what a note is of.

    Args:
        mesh: all workers.
        cache: the signals and notes that this rank sent and received.
        guard: of this rank, which has the references of the receiver's stage.
        device: where signals are measured.
    """

    def __init__(self, mesh: Mesh, cache: SignalCache, guard: Guard, device: torch.device) -> None:
        self._mesh = mesh
        self._cache = cache
        self._guard = guard
        self._device = device
        self.table: SignalTable | None = None
        """The rows of the step, as receivers reported them."""

    @property
    def has_notes(self) -> bool:
        """Whether workers send notes."""
        return self._guard.compares_inputs

    def needs(self, case: Case, plan: StepPlan) -> list[Need]:
        needs = [Need(Item.SIGNAL, case.audited)]
        return [*needs, Need(Item.NOTE, case.audited)] if self._has_note(case) else needs

    def item(self, item: Item, case: Case) -> Any:
        cache = self._cache
        place = case.boundary.direction, case.slot
        if case.subject is Subject.ROW:
            return cache.received[place] if item is Item.SIGNAL else list(cache.notes_received[place])
        return cache.sent[place] if item is Item.SIGNAL else list(cache.notes_sent[place])

    def examine(self, case: Case, items: Mapping[Item, Any], commitments: StepCommitments) -> Examined:
        signal = items[Item.SIGNAL]
        if not isinstance(signal, Tensor) or not _is_named(signal, self._handed(case), commitments):
            return _LIED
        note = None
        if self._has_note(case):
            note = _note(items[Item.NOTE])
            name = note_of(case, self._mesh)
            if note is None or name is None or not _is_named(note.whole, name, commitments):
                return _LIED
            note = note._replace(values=note.values.to(self._device))
        if case.subject is Subject.ROW:
            return self._row(case, signal.to(self._device), note, commitments)
        assert note is not None, "a note is audited where there is one"
        return self._note(case, signal.to(self._device), note)

    def _has_note(self, case: Case) -> bool:
        return self.has_notes and note_of(case, self._mesh) is not None

    def _handed(self, case: Case) -> SignalId:
        """The signal that the audited worker hands over: the one that its row is about, or the one that its note is of."""
        before = self._mesh.before(case.boundary)
        if case.subject is Subject.ROW or before is None:
            return signal_of(case)
        return SignalId(Kind.SIGNAL, before, case.lane, case.slot)

    def _row(self, case: Case, signal: Tensor, note: Projection | None, commitments: StepCommitments) -> Examined:
        assert self.table is not None, "there is a table where a row is audited"
        index = self._mesh.boundaries.index(case.boundary)
        tainted = torch.tensor([self._is_tainted(case, commitments)], device=self._device)
        (row,) = self._guard.verifiers[case.boundary].measure_again(signal, tainted, note)
        calibration = self._guard.calibration
        told = self.table.rows[index, case.lane, case.slot]
        fences = calibration.fences_at_receipt(index), calibration.among_peers.fences.of(index)
        return Examined(Outcome.MATCHES, row, compare=lambda again: row_error(told, again, *fences), allowed=ROW_TOLERANCE)

    def _is_tainted(self, case: Case, commitments: StepCommitments) -> bool:
        """Whether the receiver of a signal knows that its micro-batch is left out."""
        stage = case.boundary.receiver
        if commitments.is_tainted(signal_of(case)):
            return True
        if case.boundary.direction is Direction.ACTIVATION or stage == 0:
            return False
        return commitments.is_tainted(SignalId(Kind.SIGNAL, Boundary(stage - 1, Direction.ACTIVATION), case.lane, case.slot))

    def _note(self, case: Case, signal: Tensor, note: Projection) -> Examined:
        honest = self._guard.project(case.boundary, signal)
        assert honest is not None, "notes are audited where inputs are compared"
        if note.channels != honest.channels or note.values.shape != honest.values.shape:
            return Examined(Outcome.LIED, honest.whole)
        error = relative_error(note.values, honest.values)
        return Examined(Outcome.MATCHES, honest.whole, error.view(1), allowed=NOTE_TOLERANCE)


def _note(handed: Any) -> Projection | None:
    """The note that was handed over; ``None`` if it is none."""
    if not isinstance(handed, list) or len(handed) != 2:
        return None
    values, channels = handed
    is_note = isinstance(values, Tensor) and values.dtype is torch.float32 and values.dim() == 3
    return Projection(values, channels) if is_note and type(channels) is int else None


def _is_named(tensor: Tensor, name: SignalId, commitments: StepCommitments) -> bool:
    """Whether this is the message that its sender has named."""
    sent = commitments.sent_digest(name)
    return sent is not None and sent.names(tensor)
