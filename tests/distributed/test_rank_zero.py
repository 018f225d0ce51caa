"""What a step does besides returning a loss is seen on rank zero as in one process, and on the other ranks as far as it can be."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lightning_sentinel.mesh import Mesh
from tests.distributed import rank_zero_tasks, world
from tests.distributed.rank_zero_tasks import MICRO_BATCHES, REPLICAS, STAGES


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_step_on_rank_zero_is_as_in_one_process(tmp_path: Path) -> None:
    for name in ("mesh", "alone"):
        (tmp_path / name).mkdir()
    ranks = world.run(rank_zero_tasks.everything, STAGES * REPLICAS, str(tmp_path / "mesh"), timeout=110)
    alone = rank_zero_tasks.everything(str(tmp_path / "alone"))
    mesh, expected = Mesh(STAGES, REPLICAS), alone["keeping"]
    for number, rank in enumerate(ranks):
        worker, found = mesh.worker(number), rank["keeping"]
        ran = worker.stage == STAGES - 1
        # One worker asked for the end.
        assert found["steps"] == expected["steps"] == 4
        assert found["copies"] == {"train": REPLICAS, "validate": REPLICAS}
        assert f"was called outside of a step, and this process has stage {worker.stage} of {STAGES} only" in found["called"]
        assert found["whole"].keys() == (expected["whole"].keys() if number == 0 else set())
        for name, value in found["whole"].items():
            torch.testing.assert_close(value, expected["whole"][name], atol=1e-5, rtol=0)
        assert found["printed"] == (MICRO_BATCHES if ran else 0)
        assert found["metrics"].keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            assert found["metrics"][name] == pytest.approx(value, abs=1e-5), name
        assert found["test"][0]["test_auroc"] == pytest.approx(expected["test"][0]["test_auroc"], abs=1e-6)
        seen, whole = found["seen"], expected["seen"]
        mine = slice(worker.replica, None, REPLICAS)
        for one, other in zip(seen["lists"], whole["lists"]):
            torch.testing.assert_close(one, other[mine], atol=1e-5, rtol=0)
        assert seen["by_name"].tolist() == [*whole["by_name"][:22][mine].tolist(), *whole["by_name"][22:][mine].tolist()]
        assert seen["private"] == {name: size // REPLICAS for name, size in whole["private"].items()}
        assert seen["fresh"] == seen["count"] == whole["count"] // REPLICAS
        torch.testing.assert_close(seen["by_hand"], whole["by_hand"], atol=1e-5, rtol=0)
        assert seen["gathered"] == {(REPLICAS,)}
        # In the middle of an epoch a metric is where steps ran, and elsewhere that is said once.
        (first, said), *others = found["midway"]
        assert (first > 0, len(said)) == ((True, 0) if ran else (False, 1)) and not any(texts for _, texts in others)
        assert ran or ("self.accuracy.compute()" in said[0] and "stage 0 runs no whole step" in said[0])
        assert (found["meter"] > 0) == ran, "no data, so it stays where it is"
    for name in ("total", "array", "confusion"):
        one, other = (ranks[number]["keeping"]["seen"][name] for number in range(REPLICAS))
        torch.testing.assert_close(one + other, expected["seen"][name], atol=1e-4, rtol=0)
        for number, rank in enumerate(ranks):
            torch.testing.assert_close(rank["keeping"]["seen"][name], (one, other)[mesh.worker(number).replica], atol=0, rtol=0)
    logged, plain = rows(tmp_path / "mesh" / "metrics.csv"), rows(tmp_path / "alone" / "metrics.csv")
    for name in ("accuracy_step", "accuracy_epoch", "auroc/dataloader_idx_0", "mean/dataloader_idx_1"):
        values, others = ([float(row[name]) for row in one if row.get(name)] for one in (logged, plain))
        assert values == pytest.approx(others, abs=1e-5) and values, name
    # Once a micro-batch, as a step is run.
    direct = [row["direct"] for row in logged if row.get("direct")]
    assert direct == [f"{step}.0" for step in range(4) for _ in range(MICRO_BATCHES)]
    for rank in ranks:
        for name, value in rank["contrasting"].items():
            torch.testing.assert_close(value, alone["contrasting"][name], atol=1e-6, rtol=0)
    assert any("self.all_gather in training_step: with audits" in rank["audited"] for rank in ranks)
