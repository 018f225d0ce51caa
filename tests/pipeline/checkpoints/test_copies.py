from __future__ import annotations

import pytest
import torch

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.checkpoints.copies import odd_copies, odd_workers
from tests.pipeline.ranks import ranks

MESH = Mesh(2, 3)


@pytest.mark.parametrize(
    ("copies", "odd"),
    [("aaa", ""), ("aab", "2"), ("baa", "0"), ("abc", ""), ("aabb", ""), ("aabbb", "01"), ("ab", ""), ("a", ""), ("", "")],
)
def test_those_that_differ_from_more_than_half_of_the_stage_are_odd(copies: str, odd: str) -> None:
    of_stage = {Worker(1, replica): copy.encode() for replica, copy in enumerate(copies)}
    assert odd_workers(of_stage) == {Worker(1, int(replica)) for replica in odd}


@pytest.mark.parametrize("banned", [set(), {Worker(1, 1)}])
def test_a_copy_that_differs_in_one_bit_is_known_to_all_ranks_and_those_of_banned_workers_are_not_compared(
    banned: set[Worker],
) -> None:
    def work(rank: int) -> frozenset[Worker]:
        worker = MESH.worker(rank)
        weights = [torch.nn.Parameter(torch.full((2, 3), float(worker.stage))), torch.nn.Parameter(torch.ones(4))]
        if worker in (Worker(0, 2), Worker(1, 1)):
            weights[1].data.view(torch.int32)[3] ^= 1
        return odd_copies(weights, MESH, banned)

    with ranks(MESH.size) as world:
        found = world.run(work)
    assert found == [{Worker(0, 2), Worker(1, 1)} - banned] * MESH.size
