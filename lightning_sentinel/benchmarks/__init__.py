"""Measurements that users can repeat: ``lightning-sentinel benchmark ...``."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["run_benchmark"]


def run_benchmark(arguments: Sequence[str]) -> None:
    """Run the benchmark that the command line names."""
    from jsonargparse import auto_cli

    from lightning_sentinel.benchmarks.detection.command import detection
    from lightning_sentinel.benchmarks.memory import memory
    from lightning_sentinel.benchmarks.overhead import overhead
    from lightning_sentinel.benchmarks.startup import startup
    from lightning_sentinel.benchmarks.throughput import throughput

    auto_cli(
        {"detection": detection, "memory": memory, "overhead": overhead, "startup": startup, "throughput": throughput},
        # The parser wants a value for every option, which nobody would think of giving to a switch.
        args=["--quick=true" if argument == "--quick" else argument for argument in arguments],
        prog="lightning-sentinel benchmark",
        as_positional=False,
    )
