"""Makes the plan of each step from what all ranks hold: the ledger, the sizes of batches, and how many steps there were."""

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
        guard: knows who is banned and whether anybody is a suspect; ``None`` in a plain pipeline.
        seed: of the random numbers of forward passes.
        runs: runs of a schedule so far; see :class:`StepPlan`.
    """

    mesh: Mesh
    guard: Guard | None
    seed: int
    runs: int = 0

    def training(self, number: int, sizes: BatchSizes, scale: float, excluded: Collection[Worker] = ()) -> StepPlan:
        """A training step.

        Args:
            number: training batches before this one.
            sizes: samples of every replica's batch.
            scale: factor of the gradients, for accumulation over batches.
            excluded: workers that were found out in this very step, which is done again without them.

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
            seed=self.seed,
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

    def evaluation(self, kind: str, loader: int | None, sizes: BatchSizes) -> StepPlan:
        """A step without gradients.

        Args:
            kind: name of the user's step function.
            loader: number of the data loader, if there are several.
            sizes: samples of every replica's batch.
        """
        run = self._next_run()
        return plan_step(kind, self.mesh, sizes, loader=loader, run=run, banned=self._banned, seed=self.seed)

    @property
    def _banned(self) -> frozenset[Worker]:
        return frozenset() if self.guard is None else self.guard.ledger.banned

    def _next_run(self) -> int:
        self.runs += 1
        return self.runs - 1
