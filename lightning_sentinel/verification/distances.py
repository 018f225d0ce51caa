"""The four distances of the published method (SENTINEL, arXiv 2603.03592): a signal against its momentum.

All take batch means of signals, ``(..., T, C)`` in float32, and the momentum ``(T, C)``, and return ``(...)`` on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_absolute_difference", "normalised_euclidean", "sign_flip_ratio", "sliced_wasserstein"]

_TINY = 1e-12


def mean_absolute_difference(mean: Tensor, momentum: Tensor) -> Tensor:
    """L1: mean over positions and channels of ``|h - m|``.

    Example:
        >>> import torch
        >>> mean_absolute_difference(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item()
        1.5
    """
    return (mean - momentum).abs().mean(dim=(-2, -1))


def normalised_euclidean(mean: Tensor, momentum: Tensor) -> Tensor:
    """L2: ``||h - m|| / ||m||``.

    Example:
        >>> import torch
        >>> normalised_euclidean(torch.tensor([[3.0, 8.0]]), torch.tensor([[3.0, 4.0]])).item()
        0.800000011920929
    """
    return torch.linalg.vector_norm(mean - momentum, dim=(-2, -1)) / (torch.linalg.vector_norm(momentum) + _TINY)


def sign_flip_ratio(mean: Tensor, momentum: Tensor) -> Tensor:
    """SFR: share of elements whose sign differs from the momentum's.

    Example:
        >>> import torch
        >>> sign_flip_ratio(torch.tensor([[1.0, -2.0]]), torch.tensor([[5.0, 4.0]])).item()
        0.5
    """
    return (mean.signbit() != momentum.signbit()).float().mean(dim=(-2, -1))


def sliced_wasserstein(mean: Tensor, momentum: Tensor, directions: Tensor) -> Tensor:
    """SW: first Wasserstein distance of the two clouds of ``T`` points in ``C`` dimensions, averaged over directions.

    In one dimension the distance of two samples of equal size is the mean difference of their sorted values.

    Args:
        mean: ``(..., T, C)``.
        momentum: ``(T, C)``.
        directions: ``(C, K)``, unit columns; see :func:`lightning_sentinel.verification.projection.unit_directions`.

    Example:
        >>> import torch
        >>> cloud, shifted = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])
        >>> sliced_wasserstein(cloud, shifted, torch.ones(1, 1)).item()
        2.0
    """
    ordered, ordered_momentum = ((cloud @ directions).sort(dim=-2).values for cloud in (mean, momentum))
    return (ordered - ordered_momentum).abs().mean(dim=(-2, -1))
