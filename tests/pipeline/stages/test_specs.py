"""Layers that DeepSpeed's specs describe are those that their constructors make, under names of the module's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from lightning_sentinel.pipeline.stages.deferred import DeferredBuild
from lightning_sentinel.pipeline.stages.layers import find_layers


def as_head(embedding: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, embedding.weight)


class Described(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def configure_pipeline(self) -> list[Any]:
        return [
            TiedLayerSpec("words", nn.Embedding, 7, 4),
            LayerSpec(nn.Linear, 4, 4, bias=False),
            self.norm,
            TiedLayerSpec("words", nn.Embedding, 7, 4, forward_fn=as_head),
        ]


def test_specs_become_layers_of_the_module() -> None:
    module = Described()
    found = find_layers(module, None, nullcontext())
    assert found.names == ("pipeline_layers.0", "pipeline_layers.1", "norm", "pipeline_layers.3")
    assert find_layers(module, None, nullcontext()).layers == found.layers
    words, linear, norm, _ = found.layers
    ids = torch.tensor([[1, 2]])
    x = ids
    for layer in found.layers:
        x = layer(x)
    assert torch.equal(x, nn.functional.linear(norm(linear(words(ids))), words.weight))
    assert set(module.state_dict()) >= {"pipeline_layers.0.weight", "pipeline_layers.3.weight", "norm.bias"}


def test_specs_are_built_in_order_and_may_be_put_off() -> None:
    torch.manual_seed(3)
    expected = find_layers(Described()).module.state_dict()
    torch.manual_seed(3)
    build = DeferredBuild()
    layers = find_layers(Described(), None, build).layers
    assert torch.equal(build.values([layers[1].weight])[0], expected["pipeline_layers.1.weight"])
    assert layers[3].weight is layers[0].weight
