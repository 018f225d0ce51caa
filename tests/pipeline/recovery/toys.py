"""A mesh whose stages multiply by a matrix, for audits between ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import Received, StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.auditing import Audits
from lightning_sentinel.pipeline.recovery.examination import Inputs, SignalExamination
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Algorithm
from lightning_sentinel.trust.evidence import Testimony
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.statements import Kind, Moment, SignalId, SignalStatement
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import Drawn
from lightning_sentinel.verification.jury import Auditable, Case, Jury, Subject
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.tolerance import Tolerances
from lightning_sentinel.wiring import MicroBatchId, Wiring
from tests.pipeline.ranks import ranks

A, G = Direction.ACTIVATION, Direction.GRADIENT
CPU = torch.device("cpu")
MATCHES, LIED = Outcome.MATCHES, Outcome.LIED
Place = tuple[Boundary, int, int]
"""A signal: its boundary, lane and slot."""
Recompute = Callable[[Direction, MicroBatchId, Inputs], Tensor]

SAMPLES, CHANNELS = 3, 4


_HONEST = object()
RUN = bytes(range(16))


@cache
def credentials(mesh: Mesh, worker: Worker, signs: bool = True) -> Credentials:
    if not signs:
        return Credentials(RUN)
    identities = {one: Identity.seeded(0, str(one)) for one in mesh.workers}
    return Credentials(RUN, Algorithm.SHA256, identities[worker], {one: mine.public for one, mine in identities.items()})


class Toy:
    """A mesh whose stages multiply by a matrix, with everything that each rank sent and received in a step.

    Args:
        lies: signals to which the sender adds one.
        banned: workers that serve nothing.
        signs: whether workers sign what they say.
    """

    def __init__(
        self,
        mesh: Mesh,
        lies: Collection[Place] = (),
        banned: Collection[Worker] = (),
        micro_batches: int = 2,
        turn: int = 0,
        signs: bool = True,
    ) -> None:
        self.signs = signs
        self.mesh, self.banned = mesh, set(banned)
        self.wiring = Wiring.of(mesh, banned, micro_batches, turn)
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(mesh.stages, CHANNELS, CHANNELS, generator=generator)
        self.batches = torch.randn(mesh.replicas, micro_batches, 2, SAMPLES, CHANNELS, generator=generator)
        self.kept = [SignalCache() for _ in mesh.workers]
        self.outvoted: frozenset[Worker] = frozenset()
        self.commitments = StepCommitments()
        self.testimonies: dict[SignalId, list[Testimony]] = {}
        self.adversary: Adversary | None = None
        self.recompute: dict[int, Recompute] = {}
        """What a rank computes instead of what it should."""
        self.tolerances = [Tolerances(mesh, seed=11) for _ in mesh.workers]
        self.handed: Any = _HONEST
        """What is handed over in place of samples."""
        for lane in self.wiring.lanes:
            for slot, part in enumerate(self.wiring.work[lane]):
                self._run(lane, slot, part, set(lies))

    def _run(self, lane: int, slot: int, part: MicroBatchId, lies: set[Place]) -> None:
        inputs, received, last = self.batches[part][0], [], self.mesh.stages - 1
        for stage in range(last):
            received.append(inputs)
            inputs = self._cross(Boundary(stage, A), lane, slot, inputs @ self.weights[stage], lies)
        gradient = self._loss_gradient(inputs @ self.weights[last], part)
        for stage in range(last, 0, -1):
            gradient = self._cross(Boundary(stage - 1, G), lane, slot, gradient @ self.weights[stage].T, lies)

    def _cross(self, boundary: Boundary, lane: int, slot: int, signal: Tensor, lies: set[Place]) -> Tensor:
        signal = signal + 1.0 if (boundary, lane, slot) in lies else signal
        self.of(boundary.sender, lane).sent[boundary.direction, slot] = signal
        self.of(boundary.receiver, lane).received[boundary.direction, slot] = signal
        self.commit(boundary, lane, slot, signal)
        return signal

    def commit(self, boundary: Boundary, lane: int, slot: int, signal: Tensor) -> None:
        """The sender signs what it sent."""
        sender, place = self.wiring.worker(boundary.sender, lane), SignalId(Kind.SIGNAL, boundary, lane, slot)
        own = credentials(self.mesh, sender, self.signs)
        said = SignalStatement(Moment(RUN, 3, 1), sender, place, False, own.digest(signal))
        self.commitments.sent[place] = own.sign(said)
        self.commitments.received[place] = Received(said.tainted, said.digest)

    def _loss_gradient(self, output: Tensor, part: MicroBatchId) -> Tensor:
        return 0.5 * (output - self.batches[part][1])

    def of(self, stage: int, lane: int) -> SignalCache:
        return self.kept[self.mesh.rank(self.wiring.worker(stage, lane))]

    def honest(self, stage: int) -> Recompute:
        """What a worker of a stage makes of the evidence, and of nothing else."""

        def recompute(direction: Direction, part: MicroBatchId, given: Inputs) -> Tensor:
            inputs = given.batch[0] if stage == 0 else given.activation
            output = inputs @ self.weights[stage]
            if direction is A:
                return output
            last = stage == self.mesh.stages - 1
            gradient = 0.5 * (output - given.batch[1]) if last else given.gradient
            return gradient @ self.weights[stage].T

        return recompute

    def audit(
        self,
        boundary: Boundary | None,
        signals: Tensor | None = None,
        step: int = 3,
        says: dict[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """What all ranks find of a boundary, or of all at once; by default of all their signals."""
        if signals is None:
            signals = torch.zeros(self.mesh.replicas, self.wiring.slots, dtype=torch.bool)
            for lane in self.wiring.lanes:
                signals[lane, : len(self.wiring.work[lane])] = True
        places = range(len(self.mesh.boundaries)) if boundary is None else [self.mesh.boundaries.index(boundary)]
        of_step = torch.zeros(len(self.mesh.boundaries), *signals.shape, dtype=torch.bool)
        of_step[list(places)] = signals

        plan = plan_step("training_step", self.mesh, BatchSizes(2, (2 * SAMPLES,) * self.mesh.replicas), number=step)
        plan = replace(plan, wiring=self.wiring, banned=frozenset(self.banned), absent=frozenset(self.banned))

        def work(rank: int) -> Tensor:
            worker = self.mesh.worker(rank)

            def samples(part: MicroBatchId) -> Any:
                assert part.replica == worker.replica and worker not in self.banned
                return [list(self.batches[part]), SAMPLES, 0.5] if self.handed is _HONEST else self.handed

            recompute = self.recompute.get(rank, self.honest(worker.stage))
            transcript = Transcript(self.mesh, credentials(self.mesh, worker, self.signs))
            tolerances, cache = self.tolerances[rank], self.kept[rank]
            signals = SignalExamination(self.mesh, cache, samples, recompute, tolerances, lambda: torch.float32)
            audits = Audits(self.mesh, worker, signals, None, tolerances, lambda: cache.room, transcript)
            audits.begin(SignalTable(torch.empty(0)), self.adversary)

            def ask(asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
                return audits.ask(asked, plan, self.commitments)

            nothing = torch.zeros(self.mesh.replicas, *of_step.shape, dtype=torch.bool)
            audited = Auditable(of_step, Drawn(nothing, nothing))
            found = Jury(self.mesh).hear(audited, self.wiring, self.banned, (), step, ask, (Subject.SIGNAL,))
            self.outvoted = frozenset().union(*found.outvoted.values())
            self.testimonies = audits.testimonies
            return found.outcome if boundary is None else found.outcome[places[0]]

        with ranks(self.mesh.size) as world:
            world.says = says or {}
            first, *rest = world.run(work)
            assert not {self.mesh.worker(sender) for sender, _ in world.sent} & self.banned
        assert all(torch.equal(first, other) for other in rest), "all ranks take part, and know the same"
        return first

    def asked(self, boundary: Boundary, lane: int, slot: int, step: int = 3) -> list[int]:
        """The ranks of those that recompute a signal, in order."""
        index, audited = self.mesh.boundaries.index(boundary), self.wiring.worker(boundary.sender, lane)
        return [self.mesh.rank(one) for one in Jury(self.mesh).others(audited, self.banned, step, index, lane, slot)]


def expected(toy: Toy, found: dict[tuple[int, int], Outcome]) -> Tensor:
    outcome = torch.zeros(toy.mesh.replicas, toy.wiring.slots, dtype=torch.long)
    for place, value in found.items():
        outcome[place] = value
    return outcome
