"""What a backward pass adds to the gradients of a stage: nothing for what is left out, and whether all of it can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["broken", "changed", "dropped", "gradients_of"]


@contextmanager
def changed(parameters: Iterable[nn.Parameter], changes: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, what a backward pass adds to the gradients of parameters goes through all changes first, in order.

    Example:
        >>> weight = nn.Parameter(torch.tensor([2.0]))
        >>> with changed([weight], [dropped(torch.tensor(True))]):
        ...     (weight * torch.nan).sum().backward()
        >>> weight.grad
        tensor([0.])
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    handles = [parameter.register_hook(change) for change in changes for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropped(left_out: Tensor) -> Callable[[Tensor], Tensor]:
    """Lets nothing of a gradient through if ``left_out``, a 0-dim bool for which nobody waits.

    A gradient of zero is not enough: what a worker computed for itself may be anything, and zero times what is not finite is not a
    number.
    """
    return lambda gradient: torch.where(left_out, 0.0, gradient)


def broken(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Whether any value is not finite; 0-dim bool on ``device``, not waited for.

    Example:
        >>> float(broken([torch.ones(2), None, torch.tensor([1.0, torch.inf])], torch.device("cpu")))
        1.0
    """
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return torch.tensor(False, device=device)
    # The largest value, because squares of finite ones may overflow.
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(found, torch.inf)])
    return ~largest.isfinite().all()


def gradients_of(
    end: Tensor,
    inputs: Sequence[Tensor],
    gradient: Tensor | None,
    own: Callable[[Tensor], None] | None,
    others: Iterable[Tensor] = (),
) -> list[Tensor | None]:
    """The gradients of ``inputs``, which are added to nothing.

    Args:
        end: what to differentiate.
        inputs: in respect of what.
        gradient: of ``end``; ``None`` if it is a loss.
        own: a module's own ``backward``; ``None`` is torch's.
        others: what else a ``backward`` would add gradients to.

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
