"""With nobody malicious, the verified pipeline gives the weights of a plain run in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import tasks, world

TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}

CASES = [
    ("sgd", 2, 2, "excluding", {}),
    ("sgd", 3, 2, "reporting", {"gradient_clip_val": 0.05}),
    ("adamw", 2, 2, "plain", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.002, "gradient_clip_algorithm": "value"}),
    ("adamw", 2, 3, "sharding", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    ("adamw", 2, 2, "checkpointing", {}),
    (
        "adamw",
        3,
        2,
        "excluding",
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "limit_val_batches": 2, "val_check_interval": 2},
    ),
]


@pytest.mark.parametrize(("optimizer", "stages", "replicas", "mode", "options"), CASES)
def test_weights_equal_a_run_on_one_process(optimizer: str, stages: int, replicas: int, mode: str, options: dict[str, Any]) -> None:
    steps, batch_size = 4, 6
    ranks = world.run(tasks.fit, stages * replicas, optimizer, stages, replicas, steps, batch_size, mode, options)
    alone = tasks.fit_alone(optimizer, steps, batch_size * replicas, options)

    seen = set()
    for rank in ranks:
        for name, value in rank["weights"].items():
            seen.add(name)
            assert (value - alone["weights"][name]).abs().max() <= TOLERANCE[optimizer], name
    assert seen == set(alone["weights"])
    assert len({rank["flags"] for rank in ranks}) == 1
    assert mode in ("reporting", "sharding") or ranks[0]["flags"] == 0
    for name, value in alone["metrics"].items():
        for rank in ranks:
            assert rank["metrics"][name] == pytest.approx(value, abs=1e-5), name
