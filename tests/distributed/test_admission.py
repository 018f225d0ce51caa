"""A run that leaves machines out is the run of the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.bans import Ban, enter_bans
from tests.distributed import tasks, world


def fit(hosts: str, ledger: Path | None) -> dict[str, Any]:
    """Train on machines of these names, then validate with a Trainer of its own."""
    os.environ["LIGHTNING_SENTINEL_HOST"] = hosts[int(os.environ["LOCAL_RANK"])]
    module, found = tasks.Classifier("adamw"), {}
    for what in ("fit", "validate"):
        strategy = ls.SentinelStrategy(
            stages=2,
            micro_batches=2,
            verification=ls.Verification(warmup_steps=20),
            response=ls.Response(ledger=ledger),
            timeout=tasks.PATIENCE,
        )
        trainer = tasks.trainer(strategy, len(hosts), 3, limit_val_batches=2)
        getattr(trainer, what)(module, tasks.loader(8))
        found[what] = trainer.global_rank, trainer.world_size, strategy.mesh, trainer.is_global_zero
        if what == "fit":
            found["weights"] = tasks.local_weights(trainer.lightning_module)
            found["hosts"] = list(strategy.ledger.hosts.values())
            module = tasks.Classifier("adamw")
    found["val_loss"] = float(trainer.callback_metrics["val_loss"])
    return found


def test_those_in_the_mesh_train_as_if_the_others_were_not_there(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    enter_bans(ledger, [Ban(ls.Worker(1, 0), 9, host="b", hosts=4)])
    alone = world.run(fit, 2, "ac", None)
    results, failures = world.outcomes(fit, 4, "abcd", ledger)
    assert sorted(results) == [0, 2]
    assert {rank: failure.kind for rank, failure in failures.items()} == {1: "SystemExit", 3: "SystemExit"}
    for place, rank in enumerate((0, 2)):
        for what in ("fit", "validate"):
            assert results[rank][what] == alone[place][what] == (place, 2, Mesh(2, 1), place == 0)
        assert results[rank]["hosts"] == ["a", "c"]
        assert results[rank]["val_loss"] == alone[place]["val_loss"]
        assert results[rank]["weights"].keys() == alone[place]["weights"].keys()
        for name, value in alone[place]["weights"].items():
            torch.testing.assert_close(results[rank]["weights"][name], value, rtol=0, atol=0, msg=name)


def test_too_few_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    enter_bans(ledger, [Ban(ls.Worker(1, 0), 9, host="b", hosts=2)])
    results, failures = world.outcomes(fit, 2, "ab", ledger)
    assert not results and len(failures) == 2
    for failure in failures.values():
        assert failure.kind == "MeshExhaustedError"
        assert f"1 of the 2 processes are left, because {ledger} bans 'b'" in failure.message
