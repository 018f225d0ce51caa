"""Temporal features: the mean of a signal against the momentum of its boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.verification.distances import (
    mean_absolute_difference,
    normalised_euclidean,
    sign_flip_ratio,
    sliced_wasserstein,
)

__all__ = ["published_distances", "temporal_features"]

_TINY = 1e-12


def published_distances(means: Tensor, momentum: Tensor, slices: Tensor) -> Tensor:
    """The four distances of the published method as they are, ``(S, 4)``.

    Where a signal has fewer positions than the momentum, or more (variable sequence lengths), the shared ones count.

    Args:
        means: ``(S, T, C)``, means of signals over their samples.
        momentum: ``(T', C)``.
        slices: ``(C, K)``, secret unit directions.

    Example:
        >>> import torch
        >>> from lightning_sentinel.verification.projection import unit_directions
        >>> published_distances(torch.ones(1, 4, 8), torch.ones(4, 8), unit_directions(8, 2, seed=0))
        tensor([[0., 0., 0., 0.]])
    """
    means, momentum = _shared(means, momentum)
    return torch.stack(
        (
            mean_absolute_difference(means, momentum),
            normalised_euclidean(means, momentum),
            sign_flip_ratio(means, momentum),
            sliced_wasserstein(means, momentum, slices),
        ),
        dim=-1,
    )


def temporal_features(means: Tensor, momentum: Tensor, slices: Tensor) -> Tensor:
    """The features of the family ``temporal``, ``(S, 6)``; arguments as for :func:`published_distances`.

    Example:
        >>> import torch
        >>> from lightning_sentinel.verification.projection import unit_directions
        >>> temporal_features(torch.full((1, 4, 8), 2.0), torch.ones(4, 8), unit_directions(8, 2, seed=0))[0, :3]
        tensor([0., 0., 0.])
    """
    distances = published_distances(means, momentum, slices)
    means, momentum = _shared(means, momentum)
    channels, reference = means.mean(dim=-2), momentum.mean(dim=-2)
    unbounded = torch.stack(
        (
            distances[:, 0],
            distances[:, 1],
            distances[:, 3],
            normalised_euclidean(channels[:, None], reference[None]),
            (channels.sort(dim=-1).values - reference.sort().values).abs().mean(dim=-1),
        ),
        dim=-1,
    )
    logs = (unbounded + _TINY).log()
    return torch.cat((logs[:, :2], distances[:, 2:3], logs[:, 2:]), dim=-1)


def _shared(means: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    shared = min(means.shape[-2], momentum.shape[0])
    return means[..., :shared, :], momentum[:shared]
