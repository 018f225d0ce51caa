from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_sentinel as ls
from tests.distributed import tasks

QUIET = ls.Response(on_flag="log", ban_after=None, audit_rate=None)
TOTALS = ("sentinel/flags", "sentinel/banned", "sentinel/audits")


class Reads(L.Callback):
    """What the ledger says after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        ledger = trainer.strategy.ledger  # type: ignore[attr-defined]
        self.seen.append([float(ledger.total_flags), float(len(ledger.banned)), float(ledger.audits)])


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that are logged, in order."""
    names: list[str] = []
    log = L.LightningModule.log

    def listening(self: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
        names.append(name)
        log(self, name, *args, **kwargs)

    monkeypatch.setattr(L.LightningModule, "log", listening)
    return names


def test_totals_are_logged_at_every_step_of_every_epoch_and_not_entered_anew_where_they_stay(
    tmp_path: Path, entered: list[str]
) -> None:
    strategy = ls.SentinelStrategy(
        2, 3, micro_batches=2, engine="virtual", verification=ls.Verification(seed=0), response=ls.Response(audit_rate=None)
    )
    attack = ls.AttackInjector(lambda signal, context: signal * torch.nan, workers=[ls.Worker(1, 1)], start_step=6)
    reads = Reads()
    run = tasks.trainer(strategy, 1, -1, [attack, reads], max_epochs=4, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(tasks.Classifier(), tasks.loader(24))

    with next(tmp_path.glob("**/metrics.csv")).open() as file:
        logged = [[float(row[name]) for name in TOTALS] for row in csv.DictReader(file) if row["sentinel/anomaly_score"]]
    assert logged == reads.seen and len(logged) == 16
    assert reads.seen[5] == [0, 0, 0] and reads.seen[-1][1] == 1
    # At the start of each epoch, and where one of them has changed.
    changes = sum(one != other for one, other in zip(reads.seen, reads.seen[1:]))
    assert entered.count("sentinel/flags") <= 4 + changes < 16


class Notes(L.Callback):
    """The highest score of each batch, and what callbacks see of it."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        scores = strategy.table.worker_scores(strategy.mesh, strategy.wiring)
        self.scores.append(float(scores[~scores.isnan()].max()) if (~scores.isnan()).any() else math.nan)
        self.seen.append(float(trainer.callback_metrics.get("sentinel/anomaly_score", math.nan)))


def test_loggers_are_told_the_highest_score_since_they_were_told_before(tmp_path: Path, entered: list[str]) -> None:
    strategy = ls.SentinelStrategy(
        2, 3, micro_batches=4, engine="virtual", verification=ls.Verification(warmup_steps=20, seed=0), response=QUIET
    )
    attack = ls.AttackInjector(lambda signal, context: signal * (50.0 if context.step == 32 else 1.0), workers=[ls.Worker(1, 1)])
    notes = Notes()
    run = tasks.trainer(strategy, 1, 60, [attack, notes], logger=CSVLogger(tmp_path), log_every_n_steps=10)
    run.fit(tasks.Classifier(), tasks.loader(24))

    with next(tmp_path.glob("**/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("sentinel/anomaly_score")]
    logged = {int(row["step"]): float(row["sentinel/anomaly_score"]) for row in rows}
    assert max(notes.scores[30:40]) == notes.scores[32] > 1
    for step, value in logged.items():
        since = [score for score in notes.scores[step - 9 : step + 1] if not math.isnan(score)]
        assert value == pytest.approx(max(since)), step
    assert set(logged) == set(range(9, 60, 10))
    # For callbacks at once; the next one after the monitor sees it in the batch itself.
    assert notes.seen[33] == notes.scores[32]
    flagged = sum(score > 1 for score in notes.scores[20:] if not math.isnan(score))
    assert entered.count("sentinel/anomaly_score") <= len(logged) + flagged
