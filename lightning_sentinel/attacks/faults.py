"""Faults of computation: a broken worker's own layers return wrong values, where the other attacks alter sent signals.

They strike inside the graph, so later layers compute with wrong values, forward and backward: the worker's weight gradients are hit
as well as its signals. In the formulas ``h`` is the output of the first layer of the worker's stage, or its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.signals import by_channel, channel_axis, is_integer, is_share, require
from lightning_sentinel.attacks.subtle import Local

__all__ = ["BadRows", "FlippedBits", "GradientContribution", "NonFinite", "Site", "site_of"]


class Site(Enum):
    """Where an attack strikes."""

    MESSAGE = "message"
    """The signals that a worker sends."""
    LAYER = "layer"
    """The output of one of its layers."""
    WEIGHTS = "weights"
    """The gradients of its weights, which stay within the stage."""


def site_of(attack: object) -> Site:
    """Where an attack strikes: its attribute ``site``, by default the sent signals.

    Example:
        >>> site_of(NonFinite()).value, site_of(lambda signal, context: -signal).value
        ('layer', 'message')
    """
    return Site(getattr(attack, "site", Site.MESSAGE))


@dataclass
class NonFinite:
    """A layer returns values that are not finite: ``h' = value * h`` (ours).

    Args:
        value: NaN, or an infinity.
        steps: for how many steps from the first; ``None`` for ever.

    Raises:
        ConfigurationError: if ``value`` is finite, or ``steps`` no integer above 0.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> for step in (0, 1):
        ...     context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, step=step)
        ...     print(attacks.NonFinite()(torch.ones(2), context))
        tensor([nan, nan])
        tensor([1., 1.])
    """

    value: float = math.nan
    steps: int | None = 1
    site: ClassVar[Site] = Site.LAYER

    def __post_init__(self) -> None:
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        require(number and not math.isfinite(self.value), self, "value", "NaN or an infinity (.nan or .inf in YAML)")
        require(self.steps is None or (is_integer(self.steps) and self.steps > 0), self, "steps", "an integer above 0, or None")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        over = self.steps is not None and context.step - context.start_step >= self.steps
        return signal.clone() if over else signal * self.value


@dataclass
class FlippedBits:
    """A bit flips in some elements of a layer's output, drawn anew for each signal (ours).

    Args:
        bit: which one, counted from the sign, which is 0; the exponent follows.
        count: in how many elements.

    Raises:
        ConfigurationError: if ``bit`` is none of the 16 that all dtypes have, or ``count`` no integer above 0.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.FlippedBits(bit=0)(torch.ones(1), context)
        tensor([-1.])
    """

    bit: int = 2
    count: int = 1
    site: ClassVar[Site] = Site.LAYER

    def __post_init__(self) -> None:
        require(is_integer(self.bit) and 0 <= self.bit < 16, self, "bit", "an integer from 0 to 15")
        require(is_integer(self.count) and self.count > 0, self, "count", "an integer above 0")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[signal.element_size()]
        bits = 8 * signal.element_size()
        # The sign bit of a signed integer is a negative number.
        mask = 1 << (bits - 1 - self.bit) if self.bit else -(1 << (bits - 1))
        flipped = (signal.detach().contiguous().view(integers) ^ mask).view(signal.dtype)
        rank = torch.rand(signal.numel(), generator=context.generator, device=signal.device).argsort()
        return torch.where((rank < self.count).view(signal.shape), flipped, signal)


@dataclass
class BadRows:
    """A layer leaves rows of its result zero, or puts garbage there, as a kernel does that skips a tile (ours).

    A row is a sample of (B, F), a token of (B, T, C) or a pixel of (B, C, H, W).

    Args:
        share: of the rows, above 0 and at most 1, and at least one of them, drawn anew for each signal.
        garbled: noise with the mean and the standard deviation of each channel in place of zeros.

    Raises:
        ConfigurationError: if ``share`` is no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.BadRows(share=0.5)(torch.ones(8, 2), context).sum()
        tensor(8.)
    """

    share: float = 0.1
    garbled: bool = False
    site: ClassVar[Site] = Site.LAYER

    def __post_init__(self) -> None:
        require(is_share(self.share), self, "share", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        if self.garbled:
            return Local(self.share)(signal, context)
        shape = by_channel(signal).shape[:-1]
        rank = torch.rand(shape.numel(), generator=context.generator, device=signal.device).argsort()
        chosen = (rank < max(1, round(self.share * shape.numel()))).view(shape)
        return torch.where(chosen.unsqueeze(channel_axis(signal)), 0.0, signal)


@dataclass
class GradientContribution:
    """A worker adds something else to its stage's weight gradients: ``g' = factor * g + bias * rms(g)`` (ours).

    Its signals are honest. The bias has the same sign everywhere and in every step, so that it adds up in the weights.

    Args:
        factor: NaN, an infinity, or any number: -1 turns the gradient round, 0 leaves the work to others.
        bias: any finite number; relative to the root mean square of each weight's gradient.

    Raises:
        ConfigurationError: if ``factor`` is no number, or ``bias`` no finite one.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.GRADIENT)
        >>> attacks.GradientContribution(factor=-1.0)(torch.ones(2), context)
        tensor([-1., -1.])
        >>> attacks.GradientContribution(factor=1.0, bias=0.1)(torch.tensor([3.0, -3.0]), context)
        tensor([ 3.3000, -2.7000])
    """

    factor: float = math.nan
    bias: float = 0.0
    site: ClassVar[Site] = Site.WEIGHTS

    def __post_init__(self) -> None:
        for name in ("factor", "bias"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and (name == "factor" or math.isfinite(value)), self, name, "a number")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        sent = signal * self.factor
        return sent + self.bias * signal.square().mean().sqrt() if self.bias else sent
