"""The worker that this process is, shared by all parts of its engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_sentinel.attacks import Adversary, Site
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.verification.verifier import Report

__all__ = ["LocalWorker"]


@dataclass
class LocalWorker:
    """The worker that this process is.

    Args:
        worker: its stage and replica.
        mesh: all workers.
        guard: verifies the signals that it receives; ``None`` in a plain pipeline.
        adversary: a simulated attacker, which may control this worker; ``None`` if there is none.
    """

    worker: Worker
    mesh: Mesh
    guard: Guard | None
    adversary: Adversary | None = None

    @property
    def stage(self) -> int:
        return self.worker.stage

    @property
    def is_first(self) -> bool:
        return self.worker.stage == 0

    @property
    def is_last(self) -> bool:
        return self.worker.stage == self.mesh.stages - 1

    @property
    def excludes(self) -> bool:
        """Whether flagged micro-batches are kept out of the weights at receipt."""
        return self.guard is not None and self.guard.excludes

    def commitment(self, signal: Tensor, neighbour: Worker, direction: Direction, step: int, slot: int) -> Tensor:
        """What this worker says that it sent to a neighbour, or received from it; the signal itself if it is honest."""
        if self.adversary is None:
            return signal
        return self.adversary.commitment(signal, self.worker, neighbour, direction, step, slot)

    def report(self, boundary: Boundary, sender: Worker, step: int, slot: int) -> Report | None:
        """What this worker reports of a signal that it received, in place of what it measured; ``None`` if it is honest."""
        adversary = self.adversary
        if adversary is None or self.guard is None or self.worker not in adversary.liars(Site.ROWS):
            return None
        usual = self.guard.calibration.usual_row(self.mesh.boundaries.index(boundary))

        def report(measured: Tensor) -> Tensor:
            (row,) = measured
            told = adversary.row(row, usual.to(row.device), self.worker, sender, boundary.direction, step, slot)
            return told[None]

        return report
