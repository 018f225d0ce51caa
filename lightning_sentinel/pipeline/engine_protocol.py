"""Interface that SentinelEngine and VirtualEngine implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling, StepOutcome, StepResult

__all__ = ["Engine", "Gradients"]


class Gradients(Protocol):
    """The gradients of the stages in this process, from the backward passes to the optimizer step.

    Attributes:
        left_out: workers that :meth:`reduce` leaves out.
    """

    left_out: frozenset[Worker]

    def stepped_by_others(self, banned: frozenset[Worker]) -> frozenset[int]:
        """Parameters, by ``id``, whose optimizer state another rank keeps, where these workers are banned."""

    def hold(self) -> None:
        """Put the gradients aside: Lightning zeroes them after ``training_step``, in which the backward passes run."""

    def release(self) -> None:
        """Put the gradients back, where Lightning expects the result of ``backward``."""

    def reduce(self, fractions: CleanFractions) -> None:
        """Replace the gradients by their mean over replicas, of the data that counts.

        Args:
            fractions: how much of the data was not excluded.
        """

    def clip(self, limit: float, by_value: bool) -> None:
        """Clip the reduced gradients: by their norm over all stages, or by value."""

    def apply(self, evaluate: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Step the optimizer, and discard the gradients.

        Args:
            evaluate: the optimizer's closure, which computes the gradients each time it is called, where all stages are in one
                process; ``None`` if the gradients are already there.
            options: further arguments of the optimizer's ``step``.

        Returns:
            what the optimizer's ``step`` returns.
        """

    def discard(self) -> None:
        """Discard the gradients without a step."""


class Engine(Protocol):
    """Runs the part of the mesh that is in this process.

    Attributes:
        adversary: a simulated attacker, if there is one.
        keeps_results: whether to keep the results of ``training_step`` for :meth:`returned`.
    """

    adversary: Adversary | None
    keeps_results: bool

    @property
    def guard(self) -> Guard | None:
        """Verifies received signals; ``None`` for a plain pipeline."""

    @property
    def gradients(self) -> Gradients:
        """The gradients of training batches, until the optimizer steps."""

    def run(self, plan: StepPlan, arguments: tuple[Any, ...], batch: SplitBatch) -> StepResult:
        """Forward passes of one batch, and backward passes of a training batch.

        Args:
            plan: the step's plan.
            arguments: the arguments of the user's step function; the first is the batch.
            batch: the batch in micro-batches.
        """

    def exchange(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """Exchange the step's results between all ranks; a collective."""

    def settle(self, plan: StepPlan, outcome: StepOutcome) -> Ruling | None:
        """Let the guard judge the batch and learn from it, and undo the batch if liars took part in it.

        Returns:
            ``None`` if nothing is verified.
        """

    def returned(self) -> Any:
        """What the user's step returned for this replica's batch in the last :meth:`run`; to be called by all ranks."""
