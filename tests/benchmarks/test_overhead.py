"""The benchmark of what verification costs, at a size that says nothing about cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_sentinel.benchmarks.overhead import Load, overhead


def test_every_size_is_varied_by_itself_and_the_parts_are_smaller_than_the_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Load(width=16, sequence_length=8, micro_batch_size=2, stages=3, blocks=1)
    overhead(small, [16, 32], [8], [1, 4], [3], [1], steps=3, output=tmp_path / "overhead.json")
    results = json.loads((tmp_path / "overhead.json").read_text())
    assert [(one["load"]["width"], one["load"]["replicas"]) for one in results] == [(16, 1), (32, 1), (16, 4)]
    for one in results:
        assert 0 < one["verification"] < one["step"] and one["state"] > 0
    assert "share" in capsys.readouterr().out
