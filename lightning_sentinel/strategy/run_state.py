"""The state of a run that all parts of the strategy share, declared in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.pipeline.checkpoints.resumption import DataPosition
from lightning_sentinel.pipeline.engine_protocol import Engine
from lightning_sentinel.pipeline.planner import StepPlanner
from lightning_sentinel.pipeline.randomness import SeparateRandomness
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.processes import ProcessStrategy
from lightning_sentinel.verification import Detection, Ledger, SignalTable
from lightning_sentinel.wiring import Wiring

__all__ = ["RunState"]


class RunState(ProcessStrategy):
    """A strategy with the state of its run.

    Args:
        arguments: the arguments of ``ParallelStrategy``.
    """

    _engine: Engine | None = None
    """Runs this process's part of the mesh; set from ``setup`` to ``teardown``."""
    _planner: StepPlanner | None = None
    """Plans the engine's steps."""
    _guard: Guard | None = None
    """Verifies signals; ``None`` in a plain pipeline and before the first ``setup``."""
    _stage_model: StageModel | None = None
    """The module, cut into stages."""
    _cut_parameters: dict[str, nn.Parameter]
    """The parameters of this stage, by name, when the module was cut."""
    _randomness: SeparateRandomness | None = None
    """The random numbers of the computation."""
    _seed: int
    """The seed of the run; the same on all ranks."""
    _stepping: bool = False
    """Whether a step is under way."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ledger = Ledger(self.response.ban_after)
        """Flags and bans; the same on all ranks."""
        self.detections: list[Detection] = []
        """Signals that were flagged and not cleared, in order: the latest 100,000; ``detections.jsonl`` has all of a run."""
        self.table: SignalTable | None = None
        """All signals of the last training batch with their scores."""
        self.wiring: Wiring | None = None
        """Which worker served which lane of the last training batch."""
        self.adversary: Adversary | None = None
        """A simulated attacker, set by :class:`AttackInjector`."""
        self.step = 0
        """Training batches so far: the number that detections and attacks go by."""
        self._bans = BanKeeper(self.response, self.ledger)
        self._position = DataPosition()

    @property
    def _running_engine(self) -> Engine:
        assert self._engine is not None, "the engine exists from setup on"
        return self._engine

    @property
    def _running_planner(self) -> StepPlanner:
        assert self._planner is not None, "it is made with the engine"
        return self._planner

    @property
    def _running_stage_model(self) -> StageModel:
        assert self._stage_model is not None, "the module is cut in setup"
        return self._stage_model

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """A context for a step, in which ranks may send each other nothing but the step's messages."""
        self._stepping = True
        try:
            with self._at_work():
                yield
        finally:
            self._stepping = False

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """A context in which computation draws its own random numbers, and an error names a lost peer."""
        assert self._randomness is not None
        with self._watching(), self._randomness.of_computation():
            yield
