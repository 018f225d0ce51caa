"""Averages of weights are those of one process, in the run and in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sentinel.pipeline.checkpoints.sharded import consolidate
from tests.distributed import averaging_tasks, world

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    at = tmp_path_factory.mktemp("averages")

    def run(callback: str, mesh: tuple[int, int], form: str, epochs: int, source: str | None, target: str) -> dict[str, Any]:
        files = {"source": None if source is None else at / source, "target": at / target}
        return {"callback": callback, "mesh": mesh, "form": form, "epochs": epochs, **files}

    together = [
        run("mean", (2, 2), "full", 2, None, "mean"),
        run("late", (4, 1), "full", 3, None, "late"),
        run("moving", (2, 2), "sharded", 1, None, "moving, first"),
        run("moving", (4, 1), "full", 2, "moving, first", "moving, sharded"),
        run("moving", (1, 4), "sharded", 2, "moving, alone, first", "moving, of one process"),
    ]
    alone = [
        run("mean", (1, 1), "full", 2, None, "mean, alone"),
        run("late", (1, 1), "full", 3, None, "late, alone"),
        run("moving", (1, 1), "full", 1, None, "moving, alone, first"),
        run("moving", (1, 1), "full", 2, "moving, alone, first", "moving, alone"),
    ]
    found = {Path(one["target"]).name: result for one, result in zip(alone, averaging_tasks.train(alone))}
    ranks = world.run(averaging_tasks.train, 4, together)
    consolidate(at / "moving, of one process", at / "moving, consolidated")
    return {"at": at, "ranks": [dict(zip([Path(one["target"]).name for one in together], rank)) for rank in ranks], **found}


WAYS = [
    ("mean", "mean, alone"),
    ("late", "late, alone"),
    ("moving, sharded", "moving, alone"),
    ("moving, of one process", "moving, alone"),
]


@pytest.mark.parametrize(("name", "expected"), WAYS)
def test_weights_and_the_loss_of_the_average_equal_those_of_one_process(name: str, expected: str, runs: dict[str, Any]) -> None:
    seen = set()
    for rank in runs["ranks"]:
        assert rank[name]["loss"] == pytest.approx(runs[expected]["loss"], abs=1e-5)
        for parameter, value in rank[name]["weights"].items():
            seen.add(parameter)
            assert (value - runs[expected]["weights"][parameter]).abs().max() <= TOLERANCE, parameter
    assert seen == set(runs[expected]["weights"])


@pytest.mark.parametrize(
    ("name", "expected"), [*WAYS[:3], ("moving, consolidated", "moving, alone"), ("moving, first", "moving, alone, first")]
)
def test_checkpoints_have_the_average_and_what_it_is_of(name: str, expected: str, runs: dict[str, Any]) -> None:
    if (runs["at"] / name).is_dir():
        consolidate(runs["at"] / name, runs["at"] / f"{name}, whole")
        name = f"{name}, whole"
    found, one = (torch.load(runs["at"] / path, weights_only=True) for path in (name, expected))
    assert set(found) - {"lightning_sentinel"} == set(one)
    for key in {"state_dict", "current_model_state"} & set(one):
        assert list(found[key]) == list(one[key])
        for parameter, value in one[key].items():
            torch.testing.assert_close(found[key][parameter], value, rtol=0, atol=TOLERANCE)
    assert found.get("averaging_state") == one.get("averaging_state")
