"""Runs each of Lightning's batches as a step of the mesh: plan, run, exchange, settle."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractionTally
from lightning_sentinel.pipeline.step_plan import StepPlanner
from lightning_sentinel.pipeline.step_results import Ruling, StepOutcome
from lightning_sentinel.strategy.announcements import Announcements, announce_detections, keep_latest
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.data import PipelineData, loader_number
from lightning_sentinel.strategy.results import SharedResults
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.wiring import Wiring

__all__ = ["MeshSteps"]


class MeshSteps:
    """The steps of one run.

    Args:
        run: the state of the run.
        trainer: the Trainer of the run.
        data: splits batches.
        results: shares what steps did.
        bans: keeps bans for later runs.
        announcements: tells the user of bans.
    """

    def __init__(
        self,
        run: RunState,
        trainer: L.Trainer,
        data: PipelineData,
        results: SharedResults,
        bans: BanKeeper,
        announcements: Announcements,
    ) -> None:
        self._run = run
        self._trainer = trainer
        self._data = data
        self._results = results
        self._bans = bans
        self._announcements = announcements
        self._planner = StepPlanner(run.mesh, run.guard)
        self._last_loss = 0.0
        """Returned where no sample counts. Not NaN, from which callbacks conclude that the training has diverged."""
        self.clean_fractions = CleanFractionTally(run.mesh)
        """The data that counts in the next optimizer step."""
        self.has_gradients = False
        """Whether any batch since the last optimizer step has made gradients; the same on all ranks."""

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a training batch, and put its gradients aside. Takes and returns what ``training_step`` does."""
        run = self._run
        arguments = self._data.arguments("training_step", args, kwargs)
        with run.stepping():
            try:
                outcome = self._train_until_settled(arguments)
            finally:
                self._data.steps.make_calls()
            returned = self._results.returned("training_step")
            if not outcome.skipped:
                run.running_engine.gradients.hold()
        self._results.take_in(outcome)
        run.step += 1
        if outcome.skipped:
            # With several processes Lightning refuses a step without a loss, because one process might skip alone.
            return None if self._trainer.world_size == 1 else self._on_device(0.0)
        self.has_gradients = True
        if outcome.loss is not None:
            self._last_loss = outcome.loss
        loss = self._on_device(self._last_loss)
        return returned | {"loss": loss} if isinstance(returned, dict) else loss

    def _train_until_settled(self, arguments: tuple[Any, ...]) -> StepOutcome:
        """Plan, run, exchange and settle a batch; again if audits find liars, so that their signals reach no weight."""
        run = self._run
        engine = run.running_engine
        tally = self.clean_fractions
        batch = self._data.split("training_step", arguments)
        excluded: set[Worker] = set()
        while True:
            scale = 1.0 / self._trainer.accumulate_grad_batches
            plan = self._planner.training(run.step, batch.sizes, scale, run.seed, excluded)
            result = engine.run(plan, arguments, batch)
            outcome = engine.exchange(plan, result)
            ruling = engine.settle(plan, outcome)
            if ruling is None:
                run.table = outcome.table
                run.wiring = plan.wiring
                tally.add(None, plan)
                return outcome
            self._take_in_ruling(ruling)
            if not ruling.excluded:
                tally.add(ruling.verdict.clean, plan)
                tally.lose(ruling.lost)
                return outcome
            if not ruling.redo:
                # No worker is left that could redo some stage: the batch is left out.
                tally.add(torch.zeros_like(ruling.verdict.clean), plan)
                return outcome
            excluded.update(ruling.excluded)

    def _take_in_ruling(self, ruling: Ruling) -> None:
        """Keep a step's signals, detections and bans, and tell the callbacks and the user."""
        run = self._run
        run.table = ruling.verdict.table
        run.wiring = ruling.plan.wiring
        keep_latest(run.detections, ruling.verdict.detections)
        self._bans.keep(ruling.banned, ruling.evidence)
        announce_detections(self._trainer, ruling.verdict.detections)
        absent = ruling.plan.absent.union(ruling.banned, ruling.excluded)
        self._announcements.tell(self._trainer, ruling, run.ledger, len(Wiring.of(run.mesh, absent).lanes))

    def evaluate(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a batch of ``validation_step`` or ``test_step``, and return what it returned if a hook receives that."""
        arguments = self._data.arguments(step, args, kwargs)
        engine = self._run.running_engine
        with self._run.stepping():
            batch = self._data.split(step, arguments)
            plan = self._planner.evaluation(step, loader_number(arguments), batch.sizes, self._run.seed)
            outcome = engine.exchange(plan, engine.run(plan, arguments, batch))
            returned = self._results.returned(step)
        self._results.take_in(outcome)
        return returned

    def predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a batch of ``predict_step``, and return the predictions for this replica's batch."""
        arguments = self._data.arguments("predict_step", args, kwargs)
        engine = self._run.running_engine
        with self._run.stepping():
            batch = self._data.split("predict_step", arguments)
            plan = self._planner.evaluation("predict_step", loader_number(arguments), batch.sizes, self._run.seed)
            engine.run(plan, arguments, batch)
            return engine.returned()

    def _on_device(self, value: float) -> Tensor:
        return torch.tensor(value, device=self._run.processes.device)
