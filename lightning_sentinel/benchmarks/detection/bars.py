"""What the quick suite must reach. A change that makes detection worse fails it, and a test can ask for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_sentinel.benchmarks.detection.results import Group

__all__ = ["BARS", "Bar", "misses"]


@dataclass(frozen=True)
class Bar:
    """A limit for one measure of one method.

    Args:
        method: by name.
        measure: a property of :class:`Group`.
        limit: the worst value that passes.
        at_least: whether more is better.
    """

    method: str
    measure: str
    limit: float
    at_least: bool = False

    def missed_by(self, group: Group) -> str | None:
        """What is wrong with a group, or ``None``. A measure without a value, such as F1 where nobody attacks, passes."""
        value = getattr(group, self.measure)
        if group.scenario.method != self.method or value is None:
            return None
        if (value >= self.limit) if self.at_least else (value <= self.limit):
            return None
        attack, direction, _ = group.name
        what = " ".join(filter(None, (direction, attack)))
        rule = "at least" if self.at_least else "at most"
        return f"{self.method}, {what}: {self.measure} is {value:.3f} and must be {rule} {self.limit:g}"


BARS = (
    Bar("sentinel", "f1", 0.95, at_least=True),
    Bar("sentinel", "false_bans", 0.0),
    Bar("sentinel", "gap", 0.05),
    Bar("audited", "f1", 0.99, at_least=True),
    Bar("audited", "false_bans", 0.0),
    Bar("audited", "iterations", 2.0),
    Bar("audited", "audit_share", 0.06),
    Bar("audited", "gap", 0.01),
)
"""The bars of the quick suite."""


def misses(groups: Iterable[Group], bars: Iterable[Bar] = BARS) -> list[str]:
    """Every bar that was missed, with the attack and the value."""
    bars = tuple(bars)
    return [miss for group in groups for bar in bars if (miss := bar.missed_by(group)) is not None]
