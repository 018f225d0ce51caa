"""Attacks that leave out a stage: a worker passes on the signal that it received, or reverses its own change to it.

In the formulas ``x`` is the signal that the worker received in the same direction. Where it received none of the sent signal's
shape, as at the pipeline's ends, the honest signal is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.signals import channel_statistics, gaussian_like, is_number, require, usable, widened

__all__ = ["FlipResidual", "Identity", "ReceivedNoise"]


@dataclass
class Identity:
    """Passes on the received signal, and computes nothing: ``h' = x`` (ours).

    The honest signal is sent where no signal of its shape was received.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, received=torch.tensor([[5.0, 6.0]]))
        >>> attacks.Identity()(torch.tensor([[1.0, -2.0]]), context)
        tensor([[5., 6.]])
    """

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        received = usable(context.received, signal)
        return (signal if received is None else received).to(signal.dtype, copy=True)


@dataclass
class ReceivedNoise:
    """Passes on the received signal, with a change of the right size: ``h' = x + std_c(h - x) * z``, ``z ~ N(0, 1)`` (ours).

    ``std_c`` is taken per channel over the signal. The honest signal is sent where no signal of its shape was received.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> received = torch.zeros(4096, 1)
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, received=received)
        >>> signal = received + torch.tensor([3.0, -3.0]).repeat(2048)[:, None]
        >>> round(attacks.ReceivedNoise()(signal, context).std().item())
        3
    """

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        received = usable(context.received, signal)
        if received is None:
            return signal.clone()
        std, _ = channel_statistics(widened(signal) - received)
        return (received + gaussian_like(received, context.generator) * std).to(signal.dtype)


@dataclass
class FlipResidual:
    """Reverses the stage's own change: ``h' = x + (1 - 2 * strength) * (h - x)`` (ours).

    The honest signal is sent where no signal of its shape was received.

    Args:
        strength: 1 sends ``x - (h - x)``, the full flip; 0.5 sends ``x``; 0 the honest signal.

    Raises:
        ConfigurationError: if ``strength`` is no number.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, received=torch.tensor([[5.0, 6.0]]))
        >>> attacks.FlipResidual()(torch.tensor([[6.0, 4.0]]), context)
        tensor([[4., 8.]])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        require(is_number(self.strength), self, "strength", "a number")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        received = usable(context.received, signal)
        if received is None:
            return signal.clone()
        return (received + (1 - 2 * self.strength) * (widened(signal) - received)).to(signal.dtype)
