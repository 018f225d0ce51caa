"""Usual features of each worker: one that works on other data than the rest deviates always, and that is no drift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.medians import median

__all__ = ["Usual"]

_STANDARD_ERRORS = 2.0
"""A smaller deviation may be chance, and is not taken for a habit."""


@dataclass
class Usual:
    """Mean and standard deviation of each worker's features in the warm-up.

    Args:
        mean: ``(boundaries, workers, F)``: that of all, but shifted for workers that are further from it than by chance.
        sigma: ``(boundaries, workers, F)``: that of all around their own means, larger for workers that spread more. Infinite
            before anything is known.
    """

    mean: Tensor
    sigma: Tensor

    @classmethod
    def open(cls, boundaries: int, workers: int, features: int) -> Usual:
        shape = boundaries, workers, features
        return cls(torch.zeros(shape), torch.full(shape, torch.inf))

    @classmethod
    def of(cls, values: Tensor, senders: Tensor, fences: Fences, resolution: Tensor, workers: int) -> Usual:
        """Estimate from a window's values.

        Args:
            values: ``(boundaries, W, F)``; NaN in empty slots.
            senders: ``(boundaries, W)``, the workers that sent them; negative in empty slots.
            fences: ``(boundaries, F)``, fitted to the values.
            resolution: ``(boundaries, F)``, smaller differences are not significant.
            workers: how many.
        """
        known = senders >= 0
        filled = values.nan_to_num(0.0)
        places = senders.clamp(min=0)[..., None].expand_as(values)
        empty = values.new_zeros(values.shape[0], workers, values.shape[2])

        def summed(what: Tensor) -> Tensor:
            return empty.scatter_add(1, places, torch.where(known[..., None], what, 0.0))

        count = summed(torch.ones_like(values))
        own = torch.where(count > 0, summed(filled) / count, torch.nan)
        centre = median(own, dim=1)[:, None]
        chance = _STANDARD_ERRORS * fences.sigma[:, None] / count.sqrt()
        away = own - centre
        habit = torch.where(count > 0, away.sign() * (away.abs() - chance).clamp(min=0), 0.0)
        mean = (fences.mean[:, None] + habit).nan_to_num(0.0)
        residual = (filled - mean.gather(1, places)).square()
        squares = summed(residual)
        # Pooled over workers, but each around its own mean; no larger than around a common one.
        together = (squares.sum(dim=1) / count.sum(dim=1).clamp(min=1)).sqrt()
        sigma = torch.minimum(torch.maximum(together, resolution), fences.sigma)[:, None]
        spread = (squares / count.clamp(min=1)).sqrt() / sigma / (1 + _STANDARD_ERRORS / (2 * count.clamp(min=1)).sqrt())
        sigma = sigma * torch.where(count > 0, spread.nan_to_num(1.0), 1.0).clamp(min=1)
        sigma = torch.where(fences.sigma.isfinite()[:, None], sigma, torch.inf)
        return cls(mean, sigma)

    def where(self, condition: Tensor, other: Usual) -> Usual:
        """This where ``condition`` ``(boundaries,)`` bool is true, else ``other``."""
        chosen = condition[:, None, None]
        return Usual(torch.where(chosen, self.mean, other.mean), torch.where(chosen, self.sigma, other.sigma))

    def by_lane(self, senders: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each lane's worker, ``(boundaries, lanes, F)``; ``senders`` is ``(boundaries, lanes)``."""
        places = senders[..., None].expand(*senders.shape, self.mean.shape[2])
        return self.mean.gather(1, places), self.sigma.gather(1, places)
