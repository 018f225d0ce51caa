"""A verified step on a device that is not the host: nothing of the host among its tensors, and the host waits where it has to.

Where processes share a device, what they tell each other goes through the host; that is counted apart.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import lightning_sentinel as ls
from tests.distributed import world
from tests.fakegpu import fits

pytestmark = pytest.mark.timeout(300)

WIRE = ("pipeline/messages/", "pipeline/processes/wire.py")
"""What is on its way to another rank."""
OTHERS = ("training_epoch_loop.py:_broadcast_sigterm_tensor",)
"""Lightning's loop, which asks all ranks in each batch whether one of them is to stop."""


def of_the_package(reads: Counter[str]) -> dict[str, int]:
    """Of those who made the host wait, those that have nothing to do with other ranks."""
    return {who: count for who, count in reads.items() if not who.startswith(WIRE) and who not in OTHERS}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["banned"] == expected["banned"] and found["audits"] == expected["audits"]
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def on_host() -> tuple[dict[str, Any], ...]:
    return fits.both("virtual", 3, 3, on_device=False)


def test_a_mesh_in_one_process_waits_once_a_step(on_host: tuple[dict[str, Any], ...]) -> None:
    ((plain, audited),) = world.run(fits.both, 1, "virtual", 3, 3, timeout=200)
    for found, expected in zip((plain, audited), on_host):
        assert found["device"] == "fakegpu:0"
        same(found, expected)
    once = {"pipeline/virtual.py:_on_host": 1}
    assert [of_the_package(step) for step in plain["reads"]] == [once] * len(plain["reads"])
    honest, lied = audited["reads"][: fits.LIES_FROM], audited["reads"][fits.LIES_FROM :]
    assert [of_the_package(step) for step in honest] == [once] * len(honest)
    # A batch with a lie is run twice, and audits of the first time read who lied.
    twice = {"pipeline/virtual.py:_on_host": 2, "pipeline/virtual_audits.py:_error": 1}
    assert of_the_package(lied[0]) == twice and all(of_the_package(step) in (once, twice) for step in lied)
    assert set(audited["banned"]) == {ls.Worker(1, 1)}


def test_processes_that_share_a_device_wait_once_a_step() -> None:
    ranks = world.run(fits.both, 4, "process", 2, 2, True, False, timeout=200)
    plain, _ = fits.both("virtual", 2, 2, on_device=False, lies=False)
    for found, audited in ranks:
        assert found["device"] == audited["device"] == "fakegpu:0"
        assert audited["audits"] > 0 and not audited["banned"]
        for name, value in found["weights"].items():
            torch.testing.assert_close(value, plain["weights"][name], rtol=0, atol=1e-6)
        end, audits = {"pipeline/exchange.py:run": 1}, {"pipeline/recovery/auditing.py:_decided": 1}
        # In the first batch names are agreed on, and the ends see whether they have read the same, for which nobody waits.
        agreed = {"pipeline/exchange.py:run": 2}
        assert [of_the_package(step) for step in found["reads"]] == [agreed, *[end] * (len(found["reads"]) - 1)]
        assert [of_the_package(step) for step in audited["reads"]] == [
            agreed | audits,
            *[end | audits] * (len(audited["reads"]) - 1),
        ]
        # All that auditors are given is copied at once.
        assert all(step["pipeline/messages/tensor_trees.py:pack_all"] == 1 for step in audited["reads"])
        # Each of the two micro-batches is sent to one neighbour, and copied for that once, elements and flag together.
        assert [step["pipeline/messages/transport.py:_messages"] for step in found["reads"]] == [2] * (fits.STEPS - 1)
