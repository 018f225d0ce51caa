"""What the strategy asks of an engine, whatever runs behind it."""

from __future__ import annotations

from typing import Any, Protocol

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.exchange import StepOutcome
from lightning_sentinel.pipeline.guard import Guard, Ruling
from lightning_sentinel.pipeline.shares import Shares

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs the part of the mesh that lives in this process.

    Attributes:
        guard: verifies what is received; ``None`` for a plain pipeline.
        adversary: a simulated attacker, if there is one.
    """

    guard: Guard | None
    adversary: Adversary | None

    @property
    def left_out(self) -> frozenset[Worker]:
        """Workers whose gradients :meth:`reduce_gradients` does not ask for."""

    def reseed(self, seed: int) -> None:
        """Let forward passes draw what they would have drawn in a run of this seed."""

    def train(self, arguments: tuple[Any, ...], step: int, micro_batches: int, scale: float) -> StepOutcome:
        """Forward and backward of one batch, and the exchange of what came of it.

        Args:
            arguments: of ``training_step``; the first is the batch.
            step: number of the training batch.
            micro_batches: how many to deal a replica's batch into.
            scale: factor of the gradients, for accumulation over batches.
        """

    def evaluate(self, step: str, arguments: tuple[Any, ...], micro_batches: int) -> StepOutcome:
        """Forward of one batch through ``step`` (``"validation_step"`` or ``"test_step"``), and the exchange of what it logged."""

    def predict(self, arguments: tuple[Any, ...], micro_batches: int) -> Any:
        """Forward of one batch through ``predict_step``, without waiting for other replicas."""

    def settle(self, outcome: StepOutcome, step: int) -> Ruling | None:
        """Let the guard judge the batch and learn from it; ``None`` if nothing is verified."""

    def rewind(self) -> None:
        """Undo the last :meth:`train`, so that the batch can be done again."""

    def hold_gradients(self) -> None:
        """Put the gradients aside: Lightning zeroes them after ``training_step``, in which the backward pass runs."""

    def release_gradients(self) -> None:
        """Give them back, to where Lightning expects the result of ``backward``."""

    def reduce_gradients(self, shares: Shares) -> None:
        """Mean over replicas of the gradients that count.

        Args:
            shares: which part of the data was not excluded.
        """

    def apply_gradients(self) -> None:
        """Clip, let the optimizer step, and forget the gradients."""

    def discard_gradients(self) -> None:
        """Forget the gradients without a step."""
