"""Recomputes the signal that an honest worker of a stage sends, without side effects on the rank that does so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sentinel.mesh import Direction
from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.gradients.contributions import gradients_of
from lightning_sentinel.pipeline.recovery.auditing import Inputs
from lightning_sentinel.pipeline.recovery.rewind import Rewind
from lightning_sentinel.pipeline.running_step import RunningStep
from lightning_sentinel.pipeline.stages.stage import StageLayers
from lightning_sentinel.pipeline.step_checks import loss_of
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.verification.audit import arithmetic
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["Recomputation"]


@dataclass(frozen=True)
class Recomputation:
    """Recomputes signals of one stage.

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
        samples, weight = running.plan.sizes.work(*micro_batch_id)
        restore = Rewind((), list(self.stage.buffers()), self.device)
        # Copies, because a step may work on its batch in place.
        arguments = (copied(apply_to_collection(given.batch, Tensor, self._on_device)), *running.arguments[1:])
        backward = direction is Direction.GRADIENT
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
            signal = self.stage(inputs)
            if backward:
                own = None
                if self.last:
                    own = self.steps.own_backward
                    seeds.seed_step(self.device)
                    run = self.steps.start("training_step", arguments, samples)
                    seeds.seed_answer()
                    result = run.finish(signal, torch.tensor(True, device=self.device))
                    if result is None:
                        return torch.zeros_like(leaf)
                    signal = loss_of(result, "training_step") * (weight * running.scale)
                gradient = None if given.gradient is None else self._on_device(given.gradient)
                (found,) = gradients_of(signal, [leaf], gradient, own, self.stage.parameters())
                assert found is not None, "what a stage was given reaches its end"
                signal = found
        return signal.detach()

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)
