"""The record of a ban by flags: in which steps its worker was a suspect, by which signals, and the rule that bans it for that.

Nobody recomputed anything, so it is no proof: who reported the scores may have lied. What can be shown of it is that the ban
follows from the numbers (:mod:`lightning_sentinel.verification.streaks`), and, where receivers signed their rows, that they
reported these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_sentinel.mesh import Boundary, Worker
from lightning_sentinel.verification.streaks import Sighting, Streak, is_proof
from lightning_sentinel.verification.table import COLUMNS

__all__ = ["NO_FENCES", "ROW_BYTES", "FlagRecord", "FlaggedSignal", "FlaggedStep", "FourFences"]

ROW_BYTES = 4 * len(COLUMNS)
"""Of a receiver's row of one signal: its columns as float32, in the order of memory."""

FourFences = tuple[float, float, float, float]
"""Lower and upper fence of a feature for single signals, then those for signals that are compared across replicas."""

NO_FENCES: FourFences = (float("-inf"), float("inf"), float("-inf"), float("inf"))


class FlaggedSignal(NamedTuple):
    """A verified signal of a suspect.

    Args:
        boundary: that it crossed.
        lane: of its micro-batch.
        slot: of its micro-batch in the lane.
        receiver: who reported the row.
        row: as it was reported, :data:`ROW_BYTES` bytes.
        score: that was decided of it; 1 is the fence.
        feature: that was furthest out.
        fences: of this feature, in the step.
        flagged: whether it is blamed on its sender: for its score, or for the sender's cumulative sum.
    """

    boundary: Boundary
    lane: int
    slot: int
    receiver: Worker
    row: bytes
    score: float
    feature: str
    fences: FourFences
    flagged: bool


class FlaggedStep(NamedTuple):
    """A step in which the worker was a suspect.

    Args:
        step: number of the training batch.
        signals: all of its verified signals.
        seen: what the step says about it and the others of its stage.
    """

    step: int
    signals: tuple[FlaggedSignal, ...]
    seen: Sighting


@dataclass(frozen=True)
class FlagRecord:
    """Why a worker was banned by flags.

    Args:
        ban_after: see :class:`~lightning_sentinel.config.Response`.
        habit: in which share of recent steps an honest worker of its stage was a suspect.
        earlier: :meth:`Streak.state` of the steps of its streak before ``steps``, which were not kept.
        steps: the latest steps of its streak, in order.

    Example:
        >>> from lightning_sentinel.mesh import Direction
        >>> liar, place = Worker(1, 0), Boundary(1, Direction.ACTIVATION)
        >>> signal = FlaggedSignal(place, 0, 0, Worker(2, 0), bytes(ROW_BYTES), 3.0, "norm", NO_FENCES, True)
        >>> steps = [FlaggedStep(step, (signal,), Sighting((), (Worker(1, 1),), False)) for step in range(5)]
        >>> FlagRecord(5, 0.0, Streak().state(), tuple(steps)).fault(liar)
        ''
        >>> FlagRecord(5, 0.0, Streak().state(), tuple(steps[:4])).fault(liar)
        '4 steps as a suspect are less than the rule asks for, which bans after 5'
    """

    ban_after: int
    habit: float
    earlier: Sequence[Any]
    steps: tuple[FlaggedStep, ...]

    @property
    def streak(self) -> Streak:
        """Of all steps."""
        streak = Streak.of_state(list(self.earlier))
        for one in self.steps:
            streak.add(one.seen)
        return streak

    def fault(self, banned: Worker) -> str:
        """Why the ban does not follow from the numbers; empty if it does.

        Args:
            banned: the worker.
        """
        numbers = [one.step for one in self.steps]
        if not numbers or numbers != sorted(set(numbers)):
            return f"the steps of its record, {numbers}, are not in order"
        for one in self.steps:
            if any(signal.boundary.sender != banned.stage for signal in one.signals):
                return f"its record of step {one.step} has a signal that stage {banned.stage} does not send"
            if not _is_suspect(one.signals):
                return f"by its record {banned} was out of line in less than half of what it sent in step {one.step}"
        if not is_proof(self.streak, self.ban_after, self.habit):
            return f"{self.streak.steps} steps as a suspect are less than the rule asks for, which bans after {self.ban_after}"
        return ""

    def ground(self, banned: Worker) -> str:
        """The ban in words."""
        return (
            f"{banned} was out of line in {self.streak.steps} consecutive steps in which it was verified, to step"
            f" {self.steps[-1].step}, and the rule bans after {self.ban_after} in which nobody else of its stage is"
        )


def _is_suspect(signals: Sequence[FlaggedSignal]) -> bool:
    """Whether of one direction at least half of the signals are flagged."""
    by_boundary: dict[Boundary, list[bool]] = defaultdict(list)
    for signal in signals:
        by_boundary[signal.boundary].append(signal.flagged)
    return any(any(flagged) and 2 * sum(flagged) >= len(flagged) for flagged in by_boundary.values())
