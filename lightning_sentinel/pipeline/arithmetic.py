"""What a Trainer's precision means for a stage: how it computes, and how losses are scaled so that all skip the same steps."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer

__all__ = ["Arithmetic"]


class Arithmetic:
    """The precision of a stage.

    Under ``16-mixed`` gradients may overflow on one stage, and the step is to be skipped by all. So the plugin's scaler is replaced
    by torch's own for sharded models, which asks all ranks; the plugin goes on to save and load its state.

    Args:
        precision: the Trainer's plugin. Its scaler, if it has one, is replaced once.
        device: where the stage is.

    Example:
        >>> arithmetic = Arithmetic(Precision(), torch.device("cpu"))
        >>> arithmetic.factor()
        1.0
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._precision = precision
        self.device = device
        self._scaler: ShardedGradScaler | None = None
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            if not isinstance(precision.scaler, ShardedGradScaler):
                precision.scaler = _sharded(precision.scaler, device)
            self._scaler = precision.scaler

    def forward_context(self) -> AbstractContextManager[None]:
        """To be entered around every forward pass, and around nothing else: the schedule runs backward passes in between."""
        return self._precision.forward_context()

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, so that gradients overflow every now and then and the step is skipped by all."""
        return self._scaler is not None

    def factor(self) -> Tensor | float:
        """What losses are multiplied by; on the device, where nobody waits for it."""
        return 1.0 if self._scaler is None else self._scaler.scale(torch.ones((), device=self.device))

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide gradients by the factor, and find out whether any stage's overflowed; then it is a collective."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Step unless gradients overflowed, and adapt the factor. ``False`` if losses are not scaled: then nothing was done."""
        if self._scaler is None:
            return False
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad()
        return True


def _sharded(scaler: torch.amp.GradScaler, device: torch.device) -> ShardedGradScaler:
    sharded = ShardedGradScaler(
        device=device.type,
        init_scale=scaler.get_scale(),
        growth_factor=scaler.get_growth_factor(),
        backoff_factor=scaler.get_backoff_factor(),
        growth_interval=scaler.get_growth_interval(),
        enabled=scaler.is_enabled(),
    )
    # A checkpoint may have been loaded into the one that it replaces.
    sharded.load_state_dict(scaler.state_dict())
    return sharded
