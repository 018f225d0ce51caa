"""Attackers that know the tolerance of audits, and err by as much as it lets pass, always the same way.

What they add to a signal is scaled to just below what an audit of it would allow at that moment. They know how errors are measured,
but not the secret directions.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.benchmarks.detection.insiders import Insider, boundary_of
from lightning_sentinel.mesh import Direction, Worker
from lightning_sentinel.verification.audit import arithmetic, relative_error, tolerance
from lightning_sentinel.verification.axes import as_tokens
from lightning_sentinel.verification.tolerance import FLOOR

__all__ = ["STEERERS", "Steerer"]

_BELOW = 0.98
_MOMENTUM = 0.9
Tokens = Tensor
"""``(B, T, C)``."""


class Steerer(Insider):
    """Sends ``h' = h + s e``; ``e`` is that of its kind, and ``s`` such that an audit lets ``h'`` pass."""

    def __init__(self) -> None:
        super().__init__()
        self._received: dict[tuple[Worker, int], Tensor] = {}

    @abstractmethod
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        """What is added to a signal, of any size.

        Args:
            tokens: of the honest signal.
            activation: that the worker received for this micro-batch; if the signal is a gradient, it is that of this activation.
            context: where and when.
        """

    @override
    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        place = context.worker, context.micro_batch
        if context.direction is Direction.ACTIVATION and context.received is not None:
            self._received[place] = context.received
        error = self.error(as_tokens(signal), as_tokens(self._received[place]), context).reshape_as(signal)
        unit = relative_error(signal + error, signal)
        return signal + error * (_BELOW * self._allowed(signal, context) / unit) if unit > 0 else signal

    def _allowed(self, signal: Tensor, context: AttackContext) -> float:
        assert self.strategy is not None, "the run has begun"
        with self.strategy.precision_plugin.forward_context():
            computed_in = arithmetic(signal.device)
        guard = self.strategy._run.guard
        if guard is None:
            return FLOOR * tolerance(signal.dtype, computed_in)
        index = self.strategy.mesh.boundaries.index(boundary_of(context))
        return guard.tolerances.allowed(index, context.worker, signal.dtype, computed_in)


class OneDirection(Steerer):
    """The same vector for each token."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        return _drawn(context, tokens.shape[-1]).expand_as(tokens)


class SignalMap(Steerer):
    """A fixed rotation of the signal's tokens."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        return tokens @ _rotation(context, tokens.shape[-1])


class ActivationMap(Steerer):
    """A fixed rotation of the tokens of the activation, less their mean."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        return (activation - activation.mean(dim=(0, 1))) @ _rotation(context, tokens.shape[-1])


class LowRank(Steerer):
    """A fixed map of rank one of the signal's tokens."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        rotation = _rotation(context, tokens.shape[-1])
        return (tokens @ rotation[:, :1]) * rotation[1]


class AgainstTheMomentum(Steerer):
    """What moves the weights that made the activation against their gradients of late: ``e = -a M``, with ``M`` the moving average
    of ``a^T g``. Activations are honest."""

    def __init__(self) -> None:
        super().__init__()
        self._momentum: dict[Worker, Tensor] = {}

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        if context.direction is Direction.ACTIVATION:
            return torch.zeros_like(tokens)
        now = activation.flatten(0, 1).T @ tokens.flatten(0, 1)
        before = self._momentum.get(context.worker, now)
        self._momentum[context.worker] = torch.lerp(now, before, _MOMENTUM)
        return -activation @ self._momentum[context.worker]


class ByPosition(Steerer):
    """A fixed vector whose sign alternates from position to position."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        signs = (-1.0) ** torch.arange(tokens.shape[1])
        return (signs[:, None] * _drawn(context, tokens.shape[-1])).expand_as(tokens)


class OtherTokens(Steerer):
    """A fixed rotation of the token before, of the activation: no secret wave of a token shows it."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        before = (activation - activation.mean(dim=(0, 1))).roll(1, dims=1)
        return before @ _rotation(context, tokens.shape[-1])


class NoDirection(Steerer):
    """Noise, drawn anew each time: what errors of this size do to a training that steer nowhere."""

    @override
    def error(self, tokens: Tokens, activation: Tokens, context: AttackContext) -> Tokens:
        return torch.randn(tokens.shape, generator=context.generator)


def _drawn(context: AttackContext, *shape: int) -> Tensor:
    """The same for all malicious workers and steps, another for each direction and shape."""
    generator = torch.Generator().manual_seed(context.together().seed_for("steer", context.direction, *shape))
    return torch.randn(shape, generator=generator)


def _rotation(context: AttackContext, channels: int) -> Tensor:
    rotation: Tensor = torch.linalg.qr(_drawn(context, channels, channels)).Q
    return rotation


STEERERS: dict[str, type[Steerer]] = {
    "one direction": OneDirection,
    "map of the signal": SignalMap,
    "map of the activation": ActivationMap,
    "low rank": LowRank,
    "against the momentum": AgainstTheMomentum,
    "by position": ByPosition,
    "other tokens": OtherTokens,
    "no direction": NoDirection,
}
"""By name."""
