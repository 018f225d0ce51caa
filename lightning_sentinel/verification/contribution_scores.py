"""How far out each worker's contribution to its stage's weight gradients is: against its replicas, and against a momentum.

All replicas of a stage estimate the same gradient, each from its own samples. With few samples most of what they contribute is
noise, along some directions far more than along others. So contributions are seen in units of that noise, whose covariance is
learned. What is never far out, but always on the same side, shows in moving averages. How far out is too far, fences fitted to
honest contributions say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.sketches import SKETCHED
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.window import FenceRule, FenceWindow

__all__ = [
    "CONTRIBUTION_FEATURES",
    "ContributionScores",
    "Reference",
    "Scored",
    "among_replicas",
    "contribution_features",
    "whitening_of",
]

CONTRIBUTION_FEATURES = ("size", "distance", "direction", "persistence")
"""The logarithm of a contribution's norm; that of its Mahalanobis distance to the median replica; the moving average of its
whitened cosine with the momentum and the other replicas together; and the logarithm of the Mahalanobis norm of the moving average
of its deviation, where that is above the usual. All relative to the median replica."""

_MOMENTUM_BETA = 0.8
_AGREEMENT_BETA = 0.9
_DEVIATION_BETA = 0.95
_COVARIANCE_BETA = 0.95
_RIDGE = 0.1
"""Of the mean variance: nothing is known of directions along which hardly any noise was seen yet."""
_FURTHEST = 2.0
"""How many times as far as the median replica's a deviation counts at most as noise."""
_FEWEST = 2
_RATE = 0.05
"""Share of honest contributions that fences are fitted to leave outside; what is outside is only recomputed. Fences leave room for
more than the values that they were fitted to, so that far fewer are."""
_OVERWHELMING = math.log(4)
"""A contribution that is larger than so many of the median replica's is out of line, however far the fences are: they leave room
for as much as honest ones of the warm-up were now and then, which may outweigh all others in the sum."""
_RELATIVE = 1e-6
"""Differences that are smaller, relative to the gradient, are rounding."""
_TINY = 1e-30
_STEPS_BETWEEN_FITS = 4
_SETTLING_STEPS = 10


class Reference(NamedTuple):
    """What is known of the contributions of each stage, all in double precision.

    Args:
        momentum: ``(stages, SKETCHED)``, moving average of the median replica.
        deviations: ``(stages, replicas, SKETCHED)``, moving average of each worker's deviation from the median replica.
        covariance: ``(stages, SKETCHED, SKETCHED)``, of honest deviations around their moving averages.
        agreement: ``(stages, replicas)``, moving average of each worker's cosine with the others.
        whitening: ``(stages, SKETCHED, SKETCHED)``, from :func:`whitening_of` the covariance some steps ago.
        votes: ``(stages, replicas, F)``, each worker's features when it last contributed, before the median was subtracted.
    """

    momentum: Tensor
    deviations: Tensor
    covariance: Tensor
    agreement: Tensor
    whitening: Tensor
    votes: Tensor

    @classmethod
    def empty(cls, stages: int, replicas: int) -> Reference:
        zeros = partial(torch.zeros, dtype=torch.float64)
        identity = torch.eye(SKETCHED, dtype=torch.float64).repeat(stages, 1, 1)
        return cls(
            momentum=zeros(stages, SKETCHED),
            deviations=zeros(stages, replicas, SKETCHED),
            covariance=torch.zeros_like(identity),
            agreement=zeros(stages, replicas),
            whitening=identity,
            votes=torch.full((stages, replicas, len(CONTRIBUTION_FEATURES)), torch.nan, dtype=torch.float64),
        )

    def trusted(self, present: Tensor) -> Tensor:
        """``(stages, replicas)`` bool, whose contributions say where the gradient points.

        Not those that mostly point away from the others: without them it is seen more clearly.

        Args:
            present: ``(stages, replicas)`` bool, who contributes.
        """
        trusted = present & (self.agreement >= 0)
        return torch.where(trusted.sum(dim=1, keepdim=True) >= _FEWEST, trusted, present)


class Scored(NamedTuple):
    """The contributions of a step.

    Args:
        score: ``(stages, replicas)``, how far out each is, 1 at the fence; 0 where there is none.
        features: ``(stages, replicas, F)``; NaN where there is no contribution, or it is not finite.
        means: ``(stages, replicas, SKETCHED)``, sketches of mean gradients; NaN likewise.
        agreement: ``(stages, replicas)``, the moving average of each worker's cosine with the others, this step included.
        votes: ``(stages, replicas, F)``, the features before their median was subtracted.
    """

    score: Tensor
    features: Tensor
    means: Tensor
    agreement: Tensor
    votes: Tensor


