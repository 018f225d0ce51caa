"""Whose word counts in an audit: one recomputes a signal, and if it says that it does not match, everybody of the stage does.

Fewer than half of a stage's workers lie, so what most of them say is true. Pure functions of what was said, and a class that asks;
who does the recomputing is for the engine to know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Mesh, Worker
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.verification.audit import Outcome
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["Ask", "Case", "Findings", "Judgement", "Jury", "most_bans", "strikes_to_ban", "weigh"]

_ALL_DECIDE = 5
_TWO_STRIKES = 3


class Case(NamedTuple):
    """One signal that is audited.

    Args:
        boundary: that it crossed.
        lane: of its micro-batch.
        slot: of its micro-batch in the lane.
        part: whose samples it was made of.
        audited: who sent it.
    """

    boundary: Boundary
    lane: int
    slot: int
    part: MicroBatchId
    audited: Worker


Ask = Callable[[Sequence[tuple[Case, Worker]]], Sequence[Outcome]]
"""Has workers recompute signals, and returns what each of them says."""


class Judgement(NamedTuple):
    """What a stage says of one of its signals.

    Args:
        outcome: what most say; ``DISPUTED`` where nobody can tell who lies.
        outvoted: who said the opposite.
    """

    outcome: Outcome
    outvoted: frozenset[Worker]


class Findings(NamedTuple):
    """What audits of signals came to.

    Args:
        outcome: ``(boundaries, lanes, slots)``, values of :class:`Outcome`; what nobody could recompute counts as matching.
        outvoted: who said the opposite of what most said, by the place of the signal.
    """

    outcome: Tensor
    outvoted: Mapping[tuple[int, int, int], frozenset[Worker]]


def most_bans(replicas: int) -> int:
    """How many workers of a stage may be banned for what they sent: fewer than half, or one of two.

    More cannot be malicious, or detection means nothing; so there is always a pipeline left.

    Example:
        >>> [most_bans(replicas) for replicas in (1, 2, 3, 4, 5, 6)]
        [0, 1, 1, 1, 2, 2]
    """
    return 1 if replicas == 2 else (replicas - 1) // 2


def strikes_to_ban(live: int) -> int | None:
    """In how many steps most of a stage must have found a worker to lie before it is banned; ``None``: it never is.

    Of five, two may lie and three still agree. Of three or four a single wrong word more would be most. Of two, each has only the
    other for a witness.

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
    """Decide a case.

    Who sent the signal stands by it, which is a vote as well. A decision needs more than half of the votes, and one against the
    sender more than could all be liars: so leaving some of them unheard gives no few the say.

    Args:
        votes: what the others of the stage say, of those that were asked.
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
    # Who was withheld what it needed is not to be blamed for what it made of the rest.
    opposite = {Outcome.MATCHES: Outcome.LIED, Outcome.LIED: Outcome.MATCHES}.get(outcome)
    return Judgement(outcome, frozenset(worker for worker, word in votes.items() if word == opposite))


class Jury:
    """Hears cases: draws who recomputes a signal, and asks all others of the stage where that one says that it does not match.

    Args:
        mesh: all workers.
        seed: secret, so that nobody knows beforehand who is asked.
    """

    def __init__(self, mesh: Mesh, seed: int) -> None:
        self._mesh, self._seed = mesh, seed

    def others(self, audited: Worker, unheard: Collection[Worker], *place: int) -> list[Worker]:
        """Who can recompute a worker's signal, in the order in which they are asked.

        Args:
            audited: who sent it.
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
        """Audit signals of a step; the same on all ranks. It is asked twice, however many signals and boundaries there are.

        Args:
            signals: ``(boundaries, lanes, slots)`` bool, what to audit.
            wiring: who served which lane.
            banned: workers that take part in nothing.
            muted: workers whose word does not count any more.
            step: number of the training batch.
            ask: has them recompute.
        """
        places = {self._case(wiring, *place): (place[0], place[1], place[2]) for place in signals.nonzero().tolist()}
        unheard = {*banned, *muted}
        asked = {case: self.others(case.audited, unheard, step, *place) for case, place in places.items()}
        first = [(case, queue[0]) for case, queue in asked.items() if queue]
        votes = {case: {auditor: word} for (case, auditor), word in zip(first, ask(first))}
        claimed = [case for case, said in votes.items() if any(word != Outcome.MATCHES for word in said.values())]
        more = [(case, juror) for case in claimed for juror in asked[case][1:]]
        for (case, juror), word in zip(more, ask(more)):
            votes[case][juror] = word
        outcome = torch.zeros(signals.shape, dtype=torch.long)
        outvoted: dict[tuple[int, int, int], frozenset[Worker]] = {}
        for case in claimed:
            live = sum(Worker(case.audited.stage, replica) not in banned for replica in range(self._mesh.replicas))
            judged = weigh(votes[case], live)
            outcome[places[case]], outvoted[places[case]] = judged.outcome, judged.outvoted
        return Findings(outcome, outvoted)

    def _case(self, wiring: Wiring, index: int, lane: int, slot: int) -> Case:
        boundary = self._mesh.boundaries[index]
        return Case(boundary, lane, slot, wiring.work[lane][slot], wiring.worker(boundary.sender, lane))
