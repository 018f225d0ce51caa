"""What a majority decides, where fewer than half of a stage's workers lie: pure functions of votes and numbers of workers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification.outcomes import Outcome

__all__ = [
    "Judgement",
    "live_workers",
    "most_bans",
    "most_liars",
    "refutations_to_ban",
    "strikes_to_ban",
    "weigh",
]

_ALL_DECIDE = 5
_TWO_STRIKES = 3
_MANY = 3
"""Of two workers either may be the liar; where there are fewer than three, none of another stage is blamed on their word."""


class Judgement(NamedTuple):
    """A stage's decision on a case.

    Args:
        outcome: that of the majority; ``DISPUTED`` where none decides.
        outvoted: workers that voted the opposite.
    """

    outcome: Outcome
    outvoted: frozenset[Worker]


def live_workers(stage: int, banned: Collection[Worker], mesh: Mesh) -> int:
    """How many workers of a stage are not banned.

    Example:
        >>> live_workers(1, {Worker(1, 0), Worker(0, 2)}, Mesh(stages=2, replicas=3))
        2
    """
    return sum(worker not in banned for worker in mesh.of_stage(stage))


def most_liars(live: int) -> int:
    """How many workers of a stage may be malicious: fewer than half.

    Args:
        live: workers of the stage that are not banned.

    Example:
        >>> [most_liars(live) for live in (1, 2, 3, 4, 5, 6)]
        [0, 0, 1, 1, 2, 2]
    """
    return max(0, (live - 1) // 2)


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
    liars = most_liars(live)
    for outcome in sorted(set(said)):
        count = said.count(outcome)
        if 2 * count > len(said) and (outcome == Outcome.MATCHES or (count > liars and (stands or live >= _MANY))):
            break
    else:
        return Judgement(Outcome.DISPUTED, frozenset())
    # A worker whose input was withheld is not to blame for its vote.
    opposite = {Outcome.MATCHES: Outcome.LIED, Outcome.LIED: Outcome.MATCHES}.get(outcome)
    return Judgement(outcome, frozenset(worker for worker, word in votes.items() if word == opposite))
