"""The verifier of one boundary: what honest signals look like there, and whether one of them is out of line.

A signal is judged at receipt, from the fences in force, and by values alone: no branch depends on a tensor, so that a GPU is
never waited for. What the step teaches (momentum, window, fences) enters once it is known which signals were honest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification.axes import batch_means, spread_over
from lightning_sentinel.verification.distances import unit_directions
from lightning_sentinel.verification.features import FEATURES, temporal_features
from lightning_sentinel.verification.fences import Fences, fit_fences
from lightning_sentinel.verification.momentum import Contribution, Momentum
from lightning_sentinel.verification.table import signal_rows

__all__ = ["MAX_SCORE", "BoundaryVerifier", "Inspection"]

MAX_SCORE = 1e6
"""Scores end here, so that they stay finite in logs and files; a signal that is not finite has this score."""

_SETTLING_STEPS = 10
"""The first steps of a momentum are its own noise; their distances would widen the fences."""

_FEWEST_VALUES = 8


class Inspection(NamedTuple):
    """What a verifier says of the senders' signals: table rows ``(senders, len(COLUMNS))`` and verdicts ``(senders,)``."""

    rows: Tensor
    flagged: Tensor


class _Kept(NamedTuple):
    """The means of the current step by sender, apart by the verdict at receipt, which may still be dropped."""

    honest: Contribution
    suspect: Contribution


class BoundaryVerifier:
    """Verifies all signals that cross one boundary.

    Every process that receives across it holds one with the same state, because all of them learn from the same table and the same
    sum of means. A process receives from one sender, or, where it runs the whole mesh, from one of each replica.

    State: ``T x C`` momentum, ``window x F`` features, ``C x projections`` directions.

    Args:
        boundary: the stream to verify.
        config: how.
        device: where the signals are.
    """

    def __init__(self, boundary: Boundary, config: Verification, device: torch.device | str = "cpu") -> None:
        self.boundary = boundary
        self._config = config
        self._device = torch.device(device)
        gradient = boundary.direction is Direction.GRADIENT
        self.momentum = Momentum(config.beta_gradient if gradient else config.beta_activation)
        self.fences = Fences.open(len(FEATURES), self._device)
        self.window = torch.empty(0, len(FEATURES))
        self.steps = 0
        # Each boundary has directions of its own: what leaks at one says nothing about another.
        self._directions_seed = (config.seed * 100_003 + boundary.index * 2 + gradient) % 2**63
        self._directions: Tensor | None = None
        self._kept: _Kept | None = None

    @property
    def warmed_up(self) -> bool:
        return self.steps >= self._config.warmup_steps

    def inspect(self, signals: Tensor, tainted: Tensor) -> Inspection:
        """Score what came from the senders of this process in one micro-batch, and keep the means for :meth:`learn`.

        Args:
            signals: ``(senders * B, ...)``, floating point: the senders' signals, one behind the other.
            tainted: ``(senders,)`` bool; a tainted signal is scored, never flagged, and never learned from.
        """
        means = batch_means(signals.detach(), len(tainted))
        finite = means.isfinite().all(dim=2).all(dim=1)
        if self.momentum.value is None:
            features = means.new_zeros(len(tainted), len(FEATURES))
        else:
            features = temporal_features(means, self.momentum.value, self._unit_directions(means))
        highest = self.fences.scores(features).max(dim=1)
        score = torch.where(finite, highest.values, torch.inf).clamp(max=MAX_SCORE)
        worst = torch.where(finite, highest.indices, -1)
        flagged = (score > 1) & ~tainted
        if self._kept is None:
            self._kept = _Kept(Contribution.like(means), Contribution.like(means))
        self._kept.honest.add(means, ~flagged & ~tainted & finite)
        self._kept.suspect.add(means, flagged & finite)
        return Inspection(signal_rows(features, score, worst, flagged, tainted, means.shape[1]), flagged)

    def substitute(self, signal: Tensor) -> Tensor:
        """A harmless stand-in of a signal's shape: the momentum for an activation, zero for a gradient."""
        value = self.momentum.value
        if self.boundary.direction is Direction.GRADIENT or value is None:
            return torch.zeros_like(signal)
        return spread_over(value, signal)

    def contribution(self, cleared: Tensor) -> Contribution:
        """The step's honest means of all senders of this process; asked for once a step.

        Args:
            cleared: ``(senders,)`` bool, whose flags of this step were all dropped, so that their flagged means count as well.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError(f"No signal crossed {self.boundary.name} in this step, so there is nothing to contribute.")
        cleared = cleared.to(self._device)
        return kept.honest.of(torch.ones_like(cleared)) + kept.suspect.of(cleared)

    def learn(self, step: Contribution | None, features: Tensor) -> None:
        """Take in one step.

        Args:
            step: honest means, summed over replicas; ``None`` if no signal was honest.
            features: ``(N, F)`` on the host, features of the step's honest signals.
        """
        settled = self.steps >= min(_SETTLING_STEPS, self._config.warmup_steps // 2) and self.momentum.value is not None
        if settled and len(features):
            self.window = torch.cat((self.window, features))[-self._config.window :]
        if step is not None:
            self.momentum.update(step)
        self.steps += 1
        if self.warmed_up:
            self._refit()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only; the fences follow from the window."""
        state = {"window": self.window, "steps": torch.tensor(self.steps)}
        return state | {f"momentum.{name}": value for name, value in self.momentum.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        prefix = "momentum."
        momentum = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.momentum.load_state_dict(momentum, self._device)
        self.window, self.steps = state["window"].cpu(), int(state["steps"])
        if self.warmed_up:
            self._refit()

    def _refit(self) -> None:
        if len(self.window) >= _FEWEST_VALUES:
            two_sided = self._config.method == "sentinel"
            self.fences = fit_fences(self.window, self._config.false_positive_rate, two_sided).to(self._device)

    def _unit_directions(self, mean: Tensor) -> Tensor:
        if self._directions is None:
            self._directions = unit_directions(mean.shape[-1], self._config.projections, self._directions_seed, self._device)
        return self._directions
