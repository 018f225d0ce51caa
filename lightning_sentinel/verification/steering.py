"""How far a liar can steer the weights: until it is met, and with errors that audits let pass.

``docs/theory.md`` derives the formulas, with what each assumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lightning_sentinel.verification.tolerance import ALARM, DIRECTIONS, TESTS

__all__ = [
    "audits_until_noticed",
    "chance_of_false_alarm",
    "chance_unnoticed",
    "chance_unnoticed_along",
    "chance_unnoticed_map",
    "largest_adam_step",
    "largest_drift",
    "reordering_error",
]

_GRID = 400
_OUTERMOST = 8.0
_PHASES = 16


def largest_drift(
    lies: float, learning_rate: float, replicas: int, error: float, clip: float = math.inf, momentum: float = 0.0
) -> float:
    """The largest Euclidean distance by which lies move a stage's weights under SGD, beside the steps of honest workers.

    Args:
        lies: steps that are spoilt by one worker, from :func:`lightning_sentinel.verification.guarantees.lies_that_count`.
        learning_rate: the largest one.
        replicas: whose gradients are averaged.
        error: norm of the error in the weight gradient of the liar's micro-batches.
        clip: norm to which gradients are clipped.
        momentum: of SGD, without dampening.

    Example:
        >>> round(largest_drift(99, learning_rate=0.1, replicas=8, error=math.inf, clip=1.0), 3)
        19.8
        >>> round(largest_drift(99, learning_rate=0.1, replicas=8, error=0.4, clip=1.0), 3)
        0.495
    """
    return lies * learning_rate * min(2 * clip, error / replicas) / (1 - momentum)


def largest_adam_step(learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """The largest change of a weight in a step of Adam, whatever the gradients were; without weight decay.

    Args:
        learning_rate: the largest one.
        betas: of Adam; the square of the first is less than the second.

    Example:
        >>> round(largest_adam_step(1.0), 3)
        7.27
    """
    first, second = betas
    return learning_rate * (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second))


def reordering_error(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """By how much two sums of the same terms in another order differ at most, as a share of the sum of the terms' absolute values.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2.

    Args:
        terms: how many are added up.
        dtype: in which.

    Example:
        >>> f"{reordering_error(8):.1e}"
        '8.3e-07'
    """
    unit = (terms - 1) * torch.finfo(dtype).eps / 2
    return 2 * unit / (1 - unit)


def audits_until_noticed(mean: float, spread: float) -> int:
    """How many audits of a worker it takes until the sum of its signed errors is expected to be noticed.

    Args:
        mean: of the signed errors along a direction.
        spread: their standard deviation.

    Example:
        >>> audits_until_noticed(0.004, 0.0), audits_until_noticed(0.004, 0.004)
        (29, 57)
    """
    return math.floor(ALARM * (1 + (spread / mean) ** 2)) + 1


def chance_unnoticed(error: float, rounding: float, tokens: int, audits: int, least: float) -> float:
    """At most how likely it is that a constant error passes so many audits: that its signed errors, along secret directions, add up
    to no alarm.

    Args:
        error: norm of what is added to every token, as a share of the norm of a token.
        rounding: the same for honest errors, which differ from token to token.
        tokens: of a signal, samples times positions.
        audits: of the worker in which its signals matched.
        least: mean signed error up to which nobody is blamed.

    Example:
        >>> chance_unnoticed(0.005, 0.002, tokens=128, audits=25, least=0.001)
        1.0
        >>> f"{chance_unnoticed(0.005, 0.002, tokens=128, audits=40, least=0.001):.0e}"
        '4e-07'
    """
    if audits <= ALARM:
        return 1.0
    # An error counts for no more than the distance that the audit measured.
    most = math.hypot(error, rounding)
    spread = rounding / math.sqrt(tokens)
    one = _over_directions(lambda place: chance_unnoticed_along(min(abs(place) * error, most), spread, audits, least))
    return min(1.0, one**DIRECTIONS)


def chance_unnoticed_map(error: float, rounding: float, tokens: int, channels: int, audits: int, least: float) -> float:
    """About how likely it is that a fixed linear map of each token passes so many audits, for tokens alike in all directions.

    Along a direction tokens are normally distributed, and have ``sqrt(2 / e) sin(b)`` in common with their wave of phase ``b``. A
    map of them has a share of that which is one over the root of the channels, by which waves are multiplied; by chance any error
    has one over the root of the tokens.

    Args:
        error: norm of what is added to every token, as a share of the norm of a token.
        rounding: the same for honest errors, which differ from token to token.
        tokens: of a signal, samples times positions; more than channels.
        channels: of the signal.
        audits: of the worker in which its signals matched.
        least: mean signed error up to which nobody is blamed.

    Example:
        >>> chance_unnoticed_map(0.005, 0.002, tokens=4096, channels=256, audits=28, least=0.001)
        1.0
        >>> f"{chance_unnoticed_map(0.005, 0.002, tokens=4096, channels=256, audits=60, least=0.001):.0e}"
        '2e-03'
    """
    if audits <= ALARM:
        return 1.0
    most = math.hypot(error, rounding)
    spread = most * math.sqrt(channels / tokens)
    phases = [math.sqrt(2 / math.e) * math.sin(math.pi * (number + 0.5) / (2 * _PHASES)) for number in range(_PHASES)]

    def missed(place: float) -> float:
        means = [min(abs(place) * error * phase, most) for phase in phases]
        return math.fsum(chance_unnoticed_along(mean, spread, audits, least) for mean in means) / _PHASES

    return min(1.0, _over_directions(missed) ** DIRECTIONS)


def _over_directions(chance: Callable[[float], float]) -> float:
    """The mean of something over the standard normal distribution: of what lies along a random unit direction, in many channels."""
    step = 2 * _OUTERMOST / _GRID
    places = [(number + 0.5) * step - _OUTERMOST for number in range(_GRID)]
    return math.fsum(math.exp(-(place**2) / 2) * step / math.sqrt(2 * math.pi) * chance(place) for place in places)


def chance_unnoticed_along(mean: float, spread: float, audits: int, least: float) -> float:
    """The same along one direction, for normally distributed errors and more than ``ALARM`` audits.

    That the squared sum is more than ``ALARM`` times the sum of squares is that Student's t is above a threshold. Its noncentral
    distribution is taken by the normal approximation of Johnson and Welch (1940).
    """
    if not spread:
        return float(mean <= least)
    free = audits - 1
    threshold = math.sqrt(ALARM * free / (audits - ALARM))
    far = mean * math.sqrt(audits) / spread
    too_scattered = _normal((threshold * (1 - 1 / (4 * free)) - far) / math.sqrt(1 + threshold**2 / (2 * free)))
    too_small = _normal((least - mean) * math.sqrt(audits) / spread)
    return min(1.0, too_scattered + too_small)


def chance_of_false_alarm(rounding: float, tokens: int, audits: int, least: float) -> float:
    """At most how likely it is that the signed errors of an honest worker ever raise an alarm.

    Args:
        rounding: norm of honest errors, as a share of the norm of a signal; their signs are independent.
        tokens: of a signal, samples times positions.
        audits: of the worker, in all.
        least: mean signed error up to which nobody is blamed.

    Example:
        >>> chance_of_false_alarm(0.002, tokens=128, audits=1000, least=0.001) < 1e-9
        True
    """
    spread = rounding / math.sqrt(tokens)
    if not spread:
        return 0.0
    looks = range(math.floor(ALARM) + 1, audits + 1)
    # Hoeffding's bounds: of the self-normalised sum (Efron 1969), and of the mean.
    each = math.fsum(math.exp(-max(ALARM, count * (least / spread) ** 2) / 2) for count in looks)
    return min(1.0, 2 * TESTS * each)


def _normal(value: float) -> float:
    """The cumulative distribution of the standard normal."""
    return math.erfc(-value / math.sqrt(2)) / 2
