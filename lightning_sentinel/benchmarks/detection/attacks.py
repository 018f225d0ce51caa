"""The attacks of the benchmark, by the names that they have in its tables."""

from __future__ import annotations

from typing import Any

from lightning_sentinel import attacks
from lightning_sentinel.benchmarks.detection.insiders import INSIDERS
from lightning_sentinel.benchmarks.detection.steerers import STEERERS
from lightning_sentinel.errors import ConfigurationError

__all__ = [
    "BROKEN",
    "COLLUDING",
    "CONTRIBUTED",
    "FAULTY",
    "HIDDEN",
    "IMITATING",
    "MOVED",
    "NAMED",
    "PUBLISHED",
    "ROLES",
    "STEERING",
    "SUBTLE",
    "SWEPT",
    "WITHIN",
    "attack_named",
]


def _attack(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, **parameters}


PUBLISHED: dict[str, Any] = {
    "zeros": "zeros",
    "ones": "ones",
    "random": "random",
    "x-1": _attack("scale", factor=-1.0),
    "x10": _attack("scale", factor=10.0),
    "x0.1": _attack("scale", factor=0.1),
    "bias": _attack("bias", strength=1.0),
    "sign": "sign",
    "delay 1": _attack("delay", steps=1),
    "delay 10": _attack("delay", steps=10),
    "delay 50": _attack("delay", steps=50),
    "noise 0.9": _attack("noise", fraction=0.9),
    "noise 0.95": _attack("noise", fraction=0.95),
    "noise 0.99": _attack("noise", fraction=0.99),
}
"""Those of SENTINEL (arXiv 2603.03592) with other strengths beside its own.

Its longest delay, 100, is longer than the honest part of these short runs, before which there is nothing to replay: here it is 50.
"""

IMITATING: dict[str, Any] = {
    "permute": "permute",
    "swap": "swap",
    "identity": "identity",
    "received_noise": "received_noise",
    "momentum_noise": "momentum_noise",
}
"""Attacks that send a signal of an honest worker, or one like it, in place of the one that the layers computed."""

SUBTLE: dict[str, Any] = {
    "surrogate": "surrogate",
    "surrogate_noise": _attack("surrogate", noise=True),
    "flip_residual": "flip_residual",
    "x0.9": _attack("scale", factor=0.9),
    "x1.1": _attack("scale", factor=1.1),
    "add_noise 0.3": _attack("add_noise", strength=0.3),
    "bias 0.03": _attack("bias", strength=0.03),
    "bias 0.1": _attack("bias", strength=0.1),
    "drift": "drift",
    "local": "local",
    "intermittent": "intermittent",
}
"""Attacks that alter a signal a little, or not in every step."""

HIDDEN: dict[str, Any] = IMITATING | SUBTLE
"""Those that were designed against the published distances, or are weak."""

COLLUDING: dict[str, Any] = {"collude": "collude", "frame": "frame"}
"""Those of several workers that act together."""

FAULTY: dict[str, Any] = {
    "non_finite": _attack("non_finite", steps=None),
    "bad_rows": "bad_rows",
    "garbled_rows": _attack("bad_rows", garbled=True),
    "gradient_contribution": "gradient_contribution",
}
"""Those of a worker whose layers compute something else, whatever it sends."""

_RATE = 0.02

BROKEN: dict[str, Any] = {
    "exponent bit, forward": _attack("bit_flip", bit=1, phase="forward", rate=_RATE),
    "exponent bit, backward_input": _attack("bit_flip", bit=1, phase="backward_input", rate=_RATE),
    "exponent bit, backward_weight": _attack("bit_flip", bit=1, phase="backward_weight", rate=_RATE),
    "any bit": _attack("bit_flip", rate=_RATE),
    "any bit of a factor": _attack("bit_flip", operand="left", rate=_RATE),
    "wrong address": _attack("wrong_address", rate=_RATE),
    "misplaced tile": _attack("misplaced_tile", rate=_RATE),
    "stale tile": _attack("stuck_tile", stale=True, rate=_RATE),
    "silent corruption": _attack("silent_corruption", rate=_RATE),
    "silent corruption, rare": _attack("silent_corruption", rate=_RATE / 10),
}
"""Those of a processor that sometimes multiplies matrices wrongly."""
CONTRIBUTED: dict[str, Any] = {
    "weights x1": _attack("gradient_contribution", factor=1.0),
    "weights x-1": _attack("gradient_contribution", factor=-1.0),
    "weights x10": _attack("gradient_contribution", factor=10.0),
    "weights x0": _attack("gradient_contribution", factor=0.0),
    "weights bias 0.3": _attack("gradient_contribution", factor=1.0, bias=0.3),
    "weights bias 0.1": _attack("gradient_contribution", factor=1.0, bias=0.1),
}
"""Those of a worker that sends honest signals, and adds something else to its stage's weight gradients. The first is no attack: it
has contributions looked at where nobody lies."""

