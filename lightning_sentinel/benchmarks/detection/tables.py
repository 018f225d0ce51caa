"""The results as a table, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.table import Table

from lightning_sentinel.benchmarks.detection.results import Group
from lightning_sentinel.benchmarks.detection.summary import summary

__all__ = ["loss", "markdown", "percent", "setting", "terminal"]

_COLUMNS = (
    "attack",
    "direction",
    "variant",
    "method",
    "F1",
    "iterations",
    "flagged",
    "false bans",
    "audits",
    "loss gap",
    "unprotected",
    "runs",
)
_TEXT = 4
"""How many of the columns are words."""
_NOTHING = "-"

_EXPLAINED = (
    "Means over seeds. Under each method: F1 over workers in percent / steps of a malicious worker until its ban / honest workers"
    " banned in a run / recomputed signals, where there are audits / validation loss above that of the clean run; where nobody is"
    " malicious, the share of honest signals that were flagged stands in place of the first two. *Unprotected* is the loss where"
    " nobody looks on."
)


def markdown(title: str, groups: Sequence[Group]) -> str:
    """A Markdown page: what was run, kinds of attacks in short, then a row for each attack and a column for each method."""
    methods = list(dict.fromkeys(group.scenario.method for group in groups if group.scenario.method != "unprotected"))
    names = list(dict.fromkeys(group.name for group in groups if methods == [] or group.scenario.method in methods))
    found = {(group.name, group.scenario.method): group for group in groups}
    varied = any(variant for _, _, variant in names)
    head = ["attack", "direction", *(["variant"] if varied else []), "unprotected", *methods]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        members = [found[name, method] for method in (*methods, "unprotected") if (name, method) in found]
        alone = loss(_first(group.unprotected_gap for group in members))
        cells = [_cell(found.get((name, method))) for method in methods]
        lines.append("| " + " | ".join([*(name if varied else name[:2]), alone, *cells]) + " |")
    short = summary(groups)
    return "\n".join([f"# {title}", "", setting(groups), "", *short, *([""] if short else []), _EXPLAINED, "", *lines]) + "\n"


def setting(groups: Sequence[Group]) -> str:
    """What was run, in one sentence; where a suite varies it, all values."""
    runs = [row.scenario for group in groups for row in group.rows]

    def among(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    def of(part: str) -> str:
        return among(getattr(run.training, part) for run in runs)

    shares = among(f"{100 * run.fraction:g}" for run in runs if run.fraction)
    return (
        f"{of('stages')} stages x {of('replicas')} replicas; {of('micro_batches')} micro-batches of {of('micro_batch_size')} x"
        f" {of('sequence_length')} bytes of {of('data')} a replica and step; {of('model')} of width {of('width')};"
        f" {of('warmup_steps')} honest steps, then {of('steps')}{f'; {shares} % malicious in each middle stage' * bool(shares)};"
        f" seeds {among(run.seed for run in runs)}."
    )


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def _cell(group: Group | None) -> str:
    if group is None:
        return _NOTHING
    if group.scenario.attacked:
        parts = [percent(group.f1), _NOTHING if group.iterations is None else f"{group.iterations:.1f}"]
    else:
        parts = [f"{percent(group.false_positive_rate, ' %')} flagged"]
    parts.append(f"{group.false_bans:.1f}")
    if group.audit_share:
        parts.append(percent(group.audit_share, " %"))
    parts.append(loss(group.gap))
    return " / ".join(parts)


def terminal(title: str, groups: Sequence[Group]) -> Table:
    """The same table for rich."""
    columns, lines = _lines(groups)
    table = Table(title=title, box=SIMPLE, padding=0)
    for column in columns:
        table.add_column(column, justify="left" if column in _COLUMNS[:_TEXT] else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _lines(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    # What attacks cost unprotected has a column of its own; rows of it are only of use where there is nothing else.
    shown = [group for group in groups if group.scenario.method != "unprotected"] or list(groups)
    lines = [_cells(group) for group in shown]
    used = [index for index, column in enumerate(_COLUMNS) if column != "variant" or any(line[index] for line in lines)]
    return [_COLUMNS[index] for index in used], [[line[index] for index in used] for line in lines]


def _cells(group: Group) -> list[str]:
    attack, direction, variant = group.name
    runs = str(len(group.rows))
    return [
        attack,
        direction,
        variant,
        group.scenario.method,
        percent(group.f1),
        _NOTHING if group.iterations is None else f"{group.iterations:.1f}",
        percent(group.false_positive_rate, " %"),
        f"{group.false_bans:.1f}",
        percent(group.audit_share, " %"),
        loss(group.gap),
        loss(group.unprotected_gap),
        runs,
    ]


def percent(value: float | None, unit: str = "") -> str:
    """A share, as text; a dash where there is none."""
    return _NOTHING if value is None else f"{100 * value:.1f}{unit}"


def loss(value: float | None) -> str:
    """A difference of losses, as text."""
    if value is None:
        return _NOTHING
    return "diverged" if value == float("inf") else f"{value:+.3f}"
