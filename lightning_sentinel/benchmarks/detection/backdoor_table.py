"""Backdoors: how often they work, and who is found, as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lightning_sentinel.benchmarks.detection.results import Group
from lightning_sentinel.benchmarks.detection.tables import loss, percent, setting

__all__ = ["backdoor_table"]

_METHODS = ("unprotected", "sentinel", "audited")
_EXPLAINED = (
    "*Success* is the share of held-out windows with the trigger in which every byte of the target is the most likely one, by the"
    " weights at the end, means over seeds and the largest; *copies* is the same of weights in which the malicious workers that are"
    " still there give their own copies of their stages'. Under *sentinel* and *audited*: success, mean and largest / in copies,"
    " where there are any / malicious workers banned, of all / steps until their bans, mean / honest workers banned, in all /"
    " validation loss above the clean run's, mean."
)


def backdoor_table(title: str, groups: Sequence[Group]) -> str:
    """A page with a row for each attack."""
    found = {(group.name, group.scenario.method): group for group in groups}
    lines = ["| attack | malicious in | " + " | ".join(_METHODS) + " |", "|" + "---|" * (2 + len(_METHODS))]
    for name in dict.fromkeys(group.name for group in groups):
        cells = [_cell(found.get((name, method))) for method in _METHODS]
        where = name[2] or ("one middle stage" if name[1] else "")
        lines.append("| " + " | ".join([name[0], where, *cells]) + " |")
    return "\n".join([f"# {title}", "", setting(groups), "", _EXPLAINED, "", *lines]) + "\n"


def _cell(group: Group | None) -> str:
    if group is None:
        return ""
    measured = [row.measures for row in group.rows]
    successes = [one.backdoor for one in measured]
    parts = [f"{percent(fmean(successes), ' %')}, {percent(max(successes), ' %')}"]
    copies = [one.backdoor_in_copies for one in measured if one.backdoor_in_copies is not None]
    if copies:
        parts.append(f"copies {percent(fmean(copies), ' %')}")
    if group.scenario.method != "unprotected":
        if group.scenario.attacked:
            waits = [wait for one in measured for wait in one.iterations]
            parts.append(f"{len(waits)} of {sum(len(one.guilty) for one in measured)}")
            parts.append(f"{fmean(waits):.1f}" if waits else "-")
        parts.append(f"{sum(one.false_bans for one in measured)}")
    return " / ".join([*parts, loss(group.gap)])
