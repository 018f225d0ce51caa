"""Valid values for the wrong samples: honest signals in another order, or those of another micro-batch.

Every statistic of a batch stays the same, so only features that relate a signal to its sample can show these attacks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.memory import History
from lightning_sentinel.attacks.signals import channel_axis

__all__ = ["Permute", "Swap"]


@dataclass
class Permute:
    """Sends the samples in another order: ``h'_b = h_p(b)`` (ours).

    ``p`` is drawn anew for each signal among the permutations that are a single cycle, so no sample stays where it
    was. With one sample only, the positions are permuted instead: axis 1 of (1, T, C), the rows of (1, C, H, W). A
    (1, F) signal has nothing to permute and is sent as it is.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> sent = attacks.Permute()(torch.arange(5.0), context)
        >>> sent.sort().values, bool((sent == torch.arange(5.0)).any())
        (tensor([0., 1., 2., 3., 4.]), False)
    """

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        axis = _first_to_permute(signal)
        # By sorting, since randperm may wait for the device.
        order = torch.rand(signal.shape[axis], generator=context.generator, device=signal.device).argsort()
        successor = torch.empty_like(order).scatter_(0, order, order.roll(-1))
        return signal.index_select(axis, successor)


def _first_to_permute(signal: Tensor) -> int:
    channel = channel_axis(signal) % signal.ndim
    axes = [axis for axis in range(1, signal.ndim) if axis != channel]
    return next((axis for axis in (0, *axes) if signal.shape[axis] > 1), 0)


@dataclass
class Swap:
    """Sends for each micro-batch the honest signal of the one before: ``h'(n) = h(n - 1)`` (ours).

    ``n`` counts the micro-batches that the worker computed in a direction, across steps. Every value is a fresh honest one and
    belongs to other samples, as if two colluding replicas exchanged their signals. The first micro-batch, and one whose shape
    differs from the one before, is sent as it is. At most one step and one signal are kept for each worker and direction; a step
    that is done again sends the same again.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> swap = attacks.Swap()
        >>> def send(step, micro_batch):
        ...     context = attacks.AttackContext.seeded(
        ...         0, Worker(1, 0), Direction.ACTIVATION, step=step, micro_batch=micro_batch
        ...     )
        ...     return swap(torch.tensor([10.0 * step + micro_batch]), context).item()
        >>> [send(step, micro_batch) for step in range(3) for micro_batch in range(2)]
        [0.0, 0.0, 1.0, 10.0, 11.0, 20.0]
    """

    _history: History = field(default_factory=History, init=False, repr=False, compare=False)

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return self._before(signal, context).clone()

    def observe(self, signal: Tensor, context: AttackContext) -> None:
        """Remembers a signal that is sent honestly, so that the attack can start at full strength."""
        self._before(signal, context)

    def _before(self, signal: Tensor, context: AttackContext) -> Tensor:
        return self._history.before((context.worker, context.direction), context.step, context.micro_batch, signal)
