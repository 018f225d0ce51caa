"""A step under way on one worker: its plan, and its results so far."""

from __future__ import annotations

from collections.abc import Callable
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
        plan: the step's plan.
        arguments: the arguments of the user's step function; the first is this replica's batch.
        own: this replica's micro-batches.
        work: the micro-batches that this worker's lane works on, in the order of their slots.
        losses: ``(3,)``: the sums of the weighted losses that count, of their weights, and of the weights of micro-batches for
            which the step returned ``None``.
        scale: factor of the loss: the plan's, times that of a loss scaler, which keeps small gradients from vanishing.
        keeps_results: whether to keep the results of a training step.
        undo: undoes the step; ``None`` if it never has to be.
    """

    plan: StepPlan
    arguments: tuple[Any, ...]
    own: MicroBatches
    work: list[AssignedMicroBatch]
    losses: Tensor
    scale: float | Tensor
    keeps_results: bool
    undo: Callable[[], None] | None = None
    results: dict[MicroBatchId, Any] = field(default_factory=dict)
    """What the step returned for each micro-batch."""
    begun: dict[int, StepRun] = field(default_factory=dict)
    """Runs of the user's step that wait for the pipeline's output, by slot, where one stage is both the first and the last."""

    def step_arguments(self, slot: int) -> tuple[Any, ...]:
        """The arguments of the user's step for one micro-batch.

        A step may change its batch in place, which a repeat of the step must not see.
        """
        batch = self.work[slot].batch
        return (copied(batch) if self.plan.audited else batch, *self.arguments[1:])
