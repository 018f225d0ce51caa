from __future__ import annotations

import torch

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.local_worker import LocalWorker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.verification import COLUMNS, Ledger

MESH, LIAR = Mesh(3, 3), Worker(1, 2)
BOUNDARY = Boundary(0, Direction.ACTIVATION)


def worker(attack: str | None, boundary: Boundary = BOUNDARY) -> LocalWorker:
    guard = Guard(MESH, [boundary], LIAR, Verification(seed=0), Response(), Ledger(), torch.device("cpu"))
    return LocalWorker(LIAR, MESH, guard, None if attack is None else Adversary(attack, MESH, workers=[LIAR, Worker(0, 2)]))


def test_the_row_of_a_rank_says_what_its_attacker_says() -> None:
    local = worker("false_rows")
    assert local.guard is not None
    local.guard.calibration.trend[0] = 2.0
    signal = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    for sender, feature in ((Worker(0, 2), 2.0), (Worker(0, 1), 0.0)):
        report = local.report(BOUNDARY, sender, step=5, slot=0)
        local.guard.receive(BOUNDARY, signal, torch.tensor([False]), report=report)
        row = local.guard.take_rows(BOUNDARY)[0, 0]
        assert row[COLUMNS.index("norm")] == feature, "the usual row of an ally; of others what was measured, at first nothing"


def test_who_lies_otherwise_or_not_at_all_reports_what_it_measures() -> None:
    for attack in (None, "zeros", "false_votes"):
        assert worker(attack).report(BOUNDARY, Worker(0, 2), step=5, slot=0) is None
