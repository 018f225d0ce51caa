"""Broken processors: what they did, and who finds them, as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lightning_sentinel.benchmarks.detection.results import Group, Row, ratio
from lightning_sentinel.benchmarks.detection.rivals import (
    HARMFUL,
    MedianRule,
    Replay,
    SpreadRule,
    first_alarm,
    harmful_steps,
    workers_at_fault,
)
from lightning_sentinel.benchmarks.detection.tables import loss, percent, setting
from lightning_sentinel.benchmarks.detection.truth import Work
from lightning_sentinel.mesh import Worker

__all__ = ["beside_rivals"]

_RULES: dict[str, SpreadRule | MedianRule] = {
    "norm > mean + 4 std": SpreadRule(4.0),
    "norm > 3 medians": MedianRule(3.0),
}
_HEAD = ("fault", "wrong", "of these masked", "unprotected", "audited", "sentinel", "replay", *_RULES)
_EXPLAINED = (
    "*Wrong*: micro-batches that a broken worker computed otherwise than an honest one, of all of its own; *masked*: those in which"
    f" nothing is off by more than {HARMFUL:g} of its norm, neither signals nor weight gradients. Under *audited* and *sentinel*:"
    " broken workers that were banned, of those that did harm / steps from a worker's first harmful fault to its ban / honest"
    " workers banned, in all / validation loss above the clean run's. *Replay* of a neighbour's micro-batch, with as large a share"
    " recomputed as *audited* has: workers that are expected to be found / steps. Under the norms: steps with a harmful fault"
    " in which the alarm rang / runs in which it did / steps to the first. Where nobody is broken:"
    " honest signals flagged, or steps with an alarm."
)


def beside_rivals(title: str, groups: Sequence[Group]) -> str:
    """A page with a row for each fault."""
    found = {(group.name, group.scenario.method): group for group in groups}
    names = list(dict.fromkeys(group.name for group in groups))
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for name in names:
        methods = {method: found.get((name, method)) for method in ("unprotected", "audited", "sentinel")}
        lines.append("| " + " | ".join([name[0], *_cells(**methods)]) + " |")
    return "\n".join([f"# {title}", "", setting(groups), "", _EXPLAINED, "", *lines]) + "\n"


def _cells(unprotected: Group | None, audited: Group | None, sentinel: Group | None) -> list[str]:
    ours = [_ours(group) for group in (audited, sentinel)]
    if unprotected is None:
        return ["", "", "", *ours, "", *("" for _ in _RULES)]
    rules = [_alarms(rule, unprotected) for rule in _RULES.values()]
    if not unprotected.scenario.attacked:
        return ["", "", "", *ours, "", *rules]
    works = [work for row in unprotected.rows for work in _works(row)]
    masked = sum(work.error <= HARMFUL for work in works)
    computed = sum(len(row.measures.guilty) * row.measures.steps * row.scenario.training.micro_batches for row in unprotected.rows)
    wrong = [percent(ratio(len(works), computed), " %"), percent(ratio(masked, len(works)), " %")]
    share = None if audited is None else audited.audit_share
    return [*wrong, loss(unprotected.gap), *ours, _replay(unprotected, share), *rules]


def _works(row: Row) -> list[Work]:
    return [Work.of(one) for one in row.measures.works]


def _ours(group: Group | None) -> str:
    """What verification made of the runs of a fault."""
    if group is None:
        return ""
    false_bans = sum(row.measures.false_bans for row in group.rows)
    if not group.scenario.attacked:
        return f"{percent(group.false_positive_rate, ' %')} / {false_bans} / {loss(group.gap)}"
    at_fault = 0
    waits = []
    for row in group.rows:
        first = workers_at_fault(_works(row))
        banned = {Worker(stage, replica): step for stage, replica, step in row.measures.banned_at}
        at_fault += len(first)
        waits += [banned[worker] - step for worker, step in first.items() if worker in banned]
    return f"{len(waits)} of {at_fault} / {_mean(waits)} / {false_bans} / {loss(group.gap)}"


def _replay(group: Group, share: float | None) -> str:
    if not share:
        return ""
    expected, at_fault, waits = 0.0, 0, []
    for row in group.rows:
        training = row.scenario.training
        works = _works(row)
        part, wait = Replay.at(share, training.micro_batches).finds(works, training.warmup_steps, training.total_steps)
        at_fault += len(workers_at_fault(works))
        expected += part * len(workers_at_fault(works))
        waits += [] if wait is None else [wait]
    return f"{expected:.1f} of {at_fault} / {_mean(waits)}"


def _alarms(rule: SpreadRule | MedianRule, group: Group) -> str:
    rang, steps, waits = 0, 0, []
    for row in group.rows:
        alarms = rule.alarms(row.measures.norms)
        harmful = harmful_steps(_works(row))
        if not row.scenario.attacked:
            harmful = set(range(row.scenario.training.warmup_steps, len(alarms)))
        steps += len(harmful)
        rang += sum(alarms[step] for step in harmful)
        waits += [wait] if (wait := first_alarm(alarms, harmful)) is not None else []
    share = percent(ratio(rang, steps), " %")
    return f"{share} / {len(waits)} of {len(group.rows)} / {_mean(waits)}" if group.scenario.attacked else share


def _mean(waits: Sequence[float]) -> str:
    return f"{fmean(waits):.1f}" if waits else "-"
