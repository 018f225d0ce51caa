"""User settings: how signals are verified, and how a run responds to flags and lies."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker

__all__ = ["DEFAULT_AUDIT_RATE", "Aggregation", "Response", "Verification"]

DEFAULT_AUDIT_RATE = 0.01
"""The default; the user did not ask for it, so a mesh where audits are impossible is no contradiction."""

Aggregation = Literal["mean", "trimmed_mean", "median", "krum", "multi_krum", "centred_clipping"]
"""How the gradients of a stage's workers become one; see :mod:`lightning_sentinel.aggregation.rules`."""


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={value!r} cannot work: it must be {rule}.")


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether a setting is a whole number, and at least ``least``; a bool is none, whatever Python says."""
    return isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _between(least: float, value: float, below: float) -> bool:
    return _is_number(value) and least <= value < below


@dataclass(frozen=True)
class Verification:
    """How signals are verified at the stage boundaries.

    Args:
        method: ``"sentinel"`` fences every feature on both sides; ``"paper"`` is the published rule, which only asks
            whether a signal is too far from its momentum (SENTINEL, arXiv 2603.03592).
        warmup_steps: steps in which the momentum and the fences are learned and no worker is flagged, except for values that are
            not finite. All workers must be honest until then.
        window: how many honest signals of a boundary its fences look back on.
        false_positive_rate: share of honest signals that may be flagged, over all features together.
        beta_activation: decay of the momentum of activations.
        beta_gradient: decay of the momentum of gradients.
        projections: random directions of the sliced Wasserstein distance.
        features: which features or families of features are watched, by name; ``None`` watches all of the method's. See
            :data:`lightning_sentinel.verification.features.FAMILIES`.
        seed: of the secret directions. Workers must not know it. ``None`` draws it from the operating system, the same on all
            ranks, and keeps it in checkpoints; what is audited each worker draws by itself then, and nobody else knows it. A number
            makes runs repeatable, in tests and benchmarks: whoever knows it knows the directions and all draws.

    Raises:
        ConfigurationError: if a value cannot work.

    Example:
        >>> import lightning_sentinel as ls
        >>> ls.Verification(warmup_steps=50).method
        'sentinel'
    """

    method: Literal["sentinel", "paper"] = "sentinel"
    warmup_steps: int = 100
    window: int = 512
    false_positive_rate: float = 0.01
    beta_activation: float = 0.9
    beta_gradient: float = 0.8
    projections: int = 16
    features: Sequence[str] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.method in ("sentinel", "paper"), "Verification.method", self.method, "'sentinel' or 'paper'")
        for name, least in (("warmup_steps", 1), ("window", 8), ("projections", 1)):
            value = getattr(self, name)
            _require(is_whole(value, least), f"Verification.{name}", value, f"a whole number, at least {least}")
        rate = self.false_positive_rate
        rule = "a rate between 0 and 1, both excluded"
        _require(_between(0, rate, 1) and rate > 0, "Verification.false_positive_rate", rate, rule)
        for name in ("beta_activation", "beta_gradient"):
            beta = getattr(self, name)
            _require(_between(0, beta, 1), f"Verification.{name}", beta, "a number, at least 0 and below 1")
        names = self.features
        listed = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
        _require(names is None or listed, "Verification.features", names, "None or a list of names")
        seed = self.seed
        rule = "None, or an integer of 64 bits"
        _require(seed is None or (is_whole(seed) and -(2**63) <= seed < 2**63), "Verification.seed", seed, rule)


@dataclass(frozen=True)
class Response:
    """What happens when a signal is flagged, or a worker is found to lie.

    Args:
        on_flag: ``"exclude"`` keeps the micro-batch out of the weights; ``"log"`` only reports.
        ban_after: without audits, a worker of which at least half the signals were flagged in this many consecutive steps is
            banned, and others of its stage do its work from then on; in more of them if others of its stage are flagged as well,
            because another worker's lie may be the cause. With audits, a worker that is found to lie is banned. Bans are limited to
            fewer than half of a stage, or one of two. ``None`` bans no worker.
        audit_rate: share of all signals that is recomputed by an honest other replica of the same stage, however many of them are
            malicious, drawn at random by each replica for itself; flagged signals are recomputed as well, and activations of the
            first stage and gradients of the last are drawn up to four times as often. If an auditor reports a mismatch, all others
            of the stage recompute the signal, and the majority decides: then the step is done again without its sender, which is
            banned at once where its stage has at least five live workers, the second time where it has three or four, and never
            where it has two. A flag whose signal matches is dropped. 1 recomputes everything. The default holds wherever a stage
            has at least two replicas; where it has one, no worker can recompute anything, and the run says so. ``None``: no audits,
            flags alone decide.
        gradient_audit_rate: share of all workers whose contribution to the weight gradients of their stage is recomputed as a whole
            in a step, drawn at random; contributions that are out of line are recomputed as well. Decided as for signals. ``None``
            recomputes none, and so does ``audit_rate=None``.
        false_accusations: in how many steps most of its stage must have found the opposite of what a worker says in audits, that
            something does not match or that it does, before it is banned for that. Until then its word counts. In stages of fewer
            than five live workers it loses its word the first time instead, and is not banned for it. ``None`` does so everywhere,
            and so does ``ban_after=None``.
        aggregation: how the gradients of a stage's workers become one. ``"mean"`` believes all workers that are not banned; the
            other rules bound what a minority of them can do: ``"trimmed_mean"`` and ``"median"`` of every coordinate (Yin et al.,
            2018), ``"krum"`` and ``"multi_krum"`` (Blanchard et al., 2017), ``"centred_clipping"`` (Karimireddy et al., 2021).
            All but the mean need at least 3 workers a stage: of fewer, no minority can be outvoted.
        tolerated: how many workers of a stage may send arbitrary gradients, for ``aggregation`` other than ``"mean"``. ``None``,
            and at most: fewer than half of the workers that took part in a step; with ``"krum"`` and ``"multi_krum"`` so few that
            ``2 f + 2 < n``, or one of three or four.
        banned: workers that are banned from the first step on, such as those that an earlier run on the same machines banned:
            workers, or pairs ``(stage, replica)``; see :meth:`lightning_sentinel.Ledger.export`.
        ledger: path of a JSON file to which every ban is written, and from which bans are read at the start if it exists. In a run
            on several machines the machines of banned workers are left out from then on, and the others form the largest mesh that
            they can; on a single machine the same places are banned. All machines have to be able to read and write it, as they do
            checkpoints. A worker whose malformed message ends the run is entered as well. If the file exists, it decides which
            workers are banned, and not the checkpoint that a run resumes from: remove an entry to let a machine in again. A machine
            is known by its host name, or by the environment variable ``LIGHTNING_SENTINEL_HOST``. ``None`` keeps no such file.

    Raises:
        ConfigurationError: if a value cannot work.

    Example:
        >>> import lightning_sentinel as ls
        >>> ls.Response(on_flag="log", ban_after=None)
        Response(on_flag='log', ban_after=None, audit_rate=0.01, gradient_audit_rate=0.005, false_accusations=3, \
aggregation='mean', tolerated=None, banned=(), ledger=None)
    """

    on_flag: Literal["exclude", "log"] = "exclude"
    ban_after: int | None = 5
    audit_rate: float | None = DEFAULT_AUDIT_RATE
    gradient_audit_rate: float | None = 0.005
    false_accusations: int | None = 3
    aggregation: Aggregation = "mean"
    tolerated: int | None = None
    banned: Sequence[Worker | tuple[int, int]] = ()
    ledger: str | Path | None = None

    def __post_init__(self) -> None:
        _require(self.on_flag in ("exclude", "log"), "Response.on_flag", self.on_flag, "'exclude' or 'log'")
        for name in ("ban_after", "false_accusations", "tolerated"):
            value = getattr(self, name)
            _require(value is None or is_whole(value, 1), f"Response.{name}", value, "None or a whole number, at least 1")
        rule = "None, or a share above 0 and at most 1: attacks that no feature shows are found by chance alone"
        for name in ("audit_rate", "gradient_audit_rate"):
            rate = getattr(self, name)
            _require(rate is None or (_is_number(rate) and 0 < rate <= 1), f"Response.{name}", rate, rule)
        names = get_args(Aggregation)
        _require(self.aggregation in names, "Response.aggregation", self.aggregation, f"one of {', '.join(map(repr, names))}")
        ledger = self.ledger
        rule = "None, or the path of a file: a JSON file that exists, or one that can be made"
        file = isinstance(ledger, (str, Path)) and str(ledger) != "" and not Path(ledger).is_dir()
        _require(ledger is None or file, "Response.ledger", ledger, rule)
        rule = "a list of workers, such as [Worker(stage=1, replica=0)] or [(1, 0)]"
        _require(isinstance(self.banned, Collection) and not isinstance(self.banned, str), "Response.banned", self.banned, rule)
        object.__setattr__(self, "banned", tuple(Worker.of(worker, "Response.banned") for worker in self.banned))
        if self.aggregation == "mean" and self.tolerated is not None:
            raise ConfigurationError(
                f"Response(aggregation='mean', tolerated={self.tolerated}) contradicts itself: a mean tolerates nobody who sends"
                " anything. Leave tolerated out, or choose another aggregation."
            )
        if self.on_flag == "log" and self.ban_after is not None:
            raise ConfigurationError(
                f"Response(on_flag='log', ban_after={self.ban_after}) contradicts itself: a run that only reports bans"
                " nobody. Set ban_after=None, or on_flag='exclude'."
            )

    def audit_rate_of(self, mesh: Mesh) -> float | None:
        """The share of signals that is audited on a mesh; ``None`` where no worker can recompute them, or none crosses a boundary.

        Example:
            >>> Response().audit_rate_of(Mesh(stages=2, replicas=2)), Response().audit_rate_of(Mesh(stages=4, replicas=1))
            (0.01, None)
        """
        return self.audit_rate if mesh.replicas > 1 and mesh.stages > 1 else None

    def gradient_audit_rate_of(self, mesh: Mesh) -> float | None:
        """The share of contributions to weight gradients that is audited on a mesh; ``None`` where signals are not audited either.

        Example:
            >>> Response().gradient_audit_rate_of(Mesh(stages=2, replicas=2))
            0.005
        """
        return None if self.audit_rate_of(mesh) is None else self.gradient_audit_rate
