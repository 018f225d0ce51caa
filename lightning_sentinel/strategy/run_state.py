"""The state of a strategy's runs, which its parts share: what was learned and decided, and what is under way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints.full import StageState, collect, speakers
from lightning_sentinel.pipeline.checkpoints.resumption import DataPosition
from lightning_sentinel.pipeline.engine_protocol import Engine
from lightning_sentinel.pipeline.randomness import SeparateRandomness
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.strategy.processes import Processes
from lightning_sentinel.strategy.settings import StrategySettings
from lightning_sentinel.verification import Detection, Ledger, SignalTable
from lightning_sentinel.wiring import Wiring

__all__ = ["RunState"]


class RunState:
    """The state of a strategy's runs.

    Args:
        processes: the processes of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.ledger = Ledger(processes.settings.response.ban_after, processes.settings.response.false_accusations)
        self.detections: list[Detection] = []
        self.table: SignalTable | None = None
        """All signals of the last training batch with their scores."""
        self.wiring: Wiring | None = None
        """Which worker served which lane of the last training batch."""
        self.step = 0
        """Training batches so far."""
        self.seed = 0
        """The seed of the run; the same on all ranks."""
        self.guard: Guard | None = None
        """Verifies signals; ``None`` in a plain pipeline and before the first ``setup``. It outlives a run: verifiers learn."""
        self.engine: Engine | None = None
        """Runs this process's part of the mesh; set from ``setup`` to ``teardown``."""
        self.randomness: SeparateRandomness | None = None
        """The random numbers of the computation."""
        self.position = DataPosition()
        self.in_a_step = False
        """Whether a step is under way."""

    @property
    def settings(self) -> StrategySettings:
        return self.processes.settings

    @property
    def mesh(self) -> Mesh:
        return self.processes.mesh

    @property
    def running_engine(self) -> Engine:
        assert self.engine is not None, "the engine exists from setup to teardown"
        return self.engine

    @property
    def has_all_stages(self) -> bool:
        """Whether this process has the whole module in one stage."""
        return self.settings.virtual and self.mesh.stages == 1

    @property
    def speakers(self) -> list[int]:
        """The rank that saves the state of each stage."""
        return speakers(self.mesh, self.ledger.banned | self.ledger.odd_copies)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A context for a step, in which ranks may send each other nothing but the step's messages."""
        self.in_a_step = True
        try:
            with self.at_work():
                yield
        finally:
            self.in_a_step = False

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A context in which computation draws its own random numbers, and an error names a lost peer."""
        assert self.randomness is not None, "it is made with the engine"
        with self.processes.watching(), self.randomness.of_computation():
            yield

    def from_stages(self, plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[StageState]:
        """Collect one state a stage on rank zero, from the rank that speaks for the stage; empty on other ranks; a collective."""
        with self.at_work():
            return collect(plain, tensors, self.speakers)
