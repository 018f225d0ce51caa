"""The fraction of the data that reached each stage's weights, over the batches that are accumulated into one optimizer step."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.step_plan import StepPlan

__all__ = ["CleanFractionTally", "CleanFractions"]

_NOTHING = 1e-6


class CleanFractions(NamedTuple):
    """How much of an optimizer step's data counts.

    Args:
        stages: for each stage, the fraction of the data that was not excluded.
        workers: ``(stages, replicas)``, the data that each worker's gradients hold, in batches of one replica.
    """

    stages: list[float]
    workers: Tensor

    def of_stage(self, stage: int) -> float:
        return self.stages[stage]

    def of_worker(self, worker: Worker) -> float:
        return float(self.workers[worker.stage, worker.replica])


class CleanFractionTally:
    """Counts the data that was excluded, and the data that each worker served.

    Args:
        mesh: the workers.

    Example:
        >>> from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
        >>> from lightning_sentinel.pipeline.step_plan import plan_step
        >>> mesh = Mesh(stages=2, replicas=1)
        >>> tally = CleanFractionTally(mesh)
        >>> clean = torch.tensor([[[False, True]], [[True, True]]])  # stages x lanes x micro-batches
        >>> tally.add(clean, plan_step("training_step", mesh, BatchSizes(2, (4,))))
        >>> tally.take().stages
        [0.5, 1.0]
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._forget()

    def _forget(self) -> None:
        self._excluded = torch.zeros(self._mesh.stages, dtype=torch.float64)
        self._served = torch.zeros(self._mesh.stages, self._mesh.replicas, dtype=torch.float64)
        self._batches = 0

    def add(self, clean: Tensor | None, plan: StepPlan) -> None:
        """Count a batch.

        Args:
            clean: ``(stages, lanes, slots)`` bool, whether a micro-batch's gradient counts at a stage; ``None`` if all do.
            plan: the plan of its step.
        """
        weights = plan.weights
        serving = torch.tensor(plan.wiring.serving)
        self._batches += 1
        if clean is None:
            clean = torch.ones(self._mesh.stages, *weights.shape, dtype=torch.bool)
        counted = weights.double() * clean
        self._excluded += (weights.double() * ~clean).sum(dim=(1, 2)) / self._mesh.replicas
        self._served.scatter_add_(1, serving, counted.sum(dim=2))

    def lose(self, workers: Collection[Worker]) -> None:
        """Count as excluded all data that these workers have accumulated so far. All ranks name the same workers."""
        for worker in workers:
            self._excluded[worker.stage] += self._served[worker.stage, worker.replica] / self._mesh.replicas
            self._served[worker.stage, worker.replica] = 0

    def take(self, left_out: Collection[Worker] = ()) -> CleanFractions | None:
        """The fractions since the last call; exactly 1 for a stage where nothing was excluded.

        Args:
            left_out: workers whose gradients the reduction leaves out.

        Returns:
            ``None`` if a stage has no data to step with: then no stage may step, or their weights would no longer fit together.
        """
        self.lose(left_out)
        stages = 1.0 - self._excluded / max(1, self._batches)
        fractions = CleanFractions(stages.tolist(), self._served)
        self._forget()
        return fractions if float(stages.min()) > _NOTHING else None
