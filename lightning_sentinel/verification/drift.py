"""Cumulative sums: what is never far out, but always on the same side."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.verification.fences import MAD_OF_A_NORMAL

__all__ = ["ALARM", "ALARM_WITHOUT_AUDITS", "Cusum"]

ALARM = 10.0
"""Where an audit is called for."""
ALARM_WITHOUT_AUDITS = 16.0
"""Where a worker is a suspect, if nothing can be recomputed."""
DOUBT = 8.0
"""Where a worker may be the reason for what is slightly odd behind it; hardly any honest worker gets there."""
_HIGHEST = 18.0
"""Who is in line again falls below the alarm in less steps than it takes to be banned."""
_SLACK = 0.75
_CLIP = 2.5


class Cusum:
    """Two-sided CUSUM of every sender and feature (Page 1954): ``S <- max(0, S + z - slack)``, and the same of ``-z``.

    ``z`` is the sum of a step's standard scores of a worker, each clipped to 2.5 because some features have long tails, over the
    root of their number; less its median over workers and, where it is more than one, over their normalised median absolute
    deviation: a distribution that widens or leans to one side everywhere is the training, not a worker. The slack is 0.75. Sums
    belong to workers, whichever lanes they serve.

    Args:
        boundaries: how many.
        workers: senders of each.
        features: how many.

    Example:
        >>> cusum, everything = Cusum(boundaries=1, workers=3, features=1), torch.ones(1, 3, 1, dtype=torch.bool)
        >>> for _ in range(4):
        ...     cusum.add(torch.tensor([2.0, 0.0, 0.0]).view(1, 3, 1, 1), everything, torch.arange(3)[None])
        >>> cusum.height
        tensor([[5., 0., 0.]])
    """

    def __init__(self, boundaries: int, workers: int, features: int) -> None:
        self.sums = torch.zeros(2, boundaries, workers, features)

    def add(self, scores: Tensor, valid: Tensor, senders: Tensor) -> None:
        """Enter a step.

        Args:
            scores: ``(boundaries, lanes, micro_batches, F)``, standard scores.
            valid: ``(boundaries, lanes, micro_batches)`` bool.
            senders: ``(boundaries, lanes)``, the worker that serves a lane.
        """
        clipped = scores.nan_to_num(_CLIP, _CLIP, -_CLIP).clamp(-_CLIP, _CLIP)
        total = self._of_workers(torch.where(valid[..., None], clipped, 0.0).sum(dim=2), senders)
        count = self._of_workers(valid[..., None].to(total.dtype).sum(dim=2), senders)
        z = _among_workers(total / count.clamp(min=1).sqrt())
        grown = (self.sums + torch.stack((z, -z)) - _SLACK).clamp(0, _HIGHEST)
        self.sums = torch.where(count > 0, grown, self.sums)

    def _of_workers(self, lanes: Tensor, senders: Tensor) -> Tensor:
        """Sums over the lanes of each worker: ``(boundaries, lanes, F)`` to ``(boundaries, workers, F)``."""
        empty = lanes.new_zeros(lanes.shape[0], self.sums.shape[2], lanes.shape[2])
        return empty.scatter_add(1, senders[..., None].expand_as(lanes), lanes)

    @property
    def height(self) -> Tensor:
        """The highest sum of each worker, ``(boundaries, workers)``."""
        return self.sums.amax(dim=(0, 3))

    def reset(self, workers: Tensor) -> None:
        """Forget workers ``(boundaries, workers)`` bool."""
        self.sums = torch.where(workers[..., None], 0.0, self.sums)


def _among_workers(z: Tensor) -> Tensor:
    """``(boundaries, workers, F)``; who was not verified counts with the zero that is expected of it."""
    away = z - z.median(dim=1, keepdim=True).values
    deviation = away.abs().median(dim=1, keepdim=True).values / MAD_OF_A_NORMAL
    return away / deviation.clamp(min=1)
