"""Attacks by name, for the command line and for configuration files."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_sentinel.attacks.context import Attack
from lightning_sentinel.attacks.delay import Delay
from lightning_sentinel.attacks.faults import BadRows, GradientContribution, NonFinite
from lightning_sentinel.attacks.imitation import MomentumNoise, Surrogate
from lightning_sentinel.attacks.library import Bias, InvisibleNoise, Ones, RandomSign, RandomValue, Scale, Zeros
from lightning_sentinel.attacks.misplaced import Permute, Swap
from lightning_sentinel.attacks.product_faults import BitFlip, MisplacedTile, SilentCorruption, StuckTile, WrongAddress
from lightning_sentinel.attacks.roles import Equivocate, FalseNotes, FalseRows, FalseVotes
from lightning_sentinel.attacks.shortcut import FlipResidual, Identity, ReceivedNoise
from lightning_sentinel.attacks.stage_weights import GradientSteering, OwnWeights
from lightning_sentinel.attacks.subtle import AddNoise, Drift, Frame, Local
from lightning_sentinel.attacks.wrappers import Collude, Intermittent, Several
from lightning_sentinel.errors import ConfigurationError

__all__ = ["LIBRARY", "AttackSpec", "available", "get", "resolve"]

AttackSpec = str | Attack | Mapping[str, Any]
"""A name, an attack itself, or a mapping of ``name`` and parameters, as YAML gives it."""

LIBRARY: dict[str, Callable[..., Attack]] = {
    "add_noise": AddNoise,
    "bad_rows": BadRows,
    "bias": Bias,
    "bit_flip": BitFlip,
    "collude": Collude,
    "delay": Delay,
    "drift": Drift,
    "equivocate": Equivocate,
    "false_notes": FalseNotes,
    "false_rows": FalseRows,
    "false_votes": FalseVotes,
    "flip_residual": FlipResidual,
    "frame": Frame,
    "gradient_contribution": GradientContribution,
    "gradient_steering": GradientSteering,
    "identity": Identity,
    "intermittent": Intermittent,
    "local": Local,
    "misplaced_tile": MisplacedTile,
    "momentum_noise": MomentumNoise,
    "noise": InvisibleNoise,
    "non_finite": NonFinite,
    "ones": Ones,
    "own_weights": OwnWeights,
    "permute": Permute,
    "random": RandomValue,
    "received_noise": ReceivedNoise,
    "scale": Scale,
    "several": Several,
    "sign": RandomSign,
    "silent_corruption": SilentCorruption,
    "stuck_tile": StuckTile,
    "surrogate": Surrogate,
    "swap": Swap,
    "wrong_address": WrongAddress,
    "zeros": Zeros,
}


def available() -> tuple[str, ...]:
    """The names of all attacks, sorted.

    Example:
        >>> from lightning_sentinel import attacks
        >>> print(*attacks.available())  # doctest: +NORMALIZE_WHITESPACE
        add_noise bad_rows bias bit_flip collude delay drift equivocate false_notes false_rows false_votes flip_residual frame
        gradient_contribution gradient_steering identity intermittent local misplaced_tile momentum_noise noise non_finite ones
        own_weights permute random received_noise scale several sign silent_corruption stuck_tile surrogate swap wrong_address zeros
    """
    return tuple(sorted(LIBRARY))


def get(name: str, /, **parameters: Any) -> Attack:
    """The attack of that name, with its strength set by ``parameters``.

    Raises:
        ConfigurationError: if there is no such attack, or if it takes no such parameter or value.

    Example:
        >>> from lightning_sentinel import attacks
        >>> attacks.get("scale", factor=-1.0)
        Scale(factor=-1.0)
    """
    if name not in LIBRARY:
        raise ConfigurationError(
            f"There is no attack {name!r}.{_suggestion(name, available())} Available are {', '.join(available())};"
            " an attack of your own is given as a callable (signal, context) -> Tensor."
        )
    takes = inspect.signature(LIBRARY[name]).parameters
    for parameter in parameters:
        if parameter not in takes:
            accepted = ", ".join(f"{known}={takes[known].default!r}" for known in takes) or "no parameters"
            raise ConfigurationError(
                f"The attack {name!r} has no parameter {parameter!r}.{_suggestion(parameter, takes)} It takes {accepted}."
            )
    return LIBRARY[name](**parameters)


def resolve(spec: AttackSpec) -> Attack:
    """The attack that ``spec`` describes: by name, by a mapping of ``name`` and parameters, or the callable that it is.

    Raises:
        ConfigurationError: if ``spec`` describes no attack.

    Example:
        >>> from lightning_sentinel import attacks
        >>> attacks.resolve("zeros"), attacks.resolve({"name": "scale", "factor": 10.0})
        (Zeros(), Scale(factor=10.0))
    """
    if isinstance(spec, str):
        return get(spec)
    if isinstance(spec, Mapping):
        parameters = dict(spec)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            raise ConfigurationError(
                f"The attack {dict(spec)!r} has no name. Give one of {', '.join(available())} under the key 'name',"
                " beside the parameters."
            )
        return get(name, **parameters)
    if isinstance(spec, type):
        raise ConfigurationError(
            f"The attack {spec.__name__} is a class, which tampers with nothing by itself. Pass an instance: {spec.__name__}(...)."
        )
    if callable(spec):
        return spec
    raise ConfigurationError(
        f"{spec!r} of type {type(spec).__name__} is no attack. Give a name ({', '.join(available())}), a mapping with"
        " the key 'name', or a callable (signal, context) -> Tensor."
    )


def _suggestion(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
