"""Cumulative sums: what is never far out, but always on the same side."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ALARM", "ALARM_WITHOUT_AUDITS", "Cusum"]

ALARM = 10.0
"""Where an audit is called for."""
ALARM_WITHOUT_AUDITS = 16.0
"""Where a worker is a suspect, if nothing can be recomputed."""
_SLACK = 0.75
_CLIP = 2.5


class Cusum:
    """Two-sided CUSUM of every sender and feature (Page 1954): ``S <- max(0, S + z - slack)``, and the same of ``-z``.

    ``z`` is the sum of a step's standard scores of a sender, each clipped to 2.5 because some features have long tails, over the root
    of their number; the slack is 0.75.

    Args:
        boundaries: how many.
        lanes: senders of each.
        features: how many.

    Example:
        >>> cusum = Cusum(boundaries=1, lanes=1, features=1)
        >>> for _ in range(4):
        ...     cusum.add(torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, dtype=torch.bool))
        >>> cusum.height
        tensor([[5.]])
    """

    def __init__(self, boundaries: int, lanes: int, features: int) -> None:
        self.sums = torch.zeros(2, boundaries, lanes, features)

    def add(self, scores: Tensor, valid: Tensor) -> None:
        """Enter a step.

        Args:
            scores: ``(boundaries, lanes, micro_batches, F)``, standard scores.
            valid: ``(boundaries, lanes, micro_batches)`` bool.
        """
        weights = valid[..., None].to(scores.dtype)
        count = weights.sum(dim=2)
        total = torch.where(valid[..., None], scores.nan_to_num(_CLIP, _CLIP, -_CLIP).clamp(-_CLIP, _CLIP), 0.0).sum(dim=2)
        z = total / count.clamp(min=1).sqrt()
        grown = (self.sums + torch.stack((z, -z)) - _SLACK).clamp(min=0)
        self.sums = torch.where(count > 0, grown, self.sums)

    @property
    def height(self) -> Tensor:
        """The highest sum of each sender, ``(boundaries, lanes)``."""
        return self.sums.amax(dim=(0, 3))

    def reset(self, senders: Tensor) -> None:
        """Forget senders ``(boundaries, lanes)`` bool: an audit has told what they are."""
        self.sums = torch.where(senders[..., None], 0.0, self.sums)
