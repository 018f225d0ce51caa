"""Attacks that learn what honest signals look like and send a copy: the momentum, or a linear model of the stage.

Both learn from every honest signal of the worker, also before the attack starts, and send what they knew before the present step: a
step that is done again sends the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.memory import DecayedSums, Sums
from lightning_sentinel.attacks.signals import (
    by_channel,
    channel_axis,
    channel_statistics,
    gaussian_like,
    is_number,
    require,
    widened,
)
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Worker

__all__ = ["MomentumNoise", "Surrogate"]

_Key = tuple[Worker, Direction]


@dataclass
class MomentumNoise:
    """Sends its own momentum and fitting noise: ``h' = m + std_c(h - mean(h)) * z``, ``z ~ N(0, 1)``.

    The adaptive attack of SENTINEL (arXiv 2603.03592, section on attacks), with the noise that the momentum lacks.
    ``mean`` is over the batch axis; ``m`` is its exponential moving average before step ``t``, over the worker's own
    honest signals: ``m = sum_i beta^(t-1-i) s_i / sum_i beta^(t-1-i) n_i`` with ``s_i`` the sum and ``n_i`` the number of
    the samples of step ``i < t``. ``std_c`` is taken per channel; with one sample it is zero. Until there is an earlier
    step of the same shape, the honest signal is sent.

    Args:
        beta: decay of the average a step, at least 0 and below 1.

    Raises:
        ConfigurationError: if ``beta`` is no number in this range.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> attack = attacks.MomentumNoise(beta=0.5)
        >>> def send(step):
        ...     context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, step=step)
        ...     return attack(torch.tensor([[3.0 * step]]), context).item()
        >>> [send(step) for step in range(3)]
        [0.0, 0.0, 2.0]
    """

    beta: float = 0.9
    _memories: dict[_Key, DecayedSums] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(is_number(self.beta) and 0 <= self.beta < 1, self, "beta", "a number of at least 0 and below 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        honest = widened(signal)
        past = self._learn(honest, context)
        if past is None:
            return signal.clone()
        total, count = past
        mean = honest.mean(dim=0)
        momentum = torch.where(count > 0, total / count.clamp(min=torch.finfo(count.dtype).tiny), mean)
        std, _ = channel_statistics(honest - mean)
        return (momentum + gaussian_like(honest, context.generator) * std).to(signal.dtype)

    def observe(self, signal: Tensor, context: AttackContext) -> None:
        """Learns from a signal that is sent honestly, so that the attack can start at full strength."""
        self._learn(widened(signal.detach()), context)

    def _learn(self, honest: Tensor, context: AttackContext) -> Sums | None:
        memory = self._memories.setdefault((context.worker, context.direction), DecayedSums(self.beta))
        past = memory.before(context.step, kind=(honest.shape[1:], honest.dtype, honest.device))
        total = honest.detach().sum(dim=0)
        memory.add(context.micro_batch, (total, total.new_full((), honest.shape[0])))
        return past


@dataclass
class Surrogate:
    """Sends what a linear model of the stage predicts: ``h' = W [x, 1]``, plus ``std_c(h - W [x, 1]) * z`` with noise (ours).

    ``x`` is the signal that the worker received. ``W`` is the ridge regression from the channels of ``x`` to those of ``h`` over
    all positions of the steps ``i < t``, weighted by ``decay^(t-1-i)``: with the weighted mean ``E``, it minimises ``E |h - W [x,
    1]|^2 + ridge * E[|x|^2] / C * |W_x|^2``, where ``C`` is the number of channels of ``x`` and ``W_x`` is ``W`` without the
    constant. Where nothing was received, or not one ``x`` for each position, and in the first step, the honest signal is sent.

    For each worker and direction and each micro-batch of a step, about ``16 * C^2`` bytes are kept: 16 MiB for 1024
    channels. Sums and solution are in double precision.

    Args:
        noise: whether noise of the size of the residual is added, per channel.
        decay: weight of a step against the one after it, at least 0 and below 1.
        ridge: penalty relative to the mean square of the received signal, above 0.

    Raises:
        ConfigurationError: if one of the arguments is not in its range.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> surrogate, received = attacks.Surrogate(ridge=1e-9), torch.tensor([[1.0], [2.0], [3.0]])
        >>> for step in (0, 1):
        ...     context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, step=step, received=received)
        ...     sent = surrogate(2 * received + 1, context)
        >>> sent.round().flatten()
        tensor([3., 5., 7.])
    """

    noise: bool = False
    decay: float = 0.95
    ridge: float = 1e-3
    _memories: dict[_Key, DecayedSums] = field(default_factory=dict, init=False, repr=False, compare=False)
    _solutions: dict[_Key, tuple[Sums, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.noise, bool):
            raise ConfigurationError(f"Surrogate(noise={self.noise!r}) cannot work: noise must be true or false.")
        require(is_number(self.decay) and 0 <= self.decay < 1, self, "decay", "a number of at least 0 and below 1")
        require(is_number(self.ridge) and self.ridge > 0, self, "ridge", "a number above 0")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        inputs = _inputs(signal, context.received)
        if inputs is None:
            return signal.clone()
        past = self._learn(signal, inputs, context)
        if past is None:
            return signal.clone()
        honest = widened(signal)
        prediction = (inputs @ self._solution(past, context)).reshape(by_channel(signal).shape)
        prediction = prediction.movedim(-1, channel_axis(signal)).to(honest.dtype)
        # Nothing was learned if all steps so far overflowed.
        sent = torch.where(past[0][-1, -1] > 0, prediction, honest)
        if self.noise:
            std, _ = channel_statistics(honest - sent)
            sent = sent + gaussian_like(honest, context.generator) * std
        return sent.to(signal.dtype)

    def observe(self, signal: Tensor, context: AttackContext) -> None:
        """Learns from a signal that is sent honestly, so that the attack can start at full strength."""
        inputs = _inputs(signal, context.received)
        if inputs is not None:
            self._learn(signal, inputs, context)

    def _learn(self, signal: Tensor, inputs: Tensor, context: AttackContext) -> Sums | None:
        outputs = by_channel(signal.detach()).reshape(inputs.shape[0], -1).double()
        memory = self._memories.setdefault((context.worker, context.direction), DecayedSums(self.decay))
        past = memory.before(context.step, kind=(inputs.shape[1], outputs.shape[1], inputs.device))
        memory.add(context.micro_batch, (inputs.T @ inputs, inputs.T @ outputs))
        return past

    def _solution(self, past: Sums, context: AttackContext) -> Tensor:
        key = (context.worker, context.direction)
        # Once a step: the sums stay the same object until the next.
        if key not in self._solutions or self._solutions[key][0] is not past:
            self._solutions[key] = (past, _ridge_regression(past, self.ridge))
        return self._solutions[key][1]


def _inputs(signal: Tensor, received: Tensor | None) -> Tensor | None:
    """``(positions, C + 1)``: the received signal and a one, in double; ``None`` if it does not have a vector for each position."""
    if received is None or not received.is_floating_point() or received.ndim != signal.ndim or received.device != signal.device:
        return None
    channels = by_channel(received.detach())
    if channels.shape[:-1] != by_channel(signal).shape[:-1]:
        return None
    return torch.nn.functional.pad(channels.reshape(-1, channels.shape[-1]).double(), (0, 1), value=1.0)


def _ridge_regression(past: Sums, ridge: float) -> Tensor:
    """The transposed ``W`` of :class:`Surrogate`, from ``sum [x, 1][x, 1]^T`` and ``sum [x, 1] h^T``."""
    squares, products = past
    count = squares[-1, -1].clamp(min=1e-60)
    squares, products = squares / count, products / count
    penalty = ridge * squares.diagonal()[:-1].mean().expand(len(squares) - 1)
    # The constant goes without penalty; the least bit more keeps an input of zeros solvable.
    factor, _ = torch.linalg.cholesky_ex(squares + torch.nn.functional.pad(penalty, (0, 1)).add(1e-60).diag())
    return torch.cholesky_solve(products, factor)
