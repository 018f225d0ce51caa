"""What a backward pass adds to a stage's gradients: zeros for a micro-batch that is left out; and a check that all are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Change", "broken", "changed", "dropped", "gradients_of", "trained"]


class Change(Protocol):
    """Takes the gradient of the parameter of that number, and returns another."""

    def __call__(self, gradient: Tensor, /, parameter: int) -> Tensor: ...


def trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of some parameters that are trained."""
    return [parameter for parameter in parameters if parameter.requires_grad]


@contextmanager
def changed(parameters: Iterable[nn.Parameter], changes: Sequence[Change]) -> Iterator[None]:
    """A context in which each gradient that a backward pass adds to a parameter's goes through all changes first, in order.

    Parameters that are not trained are left out, and do not count.

    Example:
        >>> weight = nn.Parameter(torch.tensor([2.0]))
        >>> with changed([weight], [dropped(torch.tensor(True))]):
        ...     (weight * torch.nan).sum().backward()
        >>> weight.grad
        tensor([0.])
    """
    parameters = trained(parameters)
    handles = [
        parameter.register_hook(partial(change, parameter=number))
        for change in changes
        for number, parameter in enumerate(parameters)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropped(left_out: Tensor) -> Change:
    """A change that replaces a gradient by zeros if ``left_out``, a 0-dim bool for which the host does not wait.

    To start the backward pass from zeros is not enough: a worker's own activations may be anything, and zero times a non-finite
    value is NaN.
    """
    return lambda gradient, parameter: torch.where(left_out, 0.0, gradient)


def broken(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Whether any value is not finite: a 0-dim bool on ``device``, for which the host does not wait.

    Example:
        >>> float(broken([torch.ones(2), None, torch.tensor([1.0, torch.inf])], torch.device("cpu")))
        1.0
    """
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return torch.tensor(False, device=device)
    # The infinity norm, because squares of finite values may overflow.
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(found, torch.inf)])
    return ~largest.isfinite().all()


def gradients_of(
    end: Tensor,
    inputs: Sequence[Tensor],
    gradient: Tensor | None,
    own: Callable[[Tensor], None] | None,
    others: Iterable[Tensor] = (),
) -> list[Tensor | None]:
    """The gradients with respect to ``inputs``; no ``grad`` attribute changes.

    Args:
        end: the tensor to differentiate.
        inputs: the tensors to differentiate it by.
        gradient: the gradient of ``end``; ``None`` if ``end`` is a loss.
        own: a module's own ``backward``; ``None`` is torch's.
        others: further tensors that ``own`` adds gradients to.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradients_of(x.sum(), [x], None, None), gradients_of(x.sum(), [x], None, lambda loss: (2 * loss).backward())
        ([tensor([1., 1.])], [tensor([2., 2.])])
        >>> x.grad is None
        True
    """
    if own is None:
        return list(torch.autograd.grad(end, inputs, gradient, allow_unused=True))
    held = {id(tensor): (tensor, tensor.grad) for tensor in (*inputs, *others)}
    for tensor, _ in held.values():
        tensor.grad = None
    own(end)
    found = [tensor.grad for tensor in inputs]
    for tensor, before in held.values():
        tensor.grad = before
    return found
