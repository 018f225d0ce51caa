"""What the strategy asks of an engine, whatever runs behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.exchange import StepOutcome
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.recovery.guard import Guard, Ruling

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

    def reseed(self, seed: int) -> None:
        """Let forward passes draw what they would have drawn in a run of this seed."""

    def train(self, arguments: tuple[Any, ...], step: int, deal: SplitBatch, scale: float) -> StepOutcome:
        """Forward and backward of one batch, and the exchange of what came of it.

        Args:
            arguments: of ``training_step``; the first is the batch.
            step: number of the training batch.
            deal: the batch in micro-batches, and how large those of all replicas are.
            scale: factor of the gradients, for accumulation over batches.
        """

    def evaluate(self, step: str, arguments: tuple[Any, ...], deal: SplitBatch) -> StepOutcome:
        """Forward of one batch through ``step`` (``"validation_step"`` or ``"test_step"``), and the exchange of what it logged."""

    def predict(self, arguments: tuple[Any, ...], deal: SplitBatch) -> Any:
        """Forward of one batch through ``predict_step``, without waiting for other replicas."""

    def returned(self) -> Any:
        """What the step of the last :meth:`train` or :meth:`evaluate` returned for this replica's batch; for all ranks to call."""

    def settle(self, outcome: StepOutcome, step: int) -> Ruling | None:
        """Let the guard judge the batch and learn from it; ``None`` if nothing is verified."""

    def rewind(self) -> None:
        """Undo the last :meth:`train`, so that the batch can be done again."""

    def hold_gradients(self) -> None:
        """Put the gradients aside: Lightning zeroes them after ``training_step``, in which the backward pass runs."""

    def release_gradients(self) -> None:
        """Give them back, to where Lightning expects the result of ``backward``."""

    def reduce_gradients(self, shares: CleanFractions) -> None:
        """Mean over replicas of the gradients that count.

        Args:
            shares: which part of the data was not excluded.
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
