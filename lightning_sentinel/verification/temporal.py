"""Temporal features: the mean of a signal against the momentum of its boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.verification.axes import pieces
from lightning_sentinel.verification.distances import (
    euclidean_size,
    mean_absolute_difference,
    normalised_euclidean,
    ordered_along,
    sign_flip_ratio,
    signs,
    sliced_wasserstein,
)

__all__ = ["Anchor", "published_distances", "temporal_features"]

_TINY = 1e-12


@dataclass(frozen=True)
class Anchor:
    """A momentum with all precomputed values that distances from it need.

    The momentum changes once a step, and many signals are compared with it in between.

    Args:
        momentum: ``(T, C)``.
        size: 0-dim, :func:`~lightning_sentinel.verification.distances.euclidean_size`.
        directions: ``(C, K)``, secret unit directions.
        ordered: ``(T, K)``, the momentum along them, sorted along each.
        channels: ``(C,)``, its mean over positions.
        channel_size: 0-dim, :func:`~lightning_sentinel.verification.distances.euclidean_size` of ``channels``.
        ordered_channels: ``(C,)``, ``channels`` sorted.
    """

    momentum: Tensor
    size: Tensor
    directions: Tensor
    ordered: Tensor
    channels: Tensor
    channel_size: Tensor
    ordered_channels: Tensor

    @classmethod
    def of(cls, momentum: Tensor, directions: Tensor) -> Anchor:
        """Precompute from a momentum ``(T, C)`` and unit directions ``(C, K)``."""
        channels = momentum.mean(dim=0)
        return cls(
            momentum,
            euclidean_size(momentum),
            directions,
            ordered_along(momentum, directions),
            channels,
            euclidean_size(channels),
            channels.sort().values,
        )

    def shared(self, means: Tensor) -> Tensor:
        """The means ``(..., T', C)`` at the positions that the momentum has as well."""
        return means[..., : len(self.momentum), :] if means.shape[-2] > len(self.momentum) else means


def published_distances(means: Tensor, anchor: Anchor) -> Tensor:
    """The four distances of the published method as they are, ``(S, 4)``.

    Where a signal has more positions than the momentum (variable sequence lengths), the shared ones count; where it has fewer, the
    anchor must have as few.

    Args:
        means: ``(S, T', C)``, means of signals over their samples.
        anchor: of the momentum.

    Example:
        >>> import torch
        >>> from lightning_sentinel.verification.projection import unit_directions
        >>> published_distances(torch.ones(1, 4, 8), Anchor.of(torch.ones(4, 8), unit_directions(8, 2, seed=0)))
        tensor([[0., 0., 0., 0.]])
    """
    return torch.stack(_published(anchor.shared(means), anchor), dim=-1)


def temporal_features(means: Tensor, anchor: Anchor) -> Tensor:
    """The features of the family ``temporal``, ``(S, 6)``; arguments as for :func:`published_distances`.

    Example:
        >>> import torch
        >>> from lightning_sentinel.verification.projection import unit_directions
        >>> temporal_features(torch.full((1, 4, 8), 2.0), Anchor.of(torch.ones(4, 8), unit_directions(8, 2, seed=0)))[0, :3]
        tensor([0., 0., 0.])
    """
    means = anchor.shared(means)
    l1, l2, flips, wasserstein = _published(means, anchor)
    channels = means.mean(dim=-2, keepdim=True)
    channel_l2 = normalised_euclidean(channels, anchor.channels, anchor.channel_size)
    channel_wasserstein = mean_absolute_difference(channels.sort(dim=-1).values, anchor.ordered_channels)
    features = (torch.stack((l1, l2, flips, wasserstein, channel_l2, channel_wasserstein)) + _TINY).log()
    features[2] = flips  # A share has bounds of its own.
    return features.T


def _published(means: Tensor, anchor: Anchor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = means.shape[-2]
    l1 = []
    l2 = []
    flips = []
    for piece in pieces(positions, means.numel()):
        some = means[..., piece, :]
        momentum = anchor.momentum[piece]
        share = len(momentum) / positions
        l1.append(share * mean_absolute_difference(some, momentum))
        l2.append(normalised_euclidean(some, momentum, anchor.size))
        flips.append(share * sign_flip_ratio(some, signs(momentum)))
    return (
        torch.stack(l1).sum(dim=0),
        torch.linalg.vector_norm(torch.stack(l2), dim=0),
        torch.stack(flips).sum(dim=0),
        sliced_wasserstein(means, anchor.directions, anchor.ordered),
    )
