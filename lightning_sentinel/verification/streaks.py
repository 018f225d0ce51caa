"""Streaks of steps in which a worker is a suspect, and whether they are more than another worker's lie can cause.

Without audits only flags tell a liar, and an honest worker behind an unnoticed lie is flagged as well. But that depends on its
pipeline: while there is a suspect, workers are shuffled among the pipelines in every step, so an honest worker is behind the liar
now and then, as are all others of its stage, and a liar is out of line in any pipeline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_sentinel.mesh import Worker

__all__ = ["Habits", "Sighting", "Streak", "honest_share", "is_proof", "sighting"]

_DECAY = 0.95
_MEMORY = 1 / (1 - _DECAY)
"""Steps."""


class Sighting(NamedTuple):
    """A step in which a worker was a suspect.

    Args:
        suspects: other workers of its stage that were suspects, and about as far out.
        verified: other workers of its stage that were verified.
        unmistakable: whether no received signal can be the cause.
    """

    suspects: tuple[Worker, ...]
    verified: tuple[Worker, ...]
    unmistakable: bool


def sighting(
    worker: Worker,
    suspects: Collection[Worker],
    verified: Collection[Worker],
    unmistakable: Collection[Worker],
    scores: Mapping[Worker, float],
) -> Sighting:
    """What a step says about one of its suspects.

    Args:
        worker: the suspect.
        suspects: all suspects of the step.
        verified: all workers that were verified.
        unmistakable: suspects whose deviation no received signal can explain.
        scores: how far out suspects were; equally far by default.
    """
    # A cause that puts one honest worker out of line puts another one about as far out.
    alike = [other for other in suspects if scores.get(other, 1.0) >= scores.get(worker, 1.0) / 2]
    return Sighting(_others(worker, alike), _others(worker, verified), worker in unmistakable)


def _others(worker: Worker, workers: Collection[Worker]) -> tuple[Worker, ...]:
    """The other workers of the same stage, in order."""
    return tuple(sorted(other for other in workers if other.stage == worker.stage and other != worker))


@dataclass
class Streak:
    """Consecutive steps in which a worker was a suspect.

    Args:
        steps: how many.
        suspects: in how many of them each other worker of its stage was one as well, and about as far out.
        verified: in how many of them each other worker was verified.
        unmistakable: in how many of them no received signal can have been the cause.
    """

    steps: int = 0
    suspects: Counter[Worker] = field(default_factory=Counter)
    verified: Counter[Worker] = field(default_factory=Counter)
    unmistakable: int = 0

    def add(self, seen: Sighting) -> None:
        """Add a step in which the worker was a suspect."""
        self.steps += 1
        self.unmistakable += seen.unmistakable
        self.suspects.update(seen.suspects)
        self.verified.update({*seen.verified, *seen.suspects})

    @property
    def shuffles(self) -> bool:
        """Whether another pipeline would tell if a received signal is the cause."""
        return self.unmistakable < self.steps

    @property
    def usual(self) -> float:
        """In which share of its verified steps an honest one of the other workers was a suspect."""
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
        suspects: sums over steps; the last one counts 1, and each before it a twentieth less.
        verified: the same.
    """

    def __init__(self, suspects: Mapping[Worker, float] | None = None, verified: Mapping[Worker, float] | None = None) -> None:
        self.suspects = dict(suspects or {})
        self.verified = dict(verified or {})

    def add(self, suspects: Collection[Worker], verified: Collection[Worker]) -> None:
        """Add a step."""
        for worker in verified:
            self.verified[worker] = _DECAY * self.verified.get(worker, 0.0) + 1.0
            self.suspects[worker] = _DECAY * self.suspects.get(worker, 0.0) + (worker in suspects)

    def of_others(self, worker: Worker) -> float:
        """In which share of steps an honest worker of its stage, other than itself, is a suspect."""
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
    """How often an honest one of the other workers of a stage is a suspect, from the shares of all of them.

    Fewer than half of a stage lie. If the worker itself lies, there is one liar less among the others: so many of the most frequent
    suspects are left out. If it does not, the liars may all have been in line, and the next worker is still honest.

    Example:
        >>> honest_share([0.0, 0.2, 0.4, 0.2, 1.0]), honest_share([])
        (0.4, 0.0)
    """
    liars = max(1, len(shares) // 2)
    return sorted(shares)[-liars] if shares else 0.0


def is_proof(streak: Streak, ban_after: int, habit: float = 0.0) -> bool:
    """Whether a streak proves that its worker lies.

    The other workers of the stage show how often an honest worker is a suspect now, because most of them are honest: in a step with
    probability ``p``, ``(m + 1/2) / (n + 1)`` if one of them was in ``m`` of the ``n`` steps, or its recent share if that is
    larger. An honest worker then is one in ``n`` steps in a row with probability ``p ** n``. That has to be as small as for
    ``ban_after`` steps in which the others never were. Where no received signal can be the cause, the others do not matter.

    Args:
        streak: of a worker.
        ban_after: how many steps prove it where the others are in line.
        habit: in which share of recent steps an honest worker of its stage was a suspect.

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
