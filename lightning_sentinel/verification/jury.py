"""Votes in an audit: one worker recomputes something, and if it reports a mismatch, all others of its stage recompute it too.

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
from lightning_sentinel.verification.audit import Outcome
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = [
    "Ask",
    "AskOfContributions",
    "Case",
    "ContributionCase",
    "Decision",
    "Findings",
    "Judgement",
    "Jury",
    "Subject",
    "decide",
    "live_workers",
    "most_bans",
    "refutations_to_ban",
    "strikes_to_ban",
    "weigh",
]

_ALL_DECIDE = 5
_TWO_STRIKES = 3
_MANY = 3
"""Of two workers either may be the liar; where there are fewer than three, none of another stage is blamed on their word."""


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


class Judgement(NamedTuple):
    """A stage's decision on a case.

    Args:
        outcome: that of the majority; ``DISPUTED`` where none decides.
        outvoted: workers that voted the opposite.
    """

    outcome: Outcome
    outvoted: frozenset[Worker]


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


def live_workers(stage: int, banned: Collection[Worker], mesh: Mesh) -> int:
    """How many workers of a stage are not banned.

    Example:
        >>> live_workers(1, {Worker(1, 0), Worker(0, 2)}, Mesh(stages=2, replicas=3))
        2
    """
    return sum(Worker(stage, replica) not in banned for replica in range(mesh.replicas))


def most_bans(replicas: int) -> int:
    """How many workers of a stage may be banned for what they sent: fewer than half, or one of two.

    Detection assumes that no more are malicious; so there is always a pipeline left.

    Example:
        >>> [most_bans(replicas) for replicas in (1, 2, 3, 4, 5, 6)]
        [0, 1, 1, 1, 2, 2]
    """
    return 1 if replicas == 2 else (replicas - 1) // 2


def strikes_to_ban(live: int) -> int | None:
    """In how many steps most of a stage must find a worker to lie before it is banned; ``None``: it never is.

    Of five workers, two may lie and three still agree. Of three or four, one more wrong vote would be a majority. Of two, each has
    only the other for a witness.

    Args:
        live: workers of the stage that are not banned.

    Example:
        >>> [strikes_to_ban(live) for live in (2, 3, 4, 5)]
        [None, 2, 2, 1]
    """
    if live < _TWO_STRIKES:
        return None
    return 1 if live >= _ALL_DECIDE else 2


def refutations_to_ban(live: int, false_accusations: int | None) -> int | None:
    """In how many steps most of a stage must vote the opposite of a worker before it is banned; ``None``: it never is.

    Until then it is asked, or it could not be refuted again. Its word changes nothing as long as most vote honestly. Of three or
    four workers one more wrong vote would be a majority, so there it is asked no more, and nobody is banned for it.

    Args:
        live: workers of the stage that are not banned.
        false_accusations: see :class:`lightning_sentinel.config.Response`.

    Example:
        >>> [refutations_to_ban(live, 3) for live in (4, 5)], refutations_to_ban(5, None)
        ([None, 3], None)
    """
    return false_accusations if live >= _ALL_DECIDE else None


def weigh(votes: Mapping[Worker, Outcome], live: int, stands: bool = True) -> Judgement:
    """Decide a case by its votes.

    A worker whose own stage decides stands by what it sent, which is a vote as well. A decision needs more than half of the votes,
    and one against the audited worker more votes than there can be liars: so a few workers cannot decide because others were not
    asked.

    Args:
        votes: of the workers of the stage that were asked.
        live: workers of the stage that are not banned, the audited one included if it is of this stage.
        stands: whether the audited worker is of this stage.

    Example:
        >>> others = [Worker(1, replica) for replica in range(1, 5)]
        >>> weigh(dict.fromkeys(others[:2], Outcome.LIED) | dict.fromkeys(others[2:], Outcome.MATCHES), live=5).outcome.name
        'MATCHES'
        >>> weigh({others[0]: Outcome.LIED}, live=2).outcome.name
        'DISPUTED'
    """
    said = [Outcome.MATCHES, *votes.values()] if stands else list(votes.values())
    liars = (live - 1) // 2
    for outcome in sorted(set(said)):
        count = said.count(outcome)
        if 2 * count > len(said) and (outcome == Outcome.MATCHES or (count > liars and (stands or live >= _MANY))):
            break
    else:
        return Judgement(Outcome.DISPUTED, frozenset())
    # A worker whose input was withheld is not to blame for its vote.
    opposite = {Outcome.MATCHES: Outcome.LIED, Outcome.LIED: Outcome.MATCHES}.get(outcome)
    return Judgement(outcome, frozenset(worker for worker, word in votes.items() if word == opposite))


def decide(
    asked: Mapping[AnyCase, Sequence[Worker]],
    live: Callable[[AnyCase], int],
    ask: Callable[[Sequence[tuple[AnyCase, Worker]]], Sequence[Outcome]],
) -> dict[AnyCase, Judgement]:
    """Decide the cases in which an auditor says anything but *matches*; calls ``ask`` twice, however many cases there are.

    Args:
        asked: the workers that can recompute, by case, in the order in which they are asked: the first, and if that one reports a
            mismatch all others.
        live: how many workers of a case's stage are not banned.
        ask: has workers recompute.

    Example:
        >>> case, others = ContributionCase(0, Worker(1, 0)), [Worker(1, 1), Worker(1, 2)]
        >>> decide({case: others}, lambda case: 3, lambda asked: [Outcome.LIED] * len(asked))[case].outcome.name
        'LIED'
    """
    first = [(case, queue[0]) for case, queue in asked.items() if queue]
    votes = {case: {auditor: word} for (case, auditor), word in zip(first, ask(first))}
    claimed = [case for case, said in votes.items() if any(word != Outcome.MATCHES for word in said.values())]
    more = [(case, juror) for case in claimed for juror in asked[case][1:]]
    for (case, juror), word in zip(more, ask(more)):
        votes[case][juror] = word
    return {case: weigh(votes[case], live(case), stands=case.audited.stage == case.stage) for case in claimed}


class Jury:
    """Collects votes: draws a worker to recompute something, and asks all others of its stage if that one reports a mismatch.

    Args:
        mesh: all workers.
        seed: secret, so that no worker knows beforehand which is asked.
    """

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self._mesh = mesh
        self._seed = seed

    def others(self, audited: Worker, unheard: Collection[Worker], *place: int) -> list[Worker]:
        """The workers that can recompute a signal, in the order in which they are asked.

        Args:
            audited: the sender.
            unheard: workers that are asked nothing.
            place: of the signal: step, boundary, lane, slot.

        Example:
            >>> Jury(Mesh(2, 3), seed=0).others(Worker(1, 0), {Worker(1, 2)}, 7, 1, 0, 0)
            [Worker(stage=1, replica=1)]
        """
        return self._in_order(audited.stage, {*unheard, audited}, "auditor", *place)

    def hear(
        self,
        signals: Tensor,
        wiring: Wiring,
        banned: Collection[Worker],
        muted: Collection[Worker],
        step: int,
        ask: Ask,
        rows: Tensor | None = None,
        subjects: Collection[Subject] = (Subject.SIGNAL,),
    ) -> Findings:
        """Audit signals of a step; the same on all ranks. Calls ``ask`` twice, however many signals and boundaries there are.

        Args:
            signals: ``(boundaries, lanes, slots)`` bool, signals to audit, with the rows and the notes on them.
            wiring: which worker served which lane.
            banned: workers that take part in nothing.
            muted: workers whose votes no longer count.
            step: number of the training batch.
            ask: has workers recompute.
            rows: ``(boundaries, lanes, slots)`` bool, further signals, of which only the rows are audited.
            subjects: what they can recompute.
        """
        only_rows = torch.zeros_like(signals) if rows is None else rows & ~signals
        queues = self._queues(signals, only_rows, wiring, {*banned, *muted}, step, subjects)
        outcome = torch.zeros(signals.shape, dtype=torch.long)
        outvoted: dict[tuple[int, int, int], frozenset[Worker]] = {}
        reports = []
        for case, judged in decide(queues, lambda case: live_workers(case.stage, banned, self._mesh), ask).items():
            if case.subject is Subject.SIGNAL:
                place = self._mesh.boundaries.index(case.boundary), case.lane, case.slot
                outcome[place] = judged.outcome
                outvoted[place] = judged.outvoted
            else:
                reports.append(Decision(case, judged))
        return Findings(outcome, outvoted, tuple(reports))

    def _queues(
        self,
        signals: Tensor,
        rows: Tensor,
        wiring: Wiring,
        unheard: Collection[Worker],
        step: int,
        subjects: Collection[Subject],
    ) -> dict[Case, list[Worker]]:
        """The cases of a step, and who recomputes each, in the order in which they are asked; one boundary after the other."""
        queues = {}
        for index, lane, slot in (signals | rows).nonzero().tolist():
            place = step, index, lane, slot
            case = self._case(wiring, index, lane, slot)
            is_audited = bool(signals[index, lane, slot])
            if is_audited:
                queues[case] = self.others(case.audited, unheard, *place)
            if Subject.ROW not in subjects and Subject.NOTE not in subjects:
                continue
            receiver = wiring.worker(case.boundary.receiver, lane)
            others = self._in_order(receiver.stage, {*unheard, receiver}, "auditor of reports", *place)
            if Subject.ROW in subjects:
                queues[case._replace(audited=receiver, subject=Subject.ROW)] = others
            before = self._mesh.before(case.boundary)
            if Subject.NOTE in subjects and before is not None and is_audited:
                # Who is asked first about the row, for which it needs the note, is asked first about the note.
                own = [] if receiver in unheard else [receiver]
                queues[case._replace(audited=wiring.worker(before.sender, lane), subject=Subject.NOTE)] = others + own
        return queues

    def _in_order(self, stage: int, unheard: Collection[Worker], what: str, *place: int) -> list[Worker]:
        workers = [Worker(stage, replica) for replica in range(self._mesh.replicas)]
        fit = [worker for worker in workers if worker not in unheard]
        return sorted(fit, key=lambda worker: derive_seed(self._seed, what, *place, worker.replica))

    def hear_contributions(
        self,
        cases: Sequence[ContributionCase],
        banned: Collection[Worker],
        muted: Collection[Worker],
        step: int,
        ask: AskOfContributions,
    ) -> dict[ContributionCase, Judgement]:
        """Audit contributions to weight gradients; returns the decisions on those that an auditor says do not match.

        Args:
            cases: the contributions.
            ask: has workers recompute contributions.

        The other arguments are those of :meth:`hear`.
        """
        unheard = {*banned, *muted}
        asked = {case: self.others(case.audited, unheard, step, case.audited.stage, case.audited.replica) for case in cases}
        return decide(asked, lambda case: live_workers(case.audited.stage, banned, self._mesh), ask)

    def _case(self, wiring: Wiring, index: int, lane: int, slot: int) -> Case:
        boundary = self._mesh.boundaries[index]
        return Case(boundary, lane, slot, wiring.work[lane][slot], wiring.worker(boundary.sender, lane))
