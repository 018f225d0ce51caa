"""What a pipeline cannot do: said with its remedy on all ranks, before any of them waits for another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_sentinel.errors import ConfigurationError

__all__ = ["refuse_unsupported", "require_optimizer", "requiring_one_optimizer"]


def refuse_unsupported(module: L.LightningModule, trainer: L.Trainer, precision: Precision) -> None:
    """Raise ``ConfigurationError`` for settings of the module or the Trainer that a pipeline would have to ignore."""
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"{name} uses manual optimization, but a pipeline's backward pass is run by its schedule. Set"
            " self.automatic_optimization = True and let training_step return the loss."
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ConfigurationError(
            f"Trainer(gradient_clip_algorithm={str(trainer.gradient_clip_algorithm.value)!r}) cannot be used with a pipeline:"
            " gradients are clipped by the norm over all stages. Use gradient_clip_algorithm='norm'."
        )
    if is_overridden("configure_gradient_clipping", module, L.LightningModule):
        raise ConfigurationError(
            f"{name}.configure_gradient_clipping would see one stage's gradients only. Remove it, and clip by the norm over all"
            " stages with Trainer(gradient_clip_val=...)."
        )
    if type(precision) is not Precision:
        raise ConfigurationError(
            f"SentinelStrategy does not support {type(precision).__name__}(precision={precision.precision!r}) yet. Use"
            " Trainer(precision='32-true')."
        )


@contextmanager
def requiring_one_optimizer(module: L.LightningModule) -> Iterator[None]:
    """Around ``setup_optimizers``: Lightning refuses several optimizers too, but its remedy, manual optimization, is none here."""
    try:
        yield
    except RuntimeError as error:
        if "multiple optimizers" not in str(error):
            raise
        raise ConfigurationError(
            f"{type(module).__name__}.configure_optimizers returned more than one optimizer; a pipeline needs exactly one. Use one"
            " with several parameter groups."
        ) from error


def require_optimizer(module: L.LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ConfigurationError`` if ``configure_optimizers`` made none, for which Lightning puts in a stand-in."""
    if not optimizers or not isinstance(optimizers[0], Optimizer) or isinstance(optimizers[0], _MockOptimizer):
        raise ConfigurationError(
            f"{type(module).__name__}.configure_optimizers returned no optimizer, and a pipeline cannot train without one. Return a"
            " torch.optim.Optimizer."
        )
