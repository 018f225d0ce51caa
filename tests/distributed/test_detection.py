"""In real processes: who tampers is found, nobody else is blamed, and the weights stay as good as without the attack."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import campaign, world

ATTACKS = [
    ("activation", ("zeros", "sign", "scale -1")),
    ("activation", ("random", "x10")),
    ("gradient", ("zeros", "ones", "scale -1")),
    ("gradient", ("random", "x10", "sign")),
]


@pytest.mark.parametrize(("direction", "names"), ATTACKS)
def test_one_malicious_worker_is_caught_and_nobody_else(direction: str, names: tuple[str, ...], tmp_path: Path) -> None:
    known = campaign.ACTIVATION_ATTACKS if direction == "activation" else campaign.GRADIENT_ATTACKS
    attacks = {name: (direction, known[name]) for name in names}
    ranks = world.run(campaign.run, 9, str(tmp_path), attacks, "sentinel", 20, timeout=110)

    assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
    clean = ranks[0].pop("clean")
    assert not clean["banned"]
    for name, result in ranks[0].items():
        assert [worker for worker, _ in result["banned"]] == [campaign.GUILTY], name
        assert result["finite"], name
        assert result["loss"] <= 1.02 * clean["loss"], name
