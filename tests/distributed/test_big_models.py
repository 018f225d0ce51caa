"""Models of which a stage has only its own layers are the models that they would be in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_sentinel as ls
from tests.distributed import big_tasks, world

BANNED = ls.Response(banned=[ls.Worker(1, 0)])
TIED = {"net.0.words.weight", "net.5.weight"}


def test_dropout_is_the_same_on_any_mesh() -> None:
    expected = big_tasks.train_dropping(1, 1, "virtual", {})
    again = big_tasks.train_dropping(1, 1, "virtual", {"activation_checkpointing": True})
    runs = [expected, again, big_tasks.train_dropping(3, 4, "virtual", {})]
    # Honest workers that were audited at every turn and drew anything else would be banned.
    audited = {"verification": ls.Verification(warmup_steps=2), "response": ls.Response(audit_rate=0.3)}
    meshes = [(4, 1, {"activation_checkpointing": True}), (2, 2, audited), (1, 4, {})]
    ranks = world.run(big_tasks.train_dropping_everywhere, 4, meshes, timeout=60)
    runs += [weights for rank in ranks for weights in rank]
    for weights in runs:
        for name, value in weights.items():
            assert (value - expected[name]).abs().max() <= 1e-6, name
    assert {name for rank in ranks for name in rank[0]} == set(expected)


@pytest.mark.parametrize("engine", ["virtual"])
def test_another_seed_drops_other_values(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = big_tasks.train_dropping(2, 1, engine, {})
    monkeypatch.setattr(big_tasks.L, "seed_everything", lambda seed, verbose: torch.manual_seed(8))
    other = big_tasks.train_dropping(2, 1, engine, {})
    assert any((weights[name] - other[name]).abs().max() > 1e-3 for name in weights)


CASES: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (4, 1, {}, {"late": True}),
    (2, 2, {"activation_checkpointing": True}, {"late": True, "frozen": "2"}),
    (4, 1, {"partition": "uniform"}, {"late": False, "frozen": "23", "optimizer": "sgd"}),
    (4, 1, {"partition": "uniform"}, {"late": True, "frozen": "01", "optimizer": "sgd"}),
    (2, 2, {"verification": ls.Verification(warmup_steps=100), "response": BANNED}, {"late": True, "optimizer": "sgd"}),
]


def test_tied_frozen_and_late_models_are_those_of_one_process(tmp_path: Path) -> None:
    ranks = world.run(big_tasks.train_tied_everywhere, 4, CASES, str(tmp_path), timeout=110)
    for number, (stages, replicas, _, arguments) in enumerate(CASES):
        alone = big_tasks.train_tied("auto", 1, 1, big_tasks.Tied(**arguments), accumulate_grad_batches=1)
        tolerance = 1e-6 if arguments.get("optimizer") == "sgd" else 1e-5
        seen: set[str] = set()
        for rank in (rank[number] for rank in ranks if not rank[number]["left_out"]):
            seen |= set(rank["weights"])
            assert len(rank["weights"]) < len(alone["weights"]) or stages == 1
            for name, value in rank["start"].items():
                assert torch.equal(value, alone["start"][name]), name
            for name, value in rank["weights"].items():
                assert (value - alone["weights"][name]).abs().max() <= tolerance, name
            assert rank["loss"] == pytest.approx(alone["loss"], abs=1e-5), number
        assert seen == set(alone["weights"])
        healthy = [rank[number]["resumed"] for rank in ranks if not rank[number]["left_out"]]
        tied = [weights[name] for weights in healthy for name in TIED & set(weights)]
        assert len(tied) == 2 * replicas - (4 - len(healthy)) and all(torch.equal(value, tied[0]) for value in tied)
        module = big_tasks.Tied.load_from_checkpoint(tmp_path / f"{number}.ckpt")
        assert module.net[0].words.weight is module.net[5].weight
        assert set(module.state_dict()) == set(alone["weights"])
        # What was saved goes on in one process as it does in many.
        checkpoint = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        (state,) = checkpoint["optimizer_states"]
        (saved,) = alone["trainer"].optimizers
        assert len(state["state"]) == len(saved.state_dict()["state"])
