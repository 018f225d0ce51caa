"""Attacks that stay close to the honest signal: noise of a chosen size, a slow drift, few positions, a common scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.library import Bias
from lightning_sentinel.attacks.signals import (
    by_channel,
    channel_axis,
    channel_statistics,
    gaussian_like,
    is_integer,
    is_number,
    is_share,
    require,
    widened,
)

__all__ = ["AddNoise", "Drift", "Frame", "Local"]


@dataclass
class AddNoise:
    """Adds noise that no two elements share: ``h' = h + strength * std(h) * z``, ``z ~ N(0, 1)`` (ours).

    ``std(h)`` is taken over the whole signal. Unlike a bias, the noise averages out over samples and steps.

    Args:
        strength: size of the noise in standard deviations of the signal.

    Raises:
        ConfigurationError: if ``strength`` is no number.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> signal = torch.tensor([10.0, -10.0]).repeat(2048)[:, None]
        >>> round((attacks.AddNoise(strength=0.3)(signal, context) - signal).std().item())
        3
    """

    strength: float = 0.3

    def __post_init__(self) -> None:
        require(is_number(self.strength), self, "strength", "a number")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        honest = widened(signal)
        noise = gaussian_like(honest, context.generator)
        return (honest + self.strength * honest.std(correction=0) * noise).to(signal.dtype)


@dataclass
class Drift:
    """A bias that grows with time: ``h' = h + min(limit, rate * (t - t0 + 1)) * std(h) * u`` (ours).

    ``t`` is the step and ``t0`` the first that is tampered with; ``u`` and ``std`` are those of :class:`Bias`. A reference that
    follows received signals may follow this attack.

    Args:
        rate: growth in standard deviations a step, above 0.
        limit: where growth ends, in standard deviations, above 0.
        seed: seed of the direction ``u``.

    Raises:
        ConfigurationError: if ``rate`` or ``limit`` is no number above 0, or ``seed`` no integer.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Mesh, Worker
        >>> liar, signal = Worker(1, 0), torch.tensor([[1.0], [-1.0]])
        >>> spec = {"name": "drift", "rate": 0.25, "limit": 0.5}
        >>> adversary = attacks.Adversary(spec, Mesh(3, 4), workers=[liar], start_step=10)
        >>> sent = [adversary.tamper(signal, liar, Direction.GRADIENT, step, micro_batch=0) for step in range(9, 13)]
        >>> [(one - signal).abs().mean().item() for one in sent]
        [0.0, 0.25, 0.5, 0.5]
    """

    rate: float = 0.01
    limit: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(is_number(self.rate) and self.rate > 0, self, "rate", "a number above 0")
        require(is_number(self.limit) and self.limit > 0, self, "limit", "a number above 0")
        require(is_integer(self.seed), self, "seed", "an integer")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        age = max(0, context.step - context.start_step + 1)
        return Bias(min(self.limit, self.rate * age), self.seed)(signal, context)


@dataclass
class Local:
    """Replaces few positions by noise like the signal: ``h'_i ~ N(mean_c, std_c^2)`` for drawn ``i``, else ``h_i`` (ours).

    A position is a sample of (B, F), a token of (B, T, C) or a pixel of (B, C, H, W). Mean and standard deviation are
    those of each channel ``c`` of the signal. The positions are drawn anew for each signal.

    Args:
        share: share of the positions of a signal, above 0 and at most 1. At least one position is replaced, so a very
            small share is one token of a micro-batch.

    Raises:
        ConfigurationError: if ``share`` is no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> signal = torch.arange(64.0).reshape(2, 16, 2)
        >>> (attacks.Local(share=0.125)(signal, context) != signal).all(-1).sum()
        tensor(4)
    """

    share: float = 0.02

    def __post_init__(self) -> None:
        require(is_share(self.share), self, "share", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        honest = widened(signal)
        std, mean = channel_statistics(honest)
        noise = (gaussian_like(honest, context.generator) * std + mean).to(signal.dtype)
        shape = by_channel(signal).shape[:-1]
        rank = torch.rand(shape.numel(), generator=context.generator, device=signal.device).argsort()
        chosen = (rank < max(1, round(self.share * shape.numel()))).reshape(shape)
        return torch.where(chosen.unsqueeze(channel_axis(signal)), noise, signal)


@dataclass
class Frame:
    """Scales a little, and all colluders alike: ``h' = (1 + strength) * h`` (ours).

    Meant for as many workers of a stage as the attacker has: together they move the median of the replicas, and the honest workers
    look out of line.

    Args:
        strength: relative size of the change.

    Raises:
        ConfigurationError: if ``strength`` is no number.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.Frame(strength=0.5)(torch.tensor([[1.0, -2.0]]), context)
        tensor([[ 1.5000, -3.0000]])
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        require(is_number(self.strength), self, "strength", "a number")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return (widened(signal) * (1 + self.strength)).to(signal.dtype)
