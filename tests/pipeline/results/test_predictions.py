from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.results.predictions import share_predictions
from lightning_sentinel.wiring import MicroBatchId, Wiring
from tests.pipeline.ranks import Ranks, ranks, same_tree


def prediction(part: MicroBatchId) -> Any:
    """As many rows as no other part has, and values that say whose they are."""
    rows = torch.full((1 + part.micro_batch, 2), 10.0 * part.replica + part.micro_batch)
    return {"rows": rows, "loss": rows.sum(), "more": (rows.long(), f"{part.replica}/{part.micro_batch}")}


def joined(replica: int, micro_batches: int) -> Any:
    parts = [prediction(MicroBatchId(replica, number)) for number in range(micro_batches)]
    names = [part["more"][1] for part in parts]
    return {
        "rows": torch.cat([part["rows"] for part in parts]),
        "loss": torch.stack([part["loss"] for part in parts]),
        "more": (torch.cat([part["more"][0] for part in parts]), names if micro_batches > 1 else names[0]),
    }


def shared(world: Ranks, mesh: Mesh, wiring: Wiring, predict: Callable[[MicroBatchId], Any] = prediction) -> list[Any]:
    def work(rank: int) -> Any:
        worker, lane = mesh.worker(rank), wiring.lane(mesh.worker(rank))
        ends = lane is not None and worker.stage == mesh.stages - 1
        results = {part: predict(part) for part in wiring.work[lane]} if ends else {}
        return share_predictions(results, mesh, wiring, worker, world.among(mesh.pipeline_ranks(worker.replica), world.timeout))

    return world.run(work)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data(), stages=st.integers(1, 3), replicas=st.integers(1, 4), micro_batches=st.integers(1, 3))
def test_every_rank_gets_what_was_predicted_for_its_replica_in_order(
    data: st.DataObject, stages: int, replicas: int, micro_batches: int
) -> None:
    mesh = Mesh(stages, replicas)
    banned = data.draw(st.sets(st.sampled_from(mesh.workers), max_size=replicas - 1))
    with ranks(mesh.size) as world:
        found = shared(world, mesh, Wiring.of(mesh, banned, micro_batches))
    for worker, result in zip(mesh.workers, found):
        # Samples of a replica without any worker are lost with it.
        lost = {Worker(stage, worker.replica) for stage in range(stages)} <= banned
        assert same_tree(result, None if lost else joined(worker.replica, micro_batches))


def test_while_nobody_is_banned_no_other_pipeline_is_waited_for() -> None:
    mesh, calls = Mesh(2, 2), []
    wiring = Wiring.of(mesh, micro_batches=2)
    with ranks(mesh.size) as world:
        # One replica has one more batch to predict than the other.
        def work(rank: int) -> None:
            worker = mesh.worker(rank)
            for _ in range(2 + worker.replica):
                results = {part: prediction(part) for part in wiring.work[worker.replica]} if worker.stage else {}
                calls.append(
                    share_predictions(
                        results, mesh, wiring, worker, world.among(mesh.pipeline_ranks(worker.replica), world.timeout)
                    )
                )

        world.run(work)
    assert len(calls) == 2 * (2 + 3)


@pytest.mark.parametrize("banned", [set(), {Worker(0, 0)}], ids=["all live", "one lane left out"])
def test_a_step_that_predicts_nothing_gives_nothing(banned: set[Worker]) -> None:
    mesh = Mesh(2, 2)
    with ranks(mesh.size) as world:
        assert shared(world, mesh, Wiring.of(mesh, banned), lambda _: None) == [None] * 4
