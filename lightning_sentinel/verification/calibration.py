"""Calibration: learns the range of honest features, at each boundary and across replicas, and scores signals against it.

It uses tables alone, which all ranks hold, so that all ranks compute the same scores.
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
from lightning_sentinel.verification.window import FenceRule, FenceWindow
from lightning_sentinel.wiring import Wiring

__all__ = ["Assessment", "Calibration", "values_needed", "values_of_warmup"]

_SETTLING_STEPS = 10
"""A reference is noisy in its first steps; the distances to it would widen the fences."""

_STEPS_BETWEEN_FITS = 4
"""Fences are not fitted in every step: a window changes little from one to the next."""

_TREND_BETA = 0.9
_RECENT_BETA = 0.9
_FURTHEST = 5.0
"""The highest score that is remembered: a higher one is an attack, and would decay too slowly."""


class Assessment(NamedTuple):
    """Scores of all signals of a step; ``(boundaries, lanes, micro_batches)`` where no shape is given.

    Args:
        by_peers: ``(boundaries,)`` bool, whether signals were compared with those of the other replicas.
        quorum: ``(boundaries,)`` bool, whether at least half of the compared replicas were observed in this step.
        certain: ``(boundaries,)`` bool, whether the replicas observed in this step suffice without remembered ones.
        score: 0 at the centre, 1 at the fence.
        recent: ``(boundaries, workers)``, the highest recent score of each worker.
        typical: ``(boundaries,)``, the median of ``recent``: the recent score of an honest worker.
        worst: index of the feature that is furthest out; -1 if the signal is not finite.
        valid: whether the signal is evidence: its micro-batch was not tainted before, and its lane is live.
        opinion: ``(boundaries, F)``, the median across replicas, with remembered values of unverified replicas.
        centre: ``(boundaries, F)``, the median across replicas of this step's signals that are in line with ``opinion``; NaN before
            the first valid signal.
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
    """Two windows of honest features with fences for each boundary: features minus their trend, and minus the median of replicas.

    With at least four replicas to compare, the second window decides: a change that all replicas share does not count. The first
    applies at receipt, where a process sees one replica only, and decides where there are too few replicas to compare. The trend is
    a moving average of the honest median of each step, so that fences follow the training.

    Args:
        mesh: the workers.
        config: how signals are verified.
    """

    def __init__(self, mesh: Mesh, config: Verification) -> None:
        self._mesh = mesh
        self._config = config
        boundaries = len(mesh.boundaries)
        rule = FenceRule(watched(config), config.false_positive_rate, two_sided=config.method == "sentinel")
        self.alone = FenceWindow(boundaries, config.window, rule, mesh.replicas)
        """Features minus their trend."""
        self.among_peers = FenceWindow(boundaries, config.window, rule, mesh.replicas)
        """Features minus the median across replicas."""
        self.drift = Cusum(boundaries, mesh.replicas, len(FEATURES))
        self.trend = torch.full((boundaries, len(FEATURES)), torch.nan)
        """``(boundaries, F)``; NaN before the first honest signal."""
        self.last = torch.full((boundaries, mesh.replicas, len(FEATURES)), torch.nan)
        """``(boundaries, replicas, F)``, each worker's features when they last counted, minus the trend of that step."""
        self.recent = torch.zeros(boundaries, mesh.replicas)
        """``(boundaries, replicas)``, the highest score of each worker; it decays in every step in which the worker is observed."""
        self.steps = 0
        self._compares = rule.two_sided

    @property
    def warmed_up(self) -> bool:
        return self.steps >= self._config.warmup_steps

    def assess(self, table: SignalTable, wiring: Wiring, banned: Tensor) -> Assessment:
        """Score all signals of a step.

        Args:
            table: of the step.
            wiring: which worker served which lane.
            banned: ``(boundaries, replicas)`` bool, banned workers of the sending stage.
        """
        finite = table.column("worst") >= 0
        senders = self._senders(wiring)
        valid = ~table.tainted & torch.tensor(wiring.live)[:, None]
        # A worker that cannot be verified now votes with its last features: else malicious workers could outnumber the rest.
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
        found = compared(slice(None), counted)
        heard = counted
        if bool((counted & found.out).any()):
            # An out-of-line signal puts all signals behind it out of line, so those must not vote.
            order = causal_order(self._mesh)
            parts = {}
            heard = counted.clone()
            for index in order:
                parts[index] = compared(slice(index, index + 1), counted)
                heard[index] = counted[index]
                counted = counted & ~(valid[index] & (parts[index].out[0] | ~finite[index]))
            found = Comparison(*(torch.cat(pieces) for pieces in zip(*(parts[index] for index in sorted(order)))))
        peers = found.by_peers[:, None, None]
        score = torch.where(peers, found.score, table.column("score"))
        worst = torch.where(peers, found.worst.to(table.rows.dtype), table.column("worst"))
        recent = self._recent(score, heard & peers, senders)
        score = torch.where(finite, score, MAX_SCORE)
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

    def as_far_as_known(self, assessment: Assessment) -> Assessment:
        """Lets only non-finite signals be out of line where fences have seen too little: without audits no flag is reviewed."""
        open_to_all = ~self.knows_enough(assessment.by_peers)[:, None, None] & (assessment.worst >= 0)
        return assessment._replace(score=torch.where(open_to_all, assessment.score.clamp(max=1.0), assessment.score))

    def _recent(self, score: Tensor, counted: Tensor, senders: Tensor) -> Tensor:
        """``self.recent`` after this step; workers not observed in it keep their value."""
        highest = torch.where(counted, score, 0.0).amax(dim=2).clamp(max=_FURTHEST)
        faded = torch.maximum(_by_worker(highest, senders), _RECENT_BETA * self.recent)
        return torch.where(_by_worker(counted.any(dim=2), senders), faded, self.recent)

    def heights(self, wiring: Wiring) -> Tensor:
        """The highest cumulative sum of the worker of each lane, ``(boundaries, lanes)``."""
        return self.drift.height.gather(1, self._senders(wiring))

    def forget_sums(self, senders: Tensor, wiring: Wiring) -> None:
        """Reset the cumulative sums of senders ``(boundaries, lanes)`` bool, now that their cause is known."""
        self.drift.reset(_by_worker(senders, self._senders(wiring)))

    def _senders(self, wiring: Wiring) -> Tensor:
        """The replica that serves each lane, ``(boundaries, lanes)``."""
        rows = [wiring.serving[boundary.sender] for boundary in self._mesh.boundaries]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self._mesh.replicas)

    def learn(
        self, table: SignalTable, honest: Tensor, heard: Tensor, explained: Tensor, assessment: Assessment, wiring: Wiring
    ) -> None:
        """Learn from a step.

        Args:
            table: of the step.
            honest: ``(boundaries, lanes, micro_batches)`` bool, signals to learn from.
            heard: ``(boundaries, lanes, micro_batches)`` bool, signals to remember as the votes of their senders.
            explained: ``(boundaries, lanes, micro_batches)`` bool, signals that are no evidence about their sender.
            assessment: of the table.
            wiring: which worker served which lane.
        """
        centred = assessment.centred(table.features)
        if self.warmed_up:
            # Only relative to peers: one replica's features drift with the training. Flagged signals too: a drift that ends must be
            # seen to end.
            peers = (assessment.by_peers & assessment.quorum)[:, None, None]
            compared = assessment.valid & ~explained & (assessment.worst >= 0) & peers
            senders = self._senders(wiring)
            self.drift.add(self.among_peers.standard_scores(centred, senders), compared, senders)
        if self.steps >= _settling_steps(self._config):
            sizes = resolution(table.column("positions"), table.column("channels"))
            coarsest = torch.where(honest[..., None], sizes, 0.0).amax(dim=(1, 2))
            senders = self._senders(wiring)[:, :, None].expand_as(honest).flatten(1)
            # During the warm-up no worker lies, so all replicas can be compared with each other.
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
        # With peers, their median: of the few signals left when others are tainted, most may be malicious.
        now = torch.where(assessment.by_peers[:, None], assessment.opinion, now)
        moved = torch.lerp(now, self.trend, _TREND_BETA)
        self.trend = torch.where(now.isnan(), self.trend, torch.where(self.trend.isnan(), now, moved))

    def fences_at_receipt(self, boundary: int) -> Fences:
        """The fences for a single signal, without peers."""
        return self.alone.fences.of(boundary).around(self.trend[boundary].nan_to_num())

    def usual_row(self, boundary: int) -> Tensor:
        """The row of an ordinary signal, ``(F + 1,)``: the trend of its features, NaN where unknown, and that it is not tainted."""
        return torch.cat((self.trend[boundary], torch.zeros(1)))

    def fit(self) -> None:
        """Fit all fences to the remembered values, once the warm-up is over."""
        if self.warmed_up:
            self.alone.fit()
            self.among_peers.fit()

    def knows_enough(self, by_peers: Tensor) -> Tensor:
        """Whether fences have seen as many honest values as their false-positive rate needs, ``(boundaries,)`` bool.

        Args:
            by_peers: ``(boundaries,)`` bool, whether signals are compared with those of the other replicas.
        """
        alone, among_peers = ((~window.values[..., 0].isnan()).sum(dim=1) for window in (self.alone, self.among_peers))
        return torch.where(by_peers, among_peers, alone) >= values_needed(self._config)

    def state_of(self, boundary: int) -> dict[str, Tensor]:
        """The state of one boundary: tensors only, all copies."""
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
        """Load one boundary. State of single workers is skipped if the mesh had another number of them."""
        self.steps = int(state["steps"])
        self.trend[boundary] = state["trend"].cpu()
        drift = state["drift"].cpu()
        if drift.shape[1:] == self.drift.sums[:, boundary].shape:
            self.drift.sums[:, boundary], self.drift.outside[:, boundary] = drift
            self.last[boundary] = state["last"].cpu()
            self.recent[boundary] = state["recent"].cpu()
        for name, window in (("alone", self.alone), ("among_peers", self.among_peers)):
            prefix = f"{name}."
            window.load_state_of(boundary, {k.removeprefix(prefix): v.cpu() for k, v in state.items() if k.startswith(prefix)})


def values_needed(config: Verification) -> int:
    """How many honest values fences need: of fewer, not one is expected outside at the false-positive rate.

    Example:
        >>> values_needed(Verification(false_positive_rate=0.01))
        100
    """
    return min(config.window, math.ceil(1 / config.false_positive_rate))


def values_of_warmup(config: Verification, signals: int) -> int:
    """How many honest values of a boundary fences have seen when the warm-up is over.

    Args:
        config: how signals are verified.
        signals: how many cross a boundary in a step.

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
