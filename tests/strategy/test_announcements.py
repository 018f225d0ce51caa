"""What a strategy remembers, and tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_sentinel as ls
from lightning_sentinel.strategy import announcements
from tests.distributed import tasks


def shout(signal: object, context: ls.AttackContext) -> object:
    return signal * 100  # type: ignore[operator]


def test_a_long_run_remembers_the_latest_detections_and_writes_down_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "MOST_DETECTIONS", 20)
    strategy = ls.SentinelStrategy(
        3,
        3,
        micro_batches=2,
        engine="virtual",
        verification=ls.Verification(warmup_steps=27, seed=1),
        response=ls.Response(on_flag="log", ban_after=None, audit_rate=None),
    )
    injector = ls.AttackInjector(shout, workers=[ls.Worker(1, 0)], start_step=28)
    module = tasks.Classifier("sgd")
    run = tasks.trainer(strategy, 1, 44, [injector], logger=CSVLogger(tmp_path, name="", version=""))
    run.fit(module, tasks.loader(24))
    written = (tmp_path / "sentinel" / "detections.jsonl").read_text().splitlines()
    assert len(written) > len(strategy.detections) == 20
    assert strategy.detections[-1].step == 43 and type(strategy.detections) is list
    assert [one.step for one in strategy.detections] == sorted(one.step for one in strategy.detections)
