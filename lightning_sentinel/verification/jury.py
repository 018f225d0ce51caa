"""Votes in an audit: some workers recompute something, and if one reports a mismatch, all others of the stage recompute it too.

First are asked: who has drawn it in private, of these as many as guarantee that an honest one is among them; and where it is
audited for a reason that all know, such as a score, one whom chance chooses.

Three things are recomputed where a signal is audited. The *signal*, by the sender's stage. The receiver's *row*, by the receiver's
stage, which measures the signal that was sent, with the note that came. And that *note*, by the receiver's stage as well, which has
the secret directions: it is the projection of what the sender was sent. Weight gradients are audited by themselves.

Fewer than half of a stage's workers lie, so the majority tells the truth. Pure functions weigh votes, and a class collects them;
the engine does the recomputing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Mesh, Worker
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.verification.audit import Drawn
from lightning_sentinel.verification.majority import Judgement, live_workers, most_liars, weigh
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = [
    "Ask",
    "AskOfContributions",
    "Asked",
    "Auditable",
    "Case",
    "ContributionCase",
    "Decision",
    "Findings",
    "Jury",
    "Subject",
    "decide",
]


class Subject(IntEnum):
    """What is recomputed in an audit."""

    SIGNAL = 0
    """The signal, from what its sender received."""
    ROW = 1
    """What its receiver reported of it, from the signal and the note."""
    NOTE = 2
    """The note that the receiver compared it with, from what the sender was sent."""


class Case(NamedTuple):
    """One signal, row or note that is audited.

    Args:
        boundary: that the signal crossed.
        lane: of its micro-batch.
        slot: of its micro-batch in the lane.
        micro_batch_id: the micro-batch that it was computed from.
        audited: the sender of the signal, the receiver that reported the row, or the worker that made the note.
        subject: what is recomputed.
    """

    boundary: Boundary
    lane: int
    slot: int
    micro_batch_id: MicroBatchId
    audited: Worker
    subject: Subject = Subject.SIGNAL

    @property
    def stage(self) -> int:
        """The stage whose workers recompute it."""
        return self.boundary.sender if self.subject is Subject.SIGNAL else self.boundary.receiver


class ContributionCase(NamedTuple):
    """One worker's contribution to the weight gradients of its stage in a step, which is audited.

    Args:
        lane: that the worker served.
        audited: the worker.
    """

    lane: int
    audited: Worker

    @property
    def stage(self) -> int:
        """The stage whose workers recompute it."""
        return self.audited.stage


AnyCase = TypeVar("AnyCase", Case, ContributionCase)

Ask = Callable[[Sequence[tuple[Case, Worker]]], Sequence[Outcome]]
"""Has workers recompute what cases are about, and returns the vote of each. Of rows and notes: whether they match, or ``LIED``."""

AskOfContributions = Callable[[Sequence[tuple[ContributionCase, Worker]]], Sequence[Outcome]]
"""Has workers recompute contributions to weight gradients, and returns the vote of each."""


class Asked(NamedTuple):
    """The workers that can recompute something.

    Args:
        first: those that do.
        others: those that do so as well if one of the first reports a mismatch.
    """

    first: Sequence[Worker]
    others: Sequence[Worker]


class Decision(NamedTuple):
    """What was decided of a row or a note of which one worker said that it does not match."""

    case: Case
    judgement: Judgement


class Findings(NamedTuple):
    """Results of audits.

    Args:
        outcome: ``(boundaries, lanes, slots)``, values of :class:`Outcome`; a signal that no worker could recompute counts as
            matching.
        outvoted: workers that voted the opposite of the majority, by the place of the signal.
        reports: decisions on rows and notes.
    """

    outcome: Tensor
    outvoted: Mapping[tuple[int, int, int], frozenset[Worker]]
    reports: tuple[Decision, ...] = ()


def decide(
    asked: Mapping[AnyCase, Asked],
    live: Callable[[AnyCase], int],
    ask: Callable[[Sequence[tuple[AnyCase, Worker]]], Sequence[Outcome]],
) -> dict[AnyCase, Judgement]:
    """Decide the cases in which an auditor says anything but *matches*; calls ``ask`` twice, however many cases there are.

    Args:
        asked: the workers that can recompute, by case.
        live: how many workers of a case's stage are not banned.
        ask: has workers recompute.

    Example:
        >>> case, one, other = ContributionCase(0, Worker(1, 0)), Worker(1, 1), Worker(1, 2)
        >>> decide({case: Asked([one], [other])}, lambda case: 3, lambda asked: [Outcome.LIED] * len(asked))[case].outcome.name
        'LIED'
    """
    first = [(case, auditor) for case, workers in asked.items() for auditor in workers.first]
    votes: dict[AnyCase, dict[Worker, Outcome]] = {}
    for (case, auditor), word in zip(first, ask(first)):
        votes.setdefault(case, {})[auditor] = word
    claimed = [case for case, said in votes.items() if any(word != Outcome.MATCHES for word in said.values())]
    more = [(case, juror) for case in claimed for juror in asked[case].others]
    for (case, juror), word in zip(more, ask(more)):
        votes[case][juror] = word
    return {case: weigh(votes[case], live(case), stands=case.audited.stage == case.stage) for case in claimed}


class Auditable(NamedTuple):
    """What is to be audited in a step, ``(boundaries, lanes, slots)`` bool each.

    Args:
        signals: for a reason that all know.
        drawn: signals and rows that workers have drawn, of :class:`~lightning_sentinel.verification.audit.Drawn`.
    """

    signals: Tensor
    drawn: Drawn


class Jury:
    """Collects votes: has some workers recompute something, and all others of the stage if one of these reports a mismatch.

    Args:
        mesh: all workers.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def others(self, audited: Worker, unheard: Collection[Worker], coin: int, *place: int) -> list[Worker]:
        """The workers that can recompute a signal, in a random order.

        Args:
            audited: the sender.
            unheard: workers that are asked nothing.
            coin: of the step, from :class:`~lightning_sentinel.verification.draws.Draws`.
            place: of the signal: boundary, lane, slot.

        Example:
            >>> Jury(Mesh(2, 3)).others(Worker(1, 0), {Worker(1, 2)}, 7, 1, 0, 0)
            [Worker(stage=1, replica=1)]
        """
        return self._in_order(audited.stage, {*unheard, audited}, coin, "auditor", *place)

    def hear(
        self,
        audited: Auditable,
        wiring: Wiring,
        banned: Collection[Worker],
        muted: Collection[Worker],
        coin: int,
        ask: Ask,
        subjects: Collection[Subject] = tuple(Subject),
    ) -> Findings:
        """Audit signals of a step; the same on all ranks. Calls ``ask`` twice, however many signals and boundaries there are.

        Args:
            audited: signals to audit for a reason that all know, with the rows and the notes on them, and what workers have drawn.
            wiring: which worker served which lane.
            banned: workers that take part in nothing.
            muted: workers whose votes no longer count.
            coin: of the step, from :class:`~lightning_sentinel.verification.draws.Draws`.
            ask: has workers recompute.
            subjects: what they can recompute.
        """
        signals = self._signals(audited, wiring, banned, {*banned, *muted}, coin)
        reports = self._reports(audited, wiring, banned, {*banned, *muted}, coin, subjects)
        outcome = torch.zeros(audited.signals.shape, dtype=torch.long)
        outvoted: dict[tuple[int, int, int], frozenset[Worker]] = {}
        decisions = []
        # One boundary after the other, so that no auditor holds more than what it needs for one.
        asked = dict(sorted((signals | reports).items(), key=lambda one: self._mesh.boundaries.index(one[0].boundary)))
        for case, judged in decide(asked, lambda case: live_workers(case.stage, banned, self._mesh), ask).items():
            if case.subject is Subject.SIGNAL:
                place = self._mesh.boundaries.index(case.boundary), case.lane, case.slot
                outcome[place] = judged.outcome
                outvoted[place] = judged.outvoted
            else:
                decisions.append(Decision(case, judged))
        return Findings(outcome, outvoted, tuple(decisions))

    def _signals(
        self, audited: Auditable, wiring: Wiring, banned: Collection[Worker], unheard: Collection[Worker], coin: int
    ) -> dict[Case, Asked]:
        """The signals of a step that are audited, and who recomputes each."""
        drawn = audited.drawn.signals
        cases = {}
        for index, lane, slot in (audited.signals | drawn.any(dim=0)).nonzero().tolist():
            case = self._case(wiring, index, lane, slot)
            everyone = self.others(case.audited, unheard, coin, index, lane, slot)
            drawers = drawn[:, index, lane, slot].nonzero().flatten().tolist()
            known = bool(audited.signals[index, lane, slot])
            cases[case] = _asked(everyone, drawers, known, live_workers(case.stage, banned, self._mesh))
        return cases

    def _reports(
        self,
        audited: Auditable,
        wiring: Wiring,
        banned: Collection[Worker],
        unheard: Collection[Worker],
        coin: int,
        subjects: Collection[Subject],
    ) -> dict[Case, Asked]:
        """The rows and notes of a step that are audited, and who recomputes each."""
        drawn = audited.drawn.rows
        cases = {}
        for index, lane, slot in (audited.signals | drawn.any(dim=0)).nonzero().tolist():
            case = self._case(wiring, index, lane, slot)
            receiver = wiring.worker(case.boundary.receiver, lane)
            everyone = self._in_order(receiver.stage, {*unheard, receiver}, coin, "auditor of reports", index, lane, slot)
            drawers = drawn[:, index, lane, slot].nonzero().flatten().tolist()
            known = bool(audited.signals[index, lane, slot])
            asked = _asked(everyone, drawers, known, live_workers(receiver.stage, banned, self._mesh))
            if Subject.ROW in subjects:
                cases[case._replace(audited=receiver, subject=Subject.ROW)] = asked
            before = self._mesh.before(case.boundary)
            if Subject.NOTE in subjects and before is not None:
                # Who is asked first about the row, for which it needs the note, is asked first about the note.
                own = [] if receiver in unheard else [receiver]
                maker = wiring.worker(before.sender, lane)
                cases[case._replace(audited=maker, subject=Subject.NOTE)] = asked._replace(others=[*asked.others, *own])
        return cases

    def _in_order(self, stage: int, unheard: Collection[Worker], coin: int, what: str, *place: int) -> list[Worker]:
        fit = [worker for worker in self._mesh.of_stage(stage) if worker not in unheard]
        return sorted(fit, key=lambda worker: derive_seed(coin, what, *place, worker.replica))

    def hear_contributions(
        self,
        cases: Mapping[ContributionCase, Sequence[int] | None],
        banned: Collection[Worker],
        muted: Collection[Worker],
        coin: int,
        ask: AskOfContributions,
    ) -> dict[ContributionCase, Judgement]:
        """Audit contributions to weight gradients; returns the decisions on those that an auditor says do not match.

        Args:
            cases: the contributions that are audited, and the replicas that have drawn each; ``None`` where one is audited for a
                reason that all know.
            ask: has workers recompute contributions.

        The other arguments are those of :meth:`hear`.
        """
        unheard = {*banned, *muted}
        asked = {}
        for case, drawers in cases.items():
            everyone = self.others(case.audited, unheard, coin, case.audited.stage, case.audited.replica)
            asked[case] = _asked(everyone, drawers or (), drawers is None, live_workers(case.stage, banned, self._mesh))
        return decide(asked, lambda case: live_workers(case.stage, banned, self._mesh), ask)

    def _case(self, wiring: Wiring, index: int, lane: int, slot: int) -> Case:
        boundary = self._mesh.boundaries[index]
        return Case(boundary, lane, slot, wiring.work[lane][slot], wiring.worker(boundary.sender, lane))


def _asked(everyone: Sequence[Worker], drawers: Collection[int], known: bool, live: int) -> Asked:
    """Who is asked first, and who then.

    Whoever sends a lie has fewer accomplices than there can be malicious workers in its stage: among as many of those that drew the
    signal an honest one is, and more need not recompute it.

    Args:
        everyone: that can recompute it, in a random order.
        drawers: replicas that have drawn it.
        known: whether there is a reason to audit it that all know. Then the first of all is asked, whoever has drawn it: else an
            accomplice could always be first by drawing everything.
        live: workers of the stage that are not banned.

    Example:
        >>> workers = [Worker(1, replica) for replica in (4, 2, 5, 0, 3)]
        >>> [[one.replica for one in _asked(workers, {0, 2, 3}, known, live=6).first] for known in (False, True)]
        [[2, 0], [4, 2, 0]]
    """
    chosen = [worker for worker in everyone if worker.replica in drawers][: max(1, most_liars(live))]
    if known:
        chosen = list(dict.fromkeys([*everyone[:1], *chosen]))
    return Asked(chosen, [worker for worker in everyone if worker not in chosen])
