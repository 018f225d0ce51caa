"""The references of one boundary: the momentum, and the averages behind moment and input-output features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sentinel.verification.consistency import ridge_weights
from lightning_sentinel.verification.momentum import Momentum, PositionSums, numbers
from lightning_sentinel.verification.temporal import Anchor

__all__ = ["Contribution", "References"]

_REGRESSION = ("input_input", "input_target")
_REGRESSION_BETA = 0.98
"""Products behind the ridge regression are remembered for longer than moments: it has more to learn from them."""


@dataclass
class Contribution:
    """One step's sums over honest signals, to be added over senders and processes.

    Args:
        positions: sums of batch means, for the momentum.
        statistics: ``(..., S)``, sums of the signals' statistics; leading axes as positions have them.
        signals: ``(...)``, how many signals were added.
    """

    positions: PositionSums
    statistics: Tensor
    signals: Tensor

    @classmethod
    def like(cls, means: Tensor, statistics: Tensor) -> Contribution:
        """Empty sums in the shape of ``means`` ``(..., T, C)`` and ``statistics`` ``(..., S)``."""
        return cls(PositionSums.like(means), statistics.new_zeros(statistics.shape), statistics.new_zeros(statistics.shape[:-1]))

    def add(self, means: Tensor, statistics: Tensor, weights: Tensor, places: Tensor | None = None) -> None:
        """Add signals with weights ``(...)`` of zero or one; zero adds nothing, whatever the signal holds.

        Non-finite signals must have that weight. Means and statistics may lack leading axes that the weights have.

        Args:
            places: index on the last leading axis of the sums for each signal; ``None`` if in order.
        """
        self.positions.add(means, weights, places)
        if places is None:
            self.statistics.addcmul_(numbers(statistics), weights[..., None])
            self.signals += weights
        else:
            self.statistics.index_add_(-2, places, numbers(statistics) * weights[..., None])
            self.signals.index_add_(-1, places, weights)

    def of(self, chosen: Tensor) -> Contribution:
        """The sum over the leading axes, where ``chosen`` ``(...)`` bool is true."""
        statistics = self.statistics.masked_fill(~chosen[..., None], 0.0).flatten(0, -2).sum(dim=0)
        return Contribution(self.positions.of(chosen), statistics, self.signals.masked_fill(~chosen, 0.0).sum())

    def resized(self, positions: int) -> Contribution:
        """The same over the first ``positions`` positions."""
        return Contribution(self.positions.resized(positions), self.statistics, self.signals)

    @classmethod
    def added(cls, several: Sequence[Contribution]) -> Contribution:
        """The sum of several contributions of the same shape."""
        flat = torch.stack([one.flat() for one in several]).sum(dim=0)
        return cls.from_flat(flat, several[0])

    def flat(self) -> Tensor:
        """One vector for an all-reduce: ``T * C`` sums, ``T`` counts, ``S`` sums, one count."""
        parts = (self.positions.total, self.positions.count, self.statistics, self.signals)
        return torch.cat([part.flatten() for part in parts])

    @classmethod
    def from_flat(cls, vector: Tensor, like: Contribution) -> Contribution:
        """The inverse of :meth:`flat`, in the shapes of ``like``."""
        shapes = [part.shape for part in (like.positions.total, like.positions.count, like.statistics, like.signals)]
        total, count, statistics, signals = (
            part.view(shape) for part, shape in zip(vector.split([shape.numel() for shape in shapes]), shapes)
        )
        return cls(PositionSums(total, count), statistics, signals)


@dataclass
class References:
    """Moving averages over the signals of honest workers.

    Args:
        beta: decay of the momentum and of moments, in [0, 1).
    """

    beta: float
    momentum: Momentum = field(init=False)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    """Of the ridge regression; ``None`` where senders receive nothing."""
    updates: Tensor | None = None
    """0-dim, how many steps had an honest signal."""
    _anchor: Anchor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.momentum = Momentum(self.beta)

    def anchor(self, positions: int, directions: Tensor) -> Anchor | None:
        """The momentum, prepared for signals of so many positions; ``None`` before the first step.

        Args:
            positions: of the signals.
            directions: ``(C, K)``, the same in every call.
        """
        momentum = self.momentum.value
        if momentum is None:
            return None
        shared = min(positions, len(momentum))
        # Only the latest anchor is kept: one for each sequence length is not worth the memory.
        if self._anchor is None or len(self._anchor.momentum) != shared:
            self._anchor = Anchor.of(momentum[:shared], directions)
        return self._anchor

    def distances(self, step: Contribution, sizes: Mapping[str, int]) -> list[Tensor]:
        """Distances of a step's means from the references, 0-dim each: from the momentum, then from each of the statistics."""
        parts = self._away(step, sizes)
        return [torch.linalg.vector_norm(part) for part in parts]

    def nearer(self, step: Contribution, shares: Tensor, most: Tensor, sizes: Mapping[str, int]) -> Contribution:
        """A step whose means are only ``shares`` as far from the references, and that counts as ``most`` signals at most.

        Args:
            step: the contribution of one worker.
            shares: at most 1, in the order of :meth:`distances`.
            most: at any position.
            sizes: names of the statistics, and how many floats each has.
        """
        positions, *statistics = (share * part for share, part in zip(shares, self._away(step, sizes)))
        known = torch.cat([self._known(name, size, step) for name, size in sizes.items()] or [step.statistics[:0]])
        moved = torch.cat(statistics) if statistics else known
        count, signals = (torch.minimum(one.clamp(min=0), most) for one in (step.positions.count, step.signals))
        total = (positions + self.momentum.resized(step.positions.total)) * count.unsqueeze(-1)
        return Contribution(PositionSums(total, count), (moved + known) * signals, signals.view(step.signals.shape))

    def _away(self, step: Contribution, sizes: Mapping[str, int]) -> list[Tensor]:
        count = step.positions.count
        signals = step.signals.clamp(min=1)
        mean = step.positions.total / count.clamp(min=1).unsqueeze(-1)
        away = torch.where((count > 0).unsqueeze(-1), mean - self.momentum.resized(mean), 0.0)
        averages = (step.statistics / signals).split(list(sizes.values()))
        said = (step.signals > 0).to(mean.dtype)
        return [away, *(said * (one - self._known(name, size, step)) for (name, size), one in zip(sizes.items(), averages))]

    def _known(self, name: str, size: int, step: Contribution) -> Tensor:
        return self.statistics[name] if name in self.statistics else step.statistics.new_zeros(size)

    def update(self, step: Contribution, sizes: Mapping[str, int]) -> None:
        """Update with one step's honest signals.

        Args:
            step: summed over senders.
            sizes: names of the statistics, and how many floats each has.
        """
        self.momentum.update(step.positions)
        self._anchor = None
        averages = (step.statistics / step.signals.clamp(min=1)).split(list(sizes.values()))
        something = (step.signals > 0).to(step.statistics.dtype)
        before = torch.zeros_like(something) if self.updates is None else self.updates
        # A plain average at first, or the first step would weigh as much as all that follow it.
        plain = 1 / (before + 1)
        moments, regression = (plain.clamp(min=1 - beta) * something for beta in (self.beta, _REGRESSION_BETA))
        for name, average in zip(sizes, averages):
            old = self.statistics[name] if name in self.statistics else torch.zeros_like(average)
            self.statistics[name] = torch.lerp(old, average, regression if name in _REGRESSION else moments)
        self.updates = before + something
        self._solve()

    def state_dict(self) -> dict[str, Tensor]:
        state = {} if self.updates is None else {"updates": self.updates}
        state |= {f"momentum.{name}": value for name, value in self.momentum.state_dict().items()}
        return state | {f"statistics.{name}": value for name, value in self.statistics.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        parts: dict[str, dict[str, Tensor]] = {"momentum": {}, "statistics": {}}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind in parts:
                parts[kind][name] = value.to(device)
        self.momentum.load_state_dict(parts["momentum"], device)
        self._anchor = None
        self.statistics = parts["statistics"]
        self.updates = state["updates"].to(device) if "updates" in state else None
        self._solve()

    def _solve(self) -> None:
        if all(name in self.statistics for name in _REGRESSION):
            self.weights = ridge_weights(self.statistics)
