"""Adaptive Tukey fences: the range in which honest values of a feature lie.

A fence stands ``k`` interquartile ranges outside the quartiles: ``Q3 + k IQR`` above and, if two-sided, ``Q1 - k IQR`` below
(Tukey 1977; SENTINEL, arXiv 2603.03592, uses the upper one). ``k`` is not a constant: it is set per feature and side so that
the share of honest values outside stays under the false-positive rate, which the features share equally.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fences", "fit_fences"]

_MARGIN = 1.1
_SMALLEST_K = 1.5
_TINY = 1e-12


@dataclass(frozen=True)
class Fences:
    """Lower and upper bound of each feature, with the centre that scores are measured from.

    Args:
        lower: ``(F,)``; ``-inf`` where there is no lower fence.
        centre: ``(F,)``, median of the honest values.
        upper: ``(F,)``; ``inf`` where there is no fence yet.
    """

    lower: Tensor
    centre: Tensor
    upper: Tensor

    @classmethod
    def open(cls, features: int, device: torch.device | str = "cpu") -> Fences:
        """Fences that nothing exceeds: before the end of the warm-up."""
        infinite = torch.full((features,), torch.inf, device=device)
        return cls(-infinite, torch.zeros(features, device=device), infinite)

    def to(self, device: torch.device | str) -> Fences:
        return Fences(*(bound.to(device, non_blocking=True) for bound in (self.lower, self.centre, self.upper)))

    def scores(self, features: Tensor) -> Tensor:
        """How far out each feature lies: 0 at the centre, 1 at the fence. A value that is not finite scores infinity.

        Args:
            features: ``(..., F)``.

        Returns:
            ``(..., F)``.

        Example:
            >>> import torch
            >>> fences = Fences(lower=torch.tensor([0.0]), centre=torch.tensor([2.0]), upper=torch.tensor([6.0]))
            >>> fences.scores(torch.tensor([[4.0], [0.0], [8.0]])).flatten()
            tensor([0.5000, 1.0000, 1.5000])
        """
        above = (features - self.centre) / (self.upper - self.centre + _TINY)
        below = (self.centre - features) / (self.centre - self.lower + _TINY)
        return torch.where(features.isfinite(), torch.maximum(above, below), torch.inf)


def fit_fences(values: Tensor, false_positive_rate: float, two_sided: bool) -> Fences:
    """Fences around honest values.

    ``k`` is the ``1 - rate / F`` quantile of the honest values' own exceedance, ``(x - Q3) / IQR``, times 1.1, and at least 1.5.
    With two sides each gets half of the rate.

    Args:
        values: ``(N, F)`` honest values, ``N >= 2``.
        false_positive_rate: share of honest signals that may be outside, over all features.
        two_sided: whether a value can also be too close to the momentum.

    Example:
        >>> import torch
        >>> fences = fit_fences(torch.arange(101.0).unsqueeze(1), false_positive_rate=0.01, two_sided=True)
        >>> fences.lower.item(), fences.centre.item(), fences.upper.item()
        (-50.0, 50.0, 150.0)
    """
    features = values.shape[1]
    lower_quartile, centre, upper_quartile = torch.quantile(values, values.new_tensor([0.25, 0.5, 0.75]), dim=0)
    spread = (upper_quartile - lower_quartile).clamp(min=_TINY)
    tail = 1 - false_positive_rate / features / (2 if two_sided else 1)

    def reach(exceedance: Tensor) -> Tensor:
        return (torch.quantile(exceedance / spread, tail, dim=0) * _MARGIN).clamp(min=_SMALLEST_K) * spread

    upper = upper_quartile + reach(values - upper_quartile)
    if not two_sided:
        return Fences(torch.full_like(upper, -torch.inf), centre, upper)
    return Fences(lower_quartile - reach(lower_quartile - values), centre, upper)
