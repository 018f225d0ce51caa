"""The table that ``make test-gpu`` ends with."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    check: str
    devices: str
    backend: str
    found: str


class Report:
    """What the checks found, in the order in which they ran."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @staticmethod
    def table(rows: list[Row]) -> list[str]:
        """Lines of equal columns, the names first."""
        entries = [tuple(Row._fields), *rows]
        widths = [max(len(entry[column]) for entry in entries) for column in range(len(Row._fields))]
        return ["  ".join(text.ljust(width) for text, width in zip(entry, widths)).rstrip() for entry in entries]


report = Report()
