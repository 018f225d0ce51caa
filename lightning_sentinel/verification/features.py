"""What is measured on a signal: the features that the fences watch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.verification.distances import (
    mean_absolute_difference,
    normalised_euclidean,
    sign_flip_ratio,
    sliced_wasserstein,
)

_TINY = 1e-12

__all__ = ["FEATURES", "temporal_features"]

FEATURES = ("log_l1", "log_l2", "sign_flip_ratio", "log_sliced_wasserstein")
"""Names of the features, in the order in which :func:`temporal_features` returns them."""


def temporal_features(mean: Tensor, momentum: Tensor, directions: Tensor) -> Tensor:
    """The distances of a signal to its momentum, those without an upper bound as logarithms.

    A signal that is too close (zeros, shrunk or replayed values) lies a *factor* below the honest distances. On a linear scale the
    lower fence of a widely spread distance would be negative, and nothing could ever be below it.

    Where a signal has fewer positions than the momentum, or more (variable sequence lengths), the shared ones count.

    Args:
        mean: ``(..., T, C)``, batch means of signals.
        momentum: ``(T', C)``.
        directions: ``(C, K)``, secret unit directions.

    Returns:
        ``(..., len(FEATURES))``, float32.

    Example:
        >>> import torch
        >>> from lightning_sentinel.verification.distances import unit_directions
        >>> signal = torch.ones(4, 8)
        >>> temporal_features(signal, signal, unit_directions(8, 2, seed=0))
        tensor([-27.6310, -27.6310,   0.0000, -27.6310])
    """
    shared = min(mean.shape[-2], momentum.shape[0])
    mean, momentum = mean[..., :shared, :], momentum[:shared]
    return torch.stack(
        (
            (mean_absolute_difference(mean, momentum) + _TINY).log(),
            (normalised_euclidean(mean, momentum) + _TINY).log(),
            sign_flip_ratio(mean, momentum),
            (sliced_wasserstein(mean, momentum, directions) + _TINY).log(),
        ),
        dim=-1,
    )
