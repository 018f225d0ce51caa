"""Who tampers is found, nobody else is blamed, and the weights stay as good as without the attack.

Every attack on the virtual mesh, one of each direction in nine processes; that both engines find the same is in ``test_engines``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import campaign, world

ATTACKS = {
    f"{direction} {name}": (direction, attack)
    for direction, attacks in (("activation", campaign.ACTIVATION_ATTACKS), ("gradient", campaign.GRADIENT_ATTACKS))
    for name, attack in attacks.items()
}
IN_PROCESSES = ["activation scale -1", "gradient sign"]
STEPS = 8
"""After the warm-up."""


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The clean run and each attack, all from the end of one warm-up."""
    attacks = {name: ATTACKS[name] for name in IN_PROCESSES}
    ranks = world.run(campaign.run, 9, str(tmp_path_factory.mktemp("campaign")), attacks, "sentinel", STEPS, timeout=110)
    assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
    return dict(ranks[0])


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return campaign.run(str(tmp_path_factory.mktemp("campaign")), ATTACKS, "sentinel", STEPS, engine="virtual")


@pytest.mark.parametrize("engine", ["in_processes", "virtual"])
def test_without_an_attack_nobody_is_banned(engine: str, request: pytest.FixtureRequest) -> None:
    assert not request.getfixturevalue(engine)["clean"]["banned"]


@pytest.mark.parametrize(
    ("engine", "name"), [*(("in_processes", name) for name in IN_PROCESSES), *(("virtual", name) for name in ATTACKS)]
)
def test_one_malicious_worker_is_caught_and_nobody_else(engine: str, name: str, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue(engine)
    assert [worker for worker, _ in results[name]["banned"]] == [campaign.GUILTY]
    assert results[name]["finite"]
    assert results[name]["loss"] <= 1.02 * results["clean"]["loss"]
