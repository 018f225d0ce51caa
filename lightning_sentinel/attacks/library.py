"""The published attacks that need no memory; formulas from SENTINEL, arXiv 2603.03592, section on attacks.

In the formulas ``h`` is the honest signal and ``h'`` the signal sent in its place. Nothing here reads a value back from the device,
so an attack costs no synchronisation. Statistics are taken in single precision or better, whatever the dtype of the signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.signals import channel_axis, channel_statistics, gaussian_like, is_number, require, widened

__all__ = ["Bias", "InvisibleNoise", "Ones", "RandomSign", "RandomValue", "Scale", "Zeros"]


@dataclass
class Zeros:
    """Sends nothing but zeros: ``h' = 0`` (SENTINEL, arXiv 2603.03592, section on attacks).

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.Zeros()(torch.tensor([[1.0, -2.0]]), context)
        tensor([[0., 0.]])
    """

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return torch.zeros_like(signal)


@dataclass
class Ones:
    """Sends nothing but ones: ``h' = 1`` (SENTINEL, arXiv 2603.03592, section on attacks).

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.Ones()(torch.tensor([[1.0, -2.0]]), context)
        tensor([[1., 1.]])
    """

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return torch.ones_like(signal)


@dataclass
class RandomValue:
    """Sends Gaussian noise that has nothing to do with the signal: ``h' ~ N(0, std^2)``, independent per element.

    The random value attack of SENTINEL (arXiv 2603.03592, section on attacks).

    Args:
        std: standard deviation of the sent noise, above 0.

    Raises:
        ConfigurationError: if ``std`` is no number above 0.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> sent = attacks.RandomValue(std=10.0)(torch.zeros(256, 256), context)
        >>> round(sent.std().item())
        10
    """

    std: float = 1.0

    def __post_init__(self) -> None:
        require(is_number(self.std) and self.std > 0, self, "std", "a number above 0")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return gaussian_like(widened(signal), context.generator).mul_(self.std).to(signal.dtype)


@dataclass
class Scale:
    """Sends a multiple of the signal: ``h' = factor * h`` (SENTINEL, arXiv 2603.03592, section on attacks).

    Args:
        factor: -1 turns the signal round, 0.1 shrinks it, 10 inflates it.

    Raises:
        ConfigurationError: if ``factor`` is no number.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.Scale(factor=-1.0)(torch.tensor([[1.0, -2.0]]), context)
        tensor([[-1.,  2.]])
    """

    factor: float = -1.0

    def __post_init__(self) -> None:
        require(is_number(self.factor), self, "factor", "a number")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return (signal * self.factor).to(signal.dtype)


@dataclass
class RandomSign:
    """Flips signs at random: ``h'_i = -h_i`` with a probability, else ``h_i``, independently for each element ``i``.

    The random sign attack of SENTINEL (arXiv 2603.03592, section on attacks).

    Args:
        probability: chance of a flip, above 0 and at most 1.

    Raises:
        ConfigurationError: if ``probability`` is no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> sent = attacks.RandomSign(probability=0.5)(torch.full((2, 3), 4.0), context)
        >>> sent.abs()
        tensor([[4., 4., 4.],
                [4., 4., 4.]])
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        valid = is_number(self.probability) and 0 < self.probability <= 1
        require(valid, self, "probability", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        # Half-precision uniforms are too coarse: with 256 values, a probability of 0.001 would never be met as asked.
        uniform = torch.rand(signal.shape, generator=context.generator, device=signal.device, dtype=torch.float32)
        return torch.where(uniform < self.probability, -signal, signal)


@dataclass
class Bias:
    """Pushes every signal the same way: ``h' = h + strength * std(h) * u``, the bias of SENTINEL (arXiv 2603.03592).

    ``std(h)`` is taken over the whole signal. ``u`` holds +1 or -1 for each channel, drawn from ``seed`` alone: it is
    the same at every step and for every worker, so that a small bias adds up where noise would average out.
    The channel axis is the last one for (B, F) and (B, T, C), axis 1 for (B, C, H, W).

    Args:
        strength: by how many standard deviations each element moves.
        seed: seed of the direction ``u``.

    Raises:
        ConfigurationError: if ``strength`` is no number or ``seed`` no integer.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> signal = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> (attacks.Bias(strength=0.5)(signal, context) - signal).abs()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(is_number(self.strength), self, "strength", "a number")
        require(isinstance(self.seed, int), self, "seed", "an integer")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        honest = widened(signal)
        shift = self.strength * honest.std(correction=0) * self._direction(signal)
        return (honest + shift).to(signal.dtype)

    def _direction(self, signal: Tensor) -> Tensor:
        axis = channel_axis(signal)
        shape = [1] * signal.ndim
        shape[axis] = signal.shape[axis]
        generator = torch.Generator(device=signal.device).manual_seed(self.seed)
        return torch.randint(0, 2, shape, generator=generator, device=signal.device) * 2 - 1


@dataclass
class InvisibleNoise:
    """Drowns the signal in noise that looks like it: ``h' = (1 - fraction) * h + fraction * z``.

    ``z ~ N(mean_c, std_c^2)`` has the mean and the standard deviation of each channel ``c`` of ``h`` itself: the
    invisible noise of SENTINEL (arXiv 2603.03592, section on attacks; fractions 0.90, 0.95 and 0.99). The channel axis
    is the last one for (B, F) and (B, T, C), axis 1 for (B, C, H, W). Where a channel is constant, as in a (1, F)
    signal, the noise is too, and the signal stays the same.

    Args:
        fraction: share of the noise in the sent signal, above 0 and at most 1.

    Raises:
        ConfigurationError: if ``fraction`` is no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> signal = torch.full((512, 512, 2), 3.0) * torch.tensor([1.0, -1.0])
        >>> attacks.InvisibleNoise(fraction=0.99)(signal, context).mean((0, 1)).round()
        tensor([ 3., -3.])
    """

    fraction: float = 0.99

    def __post_init__(self) -> None:
        valid = is_number(self.fraction) and 0 < self.fraction <= 1
        require(valid, self, "fraction", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        honest = widened(signal)
        std, mean = channel_statistics(honest)
        noise = gaussian_like(honest, context.generator) * std + mean
        return torch.lerp(honest, noise, self.fraction).to(signal.dtype)
