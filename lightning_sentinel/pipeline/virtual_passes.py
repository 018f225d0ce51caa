"""Forward and backward passes of the virtual engine: one micro-batch of all replicas, through all stages and boundaries.

The replicas go through a stage side by side, along the batch axis, which sums their weight gradients. Replicas whose signals have
other shapes go through in a group of their own. Where one replica's gradients must not reach the sum, or a simulated fault alters
what it computes, the replicas go through one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sentinel.attacks import Site
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.gradients.contributions import broken, gradients_of
from lightning_sentinel.pipeline.gradients.ties import Untied
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.results.joining import plain
from lightning_sentinel.pipeline.results.losses import refuse_sum
from lightning_sentinel.pipeline.running_statistics import RunningStatistics
from lightning_sentinel.pipeline.stages.batched_replicas import BatchedReplicas
from lightning_sentinel.pipeline.stages.groups import alike, of_replicas, side_by_side
from lightning_sentinel.pipeline.step_checks import checked_signal, loss_of
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.steps import StepRun, StepRunner
from lightning_sentinel.pipeline.virtual_boundaries import MicroBatch, VirtualBoundaries
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["VirtualPasses"]


class VirtualPasses(VirtualBoundaries):
    """The part of the virtual engine that runs layers and step functions; the subclass decides when, and what follows."""

    keeps_results: bool
    _steps: StepRunner
    _forward_context: Callable[[], AbstractContextManager[Any]]
    _batched: BatchedReplicas
    _stages: Sequence[Sequence[nn.Module]]
    _untied: Untied
    _moving: Sequence[RunningStatistics]

    def _pass(self, batch: MicroBatch) -> Tensor:
        """Forward and backward of one micro-batch of all replicas.

        Returns:
            ``(replicas, 3)``, the weighted losses that count, their weights, and the weights of micro-batches for which
            ``training_step`` returned ``None``.
        """
        count = len(batch.parts)
        batch.seeds = [batch.running.plan.seeds(MicroBatchId(replica, batch.index)) for replica in range(count)]
        dead = torch.zeros(count, dtype=torch.bool, device=self._device)
        if (lanes := self._lanes(batch)) is not None:
            dead = ~torch.tensor(batch.wiring.live, device=self._device)[lanes]
        batch.tainted = dead
        batch.runs = [self._started(replica, batch, part) for replica, part in enumerate(batch.parts)]
        # A step may return before it calls the pipeline, if it does so for all micro-batches of a batch. With a single stage such a
        # step may return any loss.
        pipelined = self._model.mesh.stages > 1
        batch.alike = [list(range(count))]
        if any(run.waits or (pipelined and run.result is not None) for run in batch.runs):
            batch.running.called += 1
            self._forward_pass(batch)
        counts = ~batch.tainted if self.guard is not None and self.guard.excludes else ~dead
        losses, said = self._finish(batch, counts)
        ends = []
        for group in batch.groups:
            of_group = [loss for loss in (losses[replica] for replica in group) if loss is not None]
            ends.append(torch.stack(of_group).sum() if of_group else None)
        # A replica without a loss sends back a gradient of zeros, which no verifier should judge.
        batch.tainted = batch.tainted | torch.tensor([loss is None for loss in losses], device=self._device)
        self._backward_pass(batch, ends)
        return said

    def _started(self, replica: int, batch: MicroBatch, part: tuple[Any, ...]) -> StepRun:
        """The user's step on a replica's micro-batch, up to its call of the pipeline."""
        batch.seeds[replica].seed_step(self._device)
        with self._forward_context():
            return self._steps.start("training_step", part, batch.replicas[replica].sizes[batch.index], self._device)

    def _forward_pass(self, batch: MicroBatch) -> None:
        seeds = batch.seeds
        last = self._model.mesh.stages - 1
        batch.alike = alike([run.inputs for run in batch.runs])
        signals: list[Any] = [side_by_side([batch.runs[replica].inputs for replica in group]) for group in batch.groups]
        for stage in range(last + 1):
            leaves = [signal.detach().requires_grad_() for signal in signals] if stage else signals
            faults = [self._fault(stage, group[0], batch) if batch.apart else None for group in batch.groups]
            outputs = [
                self._counted(stage, leaf, [seeds[replica] for replica in group], fault, batch, group)
                for leaf, group, fault in zip(leaves, batch.groups, faults)
            ]
            batch.leaves.append(leaves)
            batch.outputs.append(outputs)
            if stage < last:
                layer = self._model.stage_layers(stage)[-1]
                sent = [checked_signal(one, layer, stage).detach() for one in outputs]
                boundary = Boundary(stage, Direction.ACTIVATION)
                for (replica, *_), fault in zip(batch.groups, faults):
                    if fault is not None:
                        self._compare(boundary, replica, batch, sent[replica], partial(self._honest, stage, replica, batch))
                signals = self._cross(boundary, sent, leaves, batch)

    def _backward_pass(self, batch: MicroBatch, ends: list[Tensor | None]) -> None:
        """Backward pass through all stages, from ``ends``: the losses of each group, then the outputs of each earlier stage.

        A group without a loss sends zeros back, if it was in the pipeline at all.
        """
        nothing: list[Tensor | None] = [None] * len(batch.groups)
        received = nothing
        gradients = nothing
        last = self._model.mesh.stages - 1
        for stage in range(last, -1, -1):
            own = self._steps.own_backward if stage == last else None
            leaves = batch.leaves[stage] if stage and batch.leaves else nothing
            if batch.apart:
                self._add_apart(stage, batch, ends, gradients, leaves, own)
            else:
                for end, gradient, leaf in zip(ends, gradients, leaves):
                    _add_together(end, gradient, leaf, own)
            if not stage or not batch.leaves:
                return
            boundary = Boundary(stage - 1, Direction.GRADIENT)
            sent = [leaf.grad for leaf in batch.leaves[stage]]
            for (replica, *_), gradient in zip(batch.groups, gradients):
                if batch.apart and self._fault(stage, replica, batch) is not None:
                    honest = partial(self._honest_gradient, stage, replica, batch, gradient)
                    self._compare(boundary, replica, batch, sent[replica], honest)
            received = gradients = list(self._cross(boundary, sent, received, batch))
            ends = list(batch.outputs[stage - 1])

    def _finish(self, batch: MicroBatch, counts: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Finish the user's step of each replica, on the last stage's output.

        Returns:
            each replica's weighted loss to differentiate, ``None`` if it has none; and the tensor that :meth:`_pass` returns.
        """
        outputs = of_replicas(batch.outputs[-1], batch.groups) if batch.outputs else [None] * len(batch.runs)
        losses: list[Tensor | None] = []
        said = []
        nothing = torch.zeros((), device=self._device)
        for replica, output in enumerate(outputs):
            counting = counts[replica]
            weight = batch.replicas[replica].weights[batch.index]
            result = self._answered(replica, batch, batch.runs[replica], output, counting)
            if self.keeps_results:
                batch.running.results.append((batch.running.batch.rows[replica][batch.index], plain(result)))
            if result is None:
                losses.append(None)
                said.append(torch.stack((nothing, nothing, counting * weight)))
                continue
            loss = self._loss_of(replica, batch, result)
            losses.append(torch.where(counting, loss * (weight * batch.scale), 0.0))
            said.append(torch.stack((torch.where(counting, loss.detach().float() * weight, 0.0), counting * weight, nothing)))
        return losses, torch.stack(said)

    def _answered(self, replica: int, batch: MicroBatch, run: StepRun, output: Any, counts: Tensor) -> Any:
        """Finish the user's step for one replica, and return its result."""
        batch.seeds[replica].seed_answer()
        with self._forward_context():
            return run.finish(output, counts)

    def _loss_of(self, replica: int, batch: MicroBatch, result: Any) -> Tensor:
        loss = loss_of(result, "training_step")
        if len(batch.replicas[replica]) > 1:
            refuse_sum(loss, batch.replicas[replica].sizes[batch.index], "training_step")
        return loss

    def _add_apart(
        self,
        stage: int,
        batch: MicroBatch,
        ends: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        leaves: Sequence[Tensor | None],
        own: Callable[[Tensor], None] | None,
    ) -> None:
        """Backward pass of a stage, replica by replica. Sums only the gradients that count and are finite.

        Args:
            own: the module's own ``backward``, at the last stage; ``None`` is torch's.
        """
        guard = self.guard
        # Reading this waits for the device, which a step without faults avoids.
        left_out = batch.tainted.tolist() if guard is not None and guard.excludes else [False] * len(ends)
        parameters = [parameter for parameter in self._untied.parameters[stage] if parameter.requires_grad]
        for replica, (end, gradient, leaf) in enumerate(zip(ends, gradients, leaves)):
            inputs = [*parameters, *([] if leaf is None else [leaf])]
            if end is None:
                _send_nothing(leaf)
                continue
            if not end.requires_grad or not inputs:
                continue
            found = gradients_of(end, inputs, gradient, own)
            if leaf is not None:
                leaf.grad = found.pop()
            if left_out[replica]:
                continue
            worker, slot = batch.worker(stage, replica)
            if self.adversary is not None:
                altered = partial(self.adversary.weight_gradient, worker=worker, step=batch.step, micro_batch=slot)
                found = [None if one is None else altered(one) for one in found]
            if guard is not None and guard.replaces_malformed and bool(broken(found, self._device)):
                batch.running.broken[stage, replica, batch.index] = True
                continue
            for parameter, one in zip(parameters, found):
                if one is not None:
                    parameter.grad = one if parameter.grad is None else parameter.grad + one

    # ------------------------------------------------------------------------------------------------------- simulated faults

    def _anybody_fails(self, plan: StepPlan) -> bool:
        """Whether a worker that serves in this step has a simulated fault in its computation."""
        adversary = self.adversary
        wiring = plan.wiring
        if adversary is None or not any(adversary.fails(worker, plan.number) for worker in adversary.workers):
            return False
        serving = {wiring.worker(stage, lane) for stage in range(plan.mesh.stages) for lane in wiring.lanes}
        return any(adversary.fails(worker, plan.number) for worker in serving)

    def _fault(self, stage: int, replica: int, batch: MicroBatch) -> Callable[[Tensor], Tensor] | None:
        worker, slot = batch.worker(stage, replica)
        if self.adversary is None or self.adversary.fails(worker, batch.step) is not Site.LAYER:
            return None
        return partial(self.adversary.layer_output, worker=worker, step=batch.step, micro_batch=slot)

    def _compare(self, boundary: Boundary, replica: int, batch: MicroBatch, sent: Tensor, honest: Callable[[], Tensor]) -> None:
        """Measure for audits how far a fault moved a signal from the honest one, which is computed without side effects."""
        if self.guard is None or not self.guard.audits:
            return
        buffers = [buffer for layer in self._stages[boundary.sender] for buffer in layer.buffers()]
        restore = Rewind((), buffers, self._device)
        with self._steps.unheard():
            self._note(boundary, replica, batch, sent, honest().detach())
        restore()

    @torch.no_grad()
    def _honest(self, stage: int, replica: int, batch: MicroBatch) -> Tensor:
        output: Tensor = self._forward(stage, batch.leaves[stage][replica], [batch.seeds[replica]])
        return output

    def _honest_gradient(self, stage: int, replica: int, batch: MicroBatch, gradient: Tensor | None) -> Tensor:
        leaf = batch.leaves[stage][replica].detach().requires_grad_()
        end = self._forward(stage, leaf, [batch.seeds[replica]])
        own = None
        if stage == self._model.mesh.stages - 1:
            dealt = batch.replicas[replica]
            own = self._steps.own_backward
            # A second run of the step, on a copy: the first may have changed its batch in place.
            run = self._started(replica, batch, (copied(dealt[batch.index]), *batch.parts[replica][1:]))
            result = self._answered(replica, batch, run, end, torch.tensor(True, device=self._device))
            if result is None:
                return torch.zeros_like(leaf)
            end = self._loss_of(replica, batch, result) * (dealt.weights[batch.index] * batch.scale)
        (found,) = gradients_of(end, [leaf], gradient, own, self._untied.parameters[stage])
        assert found is not None, "what a stage was given reaches its end"
        return found

    # ----------------------------------------------------------------------------------------------------------------- layers

    def _counted(
        self,
        stage: int,
        signals: Any,
        seeds: Sequence[MicroBatchSeeds],
        fault: Callable[[Tensor], Tensor] | None,
        batch: MicroBatch,
        group: Sequence[int],
    ) -> Any:
        """A forward pass that restores the stage's buffers if one of the micro-batches is left out, or the output not finite."""
        before = self._moving[stage].copies() if self._steps.leaves_out else []
        output = self._forward(stage, signals, seeds, fault)
        if before and isinstance(output, Tensor):
            left_out = torch.stack([batch.tainted[replica] for replica in group]).any()
            self._moving[stage].put_back(before, left_out | ~output.isfinite().all())
        return output

    def _forward(
        self,
        stage: int,
        signals: Any,
        seeds: Sequence[MicroBatchSeeds] | None = None,
        fault: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        # A copy, because a layer may work in place, which autograd forbids on a leaf, and the gradient is read from the leaf.
        signals = signals.clone() if isinstance(signals, Tensor) and signals.requires_grad else signals
        first = self._model.parts[stage]
        with self._forward_context():
            for number, layer in enumerate(self._stages[stage], first):
                signals = self._batched.run(number, layer, partial(self._untied.call, layer), signals, seeds)
                if fault is not None and number == first:
                    signals = fault(signals)
        return signals


def _add_together(end: Tensor | None, gradient: Tensor | None, leaf: Tensor | None, own: Callable[[Tensor], None] | None) -> None:
    """Backward pass of replicas that went through a stage side by side.

    Args:
        end: the loss, or the stage's output; ``None`` without a loss.
        gradient: the gradient of ``end``; ``None`` of a loss.
        leaf: the stage's input; ``None`` at the first stage.
        own: the module's own ``backward``, at the last stage; ``None`` is torch's.
    """
    if end is None:
        _send_nothing(leaf)
    elif own is not None:
        own(end)
    elif gradient is None or end.requires_grad:  # not if all layers so far are frozen; for a loss torch raises its own error
        end.backward(gradient)


def _send_nothing(leaf: Tensor | None) -> None:
    if leaf is not None:
        leaf.grad = torch.zeros_like(leaf)
