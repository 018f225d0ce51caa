"""Models of which a stage has only its own layers are the models that they would be in one process."""

from __future__ import annotations

import pytest

import lightning_sentinel as ls
from tests.distributed import big_tasks, world


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
    monkeypatch.setattr(big_tasks.L, "seed_everything", lambda seed, verbose: None)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    other = big_tasks.train_dropping(2, 1, engine, {})
    assert any((weights[name] - other[name]).abs().max() > 1e-3 for name in weights)
