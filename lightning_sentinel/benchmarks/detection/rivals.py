"""Two other ways to find broken workers, computed from what a run without protection recorded.

*Replay*: every few steps each worker computes a micro-batch of its neighbour again, forward and backward, and compares all of it.
That names who is off, also where only weight gradients are.

*Gradient norm*: an alarm where the norm of a step's gradients is far above those of the steps before. That names a step and nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median, pstdev

from lightning_sentinel.benchmarks.detection.truth import Work
from lightning_sentinel.mesh import Worker

__all__ = ["HARMFUL", "MedianRule", "Replay", "SpreadRule", "first_alarm", "harmful_steps", "workers_at_fault"]

HARMFUL = 1e-4
"""A relative error above it counts as harmful; on equal devices audits of float32 let this much pass."""


def workers_at_fault(works: Sequence[Work]) -> dict[Worker, int]:
    """The workers with harmful errors, and the first step of each that had one.

    Example:
        >>> workers_at_fault([Work(Worker(1, 0), 5, 0, (1e-6, 0.0, 0.0)), Work(Worker(1, 0), 7, 1, (0.0, 0.0, 0.5))])
        {Worker(stage=1, replica=0): 7}
    """
    first: dict[Worker, int] = {}
    for work in works:
        if work.error > HARMFUL:
            first[work.worker] = min(work.step, first.get(work.worker, work.step))
    return first


def harmful_steps(works: Sequence[Work]) -> set[int]:
    """The steps in which some worker's error was harmful."""
    return {work.step for work in works if work.error > HARMFUL}


@dataclass(frozen=True)
class Replay:
    """Replays of one micro-batch of each worker by its neighbour, every ``interval`` steps; the micro-batches take turns.

    Args:
        interval: steps from one replay to the next.
        micro_batches: number of micro-batches of a worker in a step.

    Example:
        >>> Replay.at(share=0.02, micro_batches=2)
        Replay(interval=25, micro_batches=2)
    """

    interval: int
    micro_batches: int

    @classmethod
    def at(cls, share: float, micro_batches: int) -> Replay:
        """With a share of all micro-batches replayed, above 0."""
        return cls(max(1, round(1 / (share * micro_batches))), micro_batches)

    def finds(self, works: Sequence[Work], begin: int, end: int) -> tuple[float, float | None]:
        """What is expected to be found between two steps, over all steps and micro-batches that the replays may begin with.

        Args:
            works: of the run.
            begin: first step under attack.
            end: first step that is not run any more.

        Returns:
            the expected share of the workers at fault that are found, and the steps that it takes, from a worker's first harmful
            error to its replay, on average over those that are found; ``None`` if none ever is.
        """
        first = workers_at_fault(works)
        harmful = {(work.worker, work.step, work.micro_batch) for work in works if work.error > HARMFUL}
        starts = list(product(range(self.interval), range(self.micro_batches)))
        waits = []
        for worker, (offset, turn) in product(first, starts):
            replayed = (
                (step, (turn + at) % self.micro_batches) for at, step in enumerate(range(begin + offset, end, self.interval))
            )
            found = next((step for step, micro_batch in replayed if (worker, step, micro_batch) in harmful), None)
            if found is not None:
                waits.append(found - first[worker])
        return len(waits) / max(1, len(first) * len(starts)), fmean(waits) if waits else None


@dataclass(frozen=True)
class SpreadRule:
    """An alarm where a norm is above ``mean + deviations * std`` of the last ``window`` norms without an alarm.

    Args:
        deviations: standard deviations.
        window: steps.

    Example:
        >>> SpreadRule(deviations=3.0).alarms([1.0, 1.1, 0.9, 1.0, 5.0, None, 1.0])
        [False, False, False, False, True, True, False]
    """

    deviations: float
    window: int = 50

    def alarms(self, norms: Sequence[float | None]) -> list[bool]:
        """By step. A norm that is not finite, ``None``, is one; the first two cannot be."""
        return _alarms(norms, self.window, lambda past: fmean(past) + self.deviations * pstdev(past))


@dataclass(frozen=True)
class MedianRule:
    """An alarm where a norm is above a multiple of the median of the last ``window`` norms without an alarm.

    Args:
        multiple: of the median.
        window: steps.

    Example:
        >>> MedianRule(multiple=2.0).alarms([1.0, 1.1, 0.9, 1.9, 2.5])
        [False, False, False, False, True]
    """

    multiple: float
    window: int = 50

    def alarms(self, norms: Sequence[float | None]) -> list[bool]:
        """By step. A norm that is not finite, ``None``, is one; the first two cannot be."""
        return _alarms(norms, self.window, lambda past: self.multiple * median(past))


def _alarms(norms: Sequence[float | None], window: int, limit: Callable[[Sequence[float]], float]) -> list[bool]:
    past: list[float] = []
    alarms = []
    for norm in norms:
        alarm = norm is None or (len(past) > 1 and norm > limit(past[-window:]))
        alarms.append(alarm)
        if norm is not None and not alarm:
            past.append(norm)
    return alarms


def first_alarm(alarms: Sequence[bool], steps: Collection[int]) -> int | None:
    """The first of ``steps`` with an alarm, counted from the first of them; ``None`` without one.

    Example:
        >>> first_alarm([True, False, False, True], {1, 3}), first_alarm([True, False], {1})
        (2, None)
    """
    alarmed = [step for step in sorted(steps) if step < len(alarms) and alarms[step]]
    return alarmed[0] - min(steps) if alarmed else None
