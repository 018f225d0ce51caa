"""What follows where a sender and a receiver contradict each other, or where a row is signed by nobody: the step is done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.statements import Transfer
from lightning_sentinel.verification import SignalTable, StepVerdict
from lightning_sentinel.wiring import Wiring

__all__ = ["pairs_of", "settle_contradictions"]


def pairs_of(transfers: Iterable[Transfer]) -> list[tuple[Worker, Worker]]:
    """The senders and receivers of messages, each pair once, in order."""
    return sorted({(transfer.sender, transfer.receiver) for transfer in transfers})


def settle_contradictions(
    guard: Guard, table: SignalTable, plan: StepPlan, transfers: Iterable[Transfer], forgers: frozenset[Worker]
) -> Ruling:
    """Do a step again, without one of two workers that contradict each other about a message.

    Nobody can tell which of the two lies. So neither is blamed, and other workers are put beside them from the next step on: who
    contradicts more workers of one stage than can be malicious there is a liar. Who has contradicted more workers so far is left
    out of this step, or the sender. One of the two is enough, because the other may be the only one left that has some samples.

    Args:
        guard: whose ledger counts contradictions.
        table: the step's signals, which are not judged.
        plan: the step's plan.
        transfers: the messages about which sender and receiver disagree.
        forgers: workers whose row of the step before bore no valid signature.
    """
    mesh = plan.mesh
    pairs = pairs_of(transfers)
    banned = guard.ledger.record_contradictions(plan.number, pairs, forgers, mesh)
    contradicted = guard.ledger.contradicted
    excluded = sorted({*forgers, *(max(pair, key=lambda worker: len(contradicted[worker])) for pair in pairs)})
    guard.forget_step()
    redo = any(Wiring.of(mesh, plan.absent.union(banned, excluded)).live)
    return Ruling(_no_verdict(table, mesh), banned, excluded, redo=redo, plan=plan, contradictions=pairs, forgers=forgers)


def _no_verdict(table: SignalTable, mesh: Mesh) -> StepVerdict:
    """On a step that will be done again for another reason than its signals."""
    nothing = torch.zeros_like(table.tainted)
    return StepVerdict(
        detections=(),
        flagged=Counter(),
        suspects=frozenset(),
        unmistakable=frozenset(),
        verified=frozenset(),
        guilty=frozenset(),
        disputed=frozenset(),
        outvoted=frozenset(),
        audits=0,
        honest=nothing,
        heard=nothing,
        explained=nothing,
        clean=torch.zeros(mesh.stages, *nothing.shape[1:], dtype=torch.bool),
        table=table,
    )
