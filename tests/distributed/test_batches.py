"""A batch is what a loader gives: the same numbers on every mesh, from both ends, and after a ban."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh, Worker
from tests.distributed import batch_tasks, world


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return world.run(batch_tasks.everything, 4, timeout=110)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return batch_tasks.trained("auto", 1)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=1e-6)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert len(found["predicted"]) == len(expected["predicted"])
    for one, other in zip(found["predicted"], expected["predicted"]):
        assert one["names"] == other["names"] and one["tuple"] == other["tuple"]
        np.testing.assert_array_equal(one["numbers"], other["numbers"])
        torch.testing.assert_close(one["out"], other["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["all", "banned", "audited"])
def test_whatever_goes_by_samples_is_dealt_travels_and_comes_back(
    which: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for number, rank in enumerate(ranks):
        # Who is banned has old weights.
        if which != "banned" or number != Mesh(2, 2).rank(Worker(0, 1)):
            assert_same(rank[which], alone)


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2), (4, 1)])
def test_on_a_virtual_mesh_too(stages: int, replicas: int, alone: dict[str, Any]) -> None:
    where = ls.SentinelStrategy(stages, replicas, micro_batches=2, engine="virtual", verification=None)
    assert_same(batch_tasks.trained(where, 1), alone)


def test_a_module_deals_its_batches_itself(ranks: list[dict[str, Any]]) -> None:
    """Time first, through a layer that mixes what is along the first axis."""
    expected = batch_tasks.timely("auto", 1)
    meshes = [
        batch_tasks.timely(ls.SentinelStrategy(stages, replicas, micro_batches=2, engine="virtual", verification=None), 1)
        for stages, replicas in ((1, 1), (2, 2), (3, 1))
    ]
    for weights in (*meshes, *(rank["timely"] for rank in ranks)):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_batches_of_several_loaders_are_dealt_each_by_its_size(ranks: list[dict[str, Any]]) -> None:
    expected = batch_tasks.twofold("auto", 1)
    meshes = [
        batch_tasks.twofold(ls.SentinelStrategy(stages, replicas, micro_batches=3, engine="virtual", verification=None), 1)
        for stages, replicas in ((1, 1), (2, 2), (3, 1))
    ]
    for found in (*meshes, *(rank["twofold"] for rank in ranks)):
        for name, value in found["weights"].items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=1e-6)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)


def test_both_ends_draw_the_same_in_splits_augmentations_and_steps(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["differences"]["difference"] < 1e-6 and rank["differences"]["validated"] < 1e-6


def test_models_one_after_the_other_start_as_without_this_strategy(ranks: list[dict[str, Any]]) -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = batch_tasks.first_weights(lambda: "auto")
    virtual = batch_tasks.first_weights(lambda: ls.SentinelStrategy(2, 2, micro_batches=2, engine="virtual"))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert len({float(weight.sum()) for weight in expected}) == 4
    assert all(map(torch.equal, virtual, expected))
    for rank in ranks:
        assert len({float(weight.sum()) for weight in rank["first weights"]}) == 4
        for found, same in zip(rank["first weights"], ranks[0]["first weights"]):
            assert torch.equal(found, same), "all ranks go on alike"
        assert torch.equal(rank["first weights"][0], expected[0])


def test_ends_that_read_different_data_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "read different batches of 2 sample(s)" in rank["split before"] and "L.seed_everything" in rank["split before"]
        assert "for num_replicas=4, rank=0 on rank 0" in rank["sampler"] and "num_replicas=2, rank=0" in rank["sampler"]
