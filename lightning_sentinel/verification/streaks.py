"""Consecutive steps out of line, and whether that is more than what somebody else's lie would make of an honest worker.

Without audits a worker can only be told from its flags, and an honest one that works behind a lie that nobody sees is flagged as
well. But that depends on the company: while somebody is a suspect, workers are shuffled among the pipelines in every step, so an
honest one is behind the liar now and then, as are all others of its stage, and a liar is out of line in any company.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_sentinel.mesh import Worker

__all__ = ["Habits", "Streak", "honest_share", "is_proof"]

_DECAY = 0.95
_MEMORY = 1 / (1 - _DECAY)
"""Steps."""


@dataclass
class Streak:
    """Consecutive steps in which a worker was a suspect.

    Args:
        steps: how many.
        suspects: in how many of them each of the others of its stage was one as well, and about as far out.
        verified: in how many of them each of the others was verified.
        unmistakable: in how many of them nothing that the worker had been sent can have been the reason.
    """

    steps: int = 0
    suspects: Counter[Worker] = field(default_factory=Counter)
    verified: Counter[Worker] = field(default_factory=Counter)
    unmistakable: int = 0

    def add(self, suspects: Collection[Worker], verified: Collection[Worker], unmistakable: bool) -> None:
        """Enter a step in which the worker was a suspect.

        Args:
            suspects: others of its stage that were suspects in it, and about as far out.
            verified: others of its stage that were verified in it.
            unmistakable: whether nothing that the worker had been sent can be the reason.
        """
        self.steps += 1
        self.unmistakable += unmistakable
        self.suspects.update(suspects)
        self.verified.update({*verified, *suspects})

    @property
    def shuffles(self) -> bool:
        """Whether other company would tell if what the worker is sent is the reason."""
        return self.unmistakable < self.steps

    @property
    def usual(self) -> float:
        """In which share of the steps an honest one of the others was a suspect, as far as they were verified."""
        return honest_share([self.suspects[worker] / steps for worker, steps in self.verified.items()])

    def state(self) -> list[Any]:
        """Plain numbers and lists."""
        others = [[w.stage, w.replica, self.suspects[w], steps] for w, steps in sorted(self.verified.items())]
        return [self.steps, self.unmistakable, others]

    @classmethod
    def of_state(cls, state: list[Any]) -> Streak:
        steps, unmistakable, others = state
        suspects = Counter({Worker(s, r): number for s, r, number, _ in others if number})
        return cls(steps, suspects, Counter({Worker(s, r): number for s, r, _, number in others}), unmistakable)


class Habits:
    """How often each worker was a suspect lately, of the steps in which it was verified.

    Args:
        suspects: sums over steps, the last one counts 1 and each before it a twentieth less.
        verified: the same.
    """

    def __init__(self, suspects: Mapping[Worker, float] | None = None, verified: Mapping[Worker, float] | None = None) -> None:
        self.suspects, self.verified = dict(suspects or {}), dict(verified or {})

    def add(self, suspects: Collection[Worker], verified: Collection[Worker]) -> None:
        """Enter a step."""
        for worker in verified:
            self.verified[worker] = _DECAY * self.verified.get(worker, 0.0) + 1.0
            self.suspects[worker] = _DECAY * self.suspects.get(worker, 0.0) + (worker in suspects)

    def of_others(self, worker: Worker) -> float:
        """In which share of steps an honest one of its stage is a suspect, but for the worker itself."""
        others = [other for other in self.verified if other.stage == worker.stage and other != worker]
        return honest_share([self.suspects[other] / max(self.verified[other], _MEMORY / 2) for other in others])

    def state(self) -> list[list[Any]]:
        """Plain numbers and lists."""
        return [[w.stage, w.replica, self.suspects[w], verified] for w, verified in sorted(self.verified.items())]

    @classmethod
    def of_state(cls, state: list[list[Any]]) -> Habits:
        workers = {Worker(s, r): (suspects, verified) for s, r, suspects, verified in state}
        return cls({w: pair[0] for w, pair in workers.items()}, {w: pair[1] for w, pair in workers.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Habits) and self.state() == other.state()


def honest_share(shares: Collection[float]) -> float:
    """Of the others of a worker's stage, how often an honest one is a suspect.

    Fewer than half of a stage lie. If the worker does, there is one liar less among the others: as many are left out, of those that
    were suspects most often. If it does not, the liars may all have been in line, and the next one is still honest.

    Example:
        >>> honest_share([0.0, 0.2, 0.4, 0.2, 1.0]), honest_share([])
        (0.4, 0.0)
    """
    liars = max(1, len(shares) // 2)
    return sorted(shares)[-liars] if shares else 0.0


def is_proof(streak: Streak, ban_after: int, habit: float = 0.0) -> bool:
    """Whether a streak says that its worker lies.

    The others of the stage show how often an honest worker is out of line now, because most of them are honest: with probability
    ``p`` in a step, ``(m + 1/2) / (n + 1)`` if one of them was in ``m`` of the ``n`` steps, or as often as lately if that is more.
    ``n`` steps in a row then happen to an honest worker with probability ``p ** n``. That has to be as small as it is for
    ``ban_after`` steps in which the others never were. Where nothing that it had been sent can be the reason, others do
    not matter.

    Args:
        streak: of a worker.
        ban_after: how many steps that takes where the others are in line.
        habit: in which share of the latest steps an honest one of its stage was a suspect.

    Example:
        >>> is_proof(Streak(steps=5), ban_after=5)
        True
        >>> others = Counter({Worker(1, replica): 2 for replica in range(1, 5)})
        >>> streak = Streak(steps=5, suspects=others, verified=Counter(dict.fromkeys(others, 5)))
        >>> is_proof(streak, ban_after=5)
        False
    """
    steps = streak.steps
    share = max((steps * streak.usual + 0.5) / (steps + 1), habit)
    most = math.log(2 * ban_after + 2)
    evidence = streak.unmistakable * most - (steps - streak.unmistakable) * math.log(share)
    return steps >= ban_after and evidence >= ban_after * most * (1 - 1e-12)
