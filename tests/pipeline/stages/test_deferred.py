"""A build that is put off gives each tensor, by itself or with others, the value of a build that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import psutil
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_sentinel.pipeline.stages.deferred import DeferredBuild


def truncated() -> nn.Module:
    """Draws until all values lie within the bounds, which is for the values to say."""
    layer = nn.Linear(40, 30)
    nn.init.trunc_normal_(layer.weight, std=1.0, a=-1.0, b=1.0)
    return nn.Sequential(layer, nn.Linear(30, 2))


def initialised_at_the_end() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.orthogonal_(parameter)
                parameter.mul_(0.5)
            else:
                parameter.copy_(torch.randn(len(parameter)) * 0.1 + torch.arange(len(parameter)))
        module[0].weight[1] = 7.0
    module[2].bias.data = torch.ones(4)
    return module


def with_buffers() -> nn.Module:
    module = nn.Linear(6, 6)
    module.register_buffer("mask", torch.tril(torch.ones(6, 6)).bool())
    module.register_buffer("rates", 1.0 / 10000 ** (torch.arange(0, 6, 2).float() / 6))
    module.register_buffer("given", torch.tensor([3.0, 4.0]))
    module.register_buffer("mixed", module.given * torch.rand(2))
    module.register_buffer("order", torch.randperm(7))
    module.register_buffer("chosen", torch.multinomial(torch.tensor([0.1, 0.2, 0.7]), 50, replacement=True))
    module.register_buffer("kept", torch.bernoulli(torch.rand(9)))
    return module


def seeded_inside() -> nn.Module:
    first = nn.Linear(3, 3)
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    second = nn.Parameter(torch.randn(4, generator=generator))
    return nn.ParameterList([*first.parameters(), second, nn.Parameter(torch.randn(3)), torch.randn(2, generator=generator)])


def in_half_precision() -> nn.Module:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return nn.Sequential(nn.Linear(20, 3), nn.Linear(3, 3).double())
    finally:
        torch.set_default_dtype(torch.float32)


def tied() -> nn.Module:
    module = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9))
    module[1].weight = module[0].weight
    return module


def of_torch() -> nn.Module:
    return nn.ModuleList([nn.TransformerEncoderLayer(8, 2), nn.LSTM(4, 5), nn.Conv2d(3, 4, 3), nn.MultiheadAttention(8, 2)])


def copied() -> nn.Module:
    block = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), num_layers=2)
    twin = copy.deepcopy(nn.ModuleList([nn.Linear(2, 2), tied(), torchmetrics.MeanMetric()]))
    assert twin[1][0].weight is twin[1][1].weight
    nn.init.normal_(twin[0].weight)
    return nn.ModuleList([block, twin])


BUILDERS = [copied, truncated, initialised_at_the_end, with_buffers, seeded_inside, in_half_precision, tied, of_torch]


@pytest.mark.parametrize("builder", BUILDERS)
def test_values_are_those_of_a_build_at_once(builder: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    expected, next_number = builder().state_dict(), torch.rand(3)
    torch.manual_seed(1)
    build = DeferredBuild()
    with build:
        module = builder()
    assert torch.equal(torch.rand(3), next_number)
    state = module.state_dict(keep_vars=True)
    deferred = {name: tensor for name, tensor in state.items() if build.knows(tensor)}
    assert deferred
    before = torch.get_rng_state()
    together = dict(zip(deferred, build.values(deferred.values())))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in expected.items():
        if name in deferred:
            (alone,) = build.values([deferred[name]])
            for found in (alone, together[name]):
                assert found.dtype == value.dtype and torch.equal(found, value), name
        else:
            assert torch.equal(state[name], value), name


def test_tensors_that_share_memory_share_it_again() -> None:
    build = DeferredBuild()
    with build:
        whole = torch.rand(4, 3)
        row = whole[1]
    values = build.values([whole, row])
    values[1].zero_()
    assert not values[0][1].any() and values[0][0].all()


def test_only_what_is_wanted_takes_memory() -> None:
    build = DeferredBuild()
    with build:
        layers = [nn.Linear(2**40, 1, device="meta"), nn.Linear(100, 100), nn.Linear(100, 2)]
        zeros = torch.zeros(2**40)
    (value,) = build.values([layers[2].weight])
    assert value.shape == (2, 100) and build.knows(zeros) and not build.knows(layers[0].weight)


def test_building_leaves_no_memory_behind() -> None:
    """Not even free memory, which an allocator has not given back."""
    with DeferredBuild():
        nn.Linear(1024, 2048)  # what the first one needs besides
    before = psutil.Process().memory_info().rss
    with DeferredBuild():
        layers = [nn.Linear(1024, 1024 * (1 + number % 2)) for number in range(40)]
    assert psutil.Process().memory_info().rss - before < sum(layer.weight.nbytes for layer in layers) / 8


def test_numbers_for_others_are_drawn_into_the_same_memory() -> None:
    def build() -> nn.Module:
        weight = torch.empty(6, 5)
        nn.init.normal_(weight.T[1:])
        nn.init.uniform_(weight[:0])
        small = nn.init.normal_(torch.empty(3, dtype=torch.bfloat16))
        return nn.ParameterList([weight[1:, 1:], small, nn.init.normal_(torch.empty(())), torch.rand(50)])

    torch.manual_seed(2)
    expected = build()
    torch.manual_seed(2)
    deferred = DeferredBuild()
    with deferred:
        module = build()
    for value, wanted in zip(deferred.values(module), expected):
        assert torch.equal(value, wanted)


def test_a_value_may_be_looked_at_while_building() -> None:
    torch.manual_seed(0)
    with DeferredBuild():
        drawn = torch.rand(3)
        looked_at, position = float(drawn.sum()), drawn.gt(0).nonzero()
    torch.manual_seed(0)
    assert looked_at == float(torch.rand(3).sum()) and position.tolist() == [[0], [1], [2]]


def test_what_is_only_memory_has_no_value() -> None:
    build = DeferredBuild()
    with build:
        empty, written, zeros = torch.empty(3), torch.empty(3), torch.zeros(3)
        written[:] = 1.0
    assert [build.has_value(tensor) for tensor in (empty, written, zeros)] == [False, True, True]
