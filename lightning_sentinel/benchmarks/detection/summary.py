"""Attacks of one kind together: the table to read first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from lightning_sentinel.benchmarks.detection.attacks import IMITATING, PUBLISHED, SUBTLE
from lightning_sentinel.benchmarks.detection.results import Group

__all__ = ["summary"]

_KINDS = {"published": PUBLISHED, "wrong samples and imitations": IMITATING, "subtle": SUBTLE}
_HEAD = (
    "attacks",
    "method",
    "F1, mean and least",
    "steps to a ban",
    "honest workers banned in a run",
    "audits",
    "loss above clean, mean and most",
)


def summary(groups: Sequence[Group]) -> list[str]:
    """Lines of a Markdown table: means over the attacks of a kind, and the worst of them; none if there is no kind to tell apart.

    Args:
        groups: of any attacks; those that belong to no kind are left out.
    """
    lines = []
    for kind, attacks in _KINDS.items():
        members = [group for group in groups if group.scenario.attack in attacks and not group.scenario.variant]
        for method in dict.fromkeys(group.scenario.method for group in members):
            ours = [group for group in members if group.scenario.method == method]
            lines.append("| " + " | ".join([kind, method, *_cells(ours)]) + " |")
    return ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD), *lines] if lines else []


def _cells(groups: Sequence[Group]) -> list[str]:
    gaps = [group.gap for group in groups if group.gap is not None]
    loss = f"{fmean(gaps):+.3f}, {max(gaps):+.3f}" if gaps else "-"
    if groups[0].scenario.method == "unprotected":
        return ["", "", "", "", loss]
    f1 = [100 * value for value in _known(groups, lambda group: group.f1)]
    steps = [steps for group in groups for row in group.rows for steps in row.measures.iterations]
    audits = _known(groups, lambda group: group.audit_share)
    return [
        f"{fmean(f1):.1f}, {min(f1):.1f}",
        f"{fmean(steps):.1f}" if steps else "-",
        f"{fmean(group.false_bans for group in groups):.2f}",
        f"{100 * fmean(audits):.1f} %" if any(audits) else "",
        loss,
    ]


def _known(groups: Sequence[Group], value: Callable[[Group], float | None]) -> list[float]:
    return [found for group in groups if (found := value(group)) is not None]
