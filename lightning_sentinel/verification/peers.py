"""Comparison across replicas: what all workers of a stage do alike is the training, not an attack."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FEWEST_PEERS", "comparable", "median_vote", "of_workers"]

FEWEST_PEERS = 4
"""Workers that a median needs to say anything."""


def comparable(voting: Tensor, banned: Tensor) -> Tensor:
    """Whether the median of a stage's workers is that of honest ones, ``(boundaries,)`` bool.

    Fewer than half of a stage's workers are malicious. Those that are banned are known; all others could be among those that vote,
    so more than twice as many must vote.

    Args:
        voting: ``(boundaries, workers)`` bool, of whom it is known what they send.
        banned: ``(boundaries, workers)`` bool.

    Example:
        >>> everybody, nobody = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8, dtype=torch.bool)
        >>> comparable(everybody, nobody), comparable(everybody & (torch.arange(8) < 6), nobody)
        (tensor([True]), tensor([False]))
    """
    votes = (voting & ~banned).sum(dim=1)
    malicious = ((voting.shape[1] - 1) // 2 - banned.sum(dim=1)).clamp(min=0)
    return (votes >= FEWEST_PEERS) & (votes > 2 * malicious)


def of_workers(features: Tensor, valid: Tensor, senders: Tensor) -> Tensor:
    """What each worker sent, ``(boundaries, workers, F)``: the mean of its lanes' medians; NaN where nothing of it is valid.

    By worker, so that one that could be verified more often than others does not outvote them.

    Args:
        features: ``(boundaries, lanes, micro_batches, F)``.
        valid: ``(boundaries, lanes, micro_batches)`` bool.
        senders: ``(boundaries, lanes)``, the worker that serves a lane; there are as many workers as lanes.

    Example:
        >>> features = torch.tensor([1.0, 2.0, 9.0]).view(1, 3, 1, 1)
        >>> of_workers(features, torch.ones(1, 3, 1, dtype=torch.bool), torch.tensor([[0, 2, 2]])).flatten()
        tensor([1.0000,    nan, 5.5000])
    """
    usable = valid[..., None] & features.isfinite()
    lanes = torch.where(usable, features, torch.nan).nanmedian(dim=2).values
    known, index = ~lanes.isnan(), senders[..., None].expand_as(lanes)
    total = torch.zeros_like(lanes).scatter_add(1, index, lanes.nan_to_num())
    return total / torch.zeros_like(lanes).scatter_add(1, index, known.to(lanes.dtype))


def median_vote(votes: Tensor) -> Tensor:
    """The median over workers, ``(boundaries, F)``; of an even number the lower of the two in the middle, NaN where nobody votes.

    Args:
        votes: ``(boundaries, workers, F)``; NaN does not vote.

    Example:
        >>> median_vote(torch.tensor([9.0, torch.nan, 1.0, 2.0]).view(1, 4, 1))
        tensor([[2.]])
    """
    return votes.nanmedian(dim=1).values