def whitening_of(covariance: Tensor, lengths: Tensor) -> Tensor:
    """Matrices that make noise of these covariances white, both ``(stages, SKETCHED, SKETCHED)``.

    Args:
        covariance: of the noise.
        lengths: ``(stages,)``, norms of the gradients, which tell what is rounding.

    Example:
        >>> whitening = whitening_of(4 * torch.eye(3).double()[None], torch.ones(1))
        >>> (whitening @ (4 * torch.eye(3).double()) @ whitening.mT).diagonal(dim1=1, dim2=2).round(decimals=1)
        tensor([[0.9000, 0.9000, 0.9000]], dtype=torch.float64)
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    least = _RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(dim=1) + (_RELATIVE * lengths).square() + _TINY
    factor = torch.linalg.cholesky(covariance + least[:, None, None] * identity)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def contribution_features(means: Tensor, known: Reference) -> tuple[Tensor, Tensor]:
    """The features of a step's contributions, ``(stages, replicas, F)``, and the new agreement, ``(stages, replicas)``.

    They are yet to be compared with those of the other replicas.

    Args:
        means: ``(stages, replicas, SKETCHED)``, sketches of mean gradients; NaN where a worker has none.
        known: from earlier steps.

    Example:
        >>> gradient = torch.randn(SKETCHED, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> samples = 0.1 * torch.randn(1, 5, SKETCHED, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> means = gradient * torch.tensor([1.0, 1, 1, 1, -1])[:, None] + samples
        >>> features, agreement = contribution_features(means, Reference.empty(1, 5)._replace(momentum=gradient[None]))
        >>> (agreement > 0).tolist()  # The sign of the last one is another.
        [[True, True, True, True, False]]
    """
    lengths = means.norm(dim=-1)
    present = ~lengths.isnan()
    filled = means.nan_to_num()
    away = filled - median(means, dim=1)[:, None].nan_to_num()
    rows = torch.cat((filled, away, known.deviations, known.momentum[:, None]), dim=1) @ known.whitening.mT
    white, distances, deviations, momentum = rows.split((*[means.shape[1]] * 3, 1), dim=1)
    # As unit vectors, so that a large contribution says no more than others of where the gradient points.
    own = normalize(white, dim=-1)
    said = own * known.trusted(present)[..., None]
    others = normalize(said.sum(dim=1, keepdim=True) - said, dim=-1)
    cosine = (own * normalize(others + normalize(momentum, dim=-1), dim=-1)).sum(dim=-1)
    agreement = torch.where(present, torch.lerp(cosine, known.agreement, _AGREEMENT_BETA), known.agreement)
    relative = [
        (lengths + _TINY).log(),
        (distances.norm(dim=-1) + _TINY).log(),
        agreement,
        (deviations.norm(dim=-1) + _TINY).log(),
    ]
    return torch.stack(relative, dim=-1).masked_fill(~present[..., None], torch.nan), agreement


def among_replicas(features: Tensor, votes: Tensor) -> Tensor:
    """Features ``(stages, replicas, F)`` relative to the median replica.

    Args:
        features: from :func:`contribution_features`.
        votes: of the same shape, the earlier features of workers that rest in this step, else NaN: of those that are left most may
            be liars.

    Example:
        >>> features, votes = torch.full((1, 5, 4), torch.nan), torch.full((1, 5, 4), torch.nan)
        >>> features[0, :4, 0], votes[0, 4:, 0] = torch.tensor([0.0, 1.0, 9.0, 9.0]), 0.5
        >>> among_replicas(features, votes)[0, :, 0]
        tensor([-1.,  0.,  8.,  8., nan])
    """
    relative = features - median(torch.where(features.isnan(), votes, features), dim=1)[:, None]
    # Deviations that cancel out are nobody's fault, and neither are those that begin anew.
    relative[..., -1].clamp_(min=0.0)
    return relative


class ContributionScores:
    """Scores contributions by what honest workers contributed; the same on all ranks.

    Args:
        mesh: the workers.
        config: how signals are verified.

    Example:
        >>> scores = ContributionScores(Mesh(2, 3), Verification(warmup_steps=8))
        >>> bool((scores.assess(torch.ones(2, 3, SKETCHED), torch.ones(2, 3)).score > 1).any())
        False
    """

    def __init__(self, mesh: Mesh, config: Verification) -> None:
        rule = FenceRule(torch.ones(len(CONTRIBUTION_FEATURES), dtype=torch.bool), _RATE, two_sided=True)
        self._window = FenceWindow(mesh.stages, config.window, rule, mesh.replicas)
        self._warmup = config.warmup_steps
        self._steps = 0
        self._known = Reference.empty(mesh.stages, mesh.replicas)
        self._senders = torch.arange(mesh.replicas).expand(mesh.stages, -1)

    def assess(self, sketches: Tensor, weights: Tensor, absent: Tensor | None = None) -> Scored:
        """Score the contributions of a step.

        Args:
            sketches: ``(stages, replicas, SKETCHED)``, of summed gradients.
            weights: ``(stages, replicas)``, how much data each is of; 0 for a worker that contributes nothing.
            absent: ``(stages, replicas)`` bool, workers that are banned or found out, with which nobody is compared; ``None`` if
                there are none.
        """
        present = weights > 0
        finite = present & sketches.isfinite().all(dim=-1)
        # In double precision squares of what float32 holds do not overflow.
        means = (sketches.double() / weights[..., None]).masked_fill(~finite[..., None], torch.nan)
        found, agreement = contribution_features(means, self._known)
        unheard = present if absent is None else present | absent
        features = among_replicas(found, self._known.votes.masked_fill(unheard[..., None], torch.nan)).float()
        fences = Fences(*(part[:, None] for part in self._window.fences.parts()))
        score = fences.scores(features).amax(dim=-1)
        if self._steps >= self._warmup:
            score = torch.maximum(score, features[..., 0] / _OVERWHELMING)
        score = torch.where(finite, score, 0.0)
        # Where most of a stage have such gradients, the training overflows.
        usable = 2 * finite.sum(dim=1) >= present.sum(dim=1)
        score = score.masked_fill(present & ~finite & usable[:, None], MAX_SCORE).clamp(max=MAX_SCORE)
        return Scored(score, features, means, agreement, found)

    def learn(self, scored: Scored, honest: Tensor, cleared: Tensor) -> None:
        """Learn from a step.

        Args:
            scored: from :meth:`assess`.
            honest: ``(stages, replicas)`` bool, the contributions to learn from.
            cleared: ``(stages, replicas)`` bool, workers whose contribution was recomputed and matched: what has added up over
                steps begins anew, or they would be audited in every step.
        """
        honest = honest & ~scored.features.isnan().any(dim=-1)
        self._follow(scored, honest)
        if self._steps >= min(_SETTLING_STEPS, self._warmup // 2):
            self._window.add(scored.features, honest, self._senders)
        self._known.deviations[cleared] = 0.0
        self._known.agreement[cleared] = median(self._known.agreement, dim=1)[:, None].expand_as(cleared)[cleared]
        self._steps += 1
        since = self._steps - self._warmup
        if since >= 0 and since % _STEPS_BETWEEN_FITS == 0:
            self._window.fit()

    def _follow(self, scored: Scored, honest: Tensor) -> None:
        momentum, deviations, covariance, agreement, whitening, votes = self._known
        means = scored.means.masked_fill(~honest[..., None], torch.nan)
        centre = median(means, dim=1)
        pointing = median(means.masked_fill(~self._known.trusted(honest)[..., None], torch.nan), dim=1)
        seen = honest.any(dim=1)
        first = self._steps == 0
        away = torch.where(honest[..., None], means - centre[:, None], 0.0)
        # What a worker always adds is no noise: it must not make its own directions look noisy.
        noise = torch.where(honest[..., None], away - deviations, 0.0)
        far = torch.where(honest, noise.norm(dim=-1), torch.nan)
        shares = (_FURTHEST * median(far, dim=1)[:, None] / (far + _TINY)).nan_to_num().clamp(max=1.0)
        noise = noise * shares[..., None]
        spread = noise.mT @ noise / honest.sum(dim=1).clamp(min=1)[:, None, None]
        moved = torch.lerp(away, deviations, _DEVIATION_BETA)
        self._known = Reference(
            torch.where(
                seen[:, None], pointing.nan_to_num() if first else torch.lerp(pointing, momentum, _MOMENTUM_BETA), momentum
            ),
            torch.where(honest[..., None], moved, deviations),
            torch.where(seen[:, None, None], spread if first else torch.lerp(spread, covariance, _COVARIANCE_BETA), covariance),
            torch.where(honest, scored.agreement, agreement),
            whitening,
            torch.where(honest[..., None], scored.votes, votes),
        )
        if self._steps % _STEPS_BETWEEN_FITS == 0:
            lengths = median(means.norm(dim=-1), dim=1).nan_to_num()
            self._known = self._known._replace(whitening=whitening_of(self._known.covariance, lengths))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, all copies."""
        state = {"steps": torch.tensor(self._steps)} | {name: part.clone() for name, part in self._known._asdict().items()}
        for stage in range(len(self._senders)):
            state |= {f"{stage}.{name}": value for name, value in self._window.state_of(stage).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what was learned on a mesh of as many stages; that of single workers only of one of as many replicas."""
        if "steps" not in state or state["momentum"].shape != self._known.momentum.shape:
            return
        self._steps = int(state["steps"])
        saved = Reference(**{name: state[name].cpu().clone() for name in Reference._fields})
        if saved.deviations.shape != self._known.deviations.shape:
            own = self._known
            saved = saved._replace(deviations=own.deviations, agreement=own.agreement, votes=own.votes)
        self._known = saved
        for stage in range(len(self._senders)):
            prefix = f"{stage}."
            mine = {name.removeprefix(prefix): value.cpu() for name, value in state.items() if name.startswith(prefix)}
            self._window.load_state_of(stage, mine)
