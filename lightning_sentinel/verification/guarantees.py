"""What audits and votes promise, as formulas: how soon a liar is met, and how likely an honest worker is banned.

``docs/theory.md`` derives them, with what each assumes. Chances are of single events, independent of one another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.verification.draws import surely_honest

__all__ = [
    "Wait",
    "chance_met",
    "chance_met_in_step",
    "chance_of_false_ban",
    "chance_of_false_finding",
    "chance_of_lost_stage",
    "lies_that_count",
    "steps_until_met",
    "steps_until_met_twice",
]

_LATE = 0.99


class Wait(NamedTuple):
    """How long something takes that has the same chance each time.

    Args:
        mean: expected number.
        median: the least number that is enough in half of all cases.
        late: the least number that is enough in 99 % of all cases.
    """

    mean: float
    median: int
    late: int


def chance_met(rate: float, live: int, silent: int = 0) -> float:
    """The chance that a lie is found by audits that each worker draws for itself, as :class:`AuditSchedule` has it.

    Among those that recompute a signal is one of the honest ones that have drawn it, whoever else has drawn it
    (:class:`Jury`). So a lie is found if any of them has.

    Args:
        rate: share of the signals of the boundary that is audited.
        live: workers of the stage that are not banned, the liar among them.
        silent: how many of the others draw nothing, or say of any lie that it matches.

    Example:
        >>> [round(chance_met(0.01, live=6, silent=silent), 5) for silent in (0, 1, 2)]
        [0.01248, 0.01, 0.00751]
    """
    _check_share("rate", rate)
    _check_part("silent", silent, "live", live - 1)
    return 1 - (1 - rate) ** ((live - 1 - silent) / surely_honest(live))


def chance_met_in_step(chance: float, signals: int, lying: float = 1.0) -> float:
    """The chance that a liar is met in a step.

    Args:
        chance: that a lie is met, from :func:`chance_met`.
        signals: of the worker in a step, in both directions.
        lying: share of its signals that are lies, each by itself.

    Example:
        >>> round(chance_met_in_step(0.01, signals=4), 5), round(chance_met_in_step(0.01, signals=4, lying=0.1), 5)
        (0.0394, 0.00399)
    """
    _check_share("chance", chance)
    _check_share("lying", lying)
    return 1 - (1 - lying * chance) ** signals


def steps_until_met(chance: float) -> Wait:
    """In which step a liar is met, counted from its first one; geometrically distributed.

    Args:
        chance: that it is met in a step, from :func:`chance_met_in_step`; with the chance of a lie, the result counts lies.

    Example:
        >>> steps_until_met(0.01)
        Wait(mean=100.0, median=69, late=459)
        >>> steps_until_met(0.0)
        Wait(mean=inf, median=-1, late=-1)
    """
    _check_share("chance", chance)
    if not chance:
        return Wait(math.inf, -1, -1)
    return Wait(1 / chance, _trials(chance, 0.5), _trials(chance, _LATE))


def steps_until_met_twice(chance: float, alert: float, alert_steps: int = 30) -> float:
    """Expected number of steps until a liar is met for the second time, as a ban takes of three or four live replicas.

    Args:
        chance: that it is met in a step.
        alert: the same in the steps after the first time, when audits are more frequent.
        alert_steps: how many these are.

    Example:
        >>> round(steps_until_met_twice(0.01, 0.03), 1), round(steps_until_met_twice(0.01, 0.01), 1)
        (160.1, 200.0)
    """
    for name, value in (("chance", chance), ("alert", alert)):
        _check_share(name, value)
    if not chance:
        return math.inf
    missed = (1 - alert) ** alert_steps
    return 1 / chance + (1 - missed) / alert + missed / chance


def lies_that_count(chance: float, lies: int = 1) -> Wait:
    """How many lies get into the weights before a liar is met, if it tells so many in each step in which it lies.

    The step in which it is met is done again without it. One lie a step is the most that it can make of its time: the mean is then
    ``(1 - chance) / chance``, which no strategy exceeds.

    Args:
        chance: that a lie is met.
        lies: in a step.

    Example:
        >>> lies_that_count(0.25)
        Wait(mean=3.0, median=2, late=16)
        >>> round(lies_that_count(0.01).mean), round(lies_that_count(0.01, lies=8).mean)
        (99, 96)
    """
    steps = steps_until_met(chance_met_in_step(chance, lies))
    if not chance:
        return steps
    return Wait(lies * (steps.mean - 1), lies * (steps.median - 1), lies * (steps.late - 1))


def chance_of_false_finding(live: int, liars: int, drawn: int | None = None, erring: float = 0.0) -> float:
    """The chance that most find an honest worker to lie in an audit of one of its signals.

    One worker recomputes the signal first, drawn among the others; only if that one says that it does not match, more are asked.

    Args:
        live: workers of the stage that are not banned, the sender included.
        liars: of them, who say that nothing matches; the sender is none.
        drawn: how many are asked in all, drawn at random, most of which decide. ``None``: all others, and the sender stands by its
            signal, as :func:`lightning_sentinel.verification.jury.weigh` has it.
        erring: the chance that an honest worker is wrong, each by itself.

    Example:
        >>> round(chance_of_false_finding(6, liars=2, drawn=3), 4), chance_of_false_finding(6, liars=2)
        (0.2, 0.0)
        >>> chance_of_false_finding(6, liars=3), chance_of_false_finding(6, liars=4)
        (0.0, 0.8)
    """
    others = live - 1
    _check_part("liars", liars, "others", others)
    _check_share("erring", erring)
    asked = others if drawn is None else drawn
    _check_part("drawn", asked, "others", others)
    # With the sender's own word a finding needs more than half of the stage.
    needed = (live if drawn is None else asked) // 2 + 1
    total = 0.0
    for among in range(max(0, asked - (others - liars)), min(asked, liars) + 1):
        chosen = math.comb(liars, among) * math.comb(others - liars, asked - among) / math.comb(others, asked)
        for wrong in range(asked - among + 1):
            against = among + wrong
            if against >= needed:
                # Who is asked first is as likely to be any of those that are asked.
                total += chosen * _binomial(wrong, asked - among, erring) * against / asked
    return total


def chance_of_false_ban(finding: float, rate: float, signals: int, steps: int, strikes: int | None = 1) -> float:
    """The chance that an honest worker is banned in a run.

    Args:
        finding: the chance that an audit finds it to lie, from :func:`chance_of_false_finding`.
        rate: share of its signals that is audited.
        signals: of the worker in a step.
        steps: of the run.
        strikes: steps with such a finding that a ban takes, from :func:`lightning_sentinel.verification.jury.strikes_to_ban`.

    Example:
        >>> round(chance_of_false_ban(0.2, rate=0.01, signals=4, steps=500), 3)
        0.982
        >>> chance_of_false_ban(0.0, rate=0.01, signals=4, steps=500)
        0.0
    """
    if strikes is None:
        return 0.0
    found = chance_met_in_step(finding, signals, lying=rate)
    return max(0.0, 1 - math.fsum(_binomial(count, steps, found) for count in range(strikes)))


def chance_of_lost_stage(workers: int, malicious: int, replicas: int) -> float:
    """The chance that liars are half of a stage or more, in any stage, if workers are dealt to stages at random; at most that.

    Args:
        workers: of the mesh.
        malicious: of them.
        replicas: workers of a stage.

    Example:
        >>> round(chance_of_lost_stage(64, malicious=8, replicas=8), 4), chance_of_lost_stage(36, malicious=2, replicas=6)
        (0.0494, 0.0)
    """
    _check_part("malicious", malicious, "workers", workers)
    honest = workers - malicious
    half = range((replicas + 1) // 2, min(replicas, malicious) + 1)
    ways = sum(math.comb(malicious, bad) * math.comb(honest, replicas - bad) for bad in half)
    return min(1.0, workers // replicas * ways / math.comb(workers, replicas))


def _trials(chance: float, share: float) -> int:
    """The least number of trials of which one succeeds with at least the probability ``share``."""
    return 1 if chance >= share else math.ceil(math.log1p(-share) / math.log1p(-chance) - 1e-9)


def _binomial(count: int, trials: int, chance: float) -> float:
    """The probability of so many successes."""
    return math.comb(trials, count) * chance**count * (1 - chance) ** (trials - count)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{name}={value} is no probability. Give a number from 0 to 1.")


def _check_part(name: str, part: int, whole_name: str, whole: int) -> None:
    if not 0 <= part <= whole:
        raise ConfigurationError(f"{name}={part} cannot be, with {whole_name}={whole}. Give a number from 0 to {whole}.")
