"""Run Lightning's own tests with this strategy, and say what differs from a plain run, by cause.

``python -m tests.lightning_suite.run CHECKOUT [PART ...]``, where the checkout has ``tests/tests_pytorch``, of the version that is
installed; nothing of it is copied. Tests that do not pass are run again without the strategy: those that do not pass then either
are none of ours. ``--output`` keeps what was found, a file a part: a part that has run to its end, and a plain run of a test, are
not run again. Remove a part's file to run it anew, or run what failed ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PARTS = [
    *("callbacks", "checkpointing", "core", "loggers", "loops", "models"),
    *("overrides", "profilers", "trainer", "tuner", "utilities"),
]
_OPTIONS = ["-p", "tests.lightning_suite.plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore", "--tb=no", "--timeout=300"]


class Results:
    """Of tests with one strategy, by test; kept in a folder, a file a part.

    Args:
        checkout: of Lightning.
        strategy: ``"sentinel"``, or ``"auto"`` for a plain run.
        folder: of the files.
        processes: how many tests run at a time, of different files.
    """

    def __init__(self, checkout: Path, strategy: str, folder: Path, processes: int) -> None:
        self._checkout, self._strategy, self._folder, self._processes = checkout, strategy, folder / strategy, processes
        self._folder.mkdir(parents=True, exist_ok=True)

    def of_part(self, part: str, again: bool) -> dict[str, dict[str, Any]]:
        """All tests of a part; those that failed in an earlier run are run ``again``."""
        file = self._folder / f"{part}.jsonl"
        if not file.exists():
            self._run([f"tests_pytorch/{part}"], file.with_suffix(".unfinished"))
            file.with_suffix(".unfinished").rename(file)
        elif again and (failed := [test for test, row in _read(file).items() if row["outcome"] == "failed"]):
            self._run(failed, file)
        return _read(file)

    def of(self, part: str, tests: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Some tests of a part."""
        file = self._folder / f"{part}.jsonl"
        missing = [test for test in tests if test not in _read(file)]
        if missing:
            self._run(missing, file)
        known = _read(file)
        return {test: known[test] for test in tests if test in known}

    def _run(self, tests: Sequence[str], file: Path) -> None:
        paths = [str(_ROOT), str(self._checkout / "tests"), os.environ.get("PYTHONPATH")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LIGHTNING_SUITE_STRATEGY": self._strategy,
            "LIGHTNING_SUITE_RESULTS": str(file),
        }
        names = file.with_suffix(".tests")
        names.write_text("\n".join(tests))
        several = ["-n", str(self._processes), "--dist", "loadfile"] if self._processes > 1 else []
        command = [sys.executable, "-m", "pytest", *_OPTIONS, *several, "--continue-on-collection-errors", f"@{names}"]
        with file.with_suffix(".log").open("w") as log:
            subprocess.run(
                command, cwd=self._checkout / "tests", env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            )


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of a test counts, because an error after a test is one of its."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["test"]: row for row in map(json.loads, lines)}


def cause(row: dict[str, Any]) -> str:
    """What a test failed with, numbers left out."""
    line = (row["says"].splitlines() or [""])[0]
    return f"{row['kind']}: {re.sub('[0-9]+', 'N', line)[:110]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("parts", nargs="*", default=_PARTS)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning-suite"))
    parser.add_argument("--tests", action="store_true", help="name the tests of each cause")
    parser.add_argument("--again", action="store_true", help="run what failed with the strategy once more")
    parser.add_argument("-n", type=int, default=1, help="tests at a time")
    arguments = parser.parse_args()
    checkout, output = arguments.checkout.resolve(), arguments.output.resolve()
    with_ours, without = (Results(checkout, strategy, output, arguments.n) for strategy in ("sentinel", "auto"))
    passed, differs = [], []
    for part in arguments.parts:
        ours = with_ours.of_part(part, arguments.again)
        passed += [row for row in ours.values() if row["outcome"] == "passed"]
        failed = [test for test, row in ours.items() if row["outcome"] == "failed"]
        differs += [ours[test] for test, row in without.of(part, failed).items() if row["outcome"] == "passed"]
    ran = sum(row["ran"] for row in (*passed, *differs))
    print(f"{len(passed) + len(differs)} tests pass without the strategy; with it {len(passed)}.")
    print(f"It ran in {ran}; of those {sum(row['ran'] for row in passed)} pass.")
    for title, rows in (
        ("refused", [row for row in differs if row["refused"]]),
        ("different", [row for row in differs if not row["refused"]]),
    ):
        print(f"\n{title}: {len(rows)}")
        of_cause: dict[str, list[str]] = {}
        for row in rows:
            of_cause.setdefault(cause(row), []).append(row["test"])
        for why, tests in sorted(of_cause.items(), key=lambda item: -len(item[1])):
            print(f"{len(tests):5d}  {why}")
            if arguments.tests:
                print(*(f"         {test}" for test in tests), sep="\n")


if __name__ == "__main__":
    main()
