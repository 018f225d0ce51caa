"""Lets callbacks average weights, in each process those of its own stage.

Both such callbacks of Lightning copy the module in ``setup``, before it is cut, and later pair the copy's parameters with the
module's. ``WeightAveraging`` also replaces the module's state in a checkpoint by the average.
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
"""The key of a checkpoint under which ``WeightAveraging`` puts the state that is not averaged."""


def copy_again(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let these callbacks drop their copy of the whole module, and copy this process's stage."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            callback.setup(trainer, module, "fit")


def of_stage(checkpoint: dict[str, Any], names: Collection[str]) -> list[str]:
    """Leave only a stage's entries in an averaged checkpoint, because the callback loads all entries.

    Args:
        checkpoint: one that has :data:`CURRENT`, as read from a file, changed in place.
        names: keys of the stage's entries.

    Returns:
        all keys of the module's state in the checkpoint.
    """
    saved = list(checkpoint["state_dict"])
    for key in ("state_dict", CURRENT):
        checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in names}
    return saved


def refuse_unequal_epochs(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Raise ``ConfigurationError`` if stages with BatchNorm would train for one epoch more than those without."""
    swa = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if swa and any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise ConfigurationError(
            f"StochasticWeightAveraging gives a module with BatchNorm one epoch more, for its statistics, and only some stages of"
            f" {type(module).__name__} would know of it. Use WeightAveraging(use_buffers=True), or a norm without statistics."
        )
