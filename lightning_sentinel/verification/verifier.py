"""The verifier of one boundary: it measures the signals that cross it, flags at receipt, and learns from honest signals.

A signal is judged at receipt by the fences in force. No branch depends on a tensor, so that the host never waits for a GPU.
References are updated once it is known which signals were honest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification.axes import spread_over
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.measurement import Measurement, measure, measure_published
from lightning_sentinel.verification.projection import PROJECTED, Projection, SecretDirections
from lightning_sentinel.verification.references import Contribution, References
from lightning_sentinel.verification.table import MAX_SCORE, signal_rows

__all__ = ["BoundaryVerifier", "Inspection", "Report"]

Report = Callable[[Tensor], Tensor]
"""Takes what was measured of signals, ``(senders, len(FEATURES) + 1)``, last whether they are tainted; returns what is reported."""


class Inspection(NamedTuple):
    """A verifier's results for the senders' signals: table rows ``(senders, len(COLUMNS))`` and verdicts ``(senders,)``."""

    rows: Tensor
    flagged: Tensor


class _StepSums(NamedTuple):
    """Sums of the current step to learn from.

    Args:
        sums: with leading axes ``(2, lanes)``: of signals that were not flagged at receipt, and of flagged ones, whose flags may
            still be dropped.
        sizes: names of the statistics, and how many floats each has.
    """

    sums: Contribution
    sizes: Mapping[str, int]


class BoundaryVerifier:
    """Verifies all signals that cross one boundary.

    Every process that receives across it holds a verifier with the same state, because all learn from the same table and the same
    sum of contributions. A process receives from one sender, or, where it runs the whole mesh, from one sender of each replica.

    State: ``T x C`` momentum, ``C`` channel spreads, ``16 x 16`` products, and, where senders receive something, the ``33 x 33``
    products and ``33 x 16`` weights of a ridge regression.

    Args:
        boundary: the stream to verify.
        config: how.
        device: of the signals.
    """

    def __init__(self, boundary: Boundary, config: Verification, device: torch.device | str = "cpu") -> None:
        self.boundary = boundary
        self._published = config.method == "paper"
        self._device = torch.device(device)
        gradient = boundary.direction is Direction.GRADIENT
        self.references = References(config.beta_gradient if gradient else config.beta_activation)
        self.fences = Fences.open(len(FEATURES), device=self._device)
        """The fences in force; see :class:`lightning_sentinel.verification.calibration.Calibration`."""
        self.limits = torch.ones(1, device=self._device)
        """The score above which a signal is flagged at receipt: one for all, or ``(lanes,)``, that of each lane's sender."""
        self._secret = SecretDirections(boundary, config, self._device)
        self._step_sums: _StepSums | None = None

    def use_secret(self, config: Verification) -> None:
        """Project signals on the directions of another seed from now on."""
        self._secret = SecretDirections(self.boundary, config, self._device)

    def inspect(
        self,
        signals: Tensor,
        tainted: Tensor,
        received: Projection | None = None,
        lanes: Tensor | None = None,
        of: int | None = None,
        report: Report | None = None,
    ) -> Inspection:
        """Measure the signals that this process received in one micro-batch, and keep their sums for :meth:`learn`.

        Args:
            signals: ``(senders * B, ...)``, floating point: the senders' signals, concatenated.
            tainted: ``(senders,)`` bool; a tainted signal is scored, never flagged, and never learned from.
            received: the signals that the senders received, on the secret directions of this boundary; ``None`` at the ends of the
                pipeline.
            lanes: ``(senders,)``, the lanes that they serve; ``None`` if they are in order. A worker may have sent several of the
                signals.
            of: how many lanes there are, if not as many as senders: signals of other shapes come in a separate call.
            report: what a simulated attacker reports in place of what was measured; ``None`` for an honest receiver.
        """
        rows, flagged = self._inspect(signals.detach(), tainted, received, lanes, of, report)
        return Inspection(rows.clone(), flagged.clone())  # Outside of inference mode, so that autograd can use them.

    @torch.inference_mode()
    def measure_again(self, signals: Tensor, tainted: Tensor, received: Projection | None = None) -> Tensor:
        """The rows ``(senders, len(COLUMNS))`` that an honest receiver reports of signals, without keeping anything of them.

        For an audit of what another receiver reported: until the step's signals are learned from, references and fences are those
        that were in force at receipt. Arguments are those of :meth:`inspect`.
        """
        measured = self._measure(signals.detach(), len(tainted), received)
        return self._judged(measured, tainted, torch.ones(1, device=self._device)).rows.clone()

    # Most operations here are on a few floats, and without the bookkeeping for views and versions each takes a fifth less time.
    @torch.inference_mode()
    def _inspect(
        self,
        signals: Tensor,
        tainted: Tensor,
        received: Projection | None,
        lanes: Tensor | None,
        of: int | None,
        report: Report | None,
    ) -> Inspection:
        measured = self._measure(signals, len(tainted), received)
        if report is not None:
            told = report(torch.cat((measured.features, tainted[:, None].to(measured.features.dtype)), dim=1))
            measured, tainted = measured._replace(features=told[:, :-1]), told[:, -1] != 0
        limits = self.limits if lanes is None or len(self.limits) == 1 else self.limits[lanes]
        found = self._judged(measured, tainted, limits)
        self._keep(measured, found.flagged, ~tainted & measured.finite, lanes, len(tainted) if of is None else of)
        return found

    def _judged(self, measured: Measurement, tainted: Tensor, limits: Tensor) -> Inspection:
        broken = ~measured.finite
        highest = self.fences.scores(measured.features).max(dim=1)
        score = highest.values.clamp(max=MAX_SCORE).masked_fill(broken, MAX_SCORE)
        worst = highest.indices.masked_fill(broken, -1)
        flagged = (score > limits) & ~tainted
        return Inspection(signal_rows(measured.features, score, worst, flagged, tainted, *measured.means.shape[1:]), flagged)

    def _measure(self, signals: Tensor, senders: int, received: Projection | None) -> Measurement:
        if self._published:
            return measure_published(signals, senders, self.references, self._secret)
        return measure(signals, senders, received, self.references, self._secret)

    def _keep(self, measured: Measurement, flagged: Tensor, usable: Tensor, lanes: Tensor | None, of: int) -> None:
        means = measured.means
        statistics = measured.statistics
        if self._step_sums is None:
            both = (part[:1].expand(2, of, *part.shape[1:]) for part in (means, statistics))
            self._step_sums = _StepSums(Contribution.like(*both), measured.sizes)
        suspect = usable & flagged
        self._step_sums.sums.add(means, statistics, torch.stack((usable ^ suspect, suspect)).float(), lanes)

    def substitute(self, signal: Tensor) -> Tensor:
        """A harmless stand-in of a signal's shape: the momentum for an activation, zero for a gradient."""
        value = self.references.momentum.value
        if self.boundary.direction is Direction.GRADIENT or value is None:
            return torch.zeros_like(signal)
        return spread_over(value, signal)

    def stand_by(self, positions: int, channels: int, received: int | None) -> None:
        """Keep an empty contribution of a step without signals, in the shapes of ranks that received signals.

        Args:
            positions: of the signals.
            channels: of the signals.
            received: channels of the signals that the senders received; ``None`` at the ends of the pipeline.
        """
        nothing = torch.zeros(1, positions, channels, device=self._device)
        tainted = torch.ones(1, dtype=torch.bool)
        projected = None
        if received is not None:
            values = torch.zeros(1, positions, min(received, PROJECTED), device=self._device)
            projected = Projection(values, received)
        self.inspect(nothing, tainted.to(self._device), projected)

    def forget_step(self) -> None:
        """Drop the sums of the step, which is to be done again."""
        self._step_sums = None

    def contribution(self, unflagged: Tensor, flagged: Tensor) -> Contribution:
        """The step's contribution, summed over the lanes that this process receives from; called once a step.

        Args:
            unflagged: ``(lanes,)`` bool, lanes whose signals count if they were not flagged at receipt.
            flagged: ``(lanes,)`` bool, lanes whose signals count if they were flagged at receipt.
        """
        if self._step_sums is None:
            raise RuntimeError(f"No signal crossed {self.boundary.name} in this step, so there is nothing to contribute.")
        return self._step_sums.sums.of(torch.stack((unflagged, flagged)).to(self._device))

    @property
    def sizes(self) -> Mapping[str, int]:
        """Names of the statistics of this step, and how many floats each has."""
        return {} if self._step_sums is None else self._step_sums.sizes

    def learn(self, step: Contribution | None) -> None:
        """Update with one step's honest signals, summed over all senders; ``None`` if no signal was honest."""
        kept = self._step_sums
        self._step_sums = None
        if step is not None and kept is not None:
            self.references.update(step, kept.sizes)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only."""
        return self.references.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.references.load_state_dict(state, self._device)
