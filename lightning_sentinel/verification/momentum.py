"""The momentum reference of a boundary: an exponential moving average of honest workers' signals.

``m <- beta m + (1 - beta) mean(h)`` (SENTINEL, arXiv 2603.03592). One mean a step, over all honest signals of all replicas, so
that the step's noise is averaged before it enters. Positions have weights of their own, because sequences may vary in length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sentinel.verification.axes import pieces

__all__ = ["Momentum", "PositionSums", "numbers"]


def numbers(values: Tensor) -> Tensor:
    """Zero in place of non-finite values, so that zero times them is zero: faster than selecting values that have a weight."""
    return values.nan_to_num(0.0, 0.0, 0.0)


@dataclass
class PositionSums:
    """Sums of batch means per position, to be added over senders and processes before they enter a momentum.

    Args:
        total: ``(..., T, C)``, sum of batch means; leading axes separate signals that may have to stay out.
        count: ``(..., T)``, how many means each position had.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def like(cls, means: Tensor) -> PositionSums:
        """Empty sums in the shape of ``means`` ``(..., T, C)``."""
        return cls(means.new_zeros(means.shape), means.new_zeros(means.shape[:-1]))

    def resized(self, positions: int) -> PositionSums:
        """The same sums over the first ``positions`` positions, new ones with weight zero."""
        missing = positions - self.total.shape[-2]
        if missing <= 0:
            return PositionSums(self.total[..., :positions, :], self.count[..., :positions])
        return PositionSums(pad(self.total, (0, 0, 0, missing)), pad(self.count, (0, missing)))

    def add(self, means: Tensor, weights: Tensor, places: Tensor | None = None) -> None:
        """Add batch means ``(..., T, C)`` with weights ``(...)``; a weight of zero adds nothing, whatever the mean holds.

        Non-finite means must have that weight. Means may lack leading axes that the weights have.

        Args:
            places: index on the last leading axis of the sums for each entry of that axis of the means; ``None`` if in order.
        """
        positions = means.shape[-2]
        if positions > self.total.shape[-2]:
            grown = self.resized(positions)
            self.total = grown.total
            self.count = grown.count
        total = self.total[..., :positions, :]
        count = self.count[..., :positions]
        if places is None:
            count += weights[..., None]
        else:
            count.index_add_(-2, places, weights[..., None].expand(*weights.shape, positions))
        weights = weights[..., None, None]
        for piece in pieces(positions, means.numel()):
            some = numbers(means[..., piece, :])
            sums = total[..., piece, :]
            if places is None:
                sums.addcmul_(some, weights)
            else:
                sums.index_add_(-3, places, some * weights)

    def of(self, chosen: Tensor) -> PositionSums:
        """The sum over the leading axes, where ``chosen`` ``(...)`` bool is true."""
        # Selected, not multiplied by zero: a sum that overflowed would poison the others.
        total = self.total.masked_fill(~chosen[..., None, None], 0.0).flatten(0, -3).sum(dim=0)
        return PositionSums(total, self.count.masked_fill(~chosen[..., None], 0.0).flatten(0, -2).sum(dim=0))


@dataclass
class Momentum:
    """Exponential moving average of honest batch means.

    Args:
        beta: decay, in [0, 1).

    Example:
        >>> import torch
        >>> momentum = Momentum(beta=0.5)
        >>> for value in (2.0, 4.0):
        ...     momentum.update(PositionSums(torch.full((1, 1), value), torch.ones(1)))
        >>> momentum.value
        tensor([[3.]])
    """

    beta: float
    value: Tensor | None = None
    seen: Tensor | None = field(default=None, repr=False)

    def update(self, step: PositionSums) -> None:
        """Update with one step's honest signals. Positions without a signal keep their value; new ones start at their mean."""
        if self.value is None or self.seen is None:
            self.value = torch.zeros_like(step.total)
            self.seen = torch.zeros_like(step.count, dtype=torch.bool)
        missing = step.total.shape[0] - self.value.shape[0]
        if missing > 0:
            self.value = pad(self.value, (0, 0, 0, missing))
            self.seen = pad(self.seen, (0, missing))
        step = step.resized(self.value.shape[0])
        mean = step.total / step.count.clamp(min=1).unsqueeze(1)
        weight = torch.where(self.seen, 1 - self.beta, 1.0) * (step.count > 0)
        self.value = torch.lerp(self.value, mean, weight.unsqueeze(1))
        self.seen = self.seen | (step.count > 0)

    def resized(self, like: Tensor) -> Tensor:
        """The momentum over the positions of ``like`` ``(T, C)``; zero where it has none."""
        if self.value is None:
            return torch.zeros_like(like)
        missing = len(like) - len(self.value)
        return self.value[: len(like)] if missing <= 0 else pad(self.value, (0, 0, 0, missing))

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.value is None or self.seen is None else {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        if state:
            self.value = state["value"].to(device)
            self.seen = state["seen"].to(device)
