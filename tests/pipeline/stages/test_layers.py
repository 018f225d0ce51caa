from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.stages.layers import find_layers

CPU = torch.device("cpu")


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


class Plain(L.LightningModule):
    def __init__(self, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class Hooked(Plain):
    """Layers in attributes of every kind; ``answer`` is what the hook returns."""

    def __init__(self, answer: Callable[[Hooked], Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.answer = answer

    def configure_pipeline(self) -> Any:
        return self.answer(self)


def in_order(module: Hooked) -> list[nn.Module]:
    return [module.embed, *module.body.blocks, module.head]


def owners_of(module: nn.Module, names: tuple[str, ...]) -> set[str]:
    return {key for key in module.state_dict() if any(key.startswith(f"{name}.") for name in names)}


class TestSequential:
    def test_the_only_one_is_found(self) -> None:
        module = Plain(loss=nn.MSELoss(), net=net())
        found = find_layers(module)
        assert found.entry is module.net
        assert found.layers == tuple(module.net)
        assert found.names == ("net.0", "net.1", "net.2", "net.3", "net.4")
        assert found.parameter_names == [name for name, _ in module.named_parameters()]
        assert found.state_names == list(module.state_dict())

    def test_named_among_several(self) -> None:
        module = Plain(body=net(), augment=nn.Sequential(nn.Dropout(0.1)))
        found = find_layers(module, "body")
        assert found.entry is module.body
        assert found.names[0] == "body.0"

    def test_named_inside_another_module(self) -> None:
        inner = nn.Module()
        inner.layers = net()
        module = Plain(model=inner)
        assert find_layers(module, "model.layers").names[1] == "model.layers.1"

    def test_none(self) -> None:
        with pytest.raises(PipelineModelError, match=r"Plain has no nn\.Sequential.*configure_pipeline"):
            find_layers(Plain(layer=nn.Linear(2, 2)))

    def test_two(self) -> None:
        with pytest.raises(PipelineModelError, match=r"2 nn\.Sequential attributes \(first, second\).*sequential="):
            find_layers(Plain(first=net(), second=net()))

    @pytest.mark.parametrize("name", ["nett", "layer", "net.0"])
    def test_wrong_name(self, name: str) -> None:
        module = Plain(net=net(), layer=nn.Linear(2, 2).requires_grad_(False))
        with pytest.raises(PipelineModelError, match=rf"sequential='{name}' names no nn\.Sequential of Plain; it has \['net'\]"):
            find_layers(module, name)

    def test_wrong_name_where_there_is_none(self) -> None:
        with pytest.raises(PipelineModelError, match=r"sequential='net' names no.*none at top level"):
            find_layers(Plain(layer=nn.Linear(2, 2)), "net")

    def test_a_layer_without_parameters_that_occurs_twice_runs_twice(self) -> None:
        """``nn.Sequential`` runs it at both places; a pipeline must do the same, or refuse."""
        act = nn.Softplus()
        module = Plain(net=nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act))
        x = torch.linspace(-1, 1, 6).view(2, 3)
        whole = module.net(x)
        try:
            found = find_layers(module)
        except PipelineModelError:
            return
        for layer in found.layers:
            x = layer(x)
        assert torch.equal(x, whole)
        assert found.names == ("net.0", "net.1", "net.2", "net.3")

    def test_a_layer_with_parameters_that_occurs_twice_is_refused(self) -> None:
        layer = nn.Linear(3, 3)
        with pytest.raises(PipelineModelError):
            find_layers(Plain(net=nn.Sequential(layer, nn.ReLU(), layer)))


class TestHook:
    def test_nested_attributes(self) -> None:
        module = Hooked(in_order)
        found = find_layers(module)
        assert found.entry is module
        assert found.layers == tuple(in_order(module))
        assert found.names == ("embed", "body.blocks.0", "body.blocks.1", "body.blocks.2", "head")

    def test_an_iterator_will_do(self) -> None:
        assert find_layers(Hooked(lambda m: iter(in_order(m)))).names[-1] == "head"

    def test_it_goes_before_a_sequential(self) -> None:
        module = Hooked(in_order)
        module.other = nn.Sequential(nn.Dropout(0.5))
        assert find_layers(module).entry is module

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (lambda m: {"embed": m.embed}, r"configure_pipeline returned dict; it must return a list of nn\.Module"),
            (lambda m: "embed", r"configure_pipeline returned str; it must return a list"),
            (lambda m: None, r"configure_pipeline returned NoneType; it must return a list"),
            (lambda m: m.embed, r"configure_pipeline returned Linear; it must return a list"),
            (lambda m: [m.embed, torch.relu], r"returned \w+ at position 1; every layer must be an nn\.Module"),
            (lambda m: [m.embed, nn.Linear(4, 4)], r"at position 1 a Linear that is no attribute.*Assign it in __init__"),
            (lambda m: [m.embed, m.head, m.embed], r"returned \['embed'\] more than once; .*must be one layer"),
        ],
        ids=["dict", "str", "None", "module", "function", "stranger", "twice"],
    )
    def test_refused(self, answer: Callable[[Hooked], Any], says: str) -> None:
        with pytest.raises(PipelineModelError, match=says) as raised:
            find_layers(Hooked(answer))
        assert "Hooked" in str(raised.value)


