"""Keeps of workers that are suspects what their signals looked like, so that a ban by flags leaves a record of why.

Kept are the latest steps of each streak, however long it is; a worker that is no suspect any more is forgotten.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.transcript import SignedRow
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.records import NO_FENCES, ROW_BYTES, FlaggedSignal, FlaggedStep, FlagRecord, FourFences
from lightning_sentinel.verification import Ledger, SignalTable
from lightning_sentinel.verification.calibration import Calibration
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.streaks import Sighting, Streak, sighting
from lightning_sentinel.verification.verdicts import Detection

__all__ = ["FencesOfStep", "FlagRecords", "Noted", "row_in"]

_KEPT = 16
"""Steps of a streak that are kept."""
_NON_FINITE = "non_finite"


class Noted(NamedTuple):
    """A step of a suspect.

    Args:
        step: what is recorded of it.
        attempt: see :class:`~lightning_sentinel.trust.statements.Moment`.
        rows: the signed rows of the receivers of its signals; none where nobody signs.
    """

    step: FlaggedStep
    attempt: int
    rows: tuple[SignedRow, ...]


class FencesOfStep(NamedTuple):
    """The fences in force in a step, of all boundaries: what learns from it replaces them and changes none.

    Args:
        alone: for single signals, without their trend.
        trend: ``(boundaries, F)``; NaN where unknown.
        among_peers: for signals that are compared across replicas.
    """

    alone: Fences
    trend: Tensor
    among_peers: Fences

    @classmethod
    def of(cls, calibration: Calibration) -> FencesOfStep:
        """Those in force now."""
        return cls(calibration.alone.fences, calibration.trend, calibration.among_peers.fences)

    def around(self, boundary: int, feature: str) -> FourFences:
        """Of one feature of one boundary."""
        if feature not in FEATURES:
            return NO_FENCES
        place = boundary, FEATURES.index(feature)
        trend = float(self.trend[place].nan_to_num())
        return (
            float(self.alone.lower[place]) + trend,
            float(self.alone.upper[place]) + trend,
            float(self.among_peers.lower[place]),
            float(self.among_peers.upper[place]),
        )


class FlagRecords:
    """The records of all suspects.

    Args:
        mesh: all workers.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._noted: dict[Worker, deque[Noted]] = {}

    def add(
        self, table: SignalTable, ruling: Ruling, ledger: Ledger, fences: FencesOfStep, rows: Mapping[Worker, SignedRow]
    ) -> dict[Worker, tuple[FlagRecord, Sequence[Noted]]]:
        """Note a step that was judged by flags.

        Args:
            table: as receivers reported it.
            ruling: on the step.
            ledger: in which it is entered.
            fences: in force when it was judged.
            rows: the signed rows of the step; empty where nobody signs.

        Returns:
            the record of each worker that the step bans, with its steps.
        """
        verdict = ruling.verdict
        flags = [one for one in verdict.detections if one.feature in (*FEATURES, _NON_FINITE)]
        scores = {one.worker: one.score for one in sorted(flags, key=lambda one: one.score)}
        for worker in verdict.suspects:
            signals = tuple(self._signals(worker, table, ruling, flags, fences, rows))
            seen = sighting(worker, verdict.suspects, verdict.verified, verdict.unmistakable, scores)
            receivers = sorted({signal.receiver for signal in signals} & rows.keys())
            noted = self._noted.setdefault(worker, deque(maxlen=_KEPT))
            step = FlaggedStep(ruling.plan.number, signals, seen)
            noted.append(Noted(step, ruling.plan.run, tuple(rows[one] for one in receivers)))
        found: dict[Worker, tuple[FlagRecord, Sequence[Noted]]] = {
            worker: (self._record(worker, ledger), tuple(self._noted[worker])) for worker in ruling.banned
        }
        self._noted = {worker: steps for worker, steps in self._noted.items() if worker in ledger.streaks.keys() - ledger.banned}
        return found

    def _signals(
        self,
        worker: Worker,
        table: SignalTable,
        ruling: Ruling,
        flags: Sequence[Detection],
        fences: FencesOfStep,
        rows: Mapping[Worker, SignedRow],
    ) -> Iterator[FlaggedSignal]:
        """The verified signals of a worker in a step."""
        verdict, wiring = ruling.verdict, ruling.plan.wiring
        lane = wiring.lane(worker)
        flagged = {(one.direction, one.micro_batch) for one in flags if one.worker == worker}
        for index, boundary in enumerate(self._mesh.boundaries):
            if boundary.sender != worker.stage or lane is None:
                continue
            for slot in range(len(wiring.work[lane])):
                place = index, lane, slot
                if table.tainted[place] or verdict.explained[place]:
                    continue
                score, worst = (float(verdict.table.column(name)[place]) for name in ("score", "worst"))
                feature = FEATURES[int(worst)] if worst >= 0 else _NON_FINITE
                receiver = wiring.worker(boundary.receiver, lane)
                believed = table.rows[place].numpy().tobytes()
                yield FlaggedSignal(
                    Boundary(boundary.index, boundary.direction),
                    lane,
                    slot,
                    receiver,
                    row_in(rows[receiver].contents, boundary.direction, slot, wiring.slots) if receiver in rows else believed,
                    score,
                    feature,
                    fences.around(index, feature),
                    (boundary.direction, slot) in flagged,
                )

    def _record(self, worker: Worker, ledger: Ledger) -> FlagRecord:
        kept = [one.step for one in self._noted[worker]]
        assert ledger.ban_after is not None, "without it nobody is banned for flags"
        earlier = _before(ledger.streaks[worker], [one.seen for one in kept])
        return FlagRecord(ledger.ban_after, ledger.habits.of_others(worker), earlier.state(), tuple(kept))


def row_in(contents: bytes, direction: Direction, slot: int, slots: int) -> bytes:
    """A signal's row as its receiver reported it, before anything in it was made sensible, from all that the receiver said.

    Args:
        contents: of the receiver's row in the step's collective, which begin with ``(2, slots, len(COLUMNS))`` float32.
        direction: of the signal.
        slot: of its micro-batch in the lane.
        slots: the most micro-batches of a lane.
    """
    place = (list(Direction).index(direction) * slots + slot) * ROW_BYTES
    return contents[place : place + ROW_BYTES]


def _before(streak: Streak, seen: Sequence[Sighting]) -> Streak:
    """A streak without its latest steps."""
    suspects, verified = Counter(streak.suspects), Counter(streak.verified)
    for one in seen:
        suspects.subtract(one.suspects)
        verified.subtract({*one.verified, *one.suspects})
    unmistakable = streak.unmistakable - sum(one.unmistakable for one in seen)
    return Streak(streak.steps - len(seen), +suspects, +verified, unmistakable)
