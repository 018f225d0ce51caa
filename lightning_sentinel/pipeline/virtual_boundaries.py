"""The boundaries of a virtual mesh: tampers with and verifies the signals of all workers of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary, Site
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.data.micro_batches import MicroBatches
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.stages.groups import of_replicas, together
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.steps import StepRun
from lightning_sentinel.pipeline.virtual_workers import VirtualWorkers
from lightning_sentinel.trust.digests import Algorithm, digest_of_tensor
from lightning_sentinel.trust.statements import Kind, SignalId, Transfer
from lightning_sentinel.verification.audit import relative_error
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.verification.reports import NOTE_TOLERANCE
from lightning_sentinel.verification.tolerance import deviation
from lightning_sentinel.verification.verifier import Report
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["Contributed", "MicroBatch", "Receipt", "VirtualBoundaries", "VirtualStep"]


class Receipt(NamedTuple):
    """What a receiver was sent that reported something else of it.

    Args:
        signal: of one sender.
        tainted: ``(1,)`` bool.
        note: on what the sender had received, as it came; ``None`` at the ends of the pipeline.
    """

    signal: Tensor
    tainted: Tensor
    note: Projection | None


class Contributed(NamedTuple):
    """What a worker adds to the weight gradients of its stage.

    Args:
        added: the sketch of it.
        honest: the sketch of what an honest worker adds.
        dtype: of the gradients.
    """

    added: Tensor
    honest: Tensor
    dtype: torch.dtype


@dataclass
class VirtualStep:
    """A training step under way on a virtual mesh.

    Args:
        plan: the step's plan.
        arguments: the arguments of the user's step function; the first is the batch of the whole mesh.
        batch: the batch in micro-batches.
        keeps_results: whether to keep what the step returns.
        apart: whether replicas go through a stage one by one. Then weight gradients that are left out or not finite never enter the
            sum.
    """

    plan: StepPlan
    arguments: tuple[Any, ...]
    batch: SplitBatch
    keeps_results: bool
    apart: bool
    called: int = 0
    """Micro-batches for which the step has called the pipeline."""
    results: list[tuple[Sequence[int], Any]] = field(default_factory=list)
    """The rows of the batch, and what the step returned for them."""
    measured: dict[int, dict[tuple[int, int], tuple[torch.dtype, Tensor]]] = field(default_factory=dict)
    """A signal's dtype and its error against the honest signal, by boundary index, lane and slot, for signals that may differ."""
    kept: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What was sent across a boundary, and the honest signal, by its index, lane and slot, for signals that may differ."""
    receipts: dict[tuple[int, int, int], Receipt] = field(default_factory=dict)
    """What was sent across a boundary, by its index, lane and slot, where the receiver may report something else."""
    false_notes: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The note on what a sender received, as it came, and the honest one, by the place of what it sent, where they differ."""
    notes: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Whether the note on what a sender received is false, 0-dim bool, by the place of what it sent; for notes that may be."""
    contradictions: dict[SignalId, Transfer] = field(default_factory=dict)
    """The signals about which their sender and their receiver say different things."""
    contributed: dict[Worker, Contributed] = field(default_factory=dict)
    """What workers add to the weight gradients of their stages, of those that are looked at."""
    undo: Callable[[], None] | None = None
    """Undoes the step; ``None`` if it never has to be."""
    broken: Tensor = field(init=False)
    """``(stages, replicas, micro_batches)`` bool, whether weight gradients were left out because they are not finite."""

    def take_back(self) -> None:
        """Undo the step, so that it can be repeated."""
        assert self.undo is not None, "a step that may be undone is remembered"
        self.undo()

    def contribute(self, worker: Worker, one: Contributed) -> None:
        """Record what a worker adds to weight gradients for one micro-batch."""
        before = self.contributed.get(worker)
        together = one if before is None else Contributed(before.added + one.added, before.honest + one.honest, one.dtype)
        self.contributed[worker] = together

    def __post_init__(self) -> None:
        mesh = self.plan.mesh
        self.broken = torch.zeros(mesh.stages, mesh.replicas, self.plan.sizes.micro_batches, dtype=torch.bool)


@dataclass
class MicroBatch:
    """The micro-batches with the same number of all replicas, on their way through the mesh.

    Args:
        running: the step.
        parts: each replica's arguments for the user's step function.
        index: the number of these micro-batches.
    """

    running: VirtualStep
    parts: list[tuple[Any, ...]]
    index: int
    seeds: list[MicroBatchSeeds] = field(default_factory=list)
    runs: list[StepRun] = field(default_factory=list)
    """Each replica's run of the user's step."""
    tainted: Tensor = field(default_factory=lambda: torch.empty(0))
    """``(replicas,)`` bool, whether the replica's micro-batch is left out from here on."""
    alike: list[list[int]] = field(default_factory=list)
    """Groups of replicas whose signals have the same shapes."""
    leaves: list[list[Any]] = field(default_factory=list)
    """The input of each stage, for each group."""
    outputs: list[list[Any]] = field(default_factory=list)
    """The output of each stage, for each group."""

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
        """The worker that serves a replica's micro-batch at a stage, and the micro-batch's slot."""
        lane, slot = self.place(replica)
        return self.wiring.worker(stage, lane), slot

    def lanes(self) -> list[int] | None:
        """The lane that works on each replica's micro-batch; ``None`` while each works on its own."""
        return None if all(self.wiring.live) else [self.place(replica)[0] for replica in range(len(self.replicas))]

    def activation(self, boundary: Boundary, replica: int) -> Tensor | None:
        """What a replica's gradient at a boundary is the gradient of; ``None`` where it sends an activation."""
        if boundary.direction is Direction.ACTIVATION:
            return None
        found: Tensor = of_replicas(self.leaves[boundary.sender], self.groups)[replica]
        return found

    @property
    def groups(self) -> list[list[int]]:
        """The replicas that go through a stage together."""
        return [[replica] for replica in range(len(self.parts))] if self.apart else self.alike


