"""Run Lightning's own tests with this strategy, and say what differs from a plain run, by cause.

``python -m tests.lightning_suite.run CHECKOUT [PART ...]``, where the checkout has ``tests/tests_pytorch``, of the version that is
installed; nothing of it is copied. Tests that do not pass are run again without the strategy: those that do not pass then either
are none of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PARTS = [
    *("callbacks", "checkpointing", "core", "loggers", "loops", "models"),
    *("overrides", "profilers", "trainer", "tuner", "utilities"),
]
_OPTIONS = ["-p", "tests.lightning_suite.plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore", "--tb=no", "--timeout=300"]


def results(checkout: Path, tests: Sequence[str], strategy: str, output: Path) -> dict[str, dict[str, Any]]:
    """Of each test; the last outcome counts, because an error after a test is one of its."""
    file = output / f"{strategy}.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    paths = [str(_ROOT), str(checkout / "tests"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LIGHTNING_SUITE_STRATEGY": strategy,
        "LIGHTNING_SUITE_RESULTS": str(file),
    }
    names = output / f"{strategy}.tests"
    names.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", *_OPTIONS, "--continue-on-collection-errors", f"@{names}"]
    with (output / f"{strategy}.log").open("w") as log:
        subprocess.run(command, cwd=checkout / "tests", env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["test"]: row for row in rows}


def causes(failed: list[dict[str, Any]]) -> Counter[str]:
    """How many failed with what, numbers left out."""
    said = [(row["kind"], (row["says"].splitlines() or [""])[0]) for row in failed]
    return Counter(f"{kind}: {re.sub('[0-9]+', 'N', line)[:110]}" for kind, line in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("parts", nargs="*", default=_PARTS)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning-suite"))
    arguments = parser.parse_args()
    checkout, output = arguments.checkout.resolve(), arguments.output.resolve()
    ours = results(checkout, [f"tests_pytorch/{part}" for part in arguments.parts], "sentinel", output)
    failed = [test for test, row in ours.items() if row["outcome"] == "failed"]
    plain = results(checkout, failed, "auto", output) if failed else {}
    differs = [ours[test] for test in failed if plain.get(test, {}).get("outcome") == "passed"]
    passed = [row for row in ours.values() if row["outcome"] == "passed"]
    ran = sum(row["ran"] for row in (*passed, *differs))
    print(f"{len(passed) + len(differs)} tests pass without the strategy; with it {len(passed)}.")
    print(f"It ran in {ran}; of those {sum(row['ran'] for row in passed)} pass.")
    for title, rows in (
        ("refused", [row for row in differs if row["refused"]]),
        ("different", [row for row in differs if not row["refused"]]),
    ):
        print(f"\n{title}: {len(rows)}")
        for cause, number in causes(rows).most_common():
            print(f"{number:5d}  {cause}")


if __name__ == "__main__":
    main()
