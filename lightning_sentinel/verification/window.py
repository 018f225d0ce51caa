"""What honest values were like in the last steps, and the fences that follow from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sentinel.verification.fences import MAD_OF_A_NORMAL, Fences, fit_fences

__all__ = ["FenceWindow"]

_SPREAD_BETA = 0.9


class FenceWindow:
    """The latest honest values of all boundaries, and fences around them.

    A window fills slowly, and what is outside of the fences never enters it: where honest values spread within a few steps, the
    fences alone would never follow. So two-sided fences are widened where the spread of the last steps, told by the median
    deviation of their honest values, is larger than that of the window; as much larger as it is, and no longer than it is.

    Args:
        boundaries: how many.
        size: values of a boundary that are remembered.
        watched: ``(F,)`` bool, features to fence.
        rate: share of honest signals that may be outside.
        two_sided: whether a value can also be too small.
    """

    def __init__(self, boundaries: int, size: int, watched: Tensor, rate: float, two_sided: bool) -> None:
        self._rate, self._two_sided, self._watched = rate, two_sided, watched
        self.values = torch.full((boundaries, size, len(watched)), torch.nan)
        self.places = torch.zeros(boundaries, dtype=torch.long)
        self.spread = torch.full((boundaries, len(watched)), torch.nan)
        """``(boundaries, F)``, standard deviation of the last steps, by their median deviation; NaN before the first fit."""
        self._fitted = self.fences = Fences.open(boundaries, len(watched))

    def add(self, features: Tensor, honest: Tensor) -> None:
        """Enter a step.

        Args:
            features: ``(boundaries, N, F)``.
            honest: ``(boundaries, N)`` bool, which of them to remember.
        """
        size = self.values.shape[1]
        honest = honest & features.isfinite().all(dim=-1)
        # Where each honest value goes: the oldest places, in order, round and round; a step larger than the window keeps its end.
        order = honest.cumsum(dim=1)
        kept = honest & (honest.sum(dim=1, keepdim=True) - order < size)
        boundary, signal = kept.nonzero(as_tuple=True)
        self.values[boundary, (self.places[boundary] + order[boundary, signal] - 1) % size] = features[boundary, signal]
        self.places = (self.places + honest.sum(dim=1)) % size
        if self._two_sided and bool(honest.any()):
            self._follow(features, honest)

    def _follow(self, features: Tensor, honest: Tensor) -> None:
        deviation = torch.where(honest[..., None], (features - self._fitted.mean[:, None]).abs(), torch.nan)
        spread = deviation.nanmedian(dim=1).values / MAD_OF_A_NORMAL
        spread = torch.where(self._fitted.sigma.isfinite(), spread, torch.nan)
        moved = torch.lerp(spread, self.spread, _SPREAD_BETA)
        self.spread = torch.where(spread.isnan(), self.spread, torch.where(self.spread.isnan(), spread, moved))
        self._widen()

    def _widen(self) -> None:
        factor = (self.spread / self._fitted.sigma).nan_to_num(1.0).clamp(min=1.0)
        self.fences = self._fitted.widened(factor)

    def state_of(self, boundary: int) -> dict[str, Tensor]:
        """What is known of one boundary: the values, oldest first, the fences fitted to them, and the spread of the last steps."""
        values = self.values[boundary].roll(-int(self.places[boundary]), dims=0)
        return {
            "values": values[~values[:, 0].isnan()],
            "fences": torch.stack(self._fitted.of(boundary).parts()),
            "spread": self.spread[boundary].clone(),
        }

    def load_state_of(self, boundary: int, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_of` gave: of the values the latest, as many as this window has room for."""
        size = self.values.shape[1]
        kept = state["values"][-size:]
        self.values[boundary] = torch.nan
        self.values[boundary, : len(kept)] = kept
        self.places[boundary] = len(kept) % size
        self.spread[boundary] = state["spread"]
        parts = [part.clone() for part in self._fitted.parts()]
        for mine, saved in zip(parts, state["fences"]):
            mine[boundary] = saved
        self._fitted = Fences(*parts)
        self._widen()

    def fit(self) -> None:
        """Fit the fences to what is remembered."""
        self._fitted = fit_fences(self.values, self._rate, self._two_sided, self._watched)
        self._widen()
