from __future__ import annotations

from typing import Any

from tests.distributed.gpu_report import report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """After ``make test-gpu``: what was found on which device."""
    if report.rows:
        terminalreporter.section("GPU")
        for line in report.table(report.rows):
            terminalreporter.write_line(line)
