"""Recomputes the signal that an honest worker of a stage sends, without side effects on the rank that does so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sentinel.mesh import Direction
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.gradients.contributions import gradients_of
from lightning_sentinel.pipeline.recovery.examination import Inputs
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.running_step import RunningStep
from lightning_sentinel.pipeline.stages.stage import StageLayers
from lightning_sentinel.pipeline.step_checks import loss_of
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.verification.audit import arithmetic
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["Recomputation"]


class _Again(NamedTuple):
    """A stage's forward pass, done again.

    Args:
        end: the stage's output, or at the last stage for a backward pass the loss, ``None`` if the step returned none.
        leaf: the stage's input.
        own: the module's own ``backward``, at the last stage; ``None`` is torch's.
    """

    end: Tensor | None
    leaf: Any
    own: Callable[[Tensor], None] | None


@dataclass(frozen=True)
class Recomputation:
    """Recomputes signals and weight gradients of one stage.

    Args:
        stage: the stage's layers.
        last: whether it is the last stage.
        steps: runs the user's step functions.
        device: the stage's device.
        forward_context: entered around every forward pass.
    """

    stage: StageLayers
    last: bool
    steps: StepRunner
    device: torch.device
    forward_context: Callable[[], AbstractContextManager[Any]]

    def computed_in(self) -> torch.dtype:
        """The dtype in which the stage's device multiplies float32."""
        with self.forward_context():
            return arithmetic(self.device)

    def __call__(self, direction: Direction, micro_batch_id: MicroBatchId, given: Inputs, running: RunningStep) -> Tensor:
        """The signal that an honest worker sends.

        Args:
            direction: an activation for the next stage, or a gradient for the previous one.
            micro_batch_id: the micro-batch.
            given: the samples and signals that the worker received, on any device.
            running: the step.
        """
        if direction is Direction.ACTIVATION:
            with self._again(micro_batch_id, given, running, backward=False) as again:
                assert again.end is not None, "every stage but the last sends an activation"
                return again.end.detach()
        with self._again(micro_batch_id, given, running, backward=True) as again:
            if again.end is None:
                return torch.zeros_like(again.leaf)
            (found,) = gradients_of(again.end, [again.leaf], self._gradient(given), again.own, self.stage.parameters())
            assert found is not None, "what a stage was given reaches its end"
            return found.detach()

    def weight_gradients(self, micro_batch_id: MicroBatchId, given: Inputs, running: RunningStep) -> list[Tensor | None]:
        """The gradients of the stage's parameters that an honest worker adds for a micro-batch; ``None`` where it adds nothing.

        Args:
            micro_batch_id: the micro-batch.
            given: the samples and both signals that the worker received.
            running: the step.
        """
        parameters = list(self.stage.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        with self._again(micro_batch_id, given, running, backward=True) as again:
            if again.end is None or not again.end.requires_grad or not trained:
                return [None] * len(parameters)
            found = iter(gradients_of(again.end, trained, self._gradient(given), again.own))
            return [next(found) if parameter.requires_grad else None for parameter in parameters]

    @contextmanager
    def _again(self, micro_batch_id: MicroBatchId, given: Inputs, running: RunningStep, backward: bool) -> Iterator[_Again]:
        """A context in which the stage has done its forward pass again, for the backward pass up to its loss; undone at its end."""
        samples, weight = running.plan.sizes.work(*micro_batch_id)
        restore = Rewind((), list(self.stage.buffers()), self.device)
        # Copies, because a step may work on its batch in place.
        arguments = (copied(apply_to_collection(given.batch, Tensor, self._on_device)), *running.arguments[1:])
        self.stage.seeds = seeds = running.plan.seeds(micro_batch_id)
        with ExitStack() as stack:
            stack.callback(restore)
            for context in (torch.set_grad_enabled(backward), self.steps.unheard(), self.forward_context()):
                stack.enter_context(context)
            seeds.seed_step(self.device)
            if given.activation is None:
                inputs = leaf = self.steps.input_of("training_step", arguments)
            else:
                leaf = self._on_device(given.activation).detach().requires_grad_(backward)
                inputs = leaf.clone()
            end = self.stage(inputs)
            own = None
            if backward and self.last:
                own = self.steps.own_backward
                seeds.seed_step(self.device)
                run = self.steps.start("training_step", arguments, samples)
                seeds.seed_answer()
                result = run.finish(end, torch.tensor(True, device=self.device))
                end = None if result is None else loss_of(result, "training_step") * (weight * running.scale)
            yield _Again(end, leaf, own)

    def _gradient(self, given: Inputs) -> Tensor | None:
        return None if given.gradient is None else self._on_device(given.gradient)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)
