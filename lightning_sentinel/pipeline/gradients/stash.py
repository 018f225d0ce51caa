"""Keeps gradients from the schedule, which computes them in ``training_step``, for Lightning's loop, which expects them later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["GradientStash", "scale_gradients"]


class GradientStash:
    """Puts the gradients of parameters aside and back.

    Lightning zeroes gradients after ``training_step``, in which the schedule runs its backward passes, and looks for them after
    ``backward``.

    Args:
        parameters: the parameters whose gradients it keeps.

    Example:
        >>> import torch
        >>> parameter = torch.nn.Parameter(torch.ones(1))
        >>> parameter.grad = torch.ones(1)
        >>> held = GradientStash([parameter])
        >>> held.hold()
        >>> parameter.grad is None
        True
        >>> held.release()
        >>> parameter.grad
        tensor([1.])
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._stash: list[Tensor | None] | None = None

    def hold(self) -> None:
        self._stash = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None

    def release(self) -> None:
        if self._stash is not None:
            for parameter, gradient in zip(self._parameters, self._stash):
                parameter.grad = gradient
            self._stash = None


def scale_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply all existing gradients by a factor; a factor of exactly 1 leaves them unchanged bit for bit."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)
