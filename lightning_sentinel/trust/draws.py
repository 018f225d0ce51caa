"""Private audit draws: which signals a worker will recompute, known to nobody before it says so, and to no other worker at all.

Each live replica of a stage draws for itself, after the signals were sent and signed. A schedule that all ranks derive from one
seed would tell a liar when it is free. Draws are independent: however seldom a worker lies, the number of lies that it has told
when an audit meets one is geometrically distributed, with a mean of about ``1 / rate``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.seeds import derive_seed
from lightning_sentinel.trust.statements import Transfer

__all__ = ["chance_of_each", "draw_audits", "private_generator", "usual_quota", "within_quota"]


def chance_of_each(rate: float, auditors: int) -> float:
    """With which probability each auditor draws a signal, so that all of them together draw it ``rate`` times in expectation.

    A liar is then met with probability ``1 - (1 - rate / auditors) ** auditors`` by a lie, a little less than ``rate``.

    Args:
        rate: share of signals that is recomputed, in (0, 1].
        auditors: workers that share the work: live replicas of the stage other than the sender. Malicious ones may keep silent:
            with only as many as are surely honest, the rate is met whatever they do, and honest ones do up to twice the work.

    Raises:
        ConfigurationError: if ``rate`` is outside of its range.

    Example:
        >>> chance_of_each(0.01, auditors=5), chance_of_each(0.01, auditors=0)
        (0.002, 0.0)
    """
    if not 0 < rate <= 1:
        raise ConfigurationError(f"An audit rate of {rate} is no share of signals. Choose one above 0, and at most 1.")
    return rate / auditors if auditors > 0 else 0.0


def usual_quota(chance: float, signals: int) -> int:
    """How many draws of a worker in a step are believed to be honest: so many that an honest one practically never draws more.

    Four standard deviations above the mean, and one more: beyond that come about 1 in 10,000 steps, or fewer.

    Args:
        chance: from :func:`chance_of_each`.
        signals: which the worker can draw in a step.

    Example:
        >>> usual_quota(0.002, signals=40), usual_quota(1.0, signals=40)
        (3, 40)
    """
    mean = chance * signals
    return min(signals, 1 + math.ceil(mean + 4 * math.sqrt(mean * (1 - chance))))


def private_generator(seed: int | None, *place: int | str) -> random.Random:
    """What a worker draws from.

    Args:
        seed: ``None``: the operating system's randomness, which nobody can foresee. A number makes a virtual mesh repeatable, and
            whoever knows it knows all draws.
        place: which draws these are, such as the step and the worker, so that seeded draws do not depend on those before.

    Example:
        >>> private_generator(7, "worker 3", 12).random() == private_generator(7, "worker 3", 12).random()
        True
        >>> private_generator(None).random() == private_generator(None).random()
        False
    """
    return random.SystemRandom() if seed is None else random.Random(derive_seed(seed, "private draws", *place))


def draw_audits(
    transfers: Sequence[Transfer], auditor: Worker, chance: float, quota: int, generator: random.Random
) -> list[Transfer]:
    """The signals that a worker will recompute: of its own stage, of other replicas.

    Args:
        transfers: all that were sent and signed; those that the auditor cannot or must not recompute are passed over.
        auditor: who draws.
        chance: with which each signal is drawn, from :func:`chance_of_each`.
        quota: how many at most; if more are drawn, chance decides which remain, so that no place in the order is safe.
        generator: its own, from :func:`private_generator`.

    Returns:
        the drawn ones, in the order of ``transfers``.

    Example:
        >>> from lightning_sentinel.mesh import Boundary, Direction
        >>> from lightning_sentinel.trust.statements import Kind, SignalId
        >>> signals = [SignalId(Kind.SIGNAL, Boundary(0, Direction.ACTIVATION), lane, slot=0) for lane in range(3)]
        >>> sent = [Transfer(Worker(0, lane), Worker(1, lane), signals[lane]) for lane in range(3)]
        >>> drawn = draw_audits(sent, Worker(0, 1), chance=1.0, quota=9, generator=private_generator(0))
        >>> [transfer.sender.replica for transfer in drawn]
        [0, 2]
    """
    others = [one for one in transfers if one.sender.stage == auditor.stage and one.sender != auditor]
    drawn = [one for one in others if generator.random() < chance]
    if len(drawn) <= quota:
        return drawn
    kept = generator.sample(range(len(drawn)), quota)
    return [drawn[index] for index in sorted(kept)]


def within_quota(requests: Collection[Transfer], auditor: Worker, quota: int) -> list[Transfer]:
    """Of what a worker announced, that which others recompute for it or answer: the same on all ranks, whatever it announced.

    Args:
        requests: as they stand in its row.
        auditor: whose row it is.
        quota: how many at most; what comes after is dropped.

    Returns:
        requests about other replicas of its stage, each once, in the order in which they were announced.
    """
    sensible = [one for one in dict.fromkeys(requests) if one.sender.stage == auditor.stage and one.sender != auditor]
    return sensible[:quota]
