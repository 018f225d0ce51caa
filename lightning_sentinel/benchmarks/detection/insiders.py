"""Attacks of those who know more than a worker should: the secret directions or the cumulative sums.

They need a hold of the run that they attack, so they are no part of the library that a user chooses from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.strategy import SentinelStrategy
from lightning_sentinel.verification.drift import DOUBT
from lightning_sentinel.verification.projection import SecretDirections

__all__ = ["INSIDERS", "Insider", "Within", "boundary_of"]


class Insider:
    """Sends honest signals; each of its kinds does something else."""

    def __init__(self) -> None:
        self.strategy: SentinelStrategy | None = None

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return signal


class UnseenExchange(Insider):
    """Exchanges between samples what the secret directions do not see, which the mean over samples does not show either."""

    @override
    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        channels = signal.shape[-1]
        # The benchmark gives the adversary and the verifiers one seed.
        secret = SecretDirections(boundary_of(context), Verification(seed=context.seed))
        basis = torch.linalg.qr(torch.cat((secret.projection(channels), secret.slices(channels)), dim=1)).Q
        tokens = signal.reshape(-1, channels)
        seen = (tokens @ basis @ basis.T).view_as(signal)
        return seen + (signal - seen).roll(1, 0)


class OtherOrder(Insider):
    """Sends the samples of a micro-batch in another order."""

    @override
    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return signal.roll(1, 0)


class BiasBelowItsSum(Insider):
    """Adds a bias in a direction of its own, as long as its cumulative sum is low: sums are known to all ranks."""

    def __init__(self, strength: float = 0.3) -> None:
        super().__init__()
        self.strength = strength

    @override
    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        assert self.strategy is not None, "the run has begun"
        guard = self.strategy._run.guard
        at = self.strategy.mesh.boundaries.index(boundary_of(context))
        if guard is not None and float(guard.calibration.drift.height[at, context.worker.replica]) > DOUBT / 2:
            return signal
        generator = torch.Generator().manual_seed(context.seed_for("bias", context.direction))
        direction = torch.randn(signal.shape[-1], generator=generator)
        return signal + self.strength * signal.std() * direction / direction.norm() * signal.shape[-1] ** 0.5


def boundary_of(context: AttackContext) -> Boundary:
    """The boundary that a signal crosses."""
    return Boundary(context.worker.stage - (context.direction is Direction.GRADIENT), context.direction)


INSIDERS: dict[str, Callable[[], Insider]] = {
    "unseen exchange": UnseenExchange,
    "other order": OtherOrder,
    "bias below its sum": BiasBelowItsSum,
}
"""By name."""


class Within(L.Callback):
    """Gives an insider a hold of the run, behind the injector of its attack."""

    def __init__(self, insider: Insider) -> None:
        self._insider = insider

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        self._insider.strategy = strategy
