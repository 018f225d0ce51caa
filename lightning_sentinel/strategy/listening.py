"""Finds out which outputs of the user's steps a hook looks at."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["listened_to"]

_HOOKS = {
    "training_step": "on_train_batch_end",
    "validation_step": "on_validation_batch_end",
    "test_step": "on_test_batch_end",
}
_OURS = ("lightning", "lightning_sentinel")
"""Callbacks of these packages have the hooks, but do not look at the outputs."""


def listened_to(trainer: L.Trainer) -> list[str]:
    """The steps whose outputs a hook may look at: one of the module, or of a callback of the user's.

    To share an output of the last stage costs a broadcast, and no hook looks at most outputs.
    """
    return [step for step, hook in _HOOKS.items() if _has_hook(trainer, hook)]


def _has_hook(trainer: L.Trainer, hook: str) -> bool:
    if is_overridden(hook, trainer.lightning_module, L.LightningModule):
        return True
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(hook in vars(callback) or _defines(type(callback), hook) for callback in callbacks)


def _defines(kind: type, hook: str) -> bool:
    # A callback need not be a subclass of Lightning's, and then may lack the hook.
    owner = next((base for base in kind.__mro__ if hook in vars(base)), None)
    return owner is not None and owner.__module__.partition(".")[0] not in _OURS
