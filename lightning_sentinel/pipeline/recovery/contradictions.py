"""What follows where a sender and a receiver contradict each other, or where a row is signed by nobody: the step is done again."""

from __future__ import annotations

from collections.abc import Collection

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.statements import Transfer
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.verdicts import unjudged
from lightning_sentinel.wiring import Wiring

__all__ = ["settle_contradictions"]


def settle_contradictions(
    guard: Guard, table: SignalTable, plan: StepPlan, transfers: Collection[Transfer], forgers: frozenset[Worker]
) -> Ruling:
    """Leave out the workers that contradict each other about a message, and do the step again.

    Nobody can tell which of the two lies. So neither is blamed, and other workers are put beside them from the next step on: who
    contradicts more workers of one stage than can be malicious there is a liar.

    Args:
        guard: whose ledger counts contradictions.
        table: the step's signals, which are not judged.
        plan: the step's plan.
        transfers: the messages about which sender and receiver disagree.
        forgers: workers whose row of the step before bore no valid signature.
    """
    mesh = plan.mesh
    pairs = sorted({(transfer.sender, transfer.receiver) for transfer in transfers})
    banned = guard.ledger.record_contradictions(plan.number, pairs, forgers, mesh)
    excluded = sorted({*forgers, *(worker for pair in pairs for worker in pair)})
    guard.forget_step()
    redo = any(Wiring.of(mesh, plan.absent.union(banned, excluded)).live)
    return Ruling(unjudged(table, mesh), banned, excluded, redo=redo, plan=plan, contradictions=pairs, forgers=forgers)
