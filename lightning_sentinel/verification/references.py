"""All that a verifier learns of one boundary: the momentum, and the averages behind moment and input-output features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sentinel.verification.consistency import ridge_weights
from lightning_sentinel.verification.momentum import Momentum, PositionSums
from lightning_sentinel.verification.temporal import Anchor

__all__ = ["Contribution", "References"]

_REGRESSION = ("input_input", "input_target")
_REGRESSION_BETA = 0.98
"""Products behind the ridge regression are remembered for longer than moments: it has more to learn from them."""


@dataclass
class Contribution:
    """What one step has to say about honest signals: sums over signals, to be added over senders and processes.

    Args:
        positions: sums of batch means, for the momentum.
        statistics: ``(..., S)``, sums of the signals' statistics; a leading axis of places, as positions have it.
        signals: ``(...)``, how many signals were added.
    """

    positions: PositionSums
    statistics: Tensor
    signals: Tensor

    @classmethod
    def empty(cls, places: int, means: Tensor, statistics: Tensor) -> Contribution:
        """Nothing yet in each place, for signals with ``means`` like ``(N, T, C)`` and ``statistics`` like ``(N, S)``."""
        of_signals = statistics.new_zeros(places, statistics.shape[1])
        return cls(PositionSums.empty(places, means), of_signals, statistics.new_zeros(places))

    def add(self, means: Tensor, statistics: Tensor, places: Tensor) -> None:
        """Add ``N`` signals, each to a place of its own, ``(N,)``; the other places do not see what it holds."""
        self.positions.add(means, places)
        self.statistics.index_add_(0, places, statistics)
        self.signals.index_add_(0, places, statistics.new_ones(len(places)))

    def of(self, places: Tensor) -> Contribution:
        """The sum over the places for which ``(places,)`` bool is true."""
        statistics = self.statistics.masked_fill(~places[:, None], 0.0).sum(dim=0)
        return Contribution(self.positions.of(places), statistics, torch.where(places, self.signals, 0.0).sum())

    def resized(self, positions: int) -> Contribution:
        """The same over the first ``positions`` positions."""
        return Contribution(self.positions.resized(positions), self.statistics, self.signals)

    def __add__(self, other: Contribution) -> Contribution:
        return Contribution(self.positions + other.positions, self.statistics + other.statistics, self.signals + other.signals)

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
    """Moving averages over what honest workers sent.

    Args:
        beta: decay of the momentum and of moments, in [0, 1).
    """

    beta: float
    momentum: Momentum = field(init=False)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    """Of the ridge regression; ``None`` where senders receive nothing."""
    updates: Tensor | None = None
    """0-dim, how many steps had something to say."""
    _anchor: Anchor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.momentum = Momentum(self.beta)

    def anchor(self, positions: int, directions: Tensor) -> Anchor | None:
        """The momentum as signals of so many positions are compared with it; ``None`` before the first step.

        Args:
            positions: of the signals.
            directions: ``(C, K)``, always the same ones.
        """
        momentum = self.momentum.value
        if momentum is None:
            return None
        shared = min(positions, len(momentum))
        # Only the latest is kept: where lengths vary it is not worth the memory of one for each.
        if self._anchor is None or len(self._anchor.momentum) != shared:
            self._anchor = Anchor.of(momentum[:shared], directions)
        return self._anchor

    def update(self, step: Contribution, sizes: Mapping[str, int]) -> None:
        """Take in one step's honest signals.

        Args:
            step: summed over senders.
            sizes: names of the statistics, and how many floats each has.
        """
        self.momentum.update(step.positions)
        self._anchor = None
        averages = (step.statistics / step.signals.clamp(min=1)).split(list(sizes.values()))
        something = (step.signals > 0).to(step.statistics.dtype)
        before = torch.zeros_like(something) if self.updates is None else self.updates
        for name, average in zip(sizes, averages):
            # A plain average at first, or the first step would weigh as much as all that follow it.
            weight = (1 / (before + 1)).clamp(min=1 - (_REGRESSION_BETA if name in _REGRESSION else self.beta))
            old = self.statistics.get(name, torch.zeros_like(average))
            self.statistics[name] = torch.lerp(old, average, weight * something)
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