class TestParameters:
    def test_trainable_outside(self) -> None:
        module = Plain(net=net(), scale=nn.Parameter(torch.ones(1)), gate=nn.Linear(2, 2))
        with pytest.raises(PipelineModelError, match=r"outside its pipeline: .*scale.*gate\.weight.*requires_grad_\(False\)"):
            find_layers(module)

    def test_many_outside_are_counted(self) -> None:
        extra = {f"extra{i}": nn.Parameter(torch.ones(1)) for i in range(6)}
        with pytest.raises(PipelineModelError, match="and 2 more"):
            find_layers(Plain(net=net(), **extra))

    def test_left_out_of_the_hook(self) -> None:
        with pytest.raises(PipelineModelError, match=r"outside its pipeline: head\.weight, head\.bias"):
            find_layers(Hooked(lambda m: in_order(m)[:-1]))

    def test_frozen_outside_is_fine(self) -> None:
        teacher = nn.Linear(2, 2).requires_grad_(False)
        assert len(find_layers(Plain(net=net(), teacher=teacher)).layers) == 5

    def test_tied_across_layers(self) -> None:
        module = Plain(net=nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5, bias=False)))
        module.net[2].weight = module.net[0].weight
        assert find_layers(module).parameter_names == ["net.0.weight"]

    def test_a_module_in_two_layers_is_refused(self) -> None:
        norm = nn.LayerNorm(3)
        module = Plain(net=nn.Sequential(nn.Sequential(nn.Linear(3, 3), norm), nn.Tanh(), nn.Sequential(nn.Linear(3, 3), norm)))
        with pytest.raises(PipelineModelError, match=r"net\.0, net\.2 share parameters by sharing a module.*head\.weight = "):
            find_layers(module)

    def test_tied_inside_one_layer_is_fine(self) -> None:
        block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        block[1].weight = block[0].weight
        assert find_layers(Plain(net=nn.Sequential(block, nn.Linear(3, 3)))).names == ("net.0", "net.1")

    def test_a_layer_inside_another_is_refused(self) -> None:
        with pytest.raises(PipelineModelError, match="share parameters"):
            find_layers(Hooked(lambda m: [m.embed, m.body.blocks, m.body.blocks[1], m.head]))


class TestKeepOnly:
    CUTS = [(0, 2), (2, 3), (3, 5)]

    @pytest.mark.parametrize("build", [lambda: Plain(net=net()), lambda: Hooked(in_order)], ids=["sequential", "hook"])
    def test_state_dict_of_a_stage(self, build: Callable[[], Plain]) -> None:
        whole = build()
        whole.eval()
        names = find_layers(whole).names
        x = start = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        seen: list[str] = []
        for first, stop in self.CUTS:
            stage = copy.deepcopy(whole)
            expected = owners_of(stage, names[first:stop])
            find_layers(stage).keep_only(first, stop, CPU)
            state = stage.state_dict()
            assert set(state) == expected
            assert all(torch.equal(value, whole.state_dict()[name]) for name, value in state.items())
            assert {name for name, _ in stage.named_parameters()} <= expected
            seen += state
            for index, name in enumerate(names):
                layer = stage.get_submodule(name)
                if first <= index < stop:
                    x = layer(x)
                else:
                    with pytest.raises(PipelineModelError, match=rf"layer {name} was called by itself.*encoder and a decoder"):
                        layer(x)
        assert sorted(seen) == sorted(whole.state_dict())

        for name in names:
            start = whole.get_submodule(name)(start)
        assert torch.equal(x, start)

    @pytest.mark.parametrize("alias_first", [True, False])
    def test_a_layer_with_a_second_name(self, alias_first: bool) -> None:
        """``self.encoder = ...; self.net = nn.Sequential(self.encoder, ...)``: whoever does not own it must not keep it."""
        encoder = nn.Linear(3, 4)
        layers = nn.Sequential(encoder, nn.Linear(4, 2))
        module = Plain(encoder=encoder, net=layers) if alias_first else Plain(net=layers, encoder=encoder)
        own = list(layers[1].parameters())
        try:
            found = find_layers(module)
        except PipelineModelError:
            return
        found.keep_only(1, 2, CPU)
        assert [id(p) for p in module.parameters()] == [id(p) for p in own]
        assert set(module.state_dict()) == {"net.1.weight", "net.1.bias"}
