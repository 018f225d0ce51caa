"""Both engines, on the same mesh, data and seed, give the same weights and the same detections."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_sentinel.mesh import Mesh, Worker
from tests.distributed import tasks, world

Found = dict[str, dict[str, Any]]
"""By attack what a run has found."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Found], Found]:
    """What each rank has found, and the virtual mesh; the warm-up from which most attacks go on is that of the virtual mesh."""
    warm = tmp_path_factory.mktemp("warm") / "warm.ckpt"
    tasks.attacked("virtual", None, warm)
    return world.run(tasks.attacked_in_turn, 6, "process", warm, timeout=160), tasks.attacked_in_turn("virtual", warm)


# The first of them has the runs of all.
@pytest.mark.timeout(180)
@pytest.mark.parametrize("attack", tasks.ATTACKS)
def test_the_virtual_engine_is_the_process_engine_in_one_process(attack: str, both: tuple[list[Found], Found]) -> None:
    ranks, virtual = [rank[attack] for rank in both[0]], both[1][attack]
    _, _, audit_rate = tasks.ATTACKS[attack]
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
