"""Cumulative sums: find workers that are never far out, but always on the same side."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.verification.fences import MAD_OF_A_NORMAL
from lightning_sentinel.verification.medians import median

__all__ = ["ALARM", "ALARM_WITHOUT_AUDITS", "Cusum"]

ALARM = 10.0
"""Height above which a worker is audited."""
ALARM_WITHOUT_AUDITS = 16.0
"""Height above which a worker is a suspect, if nothing can be recomputed."""
DOUBT = 8.0
"""Height above which a worker may cause slight deviations behind it; hardly any honest worker gets there."""
_HIGHEST = 18.0
"""A worker that is in line again falls from here below the alarm in fewer steps than a ban takes."""
_SLACK = 0.75
_SLACK_OUTSIDE = 0.6
"""The distance to an interval is slack by itself."""
_CLIP = 2.5


class Cusum:
    """Two-sided CUSUM of every sender and feature (Page 1954): ``S <- max(0, S + z - slack)``, and the same of ``-z``.

    ``z`` is the sum of a worker's standard scores in a step, each clipped to 2.5 because some features have long tails, over the
    root of their number. Its median over workers is subtracted, and it is divided by their normalised median absolute deviation
    where that exceeds one: a distribution that widens or shifts for all workers is the training, not a worker. The slack is 0.75.
    Sums belong to workers, whichever lanes they serve.

    A minority can move the median, though not beyond honest workers: if it stays just below the others, the others drift upwards.
    So sums of a second kind take the distance to the *interval* in which the honest median lies whatever fewer than half of the
    workers do: with ``f`` liars among ``n`` workers, between the ``ceil((n - f) / 2)``-th lowest and highest. Sums of the first
    kind suffice to audit a worker and to doubt signals behind it; :data:`ALARM_WITHOUT_AUDITS` is for the second.

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
        """Sums of distances to the median; upwards, then downwards."""
        self.outside = torch.zeros_like(self.sums)
        """Sums of distances to the interval that a minority cannot move."""

    def add(self, scores: Tensor, valid: Tensor, senders: Tensor) -> None:
        """Add a step.

        Args:
            scores: ``(boundaries, lanes, micro_batches, F)``, standard scores.
            valid: ``(boundaries, lanes, micro_batches)`` bool.
            senders: ``(boundaries, lanes)``, the worker that serves a lane.
        """
        clipped = scores.nan_to_num(_CLIP, _CLIP, -_CLIP).clamp(-_CLIP, _CLIP)
        total = self._of_workers(torch.where(valid[..., None], clipped, 0.0).sum(dim=2), senders)
        count = self._of_workers(valid[..., None].to(total.dtype).sum(dim=2), senders)
        z = _among_workers(total / count.clamp(min=1).sqrt())
        outside = z - _where_the_median_is(z)
        self.sums = torch.where(count > 0, _grown(self.sums, z, _SLACK), self.sums)
        self.outside = torch.where(count > 0, _grown(self.outside, outside, _SLACK_OUTSIDE), self.outside)

    def _of_workers(self, lanes: Tensor, senders: Tensor) -> Tensor:
        """Sums over the lanes of each worker: ``(boundaries, lanes, F)`` to ``(boundaries, workers, F)``."""
        empty = lanes.new_zeros(lanes.shape[0], self.sums.shape[2], lanes.shape[2])
        return empty.scatter_add(1, senders[..., None].expand_as(lanes), lanes)

    @property
    def height(self) -> Tensor:
        """The highest sum of each worker, ``(boundaries, workers)``; only the second kind exceeds :data:`ALARM_WITHOUT_AUDITS`."""
        by_median = self.sums.amax(dim=(0, 3)).clamp(max=ALARM_WITHOUT_AUDITS)
        return torch.maximum(by_median, self.outside.amax(dim=(0, 3)))

    def reset(self, workers: Tensor) -> None:
        """Reset the sums of workers ``(boundaries, workers)`` bool."""
        self.sums, self.outside = (torch.where(workers[..., None], 0.0, sums) for sums in (self.sums, self.outside))


def _grown(sums: Tensor, z: Tensor, slack: float) -> Tensor:
    return (sums + torch.stack((z, -z)) - slack).clamp(0, _HIGHEST)


def _among_workers(z: Tensor) -> Tensor:
    """Relative to other workers, ``(boundaries, workers, F)``; an unverified worker counts as zero, the expected value."""
    away = z - median(z, dim=1)[:, None]
    deviation = median(away.abs(), dim=1)[:, None] / MAD_OF_A_NORMAL
    return away / deviation.clamp(min=1)


def _where_the_median_is(z: Tensor) -> Tensor:
    """Each value ``(boundaries, workers, F)`` clamped to the interval that a minority cannot move."""
    workers = z.shape[1]
    honest = workers - (workers - 1) // 2
    lowest = (honest + 1) // 2
    ordered = z.sort(dim=1).values
    return z.clamp(ordered[:, lowest - 1, None], ordered[:, workers - lowest, None])
