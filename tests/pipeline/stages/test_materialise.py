"""Modules without values get those that they would have had, and errors say which cannot."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.materialise import materialise, reset_meta_layers, without_values

CPU = torch.device("cpu")


def on_meta() -> nn.ModuleList:
    with torch.device("meta"):
        return nn.ModuleList([nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.MultiheadAttention(4, 2)])


def reset(layers: nn.ModuleList, keep: range) -> dict[str, Tensor]:
    build = DeferredBuild()
    torch.manual_seed(2)
    reset_meta_layers(list(layers), [f"net.{index}" for index in range(len(layers))], build, CPU)
    for index in set(range(len(layers))) - set(keep):
        layers[index] = nn.Identity()
    materialise(layers, build)
    assert not without_values(layers)
    return layers.state_dict()


def test_meta_layers_are_reset_in_order_whoever_keeps_them() -> None:
    whole = reset(on_meta(), range(3))
    torch.manual_seed(2)
    expected = nn.ModuleList([nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())]).state_dict()
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    for keep in (range(1), range(1, 2), range(2, 3), range(1, 3)):
        part = reset(on_meta(), keep)
        assert part and all(torch.equal(value, whole[name]) for name, value in part.items())


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3))


class HalfForgetful(Forgetful):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Forgetful, r"net\.0\.1\.weight .* Forgetful has no reset_param"),
        (HalfForgetful, r"net\.0\.1\.scale .* does not give it a value"),
    ],
)
def test_a_meta_layer_that_cannot_be_reset_is_named(kind: type[nn.Module], says: str) -> None:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(2, 2), kind())
    with pytest.raises(PipelineModelError, match=says):
        reset_meta_layers([layer], ["net.0"], DeferredBuild(), CPU)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(PipelineModelError, match=r"weight of LazyLinear .* nn\.Linear for nn\.LazyLinear"):
        without_values(nn.Sequential(nn.LazyLinear(3)))


def test_a_meta_tensor_outside_the_layers_is_named() -> None:
    module = nn.Module()
    module.teacher = nn.Linear(2, 2, device="meta")
    with pytest.raises(PipelineModelError, match=r"Module\.teacher\.weight has no value"):
        materialise(module, DeferredBuild())


def test_all_that_a_module_holds_gets_its_value() -> None:
    """Ties stay, notes on parameters stay, and so do tensors that are neither parameters nor buffers."""

    def built() -> nn.Module:
        module = nn.ModuleDict({"in": nn.Embedding(5, 3), "out": nn.Linear(3, 5), "accuracy": torchmetrics.MeanMetric()})
        module["out"].weight = module["in"].weight
        module["out"].bias.requires_grad_(False)
        module["in"].weight.decays = False
        module.tables = {"rates": [torch.rand(2), "text"]}
        return module

    torch.manual_seed(4)
    expected = built()
    torch.manual_seed(4)
    build = DeferredBuild()
    with build:
        module = built()
    assert without_values(module)
    materialise(module, build)
    assert not without_values(module)
    assert module["out"].weight is module["in"].weight and module["in"].weight.decays is False
    assert not module["out"].bias.requires_grad
    assert torch.equal(module.tables["rates"][0], expected.tables["rates"][0])
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in module.state_dict().items())
    module["accuracy"].update(torch.tensor(3.0))
    assert module["accuracy"].compute() == 3.0
    module["out"](module["in"](torch.tensor([1]))).sum().backward()
    assert module["in"].weight.grad is not None
