"""Steps written by hand, and their verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import COLUMNS, SignalTable, StepVerdict, judge, judge_with_audits
from lightning_sentinel.verification.audit import Drawn
from lightning_sentinel.verification.drift import ALARM, ALARM_WITHOUT_AUDITS
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.jury import Auditable, Findings
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.wiring import Wiring
from tests.verification.tools import as_received, compared

MICRO_BATCHES = 4
ASKED = -1
"""The micro-batch of each sender that is audited if its sums are high."""
A, G = Direction.ACTIVATION, Direction.GRADIENT


class Step:
    """A table written by hand: every signal honest, but those that are set."""

    def __init__(self, stages: int = 4, replicas: int = 3, micro_batches: int = MICRO_BATCHES, score: float = 0.4) -> None:
        self.mesh = Mesh(stages, replicas)
        self.rows = torch.zeros(len(self.mesh.boundaries), replicas, micro_batches, len(COLUMNS))
        self._column("score").fill_(score)
        self._column("positions").fill_(6)
        self.live = torch.ones(replicas, dtype=torch.bool)

    def _column(self, name: str) -> Tensor:
        return self.rows[..., COLUMNS.index(name)]

    def _at(self, index: int, direction: Direction) -> int:
        return self.mesh.boundaries.index(Boundary(index, direction))

    def flag(
        self, index: int, direction: Direction, replica: int, micro_batches: list[int], score: float = 50.0, worst: int = 1
    ) -> Step:
        for micro_batch in micro_batches:
            at = self._at(index, direction), replica, micro_batch
            for name, value in (("score", score), ("worst", worst), ("flagged", 1)):
                self._column(name)[at] = value
        return self

    def flag_non_finite(self, index: int, direction: Direction, replica: int, micro_batches: list[int]) -> Step:
        return self.flag(index, direction, replica, micro_batches, score=MAX_SCORE, worst=-1)

    def taint(self, index: int, direction: Direction, replica: int, micro_batches: list[int], score: float = 30.0) -> Step:
        for micro_batch in micro_batches:
            at = self._at(index, direction), replica, micro_batch
            for name, value in (("score", score), ("flagged", 0), ("tainted", 1)):
                self._column(name)[at] = value
        return self

    def ban(self, replica: int) -> Step:
        """Leave a pipeline out: all its signals are tainted from the start."""
        self.live[replica] = False
        for boundary in self.mesh.boundaries:
            self.taint(boundary.index, boundary.direction, replica, list(range(self.rows.shape[2])))
        return self

    def judge(self, *, exclude: bool = True, step: int = 7) -> StepVerdict:
        return self.with_peers(as_received, exclude=exclude, step=step)

    def with_peers(
        self, assess: Any = compared, *, exclude: bool = True, step: int = 7, drifting: Tensor | None = None
    ) -> StepVerdict:
        """By default as if all signals had been compared with those of the other replicas."""
        table = SignalTable(self.rows)
        heights = self.heights(ALARM_WITHOUT_AUDITS + 1, drifting)
        return judge(table, assess(table, self.live), heights, self.mesh, self.wiring, step, exclude)

    def audited(
        self,
        lies: Tensor,
        drawn: Tensor | None = None,
        drifting: Tensor | None = None,
        outvoted: Mapping[tuple[int, int, int], frozenset[Worker]] | None = None,
    ) -> tuple[StepVerdict, Tensor]:
        """The verdict where an audit knows the lies ``(boundaries, lanes, micro_batches)``, and what it was asked.

        In place of lies outcomes will do.
        """
        table, asked = SignalTable(self.rows), []

        def audit(audited: Auditable) -> Findings:
            asked.append(audited.signals | audited.drawn.signals.any(dim=0))
            return Findings(lies.long(), outvoted or {})  # also of signals that nobody asked about, which must not count

        # By the first of its stage; of two or more it is the same.
        nothing = torch.zeros(self.mesh.replicas, *lies.shape, dtype=torch.bool)
        by_one = nothing.clone()
        by_one[0] = False if drawn is None else drawn
        heights, assessment = self.heights(ALARM + 1, drifting), compared(table, self.live)
        one_each = torch.zeros_like(assessment.valid)
        one_each[..., ASKED] = True
        verdict = judge_with_audits(table, assessment, heights, Drawn(by_one, nothing), one_each, audit, self.mesh, self.wiring, 7)
        (once,) = asked
        return verdict, once

    def heights(self, height: float, drifting: Tensor | None) -> Tensor:
        """Cumulative sums ``(boundaries, lanes)``: zero but for those that drift."""
        return torch.zeros(self.rows.shape[:2]) if drifting is None else height * drifting

    @property
    def wiring(self) -> Wiring:
        return replace(Wiring.of(self.mesh, micro_batches=self.rows.shape[2]), live=tuple(self.live.tolist()))


ALL = list(range(MICRO_BATCHES))


def dirty(verdict: StepVerdict) -> set[tuple[int, int, int]]:
    """``(stage, replica, micro_batch)`` of the gradients that do not count."""
    return {tuple(entry) for entry in (~verdict.clean).nonzero().tolist()}


@st.composite
def steps(draw: st.DrawFn, fewest_stages: int = 1) -> Step:
    step = Step(draw(st.integers(fewest_stages, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    for boundary in step.mesh.boundaries:
        for replica in range(step.mesh.replicas):
            for m in range(step.rows.shape[2]):
                where = boundary.index, boundary.direction, replica, [m]
                kind = rng.choice(["honest", "flag", "broken", "taint"], p=[1 - share, share / 2, share / 4, share / 4])
                if kind == "flag":
                    step.flag(*where, score=float(rng.lognormal(1.0, 1.0) + 1.01), worst=int(rng.integers(len(FEATURES))))
                elif kind == "broken":
                    step.flag_non_finite(*where)
                    step.rows[step._at(*where[:2]), replica, m, : len(FEATURES)] = torch.nan
                elif kind == "taint":
                    step.taint(*where, score=float(rng.choice([0.1, 5.0, MAX_SCORE])))
    for replica in draw(st.sets(st.integers(0, step.mesh.replicas - 1), max_size=step.mesh.replicas - 1)):
        step.ban(replica)
    return step


def first_of_each_micro_batch(out: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """What is blamed, and what lies behind it: followed along the way of each micro-batch by hand."""
    blamed, behind = np.zeros_like(out), np.zeros_like(out)
    path = [Boundary(i, A) for i in range(mesh.stages - 1)] + [Boundary(i, G) for i in reversed(range(mesh.stages - 1))]
    for lane, m in np.ndindex(out.shape[1:]):
        found = False
        for boundary in path:
            at = mesh.boundaries.index(boundary), lane, m
            behind[at], blamed[at] = found, out[at] and not found
            found = found or bool(out[at])
    return blamed, behind
