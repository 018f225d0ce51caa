"""Both engines, on the same mesh, data and seed, give the same weights and the same detections."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.distributed import tasks, world


@pytest.mark.parametrize(
    ("attack", "direction"), [("sign", "activation"), ({"name": "scale", "factor": 10.0}, "gradient"), ("noise", "both")]
)
def test_the_virtual_engine_is_the_process_engine_in_one_process(attack: Any, direction: str) -> None:
    ranks = world.run(tasks.attacked, 6, "process", attack, direction)
    virtual = tasks.attacked("virtual", attack, direction)
    for rank in ranks:
        for name, value in rank["weights"].items():
            assert (value - virtual["weights"][name]).abs().max() <= 1e-6, name
        assert rank["banned"] == virtual["banned"]
        assert len(rank["detections"]) == len(virtual["detections"])
        for found, expected in zip(rank["detections"], virtual["detections"]):
            assert found.score == pytest.approx(expected.score, rel=1e-3)
            assert dataclasses.replace(found, score=0.0) == dataclasses.replace(expected, score=0.0)
