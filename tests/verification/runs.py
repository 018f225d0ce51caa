"""Honest steps of a mesh, judged, and what a calibration learns from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification import Calibration, Ledger, SignalTable, judge
from lightning_sentinel.verification.calibration import Assessment
from lightning_sentinel.wiring import Wiring
from tests.verification.tools import F, table_of

WARMUP, MICRO_BATCHES = 24, 4
Draw = Callable[[int, torch.Generator], Tensor]


def normal(mesh: Mesh, micro_batches: int = MICRO_BATCHES) -> Draw:
    return lambda step, g: torch.randn(len(mesh.boundaries), mesh.replicas, micro_batches, F, generator=g)


class Run:
    """Honest steps of a mesh, judged without audits."""

    def __init__(
        self, mesh: Mesh, draw: Draw | None = None, *, ban_after: int | None = None, seed: int = 0, **settings: Any
    ) -> None:
        self.mesh, self.draw, self.ledger = mesh, draw or normal(mesh), Ledger(ban_after)
        self.calibration = Calibration(mesh, Verification(**{"warmup_steps": WARMUP, "window": 256, **settings}))
        self.generator = torch.Generator().manual_seed(seed)
        self.wiring = Wiring.of(mesh)
        self.banned = torch.zeros(len(mesh.boundaries), mesh.replicas, dtype=torch.bool)
        self.flags: list[int] = []

    def run(self, steps: int) -> Run:
        for _ in range(steps):
            table = table_of(self.draw(len(self.flags), self.generator), calibration=self.calibration)
            self.step(table)
        return self

    def assess(self, table: SignalTable) -> Assessment:
        return self.calibration.assess(table, self.wiring, self.banned)

    def step(self, table: SignalTable) -> Any:
        number, calibration = len(self.flags), self.calibration
        assessment = self.assess(table)
        verdict = judge(table, assessment, calibration.heights(self.wiring), self.mesh, self.wiring, number, True)
        self.ledger.record(number, verdict.flagged, verdict.suspects, verdict.verified, self.mesh)
        self.flags.append(verdict.flagged.total())
        calibration.learn(verdict.table, verdict.honest, verdict.heard, verdict.explained, assessment, self.wiring)
        return assessment, verdict
