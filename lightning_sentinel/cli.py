"""The command ``lightning-sentinel``: LightningCLI with the strategies registered, benchmarks, and what is done to files of runs.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's own subcommands; ``benchmark`` measures this package;
``consolidate`` makes one ordinary file of a sharded checkpoint; ``identity`` prints the public key of a worker's key file;
``verify-evidence`` says whether the evidence of a ban holds.
"""

from __future__ import annotations

import argparse
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
    # A module of the user's is named as `package.module.Class`; like `python -m`, look for it in the working directory first.
    sys.path.insert(0, str(Path.cwd()))
    try:
        if arguments[:1] == ["consolidate"]:
            _consolidate(arguments[1:])
            return
        if arguments[:1] == ["verify-evidence"]:
            _verify_evidence(arguments[1:])
            return
        if arguments[:1] == ["identity"]:
            _identity(arguments[1:])
            return
        try:
            import jsonargparse  # noqa: F401
        except ImportError:
            raise MissingExtraError("jsonargparse", "cli", "The command lightning-sentinel") from None
        if arguments[:1] == ["benchmark"]:
            from lightning_sentinel.benchmarks import run_benchmark

            run_benchmark(arguments[1:])
        else:
            _lightning_cli(arguments)
    except SentinelError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _consolidate(arguments: list[str]) -> None:
    from lightning_sentinel.pipeline.checkpoints.sharded import consolidate

    parser = argparse.ArgumentParser(
        "lightning-sentinel consolidate",
        description="Make one ordinary Lightning checkpoint of a sharded one. Needs no other processes.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the sharded checkpoint")
    parser.add_argument("output", type=Path, metavar="OUT", help="the file to write, which must not be there yet")
    given = parser.parse_args(arguments)
    consolidate(given.directory, given.output)
    print(f"{given.output} is an ordinary checkpoint of {given.output.stat().st_size:,} bytes.")


def _verify_evidence(arguments: list[str]) -> None:
    from lightning_sentinel.trust.evidence_files import read_evidence
    from lightning_sentinel.trust.known_workers import read_known_workers
    from lightning_sentinel.trust.verify_evidence import verify_evidence

    parser = argparse.ArgumentParser(
        "lightning-sentinel verify-evidence",
        description="Say whether the evidence of a ban holds, who signed what, and what nobody can tell from the file. Needs"
        " neither the run nor other processes. A run with a logger writes a file for each ban to sentinel/evidence in its log"
        " directory. Where nobody signed or recomputed anything, as of a ban by flags, it is a record and no proof: what is"
        " verified then is that the ban follows from its numbers.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a file of evidence")
    parser.add_argument("--known-workers", type=Path, metavar="LIST", help="the list on which all keys in the evidence must be")
    given = parser.parse_args(arguments)
    known = None if given.known_workers is None else read_known_workers(given.known_workers)
    findings = verify_evidence(read_evidence(given.file), known)
    if not findings.holds:
        raise SystemExit(findings.verdict)
    print(findings)


def _identity(arguments: list[str]) -> None:
    from lightning_sentinel.trust.identity import Identity

    parser = argparse.ArgumentParser(
        "lightning-sentinel identity",
        description="Print the public key of a worker's key file, as a list of known workers has it. A missing file is made.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the key file, which SentinelStrategy(identity=FILE) takes")
    print(Identity.kept(parser.parse_args(arguments).file).public)


def _lightning_cli(arguments: list[str]) -> None:
    import warnings

    from lightning.pytorch.cli import SaveConfigCallback

    from lightning_sentinel.lightning_cli import SentinelCLI

    options: dict[str, Any] = {"save_config_kwargs": {"overwrite": True}, "save_config_callback": SaveConfigCallback}
    # LightningCLI warns about arguments that are not those of sys.argv, which is what tests and other programs pass.
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended to run from within Python.*")
    SentinelCLI(args=arguments, parser_kwargs={"prog": "lightning-sentinel"}, **options)


if __name__ == "__main__":
    main()
