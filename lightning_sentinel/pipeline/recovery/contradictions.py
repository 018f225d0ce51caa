"""What follows where a sender and a receiver contradict each other, or where a row is signed by nobody: the step is done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.statements import Transfer
from lightning_sentinel.verification import SignalTable, StepVerdict
from lightning_sentinel.wiring import Wiring

__all__ = ["left_out", "pairs_of", "settle_contradictions"]


def pairs_of(transfers: Iterable[Transfer]) -> list[tuple[Worker, Worker]]:
    """The senders and receivers of messages, each pair once, in order."""
    return sorted({(transfer.sender, transfer.receiver) for transfer in transfers})


def left_out(pairs: Iterable[tuple[Worker, Worker]], contradicted: Mapping[Worker, Collection[Worker]]) -> set[Worker]:
    """One worker of each pair of workers that contradict each other.

    Of a pair it is the worker that has contradicted more others so far, or else the first. The pairs with such workers come first:
    so whoever contradicts many others is left out and not these, and of two that contradict nobody else only one is.

    Args:
        pairs: the senders and receivers of messages that say different things about these.
        contradicted: whom each of them has contradicted so far, in this step as well.

    Example:
        >>> one, other = Worker(0, 0), Worker(1, 0)  # Each says that it sent something else than the other received.
        >>> left_out([(one, other), (other, one)], {one: {other}, other: {one}})
        {Worker(stage=0, replica=0)}
    """
    chosen: set[Worker] = set()
    for pair in sorted(pairs, key=lambda pair: (-max(len(contradicted[worker]) for worker in pair), pair)):
        if chosen.isdisjoint(pair):
            chosen.add(max(pair, key=lambda worker: len(contradicted[worker])))
    return chosen


def settle_contradictions(
    guard: Guard, table: SignalTable, plan: StepPlan, transfers: Iterable[Transfer], forgers: frozenset[Worker]
) -> Ruling:
    """Do a step again, without one of two workers that contradict each other about a message.

    Nobody can tell which of the two lies. So neither is blamed, and other workers are put beside them from the next step on: who
    contradicts more workers of one stage than can be malicious there is a liar. One of the two is left out of this step
    (:func:`left_out`), which is enough, because the other may be the only one left that has some samples.

    Args:
        guard: whose ledger counts contradictions.
        table: the step's signals, which are not judged.
        plan: the step's plan.
        transfers: the messages about which sender and receiver disagree.
        forgers: workers whose row of the step before bore no valid signature, or that do not open their seal of this step.
    """
    mesh = plan.mesh
    pairs = pairs_of(transfers)
    banned = guard.ledger.record_contradictions(plan.number, pairs, forgers, mesh)
    excluded = sorted(forgers | left_out(pairs, guard.ledger.contradicted))
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
