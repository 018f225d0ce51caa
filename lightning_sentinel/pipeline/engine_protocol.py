"""Interface that SentinelEngine and VirtualEngine implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.ruling import Ruling
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import StepOutcome, StepResult

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs the part of the mesh that lives in this process.

    Attributes:
        guard: verifies what is received; ``None`` for a plain pipeline.
        adversary: a simulated attacker, if there is one.
        keeps_results: whether somebody wants to see what ``training_step`` returned.
    """

    guard: Guard | None
    adversary: Adversary | None
    keeps_results: bool

    @property
    def left_out(self) -> frozenset[Worker]:
        """Workers whose gradients :meth:`reduce_gradients` does not ask for."""

    @property
    def stepped_by_others(self) -> frozenset[int]:
        """Parameters, by ``id``, of which another rank keeps the optimizer's state."""

    def run(self, plan: StepPlan, arguments: tuple[Any, ...], batch: SplitBatch) -> StepResult:
        """Forward of one batch, and backward of a training batch.

        Args:
            plan: of the step.
            arguments: of the user's step function; the first is the batch.
            batch: the batch in micro-batches.
        """

    def exchange(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """Tell all ranks what came of the step; a collective."""

    def settle(self, plan: StepPlan, outcome: StepOutcome) -> Ruling | None:
        """Let the guard judge the batch and learn from it; ``None`` if nothing is verified."""

    def returned(self) -> Any:
        """What the user's step returned for this replica's batch in the last :meth:`run`; for all ranks to call."""

    def rewind(self) -> None:
        """Undo the last :meth:`run`, so that the batch can be done again."""

    def hold_gradients(self) -> None:
        """Put the gradients aside: Lightning zeroes them after ``training_step``, in which the backward pass runs."""

    def release_gradients(self) -> None:
        """Give them back, to where Lightning expects the result of ``backward``."""

    def reduce_gradients(self, fractions: CleanFractions) -> None:
        """Mean over replicas of the gradients that count.

        Args:
            fractions: which part of the data was not excluded.
        """

    def clip_gradients(self, limit: float, by_value: bool) -> None:
        """Clip what :meth:`reduce_gradients` has left: by the norm over all stages, or each value."""

    def apply_gradients(self, evaluate: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Let the optimizer step, and forget the gradients.

        Args:
            evaluate: makes the gradients, as often as the optimizer calls it, where all stages are in one process; ``None`` if they
                are there.
            options: of the optimizer's ``step``.

        Returns:
            what that returns.
        """

    def discard_gradients(self) -> None:
        """Forget the gradients without a step."""
