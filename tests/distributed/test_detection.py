"""Who tampers is found, nobody else is blamed, and the weights stay as good as without the attack.

On the virtual mesh; that both engines find the same, attack by attack, is in ``test_engines``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import campaign

ATTACKS = {
    f"{direction} {name}": (direction, attack)
    for direction, attacks in (("activation", campaign.ACTIVATION_ATTACKS), ("gradient", campaign.GRADIENT_ATTACKS))
    for name, attack in attacks.items()
}
STEPS = 8
"""After the warm-up."""


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return campaign.run(str(tmp_path_factory.mktemp("campaign")), ATTACKS, "sentinel", STEPS, engine="virtual")


def test_without_an_attack_nobody_is_banned(virtual: dict[str, Any]) -> None:
    assert not virtual["clean"]["banned"]


@pytest.mark.parametrize("name", ATTACKS)
def test_one_malicious_worker_is_caught_and_nobody_else(name: str, virtual: dict[str, Any]) -> None:
    assert [worker for worker, _ in virtual[name]["banned"]] == [campaign.GUILTY]
    assert virtual[name]["finite"]
    assert virtual[name]["loss"] <= 1.02 * virtual["clean"]["loss"]
