"""One worker's computation on a micro-batch: its stage's layers forward and backward, and the user's step at the ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.pipeline.arithmetic import Arithmetic
from lightning_sentinel.pipeline.boundaries import Buffers
from lightning_sentinel.pipeline.gradients.contributions import Change, changed, dropped, trained
from lightning_sentinel.pipeline.local_worker import LocalWorker
from lightning_sentinel.pipeline.messages.inbox import Inbox
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.results.gathering import Gathering
from lightning_sentinel.pipeline.results.joining import plain
from lightning_sentinel.pipeline.results.losses import refuse_sum, weighted
from lightning_sentinel.pipeline.running_statistics import RunningStatistics
from lightning_sentinel.pipeline.running_step import RunningStep
from lightning_sentinel.pipeline.stages.stage import StageLayers
from lightning_sentinel.pipeline.step_checks import checked_signal, loss_of
from lightning_sentinel.pipeline.steps import NeverCalledError, StepRun, StepRunner

__all__ = ["StageComputation"]


class StageComputation:
    """The schedule's instructions that compute: load, forward and backward.

    Forward passes run in the Trainer's precision and on its device, whatever DeepSpeed would do around them.

    Args:
        local: the worker of this process.
        stage: the stage's layers.
        last_layer: the name of the stage's last layer.
        steps: runs the user's step functions.
        arithmetic: the precision that the stage computes in.
        inbox: is told which inputs the first stage loads.
        buffers: the schedule's buffers.
        device: the stage's device.
    """

    def __init__(
        self,
        local: LocalWorker,
        stage: StageLayers,
        last_layer: str,
        steps: StepRunner,
        arithmetic: Arithmetic,
        inbox: Inbox,
        buffers: Buffers,
        device: torch.device,
    ) -> None:
        self._local = local
        self._stage = stage
        self._last_layer = last_layer
        self._steps = steps
        self._arithmetic = arithmetic
        self._inbox = inbox
        self._buffers = buffers
        self._device = device
        self.trained = trained(stage.parameters())
        """The parameters of this rank's stage that are trained."""
        self._statistics = RunningStatistics(stage.buffers())
        self._untainted = torch.tensor(False, device=device)
        self.received_gradient: Tensor | None = None
        """The received gradient that the latest backward pass started from; ``None`` at the last stage."""

    def load(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        """At the first stage, get the pipeline's input from the user's step. At other stages this does nothing."""
        if not self._local.is_first:
            return
        with self._computing(running, slot):
            inputs = self._input_of(running, slot)
        self._inbox.loaded(inputs, slot)
        self._buffers["inputs"][buffer_id] = inputs
        self._buffers["taints"][buffer_id] = self._untainted

    def _input_of(self, running: RunningStep, slot: int) -> Any:
        """The pipeline's input; ``None`` if the step does not call the pipeline, which is passed on to the next stages."""
        if self._local.is_last:
            run = running.begun[slot] = self._start(running, slot)
            return run.inputs if run.waits else None
        try:
            return self._steps.input_of(running.plan.kind, running.step_arguments(slot))
        except NeverCalledError:
            if running.plan.trains:
                raise
            return None

    def forward(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        inputs = self._buffers["inputs"][buffer_id]
        if isinstance(inputs, Tensor) and inputs.requires_grad:
            # A layer may work in place, which autograd forbids on a leaf, and the gradient is read from the leaf.
            inputs = inputs.clone()
        before = self._statistics.copies() if self._steps.leaves_out and running.plan.trains else []
        outputs = None
        if inputs is not None:
            fault, wrongly = self._fault(running, slot), self._wrongly(running, slot, backward=False)
            with self._computing(running, slot), self._stage.failing(fault), wrongly:
                outputs = self._stage(inputs)
        if before and isinstance(outputs, Tensor):
            self._statistics.put_back(before, self._buffers["taints"][buffer_id] | ~outputs.isfinite().all())
        if self._local.is_last:
            outputs = self._finish(running, outputs, buffer_id, slot)
        elif inputs is not None:
            outputs = checked_signal(outputs, self._last_layer, self._local.stage)
        self._buffers["outputs"][buffer_id] = outputs

    def _finish(self, running: RunningStep, outputs: Any, buffer_id: int, slot: int) -> Tensor | None:
        """Resume the user's step with the pipeline's output. Returns the loss to differentiate; ``None`` if there is none."""
        plan = running.plan
        assigned = running.work[slot]
        counts = ~(self._buffers["taints"][buffer_id] if self._local.excludes else self._untainted)
        with self._computing(running, slot) as seeds:
            run = running.begun.pop(slot, None) or self._start(running, slot)
            seeds.seed_answer()
            result = run.finish(outputs, counts)
        if not plan.trains or running.keeps_results:
            running.results[assigned.micro_batch_id] = result if plan.kind == "predict_step" else plain(result)
        if not plan.trains:
            return None
        loss = None if result is None else loss_of(result, plan.kind)
        if loss is None:
            # The previous stage receives a gradient of zeros, which no verifier should judge.
            self._buffers["taints"][buffer_id] = ~self._untainted
        elif plan.sizes.micro_batches > 1:
            refuse_sum(loss, assigned.samples, plan.kind)
        differentiated, counted = weighted(loss, counts, assigned.weight, running.scale)
        running.losses += counted
        return differentiated

    def backward(self, running: RunningStep, buffer_id: int, slot: int) -> None:
        outputs = self._buffers["outputs"][buffer_id]
        inputs = self._buffers["inputs"][buffer_id]
        with changed(self.trained, self._changes(running, buffer_id, slot)), self._wrongly(running, slot, backward=True):
            if outputs is None:
                if isinstance(inputs, Tensor) and inputs.requires_grad:
                    inputs.grad = torch.zeros_like(inputs)
            elif self._local.is_last:
                (self._steps.own_backward or Tensor.backward)(outputs)
            elif outputs.requires_grad:  # not if all layers up to here are frozen
                self.received_gradient = self._buffers["output_tensors"][buffer_id]
                outputs.backward(gradient=self.received_gradient)
        self._buffers["outputs"][buffer_id] = None
        self._buffers["output_tensors"][buffer_id] = None

    @contextmanager
    def _computing(self, running: RunningStep, slot: int) -> Iterator[MicroBatchSeeds]:
        """A context in which this stage's layers or the user's step run, with the micro-batch's own random numbers."""
        plan = running.plan
        seeds = plan.seeds(running.work[slot].micro_batch_id)
        seeds.seed_step(self._device)
        self._stage.seeds = seeds if plan.trains else None
        self._steps.gather = Gathering(
            partial(self._running_beside, running, slot), self._local.mesh.rank(self._local.worker), self._device, plan.audited
        )
        with self._arithmetic.forward_context():
            yield seeds

    def _running_beside(self, running: RunningStep, slot: int) -> list[int]:
        """The ranks of this stage that run a step on a micro-batch in the same slot."""
        wiring = running.plan.wiring
        samples = running.plan.sizes.samples
        work = {
            lane: [micro_batch_id for micro_batch_id in wiring.work[lane] if samples[micro_batch_id.replica]]
            for lane in wiring.lanes
        }
        return [self._local.mesh.rank(wiring.worker(self._local.stage, lane)) for lane, ids in work.items() if len(ids) > slot]

    def _start(self, running: RunningStep, slot: int) -> StepRun:
        arguments = running.step_arguments(slot)
        samples = running.work[slot].samples
        return self._steps.start(running.plan.kind, arguments, samples, self._device)

    def _changes(self, running: RunningStep, buffer_id: int, slot: int) -> list[Change]:
        """The changes that a micro-batch's weight gradients go through before they are summed."""
        local = self._local
        number = running.plan.number
        changes: list[Change] = []
        if local.adversary is not None and local.adversary.fails(local.worker, number):
            changes.append(partial(local.adversary.weight_gradient, worker=local.worker, step=number, micro_batch=slot))
        if local.excludes:
            changes.append(dropped(self._buffers["taints"][buffer_id]))
        return changes

    def _fault(self, running: RunningStep, slot: int) -> Callable[[Tensor], Tensor] | None:
        """A simulated fault, which alters the output of this worker's first layer; ``None`` if there is none."""
        local = self._local
        number = running.plan.number
        if local.adversary is None or not running.plan.trains or not local.adversary.fails(local.worker, number):
            return None
        return partial(local.adversary.layer_output, worker=local.worker, step=number, micro_batch=slot)

    def _wrongly(self, running: RunningStep, slot: int, backward: bool) -> AbstractContextManager[None]:
        """A context for a pass through the layers, in which a simulated attacker alters weights or results of matrix products."""
        local = self._local
        if local.adversary is None or not running.plan.trains:
            return nullcontext()
        return local.adversary.computing(local.worker, running.plan.number, slot, backward, self.trained)
