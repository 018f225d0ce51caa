"""A step under way on one worker: its plan, and what has come of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.data.micro_batches import MicroBatches
from lightning_sentinel.pipeline.data.sample_exchange import AssignedMicroBatch
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.steps import StepRun
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["RunningStep"]


@dataclass
class RunningStep:
    """A step under way.

    Args:
        plan: of the step.
        arguments: of the user's step function; the first is this replica's batch.
        own: the micro-batches of this replica.
        work: the micro-batches that this worker's lane works on, in the order of their slots.
        losses: ``(3,)``, sum of the weighted losses that count, sum of their weights, and of the weights of micro-batches for which
            the step returned ``None``.
        scale: factor of the loss: that of the plan, and the one by which a loss scaler keeps small gradients from vanishing.
        keeps_results: whether somebody wants to see what the step returned.
    """

    plan: StepPlan
    arguments: tuple[Any, ...]
    own: MicroBatches
    work: list[AssignedMicroBatch]
    losses: Tensor
    scale: float | Tensor
    keeps_results: bool
    results: dict[MicroBatchId, Any] = field(default_factory=dict)
    """What the step returned for each micro-batch."""
    begun: dict[int, StepRun] = field(default_factory=dict)
    """Steps that wait for the pipeline's output, by slot, where one stage is the first and the last."""

    def step_arguments(self, slot: int) -> tuple[Any, ...]:
        """The arguments of the user's step for one micro-batch.

        A step may change its batch in place, which must not be seen where the step is done again.
        """
        batch = self.work[slot].batch
        return (copied(batch) if self.plan.audited else batch, *self.arguments[1:])
