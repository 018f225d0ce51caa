from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.entry import find_entry


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 1)

    @property
    def layers(self) -> list[nn.Module]:
        return [self.first, *self.middle, self.head]

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nobody runs it")


class Around(nn.Module):
    """Calls what it has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_the_smallest_module_with_all_layers_however_deep() -> None:
    net = Net()
    module = Around(Around(net))
    assert find_entry(module, net.layers) is net
    assert find_entry(Around(net), net.layers[:2]) is net


def test_a_container_is_not_called() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    module = Around(layers)
    assert find_entry(module, list(layers)) is module


def test_layers_in_several_places_make_up_the_module() -> None:
    module = Around(Net())
    module.head = nn.Linear(1, 1)
    assert find_entry(module, [*module.inner.layers, module.head]) is module


def test_a_single_layer_is_its_own_entry() -> None:
    net = Net()
    assert find_entry(Around(net), [net]) is net


@pytest.mark.parametrize("named", [None, "inner"])
def test_what_torch_compile_returned_is_what_is_called(named: str | None) -> None:
    net = Net()
    module = Around(torch.compile(net, backend="eager"))
    assert find_entry(module, net.layers, named) is module.inner


def test_one_of_several_is_to_be_named() -> None:
    """Two that have the same layers, neither of which has the other."""
    net = Net()

    class Other(Net):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.first, self.middle, self.head = net.first, net.middle, net.head

    module = Around(net)
    module.other = Other()
    with pytest.raises(PipelineModelError, match=r"layers in inner and other, so.*SentinelStrategy\(sequential='inner'\)"):
        find_entry(module, net.layers)
    assert find_entry(module, net.layers, "other") is module.other


def test_an_outer_one_by_name() -> None:
    module = Around(Around(Net()))
    layers = module.inner.inner.layers
    assert find_entry(module, layers, "inner") is module.inner
    assert find_entry(module, layers, "") is module


@pytest.mark.parametrize("name", ["nowhere", "inner.first", "inner.middle"])
def test_a_name_of_something_else(name: str) -> None:
    module = Around(Net())
    with pytest.raises(PipelineModelError, match=rf"sequential='{name}' names no module of Around.*that do \['', 'inner'\]"):
        find_entry(module, module.inner.layers, name)
