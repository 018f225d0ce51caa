"""What crosses the boundaries of a virtual mesh: the signals of all workers of a stage, tampered with and verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.data.micro_batches import MicroBatches
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.stages.groups import of_replicas, together
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.steps import StepRun
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.verification.tolerance import deviation
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["MicroBatch", "VirtualBoundaries", "VirtualStep"]


@dataclass
class VirtualStep:
    """A training step under way on a virtual mesh.

    Args:
        plan: of the step.
        arguments: of the user's step function; the first is the batch of the whole mesh.
        batch: the batch in micro-batches.
        apart: whether replicas go through a stage one by one. Then the weight gradients of what is left out never enter, nor those
            that are not finite.
    """

    plan: StepPlan
    arguments: tuple[Any, ...]
    batch: SplitBatch
    apart: bool
    called: int = 0
    """Micro-batches for which the step has called the pipeline."""
    results: list[tuple[Sequence[int], Any]] = field(default_factory=list)
    """What the step returned, and for which rows of the batch."""
    measured: dict[int, dict[tuple[int, int], tuple[torch.dtype, Tensor]]] = field(default_factory=dict)
    """How far a signal is from what an honest worker sends, where it may be, by index of the boundary, lane and slot."""
    broken: Tensor = field(init=False)
    """``(stages, replicas, micro_batches)`` bool, whose weight gradients were left out because they are not finite."""

    def __post_init__(self) -> None:
        mesh = self.plan.mesh
        self.broken = torch.zeros(mesh.stages, mesh.replicas, self.plan.sizes.micro_batches, dtype=torch.bool)


@dataclass
class MicroBatch:
    """The micro-batches of one number of all replicas, on their way.

    Args:
        running: the step.
        parts: arguments of the step for each replica.
        index: their number.
    """

    running: VirtualStep
    parts: list[tuple[Any, ...]]
    index: int
    seeds: list[MicroBatchSeeds] = field(default_factory=list)
    runs: list[StepRun] = field(default_factory=list)
    """Of each replica, its step."""
    tainted: Tensor = field(default_factory=lambda: torch.empty(0))
    """``(replicas,)`` bool, whose micro-batch is left out from here on."""
    alike: list[list[int]] = field(default_factory=list)
    """The replicas whose signals have the same shapes."""
    leaves: list[list[Any]] = field(default_factory=list)
    """What goes into each stage, of each group."""
    outputs: list[list[Any]] = field(default_factory=list)
    """What comes out."""

    @property
    def replicas(self) -> Sequence[MicroBatches]:
        return self.running.batch.replicas

    @property
    def step(self) -> int:
        return self.running.plan.number

    @property
    def scale(self) -> float:
        return self.running.plan.scale

    @property
    def apart(self) -> bool:
        return self.running.apart

    @property
    def wiring(self) -> Wiring:
        return self.running.plan.wiring

    def place(self, replica: int) -> tuple[int, int]:
        """The lane and the slot that a replica's micro-batch is in."""
        return self.wiring.places[MicroBatchId(replica, self.index)]

    def worker(self, stage: int, replica: int) -> tuple[Worker, int]:
        """The worker that has a replica's micro-batch at a stage, and in which slot."""
        lane, slot = self.place(replica)
        return self.wiring.worker(stage, lane), slot

    def lanes(self) -> list[int] | None:
        """The lane that works on each replica's micro-batch; ``None`` while each works on its own."""
        return None if all(self.wiring.live) else [self.place(replica)[0] for replica in range(len(self.replicas))]

    @property
    def groups(self) -> list[list[int]]:
        """The replicas that go through a stage together."""
        return [[replica] for replica in range(len(self.parts))] if self.apart else self.alike


class VirtualBoundaries:
    """The part of the virtual engine between stages."""

    guard: Guard | None
    adversary: Adversary | None
    _model: StageModel
    _device: torch.device

    def _cross(self, boundary: Boundary, sent: Sequence[Tensor], received: Sequence[Any], batch: MicroBatch) -> list[Tensor]:
        """What the receivers of a boundary go on with: the signals of all senders, tampered with and verified.

        Args:
            sent: of each group.
            received: what the groups had received themselves; ``None`` behind the last stage.

        Returns:
            of each group.
        """
        if batch.apart:
            # They are looked at side by side all the same, as far as they can be.
            sent, received = ([together(one, group) for group in batch.alike] for one in (sent, received))
        passed, tainted = [], batch.tainted
        for group, signals, got in zip(batch.alike, sent, received):
            if self.adversary is not None:
                signals = self._tampered(self.adversary, boundary, group, signals, got, batch)
            if self.guard is not None:
                signals, tainted = self._verified(self.guard, boundary, group, signals, got, tainted, batch)
            passed.append(signals)
        batch.tainted = tainted
        return of_replicas(passed, batch.alike) if batch.apart else passed

    def _verified(
        self, guard: Guard, boundary: Boundary, group: list[int], sent: Tensor, received: Any, tainted: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """A group's signals to go on with, and who is tainted then of all replicas."""
        projected = None
        if self._model.mesh.before(boundary) is not None:
            projected = self._noted(boundary, guard.project(boundary, received.detach()), group, batch)
        lanes = self._lanes(batch)
        if len(group) == len(batch.parts):
            return guard.receive(boundary, sent, tainted, projected, lanes)
        places = torch.tensor(group, device=self._device)
        lanes = places if lanes is None else lanes[places]
        signals, found = guard.receive(boundary, sent, tainted[places], projected, lanes, group)
        return signals, tainted.index_copy(0, places, found)

    def _noted(self, boundary: Boundary, note: Projection | None, group: Sequence[int], batch: MicroBatch) -> Projection | None:
        """What those before the senders of a boundary say that they had sent them."""
        before = self._model.mesh.before(boundary)
        if self.adversary is None or self.adversary.notes is None or note is None or before is None:
            return note
        pieces = list(note.values.chunk(len(group)))
        for number, replica in enumerate(group):
            worker, _ = batch.worker(before.sender, replica)
            pieces[number] = self.adversary.note(worker, pieces[number], batch.step)
        return note._replace(values=torch.cat(pieces))

    def _tampered(
        self, adversary: Adversary, boundary: Boundary, group: Sequence[int], sent: Tensor, received: Any, batch: MicroBatch
    ) -> Tensor:
        serving = [batch.worker(boundary.sender, replica) for replica in group]
        if not adversary.workers.intersection(worker for worker, _ in serving):
            return sent
        pieces = list(sent.chunk(len(group)))
        got = received.chunk(len(group)) if isinstance(received, Tensor) else [None] * len(group)
        for number, (replica, (worker, slot)) in enumerate(zip(group, serving)):
            honest = pieces[number]
            pieces[number] = adversary.tamper(honest, worker, boundary.direction, batch.step, slot, got[number])
            if pieces[number] is not honest:
                self._note(boundary, replica, batch, pieces[number], honest)
        return torch.cat(pieces)

    def _note(self, boundary: Boundary, replica: int, batch: MicroBatch, sent: Tensor, honest: Tensor) -> None:
        """Remember for audits how far what was sent is from what an honest worker sends."""
        if self.guard is not None and self.guard.audits:
            index = self._model.mesh.boundaries.index(boundary)
            measured = deviation(sent, honest, self.guard.tolerances.seed_of(index))
            batch.running.measured.setdefault(index, {})[batch.place(replica)] = honest.dtype, measured

    def _lanes(self, batch: MicroBatch) -> Tensor | None:
        """:meth:`MicroBatch.lanes` on the device."""
        lanes = batch.lanes()
        return None if lanes is None else torch.tensor(lanes, device=self._device)
