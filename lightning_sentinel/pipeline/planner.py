"""Makes each step's plan from values that are the same on all ranks: the ledger, the batch sizes, and the number of past steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import TRAINING, StepPlan, plan_step

__all__ = ["StepPlanner"]


@dataclass
class StepPlanner:
    """Plans the steps of one engine.

    Args:
        mesh: all workers.
        guard: knows which workers are banned and whether any is a suspect; ``None`` in a plain pipeline.
        runs: schedule runs so far; see :class:`StepPlan`.
    """

    mesh: Mesh
    guard: Guard | None
    runs: int = 0

    def training(self, number: int, sizes: BatchSizes, scale: float, seed: int, excluded: Collection[Worker] = ()) -> StepPlan:
        """Plan a training step.

        Args:
            number: training batches before this one.
            sizes: samples of every replica's batch.
            scale: factor of the gradients, for accumulation over batches.
            seed: the seed of forward passes' random numbers.
            excluded: workers found lying in an earlier run of this step, which is repeated without them.

        Raises:
            MeshExhaustedError: if no complete pipeline is left.
        """
        guard = self.guard
        plan = plan_step(
            TRAINING,
            self.mesh,
            sizes,
            number=number,
            run=self._next_run(),
            banned=self._banned,
            excluded=excluded,
            shuffled=None if guard is None else guard.lane_seed(number),
            seed=seed,
            scale=scale,
            audited=guard is not None and guard.audits,
        )
        if not any(plan.wiring.live):
            raise MeshExhaustedError(
                f"No complete pipeline is left at step {number}; banned are {', '.join(map(str, sorted(self._banned)))}, by"
                f" Response(banned=...), a ledger or a checkpoint. The run cannot go on with {self.mesh.replicas} replica(s). Use"
                " more replicas, or take some of the bans back."
            )
        return plan

    def evaluation(self, kind: str, loader: int | None, sizes: BatchSizes, seed: int) -> StepPlan:
        """Plan a step without gradients.

        Args:
            kind: name of the user's step function.
            loader: number of the data loader, if there are several.
            sizes: samples of every replica's batch.
            seed: the seed of forward passes' random numbers.
        """
        run = self._next_run()
        return plan_step(kind, self.mesh, sizes, loader=loader, run=run, banned=self._banned, seed=seed)

    @property
    def _banned(self) -> frozenset[Worker]:
        return frozenset() if self.guard is None else self.guard.ledger.banned

    def _next_run(self) -> int:
        self.runs += 1
        return self.runs