class VirtualBoundaries:
    """Passes signals from stage to stage.

    Args:
        workers: the workers of the mesh.
    """

    def __init__(self, workers: VirtualWorkers) -> None:
        self._workers = workers

    def cross(self, boundary: Boundary, sent: Sequence[Tensor], received: Sequence[Any], batch: MicroBatch) -> list[Tensor]:
        """Tamper with and verify the signals of all senders of a boundary.

        Args:
            sent: each group's signals.
            received: the signals that each group's senders received; ``None`` for gradients that the last stage sends.

        Returns:
            each group's signals for the receivers to go on with.
        """
        if batch.apart:
            # Signals of equal shape are verified side by side all the same.
            sent, received = ([together(one, group) for group in batch.alike] for one in (sent, received))
        passed = []
        tainted = batch.tainted
        adversary = self._workers.adversary
        guard = self._workers.guard
        for group, signals, got in zip(batch.alike, sent, received):
            if adversary is not None:
                signals = self._tampered(adversary, boundary, group, signals, got, batch)
                self._commit(adversary, boundary, group, signals, batch)
            if guard is not None:
                signals, tainted = self._verified(guard, boundary, group, signals, got, tainted, batch)
            passed.append(signals)
        batch.tainted = tainted
        return of_replicas(passed, batch.alike) if batch.apart else passed

    def _verified(
        self, guard: Guard, boundary: Boundary, group: list[int], sent: Tensor, received: Any, tainted: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        """A group's signals for the receivers to go on with, and the updated taint of all replicas, ``(replicas,)`` bool."""
        projected = None
        if self._workers.mesh.before(boundary) is not None:
            projected = self._noted(boundary, guard.project(boundary, received.detach()), group, batch)
        lanes = self.lanes(batch)
        if len(group) == len(batch.parts):
            report = self._report(guard, boundary, group, sent, tainted, projected, batch)
            return guard.receive(boundary, sent, tainted, projected, lanes, report=report)
        places = torch.tensor(group, device=self._workers.device)
        lanes = places if lanes is None else lanes[places]
        report = self._report(guard, boundary, group, sent, tainted[places], projected, batch)
        signals, found = guard.receive(boundary, sent, tainted[places], projected, lanes, group, report)
        return signals, tainted.index_copy(0, places, found)

    def _noted(self, boundary: Boundary, note: Projection | None, group: Sequence[int], batch: MicroBatch) -> Projection | None:
        """The note on the signals that the senders of a boundary received, as the workers that sent those signals report it."""
        mesh = self._workers.mesh
        before = mesh.before(boundary)
        adversary = self._workers.adversary
        if adversary is None or note is None or before is None or not adversary.liars(Site.NOTES):
            return note
        pieces = list(note.values.chunk(len(group)))
        for number, replica in enumerate(group):
            honest = pieces[number]
            maker, slot = batch.worker(before.sender, replica)
            neighbour, _ = batch.worker(boundary.sender, replica)
            pieces[number] = adversary.note(honest, maker, neighbour, boundary.direction, batch.step, slot)
            if pieces[number] is not honest:
                place = mesh.boundaries.index(boundary), *batch.place(replica)
                batch.running.notes[place] = relative_error(pieces[number], honest) > NOTE_TOLERANCE
                batch.running.false_notes[place] = pieces[number], honest
        return note._replace(values=torch.cat(pieces))

    def _report(
        self,
        guard: Guard,
        boundary: Boundary,
        group: Sequence[int],
        sent: Tensor,
        tainted: Tensor,
        note: Projection | None,
        batch: MicroBatch,
    ) -> Report | None:
        """What the receivers of a group's signals report of them; ``None`` if that is what they measure."""
        adversary = self._workers.adversary
        receivers = [batch.worker(boundary.receiver, replica)[0] for replica in group]
        if adversary is None or not adversary.liars(Site.ROWS).intersection(receivers):
            return None
        index = self._workers.mesh.boundaries.index(boundary)
        usual = guard.calibration.usual_row(index).to(sent.device)
        notes = [None] * len(group) if note is None else [note._replace(values=one) for one in note.values.chunk(len(group))]
        received = [Receipt(*of_one) for of_one in zip(sent.detach().chunk(len(group)), tainted.chunk(len(group)), notes)]

        def report(measured: Tensor) -> Tensor:
            rows = list(measured)
            for number, (replica, receiver) in enumerate(zip(group, receivers)):
                honest = rows[number]
                sender, slot = batch.worker(boundary.sender, replica)
                rows[number] = adversary.row(honest, usual, receiver, sender, boundary.direction, batch.step, slot)
                if rows[number] is not honest and guard.audits:
                    place = index, *batch.place(replica)
                    batch.running.receipts[place] = received[number]
            return torch.stack(rows)

        return report

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
                self.measure(boundary, replica, batch, pieces[number], honest)
        return torch.cat(pieces)

    def _commit(self, adversary: Adversary, boundary: Boundary, group: Sequence[int], sent: Tensor, batch: MicroBatch) -> None:
        """Record about which signals what their sender commits to is not what their receiver does."""
        liars = adversary.liars(Site.COMMITMENTS)
        if not batch.running.plan.audited or not liars:
            return
        for replica, signal in zip(group, sent.detach().chunk(len(group))):
            sender, slot = batch.worker(boundary.sender, replica)
            receiver, _ = batch.worker(boundary.receiver, replica)
            lane, _ = batch.place(replica)
            if not batch.wiring.live[lane] or not liars.intersection((sender, receiver)):
                continue
            ends = (sender, receiver), (receiver, sender)
            said = [adversary.commitment(signal, *end, boundary.direction, batch.step, slot) for end in ends]
            if len({digest_of_tensor(one, Algorithm.SHA256) for one in said}) > 1:
                signal_id = SignalId(Kind.SIGNAL, boundary, lane, slot)
                batch.running.contradictions[signal_id] = Transfer(sender, receiver, signal_id)

    @property
    def measures(self) -> bool:
        """Whether anybody asks how far what was sent is from the honest signal."""
        adversary = self._workers.adversary
        return self._workers.audits or (adversary is not None and adversary.witness is not None)

    def measure(self, boundary: Boundary, replica: int, batch: MicroBatch, sent: Tensor, honest: Tensor) -> None:
        """Measure for audits the error of the sent signal against the honest one, and tell the adversary's witness of both."""
        guard = self._workers.guard
        adversary = self._workers.adversary
        if guard is not None and guard.audits:
            index = self._workers.mesh.boundaries.index(boundary)
            measured = deviation(sent, honest, guard.tolerances.seed_of(index), batch.activation(boundary, replica))
            lane, slot = batch.place(replica)
            batch.running.measured.setdefault(index, {})[lane, slot] = honest.dtype, measured
            batch.running.kept[index, lane, slot] = sent.detach(), honest.detach()
        if adversary is not None and adversary.witness is not None:
            worker, slot = batch.worker(boundary.sender, replica)
            adversary.witness(worker, boundary.direction.value, batch.step, slot, sent, honest)

    def lanes(self, batch: MicroBatch) -> Tensor | None:
        """:meth:`MicroBatch.lanes` on the device."""
        lanes = batch.lanes()
        return None if lanes is None else torch.tensor(lanes, device=self._workers.device)
