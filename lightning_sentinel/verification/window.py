"""Windows of honest values, and the fences fitted to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.verification.fences import Fences, fit_fences
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.usual import Usual

__all__ = ["FenceRule", "FenceWindow"]

_SLOW = 0.99
_FAST = 0.9
_SURGE = 1.25
"""How much larger than the slow average the fast one must be to count: less is its noise."""
_FEWEST_TO_OUTVOTE = 3
_FURTHEST_ALONE = 4.0
"""How many times as wide as in the warm-up fences become at most, where too few workers are observed to outvote one."""


class FenceRule(NamedTuple):
    """What fences are fitted to.

    Args:
        watched: ``(F,)`` bool, features to fence.
        rate: share of honest signals that may be outside.
        two_sided: whether a value can also be too small.
    """

    watched: Tensor
    rate: float
    two_sided: bool


class FenceWindow:
    """Honest values of all boundaries, and fences around them.

    Two-sided fences keep the *shape* that they had in the warm-up, when no worker lied: how far they stand on either side of each
    feature, how features compare, how long the tails are. Afterwards they follow only the *scale*: how far values deviate now,
    against then. Each worker has a moving average of its own deviations, and the median worker sets the scale: a minority that
    stays just inside, to widen the fences step by step, moves it no further than to another honest worker. With fewer than three
    observed workers there is no such median, and fences become at most four times as wide as they were.

    One-sided fences, those of the published method, are fitted to the latest values instead, as published.

    Args:
        boundaries: how many.
        size: how many values of a boundary are remembered.
        rule: what fences are fitted to.
        workers: senders of each boundary.
    """

    def __init__(self, boundaries: int, size: int, rule: FenceRule, workers: int = 1) -> None:
        self._rule = rule
        features = len(rule.watched)
        self.values = torch.full((boundaries, size, features), torch.nan)
        self.workers = torch.full((boundaries, size), -1)
        """``(boundaries, size)``, the workers that sent the values."""
        self.places = torch.zeros(boundaries, dtype=torch.long)
        self.resolution = torch.zeros(boundaries, features)
        """``(boundaries, F)``, smaller differences are not significant:
        :func:`lightning_sentinel.verification.features.resolution`."""
        self.settled = torch.zeros(boundaries, dtype=torch.bool)
        """``(boundaries,)`` bool, whether fences only follow the scale from now on."""
        self.deviations = torch.full((2, boundaries, workers, features), torch.nan)
        """Slow and fast moving averages of how far each worker's values are from the mean of the warm-up; NaN before a fit."""
        self.before = torch.full((boundaries, features), torch.nan)
        """``(boundaries, F)``, the slow averages of the median worker in the warm-up."""
        self.usual = Usual.open(boundaries, workers, features)
        self.scale = torch.ones(boundaries, features)
        """``(boundaries, F)``, how many times as wide as in the warm-up the fences were when they were last fitted."""
        self._shape = self.fences = Fences.open(boundaries, features)

    def add(self, features: Tensor, honest: Tensor, senders: Tensor | None = None) -> None:
        """Add a step.

        Args:
            features: ``(boundaries, N, F)``.
            honest: ``(boundaries, N)`` bool, which of them to remember.
            senders: ``(boundaries, N)``, the worker that sent each; ``None`` if there is one only.
        """
        senders = torch.zeros(honest.shape, dtype=torch.long) if senders is None else senders
        honest = honest & features.isfinite().all(dim=-1)
        self._remember(features, honest & ~self.settled[:, None], senders)
        if self._rule.two_sided and bool(honest.any()):
            self._follow(features, honest, senders)

    def resolve(self, resolution: Tensor) -> None:
        """Update the resolution with that of a step, ``(boundaries, F)``; the coarsest of the warm-up counts."""
        self.resolution = torch.where(self.settled[:, None], self.resolution, torch.maximum(self.resolution, resolution))

    def _remember(self, features: Tensor, honest: Tensor, senders: Tensor) -> None:
        size = self.values.shape[1]
        # A ring buffer: each honest value replaces the oldest one; a step larger than the window keeps its end.
        order = honest.cumsum(dim=1)
        kept = honest & (honest.sum(dim=1, keepdim=True) - order < size)
        boundary, signal = kept.nonzero(as_tuple=True)
        places = (self.places[boundary] + order[boundary, signal] - 1) % size
        self.values[boundary, places] = features[boundary, signal]
        self.workers[boundary, places] = senders[boundary, signal]
        self.places = (self.places + honest.sum(dim=1)) % size

    def _follow(self, features: Tensor, honest: Tensor, senders: Tensor) -> None:
        # Values outside count as if they stood on the fence: where honest values spread at once, most of them are outside.
        inside = features.clamp(self.fences.lower[:, None], self.fences.upper[:, None])
        away = torch.where(honest[..., None], (inside - self._shape.mean[:, None]).abs(), torch.nan)
        now = _mean_of_workers(away, senders, self.deviations.shape[2])
        betas = torch.tensor([_SLOW, _FAST]).view(2, 1, 1, 1)
        moved = torch.where(self.deviations.isnan(), now, torch.lerp(now.expand_as(self.deviations), self.deviations, betas))
        self.deviations = torch.where(now.isnan() | ~self._shape.sigma.isfinite()[:, None], self.deviations, moved)
        self._widen()

    def _scales(self) -> Tensor:
        """How many times as far as in the warm-up values spread by the slow and by the fast averages, ``(2, boundaries, F)``."""
        floor = self.resolution / 2
        scales = torch.maximum(median(self.deviations, dim=2), floor) / torch.maximum(self.before, floor)
        alone = (~self.deviations[0].isnan()).any(dim=2).sum(dim=1) < _FEWEST_TO_OUTVOTE
        return torch.where(alone[:, None], scales.clamp(max=_FURTHEST_ALONE), scales).nan_to_num(1.0, 1.0, 1.0)

    def _scale(self) -> Tensor:
        """How many times as far as in the warm-up values spread now, ``(boundaries, F)``."""
        slow, fast = self._scales()
        return torch.where(fast > _SURGE * slow, fast, slow)

    def _widen(self) -> None:
        # Fences come closer when they are fitted; they move out at once.
        self.fences = self._shape.widened(torch.maximum(self._scale(), self.scale)) if self._rule.two_sided else self._shape

    def fit(self) -> None:
        """Fit the fences to the remembered values, and to how far they spread now."""
        if self._rule.two_sided:
            self._settle()
            self.scale = self._scales()[0]
        else:
            self._shape = fit_fences(self.values, self._rule.rate, False, self._rule.watched, self.resolution)
            self.usual = Usual.of(self.values, self.workers, self._shape, self.resolution, self.usual.mean.shape[1])
        self._widen()

    def _settle(self) -> None:
        """Update the shape until it is settled: once half of the window is filled, and it holds enough values for the rate."""
        if bool(self.settled.all()):
            return
        fresh = fit_fences(self.values, self._rule.rate, True, self._rule.watched, self.resolution)
        workers = self.deviations.shape[2]
        away = (self.values - fresh.mean[:, None]).abs()
        deviations = _mean_of_workers(away, self.workers, workers)
        usual = Usual.of(self.values, self.workers, fresh, self.resolution, workers)
        self._shape = fresh.where(~self.settled, self._shape)
        self.usual = usual.where(~self.settled, self.usual)
        self.deviations = torch.where(self.settled[:, None, None], self.deviations, deviations)
        self.before = torch.where(self.settled[:, None], self.before, median(deviations, dim=1))
        size = self.values.shape[1]
        enough = max((size + 1) // 2, min(size, math.ceil(1 / self._rule.rate)))
        self.settled = self.settled | ((~self.values[..., 0].isnan()).sum(dim=1) >= enough)

    def standard_scores(self, features: Tensor, senders: Tensor) -> Tensor:
        """Values minus their senders' usual mean, over its standard deviation and the current scale.

        Args:
            features: ``(boundaries, lanes, micro_batches, F)``.
            senders: ``(boundaries, lanes)``.
        """
        mean, sigma = self.usual.by_lane(senders)
        return (features - mean[:, :, None]) / (sigma * self._scale()[:, None])[:, :, None]

    def state_of(self, boundary: int) -> dict[str, Tensor]:
        """The state of one boundary: the values, oldest first, the fences' shape, and the deviations of each worker."""
        turn = -int(self.places[boundary])
        values = self.values[boundary].roll(turn, dims=0)
        workers = self.workers[boundary].roll(turn)
        filled = ~values[:, 0].isnan()
        return {
            "values": values[filled],
            "workers": workers[filled],
            "settled": self.settled[boundary].clone(),
            "resolution": self.resolution[boundary].clone(),
            "shape": torch.stack(self._shape.of(boundary).parts()),
            "scale": self.scale[boundary].clone(),
            "deviations": self.deviations[:, boundary].clone(),
            "before": self.before[boundary].clone(),
            "usual": torch.stack((self.usual.mean[boundary], self.usual.sigma[boundary])),
        }

    def load_state_of(self, boundary: int, state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state_of`: of the values the latest, as many as this window has room for.

        If the number of workers differs, each worker gets the median of the saved ones' deviations and usual features.
        """
        size = self.values.shape[1]
        kept = state["values"][-size:]
        self.values[boundary] = torch.nan
        self.workers[boundary] = -1
        self.values[boundary, : len(kept)] = kept
        self.workers[boundary, : len(kept)] = state["workers"][-size:].clamp(max=self.deviations.shape[2] - 1)
        self.places[boundary] = len(kept) % size
        self.settled[boundary] = state["settled"]
        self.resolution[boundary] = state["resolution"]
        deviations = state["deviations"]
        usual = state["usual"]
        if deviations.shape != self.deviations[:, boundary].shape:
            deviations = median(deviations, dim=1)[:, None].expand_as(self.deviations[:, boundary])
            usual = median(usual, dim=1)[:, None].expand_as(deviations)
        self.deviations[:, boundary] = deviations
        self.before[boundary] = state["before"]
        self.usual.mean[boundary], self.usual.sigma[boundary] = usual
        self._shape = self._shape.replaced(boundary, state["shape"])
        self.scale[boundary] = state["scale"]
        self._widen()


def _mean_of_workers(values: Tensor, senders: Tensor, workers: int) -> Tensor:
    """Means ``(boundaries, workers, F)`` of values ``(boundaries, N, F)`` by sender ``(boundaries, N)``, ignoring NaN."""
    known = ~values.isnan() & (senders >= 0)[..., None]
    places = senders.clamp(min=0)[..., None].expand_as(values)
    empty = values.new_zeros(values.shape[0], workers, values.shape[2])
    total = empty.scatter_add(1, places, torch.where(known, values, 0.0))
    return total / empty.scatter_add(1, places, known.to(values.dtype))
