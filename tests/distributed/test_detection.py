"""In real processes: who tampers is found, nobody else is blamed, and the weights stay as good as without the attack."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import campaign, world

ATTACKS = {
    f"{direction} {name}": (direction, attack)
    for direction, attacks in (("activation", campaign.ACTIVATION_ATTACKS), ("gradient", campaign.GRADIENT_ATTACKS))
    for name, attack in attacks.items()
}
# All of them in turn, in nine processes.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the clean run and of each attack, all from the end of one warm-up."""
    ranks = world.run(campaign.run, 9, str(tmp_path_factory.mktemp("campaign")), ATTACKS, "sentinel", 12, timeout=380)
    assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
    return dict(ranks[0])


def test_without_an_attack_nobody_is_banned(results: dict[str, Any]) -> None:
    assert not results["clean"]["banned"]


@pytest.mark.parametrize("name", ATTACKS)
def test_one_malicious_worker_is_caught_and_nobody_else(name: str, results: dict[str, Any]) -> None:
    assert [worker for worker, _ in results[name]["banned"]] == [campaign.GUILTY]
    assert results[name]["finite"]
    assert results[name]["loss"] <= 1.02 * results["clean"]["loss"]
