"""Between processes a worker whose layers or weight gradients break spoils no more than on the virtual mesh."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sentinel.mesh import Mesh
from tests.distributed import fault_tasks, world


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return world.run(fault_tasks.all_cases, 2 * fault_tasks.REPLICAS, timeout=110)


def test_who_corrupts_weight_gradients_is_banned_and_the_weights_are_those_of_a_clean_run() -> None:
    stages, replicas = 3, 4
    found = world.run(fault_tasks.corrupted, stages * replicas, stages, replicas, "process", timeout=110)
    for number, rank in enumerate(found):
        honest = Mesh(stages, replicas).worker(number) not in fault_tasks.CORRUPTING
        fault_tasks.check_corrupted(rank, stages, replicas, weighs=honest)


def test_what_is_spoiled_is_left_out_as_on_the_virtual_mesh(ranks: list[dict[str, Any]]) -> None:
    mesh = Mesh(2, fault_tasks.REPLICAS)
    for case in fault_tasks.CASES:
        expected = None if case == "robust" else fault_tasks.faulty("virtual", case)
        seen = set()
        for number, rank in enumerate(ranks):
            found = rank[case]
            assert fault_tasks.finite(found["weights"]) and fault_tasks.is_number(found["loss"]), (case, number)
            assert found["banned"] == [], case
            # A sign here and there is not odd enough for a flag, and so it is in the weights.
            assert set(found["flags"]) == (set() if case == "product" else {fault_tasks.WORKER}), case
            if expected is not None:
                assert (found["flags"], found["found"]) == (expected["flags"], expected["found"]), case
                for name, value in found["weights"].items():
                    assert (value - expected["weights"][name]).abs().max() <= 1e-5, (case, name, mesh.worker(number))
                seen |= set(found["weights"])
        assert expected is None or seen == set(expected["weights"])
