"""Undoes a batch that liars took part in, so that it can be repeated without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_sentinel.pipeline.randomness import remember_generators

__all__ = ["Rewind"]


class Rewind:
    """Remembers gradients, buffers and random number generators as they are now, and restores them when it is called, once.

    Weights need no copy: the optimizer steps only after the verdict. Gradients are copied only where there are any: when several
    batches are accumulated into one step.

    Args:
        parameters: the parameters whose gradients are restored.
        buffers: tensors that a forward pass may change, such as the statistics of a BatchNorm.
        device: where the computation draws random numbers.
        undo_steps: undoes what the user's steps have changed.

    Example:
        >>> rewind = Rewind([], [], torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> rewind()
        >>> bool(first == torch.rand(1))
        True
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[Tensor],
        device: torch.device,
        undo_steps: Callable[[], None] = lambda: None,
    ) -> None:
        self._parameters = list(parameters)
        self._gradients: list[Tensor | None] = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._draw_again = remember_generators(device)
        self._undo_steps = undo_steps

    def __call__(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients):
            parameter.grad = gradient
        for buffer, before in self._buffers:
            # By its data, which autograd does not count as a change: a backward pass that is yet to come may need the same values.
            buffer.data.copy_(before)
        self._draw_again()
        self._undo_steps()
