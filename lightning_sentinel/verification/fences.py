"""Adaptive Tukey fences: the range in which honest values of a feature lie.

A fence stands ``k`` interquartile ranges outside the quartiles: ``Q3 + k IQR`` above and, if two-sided, ``Q1 - k IQR`` below
(Tukey 1977; SENTINEL, arXiv 2603.03592, uses the upper one). ``k`` is not a constant. It is first set per feature and side, where
an exponential tail fitted to the outer tenth of the honest values falls below a small share of the rate: features with long tails
get wide fences, and those with short tails narrow ones. Then all fences of a boundary are moved out together, until at most
``rate`` of the honest *signals* is outside any of them: one quantile that the data can estimate, in place of dozens too extreme to
estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["MAD_OF_A_NORMAL", "Fences", "fit_fences"]

_MARGIN = 1.25
_SMALLEST_K = 1.5
_TAIL = 0.1
_SHARE = 0.1
"""Share of the rate for one side of one feature; more than 1 / (2 F), because features exceed fences together."""
_TINY = 1e-12
_RELATIVE = 1e-4
_IQR_OF_A_NORMAL = 1.349
MAD_OF_A_NORMAL = 0.6745
_FEWEST_VALUES = 8


@dataclass(frozen=True)
class Fences:
    """Lower and upper bound of each feature, with the centre that scores are measured from.

    Args:
        lower: ``(..., F)``; ``-inf`` where there is no lower fence.
        centre: ``(..., F)``, median of the honest values.
        upper: ``(..., F)``; ``inf`` where there is no fence.
        mean: ``(..., F)``, of the honest values.
        sigma: ``(..., F)``, their standard deviation; ``inf`` where there are too few.
    """

    lower: Tensor
    centre: Tensor
    upper: Tensor
    mean: Tensor
    sigma: Tensor

    @classmethod
    def open(cls, *shape: int, device: torch.device | str = "cpu") -> Fences:
        """Fences that no value exceeds, in force during the warm-up."""
        infinite = torch.full(shape, torch.inf, device=device)
        return cls(-infinite, torch.zeros(shape, device=device), infinite, torch.zeros(shape, device=device), infinite)

    def to(self, device: torch.device | str) -> Fences:
        return Fences(*(part.to(device, non_blocking=True) for part in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the arguments."""
        return self.lower, self.centre, self.upper, self.mean, self.sigma

    def around(self, centre: Tensor) -> Fences:
        """The same fences, moved by ``centre`` ``(..., F)``."""
        return Fences(self.lower + centre, self.centre + centre, self.upper + centre, self.mean + centre, self.sigma)

    def widened(self, factor: Tensor) -> Fences:
        """The same fences, ``factor`` ``(..., F)`` times as far from their centre."""
        reach_down = (self.centre - self.lower) * factor
        reach_up = (self.upper - self.centre) * factor
        return Fences(self.centre - reach_down, self.centre, self.centre + reach_up, self.mean, self.sigma)

    def where(self, condition: Tensor, other: Fences) -> Fences:
        """These fences at boundaries where ``condition`` ``(boundaries,)`` bool is true, else ``other``."""
        return Fences(*(torch.where(condition[:, None], mine, theirs) for mine, theirs in zip(self.parts(), other.parts())))

    def replaced(self, boundary: int, parts: Tensor) -> Fences:
        """The same fences, with other :meth:`parts` ``(5, F)`` at one boundary."""
        mine = [part.clone() for part in self.parts()]
        for part, saved in zip(mine, parts):
            part[boundary] = saved
        return Fences(*mine)

    def of(self, boundary: int | slice) -> Fences:
        """The fences of one boundary or of a slice of them, the leading axis."""
        return Fences(*(part[boundary] for part in self.parts()))

    def scores(self, features: Tensor) -> Tensor:
        """How far out each feature lies: 0 at the centre, 1 at the fence. A value that is not finite scores infinity.

        Args:
            features: ``(..., F)``.

        Returns:
            ``(..., F)``.

        Example:
            >>> fences = fit_fences(torch.arange(101.0)[:, None], rate=0.01, two_sided=True, watched=torch.tensor([True]))
            >>> fences.scores(torch.tensor([[50.0], [168.76]])).round(decimals=3)
            tensor([[0.],
                    [1.]])
        """
        offset = features - self.centre
        scores = torch.maximum(offset * self._above, offset * self._below)
        return torch.where(scores.isnan(), self._unknown, scores)

    # Cached, because fences stay for several steps, and are used at each receipt.
    @cached_property
    def _above(self) -> Tensor:
        return 1 / (self.upper - self.centre + _TINY)

    @cached_property
    def _below(self) -> Tensor:
        return -1 / (self.centre - self.lower + _TINY)

    @cached_property
    def _unknown(self) -> Tensor:
        """Scores in place of NaN, which only a non-finite value can have: infinity, but zero for features without fences."""
        return torch.where(self.upper.isinf() & self.lower.isinf(), 0.0, torch.inf)


