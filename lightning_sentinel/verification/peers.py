"""Comparison across replicas: a change that all workers of a stage share is the training, not an attack."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.table import MAX_SCORE

__all__ = ["FEWEST_PEERS", "Comparison", "comparable", "compare", "median_vote", "of_workers"]

FEWEST_PEERS = 4
"""Workers that a meaningful median needs, banned workers included: they are known to be malicious."""
_FEWEST_VOTES = 3


def comparable(voting: Tensor, banned: Tensor) -> Tensor:
    """Whether the median of a stage's workers is that of honest workers, ``(boundaries,)`` bool.

    Fewer than half of a stage's workers are malicious. The banned ones are known; all others could be among the voters, so more
    than twice as many workers must vote.

    Args:
        voting: ``(boundaries, workers)`` bool, workers with known features.
        banned: ``(boundaries, workers)`` bool.

    Example:
        >>> everybody, nobody = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8, dtype=torch.bool)
        >>> comparable(everybody, nobody), comparable(everybody & (torch.arange(8) < 6), nobody)
        (tensor([True]), tensor([False]))
    """
    votes = (voting & ~banned).sum(dim=1)
    malicious = ((voting.shape[1] - 1) // 2 - banned.sum(dim=1)).clamp(min=0)
    known = votes + banned.sum(dim=1)
    return (known >= FEWEST_PEERS) & (votes >= _FEWEST_VOTES) & (votes > 2 * malicious)


def of_workers(features: Tensor, valid: Tensor, senders: Tensor) -> Tensor:
    """Features of each worker, ``(boundaries, workers, F)``: the median of its signals; NaN where none of them is valid.

    By worker, so that a worker that was verified more often than others does not outvote them.

    Args:
        features: ``(boundaries, lanes, micro_batches, F)``.
        valid: ``(boundaries, lanes, micro_batches)`` bool.
        senders: ``(boundaries, lanes)``, the worker that serves a lane; each serves one.

    Example:
        >>> features, valid = torch.tensor([1.0, 2.0, 9.0]).view(1, 3, 1, 1), torch.tensor([True, True, False])
        >>> of_workers(features, valid.view(1, 3, 1), torch.tensor([[0, 2, 1]])).flatten()
        tensor([1., nan, 2.])
    """
    usable = valid[..., None] & features.isfinite()
    lanes = median(torch.where(usable, features, torch.nan), dim=2)
    return torch.empty_like(lanes).scatter(1, senders[..., None].expand_as(lanes), lanes)


def median_vote(votes: Tensor) -> Tensor:
    """The median over workers, ``(boundaries, F)``; NaN where no worker votes.

    Args:
        votes: ``(boundaries, workers, F)``; NaN does not vote.

    Example:
        >>> median_vote(torch.tensor([9.0, torch.nan, 1.0, 2.0]).view(1, 4, 1))
        tensor([[2.]])
    """
    return median(votes, dim=1)


class Comparison(NamedTuple):
    """How the signals of a step compare with each other.

    Args:
        by_peers: ``(boundaries,)`` bool, whether the vote is that of honest workers.
        quorum: ``(boundaries,)`` bool, whether at least half of the votes are from this step.
        certain: ``(boundaries,)`` bool, whether the votes of this step suffice without remembered ones.
        score: ``(boundaries, lanes, micro_batches)``, 0 at the centre, 1 at the fence.
        worst: ``(boundaries, lanes, micro_batches)``, index of the feature that is furthest out.
        opinion: ``(boundaries, F)``, the median vote; NaN where no worker votes.
        centre: ``(boundaries, F)``, the median vote of this step's signals that are in line with ``opinion``.
    """

    by_peers: Tensor
    quorum: Tensor
    certain: Tensor
    score: Tensor
    worst: Tensor
    opinion: Tensor
    centre: Tensor

    @property
    def out(self) -> Tensor:
        """``(boundaries, lanes, micro_batches)`` bool, signals that are out of line for certain."""
        return (self.score > 1) & (self.by_peers & self.certain)[:, None, None]


def compare(features: Tensor, counted: Tensor, senders: Tensor, last: Tensor, banned: Tensor, fences: Fences) -> Comparison:
    """Compare the signals of a step with the median of their stage's workers.

    Args:
        features: ``(boundaries, lanes, micro_batches, F)``.
        counted: ``(boundaries, lanes, micro_batches)`` bool, signals that are evidence about their sender.
        senders: ``(boundaries, lanes)``, the worker that serves a lane.
        last: ``(boundaries, workers, F)``, remembered votes of workers without a counted signal now; NaN if there are none.
        banned: ``(boundaries, workers)`` bool.
        fences: ``(boundaries, F)``, around features less the median.
    """
    per_signal = Fences(*(part[:, None, None] for part in fences.parts()))
    sent = of_workers(features, counted, senders)
    votes = torch.where(sent.isnan(), last, sent)
    opinion = median_vote(votes)
    inside = per_signal.scores(features - opinion[:, None, None]).amax(dim=-1) <= 1
    # The median again over signals of this step, without outliers, which pull it to their side, and without remembered votes, which
    # the training leaves behind; unless most signals are outliers, which no attack can cause.
    kept = counted & inside
    most = 2 * kept.sum(dim=(1, 2)) > counted.sum(dim=(1, 2))
    centre = torch.where(most[:, None], median_vote(of_workers(features, kept, senders)), opinion)
    highest = per_signal.scores(features - centre.nan_to_num()[:, None, None]).max(dim=-1)
    present, voting = (~given.isnan().all(dim=2) for given in (sent, votes))
    return Comparison(
        by_peers=comparable(voting, banned),
        quorum=2 * present.sum(dim=1) >= voting.sum(dim=1),
        certain=comparable(present, banned),
        score=highest.values.clamp(max=MAX_SCORE),
        worst=highest.indices,
        opinion=opinion,
        centre=centre,
    )
