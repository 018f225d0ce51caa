"""In real processes: who tampers is found, nobody else is blamed, and the weights stay as good as without the attack."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import campaign, world

ATTACKS = {"activation": campaign.ACTIVATION_ATTACKS, "gradient": campaign.GRADIENT_ATTACKS}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("direction", ["activation", "gradient"])
def test_one_malicious_worker_is_caught_and_nobody_else(direction: str, tmp_path: Path) -> None:
    attacks = {name: (direction, attack) for name, attack in ATTACKS[direction].items()}
    ranks = world.run(campaign.run, 9, str(tmp_path), attacks, "sentinel", 20, timeout=140)

    assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
    clean = ranks[0].pop("clean")
    assert not clean["banned"]
    for name, result in ranks[0].items():
        assert [worker for worker, _ in result["banned"]] == [campaign.GUILTY], name
        assert result["finite"], name
        assert result["loss"] <= 1.02 * clean["loss"], name
