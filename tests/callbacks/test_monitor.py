from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_sentinel as ls
from tests.distributed import tasks

TOTALS = ("sentinel/flags", "sentinel/banned", "sentinel/audits")


class Reads(L.Callback):
    """What the ledger says after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        ledger = trainer.strategy.ledger  # type: ignore[attr-defined]
        self.seen.append([float(ledger.total_flags), float(len(ledger.banned)), float(ledger.audits)])


def test_totals_are_logged_at_every_step_of_every_epoch_and_not_entered_anew_where_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []
    log = L.LightningModule.log

    def listening(self: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
        entered.append(name)
        log(self, name, *args, **kwargs)

    monkeypatch.setattr(L.LightningModule, "log", listening)
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