def fit_fences(values: Tensor, rate: float, two_sided: bool, watched: Tensor, resolution: Tensor | float = 0.0) -> Fences:
    """Fences around honest values.

    Args:
        values: ``(..., W, F)`` honest values; rows of NaN are empty slots.
        rate: share of honest signals that may be outside of any fence.
        two_sided: whether a value can also be too small.
        watched: ``(F,)`` bool, features to fence.
        resolution: ``(..., F)``, how much a feature differs by rounding or counting alone. A feature that was constant so far is
            not fenced more tightly than that.

    Example:
        >>> fences = fit_fences(torch.arange(101.0)[:, None], rate=0.01, two_sided=True, watched=torch.tensor([True]))
        >>> round(fences.lower.item(), 1), fences.centre.item(), round(fences.upper.item(), 1)
        (-68.8, 50.0, 168.8)
    """
    ordered = values.sort(dim=-2).values  # NaN comes last
    count = (~ordered[..., 0].isnan()).sum(dim=-1)
    low, lower_quartile, centre, upper_quartile, high = (
        _quantile(ordered, count, level) for level in (_TAIL, 0.25, 0.5, 0.75, 1 - _TAIL)
    )
    spread = torch.maximum((upper_quartile - lower_quartile).clamp(min=_TINY), torch.as_tensor(resolution))
    spread = spread + _RELATIVE * centre.abs()
    reach_up = torch.maximum(high + _tail(values, high, 1.0, rate) - upper_quartile, _SMALLEST_K * spread)
    reach_down = torch.maximum(lower_quartile - low + _tail(values, low, -1.0, rate), _SMALLEST_K * spread)

    exceedance = (values - upper_quartile.unsqueeze(-2)) / reach_up.unsqueeze(-2)
    if two_sided:
        exceedance = torch.maximum(exceedance, (lower_quartile.unsqueeze(-2) - values) / reach_down.unsqueeze(-2))
    worst = torch.where(watched, exceedance, -torch.inf).amax(dim=-1, keepdim=True)
    # Empty slots must stay NaN, which sorting puts last.
    worst = torch.where(values[..., :1].isnan(), torch.nan, worst)
    stretch = _quantile(worst.sort(dim=-2).values, count, 1 - rate).clamp(min=1.0) * _MARGIN

    enough = (count >= _FEWEST_VALUES).unsqueeze(-1) & watched
    upper = torch.where(enough, upper_quartile + stretch * reach_up, torch.inf)
    lower = torch.where(enough & torch.tensor(two_sided), lower_quartile - stretch * reach_down, -torch.inf)
    filled = values.nan_to_num(0.0)
    number = count.clamp(min=1)[..., None]
    mean = filled.sum(dim=-2) / number
    variance = torch.where(values.isnan(), 0.0, (filled - mean.unsqueeze(-2)).square()).sum(dim=-2) / number
    # The quartiles say little of a feature that has long tails, or nearly always the same value.
    sigma = torch.maximum(variance.sqrt(), spread / _IQR_OF_A_NORMAL)
    return Fences(
        lower,
        torch.where(enough, centre, 0.0),
        upper,
        torch.where(enough, mean, 0.0),
        torch.where(enough, sigma, torch.inf),
    )


def _tail(values: Tensor, edge: Tensor, side: float, rate: float) -> Tensor:
    """The distance beyond ``edge`` where an exponential tail with the values' mean excess over ``edge`` is rare enough."""
    excess = (side * (values - edge.unsqueeze(-2))).nan_to_num(0.0).clamp(min=0)
    mean = excess.sum(dim=-2) / (excess > 0).sum(dim=-2).clamp(min=1)
    return mean * max(0.0, math.log(_TAIL / (_SHARE * rate)))


def _quantile(ordered: Tensor, count: Tensor, level: float) -> Tensor:
    """The quantile of the first ``count`` values along the last axis but one, as ``torch.quantile`` gives it."""
    place = level * (count - 1).clamp(min=0).to(ordered.dtype)
    below = place.floor()
    index = below.long()[..., None, None].expand(*ordered.shape[:-2], 1, ordered.shape[-1])
    after = torch.minimum(index + 1, (count - 1).clamp(min=0)[..., None, None].expand_as(index))
    first, second = (ordered.gather(-2, i).squeeze(-2) for i in (index, after))
    return torch.lerp(first, second, (place - below)[..., None])
