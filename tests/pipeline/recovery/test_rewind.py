from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from lightning_sentinel.pipeline.recovery.rewind import Rewind

CPU = torch.device("cpu")


def module() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3)


def accumulate(layer: nn.Linear, factor: float = 1.0) -> None:
    """A batch with dropout, whose gradients add to what is there."""
    (factor * dropout(layer(torch.ones(2, 4)), 0.5)).square().sum().backward()


@pytest.mark.parametrize("earlier", [0, 1, 2])
def test_a_batch_done_again_is_the_batch_done_once(earlier: int) -> None:
    results = []
    for liars in (False, True):
        layer = module()
        torch.manual_seed(1)
        for _ in range(earlier):
            accumulate(layer)
        if liars:
            rewind = Rewind(list(layer.parameters()), list(layer.buffers()), CPU)
            accumulate(layer, factor=100.0)
            torch.rand(7)
            rewind()
        accumulate(layer)
        results.append(([parameter.grad.clone() for parameter in layer.parameters()], torch.rand(3)))
    for one, other in zip(results[0][0], results[1][0]):
        assert torch.equal(one, other)
    assert torch.equal(results[0][1], results[1][1])


def test_gradients_that_were_not_there_are_gone_again() -> None:
    layer = module()
    rewind = Rewind(list(layer.parameters()), list(layer.buffers()), CPU)
    accumulate(layer)
    rewind()
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_frozen_parameter_stays_without_a_gradient() -> None:
    layer = module()
    layer.bias.requires_grad_(False)
    accumulate(layer)
    rewind = Rewind(list(layer.parameters()), list(layer.buffers()), CPU)
    rewind()
    assert layer.bias.grad is None and layer.weight.grad is not None


def test_what_was_remembered_is_a_copy() -> None:
    layer = module()
    accumulate(layer)
    before = layer.weight.grad.clone()
    rewind = Rewind(list(layer.parameters()), list(layer.buffers()), CPU)
    accumulate(layer)
    rewind()
    assert torch.equal(layer.weight.grad, before)


def test_each_attempt_of_a_batch_is_undone() -> None:
    # As an engine does it: every attempt remembers the moment at which it starts.
    layer = module()
    torch.manual_seed(2)
    accumulate(layer)
    before, drawn = layer.weight.grad.clone(), set()
    for _ in range(3):
        rewind = Rewind(list(layer.parameters()), list(layer.buffers()), CPU)
        accumulate(layer)
        drawn.add(float(torch.rand(1)))
        rewind()
        assert torch.equal(layer.weight.grad, before)
    assert len(drawn) == 1


def test_buffers_are_what_they_were_and_stay_the_same_tensors() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(5, 3))
    before = {name: (buffer, buffer.clone()) for name, buffer in norm.named_buffers()}
    rewind = Rewind(list(norm.parameters()), list(norm.buffers()), CPU)
    norm(100 + torch.randn(5, 3))
    assert not torch.equal(norm.running_mean, before["running_mean"][1])
    rewind()
    for name, buffer in norm.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1])
    assert int(norm.num_batches_tracked) == 1


def test_a_backward_pass_that_is_yet_to_come_does_not_mind() -> None:
    """As where an honest signal is computed beside a faulty one: the graph has saved the buffer, which is restored to itself."""
    layer = module()
    layer.register_buffer("scale", torch.tensor(2.0))
    rewind = Rewind([], list(layer.buffers()), CPU)
    loss = (layer(torch.ones(2, 4)) * layer.scale).sum()
    rewind()
    loss.backward()
    assert layer.bias.grad is not None and bool((layer.bias.grad == 4).all())
