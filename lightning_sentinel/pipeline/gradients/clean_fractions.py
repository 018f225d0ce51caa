"""How much of a step's data reached the weights of each stage, over the batches that are accumulated into one optimizer step."""

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
    """What counts of a step.

    Args:
        stages: of each stage, which part of the data was not excluded.
        workers: ``(stages, replicas)``, of each worker, in batches of one replica.
    """

    stages: list[float]
    workers: Tensor

    def of_stage(self, stage: int) -> float:
        return self.stages[stage]

    def of_worker(self, worker: Worker) -> float:
        return float(self.workers[worker.stage, worker.replica])


class CleanFractionTally:
    """Counts what was excluded.

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
        """Enter a batch.

        Args:
            clean: ``(stages, lanes, slots)`` bool, which gradients count at which stage; ``None`` if all do.
            plan: of its step.
        """
        weights, serving = plan.weights, torch.tensor(plan.wiring.serving)
        self._batches += 1
        if clean is None:
            clean = torch.ones(self._mesh.stages, *weights.shape, dtype=torch.bool)
        counted = weights.double() * clean
        self._excluded += (weights.double() * ~clean).sum(dim=(1, 2)) / self._mesh.replicas
        self._served.scatter_add_(1, serving, counted.sum(dim=2))

    def lose(self, workers: Collection[Worker]) -> None:
        """All that these workers have added up so far is gone, which is the same on all ranks."""
        for worker in workers:
            self._excluded[worker.stage] += self._served[worker.stage, worker.replica] / self._mesh.replicas
            self._served[worker.stage, worker.replica] = 0

    def take(self, left_out: Collection[Worker] = ()) -> CleanFractions | None:
        """The fractions since the last call; exactly 1 for a stage where nothing was excluded.

        Args:
            left_out: workers whose gradients are not asked for.

        Returns:
            ``None`` if a stage has nothing to step with: then no stage may move, or they would no longer fit together.
        """
        self.lose(left_out)
        stages = 1.0 - self._excluded / max(1, self._batches)
        fractions = CleanFractions(stages.tolist(), self._served)
        self._forget()
        return fractions if float(stages.min()) > _NOTHING else None
