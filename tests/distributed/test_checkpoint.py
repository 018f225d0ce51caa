"""A run that is stopped and resumed is the run that was not stopped, with what it had learned and whom it had banned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints.sharded import consolidate
from tests.distributed import checkpoint_tasks, tasks, world

TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5}


@pytest.mark.parametrize("attacked", [False, True])
def test_a_resumed_run_equals_an_unbroken_one(attacked: bool, tmp_path: Path) -> None:
    for number, rank in enumerate(world.run(tasks.resume, 4, str(tmp_path), attacked)):
        whole, second = rank["whole"], rank["second"]
        assert second["step"] == whole["step"] == 12
        assert second["banned"] == whole["banned"]
        assert second["flags"] == whole["flags"]
        assert set(whole["banned"]) == ({ls.Worker(1, 1)} if attacked else set())
        assert whole["weights"].keys() == second["weights"].keys()
        if Mesh(2, 2).worker(number) in whole["banned"]:
            continue  # nobody brings its weights up to date until a checkpoint is loaded
        for kind in ("weights", "verifiers"):
            for name, value in whole[kind].items():
                torch.testing.assert_close(second[kind][name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(("form", "attacked"), [("full", False), ("sharded", False), ("sharded", True)])
def test_in_the_middle_of_an_epoch_it_is_the_same_bit_for_bit(form: str, attacked: bool, tmp_path: Path) -> None:
    """Weights, optimizer, scheduler, samples and their augmentation, dropout, verifiers, ledger; no seed was set."""
    path = tmp_path / "at.ckpt"
    ranks = world.run(checkpoint_tasks.stopped_and_resumed, 4, str(tmp_path), form, attacked)
    assert path.is_dir() == (form == "sharded")
    for number, rank in enumerate(ranks):
        unbroken, resumed = rank["unbroken"], rank["resumed"]
        assert unbroken["banned"] == ({ls.Worker(1, 1)} if attacked else set())
        for kind in ("rates", "ledger", "step", "banned"):
            assert resumed[kind] == unbroken[kind], kind
        assert (len(unbroken["seen"]), len(resumed["seen"])) == (11, 4)
        torch.testing.assert_close(resumed["seen"], unbroken["seen"][7:], rtol=0, atol=0)
        if Mesh(2, 2).worker(number) not in unbroken["banned"]:
            for kind in ("weights", "verifiers"):
                torch.testing.assert_close(resumed[kind], unbroken[kind], rtol=0, atol=0, equal_nan=True)
    assert ranks[0]["unbroken"]["rates"] != [1e-2, 3e-3], "the scheduler has done something"
    received = ranks[0]["unbroken"]["received"]
    if form == "full":
        assert received > set(ranks[2]["unbroken"]["weights"]), "weights, and optimizer state"
        return
    # Nobody is sent another stage's weights, and nobody opens another stage's file.
    assert not received
    for number, rank in enumerate(ranks):
        parts = {name for name in rank["resumed"]["read"] if name.startswith("stage-")}
        assert {name.split("-")[1] for name in parts} == {str(Mesh(2, 2).worker(number).stage)}


class TestOtherMeshes:
    """Four steps, an epoch, in one place and two in another are six in one process."""

    @pytest.fixture(scope="class", params=["sgd", "adamw"])
    def runs(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        optimizer, at = request.param, tmp_path_factory.mktemp(request.param)
        checkpoint_tasks.go_on_alone(optimizer, 4, target=at / "alone")

        def leg(
            mesh: tuple[int, int], step: int, source: str | None, target: str, form: str = "full", zero: int = 0
        ) -> dict[str, Any]:
            names = {"source": None if source is None else at / source, "target": at / target}
            return {"mesh": mesh, "step": step, "form": form, "optimizer": optimizer, "zero": zero, **names}

        middle = [
            leg((2, 2), 2, None, "2x2 at 2", "sharded", zero=1),
            leg((1, 4), 4, "2x2 at 2", "1x4 at 4", zero=1),
            leg((4, 1), 4, "2x2 at 2", "4x1 at 4", "sharded"),
            leg((2, 2), 6, "4x1 at 4", "2x2, 4x1, 2x2", zero=1),
            leg((1, 4), 6, "1x4 at 4", "2x2, 1x4"),
            leg((2, 2), 6, "alone", "alone, 2x2", zero=1),
        ]
        ranks = world.run(checkpoint_tasks.go_on, 4, middle)
        world.run(checkpoint_tasks.go_on, 3, [leg((3, 1), 6, "4x1 at 4", "2x2, 4x1, 3x1", "sharded")])
        consolidate(at / "4x1 at 4", at / "consolidated")
        consolidate(at / "2x2, 4x1, 3x1", at / "2x2, 4x1, 3x1, consolidated")
        found: dict[str, Any] = {"at": at, "ranks": ranks}
        found |= {"tolerance": TOLERANCE[optimizer], "weights": checkpoint_tasks.go_on_alone(optimizer, 6)["weights"]}
        for source in ("alone", "1x4 at 4", "consolidated"):
            found[source] = checkpoint_tasks.go_on_alone(optimizer, 6, at / source)["weights"]
        return found

    def test_all_ways_lead_to_the_same_weights(self, runs: dict[str, Any]) -> None:
        ways = ["2x2, 4x1, 2x2", "2x2, 1x4", "alone, 2x2", "2x2, 4x1, 3x1, consolidated"]
        for way in ways:
            saved = torch.load(runs["at"] / way, weights_only=True)
            assert saved["global_step"] == 6, way
            close(saved["state_dict"], runs["weights"], runs["tolerance"], way)

    def test_with_zero_each_parameter_has_its_state_on_one_rank_of_its_stage(self, runs: dict[str, Any]) -> None:
        for legs in zip(*runs["ranks"]):
            stages, replicas = legs[0]["mesh"]
            for stage in range(stages):
                ranks = legs[stage * replicas : (stage + 1) * replicas]
                assert len({tuple(rank["parameters"]) for rank in ranks}) == 1
                if not ranks[0]["zero"]:
                    assert all(sorted(rank["kept"]) == sorted(rank["parameters"]) for rank in ranks)
                    continue
                assert sorted(size for rank in ranks for size in rank["kept"]) == sorted(ranks[0]["parameters"])
                loads = [sum(rank["kept"]) for rank in ranks]
                assert max(loads) - min(loads) <= max(ranks[0]["parameters"])

    def test_plain_lightning_goes_on_as_from_its_own_checkpoint(self, runs: dict[str, Any]) -> None:
        """Which is not as if it had never stopped: in the middle of a run of ``max_steps`` it trains on the first batch twice."""
        for source in ("1x4 at 4", "consolidated"):
            close(runs[source], runs["alone"], runs["tolerance"], source)

    def test_a_plain_checkpoint_is_evaluated(self, runs: dict[str, Any]) -> None:
        expected = checkpoint_tasks.evaluated(str(runs["at"] / "alone"))
        for found in world.run(checkpoint_tasks.evaluated, 2, str(runs["at"] / "alone")):
            assert found == pytest.approx(expected, rel=1e-4)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, message: str) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{message}, {name}: {m}")
