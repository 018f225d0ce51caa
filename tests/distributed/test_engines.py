"""Both engines, on the same mesh, data and seed, give the same weights and the same detections."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_sentinel.mesh import Mesh, Worker
from tests.distributed import tasks, world


@pytest.mark.parametrize(
    ("attack", "direction", "audit_rate"),
    [
        ("sign", "activation", None),
        ({"name": "scale", "factor": 10.0}, "gradient", None),
        ("noise", "both", None),
        # Too little to be flagged, so that it is for the random audits to find.
        ({"name": "add_noise", "strength": 0.02}, "both", 0.2),
    ],
)
def test_the_virtual_engine_is_the_process_engine_in_one_process(attack: Any, direction: str, audit_rate: float | None) -> None:
    ranks = world.run(tasks.attacked, 6, "process", attack, direction, audit_rate)
    virtual = tasks.attacked("virtual", attack, direction, audit_rate)
    assert set(virtual["banned"]) == {Worker(1, 1)}
    mesh = Mesh(3, 2) if audit_rate is None else Mesh(2, 3)
    for number, rank in enumerate(ranks):
        # Nobody brings a banned worker's weights up to date.
        weights = {} if mesh.worker(number) in virtual["banned"] else rank["weights"]
        for name, value in weights.items():
            assert (value - virtual["weights"][name]).abs().max() <= 1e-6, name
        assert (rank["banned"], rank["audits"]) == (virtual["banned"], virtual["audits"])
        assert len(rank["detections"]) == len(virtual["detections"])
        for found, expected in zip(rank["detections"], virtual["detections"]):
            assert found.score == pytest.approx(expected.score, rel=1e-3)
            assert dataclasses.replace(found, score=0.0) == dataclasses.replace(expected, score=0.0)
