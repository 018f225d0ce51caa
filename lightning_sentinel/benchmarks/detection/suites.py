"""Lists of scenarios, each of which answers one question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_sentinel.benchmarks.detection.attacks import (
    BROKEN,
    COLLUDING,
    CONTRIBUTED,
    HIDDEN,
    MOVED,
    PUBLISHED,
    STEERING,
    SWEPT,
    WITHIN,
    attack_named,
)
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training, choose
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.verification.features import FAMILIES

__all__ = ["SUITES", "Request", "Suite", "scenarios"]

_BOTH = ("activation", "gradient")


@dataclass(frozen=True)
class Request:
    """What a suite is made from: its own defaults, or what the user asked for instead.

    Args:
        training: what is trained.
        fraction: share of malicious workers in each middle stage.
        seeds: how many.
        methods: by name.
        attacks: name to spec.
        directions: what is tampered with.
    """

    training: Training
    fraction: float
    seeds: int
    methods: Sequence[str]
    attacks: Mapping[str, Any]
    directions: Sequence[str]

    @property
    def verified(self) -> list[str]:
        return [method for method in self.methods if method != "unprotected"]

    def runs(self, **settings: Any) -> Iterator[Scenario]:
        """Every method and seed of one attack."""
        settings = {"training": self.training} | settings
        if "workers" not in settings:
            settings.setdefault("fraction", self.fraction)
        for method in self.methods:
            for seed in range(self.seeds):
                yield Scenario(method, seed, **settings)

    def honest_runs(self, **settings: Any) -> Iterator[Scenario]:
        """Every method and seed where nobody is malicious."""
        settings = {"training": self.training} | settings
        for method in self.methods:
            for seed in range(self.seeds):
                yield Scenario(method, seed, **settings)

    def attacked_runs(self, **settings: Any) -> Iterator[Scenario]:
        """Every attack, direction, method and seed."""
        for name, spec in self.attacks.items():
            for direction in self.directions:
                yield from self.runs(attack=name, spec=spec, direction=direction, **settings)

    def mixed_runs(self, fraction: float) -> Iterator[Scenario]:
        """Every malicious worker draws one of the attacks."""
        for direction in self.directions:
            yield from self.runs(
                attack="mixed", spec=list(self.attacks.values()), direction=direction, fraction=fraction, variant=_share(fraction)
            )


@dataclass(frozen=True)
class Suite:
    """A list of scenarios and what it is made from if nothing else is asked for.

    Args:
        about: the question that it answers.
        make: the list.
        methods: by name.
        attacks: name to spec.
        directions: what is tampered with.
        fraction: share of malicious workers in each middle stage.
        seeds: how many.
        training: what is trained.
    """

    about: str
    make: Callable[[Request], Iterator[Scenario]]
    methods: Sequence[str] = ("unprotected", "paper", "sentinel", "audited")
    attacks: Mapping[str, Any] = field(default_factory=dict)
    directions: Sequence[str] = _BOTH
    fraction: float = 0.375
    seeds: int = 3
    training: Training = Training()  # noqa: RUF009 - frozen


def scenarios(suite: str, request: Request) -> list[Scenario]:
    """The runs of a suite, in the order of its tables, with the clean and unprotected runs that they are compared with.

    Raises:
        ConfigurationError: if there is no such suite, or nothing is left of it.
    """
    wanted = list(SUITES[suite].make(request)) if suite in SUITES else choose("suite", suite, SUITES)
    if not wanted:
        raise ConfigurationError(f"suite={suite!r} with seeds={request.seeds} and methods={list(request.methods)} has no runs.")
    unique = {run.key: run for run in wanted}
    for run in wanted:
        for reference in (run.clean, run.unprotected if run.attacked and "unprotected" in request.methods else run.clean):
            unique.setdefault(reference.key, reference)
    return list(unique.values())


def _share(fraction: float) -> str:
    return f"{100 * fraction:g} % malicious"


def _attacks(request: Request) -> Iterator[Scenario]:
    yield from request.honest_runs()
    yield from request.attacked_runs()


def _mixed(request: Request) -> Iterator[Scenario]:
    yield from request.honest_runs()
    for fraction in dict.fromkeys((0.25, request.fraction)):
        yield from request.mixed_runs(fraction)


def _by_share(request: Request) -> Iterator[Scenario]:
    for fraction in (0.125, 0.25, 0.375, 0.5):
        yield from request.mixed_runs(fraction)


_DISTANCES = ("l1", "l2", "sign_flip_ratio", "sliced_wasserstein")
"""Those of the published method."""
_DECAYS = ((0.5, 0.5), (0.8, 0.8), (0.95, 0.9), (0.99, 0.99))
_WARMUPS = (20, 40, 120, 240)


def _ablation(request: Request) -> Iterator[Scenario]:
    unprotected = replace(request, methods=[method for method in request.methods if method == "unprotected"])
    yield from unprotected.attacked_runs()
    for method in request.verified:
        one = replace(request, methods=[method])
        for variant, verification in _ablated(method).items():
            yield from one.honest_runs(variant=variant, verification=verification)
            yield from one.attacked_runs(variant=variant, verification=verification)
        for steps in _WARMUPS:
            if steps != request.training.warmup_steps:
                longer = replace(one, training=replace(request.training, warmup_steps=steps))
                yield from longer.honest_runs(variant=f"warm-up of {steps} steps")
                yield from longer.attacked_runs(variant=f"warm-up of {steps} steps")


def _ablated(method: str) -> dict[str, dict[str, Any]]:
    """Variant to the settings of :class:`Verification` that make it."""
    variants: dict[str, dict[str, Any]] = {"everything": {}}
    variants["no momentum"] = {"beta_activation": 0.0, "beta_gradient": 0.0}
    variants |= {f"decay {a:g} / {g:g}": {"beta_activation": a, "beta_gradient": g} for a, g in _DECAYS}
    if method == "paper":
        variants |= {f"only {name}": {"features": [name]} for name in _DISTANCES}
        return variants
    variants |= {f"only {family}": {"features": [family]} for family in FAMILIES}
    for family in FAMILIES:
        variants[f"without {family}"] = {"features": [other for other in FAMILIES if other != family]}
    return variants


def _replicas(request: Request) -> Iterator[Scenario]:
    for replicas in (1, 2, 4, 8, 16):
        training = replace(request.training, replicas=replicas)
        # One malicious worker whatever the number of its peers, so that only their number changes.
        liar = ((training.stages // 2, 0),)
        variant = f"{replicas} replica{'s' * (replicas > 1)}"
        yield from request.honest_runs(training=training, variant=variant)
        yield from request.attacked_runs(training=training, variant=variant, workers=liar)


def _collusion(request: Request) -> Iterator[Scenario]:
    for fraction in dict.fromkeys((0.25, request.fraction)):
        yield from request.attacked_runs(fraction=fraction, variant=_share(fraction))


def _places(request: Request) -> Iterator[Scenario]:
    training = request.training
    last = training.stages - 1
    liars = range(max(1, (training.replicas - 1) // 2))
    # At the ends of the pipeline there is one direction only, and nothing that the sender had received.
    for variant, stage, direction in (("first stage", 0, "activation"), ("last stage", last, "gradient")):
        if direction in request.directions:
            workers = tuple((stage, replica) for replica in liars)
            yield from replace(request, directions=[direction]).attacked_runs(variant=variant, workers=workers)
    yield from request.attacked_runs(variant="one pipeline", workers=tuple((stage, 0) for stage in range(1, last)))
    # Verifiers have been at work for as long as they were warming up when the attack begins.
    yield from request.attacked_runs(variant="late start", verification={"warmup_steps": max(1, training.warmup_steps // 2)})


_HIDDEN_BY_ALLIES = ("hidden lies", "hidden bias", "lies called tainted", "lies in every role")


def _insiders(request: Request) -> Iterator[Scenario]:
    yield from request.honest_runs()
    yield from request.attacked_runs()
    training = request.training
    liars = range(max(1, round(request.fraction * training.replicas)))
    # Whoever lies sends it to an ally, but at the ends of the pipeline.
    lanes = tuple((stage, replica) for stage in range(1, training.stages - 1) for replica in liars)
    among_allies = {name: spec for name, spec in request.attacks.items() if name in _HIDDEN_BY_ALLIES}
    yield from replace(request, attacks=among_allies).attacked_runs(variant="same pipelines", workers=lanes)
    if "false votes" in request.attacks:
        workers = tuple((training.stages // 2, replica) for replica in liars)
        yield from replace(request, attacks=_named("false votes")).attacked_runs(variant="one stage", workers=workers)
    # As many at both ends as in the middle, where there is nothing that a sender had received.
    ends = tuple((stage, replica) for stage in (0, training.stages - 1) for replica in liars)
    if "other order" in request.attacks:
        yield from replace(request, attacks=_named("other order")).attacked_runs(variant="first and last stage", workers=ends)


def _tolerance(request: Request) -> Iterator[Scenario]:
    for precision in ("32-true", "bf16-mixed"):
        training = replace(request.training, precision=precision)
        yield from request.honest_runs(training=training, variant=precision)
        yield from request.attacked_runs(training=training, variant=precision)


def _backdoor(request: Request) -> Iterator[Scenario]:
    yield from request.honest_runs()
    training = request.training
    liars = range(max(1, round(request.fraction * training.replicas)))
    yield from request.attacked_runs(workers=tuple((training.stages // 2, replica) for replica in liars))
    everywhere = tuple((stage, replica) for stage in range(1, training.stages - 1) for replica in liars)
    strongest = dict(list(request.attacks.items())[:1])
    yield from replace(request, attacks=strongest).attacked_runs(variant="every middle stage", workers=everywhere)


def _clean(request: Request) -> Iterator[Scenario]:
    if request.attacks:
        raise ConfigurationError(
            f"attacks={list(request.attacks)} contradicts suite='clean', in which nobody attacks. Leave one of the two out."
        )
    yield from request.honest_runs()
    changing = replace(request.training, data="code+prose")
    yield from request.honest_runs(training=changing, variant="other data half-way")


def _named(*names: str) -> dict[str, Any]:
    return {name: attack_named(name) for name in names}


_REPRESENTATIVE = {
    name: (PUBLISHED | HIDDEN)[name]
    for name in ("zeros", "x-1", "x0.1", "sign", "delay 10", "noise 0.99", "permute", "momentum_noise", "surrogate", "bias 0.1")
}

SUITES: dict[str, Suite] = {
    "attacks": Suite("Which attacks are found?", _attacks, attacks=PUBLISHED | HIDDEN),
    "mixed": Suite(
        "What if every malicious worker does something else?",
        _mixed,
        methods=("unprotected", "paper", "sentinel", "audited", "duplicated"),
        attacks=PUBLISHED,
        directions=(*_BOTH, "both"),
    ),
    "share": Suite("How many malicious workers are too many?", _by_share, attacks=PUBLISHED, directions=("both",)),
    "ablation": Suite(
        "What does each part of the detector do?", _ablation, methods=("unprotected", "paper", "sentinel"), attacks=_REPRESENTATIVE
    ),
    "replicas": Suite("How many peers does detection need?", _replicas, attacks=_REPRESENTATIVE),
    "collusion": Suite("What if malicious workers act together?", _collusion, attacks=COLLUDING),
    "places": Suite(
        "Does it matter who attacks, and when?",
        _places,
        attacks=_named("zeros", "x-1", "sign", "delay 10", "noise 0.99", "momentum_noise"),
    ),
    "insiders": Suite(
        "Does the default protect from those who know how it works?",
        _insiders,
        methods=("unprotected", "sentinel", "audited"),
        attacks=WITHIN,
        directions=("both",),
        fraction=1 / 3,
        training=Training(stages=6, replicas=6),
    ),
    "tolerance": Suite(
        "What do errors cost that audits let pass?",
        _tolerance,
        methods=("audited",),
        attacks=STEERING,
        directions=("both",),
        fraction=1 / 3,
        training=Training(stages=6, replicas=6),
    ),
    "faults": Suite(
        "Are broken processors found?",
        _attacks,
        methods=("unprotected", "sentinel", "audited"),
        attacks=BROKEN,
        directions=("both",),
        fraction=1 / 6,
        training=Training(stages=4, replicas=6, micro_batches=1),
    ),
    "contributions": Suite(
        "Who corrupts weight gradients inside a stage?",
        _attacks,
        methods=("unprotected", "audited"),
        attacks=CONTRIBUTED,
        directions=("both",),
        fraction=1 / 3,
        training=Training(stages=6, replicas=6),
    ),
    "backdoor": Suite(
        "Can a stage put a backdoor into the model?",
        _backdoor,
        methods=("unprotected", "sentinel", "audited"),
        attacks=MOVED,
        directions=("both",),
        fraction=1 / 3,
        training=Training(stages=6, replicas=6, micro_batches=1, micro_batch_size=4, steps=40, schedule="fine_tuning"),
    ),
    "strength": Suite("Is what goes undetected harmless?", _attacks, attacks=SWEPT),
    "clean": Suite(
        "How often is somebody honest blamed?",
        _clean,
        methods=("paper", "sentinel", "audited"),
        seeds=10,
        training=Training(steps=500),
    ),
    "quick": Suite(
        "Has detection got worse?",
        _attacks,
        methods=("unprotected", "sentinel", "audited"),
        attacks=_named("zeros", "x-1", "random", "x0.1", "noise 0.99", "bias"),
        seeds=1,
        training=Training(stages=4, replicas=6, warmup_steps=60, steps=30),
    ),
}
