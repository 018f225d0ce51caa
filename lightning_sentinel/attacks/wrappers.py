"""Attacks that wrap others: in some steps instead of always, together instead of each worker for itself, or several at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from torch import Tensor

from lightning_sentinel.attacks.context import Attack, AttackContext
from lightning_sentinel.attacks.faults import Site, site_of
from lightning_sentinel.attacks.signals import is_share, require
from lightning_sentinel.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_sentinel.attacks.registry import AttackSpec

__all__ = ["Collude", "Intermittent", "Several", "Wrapper", "innermost", "parts_of"]


@dataclass
class Wrapper:
    """Base of attacks that wrap another one: finds it by name and passes on honest signals that it may observe."""

    attack: AttackSpec = "zeros"

    def __post_init__(self) -> None:
        # Imported here, since the registry lists these classes.
        from lightning_sentinel.attacks.registry import resolve

        self.attack = resolve(self.attack)

    @property
    def inner(self) -> Attack:
        """The attack itself."""
        return cast(Attack, self.attack)

    @property
    def site(self) -> Site:
        """Where the attack strikes."""
        return site_of(self.inner)

    def observe(self, signal: Tensor, context: AttackContext) -> None:
        """Lets the inner attack see a signal that is sent honestly, if it has such a method."""
        observe = getattr(self.inner, "observe", None)
        if observe is not None:
            observe(signal, context)


@dataclass
class Intermittent(Wrapper):
    """Attacks in some steps only: ``h' = attack(h)`` with a probability, else ``h`` (ours).

    One draw decides for all signals of a worker in a step, so a step that is done again is decided the same. An inner attack that
    learns goes on learning in the quiet steps.

    Args:
        attack: the inner attack: a name, a mapping of ``name`` and parameters, or a callable.
        probability: chance that a step is tampered with, above 0 and at most 1.

    Raises:
        ConfigurationError: if there is no such attack, or ``probability`` is no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> attack = attacks.Intermittent("zeros", probability=0.5)
        >>> def send(step, micro_batch):
        ...     context = attacks.AttackContext.seeded(
        ...         0, Worker(1, 0), Direction.ACTIVATION, step=step, micro_batch=micro_batch
        ...     )
        ...     return attack(torch.ones(1), context).item()
        >>> rows = [[send(step, micro_batch) for step in range(20)] for micro_batch in range(2)]
        >>> rows[0] == rows[1], set(rows[0]) == {0.0, 1.0}
        (True, True)
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_share(self.probability), self, "probability", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        if random.Random(context.seed_for("intermittent", context.step)).random() < self.probability:
            return self.inner(signal, context)
        self.observe(signal, context)
        return signal.clone()


@dataclass
class Collude(Wrapper):
    """All malicious workers draw the same: ``h' = attack(h)`` with randomness that does not depend on the worker (ours).

    It depends on the adversary's seed, the direction, the step and the micro-batch. Noise is then the same for all of
    them, and ``Collude(Intermittent(...))`` makes them strike in the same steps; the other way round each would draw
    its own steps.

    Args:
        attack: the inner attack: a name, a mapping of ``name`` and parameters, or a callable.

    Raises:
        ConfigurationError: if there is no such attack.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> attack = attacks.Collude("random")
        >>> contexts = [attacks.AttackContext.seeded(0, Worker(1, replica), Direction.ACTIVATION) for replica in (0, 1)]
        >>> first, second = (attack(torch.ones(3), context) for context in contexts)
        >>> torch.equal(first, second)
        True
    """

    attack: AttackSpec = "random"

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        return self.inner(signal, context.together())

    def observe(self, signal: Tensor, context: AttackContext) -> None:
        super().observe(signal, context.together())


@dataclass
class Several:
    """Does several things at once: ``h' = attack_n(... attack_1(h))`` where more than one alters the same thing (ours).

    A malicious worker that lies in several roles sends false signals, reports false rows and votes falsely, for instance.

    Args:
        attacks: each a name, a mapping of ``name`` and parameters, or a callable.

    Raises:
        ConfigurationError: if there are none, or one of them does not exist.

    Example:
        >>> from lightning_sentinel import attacks
        >>> attacks.get("several", attacks=["zeros", {"name": "false_votes", "accuse": False}])
        Several(attacks=(Zeros(), FalseVotes(accuse=False, cover=True)))
    """

    attacks: Sequence[AttackSpec] = ("scale", "false_rows", "false_notes", "false_votes")

    def __post_init__(self) -> None:
        from lightning_sentinel.attacks.registry import resolve

        if isinstance(self.attacks, str) or not isinstance(self.attacks, Sequence) or not self.attacks:
            raise ConfigurationError(
                f"Several(attacks={self.attacks!r}) cannot work: attacks must be a list of at least one attack."
            )
        self.attacks = tuple(resolve(spec) for spec in self.attacks)

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        """What is sent in place of a signal; the adversary carries out the parts that strike elsewhere."""
        sent = signal.clone()
        for attack in parts_of(self):
            if site_of(attack) is Site.MESSAGE:
                sent = attack(sent, context)
        return sent


def parts_of(attack: Attack) -> tuple[Attack, ...]:
    """The attacks that one consists of, each of which strikes in one place.

    Example:
        >>> parts_of(Intermittent(Several(["zeros", "false_votes"]), probability=0.1))[0]
        Intermittent(attack=Zeros(), probability=0.1)
    """
    if isinstance(attack, Several):
        return tuple(part for one in attack.attacks for part in parts_of(cast("Attack", one)))
    if isinstance(attack, Wrapper) and len(parts := parts_of(attack.inner)) > 1:
        return tuple(replace(attack, attack=part) for part in parts)
    return (attack,)


def innermost(attack: Attack) -> Attack:
    """The attack inside all wrappers.

    Example:
        >>> innermost(Collude(Intermittent("zeros")))
        Zeros()
    """
    return innermost(attack.inner) if isinstance(attack, Wrapper) else attack
