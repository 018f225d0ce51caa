"""The four distances of the published method (SENTINEL, arXiv 2603.03592): a signal against its momentum.

All take batch means of signals, ``(..., T, C)`` in float32, and return ``(...)`` on their device. Each takes precomputed values of
the momentum ``(T, C)``, which are the same for all signals of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "euclidean_size",
    "mean_absolute_difference",
    "normalised_euclidean",
    "ordered_along",
    "sign_flip_ratio",
    "signs",
    "sliced_wasserstein",
]

_TINY = 1e-12


def mean_absolute_difference(mean: Tensor, momentum: Tensor) -> Tensor:
    """L1: mean over positions and channels of ``|h - m|``.

    Example:
        >>> import torch
        >>> mean_absolute_difference(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item()
        1.5
    """
    return (mean - momentum).abs().mean(dim=(-2, -1))


def normalised_euclidean(mean: Tensor, momentum: Tensor, momentum_size: Tensor) -> Tensor:
    """L2: ``||h - m|| / ||m||``.

    Args:
        mean: ``(..., T, C)``.
        momentum: ``(T, C)``.
        momentum_size: 0-dim, :func:`euclidean_size` of the momentum.

    Example:
        >>> import torch
        >>> momentum = torch.tensor([[3.0, 4.0]])
        >>> normalised_euclidean(torch.tensor([[3.0, 8.0]]), momentum, euclidean_size(momentum)).item()
        0.800000011920929
    """
    return torch.linalg.vector_norm(mean - momentum, dim=(-2, -1)) / momentum_size


def euclidean_size(momentum: Tensor) -> Tensor:
    """``||m||`` plus a tiny constant, so that it can be divided by."""
    return torch.linalg.vector_norm(momentum) + _TINY


def sign_flip_ratio(mean: Tensor, momentum_signs: Tensor) -> Tensor:
    """SFR: share of elements whose sign differs from the momentum's.

    Args:
        mean: ``(..., T, C)``.
        momentum_signs: ``(T, C)``, :func:`signs` of the momentum.

    Example:
        >>> import torch
        >>> sign_flip_ratio(torch.tensor([[1.0, -2.0]]), signs(torch.tensor([[5.0, 4.0]]))).item()
        0.5
    """
    # Products of signs, summed: several times faster than to compare sign bits and to count.
    agreement = torch.copysign(momentum_signs, mean).flatten(-2) @ momentum_signs.flatten()
    return 0.5 - agreement / (2 * momentum_signs.numel())


def signs(momentum: Tensor) -> Tensor:
    """1 or -1 of each element; zeros have signs, too."""
    return torch.ones_like(momentum).copysign(momentum)


def sliced_wasserstein(mean: Tensor, directions: Tensor, momentum_ordered: Tensor) -> Tensor:
    """SW: first Wasserstein distance of the two clouds of ``T`` points in ``C`` dimensions, averaged over directions.

    In one dimension the distance of two samples of equal size is the mean difference of their sorted values.

    Args:
        mean: ``(..., T, C)``.
        directions: ``(C, K)``, unit columns; see :func:`lightning_sentinel.verification.projection.unit_directions`.
        momentum_ordered: ``(T, K)``, the momentum :func:`ordered_along` the same directions.

    Example:
        >>> import torch
        >>> cloud, shifted, axis = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]), torch.ones(1, 1)
        >>> sliced_wasserstein(cloud, axis, ordered_along(shifted, axis)).item()
        2.0
    """
    return mean_absolute_difference(ordered_along(mean, directions), momentum_ordered)


def ordered_along(cloud: Tensor, directions: Tensor) -> Tensor:
    """The points of a cloud ``(..., T, C)`` along directions ``(C, K)``, sorted along each: ``(..., T, K)``."""
    return (cloud @ directions).sort(dim=-2).values
