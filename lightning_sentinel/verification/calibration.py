"""What honest values look like, at every boundary and in comparison with the other replicas; and how far out a signal is.

Made of tables alone, which all ranks hold, so that all ranks score alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.drift import Cusum
from lightning_sentinel.verification.features import FEATURES, watched
from lightning_sentinel.verification.fences import Fences, FenceWindow
from lightning_sentinel.verification.peers import comparable, less_median
from lightning_sentinel.verification.table import MAX_SCORE, SignalTable
from lightning_sentinel.wiring import Wiring

__all__ = ["Assessment", "Calibration"]

_SETTLING_STEPS = 10
"""The first steps of a reference are its own noise; their distances would widen the fences."""

_STEPS_BETWEEN_FITS = 4
"""A window changes little from step to step."""


class Assessment(NamedTuple):
    """How far out every signal of a step is; all ``(boundaries, lanes, micro_batches)`` but for the first and the last.

    Args:
        by_peers: ``(boundaries,)`` bool, whether signals were compared with those of the other replicas.
        score: 0 at the centre, 1 at the fence.
        worst: index of the feature that is furthest out; -1 if the signal is not finite.
        valid: whether the signal tells anything: its micro-batch was not tainted before, its lane is live.
        centred: ``(boundaries, lanes, micro_batches, F)``, features less their median across replicas.
    """

    by_peers: Tensor
    score: Tensor
    worst: Tensor
    valid: Tensor
    centred: Tensor


_TREND_BETA = 0.9


class Calibration:
    """Windows of honest values and fences around them, of each boundary: less their trend, and less the median across replicas.

    With at least four replicas to compare, the second kind decides: what all replicas do alike does not count. The first kind is in
    force at receipt, where a process sees one replica only, and decides where there is nobody to be compared with. Its trend is a
    moving average of the honest median of each step, so that fences follow a training that moves.

    Args:
        mesh: the workers.
        config: how signals are verified.
    """

    def __init__(self, mesh: Mesh, config: Verification) -> None:
        self._mesh, self._config = mesh, config
        two_sided = config.method == "sentinel"
        names, boundaries, rate = watched(config), len(mesh.boundaries), config.false_positive_rate
        self.alone = FenceWindow(boundaries, config.window, names, rate, two_sided)
        """Features less their trend."""
        self.among_peers = FenceWindow(boundaries, config.window, names, rate, two_sided)
        """Features less the median across replicas."""
        self.drift = Cusum(boundaries, mesh.replicas, len(FEATURES))
        self.trend = torch.full((boundaries, len(FEATURES)), torch.nan)
        """``(boundaries, F)``; NaN until something honest was seen."""
        self.steps = 0
        self._compares = two_sided

    @property
    def warmed_up(self) -> bool:
        return self.steps >= self._config.warmup_steps

    def assess(self, table: SignalTable, live: Tensor, banned: Tensor) -> Assessment:
        """Score all signals of a step.

        Args:
            table: of the step.
            live: ``(lanes,)`` bool.
            banned: ``(boundaries,)``, banned workers of the stage that sends.
        """
        finite = table.column("worst") >= 0
        valid = ~table.tainted & live[:, None]
        by_peers = comparable(valid, self._mesh.replicas, banned) & self._compares & self.warmed_up
        centred = less_median(table.features, valid & finite)
        inside = self._scores(centred).amax(dim=-1) <= 1
        # Once more without those that are out, which pull the median to their side; unless most are, which no attack can do.
        kept = valid & finite & inside
        centred = torch.where(
            (2 * kept.sum(dim=(1, 2)) > valid.sum(dim=(1, 2)))[:, None, None, None], less_median(table.features, kept), centred
        )
        highest = self._scores(centred).max(dim=-1)
        score = torch.where(by_peers[:, None, None], highest.values.clamp(max=MAX_SCORE), table.column("score"))
        worst = torch.where(by_peers[:, None, None], highest.indices.to(table.rows.dtype), table.column("worst"))
        return Assessment(
            by_peers=by_peers,
            score=torch.where(finite, score, MAX_SCORE),
            worst=torch.where(finite, worst, -1.0),
            valid=valid,
            centred=centred,
        )

    def _scores(self, centred: Tensor) -> Tensor:
        boundaries, *inner = centred.shape
        return self.among_peers.fences.scores(centred.flatten(1, 2).movedim(1, 0)).movedim(0, 1).view(boundaries, *inner)

    def drifting(self, limit: float, wiring: Wiring) -> Tensor:
        """Whose cumulative sums are above ``limit``, ``(boundaries, lanes)`` bool."""
        return self.drift.height.gather(1, self._senders(wiring)) > limit

    def exonerate(self, senders: Tensor, wiring: Wiring) -> None:
        """Forget the sums of senders ``(boundaries, lanes)`` bool: an audit has told what they are."""
        workers = torch.zeros_like(senders).scatter_reduce(1, self._senders(wiring), senders, "amax")
        self.drift.reset(workers)

    def _senders(self, wiring: Wiring) -> Tensor:
        """Which replica serves a lane, ``(boundaries, lanes)``."""
        rows = [wiring.serving[boundary.sender] for boundary in self._mesh.boundaries]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self._mesh.replicas)

    def learn(self, table: SignalTable, honest: Tensor, assessment: Assessment, wiring: Wiring) -> None:
        """Take in a step.

        Args:
            table: of the step.
            honest: ``(boundaries, lanes, micro_batches)`` bool, signals to learn from.
            assessment: of the table.
            wiring: who served which lane.
        """
        if self.warmed_up:
            # Only among peers: what one replica does alone may drift with the training. Flagged or not: a drift that ends must be
            # seen to end.
            compared = assessment.valid & (assessment.worst >= 0) & assessment.by_peers[:, None, None]
            self.drift.add(self._standard_scores(assessment.centred), compared, self._senders(wiring))
        if self.steps >= max(1, min(_SETTLING_STEPS, self._config.warmup_steps // 2)):
            self.alone.add((table.features - self.trend.nan_to_num()[:, None, None]).flatten(1, 2), honest.flatten(1))
            # During the warm-up nobody lies, so all replicas can be compared with each other.
            peers = honest & (assessment.by_peers | (not self.warmed_up))[:, None, None]
            self.among_peers.add(assessment.centred.flatten(1, 2), peers.flatten(1))
        if self.steps > 0:
            # In the first step there is no reference yet, so its features say nothing.
            self._follow(table.features, honest)
        self.steps += 1
        since = self.steps - self._config.warmup_steps
        if since % _STEPS_BETWEEN_FITS == 0:
            self.fit()

    def _follow(self, features: Tensor, honest: Tensor) -> None:
        median = torch.where(honest[..., None], features, torch.nan).flatten(1, 2).nanmedian(dim=1).values
        moved = torch.lerp(median, self.trend, _TREND_BETA)
        self.trend = torch.where(median.isnan(), self.trend, torch.where(self.trend.isnan(), median, moved))

    def fences_at_receipt(self, boundary: int) -> Fences:
        """What one signal by itself is held against."""
        return self.alone.fences.of(boundary).around(self.trend[boundary].nan_to_num())

    def fit(self) -> None:
        """Fit all fences to what is remembered, once the warm-up is over."""
        if self.warmed_up:
            self.alone.fit()
            self.among_peers.fit()

    def _standard_scores(self, centred: Tensor) -> Tensor:
        fences = self.among_peers.fences
        return (centred - fences.mean[:, None, None]) / fences.sigma[:, None, None]

    def state_of(self, boundary: int) -> dict[str, Tensor]:
        """What is known of one boundary: tensors only, with memory of their own."""
        state = {
            "steps": torch.tensor(self.steps),
            "trend": self.trend[boundary].clone(),
            "drift": self.drift.sums[:, boundary].clone(),
        }
        for name, window in (("alone", self.alone), ("among_peers", self.among_peers)):
            state |= {f"{name}.{key}": value for key, value in window.state_of(boundary).items()}
        return state

    def load_state_of(self, boundary: int, state: Mapping[str, Tensor]) -> None:
        """Load one boundary. Cumulative sums of a mesh with another number of replicas are left out: they are of other workers."""
        self.steps, self.trend[boundary] = int(state["steps"]), state["trend"].cpu()
        if state["drift"].shape == self.drift.sums[:, boundary].shape:
            self.drift.sums[:, boundary] = state["drift"].cpu()
        for name, window in (("alone", self.alone), ("among_peers", self.among_peers)):
            window.load_state_of(boundary, {key: state[f"{name}.{key}"].cpu() for key in ("values", "fences")})
