"""Measurements that users can repeat: ``lightning-sentinel benchmark ...``."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["run_benchmark"]


def run_benchmark(arguments: Sequence[str]) -> None:
    """Run the benchmark that the command line names."""
    from jsonargparse import auto_cli

    from lightning_sentinel.benchmarks.throughput import throughput

    auto_cli(
        {"throughput": throughput},
        args=list(arguments),
        prog="lightning-sentinel benchmark",
        as_positional=False,
    )
