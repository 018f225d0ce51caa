"""What each stage may say of a module."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import torch
from torch import nn

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.stages.partition import cut


class Module(L.LightningModule):
    """Beside its layers it has a layer of its own; the head shares its weight with the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm1d(3, affine=False)
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.net[2].weight = self.net[0].weight

    def training_step(self, batch: object, batch_idx: int) -> None: ...


def test_a_stage_speaks_for_its_own_entries_and_the_last_for_what_all_have() -> None:
    module = Module()
    whole = cut(module, Mesh(3, 1), "uniform", None, False, None, torch.device("cpu"))
    model = replace(whole, pipeline=object())
    speaks = {name: {stage for stage in range(3) if model.speaks_for(stage, name)} for name in module.state_dict()}
    assert speaks["net.0.weight"] == speaks["net.2.weight"] == {0, 2}
    assert speaks["net.0.bias"] == {0} and speaks["net.1.running_mean"] == {1} and speaks["net.2.bias"] == {2}
    assert speaks["normalise.running_mean"] == speaks["normalise.running_var"] == {2}
    assert [stage for stage in range(3) if model.speaks_for(stage, "net.1.weight_mask")] == [1]
    assert all(whole.speaks_for(0, name) for name in speaks), "one process has all"
