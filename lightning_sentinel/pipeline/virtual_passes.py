"""Forward and backward passes of the virtual engine: one micro-batch of all replicas, through all stages and boundaries.

The replicas go through a stage side by side, along the batch axis, which sums their weight gradients. Replicas whose signals have
other shapes go through in a group of their own. Where one replica's gradients must not reach the sum, or a simulated fault alters
what it computes, the replicas go through one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sentinel.attacks import Site
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.gradients.contributions import broken, gradients_of
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.results.joining import plain
from lightning_sentinel.pipeline.results.losses import refuse_sum, weighted
from lightning_sentinel.pipeline.stages.groups import alike, of_replicas, side_by_side
from lightning_sentinel.pipeline.step_checks import checked_signal, loss_of
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.steps import StepRun, StepRunner
from lightning_sentinel.pipeline.virtual_boundaries import Contributed, MicroBatch, VirtualBoundaries
from lightning_sentinel.pipeline.virtual_stages import VirtualStages
from lightning_sentinel.pipeline.virtual_workers import VirtualWorkers
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["VirtualPasses"]


class VirtualPasses:
    """Runs layers and step functions; the engine decides when, and what follows.

    Args:
        workers: the workers of the mesh.
        stages: runs layers.
        boundaries: passes signals from stage to stage.
        steps: runs the user's step functions.
    """

    def __init__(self, workers: VirtualWorkers, stages: VirtualStages, boundaries: VirtualBoundaries, steps: StepRunner) -> None:
        self._workers = workers
        self._stages = stages
        self._boundaries = boundaries
        self._steps = steps
        self._device = workers.device

    def run(self, batch: MicroBatch) -> Tensor:
        """Forward and backward of one micro-batch of all replicas.

        Returns:
            ``(replicas, 3)``, the weighted losses that count, their weights, and the weights of micro-batches for which
            ``training_step`` returned ``None``.
        """
        count = len(batch.parts)
        batch.seeds = [batch.running.plan.seeds(MicroBatchId(replica, batch.index)) for replica in range(count)]
        dead = torch.zeros(count, dtype=torch.bool, device=self._device)
        if (lanes := self._boundaries.lanes(batch)) is not None:
            dead = ~torch.tensor(batch.wiring.live, device=self._device)[lanes]
        batch.tainted = dead
        batch.runs = [self._started(replica, batch, part) for replica, part in enumerate(batch.parts)]
        # A step may return before it calls the pipeline, if it does so for all micro-batches of a batch. With a single stage such a
        # step may return any loss.
        pipelined = self._stages.last > 0
        batch.alike = [list(range(count))]
        if any(run.waits or (pipelined and run.result is not None) for run in batch.runs):
            batch.running.called += 1
            self._forward_pass(batch)
        counts = ~batch.tainted if self._workers.excludes else ~dead
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
        with self._stages.forward_context():
            return self._steps.start("training_step", part, batch.replicas[replica].sizes[batch.index], self._device)

    def _forward_pass(self, batch: MicroBatch) -> None:
        seeds = batch.seeds
        last = self._stages.last
        batch.alike = alike([run.inputs for run in batch.runs])
        signals: list[Any] = [side_by_side([batch.runs[replica].inputs for replica in group]) for group in batch.groups]
        for stage in range(last + 1):
            leaves = [signal.detach().requires_grad_() for signal in signals] if stage else signals
            outputs = []
            for leaf, group in zip(leaves, batch.groups):
                fault = self._layer_fault(stage, group[0], batch) if batch.apart else None
                with self._wrongly(stage, group[0], batch, backward=False):
                    outputs.append(
                        self._stages.forward_counted(
                            stage, leaf, [seeds[replica] for replica in group], fault, self._left_out(batch, group)
                        )
                    )
            batch.leaves.append(leaves)
            batch.outputs.append(outputs)
            if stage < last:
                layer = self._stages.model.stage_layers(stage)[-1]
                sent = [checked_signal(one, layer, stage).detach() for one in outputs]
                boundary = Boundary(stage, Direction.ACTIVATION)
                for replica in self._failing(stage, batch):
                    self._compare(boundary, replica, batch, sent[replica], partial(self._honest, stage, replica, batch))
                signals = self._boundaries.cross(boundary, sent, leaves, batch)

    def _left_out(self, batch: MicroBatch, group: Sequence[int]) -> Callable[[], Tensor] | None:
        """Returns whether one of a group's micro-batches is left out; ``None`` if none ever is."""
        if not self._steps.leaves_out:
            return None
        return lambda: torch.stack([batch.tainted[replica] for replica in group]).any()

    def _backward_pass(self, batch: MicroBatch, ends: list[Tensor | None]) -> None:
        """Backward pass through all stages, from ``ends``: the losses of each group, then the outputs of each earlier stage.

        A group without a loss sends zeros back, if it was in the pipeline at all.
        """
        nothing: list[Tensor | None] = [None] * len(batch.groups)
        received = nothing
        gradients = nothing
        last = self._stages.last
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
            for replica in self._failing(stage, batch):
                honest = partial(self._honest_gradient, stage, replica, batch, gradients[replica])
                self._compare(boundary, replica, batch, sent[replica], honest)
            received = gradients = list(self._boundaries.cross(boundary, sent, received, batch))
            ends = list(batch.outputs[stage - 1])

    def _finish(self, batch: MicroBatch, counts: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Finish the user's step of each replica, on the last stage's output.

        Returns:
            each replica's weighted loss to differentiate, ``None`` if it has none; and the tensor that :meth:`run` returns.
        """
        outputs = of_replicas(batch.outputs[-1], batch.groups) if batch.outputs else [None] * len(batch.runs)
        losses: list[Tensor | None] = []
        said = []
        for replica, output in enumerate(outputs):
            counting = counts[replica]
            weight = batch.replicas[replica].weights[batch.index]
            result = self._answered(replica, batch, batch.runs[replica], output, counting)
            if batch.running.keeps_results:
                batch.running.results.append((batch.running.batch.rows[replica][batch.index], plain(result)))
            differentiated, counted = weighted(self._loss_of(replica, batch, result), counting, weight, batch.scale)
            losses.append(differentiated)
            said.append(counted)
        return losses, torch.stack(said)

    def _answered(self, replica: int, batch: MicroBatch, run: StepRun, output: Any, counts: Tensor) -> Any:
        """Finish the user's step for one replica, and return its result."""
        batch.seeds[replica].seed_answer()
        with self._stages.forward_context():
            return run.finish(output, counts)

    def _loss_of(self, replica: int, batch: MicroBatch, result: Any) -> Tensor | None:
        if result is None:
            return None
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
        workers = self._workers
        # Reading this waits for the device, which a step without faults avoids.
        left_out = batch.tainted.tolist() if workers.excludes else [False] * len(ends)
        parameters = self._stages.trained(stage)
        for replica, (end, gradient, leaf) in enumerate(zip(ends, gradients, leaves)):
            inputs = [*parameters, *([] if leaf is None else [leaf])]
            if end is None:
                _send_nothing(leaf)
                continue
            if not end.requires_grad or not inputs:
                continue
            with self._wrongly(stage, replica, batch, backward=True):
                found = gradients_of(end, inputs, gradient, own)
            if leaf is not None:
                leaf.grad = found.pop()
            if left_out[replica]:
                continue
            found = self._added(stage, replica, batch, gradient, found)
            if workers.replaces_malformed and bool(broken(found, self._device)):
                batch.running.broken[stage, replica, batch.index] = True
                continue
            for parameter, one in zip(parameters, found):
                if one is not None:
                    parameter.grad = one if parameter.grad is None else parameter.grad + one

    # ------------------------------------------------------------------------------------------------------- simulated faults

    def _added(
        self, stage: int, replica: int, batch: MicroBatch, gradient: Tensor | None, computed: list[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients that a worker adds to those of its stage in place of those that it has computed."""
        workers = self._workers
        adversary = workers.adversary
        if adversary is None:
            return computed
        worker, slot = batch.worker(stage, replica)
        alter = partial(adversary.weight_gradient, worker=worker, step=batch.step, micro_batch=slot)
        added = [None if one is None else alter(one, parameter=number) for number, one in enumerate(computed)]
        self._witness_weights(stage, replica, batch, gradient, added)
        if workers.shows_contributions and workers.guard is not None:
            sketch = partial(workers.guard.contributions.sketch, stage, device=self._device)
            site = adversary.fails(worker, batch.step)
            faulty = adversary.computes_wrongly(worker, batch.step)
            true = sketch(self._honest_weights(stage, replica, batch, gradient) if faulty else computed)
            dtype = next((one.dtype for one in computed if one is not None), torch.float32)
            batch.running.contribute(worker, Contributed(true if site is None else sketch(added), true, dtype))
        return added

    def runs_apart(self, plan: StepPlan) -> bool:
        """Whether replicas run one by one: because a worker that serves in this step has a simulated fault in its computation.

        Or because any worker has one in its weight gradients: honest ones are to be learned from the first step on.
        """
        adversary = self._workers.adversary
        wiring = plan.wiring
        if self._workers.shows_contributions:
            return True
        if adversary is None or not any(adversary.fails(worker, plan.number) for worker in adversary.workers):
            return False
        serving = {wiring.worker(stage, lane) for stage in range(plan.mesh.stages) for lane in wiring.lanes}
        return any(adversary.fails(worker, plan.number) for worker in serving)

    def _failing(self, stage: int, batch: MicroBatch) -> list[int]:
        """The replicas whose micro-batch a worker of a stage computes with a simulated fault that its signals may show."""
        adversary = self._workers.adversary
        if adversary is None or not batch.apart:
            return []
        workers = [batch.worker(stage, replica)[0] for replica in range(len(batch.parts))]
        return [at for at, worker in enumerate(workers) if adversary.computes_wrongly(worker, batch.step)]

    def _layer_fault(self, stage: int, replica: int, batch: MicroBatch) -> Callable[[Tensor], Tensor] | None:
        adversary = self._workers.adversary
        worker, slot = batch.worker(stage, replica)
        if adversary is None or adversary.fails(worker, batch.step) is not Site.LAYER:
            return None
        return partial(adversary.layer_output, worker=worker, step=batch.step, micro_batch=slot)

    def _wrongly(self, stage: int, replica: int, batch: MicroBatch, backward: bool) -> AbstractContextManager[None]:
        """A context for a replica's pass through a stage, in which an attacker alters weights or results of matrix products."""
        adversary = self._workers.adversary
        if adversary is None or not batch.apart:
            return nullcontext()
        worker, slot = batch.worker(stage, replica)
        return adversary.computing(worker, batch.step, slot, backward, self._stages.trained(stage))

    def _compare(self, boundary: Boundary, replica: int, batch: MicroBatch, sent: Tensor, honest: Callable[[], Tensor]) -> None:
        """Measure how far a fault moved a signal from the honest one, which is computed without side effects."""
        if self._boundaries.measures:
            with self._aside(boundary.sender):
                self._boundaries.measure(boundary, replica, batch, sent, honest().detach())

    def _witness_weights(
        self, stage: int, replica: int, batch: MicroBatch, gradient: Tensor | None, found: Sequence[Tensor | None]
    ) -> None:
        """Tell the adversary's witness what a faulty worker adds to the gradients of its stage, and what an honest one would."""
        adversary = self._workers.adversary
        worker, slot = batch.worker(stage, replica)
        if adversary is None or adversary.witness is None or not adversary.fails(worker, batch.step):
            return
        honest = self._honest_weights(stage, replica, batch, gradient)
        both = [torch.cat([one.flatten() for one in some if one is not None]) for some in (found, honest)]
        adversary.witness(worker, "weights", batch.step, slot, both[0], both[1])

    def _honest_weights(self, stage: int, replica: int, batch: MicroBatch, gradient: Tensor | None) -> list[Tensor | None]:
        """The gradients that an honest worker adds to those of its stage."""
        parameters = self._stages.trained(stage)
        with self._aside(stage):
            return self._honest_gradients(stage, replica, batch, gradient, parameters)

    @contextmanager
    def _aside(self, stage: int) -> Iterator[None]:
        """A context in which layers and steps run without side effects."""
        restore = Rewind((), self._stages.buffers(stage), self._device)
        with self._steps.unheard():
            yield
        restore()

    @torch.no_grad()
    def _honest(self, stage: int, replica: int, batch: MicroBatch) -> Tensor:
        output: Tensor = self._stages.forward(stage, batch.leaves[stage][replica], [batch.seeds[replica]])
        return output

    def _honest_gradient(self, stage: int, replica: int, batch: MicroBatch, gradient: Tensor | None) -> Tensor:
        (found,) = self._honest_gradients(stage, replica, batch, gradient, [])
        assert found is not None, "what a stage was given reaches its end"
        return found

    def _honest_gradients(
        self, stage: int, replica: int, batch: MicroBatch, gradient: Tensor | None, parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients that an honest worker gets for ``parameters``; without any, the one that it sends back."""
        leaf = batch.leaves[stage][replica]
        leaf = leaf.detach().requires_grad_() if stage else leaf
        inputs = list(parameters) or [leaf]
        end = self._stages.forward(stage, leaf, [batch.seeds[replica]])
        own = None
        if stage == self._stages.last:
            dealt = batch.replicas[replica]
            own = self._steps.own_backward
            # A second run of the step, on a copy: the first may have changed its batch in place.
            run = self._started(replica, batch, (copied(dealt[batch.index]), *batch.parts[replica][1:]))
            result = self._answered(replica, batch, run, end, torch.tensor(True, device=self._device))
            loss = self._loss_of(replica, batch, result)
            if loss is None:
                return [torch.zeros_like(one) for one in inputs]
            end = loss * (dealt.weights[batch.index] * batch.scale)
        return gradients_of(end, inputs, gradient, own, self._stages.untied.parameters[stage])


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
