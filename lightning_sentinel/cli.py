"""The command ``lightning-sentinel``: LightningCLI with the strategies registered, and the benchmarks.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's own subcommands; ``benchmark`` measures this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_sentinel.errors import MissingExtraError, SentinelError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: instead of ``sys.argv[1:]``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # A module of the user's is named as `package.module.Class`; like `python -m`, look for it from here first.
    sys.path.insert(0, str(Path.cwd()))
    try:
        import jsonargparse  # noqa: F401
    except ImportError:
        raise SystemExit(str(MissingExtraError("jsonargparse", "cli", "The command lightning-sentinel"))) from None
    try:
        if arguments[:1] == ["benchmark"]:
            from lightning_sentinel.benchmarks import run_benchmark

            run_benchmark(arguments[1:])
        else:
            _lightning_cli(arguments)
    except SentinelError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _lightning_cli(arguments: list[str]) -> None:
    import warnings

    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

    import lightning_sentinel  # noqa: F401 - registers the strategies

    options: dict[str, Any] = {"save_config_kwargs": {"overwrite": True}, "save_config_callback": SaveConfigCallback}
    # LightningCLI warns about arguments that are not those of sys.argv, which is what tests and other programs pass.
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended to run from within Python.*")
    LightningCLI(args=arguments, parser_kwargs={"prog": "lightning-sentinel"}, **options)


if __name__ == "__main__":
    main()
