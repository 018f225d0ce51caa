from __future__ import annotations

import pytest
import torch.distributed as dist
from rich.console import Console

from lightning_sentinel.benchmarks import throughput
from lightning_sentinel.benchmarks.throughput import _table, _Time


def test_ratios_are_those_of_a_round() -> None:
    # A machine that gets slower from round to round: the ratio within each is 2, whatever the medians say.
    times = {"bare DeepSpeed": [1.0, 2.0, 8.0], "unverified": [2.0, 4.0, 16.0], "verified": [2.0, 5.0, 16.0]}
    console = Console(width=150, record=True)
    console.print(_table("a title", times, tokens=100))
    rows = {row.split("│")[1].strip(): [cell.strip() for cell in row.split("│")[2:-1]] for row in _rows(console.export_text())}
    assert rows["bare DeepSpeed"] == ["2000.0", "50", "1.000", "0.500", "0.500"]
    assert rows["unverified"] == ["4000.0", "25", "2.000", "1.000", "1.000"]
    assert rows["verified"] == ["5000.0", "20", "2.000", "1.000", "1.000"]


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("│")]


def test_cpu_time_is_that_of_all_ranks_and_the_clock_is_this_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    # Another rank that needed three times as much.
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(4))
    assert _Time(10.0, 1.0).of_a_step(_Time(18.0, 3.0), steps=4) == _Time(2.0, 2.0)


def test_tokens_are_those_of_the_whole_mesh() -> None:
    workload = throughput.Workload(replicas=3, sequence_length=5, micro_batch_size=2, micro_batches=7)
    assert workload.tokens == 5 * 2 * 7 * 3
