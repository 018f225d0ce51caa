"""What a module may do, between processes: as in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import module_tasks, world


@pytest.mark.parametrize("stages", [1, 3])
def test_weights_logs_and_steps_are_those_of_one_process(stages: int) -> None:
    ranks = world.run(module_tasks.in_turn, stages, stages, timeout=120.0)
    alone = module_tasks.in_turn()
    for name, expected in alone.items():
        assert {key for rank in ranks for key in rank[name]["weights"]} == set(expected["weights"]), name
        for rank in ranks:
            assert rank[name]["steps"] == expected["steps"], name
            assert rank[name]["metrics"] == pytest.approx(expected["metrics"], abs=1e-5), name
            for key, value in rank[name]["weights"].items():
                torch.testing.assert_close(value, expected["weights"][key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("state_dict_type", ["full", "sharded"])
def test_an_optimizer_over_a_part_of_the_model(tmp_path: Path, state_dict_type: str) -> None:
    (tmp_path / "alone").mkdir()
    ranks = world.run(module_tasks.optimizers, 3, str(tmp_path), state_dict_type, 3, timeout=120.0)
    alone = module_tasks.optimizers(str(tmp_path / "alone"), state_dict_type)
    for name, expected in alone.items():
        # Each stage has all groups, some of them empty, and together they have all parameters.
        assert [sum(sizes) for sizes in zip(*(rank[name]["sizes"] for rank in ranks))] == expected["sizes"], name
        for rank in ranks:
            assert rank[name]["rates"] == pytest.approx(expected["rates"]), name
            for key, value in rank[name]["weights"].items():
                torch.testing.assert_close(value, expected["weights"][key], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clips itself", "configure_gradient_clipping has changed gradients itself"),
        ("apart", "was called by itself, but it is on another stage"),
        ("looks", "is on another stage, in another process, so 'weight' of it cannot be looked"),
        ("loses", "RuntimeError: the socket of the user's own service timed out"),
    ],
)
def test_what_one_stage_cannot_do_is_said(name: str, says: str) -> None:
    assert any(says in said for said in world.run(module_tasks.refused, 2, name))
