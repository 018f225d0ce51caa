"""Finds the matrix products of a worker's layers while they run, forward and backward, and says what each of them is for.

A dispatch mode sees every operator below autograd, whatever module or function called it, and nothing is patched. So a wrong result
is what the rest of the pass goes on with, and what autograd saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["KERNELS", "Phase", "Product", "Products"]

_ATEN = torch.ops.aten
_FACTORS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.baddbmm.default: (1, 2),
}
"""Operators that multiply matrices, and which of their arguments are the factors."""

KERNELS = tuple(operator.overloadpacket.__name__ for operator in _FACTORS)
"""Their names. Convolutions and fused attention are no matrix products in this sense."""

_MOST_VIEWS = 8
"""How many views and casts there may be between a parameter and a product."""


class Phase(Enum):
    """What a product is for."""

    FORWARD = "forward"
    """The layer's output; also where activation checkpointing computes it again."""
    BACKWARD_INPUT = "backward_input"
    """The gradient of its input."""
    BACKWARD_WEIGHT = "backward_weight"
    """The gradient of its weight."""


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product of a worker's layers.

    Args:
        kernel: one of :data:`KERNELS`.
        phase: what it is for.
        number: how many products of this phase the worker computed before it for the micro-batch.
        left: the first factor, ``(M, K)`` or ``(B, M, K)``.
        right: the second, ``(K, N)`` or ``(B, K, N)``.
        of: computes it again, of other factors of these shapes.
    """

    kernel: str
    phase: Phase
    number: int
    left: Tensor
    right: Tensor
    of: Callable[[Tensor, Tensor], Tensor]


@dataclass
class Products:
    """The matrix products of one micro-batch at one worker, from its forward to its backward pass.

    Whether a product of the backward pass is that of a weight's gradient is told by its factors: that of the input's gradient has
    the weight itself, or the cast of it that the forward pass used, and that of the weight's gradient has its shape.

    Example:
        >>> import torch
        >>> layer, found = torch.nn.Linear(4, 2), []
        >>> def look(result, product):
        ...     found.append((product.kernel, product.phase.value))
        ...     return result
        >>> products = Products()
        >>> with products.seen(look, backward=False):
        ...     output = layer(torch.ones(3, 4, requires_grad=True).clone())
        >>> with products.seen(look, backward=True):
        ...     output.sum().backward()
        >>> found
        [('addmm', 'forward'), ('mm', 'backward_input'), ('mm', 'backward_weight')]
    """

    _counts: Counter[Phase] = field(default_factory=Counter)
    _weights: set[int] = field(default_factory=set)
    """Addresses of the weights' storages, which live until the backward pass."""
    _shapes: set[tuple[int, ...]] = field(default_factory=set)
    """Shapes of the weights, and of what they look like transposed."""

    @contextmanager
    def seen(self, look: Callable[[Tensor, Product], Tensor], backward: bool) -> Iterator[None]:
        """A context in which ``look`` is given every product with its result, and returns what takes the result's place.

        Args:
            look: is itself not seen.
            backward: whether this is the backward pass.
        """
        with _Seen(self, look, backward):
            yield

    def describe(self, kernel: str, factors: Sequence[Tensor], of: Callable[[Tensor, Tensor], Tensor], backward: bool) -> Product:
        """The next product, by its place among those of its phase."""
        left, right = factors
        phase = self._phase(left, right, backward)
        number = self._counts[phase]
        self._counts[phase] += 1
        return Product(kernel, phase, number, left, right, of)

    def _phase(self, left: Tensor, right: Tensor, backward: bool) -> Phase:
        # A backward pass records no graph, except where it recomputes what was not kept.
        if not backward or torch.is_grad_enabled():
            for factor in (left, right):
                if _is_weight(factor):
                    self._weights.add(factor.untyped_storage().data_ptr())
                    self._shapes |= {tuple(factor.shape), tuple(factor.mT.shape)}
            return Phase.FORWARD
        if any(factor.untyped_storage().data_ptr() in self._weights for factor in (left, right)):
            return Phase.BACKWARD_INPUT
        result = (*left.shape[:-1], right.shape[-1])
        return Phase.BACKWARD_WEIGHT if result in self._shapes else Phase.BACKWARD_INPUT


def _is_weight(factor: Tensor) -> bool:
    """Whether a factor is a parameter, or a view or a cast of one."""
    if isinstance(factor, nn.Parameter) or isinstance(factor._base, nn.Parameter):
        return True
    node = factor.grad_fn
    for _ in range(_MOST_VIEWS):
        if node is None:
            return False
        if hasattr(node, "variable"):
            return isinstance(node.variable, nn.Parameter)
        if len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return False


class _Seen(TorchDispatchMode):
    """Gives the products of one pass to a function.

    Args:
        products: those of the micro-batch.
        look: see :meth:`Products.seen`.
        backward: whether this is the backward pass.
    """

    def __init__(self, products: Products, look: Callable[[Tensor, Product], Tensor], backward: bool) -> None:
        super().__init__()
        self._products = products
        self._look = look
        self._backward = backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        places = _FACTORS.get(func)
        if places is None:
            return result
        first, second = places

        def of(left: Tensor, right: Tensor) -> Tensor:
            others = list(args)
            others[first], others[second] = left, right
            return func(*others, **kwargs)

        factors = (args[first], args[second])
        return self._look(result, self._products.describe(func.overloadpacket.__name__, factors, of, self._backward))
