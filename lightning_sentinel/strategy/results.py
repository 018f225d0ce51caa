"""Gives all ranks what a step did on the ranks of the last stage: what it logged, returned and kept."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import move_data_to_device
from torchmetrics import Metric

from lightning_sentinel.pipeline.logs import LogReplay
from lightning_sentinel.pipeline.results.all_predictions import complete_predictions
from lightning_sentinel.pipeline.step_results import StepOutcome
from lightning_sentinel.strategy.added_callbacks import shared_metrics
from lightning_sentinel.strategy.listening import listened_to
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.signals import DeferredSignals

__all__ = ["SharedResults", "gather_predictions"]


def gather_predictions(run: RunState, trainer: L.Trainer) -> None:
    """Complete the Trainer's predictions where it keeps those of all ranks; a collective."""
    if not run.settings.virtual:
        with run.at_work():
            complete_predictions(trainer, run.mesh, run.ledger.banned)


class SharedResults:
    """Shares the results of one run's steps.

    Args:
        run: the state of the run.
        trainer: the Trainer of the run.
        signals: the process signals that ranks have agreed on.
    """

    def __init__(self, run: RunState, trainer: L.Trainer, signals: DeferredSignals) -> None:
        self._run = run
        self._trainer = trainer
        self._signals = signals
        self._metrics = shared_metrics(trainer)
        self._replay = LogReplay(trainer.lightning_module, self._value_of)
        # All ranks take part in a broadcast that one of them wants.
        wanted = listened_to(trainer)
        steps = ("training_step", "validation_step", "test_step")
        self._listened_to = frozenset(step for step in steps if run.processes.any_rank(step in wanted))
        run.running_engine.keeps_results = "training_step" in self._listened_to

    def returned(self, step: str) -> Any:
        """What the user's step returned for this replica's batch, if a hook of any rank receives it."""
        if step not in self._listened_to:
            return None
        return move_data_to_device(self._run.running_engine.returned(), self._run.processes.device)

    def take_in(self, outcome: StepOutcome) -> None:
        """Do on this rank what the step did on the rank where it ran: log, hand on process signals, and stop the training."""
        self._replay(outcome.schema, outcome.logged)
        self._signals.heard = outcome.signals
        if outcome.stops:
            self._trainer.should_stop = True

    def _value_of(self, name: str, metric: Metric) -> Any:
        """The value of a logged metric over an epoch."""
        return metric.compute() if self._metrics is None else self._metrics.value_of(name, metric)
