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
from lightning_sentinel.pipeline.gradients.ties import Untied
from lightning_sentinel.pipeline.gradients.virtual_gradients import VirtualGradients
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.recovery.ruling import Ruling
from lightning_sentinel.pipeline.results.joining import join, plain, reorder
from lightning_sentinel.pipeline.running_statistics import RunningStatistics
from lightning_sentinel.pipeline.stages.batched_replicas import BatchedReplicas
from lightning_sentinel.pipeline.stages.partition import StageModel, refuse_frozen
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.step_results import StepOutcome, StepResult, is_skipped, mean_loss
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.pipeline.virtual_boundaries import MicroBatch, VirtualStep
from lightning_sentinel.pipeline.virtual_passes import VirtualPasses
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.audit import Outcome, arithmetic
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.tolerance import MEASURED
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["VirtualEngine"]


class VirtualEngine(VirtualPasses):
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
        self.guard = guard
        self.adversary: Adversary | None = None
        self.keeps_results = False
        self._model = stage_model
        self._mesh = stage_model.mesh
        self._steps = steps
        self._device = device
        self._batched = BatchedReplicas(device, activation_checkpointing, stage_model.places)
        self._forward_context = forward_context
        layers = stage_model.layers.layers
        parts = stage_model.parts
        self._stages = [layers[parts[stage] : parts[stage + 1]] for stage in range(self._mesh.stages)]
        self._untied = Untied(self._stages)
        self._parameters = [parameter for stage in self._untied.parameters for parameter in stage]
        self.gradients = VirtualGradients(self._untied, self._mesh.replicas, optimizer)
        self._buffers = [buffer for stage in self._stages for layer in stage for buffer in layer.buffers()]
        self._moving = [RunningStatistics(b for layer in stage for b in layer.buffers()) for stage in self._stages]
        steps.leaves_out = guard is not None and guard.excludes
        self._running: VirtualStep | None = None
        self._returned: Any = None
        self._answers: dict[int, dict[tuple[int, int], list[float]]] | None = None
        """Measured errors of the last training step's signals, by boundary and place; ``None`` before the step's first audit."""
        self._rewind: Rewind | None = None

    # ---------------------------------------------------------------------------------------------------------- whole steps

    def run(self, plan: StepPlan, arguments: tuple[Any, ...], batch: SplitBatch) -> StepResult:
        self._steps.new_records()
        if not plan.trains:
            self._returned = self._run_whole(plan, arguments, batch.samples)
            return StepResult(torch.zeros(1, 3, device=self._device), self._steps.recorder)
        if self._mesh.stages > 1 and not any(parameter.requires_grad for parameter in self._parameters):
            refuse_frozen(self._model.layers.module)
        if self.guard is not None:
            self.guard.begin(plan)
            if self.guard.replaces_malformed:
                self._remember()
        return self._run_training(VirtualStep(plan, arguments, batch, apart=self._anybody_fails(plan)))

    def _run_training(self, running: VirtualStep) -> StepResult:
        """Run all micro-batches of a step."""
        self._running = running
        self._answers = None
        plan = running.plan
        arguments = running.arguments
        replicas = running.batch.replicas
        self._steps.new_records()
        self._batched.apart = running.batch.by_module
        losses = torch.zeros(self._mesh.replicas, 3, device=self._device)
        # A step may change its batch in place, which a repeat of the step must not see.
        again = self.guard is not None and (self.guard.audits or self.guard.replaces_malformed)
        for index in range(plan.sizes.micro_batches):
            parts = [(copied(replica[index]) if again else replica[index], *arguments[1:]) for replica in replicas]
            losses += self._pass(MicroBatch(running, parts, index))
        self._returned = _joined(running.results)
        looks = self.guard is not None and self.guard.replaces_malformed
        spoiled = broken((p.grad for p in self._parameters), self._device) if looks and not running.apart else None
        return StepResult(losses, self._steps.recorder, self._received(running), spoiled)

    def _received(self, running: VirtualStep) -> dict[Boundary, Tensor] | None:
        if self.guard is None or not self._mesh.boundaries or not running.called:
            return None
        micro_batches = running.plan.sizes.micro_batches
        if running.called < micro_batches:
            raise PipelineModelError(
                f"training_step called the pipeline for {running.called} of {micro_batches} micro-batches only. Let it depend on"
                " batch_idx alone whether a batch is left out before the call; behind it training_step may return None."
            )
        return {boundary: self.guard.take_rows(boundary) for boundary in self._mesh.boundaries}

    def _remember(self) -> None:
        """Record whatever a step changes before its verdict, so that the step can be undone."""
        self._rewind = Rewind(self._parameters, self._buffers, self._device, self._steps.remember())

    def _undo(self) -> None:
        assert self._rewind is not None, "a step that may be undone is remembered"
        self._rewind()

    def exchange(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """No collective: all results are in this process, and are copied from the device at once."""
        outcome, spoiled = self._read(plan, result)
        if spoiled:
            assert self.guard is not None and self._running is not None, "without a guard everything counts"
            # One replica's broken gradient is in the sum of all, so the replicas run again one by one.
            self._undo()
            self._remember()
            self.guard.forget_step()
            running = self._running
            apart = VirtualStep(plan, running.arguments, running.batch, apart=True)
            outcome, _ = self._read(plan, self._run_training(apart))
        return outcome

    def _read(self, plan: StepPlan, result: StepResult) -> tuple[StepOutcome, bool]:
        """A step's outcome, and whether gradients that were summed side by side are broken."""
        schema = result.recorder.schema
        looks = plan.trains and self.guard is not None and self.guard.replaces_malformed
        spoiled = torch.zeros(1, device=self._device) if result.broken is None else result.broken.float().view(1)
        rows = [] if result.rows is None else [torch.stack([result.rows[boundary] for boundary in self._mesh.boundaries])]
        losses, spoiled, logged, *read = _on_host(result.losses, spoiled, result.recorder.vector(), *rows)
        apart = None if self._running is None or not looks else plan.wiring.arrange(self._running.broken)
        outcome = StepOutcome(
            loss=mean_loss(losses, believed=not looks),
            table=SignalTable.by_samples(read[0], plan.wiring) if read else None,
            broken=apart,
            schema=schema,
            logged=schema.reduce(logged[None]),
            skipped=is_skipped(losses),
        )
        return outcome, bool(spoiled)

    def _ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        """The votes of auditors on the last batch's signals.

        Recomputation by a peer is simulated, too. This engine computed each worker's honest signal before an adversary replaced it,
        so an audit looks up the measured error. The adversary may replace the vote of a worker that it controls.
        """
        assert self.guard is not None and self._running is not None, "it is what asks"
        if not asked:
            return []
        measured = self._running.measured
        lies = self._known_lies(self._running)
        tolerances = self.guard.tolerances
        said = []
        for case, juror in asked:
            index = self._mesh.boundaries.index(case.boundary)
            place = (case.lane, case.slot)
            dtypes = measured.get(index, {})
            found = lies.get(index, {}).get(place, [0.0] * MEASURED)
            dtype = dtypes[place][0] if place in dtypes else torch.float32
            lied = found[0] > tolerances.allowed(index, case.audited, dtype, self._computed_in())
            word = Outcome.LIED if lied else Outcome.MATCHES
            said.append(word if self.adversary is None else Outcome(self.adversary.vote(juror, case.audited, word)))
            if said[-1] == Outcome.MATCHES:
                tolerances.heard(index, case.audited, found)
        return said

    def _known_lies(self, running: VirtualStep) -> dict[int, dict[tuple[int, int], list[float]]]:
        """Measured errors, by boundary and place. The host waits for the device only at a step's first audit."""
        if self._answers is None:
            measured = [found for places in running.measured.values() for _, found in places.values()]
            values = iter(torch.stack(measured).tolist() if measured else ())
            self._answers = {boundary: {place: next(values) for place in places} for boundary, places in running.measured.items()}
        return self._answers

    def _computed_in(self) -> torch.dtype:
        with self._forward_context():
            return arithmetic(self._device)

    def returned(self) -> Any:
        return self._returned

    def _run_whole(self, plan: StepPlan, arguments: tuple[Any, ...], samples: int) -> Any:
        """Run a step on the whole batch, without boundaries: all replicas have the same weights, and no signal is verified."""
        seeds = plan.seeds(MicroBatchId(0, 0))
        seeds.seed_step(self._device)
        with self._forward_context():
            run = self._steps.start(plan.kind, arguments, samples, self._device)
        output = None
        if run.waits:
            output = run.inputs
            for stage in range(self._mesh.stages):
                output = self._forward(stage, output)
        seeds.seed_answer()
        with self._forward_context():
            result = run.finish(output, torch.tensor(True, device=self._device))
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
        ask = self._ask if self.guard.audits else None
        ruling = self.guard.settle(outcome.table, plan, lambda vector: vector, ask, broken=outcome.broken)
        if ruling.excluded:
            self._undo()
        return ruling


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
