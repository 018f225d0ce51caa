"""The process engine: DeepSpeed's ``PipelineEngine`` with one worker in this process.

It keeps DeepSpeed's schedule of instructions and the buffers that they work on. The instructions are implemented elsewhere:
:class:`StageComputation` runs layers and step functions, :class:`StageBoundaries` sends, receives and verifies signals,
:class:`StageGradients` reduces and clips gradients and steps the optimizer. The first two are handed the step under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.optim import Optimizer

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Direction
from lightning_sentinel.pipeline import schedule
from lightning_sentinel.pipeline.arithmetic import Arithmetic
from lightning_sentinel.pipeline.boundaries import StageBoundaries
from lightning_sentinel.pipeline.commitments.recorder import Recorder
from lightning_sentinel.pipeline.commitments.sealed_draws import SealedDraws
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.computation import StageComputation
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.data.sample_exchange import SampleExchange
from lightning_sentinel.pipeline.deepspeed_setup import check_engine, engine_config, keeping_groups, leave_module_alone
from lightning_sentinel.pipeline.exchange import Exchange
from lightning_sentinel.pipeline.gradients.stage_gradients import GradientOptions, StageGradients
from lightning_sentinel.pipeline.gradients.ties import TiedStages
from lightning_sentinel.pipeline.local_worker import LocalWorker
from lightning_sentinel.pipeline.messages.inbox import Inbox
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.pipeline.processes.torch_wire import TorchWire
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.recovery.audited_verdicts import Auditors
from lightning_sentinel.pipeline.recovery.auditing import Audits
from lightning_sentinel.pipeline.recovery.contradictions import pairs_of, settle_contradictions
from lightning_sentinel.pipeline.recovery.contribution_audits import ContributionAudits, StageRecomputation
from lightning_sentinel.pipeline.recovery.contribution_checks import Contributions
from lightning_sentinel.pipeline.recovery.evidence import BanEvidence
from lightning_sentinel.pipeline.recovery.examination import Inputs, SignalExamination
from lightning_sentinel.pipeline.recovery.flag_records import FencesOfStep
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.process_audits import AuditsOfProcess
from lightning_sentinel.pipeline.recovery.recomputation import Recomputation
from lightning_sentinel.pipeline.recovery.report_examination import ReportExamination
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.results.predictions import share_predictions
from lightning_sentinel.pipeline.running_step import RunningStep
from lightning_sentinel.pipeline.stages.partition import StageModel
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling, StepOutcome, StepResult
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.verification.draws import Draws
from lightning_sentinel.verification.tolerance import Tolerances
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["SentinelEngine"]


class SentinelEngine(PipelineEngine):  # type: ignore[misc]
    """Runs one worker's part of the pipeline; see :class:`lightning_sentinel.pipeline.engine_protocol.Engine` for each method.

    Args:
        stage_model: this process's stage.
        optimizer: the user's optimizer over this stage's parameters; ``None`` for evaluation.
        steps: runs the user's step functions.
        transport: sends and receives signals.
        guard: verifies received signals; ``None`` for a plain pipeline.
        options: how gradients are aggregated, and by whom the optimizer is stepped.
        arithmetic: the precision that the stage computes in, and its device.
        credentials: with which this worker signs what it says.
    """

    def __init__(
        self,
        stage_model: StageModel,
        optimizer: Optimizer | None,
        steps: StepRunner,
        transport: Transport,
        guard: Guard | None,
        options: GradientOptions,
        arithmetic: Arithmetic,
        credentials: Credentials,
    ) -> None:
        pipeline = stage_model.pipeline
        stage = stage_model.stage
        assert stage is not None
        self._arithmetic = arithmetic
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
        self.device = arithmetic.device
        self.pipe_buffers["taints"] = []
        self.keeps_results = False
        mesh = stage_model.mesh
        worker = stage_model.mesh.worker(self.global_rank)
        self._local = LocalWorker(worker, mesh, guard)
        self._steps = steps
        steps.leaves_out = self._local.excludes
        transcript = Transcript(mesh, credentials)
        self._exchange = Exchange(mesh, self.device, transcript)
        self._sample_exchange = SampleExchange(mesh, worker, self.device)
        inbox = Inbox(transport, self.device, self._try_out)
        cache = SignalCache()
        self._boundaries = StageBoundaries(self._local, transport, inbox, cache, Recorder(worker, credentials), self.pipe_buffers)
        last_layer = stage_model.stage_layers(worker.stage)[-1]
        self._computation = StageComputation(
            self._local, stage, last_layer, steps, arithmetic, inbox, self.pipe_buffers, self.device
        )
        tied = TiedStages(stage_model.ties, stage_model.layers.module, mesh, worker.stage)
        stepped = self.optimizer, self._exec_optimizer_step
        self.gradients = StageGradients(stage, mesh, worker, options, arithmetic, tied, *stepped)
        self.gradients.make_equal(frozenset() if guard is None else guard.ledger.banned)
        recomputation = Recomputation(stage, self._local.is_last, steps, self.device, arithmetic.forward_context)
        self._audits = self._make_audits(recomputation, cache, transcript)
        self._running: RunningStep | None = None

    def _make_audits(self, recomputation: Recomputation, cache: SignalCache, transcript: Transcript) -> AuditsOfProcess:
        guard, mesh, worker = self.guard, self._local.mesh, self._local.worker
        tolerances = Tolerances(mesh, 0) if guard is None else guard.tolerances
        computed_in = recomputation.computed_in
        recompute = partial(self._signal_again, recomputation)
        signals = SignalExamination(mesh, cache, self._samples, recompute, tolerances, computed_in)
        reports = None if guard is None else ReportExamination(mesh, cache, guard, self.device)
        of_stage = StageRecomputation(self._samples, partial(self._weights_again, recomputation), self._sketch, computed_in)
        return AuditsOfProcess(
            Audits(mesh, worker, signals, reports, tolerances, lambda: cache.room, transcript),
            ContributionAudits(mesh, worker, cache, of_stage, transcript),
            SealedDraws(mesh, worker, None if guard is None else guard.seed_of_draws, transcript),
            BanEvidence(mesh, transcript),
        )

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def run(self, plan: StepPlan, arguments: tuple[Any, ...], batch: SplitBatch) -> StepResult:
        guard = self.guard
        if plan.trains:
            self.gradients.begin(plan.banned)
            if guard is not None:
                guard.begin(plan)
        (own,) = batch.replicas
        work = self._sample_exchange.of_step(own, plan.sizes, plan.wiring, plan.absent)
        scale = plan.scale * self._arithmetic.factor()
        losses = torch.zeros(3, device=self.device)
        running = self._running = RunningStep(plan, arguments, own, work, losses, scale, self.keeps_results)
        if plan.audited:
            buffers = list(self.module.buffers())
            running.undo = Rewind(self.gradients.parameters, buffers, self.device, self._steps.remember())
        before = self._sketched(plan)
        self._boundaries.begin(plan)
        self._steps.new_records()
        if work:
            self._run_schedule(plan, len(work))
        if not plan.trains or guard is None:
            return self._result(running)
        commitments = self._boundaries.finish(self._audits.draws.seal(plan))
        rows = {boundary: guard.take_rows(boundary) for boundary in guard.verifiers if work}
        broken = self.gradients.broken() if guard.replaces_malformed else None
        result = self._result(running, rows, broken, guard.refused, commitments)
        after = self._sketched(plan)
        return result if before is None or after is None else replace(result, contribution=after - before)

    def _run_schedule(self, plan: StepPlan, micro_batches: int) -> None:
        kind = schedule.TrainSchedule if plan.trains else schedule.InferenceSchedule
        with torch.set_grad_enabled(plan.trains):
            self._exec_schedule(kind(micro_batches, self.num_stages, self.stage_id))

    def _result(
        self,
        running: RunningStep,
        rows: dict[Any, Tensor] | None = None,
        broken: Tensor | None = None,
        refused: tuple[int, ...] = (),
        commitments: bytes = b"",
    ) -> StepResult:
        steps = self._steps
        losses = running.losses[None]
        return StepResult(losses, steps.recorder, rows, broken, steps.stops, steps.signals(), refused, commitments)

    def exchange(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        return self._exchange.run(plan, result)

    def settle(self, plan: StepPlan, outcome: StepOutcome) -> Ruling | None:
        guard = self.guard
        if guard is None or outcome.table is None:
            return None
        self._steps.end_step()
        if outcome.skipped:
            guard.forget_step()
            self._boundaries.forget()
            return None
        ruling = self._ruling(guard, plan, outcome)
        # No audit needs the step's signals any more: this frees the memory for the optimizer step and for a validation.
        self._boundaries.forget()
        if ruling.excluded:
            undo = self._step_under_way.undo
            assert undo is not None, "an audited step is remembered"
            undo()
            return ruling
        if outcome.broken is None:
            return ruling
        lost = frozenset(plan.wiring.worker(stage, lane) for stage, lane in outcome.broken.any(dim=2).nonzero().tolist())
        if self._local.worker in lost:
            # The gradients that earlier batches accumulated are lost as well.
            self.gradients.discard()
        return ruling._replace(lost=lost)

    def _ruling(self, guard: Guard, plan: StepPlan, outcome: StepOutcome) -> Ruling:
        assert outcome.table is not None, "without signals there is nothing to judge"
        commitments = outcome.commitments
        contradictions = [] if commitments is None else commitments.contradictions(plan.mesh, plan.wiring)
        forgers = outcome.forgers - plan.banned
        if guard.replaces_malformed and (contradictions or forgers):
            ruling = settle_contradictions(guard, outcome.table, plan, contradictions, forgers)
            return self._audits.evidence.of_contradictions(ruling)
        auditors = None
        if commitments is not None:
            draws, sealed_otherwise = self._audits.draws.open(plan, commitments.sealed)
            if guard.replaces_malformed and sealed_otherwise:
                ruling = settle_contradictions(guard, outcome.table, plan, (), sealed_otherwise)
                return self._audits.evidence.of_seals(ruling)
            auditors = self._auditors(plan, outcome, draws, commitments)
        gradients = self.gradients
        shares = gradients.sum, auditors, gradients.apart
        fences = FencesOfStep.of(guard.calibration)
        ruling = guard.settle(outcome.table, plan, *shares, broken=outcome.broken, refused=outcome.refused)
        if commitments is None:
            return self._audits.evidence.of_flags(outcome.table, ruling, guard.ledger, fences)
        # Where a run only reports they lead to nothing, and are told.
        return self._audits.shown(ruling._replace(contradictions=pairs_of(contradictions)), commitments)

    def _auditors(self, plan: StepPlan, outcome: StepOutcome, draws: Draws, commitments: StepCommitments) -> Auditors:
        assert outcome.table is not None, "without signals nothing is audited"
        self._audits.begin(outcome.table, self.adversary)
        contributions = None
        if outcome.contributions is not None:
            sketches = outcome.contributions
            again = partial(self._audits.contributions.ask, plan=plan, sketches=sketches, commitments=commitments)
            contributions = Contributions(sketches, again)
        return Auditors(draws, partial(self._audits.messages.ask, plan=plan, commitments=commitments), contributions)

    def returned(self) -> Any:
        running = self._step_under_way
        local = self._local
        plan = running.plan
        # DeepSpeed has connected the ranks of each pipeline.
        pipeline = TorchWire(world().timeout, self.grid.get_pipe_parallel_group(), self.grid.pp_group)
        return share_predictions(
            running.results, local.mesh, plan.wiring, local.worker, pipeline, plan.sizes, average=plan.kind != "predict_step"
        )

    # --------------------------------------------------------------------------------------------------------------- audits

    def _signal_again(
        self, recomputation: Recomputation, direction: Direction, micro_batch_id: MicroBatchId, given: Inputs
    ) -> Tensor:
        return recomputation(direction, micro_batch_id, given, self._step_under_way)

    def _weights_again(self, recomputation: Recomputation, micro_batch_id: MicroBatchId, given: Inputs) -> list[Tensor | None]:
        return recomputation.weight_gradients(micro_batch_id, given, self._step_under_way)

    def _sketched(self, plan: StepPlan) -> Tensor | None:
        """The sketch of the gradients that the stage has now; ``None`` if contributions are not audited."""
        if not plan.trains or self.guard is None or not self.guard.contributions.audits:
            return None
        return self._sketch([parameter.grad for parameter in self.gradients.parameters])

    def _sketch(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The sketch of gradients of the stage, without the factor of the loss."""
        guard = self.guard
        assert guard is not None, "without a guard there are no audits"
        return guard.contributions.sketch(self._local.stage, gradients, self.device) / self._step_under_way.scale

    def _samples(self, micro_batch_id: MicroBatchId) -> Any:
        return self._sample_exchange.packed(self._step_under_way.own, micro_batch_id)

    def _try_out(self, activation: Tensor, slot: int) -> Tensor:
        assigned = self._step_under_way.work[slot]
        given = Inputs(assigned.batch, activation, None)
        return self._audits.messages.signals.recompute(Direction.ACTIVATION, assigned.micro_batch_id, given)

    # -------------------------------------------------------------------------------------------------------- what all share

    @property
    def guard(self) -> Guard | None:
        return self._local.guard

    @property
    def adversary(self) -> Adversary | None:
        return self._local.adversary

    @adversary.setter
    def adversary(self, adversary: Adversary | None) -> None:
        if adversary is not None:
            adversary.require_fit(self._local.worker.stage, self._computation.trained)
        self._local.adversary = adversary

    @property
    def _step_under_way(self) -> RunningStep:
        assert self._running is not None, "no step has begun"
        return self._running

    def _set_distributed_vars(self, args: Any) -> None:
        """DeepSpeed takes the device from ``LOCAL_RANK``, and its constructor sends from it: under gloo it must be the host."""
        self.world_size = world().size
        self.global_rank = world().rank
        self.device = world().device_for(self._arithmetic.device)

    def _broadcast_model(self) -> None:
        """Does nothing: DeepSpeed would broadcast even a banned worker's weights, which are out of date."""

    # -------------------------------------------------------------------------------------------------------- instructions

    def _load(self, buffer_id: int, micro_batch: int) -> None:
        self._computation.load(self._step_under_way, buffer_id, micro_batch)

    def _forward(self, buffer_id: int, micro_batch: int) -> None:
        self._computation.forward(self._step_under_way, buffer_id, micro_batch)

    def _backward(self, buffer_id: int, micro_batch: int) -> None:
        self._computation.backward(self._step_under_way, buffer_id, micro_batch)

    def _tamper_activation(self, buffer_id: int, micro_batch: int) -> None:
        received = self.pipe_buffers["inputs"][buffer_id]
        self._boundaries.tamper(self._step_under_way, Direction.ACTIVATION, received, buffer_id, micro_batch)

    def _tamper_gradient(self, buffer_id: int, micro_batch: int) -> None:
        received = self._computation.received_gradient
        self._boundaries.tamper(self._step_under_way, Direction.GRADIENT, received, buffer_id, micro_batch)

    def _send_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._boundaries.send(self._step_under_way, Direction.ACTIVATION, buffer_id, micro_batch)

    def _send_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._boundaries.send(self._step_under_way, Direction.GRADIENT, buffer_id, micro_batch)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _receive_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._boundaries.receive_activation(self._step_under_way, buffer_id, micro_batch)

    def _receive_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._boundaries.receive_gradient(self._step_under_way, buffer_id, micro_batch)

    def _verify_activation(self, buffer_id: int, micro_batch: int) -> None:
        self._boundaries.verify_activation(self._step_under_way, buffer_id, micro_batch)

    def _verify_gradient(self, buffer_id: int, micro_batch: int) -> None:
        self._boundaries.verify_gradient(self._step_under_way, buffer_id, micro_batch)

    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {
        ds_schedule.LoadMicroBatch: _load,
        ds_schedule.ForwardPass: _forward,
        ds_schedule.BackwardPass: _backward,
        ds_schedule.SendActivation: _send_activation,
        ds_schedule.RecvActivation: _receive_activation,
        ds_schedule.SendGrad: _send_gradient,
        ds_schedule.RecvGrad: _receive_gradient,
        schedule.TamperActivation: _tamper_activation,
        schedule.TamperGradient: _tamper_gradient,
        schedule.VerifyActivation: _verify_activation,
        schedule.VerifyGradient: _verify_gradient,
    }
