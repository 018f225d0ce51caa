from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.materialise import materialise, own_tensors
from lightning_sentinel.pipeline.stages.skeleton import ForeignLayer, Skeleton

CPU = torch.device("cpu")


def net() -> nn.Sequential:
    layers = nn.Sequential(nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 5, bias=False))
    layers[2].weight = layers[0].weight
    layers[1][0].bias.requires_grad_(False)
    layers[1][0].weight.note = "of the author"
    return layers


def without(*names: str) -> tuple[nn.Sequential, Skeleton]:
    layers = net()
    skeleton = Skeleton(layers, CPU)
    for name in names:
        skeleton.take_out(name)
    skeleton.let_go()
    return layers, skeleton


def described(module: nn.Module) -> dict[str, Any]:
    return {name: (p.shape, p.dtype, p.requires_grad, vars(p)) for name, p in module.named_parameters(remove_duplicate=False)}


def test_inside_it_is_the_whole_module_in_all_but_its_memory() -> None:
    whole = net()
    cut, skeleton = without("0", "1")
    assert [name for name, _ in cut.named_parameters()] == ["2.weight"]
    with skeleton.put_back():
        assert described(cut) == described(whole)
        assert [type(part) for part in cut.modules()] == [type(part) for part in whole.modules()]
        assert cut[0].weight is cut[2].weight, "what is tied is tied"
        tensors = [tensor for part in cut[1].modules() for _, tensor in own_tensors(part)]
        assert max(tensor.untyped_storage().nbytes() for tensor in tensors) <= 8
    assert isinstance(cut[1], ForeignLayer) and [name for name, _ in cut.named_parameters()] == ["2.weight"]


def test_what_is_tied_stays_so_when_it_gets_its_values() -> None:
    """Of layers that were built without them: else the tied weight would be one that no optimizer steps."""
    build = DeferredBuild()
    with build:
        cut = net()
    skeleton = Skeleton(cut, CPU)
    for name in ("1", "2"):
        skeleton.take_out(name)
    skeleton.let_go()
    materialise(cut, build, skeleton.modules())
    (weight,) = cut.parameters()
    with skeleton.put_back():
        assert cut[2].weight is weight and not cut[1][0].weight.is_meta
        optimizer = torch.optim.SGD(cut[2].parameters(), lr=0.1)
    skeleton.leave(optimizer)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == [id(weight)]


def test_it_is_taken_out_again_after_an_error() -> None:
    cut, skeleton = without("1")
    with pytest.raises(ArithmeticError), skeleton.put_back():
        raise ArithmeticError
    assert isinstance(cut[1], ForeignLayer)


def test_what_is_out_already_is_left_alone() -> None:
    cut, skeleton = without("1", "1.0", "1", "nowhere", "nowhere.0")
    with skeleton.put_back():
        assert isinstance(cut[1][0], nn.Linear)


def test_a_copy_of_the_module_can_be_made_without_it() -> None:
    cut, _ = without("1")
    assert isinstance(copy.deepcopy(cut)[1], ForeignLayer)


def test_a_layer_elsewhere_says_where_it_is() -> None:
    layer = ForeignLayer("net.4")
    with pytest.raises(PipelineModelError, match=r"net\.4 was called by itself.*once"):
        layer(torch.ones(1))
    with pytest.raises(AttributeError, match=r"net\.4 is on another stage.*'weight'.*except in configure_optimizers"):
        _ = layer.weight
    assert not hasattr(layer, "bias") and list(layer.parameters()) == []


def one_group(parameters: Callable[[nn.Sequential], Iterable[Any]]) -> Callable[[nn.Sequential], list[dict[str, Any]]]:
    return lambda layers: [{"params": list(parameters(layers))}]


OPTIMIZERS = [
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    lambda groups: torch.optim.AdamW(groups, lr=0.1),
    lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    lambda groups: torch.optim.RMSprop(groups, lr=0.1, foreach=True),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "groups",
    [
        one_group(lambda layers: layers[1].parameters()),
        one_group(lambda layers: filter(lambda p: p.requires_grad, layers.parameters())),
        one_group(lambda layers: [layers[1][0].weight]),
        lambda layers: [{"params": list(layers[0].parameters()), "lr": 0.5}, {"params": list(layers[1].parameters()), "lr": 0.2}],
        lambda layers: [{"params": list(layers.named_parameters())}],
    ],
    ids=["one layer", "trainable", "one weight", "two groups", "named"],
)
def test_an_optimizer_of_any_part_keeps_what_is_here_and_its_groups(
    optimizer: Callable[[Any], torch.optim.Optimizer], groups: Callable[[nn.Sequential], list[dict[str, Any]]]
) -> None:
    whole = optimizer(groups(net()))
    cut, skeleton = without("1")
    with skeleton.put_back():
        made = optimizer(groups(cut))
    skeleton.leave(made)
    mine = {id(parameter) for parameter in cut.parameters()}
    assert len(made.param_groups) == len(whole.param_groups)
    for group, other in zip(made.param_groups, whole.param_groups):
        assert {id(parameter) for parameter in group["params"]} <= mine
        assert group["lr"] == other["lr"]
        assert len(group.get("param_names", group["params"])) == len(group["params"])
    assert {id(parameter) for parameter in made.state} <= mine
    for parameter in cut.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    made.load_state_dict(made.state_dict())
