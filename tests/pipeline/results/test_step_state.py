"""What steps keep on the last stage, between ranks that are threads."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.messages.tensor_trees import send_tree
from lightning_sentinel.pipeline.results.step_state import SharedStepState
from tests.pipeline.ranks import ranks

MESH = Mesh(3, 2)


class Keeping(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lists: list[list[float]] = [[], []]
        self.by_name: dict[str, Any] = {"steps": 0, "hooks": 0}
        self.thing = SimpleNamespace(total=0.0)
        self.register_buffer("confusion", torch.zeros(2, 2))

    def step(self, worker: Worker, whole: bool) -> None:
        self.by_name["begun"] = True
        if whole:
            self.lists[1].append(float(worker.replica))
            self.by_name["steps"] += 1
            self.confusion[0, worker.replica] += 1
            self.thing.total += 1
            self.latest = 3


def trainer(rank: int, stage: str) -> Any:
    return SimpleNamespace(global_rank=rank, state=SimpleNamespace(stage=stage))


def epoch(shared: SharedStepState, module: Keeping, rank: int, stage: str = "validate") -> None:
    worker = MESH.worker(rank)
    shared.on_validation_epoch_start(trainer(rank, stage), module)
    module.fresh = []
    shared.on_validation_batch_start(trainer(rank, stage), module, None, 0)
    if worker.stage in (0, 2):
        module.step(worker, whole=worker.stage == 2)
        module.fresh += [1] if worker.stage == 2 else []
    module.by_name["hooks"] += worker.stage
    shared.on_validation_epoch_end(trainer(rank, stage), module)


@pytest.mark.parametrize("banned", [(), (Worker(2, 1),)])
def test_what_steps_change_is_brought_to_their_pipeline_and_what_hooks_change_stays(banned: tuple[Worker, ...]) -> None:
    def work(rank: int) -> Keeping:
        module = Keeping()
        shared = SharedStepState(MESH, lambda: banned, nullcontext)
        # Within an epoch of training, in which nothing happens but two validations.
        shared.on_train_epoch_start(trainer(rank, "train"), module)
        shared.on_train_batch_start(trainer(rank, "train"), module, None, 0)
        for _ in range(2):
            epoch(shared, module, rank)
        shared.on_train_epoch_end(trainer(rank, "train"), module)
        return module

    with ranks(MESH.size) as world, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        everyone = world.run(work)
    for rank, module in enumerate(everyone):
        worker = MESH.worker(rank)
        told_by = 0 if banned and worker not in banned else worker.replica
        assert module.lists == [[], [float(told_by)] * 2]
        # Where a hook has changed nothing it is what it is on the last stage.
        assert module.by_name == {"steps": 2, "hooks": 2 * (worker.stage or 2), "begun": True}
        assert module.confusion.tolist() == [[2.0 * (told_by == 0), 2.0 * (told_by == 1)], [0.0, 0.0]]
        assert module.fresh == [1]
        # No data, and a name that no other rank has.
        assert (module.thing.total, hasattr(module, "latest")) == ((2.0, True) if worker.stage == 2 else (0.0, False))
    told = [str(one.message) for one in said if "has changed in an epoch" in str(one.message)]
    assert sum("self.thing" in one for one in told) >= 1 and sum("self.latest" in one for one in told) == 1


@pytest.mark.parametrize("changes", [None, [1], [["lists", 3, ["plain", 1]]], [["by_name", [["list", []]], ["plain", 1]]]])
def test_changes_that_are_none_name_their_sender(changes: Any) -> None:
    mesh = Mesh(2, 1)

    def work(rank: int) -> None:
        if rank == 0:
            return send_tree(changes, 1)
        shared, module = SharedStepState(mesh, lambda: (), nullcontext), Keeping()
        return shared.on_validation_epoch_end(trainer(rank, "validate"), module)

    with (
        ranks(mesh.size) as world,
        pytest.raises(MalformedMessageError, match="Rank 0 does not tell what its steps keep") as raised,
    ):
        world.run(work)
    assert raised.value.rank == 0
