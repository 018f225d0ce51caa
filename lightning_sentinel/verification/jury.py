"""Votes in an audit: one worker recomputes a signal or a weight gradient, and if it reports a mismatch, all others of the stage do.

Fewer than half of a stage's workers lie, so the majority tells the truth. Pure functions weigh votes, and a class collects them;
the engine does the recomputing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    "Findings",
    "Judgement",
    "Jury",
    "decide",
    "most_bans",
    "strikes_to_ban",
    "weigh",
]

_ALL_DECIDE = 5
_TWO_STRIKES = 3


class Case(NamedTuple):
    """One signal that is audited.

    Args:
        boundary: that it crossed.
        lane: of its micro-batch.
        slot: of its micro-batch in the lane.
        micro_batch_id: the micro-batch that it was computed from.
        audited: the sender.
    """

    boundary: Boundary
    lane: int
    slot: int
    micro_batch_id: MicroBatchId
    audited: Worker


class ContributionCase(NamedTuple):
    """One worker's contribution to the weight gradients of its stage in a step, which is audited.

    Args:
        lane: that the worker served.
        audited: the worker.
    """

    lane: int
    audited: Worker


AnyCase = TypeVar("AnyCase", Case, ContributionCase)

Ask = Callable[[Sequence[tuple[Case, Worker]]], Sequence[Outcome]]
"""Has workers recompute signals, and returns the vote of each."""

AskOfContributions = Callable[[Sequence[tuple[ContributionCase, Worker]]], Sequence[Outcome]]
"""Has workers recompute contributions to weight gradients, and returns the vote of each."""


class Judgement(NamedTuple):
    """A stage's decision on one of its signals.

    Args:
        outcome: that of the majority; ``DISPUTED`` where none decides.
        outvoted: workers that voted the opposite.
    """

    outcome: Outcome
    outvoted: frozenset[Worker]


class Findings(NamedTuple):
    """Results of audits.

    Args:
        outcome: ``(boundaries, lanes, slots)``, values of :class:`Outcome`; a signal that no worker could recompute counts as
            matching.
        outvoted: workers that voted the opposite of the majority, by the place of the signal.
    """

    outcome: Tensor
    outvoted: Mapping[tuple[int, int, int], frozenset[Worker]]


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


def weigh(votes: Mapping[Worker, Outcome], live: int) -> Judgement:
    """Decide a case by its votes.

    The sender stands by its signal, which is a vote as well. A decision needs more than half of the votes, and one against the
    sender more votes than there can be liars: so a few workers cannot decide because others were not asked.

    Args:
        votes: of the other workers of the stage that were asked.
        live: workers of the stage that are not banned, the sender included.

    Example:
        >>> others = [Worker(1, replica) for replica in range(1, 5)]
        >>> weigh(dict.fromkeys(others[:2], Outcome.LIED) | dict.fromkeys(others[2:], Outcome.MATCHES), live=5).outcome.name
        'MATCHES'
        >>> weigh({others[0]: Outcome.LIED}, live=2).outcome.name
        'DISPUTED'
    """
    said = [Outcome.MATCHES, *votes.values()]
    liars = (live - 1) // 2
    for outcome in sorted(set(said)):
        count = said.count(outcome)
        if 2 * count > len(said) and (outcome == Outcome.MATCHES or count > liars):
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
    return {case: weigh(votes[case], live(case)) for case in claimed}


class Jury:
    """Collects votes: draws a worker to recompute a signal, and asks all others of the stage if that one reports a mismatch.

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
        stage = [Worker(audited.stage, replica) for replica in range(self._mesh.replicas) if replica != audited.replica]
        fit = [worker for worker in stage if worker not in unheard]
        return sorted(fit, key=lambda worker: derive_seed(self._seed, "auditor", *place, worker.replica))

    def hear(
        self,
        signals: Tensor,
        wiring: Wiring,
        banned: Collection[Worker],
        muted: Collection[Worker],
        step: int,
        ask: Ask,
    ) -> Findings:
        """Audit signals of a step; the same on all ranks. Calls ``ask`` twice, however many signals and boundaries there are.

        Args:
            signals: ``(boundaries, lanes, slots)`` bool, signals to audit.
            wiring: which worker served which lane.
            banned: workers that take part in nothing.
            muted: workers whose votes no longer count.
            step: number of the training batch.
            ask: has workers recompute signals.
        """
        places = {self._case(wiring, *place): (place[0], place[1], place[2]) for place in signals.nonzero().tolist()}
        unheard = {*banned, *muted}
        asked = {case: self.others(case.audited, unheard, step, *place) for case, place in places.items()}
        outcome = torch.zeros(signals.shape, dtype=torch.long)
        outvoted: dict[tuple[int, int, int], frozenset[Worker]] = {}
        for case, judged in decide(asked, lambda case: self.live(case.audited.stage, banned), ask).items():
            outcome[places[case]] = judged.outcome
            outvoted[places[case]] = judged.outvoted
        return Findings(outcome, outvoted)

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
        return decide(asked, lambda case: self.live(case.audited.stage, banned), ask)

    def live(self, stage: int, banned: Collection[Worker]) -> int:
        """How many workers of a stage are not banned."""
        return sum(Worker(stage, replica) not in banned for replica in range(self._mesh.replicas))

    def _case(self, wiring: Wiring, index: int, lane: int, slot: int) -> Case:
        boundary = self._mesh.boundaries[index]
        return Case(boundary, lane, slot, wiring.work[lane][slot], wiring.worker(boundary.sender, lane))
