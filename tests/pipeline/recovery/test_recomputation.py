"""What an auditor calls the same: all that rounding can make of it, in the precision and on the device, and little more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.models import llama
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes, MicroBatches
from lightning_sentinel.pipeline.recovery.examination import Inputs
from lightning_sentinel.pipeline.recovery.recomputation import Recomputation
from lightning_sentinel.pipeline.running_step import RunningStep
from lightning_sentinel.pipeline.stages.stage import StageLayers
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.pipeline.steps import StepRunner
from lightning_sentinel.verification.audit import relative_error, tolerance
from lightning_sentinel.wiring import MicroBatchId
from tests.distributed.tasks import Classifier

WIDTH = 128
BATCH = MicroBatches([None], (2,), None)
RUNNING = RunningStep(plan_step("training_step", Mesh(1, 1), BatchSizes(1, (2,))), (None,), BATCH, [], torch.zeros(3), 1.0, False)
CPU = torch.device("cpu")
CASES: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "float64": (torch.float64, nullcontext),
    "float32": (torch.float32, nullcontext),
    "bfloat16": (torch.bfloat16, nullcontext),
    "float32, multiplied in bfloat16": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
    "float32, multiplied in float16": (torch.float32, lambda: torch.autocast("cpu", torch.float16)),
}


@pytest.fixture(scope="module")
def stage() -> nn.Sequential:
    """Four blocks whose weights are those of a trained model in size: at the start all that matters is the residual."""
    torch.manual_seed(0)
    stage = nn.Sequential(*list(llama(vocab_size=8, width=WIDTH, depth=4, heads=4))[1:-1])
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    return stage


def recomputed(
    stage: nn.Sequential, dtype: torch.dtype, context: Any, activation: Tensor, gradient: Tensor
) -> tuple[Recomputation, Any]:
    module = Classifier()
    layers = StageLayers(list(copy.deepcopy(stage).to(dtype)), 0, False, CPU, ["layer"] * len(stage))
    recompute = Recomputation(layers, False, StepRunner(module, module.net), CPU, context)
    evidence = Inputs(None, activation.to(dtype), gradient.to(dtype))
    return recompute, [recompute(direction, MicroBatchId(0, 0), evidence, RUNNING) for direction in Direction]


@pytest.mark.parametrize(("dtype", "context"), CASES.values(), ids=CASES)
def test_rounding_stays_far_below_the_tolerance_and_a_lie_does_not(stage: nn.Sequential, dtype: torch.dtype, context: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    activation, gradient = (torch.randn(2, 32, WIDTH, generator=generator) for _ in range(2))
    # Of the same numbers, rounded: what is to be compared is what is made of them.
    rounded = stage if dtype != torch.bfloat16 else copy.deepcopy(stage).bfloat16()
    _, exact = recomputed(rounded, torch.float64, nullcontext, activation.to(dtype), gradient.to(dtype))
    recompute, found = recomputed(stage, dtype, context, activation, gradient)
    for reference, signal in zip(exact, found):
        allowed = tolerance(signal.dtype, recompute.computed_in())
        assert float(relative_error(signal.double(), reference)) < allowed / 3
        assert float(relative_error(signal * 1.2, signal)) > 2 * allowed


def test_float64_is_not_multiplied_in_anything_else() -> None:
    module = Classifier()
    context = CASES["float32, multiplied in bfloat16"][1]
    layers = StageLayers(list(module.net), 0, False, CPU, ["layer"] * len(module.net))
    recompute = Recomputation(layers, False, StepRunner(module, module.net), CPU, context)
    assert recompute.computed_in() == torch.bfloat16
    assert tolerance(torch.float64, recompute.computed_in()) == 1e-6
    assert tolerance(torch.float32, recompute.computed_in()) == tolerance(torch.bfloat16) == 5e-2


class Works(L.LightningModule):
    """Its step works on its batch in place, and may have no loss; its ``backward`` is its own."""

    def __init__(self, loss: bool) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(3, 1), loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor | None:
        output = self.net(batch["x"].mul_(2))
        return (output - batch.pop("y")).mean() if self.loss else None


@pytest.mark.parametrize("loss", [True, False])
def test_samples_stay_as_they_are_and_a_step_without_a_loss_has_a_gradient_of_zeros(loss: bool) -> None:
    module, batch = Works(loss), {"x": torch.ones(2, 3), "y": torch.ones(2, 1)}
    layers = StageLayers([module.net], 0, False, CPU, ["layer"])
    recompute = Recomputation(layers, True, StepRunner(module, module.net), CPU, nullcontext)
    first = Inputs(batch, None, None)
    forward = [recompute(Direction.ACTIVATION, MicroBatchId(0, 0), first, RUNNING) for _ in range(2)]
    assert torch.equal(*forward) and torch.equal(forward[0], module.net(2 * torch.ones(2, 3)))
    last = Inputs(batch, torch.ones(2, 3), None)
    backward = [recompute(Direction.GRADIENT, MicroBatchId(0, 0), last, RUNNING) for _ in range(2)]
    assert torch.equal(*backward) and torch.equal(backward[0], loss * module.net.weight.detach().expand(2, 3))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert batch.keys() == {"x", "y"} and torch.equal(batch["x"], torch.ones(2, 3))
