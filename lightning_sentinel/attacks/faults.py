"""Faults of computation: a broken worker's own layers return wrong values, where the other attacks alter sent signals.

They strike inside the graph, so later layers compute with wrong values, forward and backward: the worker's weight gradients are hit
as well as its signals. In the formulas ``h`` is the output of the first layer of the worker's stage, or its gradient. Faults inside
matrix products are in ``product_faults.py``.
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

__all__ = ["OF_COMPUTATION", "BadRows", "GradientContribution", "NonFinite", "Site", "site_of"]


class Site(Enum):
    """Where an attack strikes."""

    MESSAGE = "message"
    """The signals that a worker sends."""
    LAYER = "layer"
    """The output of one of its layers."""
    PRODUCT = "product"
    """The results of the matrix products in its layers."""
    OWN_WEIGHTS = "own_weights"
    """The weights that it computes with, in place of its stage's."""
    WEIGHTS = "weights"
    """The gradients of its weights, which stay within the stage."""
    ROWS = "rows"
    """The rows that it reports: its measurements of the signals that it receives."""
    NOTES = "notes"
    """The notes on its signals, which the verifiers of the next stage compare with what that stage makes of them."""
    COMMITMENTS = "commitments"
    """What it says to all, and signs, about the signals that it sent and received: their digests."""
    VOTES = "votes"
    """Its votes in audits."""


OF_COMPUTATION = (Site.LAYER, Site.PRODUCT, Site.OWN_WEIGHTS, Site.WEIGHTS)
"""Where what a worker computes is wrong, and so what it adds to the weight gradients of its stage."""


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
class BadRows:
    """A layer, of any kind, leaves rows of its result zero, or puts garbage there (ours).

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
