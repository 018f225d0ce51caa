"""The virtual engine: a whole mesh in this process.

All replicas of a stage hold the same weights, so one copy of the module serves any number of them. The micro-batches of all
replicas go through a stage side by side along the batch axis, in one group for each shape. At each boundary every worker's signal
is tampered with and verified on its own. Verifiers, ledger, attacks and verdicts are those of the process engine.

A layer that mixes samples of a batch (BatchNorm in training mode) sees those of all replicas of equal shape, as it would under
``SyncBatchNorm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Boundary, Worker
from lightning_sentinel.pipeline.data.batch_splitting import SplitBatch
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.gradients.contributions import broken
from lightning_sentinel.pipeline.gradients.virtual_gradients import VirtualGradients
from lightning_sentinel.pipeline.recovery.audited_verdicts import Auditors
from lightning_sentinel.pipeline.recovery.contradictions import pairs_of, settle_contradictions
from lightning_sentinel.pipeline.recovery.contribution_checks import Contributions
from lightning_sentinel.pipeline.recovery.flag_records import FencesOfStep
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.results.joining import join, plain, reorder
from lightning_sentinel.pipeline.stages.partition import StageModel, refuse_frozen
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import Ruling, StepOutcome, StepResult, is_skipped, mean_loss
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.pipeline.virtual_audits import VirtualAudits
from lightning_sentinel.pipeline.virtual_boundaries import MicroBatch, VirtualBoundaries, VirtualStep
from lightning_sentinel.pipeline.virtual_evidence import VirtualEvidence
from lightning_sentinel.pipeline.virtual_passes import VirtualPasses
from lightning_sentinel.pipeline.virtual_stages import VirtualStages
from lightning_sentinel.pipeline.virtual_workers import VirtualWorkers
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import arithmetic
from lightning_sentinel.verification.draws import Draws
from lightning_sentinel.verification.sketches import SKETCHED
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["VirtualEngine"]


class VirtualEngine:
    """Runs all workers of a mesh; see :class:`lightning_sentinel.pipeline.engine_protocol.Engine` for what each method does.

    Args:
        stage_model: the module with all of its stages.
        optimizer: the user's optimizer; ``None`` for evaluation.
        steps: runs the user's step functions.
        guard: verifies the signals at all boundaries and of all replicas; ``None`` for a plain pipeline.
        device: the module's device.
        activation_checkpointing: recompute the activations of a layer in its backward pass instead of keeping them.
        forward_context: entered around every forward pass.
    """

    def __init__(
        self,
        stage_model: StageModel,
        optimizer: Optimizer | None,
        steps: StepRunner,
        guard: Guard | None,
        device: torch.device,
        activation_checkpointing: bool = False,
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.keeps_results = False
        self._workers = VirtualWorkers(stage_model.mesh, guard, device)
        self._stages = VirtualStages(stage_model, device, activation_checkpointing, forward_context)
        self._passes = VirtualPasses(self._workers, self._stages, VirtualBoundaries(self._workers), steps)
        self.gradients = VirtualGradients(self._stages.untied, stage_model.mesh.replicas, optimizer)
        self._steps = steps
        steps.leaves_out = self._workers.excludes
        self._running: VirtualStep | None = None
        self._returned: Any = None
        self._evidence = VirtualEvidence(stage_model.mesh)

    @property
    def guard(self) -> Guard | None:
        return self._workers.guard

    @property
    def adversary(self) -> Adversary | None:
        return self._workers.adversary

    @adversary.setter
    def adversary(self, adversary: Adversary | None) -> None:
        if adversary is not None:
            for stage in range(self._stages.last + 1):
                adversary.require_fit(stage, self._stages.trained(stage))
        self._workers.adversary = adversary

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def run(self, plan: StepPlan, arguments: tuple[Any, ...], batch: SplitBatch) -> StepResult:
        if not plan.trains:
            self._steps.new_records()
            self._returned = self._run_whole(plan, arguments, batch.samples)
            return StepResult(torch.zeros(1, 3, device=self._workers.device), self._steps.recorder)
        if self._stages.last and not any(parameter.requires_grad for parameter in self._stages.parameters):
            refuse_frozen(self._stages.model.layers.module)
        if self.guard is not None:
            self.guard.begin(plan)
        apart = self._passes.runs_apart(plan)
        return self._run_training(VirtualStep(plan, arguments, batch, self.keeps_results, apart))

    def _run_training(self, running: VirtualStep) -> StepResult:
        """Run all micro-batches of a step."""
        self._running = running
        workers = self._workers
        device = workers.device
        if workers.replaces_malformed:
            stages = range(self._stages.last + 1)
            buffers = [buffer for stage in stages for buffer in self._stages.buffers(stage)]
            running.undo = Rewind(self._stages.parameters, buffers, device, self._steps.remember())
        plan = running.plan
        replicas = running.batch.replicas
        self._steps.new_records()
        self._stages.run_apart(running.batch.by_module)
        losses = torch.zeros(workers.mesh.replicas, 3, device=device)
        # A step may change its batch in place, which a repeat of the step must not see.
        again = workers.audits or workers.replaces_malformed
        for index in range(plan.sizes.micro_batches):
            parts = [(copied(replica[index]) if again else replica[index], *running.arguments[1:]) for replica in replicas]
            losses += self._passes.run(MicroBatch(running, parts, index))
        self._returned = _joined(running.results)
        looks = workers.replaces_malformed and not running.apart
        spoiled = broken((parameter.grad for parameter in self._stages.parameters), device) if looks else None
        return StepResult(losses, self._steps.recorder, self._received(running), spoiled, contribution=self._contributed(running))

    def _contributed(self, running: VirtualStep) -> Tensor | None:
        if not self._workers.shows_contributions:
            return None
        mesh = self._workers.mesh
        nothing = torch.zeros(SKETCHED, device=self._workers.device)
        workers = [Worker(stage, replica) for stage in range(mesh.stages) for replica in range(mesh.replicas)]
        added = [running.contributed[worker].added if worker in running.contributed else nothing for worker in workers]
        return torch.stack(added).view(mesh.stages, mesh.replicas, SKETCHED)

    def _received(self, running: VirtualStep) -> dict[Boundary, Tensor] | None:
        if self.guard is None or not self._workers.mesh.boundaries or not running.called:
            return None
        micro_batches = running.plan.sizes.micro_batches
        if running.called < micro_batches:
            raise PipelineModelError(
                f"training_step called the pipeline for {running.called} of {micro_batches} micro-batches only. Let it depend on"
                " batch_idx alone whether a batch is left out before the call; behind it training_step may return None."
            )
        return {boundary: self.guard.take_rows(boundary) for boundary in self._workers.mesh.boundaries}

    def exchange(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """No collective: all results are in this process, and are copied from the device at once."""
        outcome, spoiled = self._read(plan, result)
        if spoiled:
            assert self.guard is not None and self._running is not None, "without a guard everything counts"
            # One replica's broken gradient is in the sum of all, so the replicas run again one by one.
            running = self._running
            running.take_back()
            self.guard.forget_step()
            apart = VirtualStep(plan, running.arguments, running.batch, self.keeps_results, apart=True)
            outcome, _ = self._read(plan, self._run_training(apart))
        return outcome

    def _read(self, plan: StepPlan, result: StepResult) -> tuple[StepOutcome, bool]:
        """A step's outcome, and whether gradients that were summed side by side are broken."""
        schema = result.recorder.schema
        looks = plan.trains and self._workers.replaces_malformed
        spoiled = torch.zeros(1, device=self._workers.device) if result.broken is None else result.broken.float().view(1)
        rows = [] if result.rows is None else [torch.stack([result.rows[boundary] for boundary in self._workers.mesh.boundaries])]
        contributed = [] if result.contribution is None else [result.contribution]
        losses, spoiled, logged, *read = _on_host(result.losses, spoiled, result.recorder.vector(), *contributed, *rows)
        contributions = read.pop(0) if contributed else None
        apart = None if self._running is None or not looks else plan.wiring.arrange(self._running.broken)
        outcome = StepOutcome(
            loss=mean_loss(losses, believed=not looks),
            table=SignalTable.by_samples(read[0], plan.wiring) if read else None,
            broken=apart,
            schema=schema,
            logged=schema.reduce(logged[None]),
            skipped=is_skipped(losses),
            contributions=contributions,
        )
        return outcome, bool(spoiled)

    def _computed_in(self) -> torch.dtype:
        with self._stages.forward_context():
            return arithmetic(self._workers.device)

    def returned(self) -> Any:
        return self._returned

    def _run_whole(self, plan: StepPlan, arguments: tuple[Any, ...], samples: int) -> Any:
        """Run a step on the whole batch, without boundaries: all replicas have the same weights, and no signal is verified."""
        seeds = plan.seeds(MicroBatchId(0, 0))
        seeds.seed_step(self._workers.device)
        with self._stages.forward_context():
            run = self._steps.start(plan.kind, arguments, samples, self._workers.device)
        output = None
        if run.waits:
            output = run.inputs
            for stage in range(self._workers.mesh.stages):
                output = self._stages.forward(stage, output)
        seeds.seed_answer()
        with self._stages.forward_context():
            result = run.finish(output, torch.tensor(True, device=self._workers.device))
        return result if plan.kind == "predict_step" else plain(result)

    def settle(self, plan: StepPlan, outcome: StepOutcome) -> Ruling | None:
        ruling = self._settled(plan, outcome)
        # The batch of the whole mesh is not kept until the next one comes.
        self._running = None
        return ruling

    def _settled(self, plan: StepPlan, outcome: StepOutcome) -> Ruling | None:
        if self.guard is None or outcome.table is None:
            return None
        self._steps.end_step()
        if outcome.skipped:
            self.guard.forget_step()
            return None
        running = self._running
        assert running is not None, "a step is settled after it has run"
        contradictions = sorted(running.contradictions.values())
        if contradictions and self.guard.replaces_malformed:
            running.take_back()
            ruling = settle_contradictions(self.guard, outcome.table, plan, contradictions, frozenset())
            return self._evidence.of_contradictions(ruling)
        audits = VirtualAudits(self._workers, running, outcome.table, self._computed_in)
        auditors = self._auditors(self.guard, running, outcome, audits) if self.guard.audits else None
        fences = FencesOfStep.of(self.guard.calibration)
        ruling = self.guard.settle(outcome.table, plan, lambda vector: vector, auditors, broken=outcome.broken)
        ruling = ruling._replace(contradictions=pairs_of(contradictions))
        if ruling.excluded:
            running.take_back()
        secret = self.guard.secret
        if self.guard.audits:
            return self._evidence.of_audits(ruling, audits, running, secret)
        return self._evidence.of_flags(outcome.table, ruling, self.guard.ledger, fences, secret)

    def _auditors(self, guard: Guard, running: VirtualStep, outcome: StepOutcome, audits: VirtualAudits) -> Auditors:
        contributions = None
        if guard.contributions.audits:
            contributions = Contributions(outcome.contributions, audits.ask_of_contributions)
        plan = running.plan
        seed = guard.secret if guard.seed_of_draws is None else guard.seed_of_draws
        return Auditors(Draws.seeded(plan.mesh, seed, plan.number), audits.ask, contributions)


def _joined(results: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Joins what the step returned for each micro-batch, with the rows in the order of the whole batch."""
    if len(results) < 2:
        return results[0][1] if results else None
    rows, values = zip(*results)
    order = torch.tensor([row for one in rows for row in one])
    return reorder(join(values, [len(one) for one in rows], average=True), order)


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """Copies tensors from the device to the host together, so that the host waits once."""
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
