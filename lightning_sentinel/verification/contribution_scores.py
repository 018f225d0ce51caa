"""How far out each worker's contribution to its stage's weight gradients is: against its replicas, and against a momentum.

All replicas of a stage estimate the same gradient, each from its own samples, so honest ones differ by as much as samples do. How
much that is depends on the run: fences are fitted to what honest workers contribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.sketches import SKETCHED
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.window import FenceRule, FenceWindow

__all__ = ["CONTRIBUTION_FEATURES", "ContributionScores", "Scored", "contribution_features"]

CONTRIBUTION_FEATURES = ("size", "distance", "agreement", "direction", "persistence")
"""Logarithms of a contribution's norm and of its distance to the median of the replicas, its cosines with that median and with the
momentum, and the logarithm of its mean deviation over the last steps; all relative to the median replica."""

_MOMENTUM_BETA = 0.9
_DEVIATION_BETA = 0.95
_RELATIVE = 1e-6
"""Differences that are smaller, relative to the gradient, are rounding."""
_TINY = 1e-30
_STEPS_BETWEEN_FITS = 4


class Scored(NamedTuple):
    """The contributions of a step.

    Args:
        score: ``(stages, replicas)``, how far out each is, 1 at the fence; 0 where there is none.
        features: ``(stages, replicas, F)``; NaN where there is no contribution, or it is not finite.
        centre: ``(stages, SKETCHED)``, the median of the replicas.
        deviations: ``(stages, replicas, SKETCHED)``, the moving average of each worker's deviations from the median.
    """

    score: Tensor
    features: Tensor
    centre: Tensor
    deviations: Tensor


def contribution_features(means: Tensor, momentum: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features of a step's contributions, with their median and with the new deviations.

    Args:
        means: ``(stages, replicas, SKETCHED)``, sketches of mean gradients; NaN where a worker has none.
        momentum: ``(stages, SKETCHED)``, of earlier medians; NaN if there is none.
        deviations: ``(stages, replicas, SKETCHED)``, the moving average so far.

    Returns:
        ``(stages, replicas, F)``, ``(stages, SKETCHED)`` and ``(stages, replicas, SKETCHED)``.

    Example:
        >>> gradient = torch.randn(SKETCHED, generator=torch.Generator().manual_seed(0))
        >>> samples = 0.1 * torch.randn(1, 5, SKETCHED, generator=torch.Generator().manual_seed(1))
        >>> means = gradient * torch.tensor([1.0, 1, 1, 1, -1])[:, None] + samples
        >>> features, *_ = contribution_features(means, gradient[None], torch.zeros_like(means))
        >>> features[0, 4, 2:4].round()  # The cosines of the one whose sign is another, less those of most.
        tensor([-2., -2.])
    """
    lengths = means.norm(dim=-1)
    centre = median(means, dim=1)
    away = means - centre[:, None]
    far = away.norm(dim=-1) + _RELATIVE * median(lengths, dim=1)[:, None]
    moved = torch.lerp(away / (median(far, dim=1)[:, None, None] + _TINY), deviations, _DEVIATION_BETA)
    moved = torch.where(moved.isnan(), deviations, moved)
    relative = [
        (lengths + _TINY).log(),
        (far + _TINY).log(),
        cosine_similarity(means, centre[:, None].expand_as(means), dim=-1),
        cosine_similarity(means, momentum[:, None].expand_as(means), dim=-1),
        torch.where(lengths.isnan(), torch.nan, (moved.norm(dim=-1) + _TINY).log()),
    ]
    features = torch.stack(relative, dim=-1)
    return features - median(features, dim=1)[:, None], centre, moved


class ContributionScores:
    """Scores contributions by fences around what honest workers contributed; the same on all ranks.

    Args:
        mesh: the workers.
        config: how signals are verified.
        rate: share of honest contributions that may be outside of the fences.

    Example:
        >>> scores = ContributionScores(Mesh(2, 3), Verification(warmup_steps=8), rate=0.01)
        >>> scores.assess(torch.ones(2, 3, SKETCHED), torch.ones(2, 3)).score
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(self, mesh: Mesh, config: Verification, rate: float) -> None:
        rule = FenceRule(torch.ones(len(CONTRIBUTION_FEATURES), dtype=torch.bool), rate, two_sided=True)
        self._window = FenceWindow(mesh.stages, config.window, rule, mesh.replicas)
        self._warmup = config.warmup_steps
        self._steps = 0
        self._momentum = torch.full((mesh.stages, SKETCHED), torch.nan)
        self._deviations = torch.zeros(mesh.stages, mesh.replicas, SKETCHED)
        self._senders = torch.arange(mesh.replicas).expand(mesh.stages, -1)

    def assess(self, sketches: Tensor, weights: Tensor) -> Scored:
        """Score the contributions of a step.

        Args:
            sketches: ``(stages, replicas, SKETCHED)``, of summed gradients.
            weights: ``(stages, replicas)``, how much data each is of; 0 for a worker that contributes nothing.
        """
        present = weights > 0
        finite = sketches.isfinite().all(dim=-1)
        # In double precision squares of what float32 holds do not overflow.
        means = (sketches.double() / weights[..., None]).masked_fill(~(present & finite)[..., None], torch.nan)
        features, *rest = (
            part.float() for part in contribution_features(means, self._momentum.double(), self._deviations.double())
        )
        known = present & finite & features.isfinite().all(dim=-1)
        fences = Fences(*(part[:, None] for part in self._window.fences.parts()))
        score = fences.scores(features).amax(dim=-1)
        # Where most of a stage have such gradients, the training overflows.
        usable = 2 * finite.logical_and(present).sum(dim=1) >= present.sum(dim=1)
        broken = present & ~finite & usable[:, None]
        return Scored(torch.where(known, score, 0.0).masked_fill(broken, MAX_SCORE).clamp(max=MAX_SCORE), features, *rest)

    def learn(self, scored: Scored, honest: Tensor) -> None:
        """Learn from a step.

        Args:
            scored: from :meth:`assess`.
            honest: ``(stages, replicas)`` bool, the contributions to learn from; those that :meth:`assess` could not score are not.
        """
        self._window.add(scored.features, honest, self._senders)
        self._deviations = scored.deviations
        followed = torch.lerp(scored.centre, self._momentum, _MOMENTUM_BETA)
        followed = torch.where(self._momentum.isnan(), scored.centre, followed)
        self._momentum = torch.where(scored.centre.isfinite(), followed, self._momentum)
        self._steps += 1
        since = self._steps - self._warmup
        if since >= 0 and since % _STEPS_BETWEEN_FITS == 0:
            self._window.fit()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, all copies."""
        state = {
            "steps": torch.tensor(self._steps),
            "momentum": self._momentum.clone(),
            "deviations": self._deviations.clone(),
        }
        for stage in range(len(self._momentum)):
            state |= {f"{stage}.{name}": value for name, value in self._window.state_of(stage).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what was learned on a mesh of as many stages; the deviations of single workers only of one of as many replicas."""
        if "steps" not in state or state["momentum"].shape != self._momentum.shape:
            return
        self._steps = int(state["steps"])
        self._momentum = state["momentum"].cpu().clone()
        if state["deviations"].shape == self._deviations.shape:
            self._deviations = state["deviations"].cpu().clone()
        for stage in range(len(self._momentum)):
            prefix = f"{stage}."
            mine = {name.removeprefix(prefix): value.cpu() for name, value in state.items() if name.startswith(prefix)}
            self._window.load_state_of(stage, mine)
