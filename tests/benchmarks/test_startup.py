from __future__ import annotations

import pytest

from lightning_sentinel.benchmarks import startup
from tests.distributed import world


def test_both_variants_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def seconds(code: str, processes: int) -> float:
        ran.append(code)
        # Slower from round to round, as a machine may get: the difference is that of the turns of one round.
        return 10.0 * len(ran) + (1.5 if "first_batch" in code else 0.0)

    monkeypatch.setattr(startup, "_seconds", seconds)
    startup.startup(stages=3, replicas=2, rounds=4)
    said = capsys.readouterr().out
    assert "6 processes" in said
    assert sum("first_batch(3)" in code for code in ran) == 4 == sum(code.startswith("import torch") for code in ran)
    assert "1.5" in said


def test_processes_that_fail_are_said() -> None:
    assert startup._seconds("pass", 2) < 60
    with pytest.raises(RuntimeError, match=r"some ended with \[3, 0\]"):
        startup._seconds("import os; raise SystemExit(3 * (os.environ['RANK'] == '0'))", 2)


def first_batch() -> int:
    startup.first_batch(2)
    return 1


def test_what_is_timed_trains() -> None:
    assert world.run(first_batch, 4) == [1] * 4