MOVED: dict[str, Any] = {
    "steering 1": _attack("gradient_steering", size=1.0),
    "steering 0.3": _attack("gradient_steering", size=0.3),
    "steering 0.1": _attack("gradient_steering", size=0.1),
    "steering 1, 20 % of steps": _attack(
        "collude", attack=_attack("intermittent", attack=_attack("gradient_steering", size=1.0), probability=0.2)
    ),
    "own weights": _attack("own_weights", size=0.025),
    "own weights and steering": _attack(
        "several", attacks=[_attack("own_weights", size=0.025), _attack("gradient_steering", size=1.0)]
    ),
}
"""Those of a worker that moves the weights of its stage towards a backdoor. The first is the strongest."""

_STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "scale": ("factor", (0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5)),
    "bias": ("strength", (0.01, 0.03, 0.1, 0.3, 1.0)),
    "add_noise": ("strength", (0.1, 0.3, 1.0, 3.0)),
    "noise": ("fraction", (0.1, 0.25, 0.5, 0.75, 1.0)),
}

SWEPT: dict[str, Any] = {
    f"{name} {value:g}": _attack(name, **{parameter: value}) for name, (parameter, values) in _STRENGTHS.items() for value in values
}
"""The same kinds from harmless to gross."""

_LIES = _attack("scale", factor=-1.0)

ROLES: dict[str, Any] = {
    "false votes": "false_votes",
    "lies and false votes": _attack("several", attacks=[_LIES, "false_votes"]),
    "false notes": "false_notes",
    "lies and false notes": _attack("several", attacks=[_LIES, "false_notes"]),
    "invented rows": _attack("false_rows", hide=None, invent=3.0),
    "hidden lies": _attack("several", attacks=[_LIES, "false_rows"]),
    "hidden bias": _attack("several", attacks=[_attack("bias", strength=0.1), "false_rows", "false_votes"]),
    "lies called tainted": _attack("several", attacks=[_LIES, _attack("false_rows", hide="taint")]),
    "equivocation": "equivocate",
    "rare equivocation": _attack("equivocate", probability=0.05),
    "equivocation as receiver": _attack("equivocate", side="receiver"),
    "lies and equivocation": _attack("several", attacks=[_LIES, "equivocate"]),
    "lies in every role": _attack("several", attacks=[_LIES, _attack("false_rows", invent=3.0), "false_notes", "false_votes"]),
}
"""Those of receivers, of makers of notes, of auditors, and of those who commit to other signals than they sent, alone and beside
lies of their allies."""

WITHIN: dict[str, Any] = {name: name for name in INSIDERS} | ROLES
"""Those of who knows more than a worker should, or lies beside what it sends."""

STEERING: dict[str, Any] = {name: name for name in STEERERS}
"""Those of who knows the tolerance of audits, and stays below it."""

NAMED: dict[str, Any] = PUBLISHED | HIDDEN | COLLUDING | FAULTY | CONTRIBUTED | MOVED | BROKEN | SWEPT | ROLES


def attack_named(name: str) -> Any:
    """The attack that has this name in the tables, or in the library.

    Raises:
        ConfigurationError: if there is none.

    Example:
        >>> attack_named("x10"), attack_named("scale")
        ({'name': 'scale', 'factor': 10.0}, 'scale')
    """
    known = NAMED | WITHIN | STEERING
    if name in known:
        return known[name]
    if name in attacks.available():
        return name
    raise ConfigurationError(
        f"attacks={name!r} is unknown to this benchmark. Choose from: {', '.join(known)}; or, with their default strength,"
        f" {', '.join(attacks.available())}."
    )
