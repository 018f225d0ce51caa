"""Pipelines of workers that all sit in this process: what a guard is tried on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan, StepPlanner
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.verification import Ledger, SignalTable, StepVerdict
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.wiring import MicroBatchId

STAGES, REPLICAS, MICRO_BATCHES = 3, 3, 2
SAMPLES, POSITIONS, CHANNELS = 4, 5, 6
WARMUP, RATE = 12, 0.03
"""A false-positive rate that takes no more values than there are in so short a warm-up."""
A, G = Direction.ACTIVATION, Direction.GRADIENT
MESH = Mesh(STAGES, REPLICAS)

Tamper = Callable[[Worker, Direction, Tensor], Tensor]


def honest(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
    return signal


def broken(workers: Collection[Worker], *directions: Direction) -> Tamper:
    """These workers send NaN."""

    def tamper(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        return signal * math.nan if worker in workers and direction in (directions or tuple(Direction)) else signal

    return tamper


def shouting(workers: Collection[Worker]) -> Tamper:
    """These workers send finite values far out."""

    def tamper(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        return 1000 * signal if worker in workers else signal

    return tamper


def planned(guard: Guard, step: int, excluded_in: int = -1, excluded: frozenset[Worker] = frozenset()) -> StepPlan:
    """What a planner makes of what a guard knows."""
    sizes = BatchSizes(MICRO_BATCHES, (MICRO_BATCHES * SAMPLES,) * REPLICAS)
    return StepPlanner(MESH, guard).training(step, sizes, 1.0, 0, excluded if step == excluded_in else ())


class Pipelines:
    """A mesh driven by hand: what a stage sends follows from what it went on with.

    A guard of its own for each replica if ``apart``, as in real processes, else one that all replicas share. Sequences grow with
    the micro-batch by ``later`` positions, and with the replica by ``longer``, which one guard for all could not receive at once.
    """

    def __init__(
        self,
        response: Response | None = None,
        *,
        window: int = 512,
        apart: bool = False,
        longer: int = 0,
        later: int = 0,
        rate: float = RATE,
    ) -> None:
        assert apart or not longer
        self.response = response or Response(ban_after=None, audit_rate=None)
        self.generator = torch.Generator().manual_seed(0)
        verification = Verification(warmup_steps=WARMUP, window=window, false_positive_rate=rate, seed=0)
        self.longer, self.later = longer, later
        longest = POSITIONS + longer * (REPLICAS - 1) + later * (MICRO_BATCHES - 1)
        self.pattern = 2 * torch.randn(longest, CHANNELS, generator=torch.Generator().manual_seed(99))
        self.groups = [[replica] for replica in range(REPLICAS)] if apart else [list(range(REPLICAS))]
        self.ledgers = [Ledger(self.response.ban_after) for _ in self.groups]
        self.guards = [
            Guard(
                MESH,
                MESH.boundaries,
                Worker(0, group[0]) if apart else None,
                verification,
                self.response,
                ledger,
                torch.device("cpu"),
            )
            for group, ledger in zip(self.groups, self.ledgers)
        ]
        self.step_number = 0
        self.excluded: tuple[int, frozenset[Worker]] = (-1, frozenset())
        """A step, and the workers that were found out in it."""
        self.received: list[tuple[Tensor, Tensor]] = []
        """What each receipt of the latest step was given, and what came of it."""
        self.lies: dict[tuple[int, int, int], bool] = {}
        """Whether a signal is not what an honest worker would have sent, by index of the boundary, lane and slot."""
        self.asked: list[tuple[int, Case, Worker]] = []
        """Who was asked to recompute what: the index of a boundary, a case, and the worker."""
        self.false_jurors: set[Worker] = set()
        self.sent: dict[tuple[Boundary, int, int], Tensor] = {}
        self.went_on_with: dict[tuple[Boundary, int, int], Tensor] = {}
        self.table = SignalTable(torch.empty(0))

    @property
    def guard(self) -> Guard:
        return self.guards[0]

    def noise(self, replica: int = 0, micro_batch: int = 0) -> Tensor:
        positions = POSITIONS + self.longer * replica + self.later * micro_batch
        return torch.randn(SAMPLES, positions, CHANNELS, generator=self.generator)

    def projected(self, boundary: Boundary, replicas: list[int], micro_batch: int) -> Projection | None:
        before = MESH.before(boundary)
        if before is None:
            return None
        received = torch.cat([self.went_on_with[before, replica, micro_batch] for replica in replicas])
        return self.guard.project(boundary, received)

    def draw(self) -> None:
        """The noise of a step, which is the same whether guards are apart or not."""
        self.begin()
        self.drawn = {
            (replica, micro_batch): iter([self.noise(replica, micro_batch) for _ in range(2 * STAGES)])
            for replica in range(REPLICAS)
            for micro_batch in range(MICRO_BATCHES)
        }

    def planned(self, step: int | None = None) -> StepPlan:
        """The plan of a step, by what is known of it now."""
        return planned(self.guard, self.step_number if step is None else step, *self.excluded)

    def begin(self) -> None:
        self.plan = self.planned()
        self.wiring = self.plan.wiring
        for guard in self.guards:
            guard.begin(self.plan)

    def run_micro_batch(self, group: int, micro_batch: int, tamper: Tamper) -> None:
        """One micro-batch of all replicas of a guard, forward and back."""
        guard, replicas, wiring = self.guards[group], self.groups[group], self.wiring
        places = [wiring.places[MicroBatchId(replica, micro_batch)] for replica in replicas]
        lanes = None if len(self.guards) > 1 else torch.tensor([lane for lane, _ in places])

        def noise() -> Tensor:
            return torch.cat([next(self.drawn[replica, micro_batch]) for replica in replicas])

        def cross(boundary: Boundary, signals: Tensor, taint: Tensor) -> tuple[Tensor, Tensor]:
            pieces = signals.split(SAMPLES)
            senders = [wiring.worker(boundary.sender, lane) for lane, _ in places]
            sent = [tamper(sender, boundary.direction, piece) for sender, piece in zip(senders, pieces)]
            for (lane, slot), mine, piece in zip(places, sent, pieces):
                self.lies[MESH.boundaries.index(boundary), lane, slot] = mine is not piece and not torch.equal(mine, piece)
            given = torch.cat(sent)
            # A gradient follows from the one behind, an activation from the one before; the noise in them is new.
            known = self.projected(boundary, replicas, micro_batch)
            went_on, taint = guard.receive(boundary, given, taint, known, lanes)
            assert taint.shape == (len(replicas),) and taint.dtype == torch.bool
            self.received.append((given, went_on))
            for replica, mine, piece in zip(replicas, sent, went_on.split(SAMPLES)):
                self.sent[boundary, replica, micro_batch] = mine
                self.went_on_with[boundary, replica, micro_batch] = piece
            return went_on, taint

        signals, taint = noise(), torch.tensor([not wiring.live[lane] for lane, _ in places])
        pattern = self.pattern[: signals.shape[1]]
        for index in range(STAGES - 1):
            signals, taint = cross(Boundary(index, A), 0.3 * signals + pattern * (index + 1) + 0.5 * noise(), taint)
        signals = 0.01 * signals + 0.1 * noise()
        for index in reversed(range(STAGES - 1)):
            signals, taint = cross(Boundary(index, G), 0.5 * signals + 0.1 * noise(), taint)

    def exchange(self) -> SignalTable:
        rows = [torch.cat([guard.take_rows(boundary) for guard in self.guards]) for boundary in MESH.boundaries]
        return SignalTable.by_samples(torch.stack(rows), self.wiring)

    def attempt(self, tamper: Tamper = honest) -> Ruling:
        """One step up to its verdict; the same noise again if it has been drawn and is to be used again."""
        self.received.clear()
        self.begin()
        for group in range(len(self.guards)):
            for micro_batch in range(MICRO_BATCHES):
                self.run_micro_batch(group, micro_batch, tamper)
        self.table = self.exchange()
        total = self.sum_over_guards()
        ask = self.ask if self.guard.audits else None
        rulings = [
            guard.settle(self.table, self.plan, (lambda vector: vector) if total is None else (lambda vector: total), ask)
            for guard in self.guards
        ]
        self.excluded = self.step_number, self.plan.absent.union(rulings[0].excluded)
        return rulings[0]

    def ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        """The truth, unless a juror is one of those that say the opposite."""
        places = [(MESH.boundaries.index(case.boundary), case.lane, case.slot) for case, _ in asked]
        self.asked += [(index, case, juror) for (index, *_), (case, juror) in zip(places, asked)]
        return [Outcome(self.lies[place] ^ (juror in self.false_jurors)) for place, (_, juror) in zip(places, asked)]

    def audited(self) -> Tensor:
        """What was audited since :attr:`asked` was emptied, ``(boundaries, replicas, micro_batches)`` bool, by samples."""
        audited = torch.zeros(len(MESH.boundaries), REPLICAS, MICRO_BATCHES, dtype=torch.bool)
        for index, case, _ in self.asked:
            audited[(index, *case.micro_batch_id)] = True
        return audited

    def step(self, tamper: Tamper = honest) -> tuple[StepVerdict, list[Worker]]:
        self.draw()
        ruling = self.attempt(tamper)
        assert not ruling.excluded
        self.step_number += 1
        return ruling.verdict, ruling.banned

    def sum_over_guards(self) -> Tensor | None:
        """The all-reduce by hand: copies of the guards say what each would add. ``None`` if one holds all."""
        if len(self.guards) == 1:
            return None
        vectors: list[Tensor] = []

        def listen(vector: Tensor) -> Tensor:
            vectors.append(vector)
            return vector

        for guard in self.guards:
            copy.deepcopy(guard).settle(self.table, self.plan, listen)
        assert len(vectors) in (0, len(self.guards)) and len({vector.shape for vector in vectors}) <= 1
        return torch.stack(vectors).sum(dim=0) if vectors else None

    def run(self, steps: int, tamper: Tamper = honest) -> Pipelines:
        for _ in range(steps):
            self.step(tamper)
        return self


def dirty(verdict: StepVerdict) -> set[tuple[int, int]]:
    """``(stage, replica)`` of which no micro-batch counts."""
    return {tuple(entry) for entry in (~verdict.clean).all(dim=2).nonzero().tolist()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    # Places of a window that are not filled are NaN.
    return one.keys() == other.keys() and all(torch.allclose(one[n].float(), other[n].float(), 0, 0, equal_nan=True) for n in one)
