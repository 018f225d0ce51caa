"""Callbacks that average weights, each process those of its own stage.

Both of Lightning's copy the module in ``setup``, when it is still whole, and go through the copy's parameters and the module's side
by side. ``WeightAveraging`` also exchanges a checkpoint's state of the module for its average.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sentinel.errors import ConfigurationError

__all__ = ["CURRENT", "copy_again", "of_stage", "refuse_unequal_epochs"]

CURRENT = "current_model_state"
"""Where ``WeightAveraging`` puts the state that is not averaged."""


def copy_again(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let these callbacks forget the whole module, and copy what this process has of it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            callback.setup(trainer, module, "fit")


def of_stage(checkpoint: dict[str, Any], names: Collection[str]) -> list[str]:
    """Leave only a stage's part of an averaged checkpoint, because the callback loads all there is.

    Args:
        checkpoint: one that has :data:`CURRENT`, as read from a file, changed in place.
        names: of the stage's entries.

    Returns:
        all names that were there.
    """
    saved = list(checkpoint["state_dict"])
    for key in ("state_dict", CURRENT):
        checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in names}
    return saved


def refuse_unequal_epochs(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Raise ``ConfigurationError`` if stages with BatchNorm would train for an epoch more than those without."""
    swa = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if swa and any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise ConfigurationError(
            f"StochasticWeightAveraging gives a module with BatchNorm one epoch more, for its statistics, and only some stages of"
            f" {type(module).__name__} would know of it. Use WeightAveraging(use_buffers=True), or a norm without statistics."
        )
