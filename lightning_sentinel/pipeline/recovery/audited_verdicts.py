"""Judges steps with audits: what is recomputed in a step, and what follows from it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.recovery.contribution_checks import Contributions
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.verification import Ledger, SignalTable, StepVerdict, judge_with_audits
from lightning_sentinel.verification.audit import AuditSchedule, one_each
from lightning_sentinel.verification.calibration import Assessment
from lightning_sentinel.verification.draws import Draws
from lightning_sentinel.verification.jury import Ask, Auditable, Findings, Jury, Subject
from lightning_sentinel.verification.reports import with_reports

__all__ = ["AuditedVerdicts", "Auditors"]


class Auditors(NamedTuple):
    """Those who recompute in a step what is audited.

    Args:
        draws: what workers have drawn.
        ask: has workers recompute signals, rows and notes.
        contributions: what workers add to the weight gradients of their stages; ``None`` if none is audited.
    """

    draws: Draws
    ask: Ask
    contributions: Contributions | None = None


class AuditedVerdicts:
    """Judges the signals of steps with audits; the same on all ranks.

    Args:
        mesh: all workers.
        rate: share of signals that is audited whatever their scores, in (0, 1].
        compares_inputs: whether notes are sent, so that these are audited as well.
    """

    def __init__(self, mesh: Mesh, rate: float, compares_inputs: bool) -> None:
        self._mesh = mesh
        self._schedule = AuditSchedule(mesh, rate)
        self._jury = Jury(mesh)
        self._subjects = tuple(Subject) if compares_inputs else (Subject.SIGNAL, Subject.ROW)

    def judge(
        self, table: SignalTable, assessment: Assessment, heights: Tensor, plan: StepPlan, auditors: Auditors, ledger: Ledger
    ) -> StepVerdict:
        """The verdict on a step.

        Args:
            table: the step's signals.
            assessment: their scores.
            heights: ``(boundaries, lanes)``, cumulative sums of the senders.
            plan: the step's plan.
            auditors: of the step.
            ledger: who is banned, and whose votes do not count.
        """
        unheard = ledger.banned, ledger.muted
        draws, wiring, step = auditors.draws, plan.wiring, plan.number

        def audit(audited: Auditable) -> Findings:
            return self._jury.hear(audited, wiring, *unheard, draws.coin, auditors.ask, self._subjects)

        drawn = self._schedule.draw(draws, step, ledger.last_found, wiring, *unheard)
        seen = table, assessment, heights, drawn, one_each(draws, assessment.valid)
        return with_reports(judge_with_audits(*seen, audit, self._mesh, wiring, step), self._mesh, step)
