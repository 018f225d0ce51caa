"""Shared by attacks: the axes and statistics of a signal, noise like it, and checks of their strengths.

Nothing here reads a value back from the device. Statistics are taken in single precision or better.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError

__all__ = [
    "by_channel",
    "channel_axis",
    "channel_statistics",
    "gaussian_like",
    "is_integer",
    "is_number",
    "is_share",
    "require",
    "usable",
    "widened",
]


def require(condition: bool, attack: object, name: str, rule: str) -> None:
    """Raises ``ConfigurationError`` unless ``condition`` holds for the parameter ``name`` of ``attack``."""
    if not condition:
        value = getattr(attack, name)
        # YAML 1.1 reads 1e-3, which has no dot, as text: without the type the message would puzzle.
        kind = f" ({type(value).__name__})" if isinstance(value, str) else ""
        raise ConfigurationError(f"{type(attack).__name__}({name}={value!r}){kind} cannot work: {name} must be {rule}.")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_share(value: object) -> bool:
    """Whether ``value`` is a number above 0 and at most 1."""
    return isinstance(value, (int, float)) and is_number(value) and 0 < value <= 1


def channel_axis(signal: Tensor) -> int:
    return 1 if signal.ndim >= 4 else -1


def by_channel(signal: Tensor) -> Tensor:
    """The signal with its channels last: ``(..., C)``."""
    return signal.movedim(channel_axis(signal), -1)


def channel_statistics(signal: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean per channel, shaped to broadcast over ``signal``."""
    channel = channel_axis(signal) % signal.ndim
    others = [axis for axis in range(signal.ndim) if axis != channel]
    std, mean = torch.std_mean(signal, dim=others or None, correction=0, keepdim=True)
    return std, mean


def widened(signal: Tensor) -> Tensor:
    return signal.to(torch.promote_types(signal.dtype, torch.float32))


def gaussian_like(signal: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(signal.shape, generator=generator, device=signal.device, dtype=signal.dtype)


def usable(received: Tensor | None, signal: Tensor) -> Tensor | None:
    """The received signal, widened, if it can be combined with ``signal`` element by element; else ``None``.

    The first stage of a pipeline may have received token ids: those are no signal.
    """
    if received is None or not received.is_floating_point():
        return None
    return widened(received) if (received.shape, received.device) == (signal.shape, signal.device) else None
