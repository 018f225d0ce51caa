"""One run of the benchmark, described completely: what is trained, who attacks how, and who looks on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from lightning_sentinel.attacks import Attack, resolve
from lightning_sentinel.attacks.faults import OF_COMPUTATION, site_of
from lightning_sentinel.attacks.wrappers import innermost, parts_of
from lightning_sentinel.benchmarks.detection.insiders import INSIDERS, Insider
from lightning_sentinel.benchmarks.detection.steerers import STEERERS
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError

__all__ = ["METHODS", "NO_ATTACK", "Method", "Scenario", "Training", "choose", "moves_weights"]

NO_ATTACK = "none"
"""The name of the attack where nobody is malicious."""


@dataclass(frozen=True)
class Method:
    """A way of looking on.

    Args:
        verification: :attr:`Verification.method`; ``None`` verifies nothing.
        audit_rate: :attr:`Response.audit_rate`.
    """

    verification: Literal["sentinel", "paper"] | None
    audit_rate: float | None = None


METHODS: dict[str, Method] = {
    "unprotected": Method(None),
    "paper": Method("paper"),
    "sentinel": Method("sentinel"),
    "audited": Method("sentinel", 0.01),
    "duplicated": Method("sentinel", 1.0),
}
"""By name: no verification, the published rule, our features, these with audits, and all work done twice."""


def choose(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    """The choice of that name.

    Raises:
        ConfigurationError: if there is none, naming those that there are.
    """
    if name not in choices:
        raise ConfigurationError(f"{what}={name!r} is unknown to this benchmark. Choose from: {', '.join(choices)}.")
    return choices[name]


@dataclass(frozen=True)
class Training:
    """What is trained, on which mesh and for how long.

    Args:
        stages: pipeline stages, each with one block of the model; at least 3, as first and last are trusted.
        replicas: pipelines.
        micro_batches: number of micro-batches of a replica in a step.
        warmup_steps: honest steps before the attack.
        steps: steps under attack.
        model: ``"llama"`` or ``"gpt"``.
        data: ``"code"``, ``"prose"``, or ``"code+prose"``, which changes from one to the other in the middle of the run.
        schedule: the learning rate after a short rise: ``"constant"``, ``"decay"`` to a tenth, or ``"fine_tuning"``, a third of it
            after the honest steps.
        learning_rate: the highest.
        width: width of the model.
        sequence_length: bytes of a window.
        micro_batch_size: windows of a micro-batch.
        precision: the Trainer's.

    Raises:
        ConfigurationError: if a value cannot work.
    """

    stages: int = 8
    replicas: int = 8
    micro_batches: int = 2
    warmup_steps: int = 60
    steps: int = 60
    model: str = "llama"
    data: str = "code"
    schedule: str = "decay"
    learning_rate: float = 3e-3
    width: int = 64
    sequence_length: int = 32
    micro_batch_size: int = 2
    precision: str = "32-true"

    def __post_init__(self) -> None:
        if self.stages < 3:
            raise ConfigurationError(
                f"stages={self.stages} cannot work: the first and the last stage are trusted, so there must be one between them."
                " Use at least 3."
            )
        for name in ("replicas", "micro_batches", "warmup_steps", "steps", "width", "sequence_length", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} cannot work: it must be at least 1.")
        choose("model", self.model, {"llama": 0, "gpt": 0})
        choose("data", self.data, {"code": 0, "prose": 0, "code+prose": 0})
        choose("schedule", self.schedule, {"constant": 0, "decay": 0, "fine_tuning": 0})

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.steps

    @property
    def batch_size(self) -> int:
        """Windows of a step of the whole mesh."""
        return self.replicas * self.micro_batches * self.micro_batch_size


@dataclass(frozen=True)
class Scenario:
    """One run.

    Args:
        method: how signals are verified, a key of :data:`METHODS`.
        seed: the seed of the weights, the batches, the malicious workers and the verifiers' secrets.
        training: what is trained.
        attack: the name that the attack has in tables; :data:`NO_ATTACK` if there is none.
        spec: the attack as :func:`lightning_sentinel.attacks.resolve` takes it, or a list of which each malicious worker draws one;
            or the name of one of :data:`INSIDERS` or :data:`STEERERS`.
        direction: what is tampered with.
        fraction: share of malicious workers in each middle stage.
        workers: the malicious workers by name, in place of a fraction.
        verification: settings of :class:`Verification` that differ from the default.
        variant: what else this run tries, for the tables.

    Example:
        >>> run = Scenario("sentinel", seed=0, attack="zeros", spec="zeros", direction="activation")
        >>> run.name
        'sentinel, activation zeros, seed 0'
        >>> run.clean.name
        'unprotected, none, seed 0'
        >>> run.key == Scenario("sentinel", seed=0, attack="nothing at all", spec="zeros", direction="activation").key
        True
    """

    method: str
    seed: int
    training: Training = Training()
    attack: str = NO_ATTACK
    spec: Any = None
    direction: str = "both"
    fraction: float | None = None
    workers: tuple[tuple[int, int], ...] | None = None
    verification: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigurationError(
                f"fraction={self.fraction!r} cannot work: it is the share of malicious workers in a stage, between 0 and 1, both"
                " excluded. SENTINEL assumes less than 0.5."
            )

    @property
    def attacked(self) -> bool:
        return self.spec is not None

    @property
    def name(self) -> str:
        """For messages."""
        attack = f"{self.direction} {self.attack}" if self.attacked else NO_ATTACK
        return ", ".join(part for part in (self.method, attack, self.variant, f"seed {self.seed}") if part)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what the run does, in plain values; names for tables are left out."""
        settings = asdict(self)
        del settings["attack"], settings["variant"]
        settings["method"] = asdict(METHODS[self.method])
        settings["verification"] = dict(sorted(self.verification.items())) if METHODS[self.method].verification else {}
        return settings

    @property
    def key(self) -> str:
        """Names the run's file: the same settings, package and text give the same key on every machine."""
        return _hash({"run": self.settings, "versions": versions()})

    @property
    def warmup_key(self) -> str:
        """Names the honest warm-up that this run goes on from, in which neither attack nor response play a part."""
        settings = {"training": asdict(self.training), "seed": self.seed, "verification": asdict(self._warmup_verification)}
        return _hash({"warmup": settings, "versions": versions()})

    @property
    def warmup(self) -> Scenario:
        """The honest warm-up itself."""
        method = "paper" if METHODS[self.method].verification == "paper" else "sentinel"
        verification = {} if METHODS[self.method].verification is None else self.verification
        return Scenario(method, self.seed, self.training, verification=verification, variant="warm-up")

    @property
    def clean(self) -> Scenario:
        """The same training with nobody malicious and nobody looking on."""
        return Scenario("unprotected", self.seed, self.training)

    @property
    def unprotected(self) -> Scenario:
        """The same attack with nobody looking on."""
        return replace(self, method="unprotected", verification={})

    @property
    def remembers(self) -> bool:
        """Whether the attack has to see the warm-up, because it learns from honest signals.

        Or because it makes weight gradients wrong and is audited: the virtual mesh looks at these only where somebody's are to be.
        """
        audited = METHODS[self.method].audit_rate is not None
        return any(hasattr(innermost(part), "observe") or (audited and site_of(part) in OF_COMPUTATION) for part in self._parts)

    @property
    def moves_weights(self) -> bool:
        """Whether the attack moves the weights of its stages in a direction that its workers have to find."""
        return any(moves_weights(part) for part in self._parts)

    @property
    def needs_warmup(self) -> bool:
        """Whether its warm-up has to be there, to go on from or to find a direction from."""
        return self.moves_weights or not self.remembers

    @property
    def attacked_stages(self) -> tuple[int, ...]:
        """The stages with malicious workers."""
        named = {stage for stage, _ in self.workers or ()}
        return tuple(sorted(named or (range(1, self.training.stages - 1) if self.fraction else ())))

    @property
    def _parts(self) -> list[Any]:
        """The attacks that those of the library consist of."""
        if not self.attacked or isinstance(self.make_attack(), Insider):
            return []
        specs = self.spec if isinstance(self.spec, (list, tuple)) else [self.spec]
        return [part for spec in specs for part in parts_of(resolve(spec))]

    def make_attack(self) -> Any:
        """What the injector is given: an insider of that name, or the attack as it is described."""
        known = INSIDERS | STEERERS
        return known[self.spec]() if isinstance(self.spec, str) and self.spec in known else self.spec

    @property
    def response(self) -> Response:
        return Response(audit_rate=METHODS[self.method].audit_rate)

    def make_verification(self) -> Verification | None:
        """What the strategy is given."""
        method = METHODS[self.method].verification
        if method is None:
            return None
        settings: dict[str, Any] = {"warmup_steps": self.training.warmup_steps, "seed": self.seed} | dict(self.verification)
        return Verification(method=method, **settings)

    @property
    def _warmup_verification(self) -> Verification:
        verification = self.warmup.make_verification()
        assert verification is not None, "a warm-up is always verified, so that any run can go on from it"
        return verification


def moves_weights(part: Attack) -> bool:
    """Whether an attack moves the weights of its stage in a direction that it is given."""
    return hasattr(innermost(part), "task_vectors")


def versions() -> dict[str, str]:
    """What results depend on beside the settings: the code, and Python, whose own sources and manual are the text."""
    import lightning_sentinel

    return {
        "lightning_sentinel": lightning_sentinel.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
    }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
