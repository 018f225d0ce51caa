"""The results as a table, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from lightning_sentinel.benchmarks.detection.results import Group

__all__ = ["markdown", "terminal"]

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
    "Means over seeds. F1 is over workers, in percent; iterations are steps of a malicious worker until its ban; *flagged* is the"
    " share of honest signals that were flagged; false bans are honest workers banned in a run; audits are recomputed signals; the"
    " loss gap is validation loss above that of the clean run, and *unprotected* the same where nobody looks on."
)


def markdown(title: str, groups: Sequence[Group]) -> str:
    """A Markdown page with one table."""
    columns, lines = _lines(groups)
    head = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join("---" if column in _COLUMNS[:_TEXT] else "---:" for column in columns) + "|"
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([f"# {title}", "", _EXPLAINED, "", head, rule, *body]) + "\n"


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
    runs = str(len(group.rows)) + (f" ({group.exhausted} exhausted)" if group.exhausted else "")
    return [
        attack,
        direction,
        variant,
        group.scenario.method,
        _percent(group.f1),
        _NOTHING if group.iterations is None else f"{group.iterations:.1f}",
        _percent(group.false_positive_rate, " %"),
        f"{group.false_bans:.1f}",
        _percent(group.audit_share, " %"),
        _loss(group.gap),
        _loss(group.unprotected_gap),
        runs,
    ]


def _percent(value: float | None, unit: str = "") -> str:
    return _NOTHING if value is None else f"{100 * value:.1f}{unit}"


def _loss(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "diverged" if value == float("inf") else f"{value:+.3f}"
