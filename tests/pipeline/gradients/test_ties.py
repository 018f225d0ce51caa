"""Parameters that stages share train as the one parameter that they are."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_sentinel as ls
from lightning_sentinel.pipeline.gradients.ties import Untied
from lightning_sentinel.pipeline.stages.ties import find_ties


def tied_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7))
    net[3].weight = net[1].weight
    net[5].weight = net[0].weight
    return net


class Model(L.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = tied_layers(), optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(strategy: Any, optimizer: str, **options: Any) -> dict[str, Tensor]:
    module = Model(optimizer)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randint(0, 7, (96,), generator=generator) for _ in range(2)))
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=0.1, logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=12))
    assert module.net[5].weight is module.net[0].weight and module.net[3].weight is module.net[1].weight
    return {name: value.detach() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("stages", "replicas", "checkpointing"), [(1, 1, False), (2, 3, True), (6, 2, False)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_virtual_meshes_train_as_one_process(stages: int, replicas: int, checkpointing: bool, optimizer: str) -> None:
    strategy = ls.SentinelStrategy(stages, replicas, 2, verification=None, engine="virtual", activation_checkpointing=checkpointing)
    alone = train("auto", optimizer)
    for name, value in train(strategy, optimizer).items():
        assert (value - alone[name]).abs().max() <= (1e-6 if optimizer == "sgd" else 1e-5), name


def test_ties_are_found_where_they_cross_a_boundary() -> None:
    net = tied_layers()
    assert find_ties(net, list(net), (0, 6)) == ()
    (tie,) = find_ties(net, list(net), (0, 1, 6))
    assert tie == ("0.weight", frozenset({"0.weight", "5.weight"}), (0, 1))
    assert [(tie.name, tie.stages) for tie in find_ties(net, list(net), (0, 2, 5, 6))] == [
        ("0.weight", (0, 2)),
        ("1.weight", (0, 1)),
    ]


def test_each_stage_has_gradients_of_its_own_until_they_are_added_up() -> None:
    """Stages may have different shares of honest gradients, by which those of each are scaled."""
    net, x = tied_layers(), torch.tensor([1, 2, 3])
    net(x).square().sum().backward()
    expected = net[0].weight.grad.clone()
    net.zero_grad(set_to_none=True)
    untied = Untied([[net[0], net[1]], [net[2], net[3], net[4], net[5]]])
    for layer in net:
        x = untied.call(layer, x)
    x.square().sum().backward()
    (first,), (last,) = ([p for p in stage if p.shape == net[0].weight.shape] for stage in untied.parameters)
    assert first is net[0].weight and last is not first and last.data_ptr() == first.data_ptr()
    torch.testing.assert_close(first.grad + last.grad, expected)
    both = first.grad / 2 + last.grad * 3
    first.grad /= 2
    last.grad *= 3
    untied.add_up()
    assert torch.equal(first.grad, both) and last.grad is None
    assert [id(p) for p in untied.owners] == [id(p) for p in net.parameters()]
