"""Checks what a user's layers and steps return: a loss, a signal that can cross a boundary, a gradient of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError

__all__ = ["StepOutputError", "checked_signal", "input_gradient", "loss_of"]


class StepOutputError(PipelineModelError, MisconfigurationException):
    """``training_step`` returned no loss; a subclass of Lightning's own exception for it."""


def loss_of(result: Any, step: str) -> Tensor:
    """The loss in the return value of a training step.

    Raises:
        PipelineModelError: if there is no scalar loss.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.is_floating_point(loss):
        raise StepOutputError(
            f"{step} returned {type(result).__name__}, in which there is no scalar loss. It must return a Tensor, a dict, or None,"
            " which leaves the micro-batch out; in a dict the 'loss' key needs to be present."
        )
    return loss.reshape(())


def checked_signal(output: Any, layer: str, stage: int) -> Tensor:
    """Return a stage's output if it can be sent to the next stage.

    Args:
        output: of the stage.
        layer: name of the stage's last layer.
        stage: number of the stage.

    Raises:
        PipelineModelError: if the output is no floating-point tensor.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return output
    what = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
    raise PipelineModelError(
        f"Layer {layer}, the last of stage {stage}, returned {what}. Between stages travels one floating-point tensor: let the"
        " layer return one (masks and positions can be computed again in each stage)."
    )


def input_gradient(inputs: Tensor, stage: int) -> Tensor:
    """The gradient of a stage's input, after its backward pass.

    Raises:
        PipelineModelError: if the input has no gradient.
    """
    if inputs.grad is None:
        raise PipelineModelError(
            f"The input of stage {stage} received no gradient: its layers do not use it. Every layer must depend on the output of"
            " the one before."
        )
    return inputs.grad
