"""Sketches of weight gradients: a few dozen numbers that tell how long a gradient is, and how far apart two of them are.

A gradient is as large as its stage, so workers exchange projections of it along random directions from a secret seed. A worker
that knows the directions can add anything that they do not see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sentinel.seeds import derive_seed

__all__ = ["SKETCHED", "GradientSketch", "sketch_error"]

_SIDE = 12
SKETCHED = _SIDE * _SIDE
"""Numbers in a sketch."""


class GradientSketch:
    """Projects the gradients of a stage: the sum of ``R G C`` over its parameters, each as a matrix ``G``, with random signs.

    ``R`` is ``(12, rows)`` and ``C`` is ``(columns, 12)``, in units of ``12 ** -0.5``, so that a sketch is as long as the gradient
    in the root mean square over seeds, and the difference of two sketches as long as that of the gradients. It is linear, takes two
    thin matrix products a parameter, and needs memory for rows and columns, not for their product. Signs are drawn on the CPU and
    kept on the device, so that workers on different devices project along the same directions.

    Args:
        seed: secret.

    Example:
        >>> gradient = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        >>> sketch = GradientSketch(seed=0)
        >>> one, twice = sketch([gradient, None]), sketch([2 * gradient, None])
        >>> one.shape, bool(torch.allclose(twice, 2 * one)), round(float(one.norm() / gradient.norm()), 1)
        (torch.Size([144]), True, 1.1)
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._signs: dict[tuple[int, str, int, torch.device], Tensor] = {}

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None], device: torch.device | str = "cpu") -> Tensor:
        """The sketch ``(SKETCHED,)`` float32, on the device, for which the host does not wait.

        Args:
            gradients: of a stage's parameters, always in the same order; ``None`` counts as zero.
            device: where gradients are, if all are ``None``.
        """
        total = torch.zeros(_SIDE, _SIDE, device=device)
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                matrix = gradient.detach().reshape(_as_matrix(gradient.shape)).float()
                rows, columns = matrix.shape
                total += self._drawn(number, "rows", rows, matrix) @ matrix @ self._drawn(number, "columns", columns, matrix).T
        return total.flatten() / _SIDE

    def _drawn(self, number: int, axis: str, length: int, like: Tensor) -> Tensor:
        """Signs ``(12, length)`` of one axis of a parameter."""
        key = number, axis, length, like.device
        if key not in self._signs:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, axis, number))
            signs = torch.randint(0, 2, (_SIDE, length), generator=generator, dtype=torch.int8)
            self._signs[key] = (2 * signs - 1).to(like.device, like.dtype)
        return self._signs[key]


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of a parameter as a matrix, cut where rows and columns together are fewest.

    Example:
        >>> _as_matrix((256, 128, 3, 3)), _as_matrix((7,)), _as_matrix(())
        ((256, 1152), (1, 7), (1, 1))
    """
    sizes = torch.Size(shape)
    cuts = [(sizes[:cut].numel(), sizes[cut:].numel()) for cut in range(len(sizes) + 1)]
    return min(cuts, key=sum)


def sketch_error(claimed: Tensor, recomputed: Tensor) -> Tensor:
    """How far claimed gradients are from recomputed ones, relative to these, by their sketches ``(..., SKETCHED)``.

    0 if both are the same, or both are not finite; infinite if only one of them is, or only the recomputed one is zero.

    Example:
        >>> sketch_error(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0]))
        tensor(0.8000, dtype=torch.float64)
    """
    claimed, recomputed = claimed.double(), recomputed.double()
    known = recomputed.isfinite().all(dim=-1)
    same = (claimed == recomputed).all(dim=-1) | ~known & ~claimed.isfinite().all(dim=-1)
    error = (claimed - recomputed).norm(dim=-1) / recomputed.norm(dim=-1)
    return torch.where(same, 0.0, error.nan_to_num(torch.inf, torch.inf))
