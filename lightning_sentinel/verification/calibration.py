"""What honest values look like, at every boundary and in comparison with the other replicas; and how far out a signal is.

Made of tables alone, which all ranks hold, so that all ranks score alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.audit import causal_order
from lightning_sentinel.verification.drift import Cusum
from lightning_sentinel.verification.features import FEATURES, resolution, watched
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.peers import Comparison, compare, median_vote, of_workers
from lightning_sentinel.verification.table import MAX_SCORE, SignalTable
from lightning_sentinel.verification.window import FenceWindow
from lightning_sentinel.wiring import Wiring

__all__ = ["Assessment", "Calibration", "values_needed", "values_of_warmup"]

_SETTLING_STEPS = 10
"""The first steps of a reference are its own noise; their distances would widen the fences."""

_STEPS_BETWEEN_FITS = 4
"""A window changes little from step to step."""

_TREND_BETA = 0.9
_RECENT_BETA = 0.9
_FURTHEST = 5.0
"""The highest score that is remembered: what is further out is an attack, and would fade too slowly."""


class Assessment(NamedTuple):
    """How far out every signal of a step is; all ``(boundaries, lanes, micro_batches)`` but for the first and the last.

    Args:
        by_peers: ``(boundaries,)`` bool, whether signals were compared with those of the other replicas.
        quorum: ``(boundaries,)`` bool, whether at least half of those that they were compared with sent something in this step.
        certain: ``(boundaries,)`` bool, whether those of this step would be enough without those that are remembered.
        score: 0 at the centre, 1 at the fence.
        recent: ``(boundaries, workers)``, how far out each worker has been of late at its furthest.
        typical: ``(boundaries,)``, the median of that, so how far out an honest worker has been.
        worst: index of the feature that is furthest out; -1 if the signal is not finite.
        valid: whether the signal tells anything: its micro-batch was not tainted before, its lane is live.
        opinion: ``(boundaries, F)``, the median across replicas; who could not be verified is remembered.
        centre: ``(boundaries, F)``, the same across those of this step that are in line with it. NaN where nobody sent anything
            valid yet.
    """

    by_peers: Tensor
    quorum: Tensor
    certain: Tensor
    score: Tensor
    recent: Tensor
    typical: Tensor
    worst: Tensor
    valid: Tensor
    opinion: Tensor
    centre: Tensor

    def centred(self, features: Tensor) -> Tensor:
        """Features ``(boundaries, lanes, micro_batches, F)`` less their median across replicas."""
        return features - self.centre.nan_to_num()[:, None, None]


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
        self.alone = FenceWindow(boundaries, config.window, names, rate, two_sided, mesh.replicas)
        """Features less their trend."""
        self.among_peers = FenceWindow(boundaries, config.window, names, rate, two_sided, mesh.replicas)
        """Features less the median across replicas."""
        self.drift = Cusum(boundaries, mesh.replicas, len(FEATURES))
        self.trend = torch.full((boundaries, len(FEATURES)), torch.nan)
        """``(boundaries, F)``; NaN until something honest was seen."""
        self.last = torch.full((boundaries, mesh.replicas, len(FEATURES)), torch.nan)
        """``(boundaries, replicas, F)``, what each worker sent when it last could be heard, less the trend of then."""
        self.recent = torch.zeros(boundaries, mesh.replicas)
        """``(boundaries, replicas)``, the highest score of each worker; it fades with every step in which the worker is seen."""
        self.steps = 0
        self._compares = two_sided

    @property
    def warmed_up(self) -> bool:
        return self.steps >= self._config.warmup_steps

    def assess(self, table: SignalTable, wiring: Wiring, banned: Tensor) -> Assessment:
        """Score all signals of a step.

        Args:
            table: of the step.
            wiring: who served which lane.
            banned: ``(boundaries, replicas)`` bool, workers of the stage that sends.
        """
        finite, senders = table.column("worst") >= 0, self._senders(wiring)
        valid = ~table.tainted & torch.tensor(wiring.live)[:, None]
        # Who could not be verified now votes with what it sent last: else malicious ones could get a majority of those that are
        # left.
        last = torch.where(banned[..., None], torch.nan, self.last + self.trend[:, None])

        enabled = torch.tensor(self._compares and self.warmed_up)

        def compared(boundaries: slice, counted: Tensor) -> Comparison:
            found = compare(
                table.features[boundaries],
                counted[boundaries],
                senders[boundaries],
                last[boundaries],
                banned[boundaries],
                self.among_peers.fences.of(boundaries),
            )
            return found._replace(by_peers=found.by_peers & enabled)

        counted = valid & finite
        found, heard = compared(slice(None), counted), counted
        if bool((counted & found.out).any()):
            # What is out of line puts everything out of line that comes behind it, which must not vote.
            order = causal_order(self._mesh)
            parts, heard = {}, counted.clone()
            for index in order:
                parts[index], heard[index] = compared(slice(index, index + 1), counted), counted[index]
                counted = counted & ~(valid[index] & (parts[index].out[0] | ~finite[index]))
            found = Comparison(*(torch.cat(pieces) for pieces in zip(*(parts[index] for index in sorted(order)))))
        peers = found.by_peers[:, None, None]
        score = torch.where(peers, found.score, table.column("score"))
        worst = torch.where(peers, found.worst.to(table.rows.dtype), table.column("worst"))
        score, recent = torch.where(finite, score, MAX_SCORE), self._recent(score, heard & peers, senders)
        return Assessment(
            by_peers=found.by_peers,
            quorum=found.quorum,
            certain=found.certain,
            score=score,
            recent=recent,
            typical=median_vote(torch.where(banned, torch.nan, recent)[..., None]).squeeze(1).nan_to_num(),
            worst=torch.where(finite, worst, -1.0),
            valid=valid,
            opinion=found.opinion,
            centre=found.centre,
        )

    def _recent(self, score: Tensor, counted: Tensor, senders: Tensor) -> Tensor:
        """``self.recent`` with this step; who is not seen in it stays as it was."""
        highest = torch.where(counted, score, 0.0).amax(dim=2).clamp(max=_FURTHEST)
        faded = torch.maximum(_by_worker(highest, senders), _RECENT_BETA * self.recent)
        return torch.where(_by_worker(counted.any(dim=2), senders), faded, self.recent)

    def heights(self, wiring: Wiring) -> Tensor:
        """The highest cumulative sum of who serves a lane, ``(boundaries, lanes)``."""
        return self.drift.height.gather(1, self._senders(wiring))

    def forget_sums(self, senders: Tensor, wiring: Wiring) -> None:
        """Forget the cumulative sums of senders ``(boundaries, lanes)`` bool: now it is known what they are."""
        self.drift.reset(_by_worker(senders, self._senders(wiring)))

    def _senders(self, wiring: Wiring) -> Tensor:
        """Which replica serves a lane, ``(boundaries, lanes)``."""
        rows = [wiring.serving[boundary.sender] for boundary in self._mesh.boundaries]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self._mesh.replicas)

    def learn(
        self, table: SignalTable, honest: Tensor, heard: Tensor, explained: Tensor, assessment: Assessment, wiring: Wiring
    ) -> None:
        """Take in a step.

        Args:
            table: of the step.
            honest: ``(boundaries, lanes, micro_batches)`` bool, signals to learn from.
            heard: ``(boundaries, lanes, micro_batches)`` bool, signals to remember as the word of their senders.
            explained: ``(boundaries, lanes, micro_batches)`` bool, signals that say nothing of their sender.
            assessment: of the table.
            wiring: who served which lane.
        """
        centred = assessment.centred(table.features)
        if self.warmed_up:
            # Only among peers: what one replica does alone may drift with the training. Flagged or not: a drift that ends must be
            # seen to end.
            peers = (assessment.by_peers & assessment.quorum)[:, None, None]
            compared = assessment.valid & ~explained & (assessment.worst >= 0) & peers
            senders = self._senders(wiring)
            self.drift.add(self.among_peers.standard_scores(centred, senders), compared, senders)
        if self.steps >= _settling_steps(self._config):
            sizes = resolution(table.column("positions"), table.column("channels"))
            coarsest = torch.where(honest[..., None], sizes, 0.0).amax(dim=(1, 2))
            senders = self._senders(wiring)[:, :, None].expand_as(honest).flatten(1)
            # During the warm-up nobody lies, so all replicas can be compared with each other.
            peers = honest & (assessment.by_peers | (not self.warmed_up))[:, None, None]
            by_itself = table.features - self.trend.nan_to_num()[:, None, None]
            for window, values, learned in ((self.alone, by_itself, honest), (self.among_peers, centred, peers)):
                window.resolve(coarsest)
                window.add(values.flatten(1, 2), learned.flatten(1), senders)
        if self.steps > 0:
            # In the first step there is no reference yet, so its features say nothing.
            self._follow(table.features, honest, assessment)
            sent = of_workers(table.features, heard, self._senders(wiring)) - self.trend[:, None]
            self.last = torch.where(sent.isnan(), self.last, sent)
        self.recent = assessment.recent
        self.steps += 1
        since = self.steps - self._config.warmup_steps
        if since % _STEPS_BETWEEN_FITS == 0:
            self.fit()

    def _follow(self, features: Tensor, honest: Tensor, assessment: Assessment) -> None:
        now = median(torch.where(honest[..., None], features, torch.nan).flatten(1, 2), dim=1)
        # Where others vote: of the few that are left when others are tainted, most may be malicious.
        now = torch.where(assessment.by_peers[:, None], assessment.opinion, now)
        moved = torch.lerp(now, self.trend, _TREND_BETA)
        self.trend = torch.where(now.isnan(), self.trend, torch.where(self.trend.isnan(), now, moved))

    def fences_at_receipt(self, boundary: int) -> Fences:
        """What one signal by itself is held against."""
        return self.alone.fences.of(boundary).around(self.trend[boundary].nan_to_num())

    def fit(self) -> None:
        """Fit all fences to what is remembered, once the warm-up is over."""
        if self.warmed_up:
            self.alone.fit()
            self.among_peers.fit()

    def knows_enough(self, by_peers: Tensor) -> Tensor:
        """Whether fences have seen as many honest values as their false-positive rate takes, ``(boundaries,)`` bool.

        Args:
            by_peers: ``(boundaries,)`` bool, whether signals are compared with those of the other replicas.
        """
        alone, among_peers = ((~window.values[..., 0].isnan()).sum(dim=1) for window in (self.alone, self.among_peers))
        return torch.where(by_peers, among_peers, alone) >= values_needed(self._config)

    def state_of(self, boundary: int) -> dict[str, Tensor]:
        """What is known of one boundary: tensors only, with memory of their own."""
        state = {
            "steps": torch.tensor(self.steps),
            "trend": self.trend[boundary].clone(),
            "last": self.last[boundary].clone(),
            "recent": self.recent[boundary].clone(),
            "drift": torch.stack((self.drift.sums[:, boundary], self.drift.outside[:, boundary])),
        }
        for name, window in (("alone", self.alone), ("among_peers", self.among_peers)):
            state |= {f"{name}.{key}": value for key, value in window.state_of(boundary).items()}
        return state

    def load_state_of(self, boundary: int, state: Mapping[str, Tensor]) -> None:
        """Load one boundary. What is known of single workers is left out if the mesh had another number of them."""
        self.steps, self.trend[boundary] = int(state["steps"]), state["trend"].cpu()
        drift = state["drift"].cpu()
        if drift.shape[1:] == self.drift.sums[:, boundary].shape:
            (self.drift.sums[:, boundary], self.drift.outside[:, boundary]), self.last[boundary] = drift, state["last"].cpu()
            self.recent[boundary] = state["recent"].cpu()
        for name, window in (("alone", self.alone), ("among_peers", self.among_peers)):
            prefix = f"{name}."
            window.load_state_of(boundary, {k.removeprefix(prefix): v.cpu() for k, v in state.items() if k.startswith(prefix)})


def values_needed(config: Verification) -> int:
    """How many honest values fences take: of fewer, none is expected outside of what is to be outside for one in so many.

    Example:
        >>> values_needed(Verification(false_positive_rate=0.01))
        100
    """
    return min(config.window, math.ceil(1 / config.false_positive_rate))


def values_of_warmup(config: Verification, signals: int) -> int:
    """How many honest values of a boundary fences have seen when the warm-up is over.

    Args:
        config: how signals are verified.
        signals: that cross a boundary in a step.

    Example:
        >>> values_of_warmup(Verification(warmup_steps=100), signals=8)
        720
    """
    return signals * (config.warmup_steps - _settling_steps(config))


def _settling_steps(config: Verification) -> int:
    return max(1, min(_SETTLING_STEPS, config.warmup_steps // 2))


def _by_worker(lanes: Tensor, senders: Tensor) -> Tensor:
    """``(boundaries, lanes)`` to ``(boundaries, workers)``."""
    return torch.empty_like(lanes).scatter(1, senders, lanes)
