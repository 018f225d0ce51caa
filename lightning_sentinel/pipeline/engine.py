"""The process engine: DeepSpeed's ``PipelineEngine`` with one worker in this process.

Taken from DeepSpeed: the 1F1B schedule, the distribution of the model, and the optimizer step. Ours: who serves which lane, how a
micro-batch is loaded and its loss computed (by the user's own step), in what precision the layers run (DeepSpeed would end an
autocast that it has not begun), what crosses a boundary and how (``boundaries``), and the reduction and clipping of gradients, of
which banned workers are to have no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule as ds_schedule
from torch import Tensor
from torch.optim import Optimizer

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.config import Response
from lightning_sentinel.mesh import Direction, Worker
from lightning_sentinel.pipeline import schedule
from lightning_sentinel.pipeline.arithmetic import Arithmetic
from lightning_sentinel.pipeline.boundaries import StageBoundaries
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.data.sample_exchange import AssignedMicroBatch, SampleExchange
from lightning_sentinel.pipeline.deepspeed_setup import check_engine, engine_config, keeping_groups, leave_module_alone
from lightning_sentinel.pipeline.exchange import Aside, Exchange, StepOutcome
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.gradients.contributions import broken, changed, dropped
from lightning_sentinel.pipeline.gradients.healthy import HealthyStage
from lightning_sentinel.pipeline.gradients.stash import GradientStash
from lightning_sentinel.pipeline.gradients.ties import TiedStages
from lightning_sentinel.pipeline.messages.inbox import Inbox
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.processes.collectives import wire
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.recovery.auditing import Audits, Evidence, SignalCache
from lightning_sentinel.pipeline.recovery.guard import Guard, Ruling
from lightning_sentinel.pipeline.recovery.recomputation import Recomputation
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.results.gathering import Gathering
from lightning_sentinel.pipeline.results.joining import plain
from lightning_sentinel.pipeline.results.losses import refuse_sum
from lightning_sentinel.pipeline.results.predictions import share_predictions
from lightning_sentinel.pipeline.running_statistics import RunningStatistics
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.pipeline.steps import NeverCalledError, StepRun, StepRunner, checked_signal, loss_of
from lightning_sentinel.verification.audit import Outcome
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.tolerance import Tolerances
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["SentinelEngine"]


class SentinelEngine(StageBoundaries):
    """Runs one worker's part of the pipeline, as :class:`lightning_sentinel.pipeline.engine_protocol.Engine` says of each method.

    Args:
        stage_model: this process's stage.
        optimizer: the user's optimizer over this stage's parameters; ``None`` for evaluation.
        steps: runs the user's step functions.
        transport: sends and receives signals.
        guard: verifies what is received; ``None`` for a plain pipeline.
        response: what follows from a flag, and how gradients are aggregated.
        timeout: how long ranks of a stage wait for each other.
        seed: of the random numbers in forward passes; the same on all ranks.
        device: where the stage is.
        arithmetic: the precision that the stage computes in.
        zero: whether each worker keeps only a part of the optimizer's state.
    """

    def __init__(
        self,
        stage_model: StageModel,
        optimizer: Optimizer | None,
        steps: StepRunner,
        transport: Transport,
        guard: Guard | None,
        response: Response,
        timeout: timedelta,
        seed: int,
        device: torch.device,
        arithmetic: Arithmetic,
        zero: bool,
    ) -> None:
        pipeline, stage = stage_model.pipeline, stage_model.stage
        assert stage is not None
        self._stage_device = device
        with keeping_groups(optimizer):
            super().__init__(
                args=None,
                model=pipeline,
                optimizer=optimizer,
                dont_change_device=True,
                mpu=pipeline.mpu(),
                config=engine_config(),
                config_class=DeepSpeedConfig(engine_config(), pipeline.mpu()),
            )
        check_engine(self)
        leave_module_alone(self)
        self.device = device
        mesh = stage_model.mesh
        self.worker: Worker = mesh.worker(self.global_rank)
        self.adversary: Adversary | None = None
        self.keeps_results = False
        self.guard = guard
        self._mesh, self._steps = mesh, steps
        self._transport = transport
        self._arithmetic, self._forward_context = arithmetic, arithmetic.forward_context
        self._exchange = Exchange(mesh, self.device)
        self._sample_exchange = SampleExchange(mesh, self.worker, self.device)
        self._last_layer = stage_model.stage_layers(self.worker.stage)[-1]
        self._untainted = torch.tensor(False, device=self.device)
        self.pipe_buffers["taints"] = []
        self._stage = stage
        # Not `_parameters`, which is torch's: the engine is a module itself.
        self._stage_parameters = list(self.module.parameters())
        self._stash = GradientStash(self._stage_parameters)
        self._moving = RunningStatistics(self.module.buffers())
        steps.leaves_out = guard is not None and guard.excludes
        tied = TiedStages(stage_model.ties, stage_model.layers.module, mesh, self.worker.stage)
        self._healthy = HealthyStage(stage, mesh, self.worker, response, timeout, self.device, tied, zero)
        self._healthy.make_equal(self._banned)
        self._rewind: Rewind | None = None
        self._signal_cache = SignalCache()
        last, context = self.is_last_stage(), self._forward_context
        self._recompute = Recomputation(stage, last, mesh.replicas, steps, self.device, seed, context)
        tolerances = Tolerances(mesh, 0) if guard is None else guard.tolerances
        recompute = self._recomputed, tolerances, self._recompute.computed_in
        self._audits = Audits(mesh, self.worker, self._signal_cache, self._samples, *recompute, self.device)
        self._inbox = Inbox(transport, self.device, self._try_out)
        self._wiring = Wiring.of(mesh)
        self._work: list[AssignedMicroBatch] = []
        self._runs = 0
        self._altered: Tensor | None = None
        self._received_gradient: Tensor | None = None

    def reseed(self, seed: int) -> None:
        self._recompute = replace(self._recompute, seed=seed)

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def train(self, arguments: tuple[Any, ...], step: int, deal: SplitBatch, scale: float) -> StepOutcome:
        self._step, self._scale = step, scale * self._arithmetic.factor()
        self._wiring = Wiring.of(self._mesh, micro_batches=deal.sizes.micro_batches)
        if self.guard is not None:
            self._wiring = self.guard.begin(step, deal.sizes.micro_batches)
            if self.guard.audits:
                self._rewind = Rewind(self._stage_parameters, list(self.module.buffers()), self.device)
                self._undo_steps = self._steps.remember()
        self._healthy.begin(self._banned)
        self._begin("training_step", arguments, deal)
        if self._work:
            self._exec_schedule(schedule.TrainSchedule(len(self._work), self.num_stages, self.stage_id))
        self._transport.finish_notes()
        refused = () if self.guard is None else self.guard.refused
        return self._exchanged("training_step", self._rows(), self._broken(), refused)

    def _exchanged(
        self,
        kind: str,
        rows: dict[Direction, Tensor] | None = None,
        useless: Tensor | None = None,
        refused: tuple[int, ...] = (),
    ) -> StepOutcome:
        steps, sizes = self._steps, self._sizes
        aside = Aside(steps.stops, steps.signals(), refused)
        return self._exchange.run(kind, self._wiring, sizes, rows, self._loss, steps.recorder, useless, aside)

    def evaluate(self, step: str, arguments: tuple[Any, ...], deal: SplitBatch) -> StepOutcome:
        self._forward_only(step, arguments, deal)
        return self._exchanged("/".join((step, *map(str, arguments[2:]))))

    def predict(self, arguments: tuple[Any, ...], deal: SplitBatch) -> Any:
        self._forward_only("predict_step", arguments, deal)
        return self.returned()

    def returned(self) -> Any:
        group, average = self.grid.get_pipe_parallel_group(), self._step_name != "predict_step"
        return share_predictions(self._results, self._mesh, self._wiring, self.worker, group, self._sizes, average)

    def _forward_only(self, step: str, arguments: tuple[Any, ...], deal: SplitBatch) -> None:
        self._wiring = Wiring.of(self._mesh, self._banned, deal.sizes.micro_batches)
        self._begin(step, arguments, deal)
        if self._work:
            with torch.no_grad():
                self._exec_schedule(schedule.InferenceSchedule(len(self._work), self.num_stages, self.stage_id))

    def settle(self, outcome: StepOutcome, step: int) -> Ruling | None:
        if self.guard is None or outcome.table is None:
            return None
        self._steps.end_step()
        if outcome.skipped:
            self.guard.forget_step()
            self._signal_cache.clear()
            return None
        ask, useless = self._ask if self.guard.audits else None, outcome.broken
        stage = self._healthy
        ruling = self.guard.settle(outcome.table, step, stage.sum, ask, stage.apart, useless, outcome.refused)
        # Nothing of it is audited any more: the memory is the optimizer's, and that of a validation.
        self._signal_cache.clear()
        if useless is None or ruling.excluded:
            return ruling
        lost = frozenset(self._wiring.worker(stage, lane) for stage, lane in useless.any(dim=2).nonzero().tolist())
        if self.worker in lost:
            # With them goes what earlier batches had added.
            self.discard_gradients()
        return ruling._replace(lost=lost)

    def _ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        self._audits.adversary = self.adversary
        return self._audits.ask(asked, self._wiring, self._absent)

    def _samples(self, part: MicroBatchId) -> Any:
        return self._sample_exchange.packed(self._own, part)

    def _recomputed(self, direction: Direction, part: MicroBatchId, evidence: Evidence) -> Tensor:
        sizes = self._sizes.work(*part)
        return self._recompute(direction, part, evidence, self._arguments[1:], self._step, sizes, self._scale)

    def _try_out(self, activation: Tensor, micro_batch: int) -> Tensor:
        work = self._work[micro_batch]
        return self._recomputed(Direction.ACTIVATION, work.part, Evidence(work.batch, activation, None))

    def rewind(self) -> None:
        assert self._rewind is not None, "only what is audited is done again"
        self._rewind()
        self._undo_steps()

    @property
    def _banned(self) -> frozenset[Worker]:
        return frozenset() if self.guard is None else self.guard.ledger.banned

    @property
    def _absent(self) -> frozenset[Worker]:
        """Who does nothing in this step; of these, who is not banned takes part in what the stage does together."""
        return frozenset() if self.guard is None else self.guard.absent(self._step)

    def _begin(self, step: str, arguments: tuple[Any, ...], deal: SplitBatch) -> None:
        self._step_name, self._arguments, self._sizes = step, arguments, deal.sizes
        self._runs += 1
        (self._own,) = deal.replicas
        absent = self._absent if step == "training_step" else self._banned
        self._work = self._sample_exchange.of_step(self._own, deal.sizes, self._wiring, absent)
        self._signal_cache.clear()
        training = step == "training_step"
        self._signal_cache.keeps = training and self.guard is not None and self.guard.audits
        self._inbox.begin(training and self.guard is not None and self.guard.replaces_malformed, lets_nothing_in=not training)
        self._steps.new_records()
        self._results: dict[MicroBatchId, Any] = {}
        self._begun: dict[int, StepRun] = {}
        self._loss = torch.zeros(3, device=self.device)

    def _broken(self) -> Tensor | None:
        """Whether this worker's gradients are of no use. Those of a loss that is scaled may overflow, which all find out later."""
        if self.guard is None or not self.guard.replaces_malformed or self._arithmetic.scales:
            return None
        return broken((parameter.grad for parameter in self._stage_parameters), self.device)

    def _rows(self) -> dict[Direction, Tensor] | None:
        """``(micro_batches, columns)`` of each direction that this worker verifies; ``None`` in a plain pipeline."""
        if self.guard is None:
            return None
        return {boundary.direction: self.guard.take_rows(boundary)[0] for boundary in self.guard.verifiers if self._work}

    # ------------------------------------------------------------------------------------------------- gradients and weights

    def _set_distributed_vars(self, args: Any) -> None:
        """DeepSpeed's device is ``LOCAL_RANK``, and its constructor sends from it: under gloo it has to be the host."""
        self.world_size, self.global_rank = dist.get_world_size(), dist.get_rank()
        self.device = wire(self._stage_device)

    def _broadcast_model(self) -> None:
        """DeepSpeed would let a banned worker tell the others its weights, which nobody has brought up to date."""

    def hold_gradients(self) -> None:
        self._stash.hold()

    def release_gradients(self) -> None:
        self._stash.release()

    @property
    def left_out(self) -> frozenset[Worker]:
        return self._healthy.left_out

    def reduce_gradients(self, shares: CleanFractions) -> None:
        self._healthy.reduce(shares)
        self._arithmetic.unscale(self.optimizer)

    def clip_gradients(self, limit: float, by_value: bool) -> None:
        self._healthy.clip(limit, by_value)

    def apply_gradients(self, evaluate: Callable[[], Any] | None = None, **options: Any) -> Any:
        assert evaluate is None and not options, "a schedule has run by now"
        with self._healthy.stepping():
            if not self._arithmetic.step(self.optimizer):
                self._exec_optimizer_step()

    @property
    def stepped_by_others(self) -> frozenset[int]:
        return self._healthy.stepped_by_others(self._banned)

    def discard_gradients(self) -> None:
        self.zero_grad()

    # -------------------------------------------------------------------------------------------------------- instructions

    def _exec_load_micro_batch(self, buffer_id: int, micro_batch: int) -> None:
        if self.is_first_stage():
            with self._computing(micro_batch):
                inputs = self._input_of(micro_batch)
            self._inbox.loaded(inputs, micro_batch)
            self.pipe_buffers["inputs"][buffer_id] = inputs
            self.pipe_buffers["taints"][buffer_id] = self._untainted

    def _input_of(self, micro_batch: int) -> Any:
        """What goes into the pipeline; ``None`` if the step does not call it, which the stages behind are told."""
        if self.is_last_stage():
            run = self._begun[micro_batch] = self._start(micro_batch)
            return run.inputs if run.waits else None
        try:
            return self._steps.input_of(self._step_name, self._part(micro_batch))
        except NeverCalledError:
            if self._step_name == "training_step":
                raise
            return None

    def _exec_forward_pass(self, buffer_id: int, micro_batch: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        if isinstance(inputs, Tensor) and inputs.requires_grad:
            # A layer may work in place, which autograd does not allow on the leaf that the gradient is read from.
            inputs = inputs.clone()
        leaves_out = self._steps.leaves_out and self._step_name == "training_step"
        before = self._moving.copies() if leaves_out else []
        outputs = None
        if inputs is not None:
            with self._computing(micro_batch), self._stage.failing(self._fault(micro_batch)):
                outputs = self._stage(inputs)
        if before and isinstance(outputs, Tensor):
            self._moving.put_back(before, self.pipe_buffers["taints"][buffer_id] | ~outputs.isfinite().all())
        if self.is_last_stage():
            outputs = self._finish(outputs, buffer_id, micro_batch)
        elif inputs is not None:
            outputs = checked_signal(outputs, self._last_layer, self.stage_id)
        self.pipe_buffers["outputs"][buffer_id] = outputs

    def _finish(self, outputs: Any, buffer_id: int, micro_batch: int) -> Tensor | None:
        """The user's step, on what came out. Returns what to differentiate; ``None`` if there is nothing."""
        excludes = self.guard is not None and self.guard.excludes
        counts = ~(self.pipe_buffers["taints"][buffer_id] if excludes else self._untainted)
        work = self._work[micro_batch]
        with self._computing(micro_batch) as seeds:
            run = self._begun.pop(micro_batch, None) or self._start(micro_batch)
            seeds.seed_answer()
            result = run.finish(outputs, counts)
        if self._step_name != "training_step" or self.keeps_results:
            self._results[work.part] = result if self._step_name == "predict_step" else plain(result)
        if self._step_name != "training_step":
            return None
        nothing = torch.zeros((), device=self.device)
        if result is None:
            self._loss += torch.stack((nothing, nothing, counts * work.weight))
            # The stages before are sent a gradient of zeros, which nobody is to judge.
            self.pipe_buffers["taints"][buffer_id] = ~self._untainted
            return None
        loss = loss_of(result, self._step_name)
        if self._sizes.micro_batches > 1:
            refuse_sum(loss, work.samples, self._step_name)
        self._loss += torch.stack((torch.where(counts, loss.detach().float() * work.weight, 0.0), counts * work.weight, nothing))
        return torch.where(counts, loss * (work.weight * self._scale), 0.0)

    def _exec_backward_pass(self, buffer_id: int, micro_batch: int) -> None:
        outputs, inputs = self.pipe_buffers["outputs"][buffer_id], self.pipe_buffers["inputs"][buffer_id]
        with changed(self._stage_parameters, self._changes(buffer_id, micro_batch)):
            if outputs is None:
                if isinstance(inputs, Tensor) and inputs.requires_grad:
                    inputs.grad = torch.zeros_like(inputs)
            elif self.is_last_stage():
                (self._steps.own_backward or Tensor.backward)(outputs)
            elif outputs.requires_grad:  # not if all up to here is frozen
                self._received_gradient = self.pipe_buffers["output_tensors"][buffer_id]
                outputs.backward(gradient=self._received_gradient)
        self.pipe_buffers["outputs"][buffer_id] = self.pipe_buffers["output_tensors"][buffer_id] = None

    # ------------------------------------------------------------------------------------------- what the instructions share

    @contextmanager
    def _computing(self, micro_batch: int) -> Iterator[MicroBatchSeeds]:
        """Where this stage's layers or the user's step run, on random numbers that are this micro-batch's."""
        training = self._step_name == "training_step"
        # Other numbers than any training step has: no two evaluations draw the same.
        number = self._step if training else -self._runs
        seeds = MicroBatchSeeds.of(self._recompute.seed, number, self._work[micro_batch].part, self._mesh.replicas)
        seeds.seed_step(self.device)
        self._stage.seeds = seeds if training else None
        self._steps.gather = Gathering(partial(self._beside, micro_batch), self.global_rank, self.device, self._signal_cache.keeps)
        with self._forward_context():
            yield seeds

    def _beside(self, micro_batch: int) -> list[int]:
        """The ranks that run a step on a micro-batch of this number."""
        work = {
            lane: [part for part in self._wiring.work[lane] if self._sizes.samples[part.replica]] for lane in self._wiring.lanes
        }
        lanes = [lane for lane, parts in work.items() if len(parts) > micro_batch]
        return [self._mesh.rank(self._wiring.worker(self.stage_id, lane)) for lane in lanes]

    def _start(self, micro_batch: int) -> StepRun:
        return self._steps.start(self._step_name, self._part(micro_batch), self._work[micro_batch].samples, self.device)

    def _changes(self, buffer_id: int, micro_batch: int) -> list[Callable[[Tensor], Tensor]]:
        """What becomes of the weight gradients of a micro-batch on their way into the sum."""
        changes: list[Callable[[Tensor], Tensor]] = []
        if self.adversary is not None and self.adversary.fails(self.worker, self._step):
            altered = partial(self.adversary.weight_gradient, worker=self.worker, step=self._step, micro_batch=micro_batch)
            changes.append(altered)
        if self.guard is not None and self.guard.excludes:
            changes.append(dropped(self.pipe_buffers["taints"][buffer_id]))
        return changes

    def _fault(self, micro_batch: int) -> Callable[[Tensor], Tensor] | None:
        """What a simulated fault makes of the result of this worker's first layer."""
        if self.adversary is None or self._step_name != "training_step" or not self.adversary.fails(self.worker, self._step):
            return None
        return partial(self.adversary.layer_output, worker=self.worker, step=self._step, micro_batch=micro_batch)

    def _part(self, micro_batch: int) -> tuple[Any, ...]:
        batch = self._work[micro_batch].batch
        # What a step does to its batch in place must not be seen by those who do it again.
        return (copied(batch) if self._signal_cache.keeps else batch, *self._arguments[1:])

    _INSTRUCTION_MAP = StageBoundaries._INSTRUCTION_MAP | {
        ds_schedule.LoadMicroBatch: _exec_load_micro_batch,
        ds_schedule.ForwardPass: _exec_forward_pass,
        ds_schedule.BackwardPass: _exec_backward_pass,
    }
