"""Comparison across replicas: what all workers of a stage do alike is the training, not an attack."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FEWEST_PEERS", "comparable", "less_median"]

FEWEST_PEERS = 4
"""Replicas that a median needs to say anything."""


def comparable(valid: Tensor, replicas: int, banned: Tensor) -> Tensor:
    """Whether the median of a boundary's valid signals is that of honest workers, ``(boundaries,)`` bool.

    Fewer than half of a stage's workers are malicious. Those that are banned are known; the others could all be among the senders
    that are left when earlier verdicts took honest ones out, so more than twice as many must be left.

    Args:
        valid: ``(boundaries, lanes, micro_batches)`` bool, signals that can be compared.
        replicas: of the mesh.
        banned: ``(boundaries,)``, banned workers of the sending stage.

    Example:
        >>> valid = torch.ones(1, 8, 2, dtype=torch.bool)
        >>> comparable(valid, 8, banned=torch.tensor([0])), comparable(valid[:, :6], 8, banned=torch.tensor([0]))
        (tensor([True]), tensor([False]))
    """
    lanes = valid.any(dim=2).sum(dim=1)
    malicious = ((replicas - 1) // 2 - banned).clamp(min=0)
    return (lanes >= FEWEST_PEERS) & (lanes > 2 * malicious)


def less_median(features: Tensor, valid: Tensor) -> Tensor:
    """Features less the median lane's of the step and boundary; ``(boundaries, lanes, micro_batches, F)``.

    Args:
        features: ``(boundaries, lanes, micro_batches, F)``.
        valid: ``(boundaries, lanes, micro_batches)`` bool.

    Example:
        >>> features = torch.tensor([1.0, 2.0, 9.0]).view(1, 3, 1, 1)
        >>> less_median(features, torch.ones(1, 3, 1, dtype=torch.bool)).flatten()
        tensor([-1.,  0.,  7.])
    """
    usable = valid[..., None] & features.isfinite()
    # By lane first: one that could be verified more often than others must not outvote them.
    lanes = torch.where(usable, features, torch.nan).nanmedian(dim=2).values
    return features - lanes.nanmedian(dim=1).values[:, None, None].nan_to_num()
